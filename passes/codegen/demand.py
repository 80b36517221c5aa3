"""How much of each tensor of a clip is asked for, so that no more of it is computed.

Demand runs backwards: of a tensor of which only ``x[:, -1]``, a class token or one of three packed projections is read,
only that is computed, through everything that treats the entries of that dimension alike, down to attention with one
query. Readers that want different parts are served apart where that is less work than what covers them all.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..registry import find_rule
from ..stream_graph import Clip

aten = torch.ops.aten
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """Some entries of one dimension: where they start and how many, at each sample point."""

    dim: int
    start: Sizes
    length: Sizes

    @property
    def empty(self) -> bool:
        """Nothing is asked for."""
        return not any(self.length)

    @property
    def stop(self) -> Sizes:
        """One beyond the last entry."""
        return tuple(s + n for s, n in zip(self.start, self.length, strict=True))


Box = tuple[Part, ...]  # parts of different dimensions, in their order; (): all of it
Below = dict[fx.Node, Box]  # what is asked of inputs; those left out: all


@dataclass(frozen=True)
class Piece:
    """A box of a node that is computed by itself, and what that takes of the node's inputs."""

    box: Box
    below: Below


def find_demands(clip: Clip) -> dict[fx.Node, list[Piece]]:
    """The pieces in which each node is computed; nodes that nobody asks are left out."""
    asked: dict[fx.Node, set[Box]] = {}
    inside = set(clip.nodes)
    for leaf, axis in zip(clip.leaves, clip.newest, strict=True):
        asked.setdefault(leaf, set()).add(() if axis is None else (last_entry(leaf, axis),))
    pieces: dict[fx.Node, list[Piece]] = {}
    for node in reversed(clip.nodes):
        if node not in asked:
            continue
        served = [Piece(*needs(node, box)) for box in asked[node]]
        pieces[node] = _merged(node, list({p.box: p for p in served}.values()))
        for piece in pieces[node]:
            for source in sources(node):
                box = piece.below.get(source, ())
                if source in inside and not any(part.empty for part in box):
                    asked.setdefault(source, set()).add(box)
    return pieces


def _merged(node: fx.Node, pieces: list[Piece]) -> list[Piece]:
    """The same pieces, any two of them as one that covers both where that is no more work."""
    left: list[Piece] = []
    for piece in pieces:
        for other in left:
            both = Piece(*needs(node, _cover(node, piece.box, other.box)))
            if _volume(node, both.box) <= _volume(node, piece.box) + _volume(node, other.box):
                return _merged(node, [both, *(p for p in pieces if p is not piece and p is not other)])
        left.append(piece)
    return left


def _cover(node: fx.Node, one: Box, other: Box) -> Box:
    """The least box that holds two."""
    found: list[Part] = []
    for a in one:
        for b in (p for p in other if p.dim == a.dim):
            start, stop = (tuple(map(f, x, y)) for f, x, y in ((min, a.start, b.start), (max, a.stop, b.stop)))
            found.append(Part(a.dim, start, tuple(v - u for u, v in zip(start, stop, strict=True))))
    return _trimmed(node, found)


def _trimmed(node: fx.Node, parts: Sequence[Part]) -> Box:
    """These parts in order, without those that are a whole dimension."""
    whole = {part for part in parts if part.length == tuple(shape(node, p)[part.dim] for p in points(node))}
    return tuple(sorted((part for part in parts if part not in whole), key=lambda part: part.dim))


def _volume(node: fx.Node, box: Box) -> int:
    sizes = list(shape(node, 0))
    for part in box:
        sizes[part.dim] = part.length[0]
    return math.prod(sizes)


def shape(node: fx.Node, point: int) -> Sizes:
    """A node's shape at a sample point (that of its first result, if there are several)."""
    size = node.meta["sizes"][point]
    return tuple(size[0]) if size and isinstance(size[0], tuple) else tuple(size)


def points(node: fx.Node) -> range:
    """The sample points."""
    return range(len(node.meta["sizes"]))


def last_entry(node: fx.Node, dim: int) -> Part:
    """The last entry of a dimension."""
    return Part(dim, tuple(max(shape(node, p)[dim] - 1, 0) for p in points(node)), (1,) * len(points(node)))


def sources(node: fx.Node) -> list[fx.Node]:
    """What a node is computed from: of one of the parts of a split tensor that tensor itself."""
    split = split_of(node)
    return [split] if split is not None else list(node.all_input_nodes)


