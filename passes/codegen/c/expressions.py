"""What a tensor's entry is computed from: a tree of operators over views, which becomes one expression in C."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

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


Expression = Load | Number | Call


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
