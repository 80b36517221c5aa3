"""Ops that take part of a dimension.

In time: a slice from a fixed frame on is a shift; one that ends before the clip does waits until its frames are sure
to exist; the last frames, or frames at a fixed place, belong to a clip.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from torch import fx, nn

from ..errors import NonLocal
from ..layout import TIME, Layout, Sizes, dim
from ..registry import Call, Fact, Head, Rolled, Sample, Tail, lower_call, overloads, rule
from ..schedule import Taps
from ..stream_graph import Constant, Value, read
from .frames_at import frames_at
from .join import beside
from .lookup import index_table

aten = torch.ops.aten


def bound(given: list[int | None], lengths: Sizes, default: Sizes) -> Sizes:
    """A slice's bound as seen at each sample point, as a frame index (negative ones counted from the end)."""
    out = []
    for g, n, d in zip(given, lengths, default, strict=True):
        v = d if g is None else g
        out.append(max(0, min(n, v + n if v < 0 else v)))
    return tuple(out)


def constant(values: Sizes) -> int | None:
    """The value that is the same at all points, or None."""
    return values[0] if len(set(values)) == 1 else None


@rule(*overloads("slice.Tensor narrow.default slice_copy.Tensor"), takes_rolled=True)
def slice_(call: Call) -> Fact:
    """``x[start:end:step]`` of one dimension."""
    narrow = "narrow" in call.op_name
    rolled = call.fact(call.samples[0]["self"])
    if isinstance(rolled, Rolled):
        return part(call, *_without_wrapped(call, rolled, narrow), 1)
    x = call.maybe("self")
    if x is None:
        return _table(call, narrow)
    axis = call.arg("dim", 0) % len(x.layout)
    if axis != x.layout.time:
        return call.framewise(x.layout.replace(axis, call.resized(x, axis)))
    x = call.stream("self", clean=True)
    starts, ends, step = _bounds(call, x.lengths, narrow)
    return part(call, x, starts, ends, step)


def _bounds(call: Call, lengths: Sizes, narrow: bool) -> tuple[Sizes, Sizes, int]:
    starts = bound(call.sampled("start"), lengths, (0,) * len(lengths))
    if narrow:
        spans = call.sampled("length")
        return starts, tuple(s + n for s, n in zip(starts, spans, strict=True)), 1
    given = [None if e is None or e == sys.maxsize else e for e in call.sampled("end")]
    return starts, bound(given, lengths, lengths), call.arg("step", 1)


def part(call: Call, x: Value, starts: Sizes, ends: Sizes, step: int) -> Fact:
    """Frames ``starts .. ends`` of a stream, every `step`-th."""
    start = constant(starts)
    cut = constant(tuple(n - e for n, e in zip(x.lengths, ends, strict=True)))
    if start is None:
        tail = constant(tuple(n - s for n, s in zip(x.lengths, starts, strict=True)))
        if tail is not None and cut == 0 and step == 1:
            return Tail("the last frames of the clip are read", of=x, first=tail, count=tail, squeeze=False)
        raise NonLocal("where the slice begins depends on the clip's length")
    if cut is None:
        if step == 1 and max(abs(n - e) for n, e in zip(x.lengths, ends, strict=True)) < min(x.lengths):
            like, length = call.length_like(tuple(e - start for e in ends))  # (cut to what a multiple was made of)
            return call.view(x, start, length, length_of=like)
        count = constant(ends)
        if start == 0 and count is not None and step == 1:
            return Head("the first frames of the clip are read", of=x, count=count)
        raise NonLocal("the slice takes a fixed number of frames from the start of the clip")
    if step == 1:
        return call.view(x, start, lambda frames: frames - start - cut)
    axis = x.layout.time
    return call.emit(
        x.layout,
        [read(x, Taps(step, 1, start, start))],
        rate=x.rate / step,
        length=lambda frames: (frames - cut - start + step - 1) // step,
        length_of=[x],
        lower=lambda b, op, windows, span, _: b.every(windows[0].node, axis, step),
    )


def _table(call: Call, narrow: bool) -> Fact:
    """A slice of something static whose length follows the clip's: a table of positions."""
    node = call.samples[0]["self"]
    axis = call.arg("dim", 0) % len(node.meta["val"].shape)
    sizes = call.sizes_of(node)[axis]
    starts, ends, step = _bounds(call, sizes, narrow)
    start = constant(starts)
    call.require(start is not None and step == 1, "where a table is read from depends on the clip's length")
    assert start is not None
    wanted = ends if narrow else tuple(n if e is None else e for e, n in zip(call.sampled("end"), sizes, strict=True))
    like, length = call.length_like(tuple(w - start for w in wanted))
    return call.emit(
        call.static_layout(node).replace(axis, (TIME,)),
        [],
        rate=like.rate,
        length_of=[like],
        length=length,
        indexed=True,
        limit=sizes[0] - start,
        lower=lambda b, op, windows, span, _: b.table(node, axis, start, sizes[0], op, span),
    )


