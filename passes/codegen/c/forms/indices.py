"""Forms of ops that read entries at places that are computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from .. import views
from ..builder import Builder, NoForm, dim_of, form
from ..expressions import Call, Load, Value
from ..statements import Check
from ..views import View, one

aten = torch.ops.aten


def _taken(b: Builder, x: Value, indices: Mapping[int, Value], name: str, low: bool = False) -> Value:
    """``x[:, i, j]``: entries at places that are computed; `indices` of some dimensions, which broadcast together.

    `low`: they may count from the end.
    """
    for d, index in indices.items():
        _check(b, index, x.shape[d], low)
    source = b.lying(x, name)
    if any(len(source.dims[d]) > 1 for d in indices):
        source = b.put(Value(x.shape, Load(source, x.dtype)), name, range(len(x.shape)))
    told = sorted(indices)
    beside = told[-1] - told[0] == len(told) - 1
    first = told[0] if beside else 0
    common = tuple(torch.broadcast_shapes(*(i.shape for i in indices.values())))  # type: ignore[no-untyped-call]
    rest = [d for d in range(len(x.shape)) if d not in indices]
    before, behind = rest[:first], rest[first:]
    shape = (*(x.shape[d] for d in before), *common, *(x.shape[d] for d in behind))
    terms = []
    for d, index in indices.items():
        size, stride = source.dims[d][0] if source.dims[d] else (1, 0)
        index = b.spread(index, common)
        for _ in behind:
            index = Value((*index.shape, 1), index.expression.through(views.insert(len(index.shape))))
        index = b.spread(index, shape)
        place = index.expression
        if low:
            place = Call(f"{{0}} < 0 ? {{0}} + {size} : {{0}}", (place,), torch.int64, torch.int64)
        terms.append((place, stride))
    dims = [*(source.dims[d] for d in before), *(one(n, 0) for n in common), *(source.dims[d] for d in behind)]
    return Value(shape, Load(View(source.buffer, source.offset, tuple(dims), tuple(terms)), x.dtype))


def _check(b: Builder, index: Value, size: int, low: bool = False) -> None:
    """Let the step end if an index lies outside; of one that is known that is clear before."""
    least = -size if low else 0
    view = index.view
    known = None if view is None or view.buffer is None else view.buffer.tensor
    if known is None or not bool(((known >= least) & (known < size)).all()):
        b.code.add(Check(index, least, size))


def _integers(b: Builder, index: Value, node: fx.Node) -> Value:
    """An index; it is computed before, where that takes work."""
    if index.dtype not in (torch.int64, torch.int32):
        raise NoForm(str(node.target), f"with indices of {index.dtype}")
    index = b.cast(index, torch.int64, node.name)
    return b.simple(index, node.name)


@form(aten.index_select.default)
def _index_select(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.of(given["self"])
    return _taken(b, x, {dim_of(given["dim"], len(x.shape)): _integers(b, b.of(given["index"]), node)}, node.name)


@form(aten.embedding.default)
def _embedding(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    return _taken(b, b.of(given["weight"]), {0: _integers(b, b.of(given["indices"]), node)}, node.name)


@form(aten.index.Tensor, aten._unsafe_index.Tensor)
def _index(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    told = {i: _integers(b, b.of(n), node) for i, n in enumerate(given["indices"]) if n is not None}
    return _taken(b, b.of(given["self"]), told, node.name, low=True)


@form(aten.gather.default)
def _gather(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x, index = b.of(given["self"]), _integers(b, b.of(given["index"]), node)
    if not x.shape:
        return x
    dim = dim_of(given["dim"], len(x.shape))
    _check(b, index, x.shape[dim])
    source = b.lying(x, node.name)
    if len(source.dims[dim]) > 1:
        source = b.put(Value(x.shape, Load(source, x.dtype)), node.name, range(len(x.shape)))
    stride = source.dims[dim][0][1] if source.dims[dim] else 0
    for d, n in enumerate(index.shape):
        source = source if d == dim else views.slice_(d, 0, n)(source)
    dims = [one(n, 0) if d == dim else x for d, (n, x) in enumerate(zip(index.shape, source.dims, strict=True))]
    found = View(source.buffer, source.offset, tuple(dims), ((index.expression, stride),))
    return Value(index.shape, Load(found, x.dtype))
