"""Ops that move, part and join dimensions without touching what is in them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx, nn

from ..errors import NonLocal
from ..layout import BATCH, TIME, Dim, Grouped, Layout, Sizes, Unshapeable, dim, from_sizes, reshape
from ..registry import Call, Fact, Head, Sample, Tail, overloads, rule
from ..schedule import Taps
from ..stream_graph import Length, Op, Value, read

aten = torch.ops.aten


@rule(
    *overloads(
        "view.default reshape.default _unsafe_view.default _reshape_alias.default flatten.using_ints unflatten.int "
        "squeeze.default squeeze.dim squeeze.dims unsqueeze.default view_copy.default squeeze_copy.dim "
        "unsqueeze_copy.default"
    )
)
def reshaped(call: Call) -> Fact:
    """Any row-major reshape: the target's sizes tell where time and batch go."""
    x = call.stream("self")
    while True:
        try:
            layout = reshape(x.layout, call.out_sizes, call.graph.batch, x.lengths)
            break
        except Grouped as grouped:
            x = call.group(call.ungroup(x) if x.layout[x.layout.time] != (TIME,) else x, grouped.frames)
        except Unshapeable as why:
            raise NonLocal(f"the reshape parts the time axis: {why}") from None
    return call.emit(
        layout,
        [read(x)],
        length_of=[x],
        nodes=call.stream_nodes[:1],
        lower=lambda b, op, windows, span, _: b.reshape(windows[0].node, layout, len(span)),
    )


def _permuted(call: Call, x: Value, order: list[int]) -> Fact:
    return call.emit(
        x.layout.permute(order),
        [read(x)],
        length_of=[x],
        lower=lambda b, op, windows, span, _: b.aten("permute.default", windows[0].node, order),
    )


@rule(*overloads("permute.default permute_copy.default"))
def permute(call: Call) -> Fact:
    """Dimensions in another order."""
    x = call.stream("self")
    return _permuted(call, x, [d % len(x.layout) for d in call.arg("dims")])


@rule(
    *overloads("transpose.int swapaxes.default swapdims.default t.default numpy_T.default mT.default adjoint.default")
)
def transpose(call: Call) -> Fact:
    """Two dimensions exchanged."""
    x = call.stream("self")
    rank = len(x.layout)
    name = call.op_name
    if name in ("aten::t", "aten::numpy_T"):
        return _permuted(call, x, list(reversed(range(rank))))
    default = (-2, -1) if name in ("aten::mT", "aten::adjoint") else (0, 1)
    first = call.arg("dim0", call.arg("axis0", default[0])) % rank
    second = call.arg("dim1", call.arg("axis1", default[1])) % rank
    order = list(range(rank))
    order[first], order[second] = second, first
    return _permuted(call, x, order)


@rule(*overloads("movedim.int movedim.intlist moveaxis.int moveaxis.intlist"))
def movedim(call: Call) -> Fact:
    """Some dimensions moved, the others closing up in order."""
    x = call.stream("self")
    rank = len(x.layout)
    source, target = call.arg("source"), call.arg("destination")
    sources = [d % rank for d in (source if isinstance(source, (list, tuple)) else [source])]
    targets = [d % rank for d in (target if isinstance(target, (list, tuple)) else [target])]
    moved = dict(zip(targets, sources, strict=True))
    rest = iter(d for d in range(rank) if d not in sources)
    return _permuted(call, x, [moved[i] if i in moved else next(rest) for i in range(rank)])


def edge_repeated(call: Call) -> Fact:
    """The first or the last frame of a stream repeated so many times, as one that is put beside it for padding."""
    edge = call.facts[call.samples[0]["self"]]
    single = edge.times == 1 and edge.count == 1 and not getattr(edge, "squeeze", False)
    call.require(single, "frames of the clip are repeated")
    layout = edge.of.layout
    before, after = call.sizes_of(call.samples[0]["self"]), call.out_sizes
    others = [a == b for i, (a, b) in enumerate(zip(before, after, strict=False)) if i != layout.time]
    call.require(
        layout.clean and len(after) == len(before) and all(others), "a frame of the clip is repeated elsewhere"
    )
    times = after[layout.time]
    call.require(len(set(times)) == 1, "how often a frame is repeated depends on the clip's length")
    return dataclasses.replace(edge, times=times[0])


@rule(*overloads("expand.default broadcast_to.default expand_copy.default"), takes_edges=True)
def expand(call: Call) -> Fact:
    """Dimensions of size 1 repeated without copying; time itself cannot be, it is no dimension of size 1."""
    if isinstance(call.fact(call.samples[0]["self"]), (Head, Tail)):
        return edge_repeated(call)
    x = call.maybe("self")
    if x is None:
        return _along_time(call)
    added = len(call.out_sizes) - len(x.layout)
    layout = Layout(((),) * added + x.layout.dims)
    like = call.maybe("other")
    dims = []
    for i, (d, sizes) in enumerate(zip(layout, call.out_sizes, strict=True)):
        if d or set(sizes) == {1}:
            dims.append(d)
        elif like is not None:
            dims.append(like.layout[i])
        else:
            dims.append(_static(call, sizes))
    wide = Layout(tuple(dims))
    call.require(len(wide.time_dims) == 1, "a second time axis")
    return call.emit(
        wide,
        [read(x)],
        length_of=[x],
        nodes=call.stream_nodes[:1],
        lower=lambda b, op, windows, span, _: b.aten("expand.default", windows[0].node, b.sizes(wide, len(span))),
    )


