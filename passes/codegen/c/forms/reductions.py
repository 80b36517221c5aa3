"""Forms of ops that join the entries of dimensions."""

from __future__ import annotations

import operator
from math import prod
from typing import Any

import torch
from torch import fx

from .. import views
from ..builder import Builder, NoForm, dim_of, dims_of, form
from ..expressions import Load, Number, Value
from ..operators import base_name, operator_text
from ..statements import Arg, Reduce, Scan

aten = torch.ops.aten


def reduced(b: Builder, x: Value, kind: str, dims: tuple[int, ...], keep: bool, name: str) -> Value:
    kept = tuple(1 if d in dims else n for d, n in enumerate(x.shape))
    order = [d for d in b.order(x) if d not in dims] + list(dims)
    to = b.code.room(x.dtype, kept, order)
    if prod(x.shape) == prod(kept) and kind != "any":
        b.store(Value(kept, x.expression), to, name)
    else:
        b.code.add(Reduce(kind, x, dims, views.expand(x.shape)(to), name))
    shape = kept if keep else tuple(n for d, n in enumerate(kept) if d not in dims)
    return Value(shape, Load(views.reshape(shape)(to), x.dtype))


@form(aten.sum.dim_IntList, aten.sum.default, aten.prod.dim_int, aten.prod.default, aten.amax.default,
      aten.amin.default, aten.any.dim, aten.any.dims, aten.any.default, aten.all.dim, aten.all.dims,
      aten.all.default)  # fmt: skip
def _reduction(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.cast(b.of(given["self"]), node.meta["val"].dtype, node.name)
    dims = dims_of(given.get("dim"), len(x.shape))
    return reduced(b, x, base_name(node.target)[0], dims, given.get("keepdim", False), node.name)


def mean(b: Builder, x: Value, dims: tuple[int, ...], keep: bool, name: str, less: float = 0) -> Value:
    total = reduced(b, x, "sum", dims, keep, name)
    count = prod(x.shape[d] for d in dims) - less
    factor = Value((), Number(1 / count if count else float("nan"), x.dtype))
    return b.call("{0} * {1}", [total, factor], total.shape, x.dtype, x.dtype, name)


@form(aten.mean.dim, aten.mean.default)
def _mean_form(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.cast(b.of(given["self"]), node.meta["val"].dtype, node.name)
    return mean(b, x, dims_of(given.get("dim"), len(x.shape)), given.get("keepdim", False), node.name)


@form(aten.var_mean.correction, aten.var.correction)
def _var(b: Builder, node: fx.Node, given: dict[str, Any]) -> Any:
    x = b.of(given["self"])
    x = b.simple(x, node.name)
    dims = dims_of(given["dim"], len(x.shape))
    middle = b.simple(mean(b, x, dims, True, node.name), node.name)
    apart = b.call("({0} - {1}) * ({0} - {1})", [x, middle], x.shape, x.dtype, x.dtype, node.name)
    correction = 1 if given["correction"] is None else given["correction"]
    var = mean(b, apart, dims, given["keepdim"], node.name, correction)
    if node.target is aten.var.correction:
        return var
    var = b.simple(var, node.name)
    return [var, b.changed(middle, views.reshape(var.shape), var.shape, node.name)]


@form(aten.argmax.default, aten.argmin.default)
def _arg(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.of(given["self"])
    if given["dim"] is None:
        x = b.changed(x, views.reshape([prod(x.shape)]), [prod(x.shape)], node.name)
    dim = dim_of(given["dim"] or 0, len(x.shape))
    return _arg_along(b, x, dim, given["keepdim"], node.target is aten.argmax.default, node.name)[1]


def _arg_along(b: Builder, x: Value, dim: int, keep: bool, greatest: bool, name: str) -> list[Value]:
    """The greatest (or least) entries along a dimension, and where they are."""
    kept = [1 if d == dim else n for d, n in enumerate(x.shape)]
    best, index = (b.code.room(t, kept, range(len(kept))) for t in (x.dtype, torch.int64))
    wide = views.expand(x.shape)
    b.code.add(Arg(x, dim, greatest, wide(index), wide(best), name))
    shape = tuple(kept) if keep else tuple(n for d, n in enumerate(kept) if d != dim)
    return [Value(shape, Load(views.reshape(shape)(v), t)) for v, t in ((best, x.dtype), (index, torch.int64))]


@form(aten.max.dim, aten.min.dim)
def _max_dim(b: Builder, node: fx.Node, given: dict[str, Any]) -> list[Value]:
    x = b.of(given["self"])
    dim, greatest = dim_of(given["dim"], len(x.shape)), node.target is aten.max.dim
    return _arg_along(b, x, dim, given["keepdim"], greatest, node.name)


@form(aten.cumsum.default, aten.cumprod.default)
def _running(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    x = b.cast(b.of(given["self"]), out.dtype, node.name)
    if not x.shape:
        return x
    to = b.code.room(out.dtype, out.shape, range(len(out.shape)))
    text = "{0} + {1}" if node.target is aten.cumsum.default else "{0} * {1}"
    b.code.add(Scan(text, x, dim_of(given["dim"], len(x.shape)), to, node.name))
    return Value(x.shape, Load(to, out.dtype))


@form(aten.cummax.default, aten.cummin.default)
def _running_extremum(b: Builder, node: fx.Node, given: dict[str, Any]) -> list[Value]:
    if any(n.target is operator.getitem and n.args[1] == 1 for n in node.users):
        raise NoForm(str(node.target), "with indices")
    x = b.of(given["self"])
    text = operator_text("maximum" if node.target is aten.cummax.default else "minimum", 2, x.dtype)
    assert text is not None
    to = b.code.room(x.dtype, x.shape, range(len(x.shape)))
    b.code.add(Scan(text, x, dim_of(given["dim"], len(x.shape)), to, node.name))
    return [Value(x.shape, Load(to, x.dtype))]
