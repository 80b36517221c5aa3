"""Running sums, products and extrema over time: one frame of state."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from ..layout import Layout
from ..registry import Call, Fact, Sample, rule
from ..stream_graph import Carry, Value, read

aten = torch.ops.aten

# the neutral element, and how what has run so far is joined to what runs in a chunk
_JOIN = {
    aten.cumsum.default: (0.0, "add.Tensor"),
    aten.cumprod.default: (1.0, "mul.Tensor"),
    aten.logcumsumexp.default: (-math.inf, "logaddexp.default"),
    aten.cummax.default: (-math.inf, "maximum.default"),
    aten.cummin.default: (math.inf, "minimum.default"),
}


@rule(*_JOIN)
def cumulative(call: Call) -> Fact:
    """``out[t] = x[0] * ... * x[t]``, for a sum, product, or running extremum."""
    x = call.stream("self")
    axis = call.arg("dim") % len(x.layout)
    target = call.node.target
    pair = target in (aten.cummax.default, aten.cummin.default)
    if axis != x.layout.time:
        return call.framewise([x.layout] * 2 if pair else x.layout)
    call.require(not pair or all(u.args[1] == 0 for u in call.node.users), "the indices of a running extremum")
    x = call.stream("self", clean=True)
    neutral, join = _JOIN[target]  # type: ignore[index]
    dtype = call.dtype(0 if pair else None)
    if not (dtype.is_floating_point or dtype.is_complex) and math.isinf(neutral):
        neutral = torch.iinfo(dtype).max if neutral > 0 else torch.iinfo(dtype).min

    def lower(b: Any, op: Any, windows: Any, span: range, carries: list[fx.Node]) -> tuple[Any, list[fx.Node]]:
        ran = b.call(op, windows)
        ran = b.aten(join, b.getitem(ran, 0) if pair else ran, carries[0])
        last = b.narrow(ran, axis, len(span) - 1, 1)
        return ((ran, None) if pair else ran), [last]

    layout = x.layout
    carry = Carry("so_far", Layout((*layout.dims[:axis], (), *layout.dims[axis + 1 :])), dtype, neutral)
    layouts = [layout] * (2 if pair else 1)
    values = call.emit_several(
        layouts, [read(x, fill=neutral)], length_of=[x], lower=lower, carries=[carry], several=pair
    )
    return values if pair else values[0]


def held(call: Call, x: Value) -> Value:
    """The first frame of a stream, at every frame: it is kept."""
    if "held" not in x.normalised:
        clean = call.ungroup(x)
        axis, layout = clean.layout.time, clean.layout

        def lower(b: Any, op: Any, windows: Any, span: range, carries: list[fx.Node]) -> tuple[Any, list[fx.Node]]:
            first = carries[0]
            if b.masked:
                start = b.narrow(b.indices(op, span), 0, 0, 1)
                at = b.aten("clamp.default", b.aten("neg.default", start), 0, len(span) - 1)
                here = b.aten("index_select.default", windows[0].node, axis, at)
                first = b.aten("where.self", b.aten("gt.Scalar", start, 0), first, here)
            times = [len(span) if i == axis else 1 for i in range(len(layout))]
            return b.aten("repeat.default", first, times), [first]

        carry = Carry("first", Layout((*layout.dims[:axis], (), *layout.dims[axis + 1 :])), clean.dtype, 0.0)
        x.normalised["held"] = call.emit(
            layout, [read(clean, fill=0.0)], length_of=[clean], lower=lower, carries=[carry], indexed=True,
            dtypes=[clean.dtype], nodes=[], masked_until=1,
        )  # fmt: skip
    first: Value = x.normalised["held"]
    return first


class _Cumulative(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time), run over time in three ways."""
        return x.cumsum(2) + x.sigmoid().cumprod(-1) + x.cummax(2).values


SAMPLES = [Sample("cumulative", _Cumulative, (2, 3, 9), unbounded=True)]
