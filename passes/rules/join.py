"""Ops that join several tensors: cat and stack."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx, nn

from ..errors import NonLocal
from ..layout import Dim, dim
from ..registry import Call, Fact, Head, InClip, Sample, Tail, note, overloads, rule
from ..schedule import Taps
from ..stream_graph import Constant, Mirror, Value, read

aten = torch.ops.aten


@rule(*overloads("cat.default concat.default concatenate.default stack.default hstack.default vstack.default"))
def cat(call: Call) -> Fact:
    """Tensors side by side along one dimension (stack: a new one)."""
    name = call.op_name
    call.require(name in ("aten::cat", "aten::concat", "aten::concatenate", "aten::stack"), f"{name} is not supported")
    nodes: list[fx.Node] = list(call.samples[0]["tensors"])
    given = [call.facts[n] for n in nodes]
    first = next((f for f in given if isinstance(f, Value)), None)
    if first is None:
        raise NonLocal("the first or last frames of the clip are joined")
    rank = len(first.layout)
    stack = name == "aten::stack"
    axis = call.arg("dim", 0) % (rank + stack)
    time = first.layout.time
    if not stack and axis == time:
        return beside(call, nodes)
    call.require(not any(isinstance(f, InClip) for f in given), "the first or last frames of the clip are joined")
    values: dict[fx.Node, Value] = {}
    streams = [f for f in given if isinstance(f, Value)]
    tidy = len({f.layout[f.layout.time] for f in streams}) > 1 or len(streams) < len(nodes)
    for n, f in zip(nodes, given, strict=True):
        if isinstance(f, Value):
            values[n] = call.ungroup(f) if tidy else f
        elif n.meta["val"].dim() == rank:
            values[n] = call.as_table(n, time, call.ungroup(first))
    call.require(len(values) == len(set(nodes)), "its arguments differ in rank")
    reads = list(values)
    ordered = [values[n] for n in nodes]
    call.require(len({v.layout.time for v in ordered}) == 1, "time lies in different dimensions of its arguments")
    call.require(len({v.rate for v in ordered}) == 1, "its arguments have different frame rates")
    call.require(len({v.lengths for v in ordered}) == 1, "its arguments have different lengths in time")
    layout = ordered[0].layout
    layout = (
        layout.insert(axis, dim(len(nodes)))
        if stack
        else layout.replace(axis, _sum([v.layout[axis] for v in ordered], call))
    )
    where = [reads.index(n) for n in nodes]
    return call.emit(
        layout,
        [read(values[n]) for n in reads],
        length_of=[ordered[0]],
        nodes=reads,
        lower=lambda b, op, windows, span, _: b.aten(
            "stack.default" if stack else "cat.default", [windows[i].node for i in where], axis
        ),
    )


def _sum(dims: list[Dim], call: Call) -> Dim:
    """The size of dimensions put side by side."""
    total = 0
    for d in dims:
        call.require(all(isinstance(f, int) for f in d), "dimensions that hold the batch are joined")
        size = 1
        for f in d:
            size *= int(f)  # type: ignore[arg-type]
        total += size
    return dim(total)


note(*overloads("cat.default concat.default concatenate.default"), takes_edges=True)


def beside(call: Call, nodes: list[fx.Node]) -> Value:
    """Frames before or after a stream: padding, if they are one number or the stream's own edge."""
    streams = [n for n in nodes if isinstance(call.facts[n], Value)]
    call.require(len(streams) == 1, "streams are joined one after the other")
    x = call.ungroup(call.facts[streams[0]])
    at = nodes.index(streams[0])
    time = x.layout.time
    sizes = [_constant_size(call, n, time) if n is not streams[0] else 0 for n in nodes]
    left, right = sum(sizes[:at]), sum(sizes[at + 1 :])
    length = functools.partial(operator.add, left + right)
    others = [call.facts[n] for n in nodes if n is not streams[0]]
    if any(isinstance(f, (Head, Tail)) for f in others):
        if all(_is_edge(f, x, i < at) for i, f in enumerate(others)):
            return call.view(x, -left, length, Mirror("replicate", right))
        return _with_frames(call, nodes, x, at, left, right)
    fills = {_number(n) for n in nodes if n is not streams[0]}
    if len(fills) == 1 and None not in fills:
        return call.view(x, -left, length, Constant(float(fills.pop() or 0.0)))
    moved = call.view(x, -left, length, Constant(0.0))
    over = read(moved)

    def lower(b: Any, op: Any, windows: Any, span: range, _: Any) -> Any:
        if not b.masked:
            node: fx.Node = windows[0].node
            return node
        frames = b.cat([b.static(n) for n in nodes if n is not streams[0]], time)
        index = b.indices(op, span)
        behind = b.aten("sub.Tensor", index, b.length(x))  # in the joined static frames, those after the stream
        place = b.aten("where.self", b.aten("lt.Scalar", index, left), index, behind)
        place = b.aten("clamp.default", place, 0, left + right - 1)
        static = b.aten("index_select.default", frames, time, place)
        return b.where_inside(over, windows[0], static, x.layout)

    return call.emit(x.layout, [over], length_of=[moved], lower=lower, indexed=True, padded=True, nodes=[streams[0]])


