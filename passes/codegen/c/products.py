"""Sums of products in C, of matrices and of convolutions, with what is done entry by entry to the result.

Of the dimensions of the result, those in which both operands vary are matrices side by side (``b``), those of the first
operand alone are rows (``m``), those of the second one alone are columns (``n``); ``k`` is summed over. Vectors lie in

- `n`, if the second operand is a constant, which is stored as the loops read it, or has its `n` side by side,
- `b`, if there are many of these and few `n`: depthwise convolutions,
- `k`, summed up in the end, where both operands have it side by side.

A tile of the result stays in registers over all that is summed up, and goes out through the rest of the expression.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from .expressions import Call, Dot, Expression, Value, factors_of
from .views import NoView, View, laid, strides_in

Axis = tuple[int, tuple[int, ...]]  # a size, and the strides of all operands in it
A, W, OUT = 0, 1, 2  # which of them; what the expression reads besides follows


@dataclass(frozen=True)
class Target:
    """What the compiler compiles for.

    Attributes:
        bytes: of a vector register.
        registers: vectors that fit in them.
    """

    bytes: int = 16
    registers: int = 16

    def lanes(self, dtype: torch.dtype) -> int:
        """Numbers in a vector."""
        return max(1, self.bytes // dtype.itemsize)


def merged(axes: Sequence[Axis]) -> list[Axis]:
    """Axes, each of which continues none of those before it."""
    found: list[Axis] = []
    for size, strides in axes:
        if found and all(s == t * size for s, t in zip(found[-1][1], strides, strict=True)):
            found[-1] = found[-1][0] * size, strides
        else:
            found.append((size, strides))
    return found


def natural(dot: Dot, shape: Sequence[int], target: Target) -> View:
    """A sum of products as it comes about: the dimensions of its vectors innermost."""
    a, w = dot.pairs[0]
    sizes = factors_of(shape, [a, w])
    in_a, in_w = strides_in(a, sizes), strides_in(w, sizes)
    places = [(d, i, in_a[d][i], in_w[d][i]) for d, factors in enumerate(sizes) for i in range(len(factors))]
    b, m, n = ([p for p in places if kind(p[2], p[3]) == x] for x in "bmn")
    many, columns = (prod(sizes[p[0]][p[1]] for p in ps) for ps in (b, n))
    inner = w.constant and many > 1 and (columns < 4 or target.lanes(dot.dtype) in range(columns + 1, many + 1))
    m.sort(key=lambda p: -abs(p[2]))
    order = [*m, *n, *b] if inner else [*b, *m, *n]
    return View(a.buffer, 0, laid(sizes, [(d, i) for d, i, _, _ in order]))


def kind(a: int, w: int) -> str:
    """What a dimension is in which the operands have these strides: `b`, `m` or `n`."""
    return ("b" if a else "n") if w else "m"


@dataclass
class Product:
    """What a function computes.

    Attributes:
        dot: the sum of products.
        value: the expression that holds it.
        to: where its entries go.
        others: what the expression reads besides.
        b, m, n, k: axes, those of `k` with the strides of the two operands alone.
    """

    dot: Dot
    value: Value
    to: View
    others: list[View]
    b: list[Axis]
    m: list[Axis]
    n: list[Axis]
    k: list[Axis]

    @property
    def depth(self) -> int:
        """Products in a sum of one pair of operands."""
        return entries(self.k)

    def sizes(self) -> list[int]:
        """Entries of b, m, n and of all that is summed over."""
        return [*(entries(x) for x in (self.b, self.m, self.n)), self.depth * len(self.dot.pairs)]


def product(value: Value, dot: Dot, to: View) -> Product:
    """What computes an expression with a sum of products in it.

    Raises:
        NoView: loops cannot walk through all of its operands together.
    """
    others = list(dict.fromkeys(_beside(value.expression, dot)))
    if any(v.buffer is None or v.terms for v in others):
        raise NoView
    views = [*dot.pairs[0], to, *others]
    sizes = factors_of(value.shape, views)
    strides = [strides_in(v, sizes) for v in views]
    axes: list[Axis] = [
        (size, tuple(s[d][i] for s in strides))
        for d, factors in enumerate(sizes)
        for i, size in enumerate(factors)
        if size > 1
    ]
    b, m, n = ([x for x in axes if kind(x[1][A], x[1][W]) == name] for name in "bmn")
    m.sort(key=lambda x: -abs(x[1][A]))
    n.sort(key=lambda x: -abs(x[1][OUT]))
    k = merged(sorted(dot.k, key=lambda x: -abs(x[1][A])))
    return Product(dot, value, to, others, b, m, n, k)


def _beside(e: Expression, dot: Dot) -> Iterator[View]:
    """What an expression reads besides a sum of products."""
    if isinstance(e, Call):
        for x in e.given:
            yield from _beside(x, dot)
    elif e != dot:
        yield from e.leaves()


def entries(axes: Sequence[tuple[int, Any]]) -> int:
    """How many there are in all of these axes."""
    return prod(x[0] for x in axes)
