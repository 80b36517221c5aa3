"""Clips inside a generated program: the part of a model that is evaluated on whole clips, no more of it than is asked.

Demand runs backwards: of a tensor of which only ``x[:, -1]`` or a class token is read, only that is computed, through
everything that treats the entries of that dimension alike, down to attention with one query.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..registry import find_rule
from ..stream_graph import Clip, Op, Window
from .graph_module import Builder

aten = torch.ops.aten
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Some entries of one dimension: where they start and how many, at each sample point."""

    dim: int
    start: Sizes
    length: Sizes


Demand = Part | None  # None: all of it


def evaluate_clip(b: Builder, op: Op, windows: list[Window], span: range) -> tuple[fx.Node, ...]:
    """The clip's nodes on whole clips, once for each frame of `span`; results stacked in front."""
    assert op.clip is not None
    demands, below = find_demands(op.clip)
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
        results.append(_Evaluation(b, op.clip, demands, below).run(borders))
    return tuple(
        b.aten("unsqueeze.default", rows[0], 0) if len(rows) == 1 else b.aten("stack.default", list(rows))
        for rows in zip(*results, strict=True)
    )


def find_demands(clip: Clip) -> tuple[dict[fx.Node, Demand], dict[fx.Node, dict[fx.Node, Demand]]]:
    """How much of each node is asked: what all its readers need, or all of it if they need different parts. And what
    each needs of its inputs for that."""
    asked: dict[fx.Node, set[Demand]] = {}
    inside = set(clip.nodes)
    for leaf, axis in zip(clip.leaves, clip.newest, strict=True):
        asked.setdefault(leaf, set()).add(None if axis is None else _entry(leaf, axis, -1))
    settled: dict[fx.Node, Demand] = {}
    needed: dict[fx.Node, dict[fx.Node, Demand]] = {}
    for node in reversed(clip.nodes):
        if node not in asked:
            continue
        found = asked[node]
        demand = next(iter(found)) if len(found) == 1 else None
        below = needs(node, demand)
        if below is None:
            demand, below = None, needs(node, None)
        settled[node], needed[node] = demand, below or {}
        for source in node.all_input_nodes:
            if source in inside:
                asked.setdefault(source, set()).add(needed[node].get(source))
    return settled, needed


def _shape(node: fx.Node, point: int) -> Sizes:
    size = node.meta["sizes"][point]
    return tuple(size[0]) if size and isinstance(size[0], tuple) else tuple(size)


def _points(node: fx.Node) -> range:
    return range(len(node.meta["sizes"]))


def _entry(node: fx.Node, dim: int, index: int, length: int = 1) -> Part:
    sizes = [_shape(node, p)[dim] for p in _points(node)]
    return Part(dim, tuple(index % s if s else 0 for s in sizes), (length,) * len(sizes))


