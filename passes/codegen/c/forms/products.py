"""Forms of matrix products and convolutions."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from ....canonicalize import listed
from .. import views
from ..builder import Builder, NoForm, form
from ..expressions import Load, Number, Value
from ..products import Product
from ..views import NoView, View
from .moves import padded

aten = torch.ops.aten


def _product(b: Builder, x: View, w: View, shape: tuple[list[int], list[int], list[int]], p: Product) -> View:
    """The sums, `b`, `m` and `n` as dimensions in this order, whose sizes are `shape`."""
    bs, ms, ns = shape
    sizes = [*bs, *ms, *ns]
    room = b.code.room(p.dtype, max(1, prod(sizes)))
    tensor = None if w.buffer is None else w.buffer.tensor
    inner = prod(ns) < 4 and prod(bs) > 1 and tensor is not None
    places = range(len(bs)), range(len(bs), len(bs) + len(ms)), range(len(bs) + len(ms), len(sizes))
    order = [*places[1], *places[2], *places[0]] if inner else [*places[0], *places[1], *places[2]]
    lanes = b.code.kernels.target.lanes(p.dtype)
    if tensor is not None and prod(bs) >= lanes and prod(ns) < lanes:
        order = [*places[1], *places[2], *places[0]]
    out = views.ordered(room, sizes, order)
    dims = ([out.dims[d] for d in places[0]], [out.dims[d] for d in places[1]], [out.dims[d] for d in places[2]])
    b.code.lines += b.code.kernels.call(p, out, dims)
    b.code.loops += 1
    return out


def _matrices(b: Builder, node: fx.Node, x: Value, w: Value) -> Value:
    """``(b, m, k) x (b, k, n)``."""
    dtype = node.meta["val"].dtype
    many, rows, deep = x.shape
    columns = w.shape[2]
    if not many * rows * deep * columns:
        return Value((many, rows, columns), Number(0, dtype))
    one_, two = b.lying(x, node.name), b.lying(w, node.name)

    def constant(v: View) -> bool:
        return v.buffer is not None and v.buffer.tensor is not None

    def beside(v: View, d: int) -> bool:
        return bool(v.dims[d]) and v.dims[d][-1][1] == 1

    turned = (constant(one_) and not constant(two)) or (not constant(two) and not beside(two, 2) and beside(one_, 1))
    for _ in range(2):
        try:
            if turned:
                p = Product(two, one_, [(two.dims[0], one_.dims[0])], [two.dims[2]], [one_.dims[1]],
                            [(two.dims[1], one_.dims[2])], dtype, node.name)  # fmt: skip
                out = _product(b, two, one_, ([many], [columns], [rows]), p)
                change = views.permute([0, 2, 1])
            else:
                p = Product(one_, two, [(one_.dims[0], two.dims[0])], [one_.dims[1]], [two.dims[2]],
                            [(one_.dims[2], two.dims[1])], dtype, node.name)  # fmt: skip
                out = _product(b, one_, two, ([many], [rows], [columns]), p)
                change = views.permute([0, 1, 2])
            return Value((many, rows, columns), Load(change(out), dtype))
        except NoView:
            if not constant(one_):
                one_ = b.put(Value(x.shape, Load(one_, dtype)), node.name, range(3))
            if not constant(two):
                two = b.put(Value(w.shape, Load(two, dtype)), node.name, range(3))
    raise NoForm(str(node.target))


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
    return b.call("{0} + {1}", [found, start], out.shape, out.dtype, out.dtype, node.name)


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
    split = (groups, out.shape[1] // groups, *weight.shape[1:])
    weight = Value(weight.shape, Load(b.lying(weight, node.name), weight.dtype))
    w = b.lying(b.changed(weight, views.reshape(split), split, node.name), node.name)
    spatial = list(range(3, 3 + n))
    p = Product(
        taken, w,
        [(taken.dims[1], w.dims[0])],
        [taken.dims[0], *(taken.dims[d] for d in spatial)],
        [w.dims[1]],
        [(taken.dims[2], w.dims[2]), *((taken.dims[3 + n + i], w.dims[3 + i]) for i in range(n))],
        out.dtype, node.name,
    )  # fmt: skip
    made = _product(b, taken, w, ([groups], [batch, *out.shape[2:]], [out.shape[1] // groups]), p)
    order = [1, 0, 2 + n, *range(2, 2 + n)]  # batch, groups, channels, positions
    found = Value(tuple(made.shape[d] for d in order), Load(views.permute(order)(made), out.dtype))
    found = b.changed(found, views.reshape(out.shape), out.shape, node.name)
    if given["bias"] is None:
        return found
    column = [out.shape[1], *[1] * n]
    bias = b.changed(b.of(given["bias"]), views.reshape(column), column, node.name)
    return b.call("{0} + {1}", [found, bias], out.shape, out.dtype, out.dtype, node.name)


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
    to = b.put(Value(tuple(whole), Number(0, x.dtype)), node.name)
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
