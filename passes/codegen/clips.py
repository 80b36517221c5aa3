"""Clips inside a generated program: the part of a model that is evaluated on whole clips, no more of it than is asked
(see demand.py)."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ..stream_graph import Clip, Op, Window
from .builder import Builder
from .demand import RESHAPES, Box, Part, Piece, find_demands, points, selection_of, shape, sources

aten = torch.ops.aten


def evaluate_clip(b: Builder, op: Op, windows: list[Window], span: range) -> tuple[fx.Node, ...]:
    """The clip's nodes on whole clips, once for each frame of `span`; results stacked in front."""
    assert op.clip is not None
    pieces = find_demands(op.clip)
    results: list[list[fx.Node]] = []
    for j in span:
        borders = []
        for r, w in zip(op.reads, windows, strict=True):
            value = r.source
            low, high = r.taps.lo(j) - r.offset, r.taps.hi(j) + 1 - r.offset
            node = b.split(w.node, value.layout, w.stop - w.start)
            if (low, high) != (w.start, w.stop):
                node = b.narrow(node, value.layout.split().time, low - w.start, high - low)
            borders.append(b.merge(node, value.layout, high - low))
        results.append(_Evaluation(b, op.clip, pieces).run(borders))
    return tuple(
        b.aten("unsqueeze.default", rows[0], 0) if len(rows) == 1 else b.aten("stack.default", list(rows))
        for rows in zip(*results, strict=True)
    )


class _Evaluation:
    """One evaluation of a clip."""

    def __init__(self, b: Builder, clip: Clip, pieces: dict[fx.Node, list[Piece]]) -> None:
        self.b, self.clip, self.pieces = b, clip, pieces
        self.env: dict[fx.Node, dict[Box, Any]] = {}  # what there is of each node
        self.cut: dict[tuple[fx.Node, Box], Any] = {}

    def run(self, borders: list[fx.Node]) -> list[fx.Node]:
        """The leaves of the clip, from what its streams hold."""
        b = self.b
        for border, node in zip(self.clip.borders, borders, strict=True):
            whole = b.aten("squeeze.dim", node, border.value.layout.time) if border.squeeze else node
            self.env[border.node] = {(): whole}
        for node in self.clip.nodes:
            if node in self.pieces:
                self.env[node] = {piece.box: self._node(node, piece) for piece in self.pieces[node]}
        out = []
        for leaf, axis in zip(self.clip.leaves, self.clip.newest, strict=True):
            ((box, node),) = self.env.get(leaf, {(): None}).items()
            node = b.static(leaf) if node is None else node
            out.append(node if axis is None else b.aten("select.int", node, axis, 0 if box else -1))
        return out

    def _node(self, node: fx.Node, piece: Piece) -> Any:
        selection = selection_of(node)
        if selection is not None:
            source, part, dropped = selection
            whole = self._given(source, piece.below[source])
            return self.b.aten("select.int", whole, part.dim, 0) if dropped else whole
        empty = {n for n, box in piece.below.items() if any(p.empty for p in box)}
        given = {n: self._given(n, piece.below.get(n, ())) for n in sources(node) if n not in empty}
        if empty:  # of tensors side by side those that are asked for
            left = [given[n] for n in node.meta["samples"][0]["tensors"] if n in given]
            return self.b.cat(left, node.meta["samples"][0].get("dim", 0))
        if piece.box and str(node.target).split(".")[1] in RESHAPES:
            return self.b.aten("reshape.default", given[node.meta["samples"][0]["self"]], self._sizes(node, piece.box))
        return self.b.copy(node, given.__getitem__)

    def _given(self, node: fx.Node, box: Box) -> Any:
        """As much of an input as is needed."""
        have = self.env.get(node)
        if have is None:
            have = {(): self.b.static(node)}
        if box in have:
            return have[box]
        if (node, box) not in self.cut:
            wanted = {part.dim: part for part in box}
            held, tensor = next((h, t) for h, t in have.items() if _covers(h, wanted))
            for part in box:
                if part not in held:
                    offset = next((p.start for p in held if p.dim == part.dim), None)
                    tensor = self._part(tensor, part, offset)
            self.cut[node, box] = tensor
        return self.cut[node, box]

    def _part(self, tensor: Any, part: Part, offset: tuple[int, ...] | None) -> Any:
        shift = offset or (0,) * len(part.start)
        start, stop = (tuple(map(operator.sub, at, shift)) for at in (part.start, part.stop))
        return self.b.aten("slice.Tensor", tensor, part.dim, self.b.by_batch(start), self.b.by_batch(stop))

    def _sizes(self, node: fx.Node, box: Box) -> list[Any]:
        sizes = [tuple(shape(node, p)[d] for p in points(node)) for d in range(len(shape(node, 0)))]
        for part in box:
            sizes[part.dim] = part.length
        return [self.b.by_batch(s) for s in sizes]


def _covers(held: Box, wanted: dict[int, Part]) -> bool:
    """Whether a box that there is contains what is wanted."""
    return all(
        part.dim in wanted
        and all(map(operator.le, part.start, wanted[part.dim].start))
        and all(map(operator.ge, part.stop, wanted[part.dim].stop))
        for part in held
    )
