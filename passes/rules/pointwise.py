"""Ops that act on each element by itself, with broadcasting."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx, nn

from ..errors import NonLocal
from ..layout import TIME, Dim, Layout, dim
from ..registry import Call, Fact, Head, InClip, Sample, lower_call, note, overloads, rule
from ..stream_graph import Value, read
from .cumulative import held

aten = torch.ops.aten


def broadcast(call: Call) -> tuple[list[fx.Node], list[Value], Layout]:
    """Bring all tensor arguments onto one layout.

    Returns:
        the traced arguments that are streams, their values (static tensors that lie along time become tables), and
        the layout of the result.
    """
    tensors = [n for n in call.node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    streams = {n: call.facts[n] for n in tensors if isinstance(call.facts[n], Value)}
    for n in tensors:
        fact = call.facts[n]
        if isinstance(fact, Head) and fact.count == fact.times == 1:  # the first frame beside all others
            streams[n] = held(call, fact.of)
        elif isinstance(fact, InClip):
            raise NonLocal(fact.reason)
    if len({(len(v.layout) - v.layout.time, v.layout[v.layout.time], v.lengths) for v in streams.values()}) > 1:
        streams = {n: v if v.layout.clean else call.ungroup(v) for n, v in streams.items()}
    rank = max(len(n.meta["val"].shape) for n in tensors)
    axes = {rank - len(v.layout) + v.layout.time for v in streams.values()}
    call.require(len(axes) == 1, "time lies in different dimensions of its arguments")
    axis = axes.pop()
    first = next(iter(streams.values()))
    for n in tensors:
        at = axis - (rank - len(n.meta["val"].shape))
        if n not in streams and at >= 0 and n.meta["val"].shape[at] != 1:
            call.require(first.layout.clean, "a table along a folded time axis")
            streams[n] = call.as_table(n, at, first)
    layouts = [streams[n].layout if n in streams else call.static_layout(n) for n in tensors]
    dims: list[Dim] = []
    for i in range(rank):
        present = [d for lay in layouts if (k := i - (rank - len(lay))) >= 0 and (d := lay[k])]
        with_time = [d for d in present if TIME in d]
        call.require(len(set(with_time)) <= 1, "time is folded differently in its arguments")
        dims.append((with_time or present or [()])[0])
    return list(streams), list(streams.values()), Layout(tuple(dims))


def pointwise(call: Call) -> Fact:
    """The rule of every op that torch tags as pointwise."""
    heads = {n: f for n in call.node.all_input_nodes if isinstance(f := call.facts[n], InClip)}
    if heads and not call.streams:  # of first frames: those of what the op makes of all frames
        head = next(iter(heads.values()))
        if len(heads) > 1 or not isinstance(head, Head) or head.count != 1:
            raise NonLocal(head.reason)
        value = pointwise(dataclasses.replace(call, facts={**call.facts, **dict.fromkeys(heads, head.of)}))
        call.require(isinstance(value, Value), head.reason)
        return dataclasses.replace(head, of=value)
    nodes, values, layout = broadcast(call)
    for name, arg in call.samples[0].items():
        if not isinstance(arg, (fx.Node, list, tuple)):
            call.arg(name)
    call.require(len({v.rate for v in values}) == 1, "its arguments have different frame rates")
    call.require(len({v.lengths for v in values}) == 1, "its arguments have different lengths in time")
    several = isinstance(call.node.meta["val"], (list, tuple))
    values_made = call.emit_several(
        [layout] * len(call.node.meta["val"]) if several else [layout],
        [read(v) for v in values],
        several=several,
        lower=lower_call,
        length_of=[values[0]],
        nodes=nodes,
    )
    return values_made if several else values_made[0]


@rule(*overloads("broadcast_tensors.default"))
def broadcast_tensors(call: Call) -> Fact:
    """All of them with the same shape."""
    nodes, values, layout = broadcast(call)
    call.require(len({(v.rate, v.lengths) for v in values}) == 1, "its arguments have different lengths in time")
    several = len(call.node.meta["val"])
    return call.emit_several(
        [layout] * several, [read(v) for v in values], lower=lower_call, length_of=[values[0]], nodes=nodes
    )


# pointwise in what they do, but not tagged so
rule(
    *overloads(
        "copy.default clone.default to.dtype to.device to.dtype_layout to.other type_as.default _to_copy.default "
        "where.self where.ScalarSelf where.ScalarOther masked_fill.Scalar masked_fill.Tensor "
        "rrelu.default selu.default "
        "softplus.default relu6.default hardswish.default hardsigmoid.default mish.default silu.default celu.default "
        "log_sigmoid.default softshrink.default hardshrink.default threshold.default leaky_relu.default "
        "elu.default gelu.default hardtanh.default lerp.Scalar lerp.Tensor addcmul.default addcdiv.default "
        "clamp.default clamp.Tensor clamp_min.default clamp_max.default clip.default nan_to_num.default "
        "true_divide.Tensor floor_divide.default floor_divide.Scalar remainder.Tensor fmod.Tensor "
        "logaddexp.default square.default isnan.default isinf.default isfinite.default positive.default "
        "rsub.Scalar rsub.Tensor float_power.Tensor_Scalar heaviside.default polar.default complex.default "
        "fake_quantize_per_tensor_affine.default gt.Tensor rrelu_with_noise_functional.default "
        "bernoulli.p "
        "divide.Tensor divide.Scalar multiply.Tensor subtract.Tensor subtract.Scalar greater.Tensor less.Tensor"
    )
)(pointwise)


@rule(*overloads("prelu.default _prelu_kernel.default"))
def prelu(call: Call) -> Fact:
    """A slope for each channel (dimension 1)."""
    x = call.stream("self")
    call.require(x.layout.time != 1 or call.samples[0]["weight"].meta["val"].numel() == 1, "a slope for each frame")
    return call.framewise(x.layout)


@rule(aten.glu.default)
def glu(call: Call) -> Fact:
    """Halves one dimension, each half gating the other."""
    x = call.stream("self")
    axis = call.arg("dim", -1) % len(x.layout)
    call.require(axis != x.layout.time, "glu splits the time axis")
    return call.framewise(x.layout.replace(axis, dim(call.out_sizes[axis][0])))


@rule(*overloads("softmax.int _softmax.default log_softmax.int _log_softmax.default"))
def softmax(call: Call) -> Fact:
    """Normalises one dimension."""
    x = call.stream("self")
    call.require(call.arg("dim") % len(x.layout) != x.layout.time, "softmax over the time axis")
    return call.framewise(x.layout)


note(aten.rrelu.default, draws_in_training=True)
note(aten.to.dtype, aten.type_as.default, aten._weight_norm.default, stays=True)
note(
    *overloads(
        "alias.default contiguous.default detach.default detach_.default lift_fresh_copy.default lift_fresh.default "
        "dropout.default dropout_.default feature_dropout.default alpha_dropout.default feature_alpha_dropout.default "
        "conj_physical.default resolve_conj.default resolve_neg.default"
    ),
    hands_on=True,
)


class _Quantizer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time) to the nearest codes, found with batch and time in one dimension."""
        flat = x.transpose(1, 2).reshape(-1, 3)
        far = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ self.codes.t() + self.codes.pow(2).sum(1)
        nearest = torch.embedding(self.codes, far.argmin(1)).view(x.shape[0], -1, 3).transpose(1, 2)
        return torch.stack(torch.broadcast_tensors(nearest, x[:, :1])).sum(0)  # type: ignore[no-untyped-call]


class _Baseline(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time), relative to its first frame, over the first frame of a filter."""
        late: torch.Tensor = x[:, :, 2:] - 0.5 * x[:, :, :-2]
        return (x - x[:, :, :1])[:, :, 2:] * late / (1 + late[:, :, :1].abs())


SAMPLES = [
    Sample("relative_to_the_first_frame", _Baseline, (2, 3, 9), unbounded=True),
    Sample("quantizer", _Quantizer, (2, 3, 9)),
    Sample("activations", lambda: nn.Sequential(nn.GELU(), nn.PReLU(4), nn.Softmax(1), nn.GLU(1)), (2, 4, 9)),
]
