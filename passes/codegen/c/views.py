"""Where the entries of a tensor lie: a view of a buffer, whose dimensions may be made of several.

A dimension is a row of *factors*, ``(size, stride)``, the outermost first. Usually it is one. A reshape that joins
dimensions which do not lie side by side gives a dimension of several factors, and needs no copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .expressions import Expression

Factor = tuple[int, int]
Dim = tuple[Factor, ...]
Margin = tuple[tuple[int, int], ...]  # for each dimension the zeros before and behind its entries


@dataclass(frozen=True, eq=False)
class Buffer:
    """Memory that a program reads or writes.

    Attributes:
        name: of the C variable that points to it.
        dtype: of its entries.
        size: entries; 0 where another owns it.
        tensor: what it holds, if that is constant.
        margins: its dimensions that have zeros before and behind their entries: ``(stride, size, before, behind)``,
            of which `size` counts all.
        zeros: what is not written is zero, always.
    """

    name: str
    dtype: torch.dtype
    size: int = 0
    tensor: torch.Tensor | None = None
    margins: tuple[tuple[int, int, int, int], ...] = ()
    zeros: bool = False


@dataclass(frozen=True)
class View:
    """Entry ``(i, j, ...)`` of a tensor lies at ``offset + sum of index * stride``, over all factors.

    Attributes:
        buffer: where; None if the address itself is the entry (an `arange`).
        offset: of the first entry.
        dims: for each dimension its factors.
        terms: what is added to the address: an index that is computed, times a stride.
    """

    buffer: Buffer | None
    offset: int
    dims: tuple[Dim, ...]
    terms: tuple[tuple[Expression, int], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the dimensions."""
        return tuple(map(size_of, self.dims))

    @property
    def constant(self) -> bool:
        """Whether its entries are known."""
        return self.buffer is not None and self.buffer.tensor is not None

    @property
    def pointer(self) -> str:
        """The C expression of the first entry's address, but for computed indices."""
        assert self.buffer is not None
        return f"{self.buffer.name} + {self.offset}" if self.offset else self.buffer.name

    def _with(self, dims: Iterable[Dim], offset: int = 0, change: Callable[[View], View] | None = None) -> View:
        terms = self.terms
        if change is not None:
            terms = tuple((e.through(change), stride) for e, stride in terms)
        return replace(self, offset=self.offset + offset, dims=tuple(dims), terms=terms)


Change = Callable[[View], View]


class NoView(Exception):
    """The result does not lie in a way that a view can tell: it has to be copied."""


def size_of(dim: Dim) -> int:
    """Entries of a dimension."""
    return prod(n for n, _ in dim)


def contiguous(buffer: Buffer | None, shape: Sequence[int], offset: int = 0) -> View:
    """A tensor whose last dimension lies innermost."""
    return ordered(buffer, shape, range(len(shape)), offset=offset)


def _strides(shape: Sequence[int], order: Iterable[int], margin: Margin | None) -> tuple[list[int], list[int], int]:
    """The strides and the sizes of dimensions, margins included, and how many entries there are in all."""
    sizes = list(shape) if margin is None else [n + sum(m) for n, m in zip(shape, margin, strict=True)]
    strides, stride = [0] * len(sizes), 1
    for d in reversed(list(order)):
        strides[d] = stride
        stride *= sizes[d]
    return strides, sizes, stride


def buffer(
    name: str,
    dtype: torch.dtype,
    shape: Sequence[int],
    order: Iterable[int],
    margin: Margin | None,
    zeros: bool = False,
) -> Buffer:
    """A buffer for a tensor whose dimensions lie in an order, the outermost first, with margins of zeros."""
    strides, sizes, size = _strides(shape, order, margin)
    found = () if margin is None else tuple((strides[d], sizes[d], *m) for d, m in enumerate(margin) if any(m))
    return Buffer(name, dtype, max(1, size), None, found, zeros or margin is not None)


