"""Where time and batch lie in a tensor's shape.

A `Layout` is a shape whose dimensions are products of factors: ints, `BATCH` and `TIME`. A clip that was folded to
``(B*T, C, H, W)`` has the layout ``((BATCH, TIME), (C,), (H,), (W,))``; one whose frames were paired,
``(B, T/2, 2*C)``, has ``((BATCH,), (TIME,), (2*C,))`` on a clock half as fast. Reshapes are then a matter of taking
the factors, in row-major order, and parting them anew: no op needs to know what the user meant by a `view`.

What has an entry for every two frames (attention scores, masks) has `TIME` for one and `KEY` for the other.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


class Axis(enum.Enum):
    """A factor of a shape that is not a number known when compiling."""

    BATCH = "B"
    TIME = "T"
    KEY = "K"

    def __repr__(self) -> str:
        return self.value


BATCH, TIME, KEY = Axis.BATCH, Axis.TIME, Axis.KEY
Factor = int | Axis
Dim = tuple[Factor, ...]
Sizes = tuple[int, ...]  # one size, as seen at each sample point


def dim(*factors: Factor) -> Dim:
    """A dimension from its factors, outermost first; neighbouring ints are merged and ones dropped."""
    merged: list[Factor] = []
    for f in factors:
        if f == 1:
            continue
        if merged and isinstance(f, int) and isinstance(merged[-1], int):
            merged[-1] = f * merged[-1]
        else:
            merged.append(f)
    return tuple(merged)


class Unshapeable(Exception):
    """A reshape that tears time apart in a way no layout expresses."""


class Grouped(Exception):
    """A reshape that needs every `frames` frames made one first."""

    def __init__(self, frames: int) -> None:
        super().__init__(frames)
        self.frames = frames


@dataclass(frozen=True)
class Layout:
    """A shape with time and batch marked. Prints as ``B*T, 3, 8``."""

    dims: tuple[Dim, ...]

    def __str__(self) -> str:
        return ", ".join("*".join(str(getattr(f, "value", f)) for f in d) or "1" for d in self.dims)

    def __len__(self) -> int:
        return len(self.dims)

    def __iter__(self) -> Iterator[Dim]:
        return iter(self.dims)

    def __getitem__(self, index: int) -> Dim:
        return self.dims[index]

    @property
    def time_dims(self) -> list[int]:
        """The dimensions that hold time (one for a stream)."""
        return [i for i, d in enumerate(self.dims) if TIME in d]

    @property
    def time(self) -> int:
        """The dimension that holds time."""
        (found,) = self.time_dims
        return found

    @property
    def clean(self) -> bool:
        """Whether time has a dimension to itself."""
        return self.dims[self.time] == (TIME,)

    def replace(self, index: int, *new: Dim) -> Layout:
        """This layout with dimension `index` replaced by the dimensions `new` (none, one or more)."""
        index %= len(self.dims)
        return Layout((*self.dims[:index], *new, *self.dims[index + 1 :]))

    def insert(self, index: int, new: Dim = ()) -> Layout:
        """This layout with a dimension put in before `index`."""
        index = index + len(self.dims) + 1 if index < 0 else index
        return Layout((*self.dims[:index], new, *self.dims[index:]))

    def permute(self, order: Sequence[int]) -> Layout:
        """This layout with its dimensions in another order."""
        return Layout(tuple(self.dims[i] for i in order))

    def split(self) -> Layout:
        """This layout with time in a dimension of its own, if need be by parting the one it lies in."""
        if self.clean:
            return self
        d, i = self.dims[self.time], self.dims[self.time].index(TIME)
        return self.replace(self.time, *(part for part in (d[:i], (TIME,), d[i + 1 :]) if part))

    @property
    def paired(self) -> bool:
        """Whether it has an entry for every two frames."""
        return any(KEY in d for d in self.dims)

    @property
    def key(self) -> int:
        """The dimension that holds the second frame of a pair."""
        (found,) = (i for i, d in enumerate(self.dims) if KEY in d)
        return found

    def sizes(self, batch: Any, frames: Any, keys: Any = None) -> list[Any]:
        """The shape for a batch size and a number of frames (anything that can be multiplied); of pairs also of keys,
        if they are not as many."""
        value = {BATCH: batch, TIME: frames, KEY: frames if keys is None else keys}
        return [math.prod(value[f] if isinstance(f, Axis) else f for f in d) for d in self.dims]


def from_sizes(sizes: Sequence[Sizes], batch: Sizes) -> Layout:
    """The layout of a tensor that does not depend on time, from its shape at each sample point."""
    return Layout(tuple(_static_dim(s, batch) for s in sizes))


def _static_dim(size: Sizes, batch: Sizes) -> Dim:
    if len(set(size)) <= 1:
        return dim(size[0])
    if all(s % b == 0 for s, b in zip(size, batch, strict=True)):
        ratios = {s // b for s, b in zip(size, batch, strict=True)}
        if len(ratios) == 1:
            return dim(BATCH, ratios.pop())
    raise Unshapeable(f"a size that is no multiple of the batch: {size}")


def reshape(layout: Layout, target: Sequence[Sizes], batch: Sizes, frames: Sizes) -> Layout:
    """The layout after a row-major reshape to `target` (each size as seen at each sample point).

    Raises:
        Grouped: time is parted into groups of frames; group first, then ask again.
        Unshapeable: time is torn apart otherwise.
    """
    values = {BATCH: batch, TIME: frames, KEY: frames}
    flat = [f for d in layout for f in d]
    ones = (1,) * len(batch)
    dims: list[Dim] = []
    for size in target:
        taken: list[Factor] = []
        rest = tuple(size)
        while rest != ones:
            if not flat:
                raise Unshapeable("sizes do not match")
            factor = flat[0]
            value = values[factor] if isinstance(factor, Axis) else (factor,) * len(rest)
            if all(r % v == 0 for r, v in zip(rest, value, strict=True)):
                taken.append(flat.pop(0))
                rest = tuple(r // v for r, v in zip(rest, value, strict=True))
            elif isinstance(factor, int):
                common = math.gcd(factor, *rest)
                if common == 1:
                    raise Unshapeable("a dimension is parted between others")
                taken.append(common)
                flat[0] = factor // common
                rest = tuple(r // common for r in rest)
            else:
                groups = {divmod(v, r) for r, v in zip(rest, value, strict=True)}
                ((group, left),) = groups if len(groups) == 1 else ((0, 1),)
                if factor is TIME and not left and group > 1:
                    raise Grouped(group)
                raise Unshapeable("time is parted in a way that depends on the clip's length")
        dims.append(dim(*taken))
    if flat:
        raise Unshapeable("sizes do not match")
    return Layout(tuple(dims))
