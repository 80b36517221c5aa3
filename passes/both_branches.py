"""``torch.cond`` while tracing: both branches, and a choice between what they give.

Its branches are pure functions, so that this gives the same numbers. A condition that follows from numbers and buffers
alone is known (see known_values.py): then only its branch is traced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .known_values import KnownValues


@contextlib.contextmanager
def both_branches(known: KnownValues) -> Iterator[None]:
    """While this is open, ``torch.cond`` is traced as a choice.

    Args:
        known: what is known of values, open at the same time.
    """

    def cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Sequence[Any] = ()) -> Any:
        if not isinstance(pred, torch.Tensor) or known.knows(pred):
            return (true_fn if pred else false_fn)(*operands)
        one, spec = pytree.tree_flatten(true_fn(*operands))
        other = pytree.tree_leaves(false_fn(*operands))
        chosen = [torch.where(pred.reshape(()), a, b) for a, b in zip(one, other, strict=True)]
        return pytree.tree_unflatten(chosen, spec)

    original = torch.cond
    torch.cond = cond
    try:
        yield
    finally:
        torch.cond = original