@rule(*overloads("select.int select_copy.int"))
def select(call: Call) -> Fact:
    """One entry of a dimension."""
    x = call.stream("self")
    axis = call.arg("dim") % len(x.layout)
    if axis != x.layout.time:
        call.arg("index")
        return call.framewise(x.layout.replace(axis))
    x = call.stream("self", clean=True)
    index = call.sampled("index")
    from_end = constant(tuple(n - (i % n) for n, i in zip(x.lengths, index, strict=True)))
    if from_end is not None and (len(set(x.lengths)) > 1 or index[0] < 0):
        return Tail("a frame counted from the end is read", of=x, first=from_end, count=1, squeeze=True)
    raise NonLocal("a frame at a fixed place of the clip is read")


@rule(*overloads("chunk.default split.Tensor split_with_sizes.default split.sizes tensor_split.sections unbind.int"))
def split(call: Call) -> Fact:
    """A dimension parted into several results."""
    x = call.stream("self")
    axis = call.arg("dim", 0) % len(x.layout)
    if axis == x.layout.time:
        return _split_in_time(call)
    if "unbind" in call.op_name:
        return call.framewise([x.layout.replace(axis)] * len(call.sizes[0]))
    layouts = [x.layout.replace(axis, dim(size[axis])) for size in call.sizes[0]]
    return call.framewise(layouts)


def _split_in_time(call: Call) -> Fact:
    """The clip parted at fixed places, counted from its start or its end, as ``split([n - 1, 1])`` does."""
    x = call.stream("self", clean=True)
    name = call.op_name
    call.require("unbind" not in name, "the time axis is split into frames of the clip")
    parts = [tuple(s[i][x.layout.time] for s in call.sizes) for i in range(len(call.sizes[0]))]
    moving = [p for p in parts if constant(p) is None]
    call.require(len(moving) == 1, "the time axis is split into parts of the clip")
    ends = list(itertools.accumulate(parts, lambda a, b: tuple(i + j for i, j in zip(a, b, strict=True))))
    starts = [(0,) * len(x.lengths), *ends[:-1]]
    return tuple(part(call, x, start, end, 1) for start, end in zip(starts, ends, strict=True))


@rule(aten.diff.default, takes_edges=True)
def diff(call: Call) -> Fact:
    """Differences of neighbouring entries."""
    x = call.stream("self")
    axis = call.arg("dim", -1) % len(x.layout)
    order = call.arg("n", 1)
    before, after = call.samples[0].get("prepend"), call.samples[0].get("append")
    if before is not None or after is not None:
        call.require(axis == x.layout.time and x.layout.clean, "diff with something put before or after")
        parts = [n for n in (before, call.samples[0]["self"], after) if n is not None]
        x = beside(call, parts)
    elif axis != x.layout.time:
        return call.framewise(x.layout.replace(axis, call.resized(x, axis)))
    else:
        x = call.stream("self", clean=True)
    return call.emit(
        x.layout,
        [read(x, Taps(1, 1, 0, order))],
        length=lambda frames: frames - order,
        length_of=[x],
        lower=lambda b, op, windows, span, _: b.call(op, windows, prepend=None, append=None),
        nodes=[call.samples[0]["self"]],
    )


@rule(*overloads("index_select.default"))
def index_select(call: Call) -> Fact:
    """Chosen entries of a dimension; or those of a table that frames choose."""
    if call.maybe("self") is None:
        return index_table(call)
    x = call.stream("self")
    axis = call.arg("dim") % len(x.layout)
    if axis == x.layout.time and (at := call.maybe("index")) is not None:
        return frames_at(call, x, at)
    call.require(axis != x.layout.time, "chosen frames of the clip are read")
    return call.framewise(x.layout.replace(axis, call.resized(x, axis)))


def _without_wrapped(call: Call, rolled: Rolled, narrow: bool) -> tuple[Value, Sizes, Sizes]:
    """A part of a rotated stream in which nothing has come in at the other end."""
    x = rolled.of
    call.require(call.arg("dim", 0) % len(x.layout) == x.layout.time, rolled.reason)
    starts, ends, step = _bounds(call, x.lengths, narrow)
    first, cut = constant(starts), constant(tuple(n - e for n, e in zip(x.lengths, ends, strict=True)))
    call.require(step == 1 and first is not None and cut is not None, rolled.reason)
    assert first is not None and cut is not None
    call.require(first >= rolled.shift and cut >= -rolled.shift, rolled.reason)
    return call.view(x, -rolled.shift, lambda n: n, Constant(0.0)), starts, ends


