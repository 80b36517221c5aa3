"""What a model keeps from one call for the next, such as a table of positions as long as the longest clip so far.

Where there is such a table a trace reads it, at other lengths a new one is made: the model seems to do otherwise there.
So it is traced as if it had not been called yet, if that gives the same numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .capture import as_for_inference, tensor_leaves

Kept = tuple[nn.Module, str]  # a module, and the name of an attribute or buffer of it


@contextlib.contextmanager
def dropped(kept: Sequence[Kept]) -> Iterator[None]:
    """While this is open, these are as before the first call: no tensors, numbers that are zero."""
    before = [(_place(m, name), name, _place(m, name)[name]) for m, name in kept]
    for place, name, value in before:
        place[name] = type(value)(0) if type(value) in (int, float, bool) else None
    try:
        yield
    finally:
        for place, name, value in before:
            place[name] = value


def _place(module: nn.Module, name: str) -> dict[str, Any]:
    return module._buffers if name in module._buffers else module.__dict__


@contextlib.contextmanager
def kept_by(model: nn.Module, found: list[Kept]) -> Iterator[None]:
    """Add to `found` what a call of the model in here changes of its attributes and buffers."""
    before = [(m, {**m.__dict__, **m._buffers}) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    yield
    for module, values in before:
        now = {**module.__dict__, **module._buffers}
        found.extend((module, name) for name, value in values.items() if now.get(name) is not value)


def alike_without(model: nn.Module, kept: Sequence[Kept], example: Sequence[torch.Tensor]) -> bool:
    """Whether the model gives the same without what it kept."""
    results = []
    for leave_out in ((), kept):
        with dropped(leave_out), as_for_inference(model), torch.no_grad():
            try:
                results.append(tensor_leaves(model(*example)))
            except Exception:
                return False
    return len(results[0]) == len(results[1]) and all(
        torch.equal(a, b) or torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(*results, strict=True)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape
    )
