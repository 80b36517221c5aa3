"""Pooling over windows, and adaptive pooling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from ..canonicalize import listed
from ..errors import NonLocal
from ..layout import TIME, Layout, dim
from ..registry import Call, Fact, Sample, overloads, rule
from ..schedule import Int, Taps, minimum
from ..stream_graph import Value, read

aten = torch.ops.aten

FULL = (torch.float32, torch.float64)  # in the half types a mean of means would be rounded once more


def pooled_length(k: int, s: int, p: int, d: int, ceil: bool) -> Any:
    """How many windows fit: PyTorch's rule, where with `ceil` the last one must start inside or in the left padding."""

    def length(frames: Int) -> Int:
        if not ceil:
            return (frames + 2 * p - d * (k - 1) - 1) // s + 1
        windows = (frames + 2 * p - d * (k - 1) - 1 + s - 1) // s + 1
        # the last window starts at (windows-1)*s - p; it must lie before the end
        starts = (frames + p + s - 1) // s
        return minimum(windows, starts)

    return length


@rule(
    *overloads(
        "max_pool1d.default max_pool2d.default max_pool3d.default max_pool1d_with_indices.default "
        "max_pool2d_with_indices.default max_pool3d_with_indices.default"
    )
)
def max_pool(call: Call) -> Fact:
    """The largest entry of each window; outside stands -inf."""
    x = call.stream("self")
    indices = "with_indices" in call.op_name
    call.require(
        not indices or all(u.target is not None and u.args[1:] == (0,) for u in call.node.users),
        "the indices of max pooling are read",
    )
    kernel = call.arg("kernel_size")
    n = _spatial(call)
    axis = x.layout.time - (len(x.layout) - n)
    if axis < 0:
        layout = _spatial_layout(call, x.layout, n)
        return call.framewise([layout] * 2 if indices else layout)
    x = call.stream("self", clean=True)
    kernel = listed(kernel, n)
    stride, padding = listed(call.arg("stride"), n) or kernel, listed(call.arg("padding"), n)
    stride = [s or k for s, k in zip(stride, kernel, strict=True)]
    dilation = listed(call.arg("dilation"), n, 1)
    k, s, p, d = kernel[axis], stride[axis], padding[axis], dilation[axis]
    ceil = bool(call.arg("ceil_mode", False))
    lowest = -math.inf if x.dtype.is_floating_point else torch.iinfo(x.dtype).min
    layout = _spatial_layout(call, x.layout, n)
    spans = {"kernel_size": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    x, spans = _in_space(call, x, axis, layout, spans, indices)

    def lower(b: Any, op: Any, windows: Any, span: range, _: Any) -> Any:
        y = b.call(op, windows, **spans)
        return (b.getitem(y, 0), None) if indices else y

    values = call.emit_several(
        [layout] * (2 if indices else 1),
        [read(x, Taps(s, 1, -p, d * (k - 1) - p), fill=lowest if p or ceil else None)],
        rate=x.rate / s,
        length=pooled_length(k, s, p, d, ceil),
        length_of=[x],
        lower=lower,
        several=indices,
    )
    return values if indices else values[0]


@rule(*overloads("avg_pool1d.default avg_pool2d.default avg_pool3d.default"))
def avg_pool(call: Call) -> Fact:
    """The mean of each window.

    Frames outside are zero; what they are divided by counts the window's frames inside the clip, or inside the padded
    clip, so near the borders it is a function of the frame's index.
    """
    x = call.stream("self")
    n = _spatial(call)
    axis = x.layout.time - (len(x.layout) - n)
    if axis < 0:
        return call.framewise(_spatial_layout(call, x.layout, n))
    x = call.stream("self", clean=True)
    kernel = listed(call.arg("kernel_size"), n)
    stride = listed(call.arg("stride"), n)
    stride = [s or k for s, k in zip(stride, kernel, strict=True)]
    padding = listed(call.arg("padding"), n)
    ceil, count_pad = bool(call.arg("ceil_mode", False)), bool(call.arg("count_include_pad", True))
    divisor = call.arg("divisor_override")
    k, s, p = kernel[axis], stride[axis], padding[axis]
    layout = _spatial_layout(call, x.layout, n)
    spans = {"kernel_size": kernel, "stride": stride, "padding": padding}
    if divisor is None and x.dtype in FULL:
        x, spans = _in_space(call, x, axis, layout, spans)
    else:
        spans["padding"] = _but(padding, axis, 0)
    counted = divisor is None and ((not count_pad and (p > 0 or ceil)) or (ceil and count_pad))
    window = read(x, Taps(s, 1, -p, k - 1 - p), fill=0.0 if p or ceil else None)

    def lower(b: Any, op: Any, windows: Any, span: range, _: Any) -> fx.Node:
        y: fx.Node = b.call(op, windows, **spans)
        if counted and b.masked:
            start = b.aten("sub.Tensor", b.aten("mul.Tensor", b.indices(op, span), s), p)
            stop = b.aten("minimum.default", b.aten("add.Tensor", start, k), b.length(x, more=p if count_pad else 0))
            first = start if count_pad else b.aten("clamp_min.default", start, 0)
            inside = b.aten("clamp_min.default", b.aten("sub.Tensor", stop, first), 1)
            y = b.aten("mul.Tensor", y, b.along_time(b.aten("div.Tensor", b.like(float(k), y), inside), layout))
        return y

    return call.emit(
        layout,
        [window],
        rate=x.rate / s,
        length=pooled_length(k, s, p, 1, ceil),
        length_of=[x],
        lower=lower,
    )


def _in_space(
    call: Call, x: Value, axis: int, layout: Layout, spans: dict[str, list[int]], indices: bool = False
) -> tuple[Value, dict[str, list[int]]]:
    """What is left to pool, and how: a window in space and time is one in time of windows in space.

    So frames which windows share are pooled once, and kept pooled.

    Args:
        axis: the pool's dimension that is time.
        layout: of what is pooled in space.
        spans: kernel size, stride, padding and dilation, one for each dimension.
        indices: the op gives indices too.
    """
    inside = {k: _but(v, axis, 0 if k == "padding" else 1) for k, v in spans.items()}
    if spans["kernel_size"][axis] == 1 or not any(n > 1 for k in ("kernel_size", "stride") for n in inside[k]):
        return x, spans | {"padding": inside["padding"]}

    def lower(b: Any, op: Any, windows: Any, span: range, _: Any) -> Any:
        y = b.call(op, windows, **inside)
        return b.getitem(y, 0) if indices else y

    pooled = call.emit(layout, [read(x)], lower=lower, length_of=[x], dtypes=[x.dtype])
    rest = {k: [n if i == axis else int(k != "padding") for i, n in enumerate(v)] for k, v in spans.items()}
    return pooled, rest | {"padding": [0] * len(rest["padding"])}


def _but(given: list[int], axis: int, value: int) -> list[int]:
    """A list with another value at one place."""
    return [value if i == axis else v for i, v in enumerate(given)]


def _spatial(call: Call) -> int:
    return int(call.op_name.split("pool")[1][0])


def _spatial_layout(call: Call, layout: Layout, n: int) -> Layout:
    dims = list(layout.dims)
    sizes = [s[0] if s and isinstance(s[0], tuple) else s for s in call.sizes]
    for i in range(len(dims) - n, len(dims)):
        if TIME not in dims[i]:
            dims[i] = dim(sizes[0][i])
    return Layout(tuple(dims))


@rule(
    *overloads(
        "adaptive_avg_pool1d.default adaptive_avg_pool2d.default adaptive_avg_pool3d.default "
        "adaptive_max_pool1d.default adaptive_max_pool2d.default adaptive_max_pool3d.default "
        "_adaptive_avg_pool2d.default _adaptive_avg_pool3d.default"
    )
)
def adaptive_pool(call: Call) -> Fact:
    """Pooling to a given size: framewise in space; in time it needs the clip, unless the length stays as it is."""
    x = call.stream("self")
    n = _spatial(call)
    rank = len(x.layout)
    several = isinstance(call.node.meta["val"], (list, tuple))
    layout = _spatial_layout(call, x.layout, n)
    axis = x.layout.time - (rank - n)
    if axis >= 0:
        size = tuple(listed(s["output_size"], n)[axis] for s in call.samples)
        call.require(size == x.lengths and x.layout.clean, "adaptive pooling over time needs the whole clip")
        if len(set(x.lengths)) == 1:
            raise NonLocal("adaptive pooling over time needs the whole clip")

    def lower(b: Any, op: Any, windows: Any, span: range, _: Any) -> Any:
        if axis < 0:
            return b.call(op, windows)
        output = list(call.samples[0]["output_size"])
        output[axis] = len(span)
        return b.call(op, windows, output_size=output)

    return call.framewise([layout] * 2 if several else layout, lower=lower)


SAMPLES = [
    Sample("max_pool_ceil", lambda: nn.MaxPool1d(3, 2, 1, ceil_mode=True), (1, 2, 12)),
    Sample("avg_pool_ceil", lambda: nn.AvgPool1d(3, 2, 1, ceil_mode=True), (1, 2, 12)),
    Sample("avg_pool_nocount", lambda: nn.AvgPool1d(3, 1, 1, count_include_pad=False), (1, 2, 12)),
    Sample("max_pool_time_and_space", lambda: nn.MaxPool2d(3, 2, 1), (1, 2, 12, 8)),
    Sample("max_pool_dilated_time_and_space", lambda: nn.MaxPool2d(2, 1, dilation=(3, 2)), (1, 2, 12, 8)),
    Sample(
        "avg_pool_time_and_space",
        lambda: nn.AvgPool2d((3, 4), (2, 3), (1, 2), ceil_mode=True, count_include_pad=False),
        (1, 2, 12, 9),
    ),
    Sample("avg_pool_divided", lambda: nn.AvgPool2d((3, 2), 1, 1, divisor_override=5), (1, 2, 12, 8)),
    Sample("max_pool_space", lambda: nn.MaxPool2d((1, 2)), (1, 9, 3, 4), time_dim=1),
    Sample("adaptive_space", lambda: nn.AdaptiveAvgPool3d((None, 1, 1)), (1, 2, 8, 4, 4)),
]
