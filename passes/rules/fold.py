"""Patches taken out of an image and added back into one (torch.nn.Unfold, torch.nn.Fold), as overlap-add by hand does.

Time is one of the two dimensions of the image, and patches cover the other as a whole or time alone runs through them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..layout import TIME, Layout, dim
from ..registry import Call, Fact, Sample, overloads, rule
from ..schedule import Taps
from ..stream_graph import Value, read

aten = torch.ops.aten


@rule(*overloads("im2col.default"))
def unfold(call: Call) -> Fact:
    """The patches of an image (batch, channels, height, width), one after the other in the last dimension."""
    x = call.stream("self")
    rank = len(x.layout)
    if x.layout.time < rank - 3:
        return call.framewise(Layout((*x.layout.dims[:-3], *(dim(s[0]) for s in call.out_sizes[-2:]))))
    x = call.stream("self", clean=True)
    axis = x.layout.time - (rank - 2)
    call.require(axis >= 0, "time lies in the channels")
    kernels, stride = call.sampled("kernel_size"), call.arg("stride")
    padding, dilation = list(call.arg("padding")), call.arg("dilation")
    other = 1 - axis
    if all(k[axis] == n for k, n in zip(kernels, x.lengths, strict=True)) and len(set(x.lengths)) > 1:
        call.require(len({k[other] for k in kernels}) == 1, "a patch as large as the clip")
        call.require(padding[axis] == 0 and dilation[axis] == 1, "patches larger than the clip")
        return _as_long_as_the_clip(call, x, axis, kernels[0][other])
    kernel = call.arg("kernel_size")
    k, s, p, d = (v[axis] for v in (kernel, stride, padding, dilation))
    across = call.sizes_of(call.samples[0]["self"])[rank - 2 + other][0]
    rest = across + 2 * padding[other] - dilation[other] * (kernel[other] - 1) - 1
    call.require(rest // stride[other] == 0, "patches beside each other")
    span = d * (k - 1)
    inner = [0 if i == axis else padding[i] for i in range(2)]
    return call.emit(
        Layout((*x.layout.dims[:-3], dim(call.out_sizes[-2][0]), (TIME,))),
        [read(x, Taps(s, 1, -p, span - p), fill=0.0)],
        rate=x.rate / s,
        length=lambda frames: (frames + 2 * p - span - 1) // s + 1,
        length_of=[x],
        lower=lambda b, op, windows, at, _: b.call(op, windows, padding=inner),
        nodes=call.stream_nodes,
    )


def _as_long_as_the_clip(call: Call, x: Value, axis: int, size: int) -> Fact:
    """Patches that have all of the clip's frames, beside each other in the other dimension: cut from each frame."""
    batch, channels = x.layout.dims[:-3], x.layout.dims[-3]
    call.require(all(isinstance(f, int) for f in channels), "the batch lies in the channels")
    entries = dim(size) + (TIME,) if axis == 1 else (TIME, *dim(size))
    layout = Layout((*batch, (*channels, *entries), dim(call.out_sizes[-1][0])))

    def lower(b: Any, op: Any, windows: Any, span: range, _: Any) -> Any:
        kernel = [len(span) if i == axis else size for i in range(2)]
        return b.call(op, windows, kernel_size=kernel)

    return call.framewise(layout, [x], lower)


@rule(*overloads("col2im.default"))
def fold(call: Call) -> Fact:
    """Patches (batch, channels*patch, count) added into an image (batch, channels, height, width).

    ``out[i*s - p + m*d] += x[m, i]``: a frame waits for the last patch that holds it.
    """
    x = call.stream("self")
    rank = len(x.layout)
    if x.layout.time < rank - 2:
        return call.framewise(Layout((*x.layout.dims[:-2], *(dim(s[0]) for s in call.out_sizes[-3:]))))
    x = call.stream("self", clean=True)
    call.require(x.layout.time == rank - 1, "time lies in the patches")
    kernel, stride = call.arg("kernel_size"), call.arg("stride")
    padding, dilation = list(call.arg("padding")), call.arg("dilation")
    height, width = call.out_sizes[-2:]
    axis = 1 if len(set(height)) == 1 else 0
    other = (height, width)[1 - axis]
    call.require(len(set(other)) == 1, "both dimensions of the image follow the clip's length")
    k, s, p, d = (v[axis] for v in (kernel, stride, padding, dilation))
    span = d * (k - 1)
    rows = (other[0] + 2 * padding[1 - axis] - dilation[1 - axis] * (kernel[1 - axis] - 1) - 1) // stride[1 - axis] + 1
    call.require(rows == 1, "patches beside each other")
    less = {(n - 1) * s + span + 1 - 2 * p - w for n, w in zip(x.lengths, (height, width)[axis], strict=True)}
    call.require(len(less) == 1, "its length follows the clip's in a way that is not understood")
    short, taps = less.pop(), Taps(1, s, p - span + s - 1, p)
    call.require(0 <= -short < s or short == 0, "the image is shorter or longer than its patches")
    image = [dim(call.out_sizes[-3][0]), *((TIME,) if i == axis else dim(other[0]) for i in range(2))]

    def lower(b: Any, op: Any, windows: Any, at: range, _: Any) -> Any:
        low, high = taps.lo(at.start), taps.hi(at.stop - 1) + 1
        whole = (high - low - 1) * s + span + 1
        size = [whole if i == axis else other[0] for i in range(2)]
        inner = [0 if i == axis else padding[i] for i in range(2)]
        added = b.call(op, windows, output_size=size, padding=inner)
        return b.narrow(added, rank - 1 + axis, at.start + p - low * s, len(at))

    return call.emit(
        Layout((*x.layout.dims[:-2], *image)),
        [read(x, taps, fill=0.0)],
        rate=x.rate * s,
        length=lambda frames: (frames - 1) * s + span + 1 - 2 * p - short,
        length_of=[x],
        lower=lower,
        nodes=call.stream_nodes,
    )


SAMPLES = [
    Sample("overlap_add", lambda: _OverlapAdd(), (2, 3, 20), length=44),
    Sample("patches", lambda: _Patches(), (2, 3, 20), length=44),
    Sample("patches_of_bands", lambda: _Bands(), (2, 5, 9)),
]


class _OverlapAdd(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time) -> windows of 6 frames at a hop of 2, added where they overlap, over their number."""
        frames = x.unfold(-1, 6, 2).permute(0, 1, 3, 2)
        batch, channels, size, count = frames.shape
        length = (count - 1) * 2 + size
        windowed = (frames * torch.hann_window(size)[:, None]).reshape(batch, channels * size, count)
        added = F.fold(windowed, (1, length), (1, size), stride=(1, 2))[:, :, 0]
        ones = torch.ones(1, size).expand(count, -1).t()[None]
        return added / F.fold(ones, (1, length), (1, size), stride=(1, 2))[:, 0]


class _Patches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time): the mean of three frames, two apart, at every second frame."""
        patches = F.unfold(x[:, :, None], (1, 3), dilation=2, padding=(0, 1), stride=2)
        return patches.reshape(x.shape[0], x.shape[1], 3, -1).mean(2)


class _Bands(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, bands, time): each band with its neighbours, taken as patches as long as the clip (FullSubNet)."""
        batch, bands, time = x.shape
        patches = F.unfold(x[:, None], (3, time), padding=(1, 0)).reshape(batch, 3, time, bands)
        return patches.permute(0, 3, 1, 2).reshape(batch, bands * 3, time)