def ordered(
    buffer: Buffer | None, shape: Sequence[int], order: Iterable[int], margin: Margin | None = None, offset: int = 0
) -> View:
    """A tensor without gaps, but for margins, whose dimensions lie in an order, the outermost first."""
    strides, _, _ = _strides(shape, order, margin)
    offset += 0 if margin is None else sum(s * m[0] for s, m in zip(strides, margin, strict=True))
    return View(buffer, offset, tuple(one(n, s) for n, s in zip(shape, strides, strict=True)))


def extended(view: View, dim: int, before: int, behind: int) -> View:
    """A view with zeros before and behind the entries of a dimension, which lie there already.

    Raises:
        NoView: they do not.
    """
    if not before and not behind:
        return view
    if view.buffer is None or view.terms or len(view.dims[dim]) != 1:
        raise NoView
    ((size, stride),) = view.dims[dim]
    for step, whole, first, last in view.buffer.margins:
        at = view.offset % (step * whole) // step
        if stride == step and before <= first and behind <= last and at == first and size == whole - first - last:
            dims = (*view.dims[:dim], ((size + before + behind, stride),), *view.dims[dim + 1 :])
            return replace(view, offset=view.offset - before * stride, dims=dims)
    raise NoView


def one(size: int, stride: int) -> Dim:
    """A dimension of one factor; of none, if it has one entry."""
    return () if size == 1 else ((size, stride),)


def joined(factors: Iterable[Factor]) -> Dim:
    """The same dimension with factors that continue each other as one."""
    found: list[Factor] = []
    for size, stride in factors:
        if size == 1:
            continue
        if found and found[-1][1] == size * stride:
            found[-1] = found[-1][0] * size, stride
        else:
            found.append((size, stride))
    return tuple(found)


def split(dim: Dim, sizes: Sequence[int]) -> list[int]:
    """The strides of a dimension that is cut into factors of these sizes.

    Raises:
        NoView: it cannot be cut there.
    """
    strides: list[int] = []
    left = list(dim)
    for size in sizes:
        if size == 1:
            strides.append(0)
            continue
        taken = cut(left, size)
        if len(taken) != 1:
            raise NoView
        strides.append(taken[0][1])
    return strides


def strides_in(view: View, factors: Sequence[Sequence[int]]) -> list[list[int]]:
    """For each dimension of a view its strides in factors of these sizes; 0 where it has one entry.

    Raises:
        NoView: it cannot be cut there.
    """
    return [split(dim, sizes) if dim else [0] * len(sizes) for dim, sizes in zip(view.dims, factors, strict=True)]


