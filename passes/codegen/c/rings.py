"""How the state of a step's programs is kept in C: histories as rings of frames, all else in two places by turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ....runtime.native import Ring
from ...canonicalize import bind
from . import views
from .builder import margins
from .views import Buffer, Margin, View

aten = torch.ops.aten
_SAME = (aten.clone.default, aten.alias.default, aten.view.default, aten.detach.default)


@dataclass(frozen=True)
class Phase:
    """A program on its way to C.

    Attributes:
        graph: of few ops.
        held: the names of the constants that are its last arguments.
        results: for each output whether there is one.
    """

    graph: fx.Graph
    held: list[str]
    results: list[bool]
    tensors: Mapping[str, torch.Tensor]

    def placeholders(self) -> list[fx.Node]:
        """Its arguments."""
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def after(self) -> list[fx.Node]:
        """The parts of the state after it."""
        returned: Any = self.graph.output_node().args[0]
        return [_origin(n) for n in returned[len(self.results) :]]

    def outputs(self) -> list[fx.Node]:
        """What is computed for the caller."""
        returned: Any = self.graph.output_node().args[0]
        return [n for n, there in zip(returned, self.results, strict=False) if there]


def _origin(node: fx.Node) -> fx.Node:
    """What a node is the same as."""
    while node.target in _SAME and isinstance(source := node.args[0], fx.Node):
        if source.meta["val"].shape != node.meta["val"].shape:
            break
        node = source
    return node


def push_of(phase: Phase, part: int, frames: int) -> tuple[fx.Node, int, int] | None:
    """The `cat` that joins frames to a history of which the last are kept, its dimension and how many frames."""
    state, node = phase.placeholders()[frames + part], phase.after()[part]
    args: tuple[Any, ...] = node.args
    if node.target is not aten.slice.Tensor or not isinstance(joined := args[0], fx.Node):
        return None
    others: Any = joined.args
    if joined.target is not aten.cat.default or others[0][0] is not state:
        return None
    size, rank = joined.meta["val"].shape, joined.meta["val"].dim()
    dim = others[1] % rank if len(others) > 1 else 0
    given = bind(aten.slice.Tensor, args, {})
    along, start, stop, every = (given[name] for name in ("dim", "start", "end", "step"))
    new = size[dim] - state.meta["val"].shape[dim]
    if along % rank != dim or slice(start, stop, every).indices(size[dim]) != (new, size[dim], 1):
        return None
    return joined, dim, new


def rings_of(
    phases: Sequence[Phase], arguments: Sequence[torch.Tensor], frames: int, groups: Sequence[int]
) -> list[Ring]:
    """How state is kept: each history in a ring of frames, all else in two places by turns."""
    rings = []
    parts = range(len(groups))
    for group in dict.fromkeys(groups):
        mine = tuple(i for i in parts if groups[i] == group)
        example = arguments[frames + mine[0]]
        shape = tuple(example.shape)
        new = [moves_by(p, mine, frames) for p in phases]
        if len(mine) > 1 and all(n is not None for n in new):
            most = max(n for n in new if n is not None)
            order = tuple(range(len(shape)))
            margin = _margin(phases, mine, frames, len(shape))
            rings.append(Ring(mine, shape, example.dtype, None, len(mine), len(mine) + most, order, margin))
            continue
        for i in mine:
            rings.append(_ring(phases, i, arguments[frames + i], frames))
    return rings


def _ring(phases: Sequence[Phase], part: int, example: torch.Tensor, frames: int) -> Ring:
    """How one part is kept."""
    shape = tuple(example.shape)
    kept = [p.after()[part] is p.placeholders()[frames + part] for p in phases]
    pushes = [None if same else push_of(p, part, frames) for p, same in zip(phases, kept, strict=True)]
    dims = {x[1] for x in pushes if x is not None}
    if len(dims) == 1 and all(same or x is not None for same, x in zip(kept, pushes, strict=True)):
        axis = dims.pop()
        slots = shape[axis] + max(x[2] for x in pushes if x is not None)
        order = tuple(d for d in range(len(shape)) if d != axis)
        return Ring((part,), shape, example.dtype, axis, shape[axis], slots, order)
    margin = _margin(phases, [part], frames, len(shape))
    return Ring((part,), shape, example.dtype, None, 1, 1 if all(kept) else 2, tuple(range(len(shape))), margin)


def _margin(phases: Sequence[Phase], parts: Sequence[int], frames: int, rank: int) -> Margin:
    """The zeros that programs put around parts of the state, which are kept with them."""
    found = ((0, 0),) * rank
    for phase in phases:
        padded = margins(phase.graph)
        for i in parts:
            for node in (phase.placeholders()[frames + i], phase.after()[i]):
                margin = padded.get(node, ((0, 0),) * rank)
                found = tuple((max(a, x), max(b, y)) for (a, b), (x, y) in zip(found, margin, strict=True))
    return found


def moves_by(phase: Phase, parts: Sequence[int], frames: int) -> int | None:
    """By how many places a history moves on that is kept frame by frame; None if it does something else."""
    given, after = phase.placeholders(), phase.after()
    before = [given[frames + i] for i in parts]
    now = [after[i] for i in parts]
    for new in range(len(parts)):
        if now[: len(parts) - new] == before[new:] and not any(n in before for n in now[len(parts) - new :]):
            return new
    return None


def place_of(i: int, ring: Ring, j: int) -> View:
    """A part of a ring."""
    if ring.axis is not None:
        return window_of(i, ring, ring.frames)
    margin = ring.margin or None
    return views.ordered(
        views.buffer(f"h{i}_{j}", ring.dtype, ring.shape, ring.order, margin), ring.shape, ring.order, margin
    )


def window_of(i: int, ring: Ring, frames: int) -> View:
    """So many frames of a history, which lie in one piece."""
    assert ring.axis is not None
    shape = [frames if d == ring.axis else n for d, n in enumerate(ring.shape)]
    return views.ordered(Buffer(f"h{i}", ring.dtype), shape, [ring.axis, *ring.order])
