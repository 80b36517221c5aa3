"""Forms of ops that move entries: views, and what joins tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from .. import views
from ..builder import Builder, NoForm, dim_of, form
from ..expressions import Load, Number, Value
from ..views import Margin, NoView

aten = torch.ops.aten


@form(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.squeeze.default, aten.squeeze.dim,
      aten.squeeze.dims, aten.unsqueeze.default, aten.alias.default, aten.clone.default, aten.detach.default,
      aten.lift_fresh_copy.default, aten.view_copy.default)  # fmt: skip
def _reshape(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x, shape = b.of(given["self"]), tuple(node.meta["val"].shape)
    return x if x.shape == shape else b.changed(x, views.reshape(shape), shape, node.name)


@form(aten.as_strided.default)
def _as_strided(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    source, out = given["self"].meta["val"], node.meta["val"]
    if not (source.is_contiguous() and out.is_contiguous() and source.numel() == out.numel()):
        raise NoForm(str(node.target))
    found: Value = _reshape(b, node, given)
    return found


@form(aten.permute.default)
def _permute(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.of(given["self"])
    order = [d % len(x.shape) for d in given["dims"]]
    return b.changed(x, views.permute(order), [x.shape[d] for d in order], node.name)


@form(aten.transpose.int)
def _transpose(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.of(given["self"])
    rank = len(x.shape)
    order = list(range(rank))
    i, j = given["dim0"] % rank, given["dim1"] % rank
    order[i], order[j] = j, i
    return b.changed(x, views.permute(order), [x.shape[d] for d in order], node.name)


@form(aten.t.default)
def _t(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.of(given["self"])
    order = list(range(len(x.shape)))[::-1]
    return b.changed(x, views.permute(order), x.shape[::-1], node.name)


@form(aten.expand.default)
def _expand(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    return b.spread(b.of(given["self"]), node.meta["val"].shape)


@form(aten.slice.Tensor)
def _slice(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.of(given["self"])
    dim = dim_of(given["dim"], len(x.shape))
    start, stop, step = slice(given["start"], given["end"], given["step"]).indices(x.shape[dim])
    return b.part(x, dim, start, len(range(start, stop, step)), step, node.name)


@form(aten.select.int)
def _select(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.of(given["self"])
    dim = dim_of(given["dim"], len(x.shape))
    return b.changed(x, views.select(dim, given["index"] % x.shape[dim]), node.meta["val"].shape, node.name)


@form(aten.split_with_sizes.default)
def _split(b: Builder, node: fx.Node, given: dict[str, Any]) -> list[Value]:
    x, start, parts = b.of(given["self"]), 0, []
    dim = dim_of(given["dim"], len(x.shape))
    x = b.simple(x, node.name)
    for count in given["split_sizes"]:
        parts.append(b.part(x, dim, start, count, 1, node.name))
        start += count
    return parts


@form(aten.flip.default)
def _flip(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.of(given["self"])
    for d in given["dims"]:
        x = b.changed(x, views.flip(dim_of(d, len(x.shape))), x.shape, node.name)
    return x


@form(aten.unfold.default)
def _unfold(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.of(given["self"])
    dim = dim_of(given["dimension"], len(x.shape))
    return b.changed(x, views.windows(dim, given["size"], given["step"]), node.meta["val"].shape, node.name)


@form(aten.repeat.default)
def _repeat(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x, times = b.of(given["self"]), given["repeats"]
    size = [1] * (len(times) - len(x.shape)) + list(x.shape)
    apart = [n for pair in zip([1] * len(size), size, strict=True) for n in pair]
    spread = [n for pair in zip(times, size, strict=True) for n in pair]
    x = b.changed(x, views.reshape(apart), apart, node.name)
    shape = tuple(node.meta["val"].shape)
    return b.changed(b.spread(x, spread), views.reshape(shape), shape, node.name)


@form(aten.cat.default)
def _cat(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    parts = [b.of(x) for x in given["tensors"]]
    parts = [x for x in parts if x.shape != (0,)]
    if len(parts) == 1:
        return (
            b.call("{0}", parts, out.shape, out.dtype, out.dtype, node.name)
            if parts[0].dtype != out.dtype
            else parts[0]
        )
    dim = dim_of(given["dim"], len(out.shape))
    largest = max(parts, key=lambda x: prod(x.shape))
    to = b.code.room(out.dtype, tuple(out.shape), b.order(largest))
    at = 0
    for x in parts:
        place = views.slice_(dim, at, x.shape[dim])(to)
        b.store(x, place, node.name)
        at += x.shape[dim]
    return Value(tuple(out.shape), Load(to, out.dtype))


@form(aten.slice_scatter.default, aten.select_scatter.default)
def _scatter(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x, out = b.of(given["self"]), node.meta["val"]
    dim = dim_of(given["dim"], len(x.shape))
    to = b.put(x, node.name, range(len(x.shape)))
    if node.target is aten.select_scatter.default:
        place = views.select(dim, given["index"] % x.shape[dim])(to)
    else:
        start, stop, step = slice(given["start"], given["end"], given["step"]).indices(x.shape[dim])
        place = views.slice_(dim, start, len(range(start, stop, step)), step)(to)
    b.store(b.cast(b.of(given["src"]), out.dtype, node.name), place, node.name)
    return Value(x.shape, Load(to, out.dtype))


@form(aten.copy.default)
def _copy(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    return b.spread(b.cast(b.of(given["src"]), out.dtype, node.name), out.shape)


def _around(rank: int, sides: Sequence[tuple[int, int]]) -> Margin:
    return (*[(0, 0)] * (rank - len(sides)), *sides)


def padded(b: Builder, x: Value, sides: Sequence[tuple[int, int]], fill: float | int, name: str) -> Value:
    """A tensor with entries before and behind those of its last dimensions."""
    rank, n = len(x.shape), len(sides)
    whole = list(x.shape)
    for i, (before, behind) in enumerate(sides):
        whole[rank - n + i] += before + behind
    zeros = fill == 0 and all(before >= 0 and behind >= 0 for before, behind in sides)
    if zeros:
        with contextlib.suppress(NoView):
            place = b.lying(x, name) if x.view is not None else b.put(x, name, margin=_around(rank, sides))
            for i, (before, behind) in enumerate(sides):
                place = views.extended(place, rank - n + i, before, behind)
            return Value(tuple(whole), Load(place, x.dtype))
    to = b.code.room(x.dtype, whole, b.order(x), zeros=zeros)
    if not zeros:
        b.store(Value(tuple(whole), Number(fill, x.dtype)), to, name)
    place = to
    for i, (before, behind) in enumerate(sides):
        d = rank - n + i
        if before < 0 or behind < 0:
            x = b.part(x, d, max(0, -before), x.shape[d] + min(before, 0) + min(behind, 0), 1, name)
        place = views.slice_(d, max(before, 0), x.shape[d])(place)
    b.store(x, place, name)
    return Value(tuple(whole), Load(to, x.dtype))


@form(aten.constant_pad_nd.default)
def _pad(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    pad = given["pad"]
    sides = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)][::-1]
    return padded(b, b.of(given["self"]), sides, given["value"], node.name)