def needs(node: fx.Node, demand: Demand) -> dict[fx.Node, Demand] | None:
    """What a node needs of its inputs so that it can give what is asked (those left out: all). None: it cannot give a
    part only."""
    args = node.meta["samples"][0]
    if node.target in (aten.select.int, aten.slice.Tensor) and isinstance(args["self"], fx.Node):
        return _of_selection(node, args["self"], demand)
    if demand is None:
        return {}
    rank = len(_shape(node, 0))
    name, d = str(node.target), demand.dim
    packet = name.split(".")[1] if name.startswith("aten.") else name
    if node.target is operator.getitem:
        return {args["0"]: demand}
    if _is_pointwise(node.target):
        return {n: p for n in node.all_input_nodes if (p := _aligned(n, rank, demand)) is not None}
    if packet in _LAST and d < rank - _LAST[packet](args):
        return {args["input"]: demand}
    if packet in ("softmax", "_softmax", "log_softmax") and args["dim"] % rank != d:
        return {args["self" if "self" in args else "input"]: demand}
    if packet == "embedding" and d < rank - 1:
        return {args["indices"]: demand}
    if packet == "scaled_dot_product_attention" and d == rank - 2 and not args.get("is_causal"):
        mask = args.get("attn_mask")
        if args["query"] in (args["key"], args["value"], mask):  # of which all is needed
            return None
        part = _aligned(mask, rank, demand) if isinstance(mask, fx.Node) else None
        return {args["query"]: demand, **({mask: part} if part is not None else {})}
    if packet in ("matmul", "bmm") and d == rank - 2:
        left, right = args["self"], args.get("other", args.get("mat2"))
        if left is not right and left.meta["val"].dim() >= 2:
            return {left: Part(left.meta["val"].dim() - 2, demand.start, demand.length)}
    if packet in ("permute", "transpose"):
        order = list(range(rank))
        if packet == "permute":
            order = [i % rank for i in args["dims"]]
        else:
            i, j = args["dim0"] % rank, args["dim1"] % rank
            order[i], order[j] = j, i
        return {args["self"]: Part(order[d], demand.start, demand.length)}
    if packet in _RESHAPES:
        part = _before_reshape(args["self"], node, demand)
        return None if part is None else {args["self"]: part}
    if packet == "cat" and args["dim"] % rank != d:
        return dict.fromkeys(args["tensors"], demand)
    if packet in ("unbind", "chunk", "split", "split_with_sizes"):
        dim = args["dim"] % args["self"].meta["val"].dim()
        moved = d + (packet == "unbind" and d >= dim)
        return None if packet != "unbind" and d == dim else {args["self"]: Part(moved, demand.start, demand.length)}
    return None


_LAST: dict[str, Callable[[dict[str, Any]], int]] = {
    "linear": lambda args: 1,
    "layer_norm": lambda args: len(args["normalized_shape"]),
    "rms_norm": lambda args: len(args["normalized_shape"]),
}
_RESHAPES = {"reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view"}


def _is_pointwise(target: Any) -> bool:
    from .. import rules

    return isinstance(target, torch._ops.OpOverload) and find_rule(target) is rules.pointwise.pointwise


def _aligned(node: fx.Node, rank: int, demand: Part) -> Part | None:
    """The same entries of an argument that is broadcast to a rank; None if it has none of its own."""
    d = demand.dim - (rank - len(_shape(node, 0)))
    if d < 0 or all(_shape(node, p)[d] == 1 for p in _points(node)):
        return None
    return Part(d, demand.start, demand.length)


def _of_selection(node: fx.Node, source: fx.Node, demand: Demand) -> dict[fx.Node, Demand] | None:
    """What a selected entry, or some of them, need of the tensor that they are selected from."""
    samples = node.meta["samples"]
    dim = samples[0]["dim"] % len(_shape(source, 0))
    if demand is None:
        starts, lengths = [], []
        for p in _points(node):
            size = _shape(source, p)[dim]
            if node.target is aten.select.int:
                starts.append(samples[p]["index"] % size)
                lengths.append(1)
            else:
                start, stop = samples[p].get("start") or 0, samples[p].get("end")
                start, stop, step = slice(start, stop, samples[p].get("step", 1)).indices(size)
                if step != 1:
                    return {}
                starts.append(start)
                lengths.append(max(0, stop - start))
        return {source: Part(dim, tuple(starts), tuple(lengths))}
    if node.target is aten.select.int:
        return {source: Part(demand.dim + (demand.dim >= dim), demand.start, demand.length)}
    return None if demand.dim == dim else {source: demand}


