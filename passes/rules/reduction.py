"""Sums, means, extrema and the like over dimensions: framewise where time is not one of them."""

from __future__ import annotations

import torch
from torch import nn

from ..layout import Layout
from ..registry import Call, Fact, Sample, overloads, rule

aten = torch.ops.aten


@rule(
    *overloads(
        "sum.dim_IntList mean.dim amax.default amin.default var.dim var.correction std.dim std.correction "
        "prod.dim_int logsumexp.default linalg_vector_norm.default norm.ScalarOpt_dim norm.ScalarOpt_dim_dtype "
        "any.dim all.dim any.dims all.dims argmax.default argmin.default nansum.default nanmean.default "
        "max.dim min.dim median.dim mode.default count_nonzero.dim_IntList aminmax.default frobenius_norm.dim "
        "std_mean.correction var_mean.correction kthvalue.default"
    )
)
def reduction(call: Call) -> Fact:
    """Some dimensions made one (kept with size 1, or dropped)."""
    x = call.stream("self")
    rank = len(x.layout)
    given = call.arg("dim")
    dims = range(rank) if given is None or given == [] else [given] if isinstance(given, int) else given
    over = {d % rank for d in dims}
    call.require(x.layout.time not in over, "a reduction over the time axis")
    keep = bool(call.arg("keepdim", False))
    layout = Layout(tuple(() if i in over else d for i, d in enumerate(x.layout) if keep or i not in over))
    several = isinstance(call.node.meta["val"], (list, tuple))
    return call.framewise([layout] * len(call.node.meta["val"]) if several else layout)


SAMPLES = [Sample("spatial_mean", lambda: _Mean(), (2, 3, 9, 4))]


class _Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time, space) -> (batch, channels, time): mean plus largest over space."""
        return x.mean(-1) + x.max(3).values
