"""Attention. Where time is folded into the batch it is framewise; attention over time needs the clip."""

from __future__ import annotations

import torch
from torch import nn

from ..layout import Layout
from ..registry import Call, Fact, Sample, Static, rule
from ..stream_graph import Value

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention.default)
def attention(call: Call) -> Fact:
    """``softmax(q k^T / sqrt(d) + mask) v`` over the last two dimensions."""
    args = call.samples[0]
    facts = [call.facts[args[name]] for name in ("query", "key", "value")]
    call.require(all(isinstance(f, Value) for f in facts), "attention between frames and something without time")
    query, key, value = facts
    rank = len(query.layout)
    call.require(all(f.layout.time < rank - 2 and len(f.layout) == rank for f in facts), "attention over the time axis")
    call.require(isinstance(call.fact(args.get("attn_mask")), Static), "an attention mask that depends on time")
    call.require(query.layout.dims[:-2] == key.layout.dims[:-2] == value.layout.dims[:-2], "attention across folds")
    return call.framewise(Layout((*query.layout.dims[:-1], value.layout[rank - 1])))


class _Space(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, joints, 4): attention among the joints of each frame."""
        b, t, v, c = x.shape
        y = x.reshape(b * t, v, c)
        z: torch.Tensor = self.attention(y, y, y, need_weights=False)[0]
        return z.reshape(b, t, v, c)


SAMPLES = [Sample("spatial_attention", _Space, (2, 8, 5, 4), 1)]