def cut(left: list[Factor], size: int) -> list[Factor]:
    """Take factors of so many entries from the front of a row of them, which is changed.

    Raises:
        NoView: they cannot be cut there.
    """
    taken: list[Factor] = []
    while size > 1:
        if not left:
            raise NoView
        n, stride = left.pop(0)
        if size % n == 0:
            taken.append((n, stride))
            size //= n
        elif n % size == 0:
            taken.append((size, stride * (n // size)))
            left.insert(0, (n // size, stride))
            size = 1
        else:
            raise NoView
    return taken


def laid(sizes: Sequence[Sequence[int]], places: Iterable[tuple[int, int]]) -> tuple[Dim, ...]:
    """Dimensions of factors of these sizes, without gaps.

    Args:
        sizes: for each dimension those of its factors.
        places: all factors, as dimension and number in it, the outermost first.
    """
    strides: dict[tuple[int, int], int] = {}
    stride = 1
    for d, i in reversed(list(places)):
        strides[d, i] = stride
        stride *= sizes[d][i]
    return tuple(joined((n, strides[d, i]) for i, n in enumerate(s)) for d, s in enumerate(sizes))


def refine(dims: Sequence[Dim]) -> list[int]:
    """The sizes of factors into which all these dimensions, of as many entries, can be cut.

    Raises:
        NoView: there are none.
    """
    total = size_of(dims[0])
    if not total:
        return []
    marks = {1, total}
    for dim in dims:
        inner = 1
        for size, _ in reversed(dim):
            inner *= size
            marks.add(inner)
    ordered_marks = sorted(marks, reverse=True)
    sizes = []
    for a, b in zip(ordered_marks, ordered_marks[1:], strict=False):
        if a % b:
            raise NoView
        sizes.append(a // b)
    return sizes


# -- what changes a view -----------------------------------------------------------------------------------------------


def permute(order: Sequence[int]) -> Change:
    """Other dimensions first."""

    def change(view: View) -> View:
        return view._with((view.dims[d] for d in order), 0, change)

    return change


def slice_(dim: int, start: int, count: int, step: int = 1) -> Change:
    """`count` entries of a dimension, from `start`, every `step`."""

    def change(view: View) -> View:
        dims, own = list(view.dims), view.dims[dim]
        if (start, count, step) == (0, size_of(own), 1):
            return view
        if len(own) > 1:
            offset, dims[dim] = _slice_factors(own, start, count, step)
        else:
            stride = own[0][1] if own else 0
            offset, dims[dim] = start * stride, one(count, stride * step)
        return view._with(dims, offset, change)

    return change


def _slice_factors(dim: Dim, start: int, count: int, step: int) -> tuple[int, Dim]:
    inner = size_of(dim[1:])
    if count == 1:
        offset = 0
        for size, stride in reversed(dim):
            start, i = divmod(start, size)
            offset += i * stride
        return offset, ()
    if step != 1 or start % inner or count % inner:
        raise NoView
    stride = dim[0][1]
    return start // inner * stride, joined([(count // inner, stride), *dim[1:]])


def select(dim: int, index: int) -> Change:
    """One entry of a dimension, which goes."""

    def change(view: View) -> View:
        found = slice_(dim, index, 1)(view)
        return replace(found, dims=found.dims[:dim] + found.dims[dim + 1 :], terms=_dropped(found.terms, dim))

    return change


def _dropped(terms: Any, dim: int) -> Any:
    def drop(view: View) -> View:
        return replace(view, dims=view.dims[:dim] + view.dims[dim + 1 :], terms=_dropped(view.terms, dim))

    return tuple((e.through(drop), stride) for e, stride in terms)


def insert(dim: int) -> Change:
    """A new dimension of size 1."""

    def change(view: View) -> View:
        return view._with((*view.dims[:dim], (), *view.dims[dim:]), 0, change)

    return change


def expand(shape: Sequence[int]) -> Change:
    """To a larger shape, as broadcasting does."""

    def change(view: View) -> View:
        dims = [()] * (len(shape) - len(view.dims)) + list(view.dims)
        return view._with((one(n, 0) if size_of(d) == 1 else d for n, d in zip(shape, dims, strict=True)), 0, change)

    return change


def reshape(shape: Sequence[int]) -> Change:
    """The same entries in the same order."""

    def change(view: View) -> View:
        left = list(joined(f for dim in view.dims for f in dim))
        return view._with([joined(cut(left, n)) for n in shape], 0, change)

    return change


def windows(dim: int, size: int, step: int, spread: int = 1) -> Change:
    """Windows of so many entries, `spread` apart, every `step`: the dimension counts them, a new last one is within."""

    def change(view: View) -> View:
        own = view.dims[dim]
        if len(own) > 1:
            raise NoView
        total, stride = own[0] if own else (1, 0)
        dims = list(view.dims)
        dims[dim] = one((total - spread * (size - 1) - 1) // step + 1, stride * step)
        return view._with([*dims, one(size, stride * spread)], 0, change)

    return change


def flip(dim: int) -> Change:
    """The last entry of a dimension first."""

    def change(view: View) -> View:
        dims = list(view.dims)
        offset = sum((n - 1) * s for n, s in dims[dim])
        dims[dim] = tuple((n, -s) for n, s in dims[dim])
        return view._with(dims, offset, change)

    return change
