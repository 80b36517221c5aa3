"""Pass 2l: attention to frames and to entries that are always there is computed as attention to each of them.

Keys and values of a learned memory, ``add_bias_kv`` and ``add_zero_attn`` of `nn.MultiheadAttention`, and sinks beside
the scores are joined to what there is for each frame: ``softmax(q @ cat(memory, k)) @ cat(memory_v, v)``. Such a
dimension has no place in a stream. Here each op on it becomes one op on each of its parts, up to where they are summed:
the parts of a softmax share their largest score and their sum. Where queries are joined likewise, the frames of a
longer stream attend to themselves, which needs nothing of this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from .canonicalize import JOINS, unbind
from .graph_edits import call_at, order_of, sizes_of, take_place
from .split_einsums import MATMUL, spelled_out

aten = torch.ops.aten
_PADS = (aten.pad.default, aten.constant_pad_nd.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
Lengths = tuple[int, ...]  # of one part, at each sample point


def split_keys(graph: fx.Graph) -> None:
    """Rewrite a canonical graph so."""
    _Splitting(graph).run()
    graph.eliminate_dead_code()


@dataclass(frozen=True)
class _Split:
    """A tensor as parts that lie one after the other: one that is as long as the clip, and others of fixed lengths."""

    axis: int
    parts: tuple[fx.Node, ...]

    @property
    def lengths(self) -> list[Lengths]:
        return [tuple(sizes_of(p)[self.axis]) for p in self.parts]


class _Splitting:
    """A graph on its way through its nodes.

    Attributes:
        of: the parts of what has parts.
        timed: nodes that depend on the model's inputs.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.of: dict[fx.Node, _Split] = {}
        self.timed: set[fx.Node] = set()

    def run(self) -> None:
        """Rewrite the graph."""
        for node in list(self.graph.nodes):
            if node.op == "placeholder" or any(n in self.timed for n in node.all_input_nodes):
                self.timed.add(node)
            if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor):
                continue
            found = self._joined(node) if node.target in (*JOINS, *_PADS) else self._again(node)
            if isinstance(found, _Split):
                self.of[node] = found
            elif found is not None:
                take_place(node, found)

    # -- where parts come from ---------------------------------------------------------------------------------------

    def _joined(self, node: fx.Node) -> _Split | None:
        args = node.meta["samples"][0]
        if node.target in JOINS:
            axis, parts = args["dim"] % len(node.meta["sizes"][0]), list(args["tensors"])
        else:
            padded = self._padded(node)
            if padded is None:
                return None
            axis, parts = padded
        parts = [q for p in parts for q in (self.of[p].parts if p in self.of and self.of[p].axis == axis else [p])]
        fixed = [p for p in parts if len(set(sizes_of(p)[axis])) == 1]
        if len(parts) - len(fixed) != 1 or not fixed or any(p in self.timed for p in fixed):
            return None
        return _Split(axis, tuple(parts))

    def _padded(self, node: fx.Node) -> tuple[int, list[fx.Node]] | None:
        """A constant padding of one dimension as what is joined, and the dimension."""
        args, source = node.meta["samples"][0], node.meta["samples"][0]["self"]
        pads, rank = args["pad"], len(node.meta["sizes"][0])
        if any(s["pad"] != pads for s in node.meta["samples"]) or args.get("mode", "constant") != "constant":
            return None
        axes = {rank - 1 - i // 2 for i, n in enumerate(pads) if n}
        if len(axes) != 1 or min(pads) < 0:
            return None
        (axis,) = axes
        before, after = pads[2 * (rank - 1 - axis) :][:2]
        number = args.get("value") or 0
        ends = [[self._full(node, source, axis, n, number)] if n else [] for n in (before, after)]
        return axis, [*ends[0], source, *ends[1]]

    def _full(self, like: fx.Node, source: fx.Node, axis: int, count: int, number: float) -> fx.Node:
        """One number in the shape of a tensor but for one dimension."""
        val = source.meta["val"]
        sizes = [_with(s, axis, count) for s in source.meta["sizes"]]
        number = bool(number) if val.dtype == torch.bool else number
        calls: list[Any] = [((list(s), number), {"dtype": val.dtype, "device": val.device}) for s in sizes]
        return call_at(self.graph, like, aten.full.default, calls, sizes, val.new_empty(_with(val.shape, axis, count)))

    # -- ops on parts ------------------------------------------------------------------------------------------------

    def _again(self, node: fx.Node) -> _Split | fx.Node | None:
        """An op on what has parts as ops on them: what has parts again, or their sum; None if it is not known how."""
        splits = [n for n in node.all_input_nodes if n in self.of]
        if not splits:
            return None
        target: Any = node.target
        if target is aten.scaled_dot_product_attention.default:
            return self._attention(node)
        if target in _PRODUCTS:
            return self._product(node)
        args = node.meta["samples"][0]
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags or target in _POINTWISE:
            return self._pointwise(node, splits[0])
        source = args.get("self", args.get("input"))
        if source not in self.of:
            return None
        if target in _SOFTMAX:
            return self._softmax(node, source)
        if target is aten.slice.Tensor:
            return self._slice(node, source)
        return self._view(node, source)

    def _pointwise(self, node: fx.Node, like: fx.Node) -> _Split | None:
        rank, split = len(node.meta["sizes"][0]), self.of[like]
        axis = split.axis + rank - len(like.meta["sizes"][0])
        if sizes_of(node)[axis] != sizes_of(like)[split.axis]:
            return None
        parts = []
        for i, _ in enumerate(split.parts):
            given: dict[fx.Node, fx.Node] = {}
            for n in node.all_input_nodes:
                at = axis - (rank - len(n.meta["sizes"][0]))
                if at >= 0 and set(sizes_of(n)[at]) != {1}:
                    given[n] = self._part(n, at, split.lengths, i, node)
            parts.append(self._copy(node, given))
        return _Split(axis, tuple(parts))

    def _view(self, node: fx.Node, source: fx.Node) -> _Split | None:
        """A dimension that stays one by itself where others are moved, split or joined."""
        target, args, split = node.target, node.meta["samples"][0], self.of[source]
        rank, axis = len(source.meta["sizes"][0]), split.axis
        if (order := order_of(node)) is not None:
            return _Split(order.index(axis), tuple(self._copy(node, {source: p}) for p in split.parts))
        if target is aten.unsqueeze.default:
            at = args["dim"] % (rank + 1)
            return _Split(axis + (at <= axis), tuple(self._copy(node, {source: p}) for p in split.parts))
        if target in (aten.reshape.default, aten.expand.default):
            before, after = sizes_of(source), sizes_of(node)
            right = target is aten.expand.default
            for new in [axis + len(after) - rank] if right else range(len(after)):
                if after[new] == before[axis] and (right or _product_of(after[:new]) == _product_of(before[:axis])):
                    name = "size" if right else "shape"
                    return _Split(new, tuple(self._resized(node, source, p, axis, new, name) for p in split.parts))
        return None

    def _resized(self, node: fx.Node, source: fx.Node, part: fx.Node, axis: int, new: int, name: str) -> fx.Node:
        """A view of one part: its new shape is that of the whole but for the dimension that is in parts."""
        sizes = [_with(s, new, n) for s, n in zip(node.meta["sizes"], sizes_of(part)[axis], strict=True)]
        calls: list[Any] = [
            unbind(node.target, sample | {"self": part, name: list(s)})
            for sample, s in zip(node.meta["samples"], sizes, strict=True)
        ]
        shape = _with(node.meta["val"].shape, new, part.meta["val"].shape[axis])
        return call_at(self.graph, node, node.target, calls, sizes, part.meta["val"].new_empty(shape))

    def _slice(self, node: fx.Node, source: fx.Node) -> _Split | fx.Node | None:
        """Some of the parts, whole; or all of them, less along another dimension."""
        split, args = self.of[source], node.meta["samples"][0]
        rank = len(source.meta["sizes"][0])
        if args["dim"] % rank != split.axis:
            return _Split(split.axis, tuple(self._copy(node, {source: p}) for p in split.parts))
        if args["step"] != 1:
            return None
        whole, kept = sizes_of(source)[split.axis], sizes_of(node)[split.axis]
        starts = [s["start"] or 0 for s in node.meta["samples"]]
        start = tuple(s + n if s < 0 else s for s, n in zip(starts, whole, strict=True))
        stop = tuple(s + n for s, n in zip(start, kept, strict=True))
        edges = [_before(split.lengths, i) for i in range(len(split.parts) + 1)]
        if start not in edges or stop not in edges:
            return None
        parts = split.parts[edges.index(start) : edges.index(stop)]
        return parts[0] if len(parts) == 1 else _Split(split.axis, tuple(parts)) if parts else None

    def _softmax(self, node: fx.Node, source: fx.Node) -> _Split | None:
        split, args = self.of[source], node.meta["samples"][0]
        if args["dim"] % len(source.meta["sizes"][0]) != split.axis:
            return _Split(split.axis, tuple(self._copy(node, {source: p}) for p in split.parts))
        if args.get("dtype") is not None:
            parts = [self._call(node, aten.to.dtype, p, args["dtype"]) for p in split.parts]
            split = _Split(split.axis, tuple(parts))
        return _Split(split.axis, tuple(self._weights(node, split)))

    def _weights(self, like: fx.Node, split: _Split, fused: bool = False) -> list[fx.Node]:
        """The parts of a softmax; in fused attention a row in which all is masked is 0, not NaN."""
        over, keep = [split.axis], True
        peaks = [self._call(like, aten.amax.default, p, over, keep) for p in split.parts]
        peak = reduce(lambda a, b: self._call(like, aten.maximum.default, a, b), peaks)
        if fused:
            peak = self._call(like, aten.clamp_min.default, peak, torch.finfo(peak.meta["val"].dtype).min)
        powers = [self._call(like, aten.exp.default, self._call(like, aten.sub.Tensor, p, peak)) for p in split.parts]
        sums = [self._call(like, aten.sum.dim_IntList, p, over, keep) for p in powers]
        total = reduce(lambda a, b: self._call(like, aten.add.Tensor, a, b), sums)
        if fused:  # 1 at least, but for such rows
            total = self._call(like, aten.clamp_min.default, total, torch.finfo(total.meta["val"].dtype).tiny)
        return [self._call(like, aten.div.Tensor, p, total) for p in powers]

    def _product(self, node: fx.Node) -> _Split | fx.Node | None:
        args = node.meta["samples"][0]
        if node.target is aten.einsum.default:
            nodes = list(args["tensors"])
            if len(nodes) != 2:
                return None
            terms, result = spelled_out(args["equation"], [len(n.meta["sizes"][0]) for n in nodes])
        else:
            names = next(n for n in (("batch1", "batch2"), ("self", "other"), ("self", "mat2")) if n[1] in args)
            nodes = [args[n] for n in names]
            ranks = [len(n.meta["sizes"][0]) for n in nodes]
            if min(ranks) < 2:
                return None
            terms, result = spelled_out(MATMUL, ranks)
        apart = {term[self.of[n].axis] for n, term in zip(nodes, terms, strict=True) if n in self.of}
        if len(apart) != 1 or nodes[0] is nodes[1]:
            return None  # queries are in parts as keys are
        (letter,) = apart
        if letter not in result and any(n in self.timed and n not in self.of for n in nodes):
            return None  # weights that are not
        split = next(self.of[n] for n in nodes if n in self.of)
        added = args["self"] if node.target is aten.baddbmm.default else None
        if added is not None and (letter not in result or not args["beta"] == args["alpha"] == 1):
            return None
        parts = []
        for i, _ in enumerate(split.parts):
            given = {
                n: self._part(n, term.index(letter), split.lengths, i, node)
                for n, term in zip(nodes, terms, strict=True)
                if letter in term and set(sizes_of(n)[term.index(letter)]) != {1}
            }
            if added is None:
                parts.append(self._copy(node, given))
                continue
            product = self._call(node, aten.bmm.default, *(given.get(n, n) for n in nodes))
            at = result.index(letter)
            one = added if set(sizes_of(added)[at]) == {1} else self._part(added, at, split.lengths, i, node)
            parts.append(self._call(node, aten.add.Tensor, one, product))
        if letter in result:
            return _Split(result.index(letter), tuple(parts))
        return reduce(lambda a, b: self._call(node, aten.add.Tensor, a, b), parts)

    def _attention(self, node: fx.Node) -> fx.Node | None:
        """Fused attention to keys in parts, written out; without a mask it needs the clip, and stays as it is."""
        args = node.meta["samples"][0]
        query, key, value, mask = args["query"], args["key"], args["value"], args.get("attn_mask")
        rank = len(query.meta["sizes"][0])
        split = self.of.get(key)
        if split is None or split.axis != rank - 2 or args.get("is_causal") or mask is None or args.get("enable_gqa"):
            return None
        if query in self.of and self.of[query].axis == rank - 2:
            return None
        if value not in self.of or self.of[value].axis != rank - 2 or self.of[value].lengths != split.lengths:
            return None
        scale = args.get("scale") or 1 / math.sqrt(query.meta["sizes"][0][-1])
        scaled = self._call(node, aten.mul.Scalar, query, scale)
        scores = []
        for i, part in enumerate(split.parts):
            score = self._call(node, aten.matmul.default, scaled, self._call(node, aten.transpose.int, part, -2, -1))
            at = len(mask.meta["sizes"][0]) - 1
            masked = mask if set(sizes_of(mask)[at]) == {1} else self._part(mask, at, split.lengths, i, node)
            if mask.meta["val"].dtype == torch.bool:
                hidden = self._call(node, aten.logical_not.default, masked)
                scores.append(self._call(node, aten.masked_fill.Scalar, score, hidden, -math.inf))
            else:
                scores.append(self._call(node, aten.add.Tensor, score, masked))
        weights = self._weights(node, _Split(rank - 1, tuple(scores)), fused=True)
        products = [
            self._call(node, aten.matmul.default, w, v) for w, v in zip(weights, self.of[value].parts, strict=True)
        ]
        return reduce(lambda a, b: self._call(node, aten.add.Tensor, a, b), products)

    # -- parts of what is one ----------------------------------------------------------------------------------------

    def _part(self, node: fx.Node, axis: int, lengths: list[Lengths], i: int, like: fx.Node) -> fx.Node:
        """The i-th part of a tensor along a dimension."""
        split = self.of.get(node)
        if split is not None and (split.axis, split.lengths) == (axis, lengths):
            return split.parts[i]
        return self._cut(node, axis, _before(lengths, i), lengths[i], like)

    def _cut(self, node: fx.Node, axis: int, starts: Lengths, counts: Lengths, like: fx.Node) -> fx.Node:
        """So many entries of a dimension; of what is made of positions, made of these positions alone."""
        target: Any = node.target
        rank = len(node.meta["sizes"][0])
        if node not in self.timed and isinstance(target, torch._ops.OpOverload):
            if torch.Tag.pointwise in target.tags or target in _POINTWISE:
                given = {}
                for n in node.all_input_nodes:
                    at = axis - (rank - len(n.meta["sizes"][0]))
                    if at >= 0 and set(sizes_of(n)[at]) != {1}:
                        given[n] = self._cut(n, at, starts, counts, like)
                return self._copy(node, given, like)
            if target is aten.unsqueeze.default:
                at = node.meta["samples"][0]["dim"] % rank
                source = node.meta["samples"][0]["self"]
                if at != axis:
                    return self._copy(node, {source: self._cut(source, axis - (at < axis), starts, counts, like)}, like)
            if target in _RANGES and (first := _first(node)) is not None:
                return self._range(node, tuple(first + s for s in starts), counts, like)
            if target in (aten.tril.default, aten.triu.default) and axis == rank - 1:
                return self._triangle(node, starts, counts, like)
            if target is aten.full.default:
                sizes = [_with(s, axis, n) for s, n in zip(node.meta["sizes"], counts, strict=True)]
                calls = [
                    unbind(target, a | {"size": list(s)}) for a, s in zip(node.meta["samples"], sizes, strict=True)
                ]
                return call_at(self.graph, like, target, calls, sizes, self._shaped(node, axis, counts, like))
        sizes = [_with(s, axis, n) for s, n in zip(node.meta["sizes"], counts, strict=True)]
        bounds: list[Any] = [((node, axis, s, s + n), {}) for s, n in zip(starts, counts, strict=True)]
        return call_at(self.graph, like, aten.slice.Tensor, bounds, sizes, self._shaped(node, axis, counts, like))

    def _shaped(self, node: fx.Node, axis: int, counts: Lengths, like: fx.Node) -> Any:
        """A value in a node's shape with another length along one dimension."""
        val = node.meta["val"]
        return val.new_empty(_with(val.shape, axis, counts[0] if len(set(counts)) == 1 else self._length(counts, like)))

    def _length(self, counts: Lengths, like: fx.Node) -> Any:
        """The traced length that is this at the sample points."""
        for split in self.of.values():
            for part, lengths in zip(split.parts, split.lengths, strict=True):
                if lengths == counts:
                    return part.meta["val"].shape[split.axis]
        return counts[0]

    def _range(self, node: fx.Node, starts: Lengths, counts: Lengths, like: fx.Node) -> fx.Node:
        val = node.meta["val"]
        calls: list[Any] = [
            ((s, s + n), {"dtype": val.dtype, "device": val.device}) for s, n in zip(starts, counts, strict=True)
        ]
        sizes = [(n,) for n in counts]
        return call_at(self.graph, like, aten.arange.start, calls, sizes, self._shaped(node, 0, counts, like))

    def _triangle(self, node: fx.Node, starts: Lengths, counts: Lengths, like: fx.Node) -> fx.Node:
        """Some columns of a triangle, by their positions."""
        args, source = node.meta["samples"][0], node.meta["samples"][0]["self"]
        rank = len(node.meta["sizes"][0])
        kept = self._cut(source, rank - 1, starts, counts, like)
        rows = list(sizes_of(node)[rank - 2])
        numbers = {"dtype": torch.int64, "device": node.meta["val"].device}
        columns_at: list[Any] = [((s, s + n), numbers) for s, n in zip(starts, counts, strict=True)]
        rows_at: list[Any] = [((0, n), numbers) for n in rows]
        empty = node.meta["val"].new_empty
        value = empty(kept.meta["val"].shape[-1:], dtype=torch.int64)
        column = call_at(self.graph, like, aten.arange.start, columns_at, [(n,) for n in counts], value)
        value = empty(kept.meta["val"].shape[-2:-1], dtype=torch.int64)
        row = call_at(self.graph, like, aten.arange.start, rows_at, [(n,) for n in rows], value)
        ahead = self._call(like, aten.sub.Tensor, column, self._call(like, aten.unsqueeze.default, row, 1))
        compare = aten.le.Scalar if node.target is aten.tril.default else aten.ge.Scalar
        inside = self._call(like, compare, ahead, args["diagonal"])
        outside = False if node.meta["val"].dtype == torch.bool else 0
        return self._call(like, aten.where.ScalarOther, inside, kept, outside)

    # -- nodes -------------------------------------------------------------------------------------------------------

    def _copy(self, node: fx.Node, given: dict[fx.Node, fx.Node], like: fx.Node | None = None) -> fx.Node:
        """The same op on other tensors."""
        calls = [unbind(node.target, map_arg(sample, lambda n: given.get(n, n))) for sample in node.meta["samples"]]
        return self._made(like or node, node.target, calls)

    def _call(self, like: fx.Node, target: Any, *args: Any) -> fx.Node:
        """An op with the same arguments at all sample points."""
        return self._made(like, target, [(args, {})] * len(like.meta["sizes"]))

    def _made(self, like: fx.Node, target: Any, calls: list[Any]) -> fx.Node:
        sizes = []
        for i, (args, kwargs) in enumerate(calls):
            at = partial(_shaped_at, i)
            sizes.append(tuple(target(*map_arg(args, at), **map_arg(kwargs, at)).shape))
        args, kwargs = map_arg(calls[0], lambda n: n.meta["val"])
        return call_at(self.graph, like, target, calls, sizes, target(*args, **kwargs))


_POINTWISE = (
    aten.to.dtype, aten.clone.default, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self,
    aten.where.ScalarOther, aten.where.ScalarSelf,
)  # fmt: skip


def _first(node: fx.Node) -> int | None:
    """Where positions begin, if they are counted by ones from the same number always."""
    begins = {s.get("start", 0) for s in node.meta["samples"]}
    steps = {s.get("step", 1) for s in node.meta["samples"]}
    first = begins.pop()
    return first if not begins and steps == {1} and isinstance(first, int) else None


def _shaped_at(i: int, node: fx.Node) -> torch.Tensor:
    """A tensor without numbers, in a node's shape at the i-th sample point."""
    return torch.empty(node.meta["sizes"][i], dtype=node.meta["val"].dtype, device="meta")


def _with(sizes: Any, axis: int, size: Any) -> tuple[Any, ...]:
    """A shape with another size along one dimension."""
    return (*sizes[:axis], size, *sizes[axis + 1 :])


def _product_of(sizes: list[Any]) -> list[int]:
    """Entries of some dimensions together, at each sample point."""
    return [math.prod(at) for at in zip(*sizes, strict=True)]


def _before(lengths: list[Lengths], i: int) -> Lengths:
    """Entries before the i-th part."""
    return tuple(sum(n[k] for n in lengths[:i]) for k in range(len(lengths[0])))
