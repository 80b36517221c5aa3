"""Fused attention. Where time is folded into the batch it is framewise; over time it is a stream if it looks no further
ahead than so many frames, by flag or by mask, and else needs the clip."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..codegen.pairs import Reach, Scope, evaluate, find_reach
from ..layout import Layout
from ..registry import Call, Fact, Sample, Static, pair_rule, rule
from ..stream_graph import Op, Value
from .pairs import as_masking, evaluator, same_clock, summed_up

aten = torch.ops.aten


@rule(aten.scaled_dot_product_attention.default, draws_in_training=True)
def attention(call: Call) -> Fact:
    """``softmax(q k^T / sqrt(d) + mask) v`` over the last two dimensions."""
    args = call.samples[0]
    facts = [call.facts[args[name]] for name in ("query", "key", "value")]
    if isinstance(facts[0], Value) and all(isinstance(f, Static) for f in facts[1:]):
        return _to_memory(call)
    call.require(all(isinstance(f, Value) for f in facts), "attention between frames and something without time")
    query, key, value = facts
    rank = len(query.layout)
    call.require(all(f.layout.time < rank - 2 and len(f.layout) == rank for f in facts), "attention over the time axis")
    call.require(isinstance(call.fact(args.get("attn_mask")), Static), "an attention mask that depends on time")
    call.require(query.layout.dims[:-2] == key.layout.dims[:-2] == value.layout.dims[:-2], "attention across folds")
    return call.framewise(Layout((*query.layout.dims[:-1], value.layout[rank - 1])))


def _to_memory(call: Call) -> Fact:
    """Each frame attends to the same keys, which do not depend on time (a learned memory)."""
    query = call.stream("query", clean=True)
    rank, masked = len(query.layout), call.samples[0].get("attn_mask") is not None or call.arg("is_causal", False)
    call.require(query.layout.time == rank - 2 and not masked, "attention between frames and something without time")
    return call.framewise(Layout((*query.layout.dims[:-1], call.static_layout(call.samples[0]["value"])[-1])), [query])


@pair_rule(aten.scaled_dot_product_attention.default)
def attention_over_time(call: Call) -> Fact:
    """The same where queries and keys are frames."""
    args = call.samples[0]
    names = ("query", "key", "value")
    call.require(all(isinstance(call.facts[args[n]], Value) for n in names), "attention over the whole clip")
    query, key, value = (call.ungroup(call.facts[args[n]]) for n in names)
    rank = len(query.layout)
    call.require(
        all(v.layout.time == rank - 2 and len(v.layout) == rank for v in (query, key, value)),
        "attention of frames with features",
    )
    same_clock(call, [query, key, value])
    given, causal = args.get("attn_mask"), bool(call.arg("is_causal", False))
    call.require(given is not None or causal, "attention over the whole clip")
    mask = None if given is None else as_masking(call, given, query)
    reach = Reach(None, 0)
    if mask is not None:
        reach = find_reach(evaluator(call), mask, scores=True)
    layout = Layout((*query.layout.dims[:-1], value.layout[rank - 1]))

    def lower(b: Any, op: Op, scope: Scope) -> Any:
        pairs = None if mask is None else evaluate(b, mask, scope)
        at = {name: scope.frames[v, name != "query"] for name, v in zip(names, (query, key, value), strict=True)}
        exists = scope.exists
        if causal and len(scope.rows) > 1:
            near = b.aten("le.Scalar", b.distance(scope), 0)
            exists = near if exists is None else b.aten("logical_and.default", near, exists)
        if exists is not None:
            exists = b.aten("expand.default", exists, [len(scope.rows), len(scope.columns)])
        if pairs is None:
            pairs = exists
        elif exists is not None and mask is not None and mask.dtype == torch.bool:
            pairs = b.aten("logical_and.default", pairs, exists)
        elif exists is not None and mask is not None:
            pairs = b.aten("where.self", exists, pairs, b.like(torch.finfo(mask.dtype).min, pairs))
        bound = dict(call.samples[0]) | {"attn_mask": pairs, "is_causal": False, "dropout_p": 0.0} | at
        found = b.call(op, [], **bound)
        if mask is None or not reach.nothing:
            return found
        reads = pairs if mask.dtype == torch.bool else b.aten("gt.Scalar", pairs, torch.finfo(mask.dtype).min)
        return b.aten("where.ScalarOther", b.aten("any.dim", reads, -1, True), found, 0)

    return summed_up(call, layout, mask, [(query, False), (key, True), (value, True)], lower, reach)


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


class _Causal(nn.Module):
    def __init__(self, band: int = 0) -> None:
        super().__init__()
        self.attention, self.band = nn.MultiheadAttention(4, 2, batch_first=True), band

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, 4): each frame attends to those before it, all of them or a few."""
        ones = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        mask = ones.triu(1) | ones.tril(-self.band) if self.band else ones.triu(1)
        y: torch.Tensor = self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return y


class _Memory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.memory = nn.MultiheadAttention(4, 2, batch_first=True), nn.Parameter(torch.randn(1, 5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, 4): each frame attends to a learned memory."""
        memory = self.memory.expand(x.shape[0], -1, -1)
        y: torch.Tensor = self.attention(x, memory, memory, need_weights=False)[0]
        return y


SAMPLES = [
    Sample("spatial_attention", _Space, (2, 8, 5, 4), 1),
    Sample("attention_to_a_memory", _Memory, (2, 9, 4), 1),
    Sample("causal_attention", _Causal, (2, 9, 4), 1, unbounded=True),
    Sample("banded_attention", lambda: _Causal(3), (2, 9, 4), 1),
]