def _before_reshape(source: fx.Node, node: fx.Node, demand: Part) -> Part | None:
    """The entries of a reshape's argument in which some entries of its result lie, if they make up a part of it."""
    dims, starts, lengths = set(), [], []
    for p in _points(node):
        before, after = _shape(source, p), _shape(node, p)
        outer, size = math.prod(after[: demand.dim]), after[demand.dim]
        start, length = demand.start[p], demand.length[p]
        part = None
        for a, n in enumerate(before):
            if math.prod(before[:a]) != outer or n == 1:
                continue
            if n % size == 0:
                part = a, start * (n // size), length * (n // size)
            elif size % n == 0 and start % (size // n) == 0 and length % (size // n) == 0:
                part = a, start // (size // n), length // (size // n)
        if part is None:
            return None
        dims.add(part[0])
        starts.append(part[1])
        lengths.append(part[2])
    return Part(dims.pop(), tuple(starts), tuple(lengths)) if len(dims) == 1 else None


class _Evaluation:
    """One evaluation of a clip."""

    def __init__(
        self, b: Builder, clip: Clip, demands: dict[fx.Node, Demand], below: dict[fx.Node, dict[fx.Node, Demand]]
    ) -> None:
        self.b, self.clip, self.demands, self.below = b, clip, demands, below
        self.env: dict[fx.Node, Any] = {}
        self.parts: dict[tuple[fx.Node, Part], Any] = {}

    def run(self, borders: list[fx.Node]) -> list[fx.Node]:
        """The leaves of the clip, from what its streams hold."""
        b = self.b
        for border, node in zip(self.clip.borders, borders, strict=True):
            self.env[border.node] = b.aten("squeeze.dim", node, border.value.layout.time) if border.squeeze else node
        for node in self.clip.nodes:
            if node in self.demands:
                self.env[node] = self._node(node, self.demands[node])
        out = []
        for leaf, axis in zip(self.clip.leaves, self.clip.newest, strict=True):
            node = self.env[leaf] if leaf in self.env else b.static(leaf)
            whole = self.demands.get(leaf) is None
            out.append(node if axis is None else b.aten("select.int", node, axis, -1 if whole else 0))
        return out

    def _node(self, node: fx.Node, demand: Demand) -> Any:
        below = self.below[node]
        given = {n: self._given(n, below.get(n)) for n in node.all_input_nodes}
        if node.target in (aten.select.int, aten.slice.Tensor) and node.meta["samples"][0]["self"] in below:
            return self._selected(node, given[node.meta["samples"][0]["self"]], demand)
        if demand is None:
            return self.b.copy(node, given.__getitem__)
        if node.target is operator.getitem:
            item = self.b.copy(node, given.__getitem__)
            whole = self.demands.get(node.all_input_nodes[0]) != demand
            return self._part(item, demand) if whole else item
        if str(node.target).split(".")[1] in _RESHAPES:
            return self.b.aten("reshape.default", given[node.meta["samples"][0]["self"]], self._sizes(node, demand))
        return self.b.copy(node, given.__getitem__)

    def _selected(self, node: fx.Node, source: Any, demand: Demand) -> Any:
        """A selection, of what is left of its argument."""
        args = node.meta["samples"][0]
        if demand is not None:
            return self.b.copy(node, lambda n: source)
        dim = args["dim"] % len(_shape(args["self"], 0))
        return self.b.aten("select.int", source, dim, 0) if node.target is aten.select.int else source

    def _given(self, node: fx.Node, part: Demand) -> Any:
        """As much of an input as is needed."""
        have = self.env[node] if node in self.env else self.b.static(node)
        if part is None or self.demands.get(node) == part or not isinstance(node.meta["val"], torch.Tensor):
            return have
        if (node, part) not in self.parts:
            self.parts[node, part] = self._part(have, part)
        return self.parts[node, part]

    def _part(self, tensor: Any, part: Part) -> Any:
        stop = tuple(s + n for s, n in zip(part.start, part.length, strict=True))
        return self.b.aten("slice.Tensor", tensor, part.dim, self.b.by_batch(part.start), self.b.by_batch(stop))

    def _sizes(self, node: fx.Node, demand: Part) -> list[Any]:
        rank = len(_shape(node, 0))
        sizes = [tuple(_shape(node, p)[d] for p in _points(node)) for d in range(rank)]
        sizes[demand.dim] = demand.length
        return [self.b.by_batch(s) for s in sizes]
