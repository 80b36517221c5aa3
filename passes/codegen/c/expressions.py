"""What a tensor's entry is computed from: a tree of operators over views, which becomes one expression in C."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .operators import FLOATS, TYPES, literal
from .views import View, refine, size_of


@dataclass(frozen=True)
class Load:
    """The entry of a view."""

    view: View
    dtype: torch.dtype

    def leaves(self) -> Iterator[View]:
        """All views in it."""
        yield self.view
        for index, _ in self.view.terms:
            yield from index.leaves()

    def through(self, change: Callable[[View], View]) -> Load:
        """The same with another order, or choice, of entries.

        Raises:
            NoView: there is none.
        """
        return Load(change(self.view), self.dtype)


@dataclass(frozen=True)
class Number:
    """A number."""

    value: float | int | bool
    dtype: torch.dtype

    def leaves(self) -> Iterator[View]:
        """There is none."""
        return iter(())

    def through(self, change: Callable[[View], View]) -> Number:
        """It is the same everywhere."""
        return self


@dataclass(frozen=True)
class Call:
    """An operator on expressions.

    Attributes:
        text: in C, with ``{0}``, ``{1}``, ... for the operands.
        given: these.
        dtype: of the result.
        within: the dtype in which it is computed.
    """

    text: str
    given: tuple[Expression, ...]
    dtype: torch.dtype
    within: torch.dtype

    def leaves(self) -> Iterator[View]:
        """All views in it."""
        for x in self.given:
            yield from x.leaves()

    def through(self, change: Callable[[View], View]) -> Call:
        """The same with another order, or choice, of entries.

        Raises:
            NoView: there is none.
        """
        return Call(self.text, tuple(x.through(change) for x in self.given), self.dtype, self.within)


@dataclass(frozen=True)
class Dot:
    """A sum of products: of ``a * w`` over all pairs of operands, and for each over the dimensions `k`.

    That of matrices, and that of a convolution's windows with its kernel. The operands are views of the result's shape,
    repeated where they do not depend on a dimension of it.

    Attributes:
        pairs: the operands. All first ones lie alike, up to the address of the first entry, and all second ones.
        k: what is summed over: sizes, with the strides of the first and of the second operands.
        dtype: of all.
        name: for the reader.
    """

    pairs: tuple[tuple[View, View], ...]
    k: tuple[tuple[int, tuple[int, int]], ...]
    dtype: torch.dtype
    name: str = field(compare=False, default="")

    def leaves(self) -> Iterator[View]:
        """The operands."""
        for pair in self.pairs:
            yield from pair

    def through(self, change: Callable[[View], View]) -> Dot:
        """The same with another order, or choice, of entries.

        Raises:
            NoView: there is none.
        """
        return Dot(tuple((change(a), change(w)) for a, w in self.pairs), self.k, self.dtype, self.name)

    def joins(self, other: Dot) -> bool:
        """Whether the sum of both is one: that of taps of a convolution, for instance."""
        (a, w), (x, y) = self.pairs[0], other.pairs[0]
        alike = (self.k, self.dtype, a.dims, w.dims) == (other.k, other.dtype, x.dims, y.dims)
        return alike and w.constant and y.constant


Expression = Load | Number | Call | Dot


@dataclass(frozen=True)
class Value:
    """A tensor: its shape and what its entries are. All views in it have that shape."""

    shape: tuple[int, ...]
    expression: Expression

    @property
    def dtype(self) -> torch.dtype:
        """Of its entries."""
        return self.expression.dtype

    @property
    def view(self) -> View | None:
        """Where it lies, if it lies somewhere."""
        e = self.expression
        return e.view if isinstance(e, Load) and e.view.buffer is not None and not e.view.terms else None

    @property
    def simple(self) -> bool:
        """Whether it takes no work to get at an entry."""
        e = self.expression
        return isinstance(e, Number) or (isinstance(e, Load) and not e.view.terms)


def factors_of(shape: Sequence[int], views: Sequence[View]) -> list[list[int]]:
    """For each dimension the factors into which all these views can be cut.

    Raises:
        NoView: there are none.
    """
    found = []
    for d, size in enumerate(shape):
        dims = [v.dims[d] for v in views]
        found.append(refine([d for d in dims if d] or [((size, 0),)]))
        assert all(size_of(x) == size for x in dims), (shape, views)
    return found


def dots_of(e: Expression) -> list[Dot]:
    """The sums of products in it, each once."""
    if isinstance(e, Dot):
        return [e]
    found = (dot for x in e.given for dot in dots_of(x)) if isinstance(e, Call) else ()
    return list(dict.fromkeys(found))


def replaced(e: Expression, old: Expression, new: Expression) -> Expression:
    """The same with another expression in the place of one."""
    if e == old:
        return new
    if isinstance(e, Call):
        return Call(e.text, tuple(replaced(x, old, new) for x in e.given), e.dtype, e.within)
    return e


def written(e: Expression, entry: Callable[[View], str], dot: str = "", declare: bool = True) -> tuple[list[str], str]:
    """What computes it in C: declarations of what is needed more than once, and the expression.

    Args:
        e: the expression.
        entry: the C expression of a view's entry.
        dot: that of the sum of products.
        declare: there may be declarations.
    """
    times: Counter[Expression] = Counter()

    def count(x: Expression) -> None:
        times[x] += 1
        if times[x] == 1 and isinstance(x, Call):
            for y in x.given:
                count(y)

    def text(x: Expression) -> str:
        if isinstance(x, Number):
            return literal(x.value, x.dtype)
        if isinstance(x, Load):
            return entry(x.view)
        if isinstance(x, Dot):
            return dot
        if x in names:
            return names[x]
        given = [text(y) if y.dtype == x.within or not x.within else f"({TYPES[x.within]}){text(y)}" for y in x.given]
        made = x.text.format(*given)
        made = f"({made})" if x.dtype in FLOATS else f"({TYPES[x.dtype]})({made})"  # integers wrap at each op
        if declare and times[x] > 1:
            names[x] = f"v{len(names)}"
            lines.append(f"const {TYPES[x.dtype]} {names[x]} = {made};")
            return names[x]
        return made

    names: dict[Expression, str] = {}
    lines: list[str] = []
    count(e)
    return lines, text(e)
