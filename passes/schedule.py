"""The algebra of delays: which frames an op needs, and how many there are after n ticks.

Everything here is integer arithmetic on frame indices (docs/design.md, "The schedule"). A *tick* is one frame of the
slowest input. All functions are used unclamped: negative indices are the garbage before the start, so they are
periodic, with the least common multiple S of the denominators of all rates as the period.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

Int = Any  # an int, or anything with integer arithmetic that stands for one (an index inside a generated program)


@dataclass(frozen=True)
class Taps:
    """Output frame j needs source frames ``(step*j + first)//up .. (step*j + last)//up``, both included.

    A convolution of kernel k, stride s, padding p, dilation d is ``Taps(s, 1, -p, d*(k-1) - p)``, a nearest
    upsampling by u is ``Taps(1, u)``, the identity is ``Taps()``.
    """

    step: int = 1
    up: int = 1
    first: int = 0
    last: int = 0

    def lo(self, j: int) -> int:
        """The first source frame that output frame `j` needs."""
        return (self.step * j + self.first) // self.up

    def hi(self, j: int) -> int:
        """The last source frame that output frame `j` needs."""
        return (self.step * j + self.last) // self.up

    def ready(self, available: int) -> int:
        """How many output frames have all their taps when `available` source frames are there."""
        return -((self.last - self.up * available) // self.step)

    def shifted(self, offset: int) -> Taps:
        """The same taps on a source whose frame indices are `offset` higher."""
        return replace(self, first=self.first + offset * self.up, last=self.last + offset * self.up)

    def widened(self, earlier: int = 0, later: int = 0) -> Taps:
        """Taps that reach `earlier` source frames further back and `later` further on."""
        return replace(self, first=self.first - earlier * self.up, last=self.last + later * self.up)


def minimum(a: Int, b: Int) -> Int:
    """The smaller of two lengths or indices, inside a generated program or not."""
    return a.minimum(b) if hasattr(a, "minimum") else min(a, b)


def floor_affine(values: list[int], rate_num: int, rate_den: int) -> int | None:
    """The c for which ``values[i] == (rate_num*i + c)//rate_den`` for all i, or None if there is none.

    `values` must cover at least one period, ``rate_den`` entries.
    """
    low = max(rate_den * v - rate_num * i for i, v in enumerate(values))
    high = min(rate_den * v + rate_den - 1 - rate_num * i for i, v in enumerate(values))
    return low if low <= high else None