def split_of(node: fx.Node) -> fx.Node | None:
    """The tensor of which a node is a part, if it is one result of a split."""
    if node.target is not operator.getitem or _packet(node.args[0]) not in _SPLITS:
        return None
    source: fx.Node = node.args[0].meta["samples"][0]["self"]  # type: ignore[union-attr]
    return source


def selection_of(node: fx.Node) -> tuple[fx.Node, Part, bool] | None:
    """What a node selects: the tensor, the part of it, and whether its dimension is dropped. None: it does not."""
    samples = node.meta["samples"]
    if (source := split_of(node)) is not None:
        split: Any = node.args[0]
        args, index = split.meta["samples"][0], int(samples[0]["1"])
        dim = args.get("dim", 0) % len(shape(source, 0))
        if _packet(split) == "unbind":
            return source, Part(dim, (index,) * len(samples), (1,) * len(samples)), True
        sizes = [[size[dim] for size in split.meta["sizes"][p]] for p in points(split)]
        return source, Part(dim, tuple(sum(s[:index]) for s in sizes), tuple(s[index] for s in sizes)), False
    if node.target not in (aten.select.int, aten.slice.Tensor) or not isinstance(samples[0]["self"], fx.Node):
        return None
    source = samples[0]["self"]
    dim = samples[0].get("dim", 0) % len(shape(source, 0))
    starts, lengths = [], []
    for p in points(node):
        size = shape(source, p)[dim]
        if node.target is aten.select.int:
            starts.append(samples[p]["index"] % size)
            lengths.append(1)
        else:
            given = slice(samples[p].get("start") or 0, samples[p].get("end"), samples[p].get("step", 1))
            start, stop, step = given.indices(size)
            if step != 1:
                return None
            starts.append(start)
            lengths.append(max(0, stop - start))
    return source, Part(dim, tuple(starts), tuple(lengths)), node.target is aten.select.int


def needs(node: fx.Node, box: Box) -> tuple[Box, Below]:
    """As much of a box as a node can be computed in, and what it then needs of its inputs."""
    below: dict[fx.Node, dict[int, Part]] = {}
    served: list[Part] = []
    selection = selection_of(node)
    if selection is not None:
        below[selection[0]] = {selection[1].dim: selection[1]}
    for part in box:
        found = _of_selected(selection, part) if selection is not None else _needs(node, part)
        if found is None or any(p.dim in below.get(n, {}) for n, p in found.items()):
            continue  # it cannot give a part of this dimension only: its reader takes one of the whole
        served.append(part)
        for source, p in found.items():
            below.setdefault(source, {})[p.dim] = p
    return _trimmed(node, served), {n: _trimmed(n, list(parts.values())) for n, parts in below.items()}


def _of_selected(selection: tuple[fx.Node, Part, bool], part: Part) -> dict[fx.Node, Part] | None:
    source, taken, dropped = selection
    if dropped:
        return {source: Part(part.dim + (part.dim >= taken.dim), part.start, part.length)}
    return None if part.dim == taken.dim else {source: part}


def _needs(node: fx.Node, part: Part) -> dict[fx.Node, Part] | None:
    """What a part of a node needs of its inputs (those left out: all). None: it cannot give a part only."""
    args = node.meta["samples"][0]
    rank, packet, d = len(shape(node, 0)), _packet(node), part.dim
    if node.target is operator.getitem:
        return None
    if _is_pointwise(node.target):
        return {n: p for n in node.all_input_nodes if (p := _aligned(n, rank, part)) is not None}
    if packet in _LAST and d < rank - _LAST[packet](args):
        return {args["input"]: part}
    if packet == "linear":
        return {n: Part(0, part.start, part.length) for n in (args["weight"], args.get("bias")) if n is not None}
    if packet in ("softmax", "_softmax", "log_softmax") and args["dim"] % rank != d:
        return {args["self" if "self" in args else "input"]: part}
    if packet == "embedding" and d < rank - 1:
        return {args["indices"]: part}
    if packet == "scaled_dot_product_attention" and d == rank - 2 and not args.get("is_causal"):
        return _of_queries(args, rank, part)
    if packet in ("matmul", "bmm"):
        return _of_product(args["self"], args["other" if "other" in args else "mat2"], rank, part)
    if packet in ("permute", "transpose"):
        order = list(range(rank))
        if packet == "permute":
            order = [i % rank for i in args["dims"]]
        else:
            i, j = args["dim0"] % rank, args["dim1"] % rank
            order[i], order[j] = j, i
        return {args["self"]: Part(order[d], part.start, part.length)}
    if packet in RESHAPES:
        before = _before_reshape(args["self"], node, part)
        return None if before is None else {args["self"]: before}
    if packet in _REDUCTIONS and args.get("dim") is not None:
        return _before_reduction(args, part)
    if packet == "cat":
        return _of_joined(args["tensors"], args.get("dim", 0) % rank, part)
    return None


