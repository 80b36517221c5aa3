"""Forms of pools."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ....canonicalize import listed
from .. import views
from ..builder import Builder, NoForm, form
from ..expressions import Load, Number, Value
from ..operators import FLOATS
from ..views import contiguous
from .moves import padded
from .reductions import mean, reduced

aten = torch.ops.aten


def _windows(
    b: Builder, x: Value, n: int, given: dict[str, Any], outs: Sequence[int], fill: float | int, name: str
) -> Value:
    """The windows of a pool: their places, then what is within, as further dimensions."""
    kernel = listed(given["kernel_size"], n)
    stride = listed(given["stride"], n) if given.get("stride") else kernel
    padding, dilation = listed(given["padding"], n), listed(given.get("dilation", 1), n)
    rank = len(x.shape)
    reach = [(outs[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 for i in range(n)]
    sides = [(padding[i], max(0, reach[i] - padding[i] - x.shape[rank - n + i])) for i in range(n)]
    if any(map(any, sides)):
        x = padded(b, x, sides, fill, name)
    x = b.simple(x, name)
    for i in range(n):
        d = rank - n + i
        x = b.part(x, d, 0, reach[i], 1, name)
        shape = (*x.shape[:d], outs[i], *x.shape[d + 1 :], kernel[i])
        x = b.changed(x, views.windows(d, kernel[i], stride[i], dilation[i]), shape, name)
    return x


@form(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
def _max_pool(b: Builder, node: fx.Node, given: dict[str, Any]) -> list[Value]:
    if any(n.target is operator.getitem and n.args[1] == 1 for n in node.users):
        raise NoForm(str(node.target), "with indices")
    n = 2 if node.target is aten.max_pool2d_with_indices.default else 3
    x, outs = b.of(given["self"]), node.meta["val"][0].shape[-n:]
    fill = float("-inf") if x.dtype in FLOATS else torch.iinfo(x.dtype).min
    x = _windows(b, x, n, given, outs, fill, node.name)
    rank = len(x.shape) - n
    return [reduced(b, x, "amax", tuple(range(rank, rank + n)), False, node.name)]


@form(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def _avg_pool(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    n = 1 + [aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default].index(node.target)  # type: ignore[arg-type]
    out, source = node.meta["val"], b.of(given["self"])
    outs = out.shape[-n:]
    x = _windows(b, source, n, given, outs, 0, node.name)
    rank = len(x.shape) - n
    total = reduced(b, x, "sum", tuple(range(rank, rank + n)), False, node.name)
    kernel = listed(given["kernel_size"], n)
    stride = listed(given["stride"], n) if given.get("stride") else kernel
    padding = listed(given["padding"], n)
    sizes = source.shape[-n:]
    if given.get("divisor_override"):
        counts = torch.full(outs, 1 / given["divisor_override"], dtype=torch.float64)
    else:
        counts = torch.ones(outs, dtype=torch.float64)
        for i in range(n):
            inside = []
            for j in range(outs[i]):
                first = j * stride[i] - padding[i]
                last = min(first + kernel[i], sizes[i] + padding[i])
                if not given.get("count_include_pad", True):
                    first, last = max(first, 0), min(last, sizes[i])
                inside.append(1 / (last - first))
            counts = counts * torch.tensor(inside, dtype=torch.float64).reshape([-1 if d == i else 1 for d in range(n)])
    if (counts == counts.flatten()[0]).all():
        factor = Value((), Number(float(counts.flatten()[0]), out.dtype))
    else:
        held = b.code.kernels.constant(counts.to(out.dtype))
        factor = Value(tuple(outs), Load(contiguous(held, outs), out.dtype))
    return b.call("{0} * {1}", [total, factor], out.shape, out.dtype, out.dtype, node.name)


@form(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default, aten.adaptive_max_pool2d.default,
      aten.adaptive_max_pool3d.default)  # fmt: skip
def _adaptive(b: Builder, node: fx.Node, given: dict[str, Any]) -> Any:
    greatest = "max" in str(node.target)
    x, n = b.of(given["self"]), len(given["output_size"])
    for i, out in enumerate(given["output_size"]):
        d = len(x.shape) - n + i
        size = x.shape[d]
        parts = []
        x = b.simple(x, node.name)
        for j in range(out):
            first, last = j * size // out, -(-(j + 1) * size // out)
            part = b.part(x, d, first, last - first, 1, node.name)
            parts.append(
                reduced(b, part, "amax", (d,), True, node.name) if greatest else mean(b, part, (d,), True, node.name)
            )
        shape = (*x.shape[:d], out, *x.shape[d + 1 :])
        to = b.code.room(x.dtype, shape, range(len(shape)))
        for j, part in enumerate(parts):
            b.store(part, views.slice_(d, j, 1)(to), node.name)
        x = Value(shape, Load(to, x.dtype))
    return [x] if greatest else x
