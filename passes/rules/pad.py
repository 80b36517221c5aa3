"""Padding: nothing is computed, the padded value is a way of reading the value."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from ..layout import TIME, Layout
from ..registry import Call, Fact, Sample, overloads, rule
from ..stream_graph import Constant, Fill, Mirror, read

aten = torch.ops.aten


@rule(
    *overloads(
        "pad.default constant_pad_nd.default reflection_pad1d.default reflection_pad2d.default "
        "reflection_pad3d.default replication_pad1d.default replication_pad2d.default replication_pad3d.default"
    )
)
def pad(call: Call) -> Fact:
    """``F.pad``: pairs of (left, right) from the last dimension backwards; negative ones crop."""
    x = call.stream("self")
    given = [list(p or q) for p, q in zip(call.sampled("pad"), call.sampled("padding"), strict=True)]
    amounts = given[0]
    name = call.op_name
    mode = call.arg("mode", "reflect" if "reflection" in name else "replicate" if "replication" in name else "constant")
    rank = len(x.layout)
    pairs = {rank - 1 - i // 2: (amounts[i], amounts[i + 1]) for i in range(0, len(amounts), 2)}
    time = x.layout.time
    left, right = pairs.get(time, (0, 0))
    ahead = 2 * (rank - 1 - time) + 1
    ends = {g[ahead] for g in given if ahead < len(g)}  # (by the length modulo something, as up to a multiple)
    call.require(all(g[:ahead] + g[ahead + 1 :] == amounts[:ahead] + amounts[ahead + 1 :] for g in given),
                 "how much is padded depends on the clip's length")  # fmt: skip
    call.require(mode != "circular" or (left, right) == (0, 0), "circular padding in time joins the clip's ends")
    elsewhere = {d: p for d, p in pairs.items() if d != time and p != (0, 0)}
    if (left, right) != (0, 0) or len(ends) > 1:
        x = call.stream("self", clean=True)
    value = x
    if elsewhere:
        dims = list(value.layout.dims)
        for d in elsewhere:
            dims[d] = call.resized(x, d)
        kept = list(amounts)
        if time in pairs:
            i = 2 * (rank - 1 - time)
            kept[i : i + 2] = [0, 0]
        layout, pads = Layout(tuple(dims)), "pad" if "pad" in call.samples[0] else "padding"
        value = call.emit(
            layout,
            [read(value)],
            length_of=[value],
            lower=lambda b, op, windows, span, _: b.call(op, windows, **{pads: kept}),
            nodes=call.stream_nodes,
        )
    if (left, right) == (0, 0) and len(ends) <= 1:
        return value
    assert value.layout[time] == (TIME,)
    fill: Fill | None
    if mode == "constant":
        number = call.arg("value")
        fill = Constant(0.0 if number is None else number)
    else:
        fill = Mirror(mode, max(0, *ends, right))
    if left <= 0 and right <= 0 and max(ends, default=0) <= 0:
        fill = None
    if len(ends) > 1:
        like, length = call.length_like(call.out_sizes[time])
        return call.view(value, -left, length, fill, like)
    return call.view(value, -left, lambda frames: frames + left + right, fill)


SAMPLES = [
    Sample("causal", lambda: nn.Sequential(nn.ConstantPad1d((2, 0), 1.5), nn.Conv1d(2, 3, 3)), (2, 2, 10)),
    Sample("reflect", lambda: nn.Sequential(nn.ReflectionPad1d((2, 1)), nn.Conv1d(2, 3, 4)), (2, 2, 10), lag=1),
    Sample("replicate", lambda: nn.Sequential(nn.ReplicationPad1d((4, 3)), nn.Conv1d(2, 3, 3)), (2, 2, 10), lag=2),
    Sample("crop", lambda: _Crop(), (2, 2, 12)),
]


class _Crop(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time) -> the clip without its first frame and its last two, padded in channels."""
        return F.pad(x, (-1, -2, 1, 0))
