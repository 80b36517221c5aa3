"""Special functions in what ONNX has: arithmetic, Exp, Log, Sin, Sqrt, Erf and Where.

To about 3e-7 of single precision: files are compared within 1e-5.
Half types are computed in single precision. Formulas from Abramowitz and Stegun, Handbook of Mathematical Functions
(AS), and Giles, Approximating the erfinv function (2011).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

aten = torch.ops.aten
Function = Callable[[torch.Tensor], torch.Tensor]


def _in_float(f: Function) -> Function:
    """Computed in single precision at least; whole numbers become such."""

    @functools.wraps(f)
    def wrapped(x: torch.Tensor) -> torch.Tensor:
        if not x.dtype.is_floating_point:
            return f(x.to(torch.get_default_dtype()))
        return f(x) if x.dtype in (torch.float32, torch.float64) else f(x.float()).to(x.dtype)

    return wrapped


def _polynomial(x: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    """Horner's rule, the constant term last."""
    y = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + c
    return y


def signbit(x: torch.Tensor) -> torch.Tensor:
    """Whether a number is negative, also a negative zero: one over it is."""
    return (x < 0) | ((x == 0) & (1 / x < 0)) if x.dtype.is_floating_point else x < 0


def copysign(x: torch.Tensor, y: Any) -> torch.Tensor:
    """The size of one with the sign of the other."""
    x = x if x.dtype.is_floating_point else x.to(torch.get_default_dtype())
    size = x.abs()
    if isinstance(y, torch.Tensor):
        return torch.where(signbit(y), -size, size)
    return -size if math.copysign(1.0, y) < 0 else size


