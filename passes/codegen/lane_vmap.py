"""Any op for all lanes at once: what `torch.vmap` makes of it, with the number of lanes left open."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

FRONT = -1  # the lanes of a tensor lie in front of what it is for a batch of one
MIXED = -2  # they share a dimension with something else
Place = int | None  # or the dimension that they have to themselves; None: it is the same for all lanes


class Ambiguous(Exception):
    """Where a tensor's lanes lie cannot be told; they are then put in front of everything."""


def trace_vmapped(
    fake: FakeTensorMode,
    target: Any,
    flat: Sequence[Any],
    spec: pytree.TreeSpec,
    places: Mapping[int, Place],
    targets: Sequence[Place],
) -> tuple[fx.Graph, dict[tuple[fx.Node, int], tuple[int, int]]]:
    """The graph of an op under vmap, and for each of its numbers that follows the lanes the (slope, rest).

    Args:
        fake: where the tensors are.
        target: the op.
        flat, spec: its arguments, tensors as they are for one lane.
        places: where the lanes lie in each tensor, by its index in `flat`; the graph's arguments in this order.
        targets: where they are to lie in each result.

    Raises:
        Ambiguous: the graph depends on the number of lanes otherwise than by such numbers.
    """

    def one(*given: torch.Tensor) -> list[torch.Tensor]:
        filled = list(flat)
        for (i, place), tensor in zip(places.items(), given, strict=True):
            filled[i] = tensor.unsqueeze(place) if place not in (None, FRONT) else tensor
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return list(pytree.tree_leaves(target(*args, **kwargs)))

    def every(*given: torch.Tensor) -> list[torch.Tensor]:
        dims = tuple(0 if p == FRONT else p for p in places.values())
        results = torch.vmap(one, in_dims=dims)(*given)
        return [
            r if t in (None, FRONT) else r.squeeze(t + 1).movedim(0, t) for r, t in zip(results, targets, strict=True)
        ]

    graphs = []
    for lanes in (2, 3):
        with fake, torch.no_grad():
            given = [_example(flat[i], place, lanes) for i, place in places.items()]
            with _no_loops():
                graphs.append(make_fx(every)(*given).graph)
    return graphs[0], _slopes(*graphs)


def _example(one: torch.Tensor, place: Place, lanes: int) -> torch.Tensor:
    shape = list(one.shape)
    if place == FRONT:
        shape = [lanes, *shape]
    elif place is not None:
        shape[place] = lanes
    return torch.zeros(shape, dtype=one.dtype)


def _slopes(two: fx.Graph, three: fx.Graph) -> dict[tuple[fx.Node, int], tuple[int, int]]:
    """The numbers in which the traces for two and for three lanes differ, as (slope, rest) of the number of lanes."""
    found: dict[tuple[fx.Node, int], tuple[int, int]] = {}
    if len(two.nodes) != len(three.nodes):
        raise Ambiguous
    for a, b in zip(two.nodes, three.nodes, strict=True):
        here, there = pytree.tree_leaves((a.args, a.kwargs)), pytree.tree_leaves((b.args, b.kwargs))
        if a.target != b.target and a.op == "call_function" or len(here) != len(there):
            raise Ambiguous
        for i, (x, y) in enumerate(zip(here, there, strict=True)):
            if isinstance(x, int) and not isinstance(x, bool) and x != y:
                found[a, i] = (y - x, 3 * x - 2 * y)
    return found


@contextlib.contextmanager
def _no_loops() -> Iterator[None]:
    """Where vmap has no rule for an op it would loop over the lanes: let it raise instead."""
    functorch: Any = torch._C._functorch
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)