def _constant_size(call: Call, node: fx.Node, axis: int) -> int:
    """How many frames are put beside a stream."""
    sizes = set(call.sizes_of(node)[axis])
    call.require(len(sizes) == 1, "how many frames are put beside it depends on the clip's length")
    return int(sizes.pop())


def _with_frames(call: Call, nodes: list[fx.Node], x: Value, at: int, left: int, right: int) -> Value:
    """A stream with the first frames of streams before it and the last ones of streams behind it."""
    time = x.layout.time
    length = functools.partial(operator.add, left + right)
    over = read(call.view(x, -left, length, Constant(0.0)))
    reads, places, place = [over], [], 0  # of each part: where it begins, from the front or behind the stream
    for i, n in enumerate(nodes):
        fact = call.facts[n]
        if i == at:
            place = 0
            continue
        size = _constant_size(call, n, time)
        call.require(isinstance(fact, Head if i < at else Tail), "frames of the clip are put elsewhere")
        source = call.ungroup(fact.of)
        plain = fact.times == 1 and not getattr(fact, "squeeze", False)
        call.require(plain and source.rate == x.rate, "frames of another clock are put before or behind a stream")
        call.require(source.layout == x.layout, "frames of another shape are put before or behind a stream")
        first = 0
        if i > at:
            more = {n - m for n, m in zip(source.lengths, x.lengths, strict=True)}
            call.require(len(more) == 1, "its arguments have different lengths in time")
            first = more.pop() - fact.first - left
        reads.append(read(source, Taps(1, 1, first - place, first - place), fill=0.0))
        places.append((i < at, place, size))
        place += size

    def lower(b: Any, op: Any, windows: Any, span: range, _: Any) -> Any:
        if not b.masked:
            return windows[0].node
        index = b.indices(op, span)
        behind = b.aten("sub.Tensor", index, b.length(x, left))
        chosen = windows[1].node
        for (front, start, _size), window in zip(places[1:], windows[2:], strict=True):
            here = b.aten("ge.Scalar", index if front else behind, start)
            chosen = b.aten("where.self", b.along_time(here, x.layout), window.node, chosen)
        return b.where_inside(over, windows[0], chosen, x.layout)

    return call.emit(
        x.layout, reads, rate=x.rate, length_of=[x], length=length, lower=lower, indexed=True, padded=True,
        nodes=[nodes[at], *(n for i, n in enumerate(nodes) if i != at)], masked_until=left,
    )  # fmt: skip


def _is_edge(fact: Fact, x: Value, before: bool) -> bool:
    """Whether a frame put before (or after) a stream is its own first (or last) one."""
    own = isinstance(fact, Head) if before else isinstance(fact, Tail) and not fact.squeeze
    return own and fact.of is x and fact.count == 1


def _number(node: fx.Node) -> float | None:
    """The number that a tensor is made of, if it is made of one."""
    return float(node.args[1]) if node.target is aten.full.default else None  # type: ignore[arg-type]


SAMPLES = [
    Sample("stack_and_cat", lambda: _Joined(), (2, 3, 9), output_time_dim=3),
    Sample("frames_before_and_behind", lambda: _Differences(), (2, 3, 9), lag=3),
]


class _Differences(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time): differences of neighbours, with frames themselves at the ends."""
        before = torch.cat([x[..., :1], x[..., 1:] - 0.9 * x[..., :-1]], -1)
        behind = torch.cat([x[..., :-2] - x[..., 2:], x[..., -2:]], -1)
        return before * torch.cat([x.exp()[..., :2], behind[..., :-4], x.cos()[..., -2:]], -1)


class _Joined(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time) -> (batch, 2, 2*channels, time)."""
        y = torch.cat([x, x.sigmoid()], 1)
        return torch.stack([y, -y], 1)