def _overwritten_ends(call: Call, rolled: Rolled) -> Fact:
    """A rotated stream of which just what has come in at the other end is overwritten by a number."""
    x, shift = rolled.of, rolled.shift
    call.require(call.arg("dim", 0) % len(x.layout) == x.layout.time, rolled.reason)
    if "index" in call.samples[0]:
        starts: Sizes = tuple(i % n for i, n in zip(call.sampled("index"), x.lengths, strict=True))
        ends: Sizes = tuple(s + 1 for s in starts)
    else:
        starts, ends, step = _bounds(call, x.lengths, narrow=False)
        call.require(step == 1, rolled.reason)
    wrapped = [(0, shift) if shift > 0 else (n + shift, n) for n in x.lengths]
    call.require(list(zip(starts, ends, strict=True)) == wrapped, rolled.reason)
    number = _number(call, call.samples[0]["src"])
    call.require(number is not None, rolled.reason)
    assert number is not None
    return call.view(x, -shift, lambda n: n, Constant(number))


def _number(call: Call, node: fx.Node) -> float | None:
    """The number that stands everywhere in a tensor without time, if it is known when compiling."""
    while not call.constants.known(node):
        if node.target is aten.full.default:
            return float(node.meta["samples"][0]["fill_value"])
        if node.target not in (aten.expand.default, aten.reshape.default):
            return None
        node = node.all_input_nodes[0]
    value = call.constants.value(node)
    return float(value.flatten()[0]) if value.numel() and bool((value == value.flatten()[0]).all()) else None


@rule(*overloads("flip.default roll.default"))
def flip(call: Call) -> Fact:
    """A dimension turned around or rotated."""
    x = call.stream("self")
    dims = [d % len(x.layout) for d in call.arg("dims") or ()]
    if "shifts" in call.samples[0] and dims == [x.layout.time] and x.layout.clean:
        (shift,) = call.arg("shifts")
        call.require(0 < abs(shift) < min(x.lengths), "the time axis is turned around")
        return Rolled("the time axis is turned around", of=x, shift=shift)
    call.require(bool(dims) and x.layout.time not in dims, "the time axis is turned around")
    return call.framewise(x.layout)


@rule(*overloads("sort.default argsort.default topk.default"))
def sort(call: Call) -> Fact:
    """Entries of a dimension by size."""
    x = call.stream("self")
    axis = call.arg("dim", -1) % len(x.layout)
    call.require(axis != x.layout.time, "frames are sorted")
    layout = x.layout.replace(axis, dim(_first(call)[axis]))
    return call.framewise([layout] * len(call.sizes[0]) if isinstance(call.sizes[0][0], tuple) else layout)


def _first(call: Call) -> Any:
    size = call.sizes[0]
    return size[0] if isinstance(size[0], tuple) else size


@rule(*overloads("select_scatter.default"), takes_rolled=True)
def select_scatter(call: Call) -> Fact:
    """``x[index] = src``: in another dimension than time, framewise; in time, something static at a fixed frame."""
    if isinstance(rolled := call.fact(call.samples[0]["self"]), Rolled):
        return _overwritten_ends(call, rolled)
    x, src = call.maybe("self"), call.maybe("src")
    axis = call.arg("dim")
    if x is None:
        assert src is not None
        axis %= len(src.layout) + 1
        layout = src.layout.insert(axis, call.static_layout(call.samples[0]["self"])[axis])
        call.require(len(call.static_layout(call.samples[0]["self"])) == len(layout), "frames are overwritten")
        return _beside(call, layout, {"self": layout.time, "src": src.layout.time})
    axis %= len(x.layout)
    if axis != x.layout.time:
        call.arg("index")
        return _beside(call, x.layout, {"self": x.layout.time, "src": x.layout.time - (axis < x.layout.time)})
    call.require(src is None and x.layout.clean, "a frame is overwritten by something that depends on time")
    index = call.arg("index")
    call.require(index >= 0, "a frame counted from the end is overwritten")
    return _overwritten(call, x, range(index, index + 1), squeezed=True)