def _along_time(call: Call) -> Fact:
    """Something without time, repeated to the clip's length: the same frame at every index."""
    node = call.samples[0]["self"]
    sizes = call.out_sizes
    axis, like, length, along = _moving(call, node)
    layout = Layout(tuple(along if i == axis else _static(call, s) for i, s in enumerate(sizes)))
    return call.emit(
        layout,
        [],
        rate=like.rate,
        length_of=[like],
        length=length,
        lower=lambda b, op, windows, span, _: b.aten("expand.default", b.static(node), b.sizes(layout, len(span))),
    )


def _folded(call: Call, wanted: Sizes) -> tuple[Value, Length, Dim] | None:
    """A dimension of these sizes that holds time and more, like that of a class token for each of B*T frames."""
    for value in reversed(call.graph.values):
        if len(value.layout[value.layout.time]) > 1:
            shapes = (value.layout.sizes(b, n) for b, n in zip(call.graph.batch, value.lengths, strict=True))
            if tuple(s[value.layout.time] for s in shapes) == tuple(wanted):
                return value, lambda n: n, value.layout[value.layout.time]
    if len(set(call.graph.batch)) > 1 and not any(w % b for w, b in zip(wanted, call.graph.batch, strict=True)):
        frames = tuple(w // b for w, b in zip(wanted, call.graph.batch, strict=True))
        if len(set(zip(call.graph.ticks, frames, strict=True))) == len(set(call.graph.ticks)):  # whatever the batch
            return (*call.length_like(frames), (BATCH, TIME))
    return None


def along_time(call: Call, wanted: Sizes) -> tuple[Value, Length, Dim]:
    """A value whose length these sizes follow, how they do, and the dimension that has them: time, perhaps folded."""
    return _folded(call, wanted) or (*call.length_like(wanted), (TIME,))


def _moving(call: Call, node: fx.Node) -> tuple[int, Value, Length, Dim]:
    """The dimension of the result, of size 1 before, that follows the clip's length, how it does, and its factors."""
    sizes, rank = call.out_sizes, len(node.meta["val"].shape)
    moving = [i for i, s in enumerate(sizes) if len({n for n, b in zip(s, call.graph.batch, strict=True)
                                                      if b == call.graph.batch[0]}) > 1]  # fmt: skip
    call.require(len(moving) == 1, "something without time is expanded along two axes")
    axis = moving[0]
    call.require(
        axis < len(sizes) - rank or node.meta["val"].shape[axis - len(sizes) + rank] == 1, "a second time axis"
    )
    like, length, along = along_time(call, sizes[axis])
    return axis, like, length, along


def _repeated_along_time(call: Call) -> Fact:
    """Something without time, a dimension of size 1 of it repeated to the clip's length: one frame at every index."""
    node = call.samples[0]["self"]
    name = "repeats" if "repeats" in call.samples[0] else "dims"
    times = list(zip(*call.sampled(name), strict=True))
    axis, like, length, along = _moving(call, node)
    own = [1] * (len(times) - len(node.meta["sizes"][0])) + list(node.meta["sizes"][0])
    wide = [i == axis or len(set(t)) > 1 for i, t in enumerate(times)]  # by the length, or by the batch size
    call.require(all(n == 1 for n, w in zip(own, wide, strict=True) if w), "more than one entry is repeated")
    layout = Layout(tuple(along if i == axis else _static(call, s) for i, s in enumerate(call.out_sizes)))
    once = [1 if w else t[0] for t, w in zip(times, wide, strict=True)]

    def lower(b: Any, op: Op, windows: list[Any], span: range, _: Any) -> Any:
        frame = b.aten("repeat.default", b.static(node), once)
        return b.aten("expand.default", frame, b.sizes(layout, len(span)))

    return call.emit(layout, [], rate=like.rate, length_of=[like], length=length, lower=lower)


def _static(call: Call, sizes: Sizes) -> Dim:
    try:
        return from_sizes([sizes], call.graph.batch)[0]
    except Unshapeable:
        raise NonLocal("something without time is expanded along time") from None


@rule(*overloads("repeat.default tile.default"), takes_edges=True)
def repeat(call: Call) -> Fact:
    """Dimensions repeated as a whole."""
    if isinstance(call.fact(call.samples[0]["self"]), (Head, Tail)):
        return edge_repeated(call)
    x = call.maybe("self")
    if x is None:
        return _repeated_along_time(call)
    times = list(zip(*call.sampled("repeats" if "repeats" in call.samples[0] else "dims"), strict=True))
    padded = [_static(call, t) for t in ((1,) * len(times[0]),) * (len(x.layout) - len(times)) + tuple(times)]
    layout = Layout(((),) * (len(padded) - len(x.layout)) + x.layout.dims)
    call.require(not padded[layout.time], "the clip is repeated as a whole")
    call.require(all(not r or BATCH not in d for r, d in zip(padded, layout, strict=True)), "lanes are repeated")
    return call.framewise(Layout(tuple(dim(*r, *d) for r, d in zip(padded, layout, strict=True))))


@rule(*overloads("repeat_interleave.self_int"), takes_edges=True)
def repeat_interleave(call: Call) -> Fact:
    """Each entry of a dimension repeated: in time, an upsampling by a whole number."""
    if isinstance(call.fact(call.samples[0]["self"]), (Head, Tail)):
        return edge_repeated(call)
    x, times = call.stream("self"), call.arg("repeats")
    axis = call.arg("dim")
    call.require(axis is not None, "repeat_interleave of the flattened tensor")
    axis %= len(x.layout)
    if axis != x.layout.time:
        return call.framewise(x.layout.replace(axis, dim(*x.layout[axis], times)))
    x = call.stream("self", clean=True)
    return upsample(call, x, times)


def upsample(call: Call, x: Value, times: int) -> Value:
    """Each frame `times` times."""
    axis = x.layout.time

    def lower(b: object, op: object, windows: list[object], span: range, _: object) -> object:
        return b.repeat_frames(windows[0], axis, times, span)  # type: ignore[attr-defined]

    value: Value = call.emit(
        x.layout,
        [read(x, Taps(1, times))],
        rate=x.rate * times,
        length=lambda frames: frames * times,
        length_of=[x],
        lower=lower,
    )
    return value


@rule(aten.unfold.default)
def unfold(call: Call) -> Fact:
    """Overlapping windows of a dimension, as a new last dimension."""
    x = call.stream("self")
    axis = call.arg("dimension") % len(x.layout)
    size, step = call.arg("size"), call.arg("step")
    if axis != x.layout.time:
        return call.framewise(x.layout.replace(axis, dim(call.out_sizes[axis][0])).insert(-1, dim(size)))
    x = call.stream("self", clean=True)
    return call.emit(
        x.layout.insert(-1, dim(size)),
        [read(x, Taps(step, 1, 0, size - 1))],
        rate=x.rate / step,
        length=lambda frames: (frames - size) // step + 1,
        length_of=[x],
        lower=lambda b, op, windows, span, _: b.call(op, windows),
    )


@rule(*overloads("pixel_shuffle.default pixel_unshuffle.default channel_shuffle.default"))
def pixel_shuffle(call: Call) -> Fact:
    """Channels to space or back, within frames."""
    x = call.stream("self")
    rank = len(x.layout)
    call.require(x.layout.time < rank - 3, "pixels are shuffled with time")
    dims = list(x.layout.dims)
    for i in range(rank - 3, rank):
        dims[i] = dim(call.out_sizes[i][0])
    return call.framewise(Layout(tuple(dims)))


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, patches, 3): a token before the patches of every frame, all frames in one dimension."""
        batch, time, patches, width = x.shape
        rows = torch.cat([self.token.expand(batch * time, -1, -1), x.reshape(batch * time, patches, width)], 1)
        return rows.softmax(1)[:, 0].reshape(batch, time, width)


SAMPLES = [
    Sample("edges_repeated", lambda: _Edges(), (2, 2, 9), lag=2),
    Sample("repeated_condition", lambda: _Repeated(), (2, 4, 9)),
    Sample("tokens", _Tokens, (2, 9, 4, 3), 1),
    Sample("unflatten", lambda: nn.Unflatten(1, (2, 2)), (2, 4, 9), output_time_dim=3),
    Sample("fold_and_back", lambda: _Fold(), (2, 4, 9, 3)),
    Sample("pairs_of_frames", lambda: _Pairs(), (2, 3, 8), multiple=2, length=22),
]


class _Edges(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time) padded by hand with the first frame and the last."""
        y: torch.Tensor = self.conv(torch.cat([x[..., :1].expand(-1, -1, 3), x, x[..., -1:].repeat(1, 1, 2)], -1))
        return y


class _Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time) and something without time, repeated along it and along the batch."""
        return x + self.bias[None, :, None].repeat(x.shape[0], 2, x.shape[2])


class _Fold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time, space) through a convolution over space, time folded into the batch."""
        b, c, t, v = x.shape
        y: torch.Tensor = self.conv(x.permute(0, 2, 1, 3).reshape(b * t, c, v))
        return y.reshape(b, t, -1, v).transpose(1, 2)


class _Pairs(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time) -> (batch, channels, time / 2): the mean of every two frames."""
        b, c, t = x.shape
        return x.reshape(b, c, t // 2, 2).mean(-1)
