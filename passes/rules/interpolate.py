"""Up- and downsampling by interpolation."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import nn

from ..layout import Layout, dim
from ..registry import Call, Fact, Sample, overloads, rule
from ..schedule import Taps
from ..stream_graph import Mirror, Value, read
from .shape import upsample

aten = torch.ops.aten


def factor(call: Call, x: Value) -> Fraction:
    """Output frames per input frame, the same at every length; NonLocal if there is no such number."""
    time = x.layout.time
    out = call.out_sizes[time]
    ratios = {Fraction(o, n) for o, n in zip(out, x.lengths, strict=True)}
    call.require(len(ratios) == 1, "interpolation to a size that does not follow the clip's length")
    return ratios.pop()


@rule(
    *overloads(
        "upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec upsample_nearest1d.default "
        "upsample_nearest2d.default upsample_nearest3d.default _upsample_nearest_exact1d.vec "
        "_upsample_nearest_exact2d.vec _upsample_nearest_exact3d.vec"
    )
)
def nearest(call: Call) -> Fact:
    """Nearest neighbour. In time: whole factors, each frame repeated (or every n-th taken)."""
    x = call.stream(_tensor(call))
    n = len(x.layout) - 2
    if x.layout.time < 2:
        return _framewise(call, x, n)
    x = call.stream(_tensor(call), clean=True)
    times = factor(call, x)
    exact = "exact" in call.op_name
    if times.denominator == 1:
        return _in_space(call, upsample(call, x, times.numerator), n)
    call.require(times.numerator == 1, "nearest interpolation by a broken factor")
    step = times.denominator
    offset = step // 2 if exact else 0
    axis = x.layout.time
    taken = call.emit(
        x.layout,
        [read(x, Taps(step, 1, offset, offset))],
        rate=x.rate / step,
        length=lambda frames: frames // step,
        length_of=[x],
        lower=lambda b, op, windows, span, _: b.every(windows[0].node, axis, step),
    )
    return _in_space(call, taken, n)


def _in_space(call: Call, x: Value, n: int) -> Value:
    """The same op within each frame, after it has been done in time."""
    time, rank = x.layout.time, len(x.layout)
    others = [i for i in range(rank - n, rank) if i != time]
    if all(tuple(call.out_sizes[i]) == tuple(x.layout.sizes(b, 1)[i] for b in call.graph.batch) for i in others):
        return x
    dims = list(x.layout.dims)
    for i in others:
        call.require(len(set(call.out_sizes[i])) == 1, "a spatial size depends on the clip's length")
        dims[i] = dim(call.out_sizes[i][0])
    layout = Layout(tuple(dims))

    def lower(b: Any, op: Any, windows: Any, span: range, _: Any) -> Any:
        factors = call.samples[0].get("scale_factors")
        if factors is None:
            size = [len(span) if i == time else call.out_sizes[i][0] for i in range(rank - n, rank)]
            return b.call(op, windows, output_size=size)
        kept = [1.0 if i == time else f for i, f in zip(range(rank - n, rank), factors, strict=True)]
        return b.call(op, windows, scale_factors=kept)

    spread: Value = call.emit(layout, [read(x)], length_of=[x], lower=lower, nodes=call.stream_nodes[:1])
    return spread


@rule(*overloads("upsample_linear1d.vec upsample_bilinear2d.vec upsample_trilinear3d.vec upsample_linear1d.default"))
def linear(call: Call) -> Fact:
    """Linear interpolation. In time (``align_corners=False``, whole factor u): frame j lies at ``(j + 1/2)/u - 1/2``.

    Beyond the clip's ends the edge frame stands, which is replicate padding by one frame.
    """
    x = call.stream(_tensor(call))
    n = len(x.layout) - 2
    if x.layout.time < 2:
        return _framewise(call, x, n)
    x = call.stream(_tensor(call), clean=True)
    times = factor(call, x)
    call.require(not call.arg("align_corners", False), "interpolation with align_corners needs the clip's length")
    if times == 1:
        return _in_space(call, x, n)
    call.require(times.denominator == 1, "linear interpolation by a broken factor")
    up = times.numerator
    axis = x.layout.time
    padded = call.view(x, -1, lambda frames: frames + 2, Mirror("replicate", 1))
    # in the padded clip, frame j lies at (2j + 1 - up)/(2 up) + 1 = (2j + 1 + up)/(2 up)
    taps = Taps(2, 2 * up, 1 + up, up + 2 * up)

    def lower(b: Any, op: Any, windows: Any, span: range, _: Any) -> Any:
        places = [2 * j + taps.first for j in span]
        weight = [(p % (2 * up)) / (2 * up) for p in places]
        below = [p // (2 * up) - windows[0].start for p in places]
        left = b.index_frames(windows[0].node, axis, below)
        above = [min(i + 1, windows[0].stop - windows[0].start - 1) for i in below]  # the last may lie on a frame
        right = b.index_frames(windows[0].node, axis, above)
        w = b.along_time(b.constant(weight, x.dtype), x.layout)
        return b.aten("lerp.Tensor", left, right, w)

    smooth = call.emit(
        x.layout,
        [read(padded, taps)],
        rate=x.rate * up,
        length=lambda frames: frames * up,
        length_of=[x],
        lower=lower,
        nodes=call.stream_nodes[:1],
    )
    return _in_space(call, smooth, n)


@rule(*overloads("upsample_bicubic2d.vec"))
def bicubic(call: Call) -> Fact:
    """Cubic interpolation of frames."""
    x = call.stream(_tensor(call))
    call.require(x.layout.time < 2, "cubic interpolation in time")
    return _framewise(call, x, len(x.layout) - 2)


def _tensor(call: Call) -> str:
    return "input" if "input" in call.samples[0] else "self"


def _framewise(call: Call, x: Value, n: int) -> Fact:
    call.require(x.layout.time == 0 or len(x.layout[1]) == 1, "time lies in the channels")
    dims = list(x.layout.dims)
    for i in range(len(dims) - n, len(dims)):
        call.require(len(set(call.out_sizes[i])) == 1, "a spatial size depends on the clip's length")
        dims[i] = dim(call.out_sizes[i][0])
    return call.framewise(Layout(tuple(dims)))


SAMPLES = [
    Sample("nearest", lambda: nn.Upsample(scale_factor=2), (1, 2, 9)),
    Sample("linear", lambda: nn.Upsample(scale_factor=3, mode="linear"), (1, 2, 9)),
]
