"""Pass 2k: of a table with an entry for every two frames, what is left away at its beginning is never made.

The forget gates of an xLSTM are summed up from a zero that is put in front, repeated, subtracted from their own
transpose, and cut from the first entry on: each of these slices moves up to what it is at last a slice of.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .canonicalize import JOINS, unbind
from .graph_edits import call_at, order_of, sizes_of, take_place
from .layout import Sizes

aten = torch.ops.aten


def sink_slices(graph: fx.Graph) -> None:
    """Rewrite a canonical graph so."""
    for node in list(graph.nodes):
        if (cut := _Cut.of(node)) is not None and _paired(node):
            moved = cut.through(graph, node.meta["samples"][0]["self"])
            if moved is not None:
                take_place(node, moved)
    graph.eliminate_dead_code()


def _paired(node: fx.Node) -> bool:
    """Whether two dimensions follow the clip's length, and so each other."""
    moving = [s for s in sizes_of(node) if len(set(s)) > 1]
    return any(
        len({n - m for n, m in zip(one, other, strict=True)}) == 1 for one, other in itertools.combinations(moving, 2)
    )


@dataclass(frozen=True)
class _Cut:
    """So many entries left away at the beginning of a dimension."""

    axis: int
    start: int

    @classmethod
    def of(cls, node: fx.Node) -> _Cut | None:
        """What a slice leaves away, if that is a constant number of entries at the beginning alone."""
        if node.target is not aten.slice.Tensor:
            return None
        args = node.meta["samples"][0]
        starts = {s["start"] for s in node.meta["samples"]}
        axis = args["dim"] % len(node.meta["sizes"][0])
        start = starts.pop()
        if starts or not isinstance(start, int) or start < 1 or args["step"] != 1:
            return None
        before, after = sizes_of(args["self"])[axis], sizes_of(node)[axis]
        return cls(axis, start) if all(n - m == start for n, m in zip(before, after, strict=True)) else None

    def through(self, graph: fx.Graph, source: fx.Node) -> fx.Node | None:
        """`source` with the entries left away before it is made; None if it is not known how."""
        args = source.meta["samples"][0]
        rank = len(source.meta["sizes"][0])
        target: Any = source.target
        if (order := order_of(source)) is not None:
            return self._again(graph, source, {args["self"]: _Cut(order[self.axis], self.start)})
        if target in (aten.repeat.default, aten.expand.default):
            return self._spread(graph, source)
        if target in JOINS and args["dim"] % rank == self.axis:
            return self._joined(graph, args["tensors"])
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
            cuts = {}
            for given in source.all_input_nodes:
                at = self.axis - (rank - len(given.meta["sizes"][0]))
                if at >= 0 and set(sizes_of(given)[at]) != {1}:
                    cuts[given] = _Cut(at, self.start)
            return self._again(graph, source, cuts)
        return None

    def taken(self, graph: fx.Graph, source: fx.Node, before: fx.Node) -> fx.Node:
        """The slice of a node, moved up as far as it goes."""
        moved = self.through(graph, source) if _paired(source) or source.target in JOINS else None
        if moved is not None:
            return moved
        calls: list[Any] = [((source, self.axis, self.start, n), {}) for n in sizes_of(source)[self.axis]]
        return call_at(graph, before, aten.slice.Tensor, calls, self._shorter(source), self._value(source))

    def _shorter(self, node: fx.Node) -> list[Sizes]:
        """A node's shape without the entries that are left away."""
        return [tuple(n - self.start * (i == self.axis) for i, n in enumerate(s)) for s in node.meta["sizes"]]

    def _value(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        return value.new_empty([n - self.start * (i == self.axis) for i, n in enumerate(value.shape)])

    def _again(
        self, graph: fx.Graph, source: fx.Node, cuts: dict[fx.Node, _Cut], replaced: list[dict[str, Any]] | None = None
    ) -> fx.Node:
        """An op on slices of what it was given, with some of its arguments replaced."""
        new = {given: cut.taken(graph, given, source) for given, cut in cuts.items()}
        calls: list[Any] = []
        for i, sample in enumerate(source.meta["samples"]):
            args = {k: new.get(a, a) if isinstance(a, fx.Node) else a for k, a in sample.items()}
            calls.append(unbind(source.target, args | (replaced[i] if replaced else {})))
        return call_at(graph, source, source.target, calls, self._shorter(source), self._value(source))

    def _spread(self, graph: fx.Graph, source: fx.Node) -> fx.Node | None:
        """Dimensions of size 1 repeated, less often."""
        given: fx.Node = source.meta["samples"][0]["self"]
        at = self.axis - (len(source.meta["sizes"][0]) - len(given.meta["sizes"][0]))
        shapes = self._shorter(source)
        if at < 0 or set(sizes_of(given)[at]) != {1}:
            alike = at >= 0 and sizes_of(given)[at] == sizes_of(source)[self.axis]
            if not alike:
                return None
            replaced = [{"size": list(s)} for s in shapes] if source.target is aten.expand.default else None
            return self._again(graph, source, {given: _Cut(at, self.start)}, replaced)
        if source.target is aten.expand.default:
            return self._again(graph, source, {}, [{"size": list(s)} for s in shapes])
        times = [list(s["repeats"]) for s in source.meta["samples"]]
        for one, shape in zip(times, shapes, strict=True):
            one[self.axis] = shape[self.axis]
        return self._again(graph, source, {}, [{"repeats": t} for t in times])

    def _joined(self, graph: fx.Graph, parts: list[fx.Node]) -> fx.Node | None:
        """The second of two parts, if the first is what is left away."""
        if len(parts) != 2 or set(sizes_of(parts[0])[self.axis]) != {self.start}:
            return None
        return parts[1]