def frexp(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A number as mantissa in [0.5, 1) and power of two."""
    plain = (x != 0) & (x.abs() < math.inf)
    size = torch.where(plain, x.abs(), 1)
    power = torch.floor(torch.log2(size)) + 1
    part = size * torch.exp2(-power)
    power = torch.where(part >= 1, power + 1, torch.where(part < 0.5, power - 1, power))  # where the logarithm rounds
    half = torch.floor(power / 2)  # in two steps, neither of which overflows
    mantissa = x * torch.exp2(-half) * torch.exp2(half - power)
    return torch.where(plain, mantissa, x), torch.where(plain, power, 0).to(torch.int32)


def _least(pick: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def least(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Of two numbers, the one that is none (NaN) left out."""
        return torch.where(x != x, y, torch.where(y != y, x, pick(x, y)))

    return least


@_in_float
def lgamma(x: torch.Tensor) -> torch.Tensor:
    """The logarithm of |gamma|: AS 6.1.41 at 8 or more, to which 6.1.15 moves, and 6.1.17 for negative numbers."""
    negative = x <= 0
    at = torch.where(negative, 1 - x, x)
    small = at < 8
    product = torch.ones_like(at)
    for k in range(8):
        product = torch.where(small, product * (at + k), 1)
    z = torch.where(small, at + 8, at)
    series = _polynomial(1 / (z * z), (1 / 1260, -1 / 360, 1 / 12)) / z
    positive = (z - 0.5) * (torch.log(z) - 1) + (math.log(2 * math.pi) / 2 - 0.5) + series - torch.log(product)
    mirrored = math.log(math.pi) - torch.log(torch.sin(math.pi * (x - torch.round(x))).abs()) - positive
    return torch.where(x.abs() == math.inf, math.inf, torch.where(negative, mirrored, positive))


@_in_float
def digamma(x: torch.Tensor) -> torch.Tensor:
    """The derivative of `lgamma`: AS 6.3.18 at 8 or more, to which 6.3.5 moves, and 6.3.7 for negative numbers."""
    negative = x < 0
    at = torch.where(negative, 1 - x, x)
    small = at < 8
    moved = torch.zeros_like(at)
    for k in range(8):
        moved = moved + torch.where(small, 1 / (at + k), 0)
    z = torch.where(small, at + 8, at)
    square = 1 / (z * z)
    positive = torch.log(z) - 0.5 / z - square * _polynomial(square, (1 / 252, -1 / 120, 1 / 12)) - moved
    part = x - torch.round(x)
    mirrored = positive - math.pi * torch.cos(math.pi * part) / torch.sin(math.pi * part)
    return torch.where(negative, torch.where(part == 0, math.nan, mirrored), positive)


@_in_float
def erfinv(x: torch.Tensor) -> torch.Tensor:
    """The inverse of erf (Giles)."""
    w = -torch.log((1 - x) * (1 + x))
    middle = _polynomial(w - 2.5, (
        2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
        0.246640727, 1.50140941))  # fmt: skip
    tail = _polynomial(torch.sqrt(torch.where(w < 5, 5, w)) - 3, (
        -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
        1.00167406, 2.83297682))  # fmt: skip
    return torch.where(x.abs() == 1, x * math.inf, torch.where(w < 5, middle, tail) * x)


def _scaled_erfc(x: torch.Tensor) -> torch.Tensor:
    """exp(x * x) * erfc(x) for x >= 0, to 1.2e-7 of itself (Press et al., Numerical Recipes, 6.2)."""
    t = 1 / (1 + 0.5 * x)
    return t * torch.exp(_polynomial(t, (
        0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368,
        -1.26551223)))  # fmt: skip


@_in_float
def erfc(x: torch.Tensor) -> torch.Tensor:
    """1 - erf(x), also where that rounds to nothing."""
    far = torch.where(x > 0.5, x, 1)
    return torch.where(x > 0.5, _scaled_erfc(far) * torch.exp(-far * far), 1 - torch.erf(x))


@_in_float
def erfcx(x: torch.Tensor) -> torch.Tensor:
    """exp(x * x) * erfc(x)."""
    positive = _scaled_erfc(x.abs())
    return torch.where(x < 0, 2 * torch.exp(x * x) - positive, positive)


@_in_float
def log_ndtr(x: torch.Tensor) -> torch.Tensor:
    """The logarithm of the normal distribution function."""
    t = x * math.sqrt(0.5)
    low, high = torch.where(x < -1, t, -1), torch.where(x < -1, 0, t)
    return torch.where(x < -1, torch.log(_scaled_erfc(-low) / 2) - low * low, torch.log1p(-erfc(high) / 2))


def _bessel(order: int, scaled: bool) -> Function:
    """The modified Bessel function of the first kind, times exp(-|x|) if `scaled`: AS 9.8.1 to 9.8.4."""
    near, far = {
        0: ((0.0045813, 0.0360768, 0.2659732, 1.2067492, 3.0899424, 3.5156229, 1.0),
            (0.00392377, -0.01647633, 0.02635537, -0.02057706, 0.00916281, -0.00157565, 0.00225319, 0.01328592,
             0.39894228)),
        1: ((0.00032411, 0.00301532, 0.02658733, 0.15084934, 0.51498869, 0.87890594, 0.5),
            (-0.00420059, 0.01787654, -0.02895312, 0.02282967, -0.01031555, 0.00163801, -0.00362018, -0.03988024,
             0.39894228)),
    }[order]  # fmt: skip

    @_in_float
    def bessel(x: torch.Tensor) -> torch.Tensor:
        size = x.abs()
        small, large = torch.clamp(size, max=3.75), torch.clamp(size, min=3.75)
        inner = _polynomial((small / 3.75) ** 2, near) * (torch.exp(-small) if scaled else 1)
        outer = _polynomial(3.75 / large, far) / torch.sqrt(large) * (1 if scaled else torch.exp(large))
        if order == 0:
            return torch.where(size < 3.75, inner, outer)
        return torch.where(size < 3.75, inner * x, torch.where(x < 0, -outer, outer))

    return bessel


TABLE: dict[Any, Callable[..., Any]] = {
    aten.copysign.Scalar: copysign,
    aten.copysign.Tensor: copysign,
    aten.digamma.default: digamma,
    aten.erfc.default: erfc,
    aten.erfinv.default: erfinv,
    aten.fmax.default: _least(torch.maximum),
    aten.fmin.default: _least(torch.minimum),
    aten.frexp.Tensor: frexp,
    aten.i0.default: _bessel(0, False),
    aten.lgamma.default: lgamma,
    aten.signbit.default: signbit,
    aten.special_erfcx.default: erfcx,
    aten.special_i0e.default: _bessel(0, True),
    aten.special_i1.default: _bessel(1, False),
    aten.special_i1e.default: _bessel(1, True),
    aten.special_log_ndtr.default: log_ndtr,
}
