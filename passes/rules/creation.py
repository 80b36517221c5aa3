"""Tensors made from nothing but sizes: positions, zeros, tables that follow the clip's length."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layout import TIME, Layout, from_sizes
from ..registry import Call, Fact, Sample, overloads, rule
from .shape import along_time

aten = torch.ops.aten


@rule(*overloads("arange.default arange.start arange.start_step"))
def arange(call: Call) -> Fact:
    """Positions: frame j is ``start + j*step``."""
    starts = {s.get("start", 0) for s in call.samples}
    call.require(len(starts) == 1, "where the positions begin depends on the clip's length")
    start, step = starts.pop(), call.arg("step", 1)
    like, length = call.length_like(call.out_sizes[0])
    dtype = call.dtype()

    def lower(b: Any, op: Any, windows: Any, span: range, _: Any) -> Any:
        at = b.indices(op, span)
        if step != 1:
            at = b.aten("mul.Tensor", at, step)
        if start != 0:
            at = b.aten("add.Tensor", at, start)
        return b.cast(at, dtype)

    return call.emit(Layout(((TIME,),)), [], rate=like.rate, length_of=[like], length=length, lower=lower, indexed=True)


@rule(aten.full.default)
def full(call: Call) -> Fact:
    """The same number everywhere: every frame is alike."""
    sizes = call.out_sizes
    along = [i for i, s in enumerate(sizes) if not _static(s, call.graph.batch)]
    call.require(len(along) == 1, "a tensor with two time axes")
    axis = along[0]
    like, length, place = along_time(call, sizes[axis])
    dims = [place if i == axis else from_sizes([s], call.graph.batch)[0] for i, s in enumerate(sizes)]
    layout = Layout(tuple(dims))
    number = call.arg("fill_value")
    dtype = call.dtype()
    return call.emit(
        layout,
        [],
        rate=like.rate,
        length_of=[like],
        length=length,
        lower=lambda b, op, windows, span, _: b.full(b.sizes(layout, len(span)), number, dtype),
    )


def _static(sizes: tuple[int, ...], batch: tuple[int, ...]) -> bool:
    try:
        from_sizes([sizes], batch)
    except Exception:  # Unshapeable
        return False
    return True


class _Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(400, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, channels) plus a table of positions and a ramp."""
        n = x.shape[1]
        return x + self.table[:n] + torch.arange(n)[:, None] * 0.1 + x.new_zeros(x.shape[0], n, 1)


SAMPLES = [Sample("positions", _Positions, (2, 9, 3), 1)]
