"""Forms of ops entry by entry that are more than a line of the table in `operators.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..builder import Builder, form
from ..expressions import Call, Load, Number, Value
from ..operators import FLOATS, base_name, literal, operator_text
from ..views import View, one

aten = torch.ops.aten


@form(aten.full.default, aten.full_like.default, aten.scalar_tensor.default)
def _full(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    number = given["s"] if "s" in given else given["fill_value"]
    return Value(tuple(out.shape), Number(number, out.dtype))


@form(aten.empty.memory_format, aten.zeros.default, aten.zeros_like.default, aten.empty_like.default)
def _zeros(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    return Value(tuple(out.shape), Number(0, out.dtype))


@form(aten.arange.start_step)
def _arange(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    start, step = given["start"], given["step"]
    if not (isinstance(start, int) and isinstance(step, int)):
        index = Value(tuple(out.shape), Load(View(None, 0, (one(out.shape[0], 1),)), torch.int64))
        first, apart = (literal(x, torch.float64) for x in (start, step))
        return b.call(f"{first} + {{0}} * {apart}", [index], out.shape, out.dtype, torch.float64, node.name)
    index = Value(tuple(out.shape), Load(View(None, start, (one(out.shape[0], step),)), torch.int64))
    return b.call("{0}", [index], out.shape, out.dtype, out.dtype, node.name)


@form(aten._to_copy.default)
def _to_copy(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out, x = node.meta["val"], b.of(given["self"])
    if x.dtype == out.dtype:
        return x
    text = "{0} != 0" if out.dtype == torch.bool else "{0}"
    return b.call(text, [x], out.shape, out.dtype, x.dtype if out.dtype == torch.bool else out.dtype, node.name)


@form(aten.where.self)
def _where(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    cond, x, y = (b.of(given[n], out.dtype) for n in ("condition", "self", "other"))
    x, y = (v if v.dtype == out.dtype else b.call("{0}", [v], v.shape, out.dtype, out.dtype, node.name) for v in (x, y))
    found = b.fitting([b.spread(v, out.shape) for v in (cond, x, y)], out.shape, node.name)
    return Value(tuple(out.shape), Call("{0} ? {1} : {2}", tuple(v.expression for v in found), out.dtype, None))  # type: ignore[arg-type]


@form(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor)
def _add(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    op = base_name(node.target)[0]
    x, y = given["self"], given["other"]
    out = node.meta["val"]
    if given.get("alpha", 1) != 1:
        scaled = b.call("{0} * {1}", [b.of(y, out.dtype), b.of(given["alpha"], out.dtype)],
                        b.of(y).shape, out.dtype, out.dtype, node.name)  # fmt: skip
    else:
        scaled = b.of(y, out.dtype)
    first, second = b.of(x, out.dtype), scaled
    if op == "rsub":
        first, second = second, first
    sign = "+" if op == "add" else "-"
    if sign == "+":
        return b.sum(first, second, out.shape, out.dtype, node.name)
    return b.call("{0} - {1}", [first, second], out.shape, out.dtype, out.dtype, node.name)


@form(aten.div.Tensor_mode)
def _div_mode(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out, mode = node.meta["val"], given["rounding_mode"]
    if out.dtype in FLOATS:
        rounding = {None: "", "floor": "floor", "trunc": "trunc"}[mode] + (
            "f" if mode and out.dtype == torch.float32 else ""
        )
        text = f"{rounding}({{0}} / {{1}})"
    else:
        b.divides(given["other"], node)
        text = "{0} / {1}" if mode == "trunc" else "floor_div_i({0}, {1})"
    return b.call(
        text,
        [b.of(given["self"], out.dtype), b.of(given["other"], out.dtype)],
        out.shape,
        out.dtype,
        out.dtype,
        node.name,
    )


@form(aten.pow.Tensor_Scalar)
def _pow(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    exponent = given["exponent"]
    out = node.meta["val"]
    if exponent == 2:
        x = b.of(given["self"])
        if not x.simple:
            x = Value(x.shape, Load(b.put(x, node.name), x.dtype))
        return b.call("{0} * {0}", [x], out.shape, out.dtype, out.dtype, node.name)
    if exponent == 0.5:
        return b.pointwise("sqrt", [given["self"]], node)
    return b.pointwise("pow", [given["self"], exponent], node)


@form(aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default, aten.clamp_max.default)
def _clamp(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    x = b.of(given["self"])
    for name, op in (("min", "maximum"), ("max", "minimum")):
        if given.get(name) is not None:
            text = operator_text(op, 2, out.dtype)
            assert text is not None
            if "{0} >" in text or "{0} <" in text:
                x = b.simple(x, node.name)
            x = b.call(text, [x, b.of(given[name], out.dtype)], out.shape, out.dtype, out.dtype, node.name)
    return x