_LAST: dict[str, Callable[[dict[str, Any]], int]] = {
    "linear": lambda args: 1,
    "layer_norm": lambda args: len(args["normalized_shape"]),
    "rms_norm": lambda args: len(args["normalized_shape"]),
}
RESHAPES = {"reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view"}
_SPLITS = {"unbind", "chunk", "split", "split_with_sizes"}
_REDUCTIONS = {"mean", "sum", "amax", "amin"}


def _packet(node: Any) -> str:
    name = str(node.target)
    return name.split(".")[1] if name.startswith("aten.") else name


def _is_pointwise(target: Any) -> bool:
    from .. import rules

    return isinstance(target, torch._ops.OpOverload) and find_rule(target) is rules.pointwise.pointwise


def _aligned(node: fx.Node, rank: int, part: Part) -> Part | None:
    """The same entries of an argument that is broadcast to a rank; None if it has none of its own."""
    d = part.dim - (rank - len(shape(node, 0)))
    if d < 0 or all(shape(node, p)[d] == 1 for p in points(node)):
        return None
    return Part(d, part.start, part.length)


def _of_queries(args: dict[str, Any], rank: int, part: Part) -> dict[fx.Node, Part] | None:
    """Some rows of attention: those queries, against all keys."""
    query: fx.Node = args["query"]
    mask = args.get("attn_mask")
    if query in (args["key"], args["value"], mask):  # of which all is needed
        return None
    found = {query: part}
    if isinstance(mask, fx.Node) and (of_mask := _aligned(mask, rank, part)) is not None:
        found[mask] = of_mask
    return found


def _of_product(left: fx.Node, right: fx.Node, rank: int, part: Part) -> dict[fx.Node, Part] | None:
    """Some rows of a matrix product are those of the left matrix, some columns those of the right one."""
    across = {rank - 2: (left, 2), rank - 1: (right, 1)}
    if part.dim not in across or left is right or left.meta["val"].dim() < 2 or right.meta["val"].dim() < 2:
        return None
    side, back = across[part.dim]
    return {side: Part(side.meta["val"].dim() - back, part.start, part.length)}


def _of_joined(tensors: Sequence[fx.Node], dim: int, part: Part) -> dict[fx.Node, Part] | None:
    """Some entries of tensors side by side: of each those that lie in it; of some nothing."""
    if part.dim != dim:
        return dict.fromkeys(tensors, part)
    if len(set(tensors)) < len(tensors):
        return None
    found: dict[fx.Node, Part] = {}
    before = [0] * len(part.start)
    for node in tensors:
        sizes = [shape(node, p)[dim] for p in points(node)]
        begin = tuple(max(s - b, 0) for s, b in zip(part.start, before, strict=True))
        end = (min(s - b, n) for s, b, n in zip(part.stop, before, sizes, strict=True))
        lengths = tuple(max(e - s, 0) for s, e in zip(begin, end, strict=True))
        if any(lengths) and not all(lengths):
            return None  # at some lengths of the clip only
        found[node] = Part(dim, begin, lengths)
        before = [b + n for b, n in zip(before, sizes, strict=True)]
    return found


def _before_reduction(args: dict[str, Any], part: Part) -> dict[fx.Node, Part] | None:
    source: fx.Node = args["self" if "self" in args else "input"]
    rank = len(shape(source, 0))
    given = [args["dim"]] if isinstance(args["dim"], int) else list(args["dim"])
    over = sorted(d % rank for d in given) or list(range(rank))
    if args.get("keepdim"):
        return None if part.dim in over else {source: part}
    left = [d for d in range(rank) if d not in over]
    return {source: Part(left[part.dim], part.start, part.length)}


def _before_reshape(source: fx.Node, node: fx.Node, demand: Part) -> Part | None:
    """The entries of a reshape's argument in which some entries of its result lie, if they make up a part of it."""
    dims, starts, lengths = set(), [], []
    for p in points(node):
        before, after = shape(source, p), shape(node, p)
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
