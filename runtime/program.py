"""Step programs: what a compiled model runs, and what it keeps between calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class StateSpec:
    """One tensor of state.

    Attributes:
        name: its key in ``get_state()``.
        dims: its shape: for each dimension (size per lane, constant size), one of them 0.
        dtype: its dtype.
        holds: what it is, in words.
        grows: the dimension in which it grows with the stream, if it does.
        apart: the dimension along which it is kept frame by frame in mid-stream, if it is.
    """

    name: str
    dims: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    holds: str
    grows: int | None = None
    apart: int | None = None

    def shape(self, batch: int) -> tuple[int, ...]:
        """The shape for a batch size."""
        return tuple(per_lane * batch + constant for per_lane, constant in self.dims)


@dataclass(frozen=True)
class OutputSpan:
    """The frames of an output that a program returns: from index `start` on (as the program counts), so many."""

    start: int
    frames: int


@dataclass(frozen=True)
class Program:
    """A pure function ``(frames..., [count, length,] state...) -> (outputs, state)`` and what its results are.

    Attributes:
        module: the generated GraphModule, to look at and to transform.
        run: the same as a plain function, which is what runs.
        graph, tensors: what runs as a graph, and what its get_attr nodes name.
        outputs: for each output leaf the frames that are returned.
        wants: which of "count" and "length" it takes.
        apart: it takes and returns the histories of large frames frame by frame (`StateSpec.apart`).
    """

    module: Any
    run: Callable[..., Any]
    graph: Any
    tensors: Mapping[str, torch.Tensor]
    outputs: list[OutputSpan]
    wants: tuple[str, ...]
    apart: bool = False


@dataclass(frozen=True)
class Passed:
    """A part of the state after a step that is one of the state before: the part of that number."""

    part: int


@dataclass(frozen=True)
class Made:
    """A part of the state after a step, or an output, that a program computes: its result of that number."""

    number: int
