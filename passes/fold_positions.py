"""Pass 2b: what is made of positions alone is written as simply as it can be.

Masks are often built in roundabout ways: positions are compared with their neighbours to find where packed sequences
begin, summed up, and looked up at other positions. Here each integer tensor that no input decides is followed as a
`Ramp`, ``start + step * index`` along one dimension. One that comes out as a single number, or as a ramp by an op that
would not be understood, is made anew from ``full`` or ``arange``; what a mask of one number leaves as it is, is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from .graph_edits import call_at, moves, sizes_of, take_place

aten = torch.ops.aten


@dataclass(frozen=True)
class Ramp:
    """``start + step * index`` along the dimension `axis`; the same number everywhere where `step` is 0."""

    start: Any
    step: int = 0
    axis: int = 0


def fold_positions(graph: fx.Graph) -> None:
    """Rewrite a canonical graph so."""
    ramps: dict[fx.Node, Ramp] = {}
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.Tensor):
            continue
        kept = _kept(node, ramps)
        if kept is not None:
            if kept.meta["sizes"] != node.meta["sizes"]:
                wide: list[Any] = [((kept, list(s)), {}) for s in node.meta["sizes"]]
                kept = call_at(graph, node, aten.expand.default, wide, node.meta["sizes"], value)
            take_place(node, kept)
            continue
        if (part := _part(node, ramps)) is not None:
            take_place(node, call_at(graph, node, aten.slice.Tensor, part, node.meta["sizes"], value))
            continue
        ramp = _ramp(node, ramps)
        if ramp is None:
            continue
        sizes = sizes_of(node)
        if ramp.step and set(sizes[ramp.axis]) == {1}:
            ramp = Ramp(ramp.start)
        new = node
        if moves(node) and node.target not in (_PLAIN if ramp.step else _PLAIN_NUMBERS):
            new = _made_anew(graph, node, ramp)
            take_place(node, new)
        ramps[new] = ramp
    graph.eliminate_dead_code()


# -- what a node is ----------------------------------------------------------------------------------------------------

# made in a way that the rules know
_PLAIN_NUMBERS = {aten.full.default}
_PLAIN = {
    aten.arange.default, aten.arange.start, aten.arange.start_step, aten.reshape.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten.expand.default, aten.transpose.int,
    aten.permute.default, aten.slice.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar, aten.to.dtype,
    aten._to_copy.default, aten.clone.default,
}  # fmt: skip
# every entry of the result is one of the first argument
_MOVED = {
    *_PLAIN, aten.select.int, aten.narrow.default, aten.index.Tensor, aten.index_select.default, aten.gather.default,
    aten.repeat.default, aten.flip.default, aten.roll.default,
    aten.flatten.using_ints, aten.unflatten.int,
}  # fmt: skip
_COMPARED = {
    aten.ge: lambda low, high: True if low >= 0 else False if high < 0 else None,
    aten.gt: lambda low, high: True if low > 0 else False if high <= 0 else None,
    aten.le: lambda low, high: True if high <= 0 else False if low > 0 else None,
    aten.lt: lambda low, high: True if high < 0 else False if low >= 0 else None,
    aten.ne: lambda low, high: True if low > 0 or high < 0 else False if low == high == 0 else None,
    aten.eq: lambda low, high: False if low > 0 or high < 0 else True if low == high == 0 else None,
}


def _ramp(node: fx.Node, ramps: dict[fx.Node, Ramp]) -> Ramp | None:
    """What a node is, if its arguments tell."""
    dtype = node.meta["val"].dtype
    args = node.meta["samples"][0]
    if node.target is aten.full.default:
        return Ramp(args["fill_value"]) if _alike(node, "fill_value") and _is_number(args["fill_value"]) else None
    if node.target in (aten.arange.default, aten.arange.start, aten.arange.start_step):
        start, step = args.get("start", 0), args.get("step", 1)
        whole = isinstance(start, int) and isinstance(step, int) and not dtype.is_floating_point
        return Ramp(start, step, 0) if whole and _alike(node, "start", "step") else None
    if not node.all_input_nodes or not isinstance(node.target, torch._ops.OpOverload):
        return None
    given = {k: ramps.get(a) if isinstance(a, fx.Node) else None for k, a in args.items()}
    first = args.get("self", args.get("input"))
    of = ramps.get(first) if isinstance(first, fx.Node) else None
    if of is not None and node.target in _MOVED:
        if not of.step:
            return _converted(of, dtype)
        return _moved(node, first, of, ramps)
    if of is not None and node.target is aten.cumsum.default and not of.step and not dtype.is_floating_point:
        return Ramp(int(of.start), int(of.start), args["dim"] % len(sizes_of(node)))
    if of is not None and node.target is aten.diff.default:
        return _differences(node, of, given)
    if torch.Tag.pointwise in node.target.tags:
        return _combined(node, ramps)
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))


def _alike(node: fx.Node, *names: str) -> bool:
    """Whether these arguments are the same at all sample points."""
    samples = node.meta["samples"]
    return all(str(s.get(n)) == str(samples[0].get(n)) for s in samples for n in names)


def _converted(ramp: Ramp, dtype: torch.dtype) -> Ramp | None:
    if ramp.step:
        return None if dtype.is_floating_point or dtype is torch.bool else ramp
    return Ramp(torch.tensor(ramp.start).to(dtype).item())


def _moved(node: fx.Node, first: Any, of: Ramp, ramps: dict[fx.Node, Ramp]) -> Ramp | None:
    """A ramp whose dimensions were moved, or of which part is taken."""
    before, after, args = sizes_of(first), sizes_of(node), node.meta["samples"][0]
    if node.target is aten.index.Tensor:
        return _looked_up(node, first, of, ramps)
    if node.target in (aten.transpose.int, aten.permute.default):
        order = list(range(len(before)))
        if node.target is aten.permute.default:
            order = [d % len(before) for d in args["dims"]]
        else:
            a, b = args["dim0"] % len(before), args["dim1"] % len(before)
            order[a], order[b] = order[b], order[a]
        return Ramp(of.start, of.step, order.index(of.axis))
    if node.target is aten.expand.default:
        return Ramp(of.start, of.step, of.axis + len(after) - len(before))
    if node.target is aten.slice.Tensor:
        if args["dim"] % len(before) != of.axis:
            return of
        start = args.get("start") or 0
        fixed = _alike(node, "start", "step") and start >= 0 and start < min(before[of.axis])
        return Ramp(of.start + of.step * start, of.step * (args.get("step") or 1), of.axis) if fixed else None
    if node.target is aten.select.int:
        axis = args["dim"] % len(before)
        if axis != of.axis:
            return Ramp(of.start, of.step, of.axis - (axis < of.axis))
        return Ramp(of.start + of.step * args["index"]) if _alike(node, "index") and args["index"] >= 0 else None
    if node.target in (aten.to.dtype, aten._to_copy.default, aten.clone.default):
        return _converted(of, node.meta["val"].dtype)
    if node.target in _PLAIN | {aten.flatten.using_ints, aten.unflatten.int}:  # a reshape
        for axis, size in enumerate(after):
            if size == before[of.axis] and _outer(node, axis) == _outer(first, of.axis):
                return Ramp(of.start, of.step, axis) if set(size) != {1} else None
    return None


def _outer(node: fx.Node, axis: int) -> list[int]:
    """The entries of the dimensions before this one, at each sample point."""
    return [math.prod(s[:axis]) for s in node.meta["sizes"]]


def _looked_up(node: fx.Node, first: Any, of: Ramp, ramps: dict[fx.Node, Ramp]) -> Ramp | None:
    """A ramp looked up at positions, which are none below zero: a ramp again."""
    indices = node.meta["samples"][0]["indices"]
    if len(indices) != len(sizes_of(first)) or any(i is None for i in indices):
        return None
    at = ramps.get(indices[of.axis])
    if at is None or at.start < 0 or at.step < 0:
        return None
    axis = at.axis + len(sizes_of(node)) - len(sizes_of(indices[of.axis]))
    return Ramp(of.start + of.step * at.start, of.step * at.step, axis)


def _differences(node: fx.Node, of: Ramp, given: dict[str, Ramp | None]) -> Ramp | None:
    args = node.meta["samples"][0]
    if args.get("append") is not None or args.get("n", 1) != 1:
        return None
    axis = args.get("dim", -1) % len(sizes_of(node))
    step = of.step if axis == of.axis else 0
    if args.get("prepend") is not None:
        before = given["prepend"]
        one = before is not None and not before.step and set(sizes_of(args["prepend"])[axis]) == {1}
        if not one or before is None or before.start != of.start - step or (of.step and axis != of.axis):
            return None
    return Ramp(step)


def _combined(node: fx.Node, ramps: dict[fx.Node, Ramp]) -> Ramp | None:
    """A pointwise op on numbers, or a sum, difference, product or comparison with a ramp."""
    samples, dtype = node.meta["samples"], node.meta["val"].dtype
    args = samples[0]
    if any(not isinstance(a, fx.Node) and not _alike(node, k) for k, a in args.items()):
        return None
    nodes = node.all_input_nodes
    if not all(n in ramps for n in nodes):
        return None
    if not any(ramps[n].step for n in nodes):
        tensors = {n: torch.full([1] * min(1, n.meta["val"].dim()), ramps[n].start, dtype=n.meta["val"].dtype)
                   for n in nodes}  # fmt: skip
        try:
            result = node.target(**{k: map_arg(a, tensors.__getitem__) for k, a in args.items()})  # type: ignore[operator]
        except Exception:
            return None
        number = result.item() if isinstance(result, torch.Tensor) and result.dtype == dtype else None
        return Ramp(number) if _is_number(number) else None
    if "other" not in args or any(n.meta["val"].dtype.is_floating_point for n in nodes):
        return None
    rank = len(sizes_of(node))
    operands = []
    for operand in (args["self"], args["other"]):
        if isinstance(operand, fx.Node):
            r = ramps[operand]
            operands.append(Ramp(r.start, r.step, r.axis + rank - len(sizes_of(operand)) if r.step else 0))
        elif isinstance(operand, int):
            operands.append(Ramp(operand))
        else:
            return None
    left, right = operands
    if left.step and right.step and left.axis != right.axis:
        return None
    axis = left.axis if left.step else right.axis
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    if packet in (aten.add, aten.sub) and args.get("alpha", 1) == 1 and dtype is not torch.bool:
        sign = 1 if packet is aten.add else -1
        return Ramp(left.start + sign * right.start, left.step + sign * right.step, axis)
    if packet is aten.mul and not (left.step and right.step):
        return Ramp(left.start * right.start, left.step * right.start + right.step * left.start, axis)
    if packet in _COMPARED:
        start, step = left.start - right.start, left.step - right.step
        low, high = (start, start if not step else math.inf) if step >= 0 else (-math.inf, start)
        known = _COMPARED[packet](low, high)
        return None if known is None else Ramp(known)
    return None


# -- what becomes of it ------------------------------------------------------------------------------------------------


def _kept(node: fx.Node, ramps: dict[fx.Node, Ramp]) -> fx.Node | None:
    """The argument that an op hands on, perhaps broadcast, because another of one number says so."""
    args = node.meta["samples"][0]
    packet = getattr(node.target, "overloadpacket", None)
    left, right = args.get("self"), args.get("other")
    chosen: Any = None
    if packet in _JUNCTIONS and node.meta["val"].dtype is torch.bool:
        for number, other in ((left, right), (right, left)):
            r = ramps.get(number) if isinstance(number, fx.Node) and other not in ramps else None
            if r is not None and not r.step and bool(r.start) is _JUNCTIONS[packet]:
                chosen = other
    elif packet is aten.masked_fill and (r := ramps.get(args["mask"])) is not None and not r.step and not r.start:
        chosen = left
    elif node.target is aten.where.self and (r := ramps.get(args["condition"])) is not None and not r.step:
        chosen = left if r.start else right
    alike = isinstance(chosen, fx.Node) and chosen.meta["val"].dtype == node.meta["val"].dtype
    return chosen if alike else None


# and, or: what leaves the other side as it is
_JUNCTIONS = {
    aten.bitwise_and: True, aten.logical_and: True, aten.bitwise_or: False, aten.logical_or: False,
}  # fmt: skip


def _part(node: fx.Node, ramps: dict[fx.Node, Ramp]) -> list[Any] | None:
    """The arguments of a slice that takes what an op takes at indices that are a ramp."""
    if node.target not in (aten.index_select.default, aten.index.Tensor):
        return None
    args = node.meta["samples"][0]
    if args["self"] in ramps:
        return None
    indices = [None] * args["dim"] + [args["index"]] if node.target is aten.index_select.default else args["indices"]
    at = [i for i, n in enumerate(indices) if n is not None]
    ramp = ramps.get(indices[at[0]]) if len(at) == 1 else None
    if (
        ramp is None
        or ramp.start < 0
        or ramp.step < 1
        or len(sizes_of(indices[at[0]])) != 1
        or not moves(indices[at[0]])
    ):
        return None
    lengths = sizes_of(indices[at[0]])[0]
    stops = [ramp.start + ramp.step * (n - 1) + 1 for n in lengths]
    return [((args["self"], at[0], ramp.start, stop, ramp.step), {}) for stop in stops]


def _made_anew(graph: fx.Graph, node: fx.Node, ramp: Ramp) -> fx.Node:
    """The ops that make it, before the node."""
    value, sizes = node.meta["val"], sizes_of(node)
    like = {"dtype": value.dtype, "device": value.device}
    shapes = node.meta["sizes"]
    if not ramp.step:
        return call_at(graph, node, aten.full.default, [((list(s), ramp.start), like) for s in shapes], shapes, value)
    lengths = sizes[ramp.axis]
    ends = [((ramp.start, ramp.start + ramp.step * n, ramp.step), like) for n in lengths]
    line = value
    for dim in reversed(range(len(sizes))):
        line = line.select(dim, 0) if dim != ramp.axis else line
    new = call_at(graph, node, aten.arange.start_step, ends, [(n,) for n in lengths], line)
    if len(sizes) > 1:
        lying = [tuple(n if i == ramp.axis else 1 for i in range(len(sizes))) for n in lengths]
        flat = line[(None,) * ramp.axis + (slice(None),) + (None,) * (len(sizes) - ramp.axis - 1)]
        new = call_at(graph, node, aten.reshape.default, [((new, list(s)), {}) for s in lying], lying, flat)
        if lying != list(shapes):
            wide: list[Any] = [((new, list(s)), {}) for s in shapes]
            new = call_at(graph, node, aten.expand.default, wide, shapes, value)
    return new
