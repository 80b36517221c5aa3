"""Pointwise ops in C: what each is for floating point, and for integers where that differs.

``{0}``, ``{1}``, ... stand for the operands, already of the dtype in which the op is computed. ``{f}`` is the suffix of
functions in `kernels.h`, ``f`` for float and ``d`` for double.
"""

from __future__ import annotations

import math
from typing import Any

import torch

aten = torch.ops.aten

FLOATS = (torch.float32, torch.float64)
TYPES: dict[torch.dtype, str] = {
    torch.float32: "float", torch.float64: "double", torch.int64: "int64_t", torch.int32: "int32_t",
    torch.int16: "int16_t", torch.int8: "int8_t", torch.uint8: "uint8_t", torch.bool: "bool",
}  # fmt: skip

UNARY: dict[str, str] = {
    "relu": "relu_{f}({0})", "sigmoid": "sigmoid_{f}({0})", "tanh": "tanh_{f}({0})", "exp": "exp_{f}({0})",
    "expm1": "expm1{m}({0})", "log": "log{m}({0})", "log2": "log2{m}({0})", "log10": "log10{m}({0})",
    "log1p": "log1p{m}({0})", "sqrt": "sqrt{m}({0})", "rsqrt": "1 / sqrt{m}({0})", "sin": "sin{m}({0})",
    "cos": "cos{m}({0})", "tan": "tan{m}({0})", "asin": "asin{m}({0})", "acos": "acos{m}({0})",
    "atan": "atan{m}({0})", "sinh": "sinh{m}({0})", "cosh": "cosh{m}({0})", "asinh": "asinh{m}({0})",
    "acosh": "acosh{m}({0})", "atanh": "atanh{m}({0})", "erf": "erf_{f}({0})", "floor": "floor{m}({0})",
    "ceil": "ceil{m}({0})", "trunc": "trunc{m}({0})", "round": "rint{m}({0})", "abs": "fabs{m}({0})",
    "neg": "-{0}", "reciprocal": "1 / {0}", "sign": "sign_{f}({0})", "isnan": "{0} != {0}",
    "isinf": "isinf({0}) != 0", "logical_not": "!{0}", "exp2": "exp2{m}({0})",
}  # fmt: skip
UNARY_INTEGER: dict[str, str] = {
    "relu": "{0} < 0 ? 0 : {0}", "floor": "{0}", "ceil": "{0}", "trunc": "{0}", "round": "{0}",
    "abs": "{0} < 0 ? -{0} : {0}", "neg": "-{0}", "sign": "({0} > 0) - ({0} < 0)", "logical_not": "!{0}",
    "isnan": "0", "isinf": "0", "bitwise_not": "~{0}",
}  # fmt: skip
BINARY: dict[str, str] = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "maximum": "max_{f}({0}, {1})",
    "minimum": "min_{f}({0}, {1})", "pow": "pow{m}({0}, {1})", "fmod": "fmod{m}({0}, {1})",
    "remainder": "remainder_{f}({0}, {1})", "atan2": "atan2{m}({0}, {1})", "eq": "{0} == {1}", "ne": "{0} != {1}",
    "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}", "ge": "{0} >= {1}", "logical_and": "{0} && {1}",
    "logical_or": "{0} || {1}", "logical_xor": "!{0} != !{1}",
}  # fmt: skip
BINARY_INTEGER: dict[str, str] = BINARY | {
    "maximum": "{0} > {1} ? {0} : {1}", "minimum": "{0} < {1} ? {0} : {1}", "fmod": "{0} % {1}",
    "remainder": "remainder_i({0}, {1})", "bitwise_and": "{0} & {1}", "bitwise_or": "{0} | {1}",
    "bitwise_xor": "{0} ^ {1}",
}  # fmt: skip
BINARY_INTEGER.pop("pow"), BINARY_INTEGER.pop("atan2")
COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf"}
DIVISIONS = {"div", "fmod", "remainder"}
LOGICAL = {"logical_and", "logical_or", "logical_xor", "logical_not"}


def operator_text(name: str, arity: int, dtype: torch.dtype) -> str | None:
    """The form of an op that is computed in a dtype; None if it has none."""
    if dtype in FLOATS:
        text = (UNARY if arity == 1 else BINARY).get(name)
        suffix, function = ("f", "f") if dtype == torch.float32 else ("d", "")
        return None if text is None else text.replace("{f}", suffix).replace("{m}", function)
    if dtype == torch.bool and name == "bitwise_not":
        return "!{0}"
    return (UNARY_INTEGER if arity == 1 else BINARY_INTEGER).get(name)


def literal(value: float | int | bool, dtype: torch.dtype) -> str:
    """A number in C."""
    if dtype in FLOATS:
        x = float(value)
        if math.isnan(x):
            return "NAN"
        if math.isinf(x):
            return "INFINITY" if x > 0 else "-INFINITY"
        if dtype == torch.float32:
            x = float(torch.tensor(x, dtype=torch.float32))
            return "-INFINITY" if x == -math.inf else "INFINITY" if x == math.inf else f"{x!r}f"
        return repr(x)
    if dtype == torch.bool:
        return "1" if value else "0"
    number = int(value)
    if number == -(1 << 63):
        return "INT64_MIN"
    return f"INT64_C({number})" if abs(number) >= 1 << 31 else str(number)


def base_name(target: Any) -> tuple[str, str]:
    """An overload's op and its own name: ``("add", "Tensor")``."""
    parts = str(target).split(".")
    return parts[1], parts[2]