def _beside(call: Call, layout: Layout, axes: dict[str, int]) -> Fact:
    """The op on each frame, where arguments without time may lie along it: in these dimensions."""
    nodes = {call.samples[0][name]: axis for name, axis in axes.items()}
    clock = next(fact for n in nodes if isinstance(fact := call.fact(n), Value))
    given = {}
    for node, axis in nodes.items():
        fact = call.fact(node)
        if isinstance(fact, Value):
            call.require(fact.layout.time == axis, "time lies in different dimensions of its arguments")
            call.require((fact.rate, fact.lengths) == (clock.rate, clock.lengths), "its arguments differ in time")
            given[node] = fact
        elif node.meta["val"].shape[axis] != 1:
            given[node] = call.as_table(node, axis, clock)
    reads = [read(v) for v in given.values()]
    return call.emit(layout, reads, length_of=[clock], lower=lower_call, nodes=list(given))


def _overwritten(call: Call, x: Value, frames: range, squeezed: bool) -> Fact:
    """Fixed frames from the start of a stream replaced by static ones."""
    axis = x.layout.time
    node = call.samples[0]["src"]

    def lower(b: Any, op: Any, windows: list[Any], span: range, _: Any) -> Any:
        if not b.masked:
            return windows[0].node
        index = b.indices(op, span)
        static = b.static(node)
        static = b.aten("unsqueeze.default", static, axis) if squeezed else static
        place = b.aten("clamp.default", b.aten("sub.Tensor", index, frames.start), 0, len(frames) - 1)
        chosen = b.aten("index_select.default", static, axis, place)
        inside = b.aten(
            "logical_and.default",
            b.aten("ge.Scalar", index, frames.start),
            b.aten("lt.Scalar", index, frames.stop),
        )
        return b.aten("where.self", b.along_time(inside, x.layout), chosen, windows[0].node)

    return call.emit(
        x.layout,
        [read(x)],
        length_of=[x],
        lower=lower,
        indexed=True,
        nodes=call.stream_nodes[:1],
        masked_until=frames.stop,
    )


@rule(*overloads("slice_scatter.default"), takes_rolled=True)
def slice_scatter(call: Call) -> Fact:
    """``x[start:end] = src``: in another dimension than time, framewise; in time, a choice by frame index."""
    if isinstance(rolled := call.fact(call.samples[0]["self"]), Rolled):
        return _overwritten_ends(call, rolled)
    x, src = call.maybe("self"), call.maybe("src")
    any_ = x or src
    assert any_ is not None
    axis = call.arg("dim", 0) % len(any_.layout)
    if axis != any_.layout.time:
        return _beside(call, any_.layout, {"self": any_.layout.time, "src": any_.layout.time})
    call.require(x is not None and x.layout.clean, "frames of something without time are overwritten")
    assert x is not None
    if src is None:
        starts, ends, step = _bounds(call, x.lengths, narrow=False)
        first, last = constant(starts), constant(ends)
        call.require(first is not None and last is not None and step == 1, "the last frames are overwritten")
        assert first is not None and last is not None
        return _overwritten(call, x, range(first, last), squeezed=False)
    call.require(src.layout.clean, "frames are overwritten by folded ones")
    starts, ends, step = _bounds(call, x.lengths, narrow=False)
    start, cut = constant(starts), constant(tuple(n - e for n, e in zip(x.lengths, ends, strict=True)))
    call.require(start is not None and cut is not None and step == 1, "frames at a fixed place are overwritten")
    assert start is not None and cut is not None
    moved = call.view(src, -start, lambda frames: frames + start + cut, Constant(0.0))
    over = read(moved)
    return call.emit(
        x.layout,
        [read(x), over],
        length_of=[x],
        lower=lambda b, op, windows, span, _: b.where_inside(over, windows[1], windows[0].node, x.layout),
    )


SAMPLES = [
    Sample("trim", lambda: _Trim(), (1, 2, 10)),
    Sample("late_positions", lambda: _LatePositions(), (2, 3, 9), length=16),
    Sample("chosen_channels", lambda: _ChosenChannels(), (2, 3, 9)),
]


class _LatePositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.table, self.turn = nn.Conv1d(3, 4, 5), nn.Embedding(200, 4), nn.Parameter(torch.randn(2, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time): positions by tables, of a stream that comes late; one table begins again."""
        y: torch.Tensor = self.conv(x)
        at = torch.arange(y.shape[2])
        y = y + self.table(at).T + self.turn[at % 2].T
        return y


class _ChosenChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.order = nn.Buffer(torch.tensor([2, 0, 0, 1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time): channels in another order."""
        chosen: torch.Tensor = x[:, self.order]
        return chosen


class _Trim(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time) -> a slice with an offset, a step and an end."""
        return x[:, :, 1:-2:3]
