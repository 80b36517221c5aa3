"""Ops that join several tensors: cat and stack."""

from __future__ import annotations

import torch
from torch import fx, nn

from ..layout import Dim, dim
from ..registry import Call, Fact, Sample, overloads, rule
from ..stream_graph import Constant, Value, read

aten = torch.ops.aten


@rule(*overloads("cat.default concat.default concatenate.default stack.default hstack.default vstack.default"))
def cat(call: Call) -> Fact:
    """Tensors side by side along one dimension (stack: a new one)."""
    name = call.node.target._schema.name  # type: ignore[union-attr]
    call.require(name in ("aten::cat", "aten::concat", "aten::concatenate", "aten::stack"), f"{name} is not supported")
    nodes: list[fx.Node] = list(call.samples[0]["tensors"])
    given = [call.facts[n] for n in nodes]
    first = next(f for f in given if isinstance(f, Value))
    rank = len(first.layout)
    stack = name == "aten::stack"
    axis = call.arg("dim", 0) % (rank + stack)
    time = first.layout.time
    if not stack and axis == time:
        return _cat_in_time(call, nodes)
    values: dict[fx.Node, Value] = {}
    streams = [f for f in given if isinstance(f, Value)]
    tidy = len({f.layout[f.layout.time] for f in streams}) > 1 or len(streams) < len(nodes)
    for n, f in zip(nodes, given, strict=True):
        if isinstance(f, Value):
            values[n] = call.ungroup(f) if tidy else f
        elif n.meta["val"].dim() == rank:
            values[n] = call.as_table(n, time, call.ungroup(first))
    call.require(len(values) == len(set(nodes)), "its arguments differ in rank")
    reads = list(values)
    ordered = [values[n] for n in nodes]
    call.require(len({v.layout.time for v in ordered}) == 1, "time lies in different dimensions of its arguments")
    call.require(len({v.rate for v in ordered}) == 1, "its arguments have different frame rates")
    call.require(len({v.lengths for v in ordered}) == 1, "its arguments have different lengths in time")
    layout = ordered[0].layout
    layout = layout.insert(axis, dim(len(nodes))) if stack else layout.replace(axis, _sum([v.layout[axis] for v in ordered], call))
    where = [reads.index(n) for n in nodes]
    return call.emit(
        layout,
        [read(values[n]) for n in reads],
        length_of=[ordered[0]],
        nodes=reads,
        lower=lambda b, op, windows, span, _: b.aten(
            "stack.default" if stack else "cat.default", [windows[i].node for i in where], axis
        ),
    )


def _sum(dims: list[Dim], call: Call) -> Dim:
    """The size of dimensions put side by side."""
    total = 0
    for d in dims:
        call.require(all(isinstance(f, int) for f in d), "dimensions that hold the batch are joined")
        size = 1
        for f in d:
            size *= int(f)  # type: ignore[arg-type]
        total += size
    return dim(total)


def _cat_in_time(call: Call, nodes: list[fx.Node]) -> Fact:
    """Static frames before or after a stream: padding, if all of them are the same number."""
    streams = [n for n in nodes if isinstance(call.facts[n], Value)]
    call.require(len(streams) == 1, "streams are joined one after the other")
    x = call.ungroup(call.facts[streams[0]])
    at = nodes.index(streams[0])
    fills = {call.constant_of(n) for n in nodes if n is not streams[0]}
    call.require(len(fills) == 1 and None not in fills, "other frames than a constant are put before or after a stream")
    sizes = [n.meta["val"].shape[x.layout.time] for n in nodes]
    left, right = sum(sizes[:at]), sum(sizes[at + 1 :])
    return call.view(x, -left, lambda frames: frames + left + right, Constant(float(fills.pop() or 0.0)))


SAMPLES = [Sample("stack_and_cat", lambda: _Joined(), (2, 3, 9))]


class _Joined(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time) -> (batch, 2, 2*channels, time)."""
        y = torch.cat([x, x.sigmoid()], 1)
        return torch.stack([y, -y], 1)
