"""Forms of matrix products and convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ....canonicalize import listed
from .. import views
from ..builder import Builder, NoForm, form
from ..expressions import Dot, Load, Number, Value
from ..products import natural
from ..views import Dim, NoView, View, one, refine, split
from .moves import padded

aten = torch.ops.aten


def _matrices(b: Builder, node: fx.Node, x: Value, w: Value) -> Value:
    """``(b, m, k) x (b, k, n)``."""
    dtype = node.meta["val"].dtype
    many, rows, deep = x.shape
    columns = w.shape[2]
    if not many * rows * deep * columns:
        return Value((many, rows, columns), Number(0, dtype))
    one_, two = b.lying(x, node.name), b.lying(w, node.name)

    def beside(v: View, d: int) -> bool:
        return bool(v.dims[d]) and v.dims[d][-1][1] == 1

    turned = (one_.constant and not two.constant) or (not two.constant and not beside(two, 2) and beside(one_, 1))
    shape = (many, rows, columns)
    for _ in range(2):
        try:
            k = paired(one_.dims[2], two.dims[1])
            first = View(one_.buffer, one_.offset, (one_.dims[0], one_.dims[1], one(columns, 0)))
            second = View(two.buffer, two.offset, (two.dims[0], one(rows, 0), two.dims[2]))
            if turned:
                first, second, k = second, first, tuple((n, (t, s)) for n, (s, t) in k)
            dot = Dot(((first, second),), k, dtype, node.name)
            natural(dot, shape, b.code.kernels.target)
            return Value(shape, dot)
        except NoView:
            if not one_.constant:
                one_ = b.put(Value(x.shape, Load(one_, dtype)), node.name, range(3))
            if not two.constant:
                two = b.put(Value(w.shape, Load(two, dtype)), node.name, range(3))
    raise NoForm(str(node.target))


def paired(one_: Dim, other: Dim) -> tuple[tuple[int, tuple[int, int]], ...]:
    """A dimension of two operands as factors that both have.

    Raises:
        NoView: there are none.
    """
    sizes = refine([d for d in (one_, other) if d] or [()])
    strides = zip(*(split(d, sizes) if d else [0] * len(sizes) for d in (one_, other)), strict=True)
    return tuple((n, s) for n, s in zip(sizes, strides, strict=True) if n > 1)


def _raised(b: Builder, x: Value) -> Value:
    return Value((1, *x.shape), x.expression.through(views.insert(0)))


def _first(x: Value) -> Value:
    return Value(x.shape[1:], x.expression.through(views.select(0, 0)))


@form(aten.mm.default)
def _mm(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    return _first(_matrices(b, node, _raised(b, b.of(given["self"])), _raised(b, b.of(given["mat2"]))))


@form(aten.bmm.default)
def _bmm(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    return _matrices(b, node, b.of(given["self"]), b.of(given["mat2"]))


@form(aten.addmm.default)
def _addmm(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    found = _first(_matrices(b, node, _raised(b, b.of(given["mat1"])), _raised(b, b.of(given["mat2"]))))
    start = b.of(given["self"])
    for name, x in (("alpha", found), ("beta", start)):
        if given[name] != 1:
            scaled = b.call("{0} * {1}", [x, b.of(given[name], out.dtype)], x.shape, out.dtype, out.dtype, node.name)
            found, start = (scaled, start) if name == "alpha" else (found, scaled)
    return b.sum(found, b.spread(start, out.shape), out.shape, out.dtype, node.name)


@form(aten.convolution.default)
def _convolution(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    x, weight, groups = b.of(given["input"]), b.of(given["weight"]), given["groups"]
    n = len(out.shape) - 2
    stride, padding, dilation = (listed(given[name], n) for name in ("stride", "padding", "dilation"))
    if given["transposed"]:
        x, weight, stride, padding = _transposed(b, node, x, weight, stride, padding, dilation, given)
    if any(padding):
        x = padded(b, x, [(p, p) for p in padding], 0, node.name)
    x = Value(x.shape, Load(b.lying(x, node.name), x.dtype))
    kernel, batch, channels = weight.shape[2:], x.shape[0], x.shape[1]
    shape = (batch, groups, channels // groups, *x.shape[2:])
    x = b.changed(x, views.reshape(shape), shape, node.name)
    for i in range(n):
        shape = (*shape[: 3 + i], out.shape[2 + i], *shape[4 + i :], kernel[i])
        size = dilation[i] * (kernel[i] - 1) + stride[i] * (out.shape[2 + i] - 1) + 1
        x = b.part(x, 3 + i, 0, size, 1, node.name)
        x = b.changed(x, views.windows(3 + i, kernel[i], stride[i], dilation[i]), shape, node.name)
    taken = b.lying(x, node.name)
    split_ = (groups, out.shape[1] // groups, *weight.shape[1:])
    weight = Value(weight.shape, Load(b.lying(weight, node.name), weight.dtype))
    w = b.lying(b.changed(weight, views.reshape(split_), split_, node.name), node.name)
    k = paired(taken.dims[2], w.dims[2])
    for i in range(n):
        k += paired(taken.dims[3 + n + i], w.dims[3 + i])
    each, spatial = out.shape[1] // groups, out.shape[2:]
    made = (batch, groups, each, *spatial)
    first = View(taken.buffer, taken.offset, (*taken.dims[:2], one(each, 0), *taken.dims[3 : 3 + n]))
    second = View(w.buffer, w.offset, (one(batch, 0), *w.dims[:2], *(one(size, 0) for size in spatial)))
    found = Value(made, Dot(((first, second),), k, out.dtype, node.name))
    found = b.changed(found, views.reshape(out.shape), out.shape, node.name)
    if given["bias"] is None:
        return found
    column = [out.shape[1], *[1] * n]
    bias = b.changed(b.of(given["bias"]), views.reshape(column), column, node.name)
    return b.sum(found, b.spread(bias, out.shape), out.shape, out.dtype, node.name)


def _transposed(
    b: Builder, node: fx.Node, x: Value, weight: Value, stride: list[int], padding: list[int], dilation: list[int],
    given: dict[str, Any],
) -> tuple[Value, Value, list[int], list[int]]:  # fmt: skip
    """A transposed convolution as one with gaps between the entries of its input and a turned kernel."""
    n, groups = len(stride), given["groups"]
    kernel, more = weight.shape[2:], listed(given["output_padding"], n)
    apart = list(x.shape)
    for i in range(n):
        apart[2 + i] = (x.shape[2 + i] - 1) * stride[i] + 1
    sides = [
        (dilation[i] * (kernel[i] - 1) - padding[i], dilation[i] * (kernel[i] - 1) - padding[i] + more[i])
        for i in range(n)
    ]
    whole = [*x.shape[:2], *(apart[2 + i] + max(sides[i][0], 0) + max(sides[i][1], 0) for i in range(n))]
    to = b.code.room(x.dtype, whole, b.order(x), zeros=True)
    place = to
    for i in range(n):
        place = views.slice_(2 + i, max(sides[i][0], 0), x.shape[2 + i], stride[i])(place)
    b.store(x, place, node.name)
    found = Value(tuple(whole), Load(to, x.dtype))
    for i in range(n):
        first, last = (max(-s, 0) for s in sides[i])
        found = b.part(found, 2 + i, first, whole[2 + i] - first - last, 1, node.name)
    size = (groups, weight.shape[0] // groups, *weight.shape[1:])
    weight = b.changed(weight, views.reshape(size), size, node.name)
    order = [0, 2, 1, *range(3, 3 + n)]
    weight = b.changed(weight, views.permute(order), [size[d] for d in order], node.name)
    for i in range(n):
        weight = b.changed(weight, views.flip(3 + i), weight.shape, node.name)
    joined = (size[0] * size[2], size[1], *kernel)
    return found, b.changed(weight, views.reshape(joined), joined, node.name), [1] * n, [0] * n
