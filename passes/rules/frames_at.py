"""Frames of a stream that are read at places made of positions: ``x[:, torch.arange(n)[:, None] + torch.arange(k)]``.

The places are evaluated. Where those of frame j lie at a fixed distance from j, at least from some frame on, the result
is a stream; what lies at fixed places of the clip, or at its end, is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..codegen.pairs import FAR, PERIOD, ROWS, Evaluator, frames
from ..layout import Layout
from ..registry import Call, Sample
from ..schedule import Taps
from ..stream_graph import Op, Value, Window, positional, read


def frames_at(call: Call, x: Value, at: Value) -> Value:
    """The frames of `x` at the places `at`, whose dimensions take the place of time's.

    Raises:
        NonLocal: places do not follow the frame that they are for.
    """
    x, at, axis = call.ungroup(x), call.ungroup(at), call.ungroup(x).layout.time
    call.require(positional(at) and at.layout.time == 0, "indices that depend on the data")
    step, parts = x.rate / at.rate, [f for d in at.layout.dims[1:] for f in d]
    call.require(step.denominator == 1 and all(isinstance(f, int) for f in parts), "indices that depend on time")
    width = step.numerator
    begin, far = (_away(call, at, width, block) for block in (range(PERIOD), range(FAR, FAR + ROWS)))
    settled = far[0]
    call.require(bool((far == settled).all()), "chosen frames of the clip are read")
    first, last = int(settled.min()), max(int(settled.max()), int(begin.max()))
    places = begin + torch.arange(PERIOD)[:, None] * width
    inside = (begin >= first) & (places >= 0)
    call.require(bool(inside.all()), "chosen frames of the clip are read")
    others = (begin != settled).any(1).nonzero()
    begins = int(others.max()) + 1 if len(others) else 0
    call.require(begins < PERIOD - ROWS, "chosen frames of the clip are read")
    layout = Layout((*x.layout.dims[:axis], *at.layout.dims, *x.layout.dims[axis + 1 :]))

    def lower(b: Any, op: Op, windows: list[Window], span: range, _: Any) -> Any:
        count = len(span) * len(settled)
        if b.masked and begins:
            index = b.indices(op, span)
            base = b.aten("slice.Tensor", index, 0, 0, 1)
            start = b.aten("add.Scalar", b.aten("mul.Scalar", base, width), first)
            near = b.aten("sub.Tensor", b.aten("reshape.default", windows[1].node, [count]), start)
            near = b.aten("clamp.default", near, 0, (len(span) - 1) * width + last - first)
        else:
            near = torch.arange(len(span))[:, None] * width + settled - first
            near = b.constant(near.flatten().tolist(), torch.int64)
        chosen = b.aten("index_select.default", windows[0].node, axis, near)
        return b.aten("reshape.default", chosen, b.sizes(layout, len(span)))

    return call.emit(
        layout, [read(x, Taps(width, 1, first, last)), read(at)], rate=at.rate, length_of=[at], lower=lower,
        indexed=bool(begins), masked_until=begins,
    )  # fmt: skip


def _away(call: Call, at: Value, step: int, block: range) -> torch.Tensor:
    """How far the places of some frames lie from where their frames lie: frames x places."""
    known = Evaluator(call.constants, call.graph, call.node.meta["val"].device)
    places: torch.Tensor = frames(known, at, block)
    call.require(not places.dtype.is_floating_point, "indices that depend on the data")
    return places.reshape(len(block), -1).cpu() - torch.arange(block.start, block.stop)[:, None] * step


class _Framed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time) -> (batch, time - 4): windows of five samples by a matrix of indices, weighted."""
        at = torch.arange(x.shape[1] - 4)[:, None] + torch.arange(5)
        return (x[:, at] * torch.arange(1.0, 6.0)).sum(-1)


class _Held(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time): each frame less the one two before, the first of all where there is none."""
        return x - x[:, :, (torch.arange(x.shape[2]) - 2).clamp(min=0)]


SAMPLES = [
    Sample("windows_by_indices", _Framed, (2, 14), 1),
    Sample("frames_held_at_the_start", _Held, (2, 3, 9)),
]
