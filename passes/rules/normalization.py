"""Normalisations: framewise if their statistics do not run over time."""

from __future__ import annotations

import torch
from torch import nn

from ..registry import Call, Fact, Sample, overloads, rule

aten = torch.ops.aten


@rule(
    *overloads(
        "batch_norm.default _native_batch_norm_legit_no_training.default native_batch_norm.default "
        "cudnn_batch_norm.default"
    )
)
def batch_norm(call: Call) -> Fact:
    """With running statistics an affine map of each channel."""
    x = call.stream("input")
    training = call.arg("training", False)
    call.require(not training, "batch norm without running statistics runs over time")
    call.require(x.layout.time != 1, "time lies in the channels")
    several = isinstance(call.node.meta["val"], (list, tuple))
    if not several:
        return call.framewise(x.layout)
    call.require(all(u.args[1] == 0 for u in call.node.users), "the statistics of a batch norm are read")
    return call.framewise([x.layout])


@rule(*overloads("layer_norm.default rms_norm.default native_layer_norm.default _fused_rms_norm.default"))
def layer_norm(call: Call) -> Fact:
    """Statistics over the last dimensions."""
    x = call.stream("input")
    over = call.sampled("normalized_shape")[0]
    call.require(x.layout.time < len(x.layout) - len(over), "a norm whose statistics run over time")
    several = isinstance(call.node.meta["val"], (list, tuple))
    return call.framewise([x.layout]) if several else call.framewise(x.layout)


@rule(*overloads("group_norm.default native_group_norm.default"))
def group_norm(call: Call) -> Fact:
    """Statistics over groups of channels and all that follows: only what is folded into the batch is by itself."""
    x = call.stream("input")
    call.require(x.layout.time == 0, "a norm whose statistics run over time")
    return call.framewise(x.layout)


@rule(aten.instance_norm.default)
def instance_norm(call: Call) -> Fact:
    """Statistics of each channel over all that follows, unless running ones are used."""
    x = call.stream("input")
    call.require(x.layout.time == 0 or not call.arg("use_input_stats"), "a norm whose statistics run over time")
    call.require(x.layout.time != 1, "time lies in the channels")
    return call.framewise(x.layout)


SAMPLES = [
    Sample("batch_norm", lambda: nn.BatchNorm1d(3).eval(), (2, 3, 9)),
    Sample("layer_norm", lambda: nn.LayerNorm(3), (2, 9, 3), 1),
    Sample("instance_norm", lambda: nn.InstanceNorm1d(3, track_running_stats=True).eval(), (2, 3, 9)),
]
