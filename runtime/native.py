"""Step programs in C whose state stays in rings of their own."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from .resident import Resident

SMALL = 1 << 20  # bytes of constants and state that stay in the caches from step to step
OUTSIDE = "an index among the inputs lies outside of what it chooses from; the stream is where it was"
Result = tuple[tuple[int, ...], torch.dtype]  # the shape and the dtype of an output


@dataclass(frozen=True)
class Ring:
    """How some parts of the state are kept: as frames that go round.

    Attributes:
        parts: their numbers: one for each frame, or one that holds all frames.
        shape: of a part.
        dtype: of its entries.
        axis: the dimension of frames, if one part holds them all. Each frame then lies in two places, `slots` apart.
        frames: how many are kept.
        slots: places for frames: so many more as a step adds.
        order: of a frame's dimensions, the outermost first (`axis` left out).
        margin: for each dimension the zeros before and behind the entries of a frame; none where `axis` is given.
    """

    parts: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int | None
    frames: int
    slots: int
    order: tuple[int, ...]
    margin: tuple[tuple[int, int], ...] = ()

    @property
    def sizes(self) -> list[int]:
        """Those of a frame's dimensions, as they lie, margins included."""
        return [self.shape[d] + (sum(self.margin[d]) if self.margin else 0) for d in self.order]

    @property
    def size(self) -> int:
        """Numbers of a frame."""
        return prod(self.sizes)

    def allocate(self) -> torch.Tensor:
        """Memory for it: ``[places, frame...]``."""
        places = self.slots if self.axis is None else 2 * self.slots
        return torch.zeros([places, *self.sizes], dtype=self.dtype)

    def _window(self, memory: torch.Tensor, start: int) -> torch.Tensor:
        """All frames, in the part's own order of dimensions."""
        assert self.axis is not None
        order = (self.axis, *self.order)
        return memory[start : start + self.frames].permute([order.index(d) for d in range(len(order))])

    def _frame(self, memory: torch.Tensor, place: int) -> torch.Tensor:
        frame = memory[place % self.slots].permute([self.order.index(d) for d in range(len(self.order))])
        for d, (before, _) in enumerate(self.margin):
            frame = frame.narrow(d, before, self.shape[d])
        return frame

    def write(self, memory: torch.Tensor, parts: Sequence[torch.Tensor]) -> None:
        """Put parts at the front of the ring."""
        if self.axis is None:
            for place, part in enumerate(parts):
                self._frame(memory, place).copy_(part)
        else:
            for start in (0, self.slots):
                self._window(memory, start).copy_(parts[0])

    def read(self, memory: torch.Tensor, start: int) -> list[torch.Tensor]:
        """Copies of the parts that begin at a place."""
        if self.axis is not None:
            return [self._window(memory, start).clone(memory_format=torch.contiguous_format)]
        places = range(start, start + self.frames)
        return [self._frame(memory, place).clone(memory_format=torch.contiguous_format) for place in places]


class NativeResidence:
    """The programs of a step in mid-stream, one for each phase, as functions of a shared object, and their state.

    One state at a time lives here: what `step` returns is valid until the second `step` after it.
    """

    def __init__(
        self,
        library: Path,
        results: Sequence[Sequence[Result | None]],
        rings: Sequence[Ring],
        constants: Sequence[torch.Tensor],
        scratch: int,
        frames: int,
    ) -> None:
        """
        Args:
            library: its function ``step_<phase>(pointers, k, frames..., outputs...)`` takes a step from the state whose
                places are those of number `k` (0 or 1) to one at places of the other number. It returns 1 if an
                index lies outside of what it chooses from.
            results: for each phase the outputs; None where nothing is due.
            rings: how state is kept.
            constants: what the functions read.
            scratch: bytes that they need in between.
            frames: how many of them a step takes.
        """
        self.library = ctypes.CDLL(str(library))
        self.rings, self.results, self.constants = tuple(rings), results, constants
        self.at = torch.zeros(2, max(1, len(rings)), dtype=torch.int32)
        self.scratch = torch.zeros(scratch + 64, dtype=torch.uint8)
        self.memory = [ring.allocate() for ring in rings]
        aligned = -(-self.scratch.data_ptr() // 64) * 64
        addresses = [self.at[0].data_ptr(), self.at[1].data_ptr(), aligned]
        addresses += [x.data_ptr() for x in (*self.memory, *constants)]
        self.pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        self.table = ctypes.c_void_p(ctypes.addressof(self.pointers))
        self.runs = [self._function(phase, outputs, frames) for phase, outputs in enumerate(results)]
        self.live: tuple[Resident | None, Resident | None] = None, None
        self.small = sum(x.nbytes for x in (*self.memory, *constants)) <= SMALL

    def load(self, parts: Sequence[torch.Tensor]) -> Resident:
        """Take in a state."""
        self.live = None, None
        self.at.zero_()
        for ring, memory in zip(self.rings, self.memory, strict=True):
            ring.write(memory, [parts[i] for i in ring.parts])
        state = Resident(self, 0)
        self.live = state, None
        return state

    def read(self, state: Resident) -> tuple[torch.Tensor, ...]:
        """Copies of all parts of a state."""
        if not any(state is s for s in self.live):
            raise AssertionError("a state of long ago")
        parts: dict[int, torch.Tensor] = {}
        for ring, memory, start in zip(self.rings, self.memory, self.at[state.place].tolist(), strict=False):
            parts |= zip(ring.parts, ring.read(memory, start), strict=True)
        return tuple(parts[i] for i in sorted(parts))

    def step(self, phase: int, frames: Sequence[torch.Tensor], state: Resident) -> tuple[Sequence[Any], Resident]:
        """The outputs, which are the caller's, and the state after; None where nothing is due.

        Raises:
            IndexError: a frame asks for an entry of a table that is not there; the state is as it was.
        """
        live, k = self.live, state.place
        if state is not live[1] and state is not live[0]:
            raise AssertionError("a state of long ago")
        after = Resident(self, 1 - k)
        self.live = state, after
        return self.runs[phase](k, *frames), after

    def _function(self, phase: int, results: Sequence[Result | None], frames: int) -> Callable[..., Sequence[Any]]:
        """A phase's function in Python: ``(k, frames...) -> outputs``."""
        function, table, empty = getattr(self.library, f"step_{phase}"), self.table, torch.empty_like
        made = [None if r is None else torch.empty(r[0], dtype=r[1]) for r in results]
        given = frames + sum(y is not None for y in made)
        function.restype, function.argtypes = ctypes.c_int, [ctypes.c_void_p, ctypes.c_int, *[ctypes.c_void_p] * given]

        def several(k: int, *frames: torch.Tensor) -> Sequence[Any]:
            lying = [x if x.is_contiguous() else x.contiguous() for x in frames]
            outputs = [None if like is None else empty(like) for like in made]
            if function(table, k, *[x.data_ptr() for x in lying], *[y.data_ptr() for y in outputs if y is not None]):
                raise IndexError(OUTSIDE)
            return outputs

        if frames != 1 or len(made) != 1 or (like := made[0]) is None:
            return several

        def single(k: int, frame: torch.Tensor) -> Sequence[Any]:  # the same, without lists
            if not frame.is_contiguous():
                frame = frame.contiguous()
            output = empty(like)
            if function(table, k, frame.data_ptr(), output.data_ptr()):
                raise IndexError(OUTSIDE)
            return (output,)

        return single
