"""Convolutions and transposed convolutions in 1, 2 and 3 dimensions.

A convolution over time reads ``d*(k-1) + 1`` frames at stride s; its padding in time is a way of reading, so what is
run is the same convolution without padding in time. A transposed convolution is run on the new frames alone, and what
it adds to frames still to come is carried on (overlap-add): no multiplication is done twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from ..canonicalize import listed
from ..layout import TIME, Layout, dim
from ..registry import Call, Fact, Sample, Static, overloads, rule
from ..schedule import Int, Taps
from ..stream_graph import Carry, Value, read

aten = torch.ops.aten


def spatial_layout(call: Call, layout: Layout, n: int, channels: int | None = None) -> Layout:
    """The layout after an op over the last `n` dimensions (and the channels before them), time left as it is."""
    dims = list(layout.dims)
    start = len(dims) - n
    for i in range(start - (channels is not None), len(dims)):
        if TIME not in dims[i]:
            size = channels if i < start else call.out_sizes[i][0]
            assert size is not None
            call.require(i < start or len(set(call.out_sizes[i])) == 1, "a spatial size depends on the clip's length")
            dims[i] = dim(size)
    return Layout(tuple(dims))


def only_weights(call: Call, *names: str) -> None:
    """Require that weights do not depend on time."""
    call.require(
        all(isinstance(call.fact(call.samples[0].get(n)), Static) for n in names), "its weights depend on time"
    )


@rule(*overloads("conv1d.default conv2d.default conv3d.default"))
def convolution(call: Call) -> Fact:
    """``out[j] = sum_i w[i] x[j*s - p + i*d]`` (PyTorch, torch.nn.ConvNd)."""
    only_weights(call, "weight", "bias")
    x = call.stream("input")
    weight = call.samples[0]["weight"].meta["val"].shape
    n = len(weight) - 2
    axis = x.layout.time - (len(x.layout) - n)
    layout = spatial_layout(call, x.layout, n, channels=weight[0])
    at = len(x.layout) - n - 1
    if weight[1] == 1 and all(s["groups"] == sizes[at] for s, sizes in zip(call.samples, call.sizes, strict=True)):
        layout = layout.replace(at, x.layout[at])  # depthwise: the batch may lie in the channels
    if axis < 0:
        call.require(axis == -2 and len(x.layout) == n + 2, "time lies in the channels")
        return call.framewise(layout)
    x = call.stream("input", clean=True)
    layout = layout.replace(x.layout.time, (TIME,))
    stride, dilation = listed(call.arg("stride"), n, 1), listed(call.arg("dilation"), n, 1)
    k, s, d = weight[2 + axis], stride[axis], dilation[axis]
    padding, span = listed(call.arg("padding", 0), n), d * (k - 1)
    pad = padding[axis]

    def lower(b: Any, op: Any, windows: Any, at: range, _: Any) -> Any:
        return b.call(op, windows, padding=[0 if i == axis else p for i, p in enumerate(padding)])

    return call.emit(
        layout,
        [read(x, Taps(s, 1, -pad, span - pad), fill=0.0 if pad else None)],
        rate=x.rate / s,
        length=lambda frames: (frames + 2 * pad - span - 1) // s + 1,
        length_of=[x],
        lower=lower,
        nodes=[call.samples[0]["input"]],
    )


@rule(*overloads("conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input"))
def transposed_convolution(call: Call) -> Fact:
    """``out[i*s - p + m*d] += w[m] x[i]`` (PyTorch, torch.nn.ConvTransposeNd)."""
    only_weights(call, "weight", "bias")
    x = call.stream("input")
    weight = call.samples[0]["weight"].meta["val"].shape
    n = len(weight) - 2
    channels = weight[1] * call.arg("groups", 1)
    layout = spatial_layout(call, x.layout, n, channels=channels)
    axis = x.layout.time - (len(x.layout) - n)
    if axis < 0:
        call.require(axis == -2 and len(x.layout) == n + 2, "time lies in the channels")
        return call.framewise(layout)
    x = call.stream("input", clean=True)
    layout = layout.replace(x.layout.time, (TIME,))
    stride, padding = listed(call.arg("stride"), n, 1), listed(call.arg("padding"), n)
    extra, dilation = listed(call.arg("output_padding"), n), listed(call.arg("dilation"), n, 1)
    k, s, p, d, more = weight[2 + axis], stride[axis], padding[axis], dilation[axis], extra[axis]
    reach = d * (k - 1) + 1
    time = layout.time
    spatial = {
        "padding": [0 if i == axis else v for i, v in enumerate(padding)],
        "output_padding": [0 if i == axis else v for i, v in enumerate(extra)],
    }
    bias = call.samples[0].get("bias")

    def lower(b: Any, op: Any, windows: Any, at: range, carries: list[fx.Node]) -> Any:
        frames = len(at)
        full = b.call(op, windows, bias=None, **spatial)
        got = (frames // s - 1) * s + reach
        if got < frames:
            full = b.pad_end(full, layout, frames - got)
        done = b.narrow(full, time, 0, frames)
        rest = []
        if carries:
            overlap = reach - s
            if overlap <= frames:
                head = b.aten("add.Tensor", b.narrow(done, time, 0, overlap), carries[0])
                done = b.cat([head, b.narrow(done, time, overlap, frames - overlap)], time)
                rest = [b.narrow(full, time, frames, overlap)]
            else:
                done = b.aten("add.Tensor", done, b.narrow(carries[0], time, 0, frames))
                tail = b.narrow(full, time, frames, overlap)
                older = b.narrow(carries[0], time, frames, overlap - frames)
                rest = [
                    b.cat(
                        [
                            b.aten("add.Tensor", b.narrow(tail, time, 0, overlap - frames), older),
                            b.narrow(tail, time, overlap - frames, frames),
                        ],
                        time,
                    )
                ]
        if bias is not None:
            done = b.aten("add.Tensor", done, b.view_as_channel(b.static(bias), len(layout) - n - 1, len(layout)))
        return (done, rest) if carries else done

    carried = Carry("overlap", layout.replace(time, dim(reach - s)), call.dtype(), 0.0)
    raw: Value = call.emit(
        layout,
        [read(x, Taps(1, s), fill=0.0, field=Taps(1, s, 1 - reach + s - 1, 0))],
        rate=x.rate * s,
        length=lambda frames: frames * s,
        length_of=[x],
        lower=lower,
        carries=[carried] if reach > s else [],
        memory=False,
        padded=reach - s + more > p,
        nodes=[call.samples[0]["input"]],
    )

    def length(frames: Int) -> Int:
        return frames - s + reach + more - 2 * p

    return call.view(raw, p, length)


SAMPLES = [
    Sample("conv1d", lambda: nn.Conv1d(3, 4, 5, stride=2, padding=2), (2, 3, 12)),
    Sample("conv2d_dilated", lambda: nn.Conv2d(2, 3, (3, 3), dilation=(2, 1), padding=(4, 1)), (1, 2, 12, 5)),
    Sample("conv3d", lambda: nn.Conv3d(2, 3, 3, padding=(0, 1, 1), groups=1), (1, 2, 8, 4, 4)),
    Sample("conv_same", lambda: nn.Conv1d(3, 4, 4, padding="same"), (2, 3, 12)),
    Sample("conv_transpose", lambda: nn.ConvTranspose1d(3, 4, 5, stride=2, padding=1, output_padding=1), (2, 3, 12)),
]
