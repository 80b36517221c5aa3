"""Step programs in ONNX Runtime whose state stays in ONNX Runtime's buffers.

The state of a program is a row of parts: a frame of a history, or a whole state. Each part lies in a buffer. A step
reads the buffers of all parts and writes what is new into buffers in which no part lies, so that a call that fails has
changed nothing; what it only passes on (an older frame of a history) stays where it is and becomes another part.
Buffers are bound once for each way in which the parts come to lie: the ways recur, as every history goes round in its
buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnxruntime as ort
import torch

from .onnx_buffers import lend
from .onnx_meta import DTYPES
from .program import Made, Passed
from .resident import Resident

WAYS = 512  # bindings that are kept


@dataclass(frozen=True)
class SessionProgram:
    """A step program as a session.

    Attributes:
        session: takes the frames and the parts of the state, gives what is made; None if nothing is.
        results: for each output leaf which of its outputs that is; None where nothing is due.
        after: where each part of the state after comes from.
    """

    session: ort.InferenceSession | None
    results: tuple[Made | None, ...]
    after: tuple[Passed | Made, ...]


@dataclass(frozen=True)
class Room:
    """How a part of the state is kept.

    Attributes:
        part: its shape.
        shape: the same, with a second dimension that may be longer.
        order: the part's dimensions as they lie in memory, the outermost first.
        block: how many entries of what lies second lie together, innermost; that is filled up to a multiple of them.
    """

    part: tuple[int, ...]
    shape: tuple[int, ...]
    order: tuple[int, ...]
    block: int = 1

    @property
    def lying(self) -> list[int]:
        """The shape of its memory, as a session has it."""
        sizes = [self.shape[d] for d in self.order]
        if self.block > 1:
            sizes[1] = -(-sizes[1] // self.block) * self.block
        return sizes

    def write(self, memory: torch.Tensor, part: torch.Tensor) -> None:
        """Put a part there."""
        lying = memory if self.block == 1 else torch.zeros_like(memory)
        self._of(lying).copy_(part)
        if self.block > 1:
            self._blocks(memory).copy_(lying.view(len(lying), -1, self.block, *lying.shape[2:]))

    def read(self, memory: torch.Tensor) -> torch.Tensor:
        """A copy of the part that lies there."""
        lying = memory if self.block == 1 else self._blocks(memory).flatten(1, 2)
        return self._of(lying).clone(memory_format=torch.contiguous_format)

    def _blocks(self, memory: torch.Tensor) -> torch.Tensor:
        """Memory as ``[first, blocks, entries of a block, others...]``."""
        first, second, *others = memory.shape
        blocks = memory.view(first, second // self.block, *others, self.block)
        return blocks.movedim(-1, 2)

    def _of(self, lying: torch.Tensor) -> torch.Tensor:
        """The part in memory without blocks."""
        for dim, size in enumerate(self.shape[d] for d in self.order):
            lying = lying.narrow(dim, 0, size)
        whole = lying.permute([self.order.index(d) for d in range(len(self.order))])
        return whole if whole.shape == self.part else whole.narrow(1, 0, self.part[1])


class SessionResidence:
    """The programs of a step in mid-stream, one for each phase, with the buffers in which they work: a `Residence`.

    Where a state is here: the number of the buffer of each part.
    """

    small = False  # a call of a session takes as long as a small net

    def __init__(
        self,
        programs: Sequence[SessionProgram],
        frames: Sequence[torch.Tensor],
        parts: Sequence[torch.Tensor],
        rooms: Sequence[Room],
        groups: Sequence[int],
    ) -> None:
        """
        Args:
            programs: one for each phase.
            frames: of the shapes and dtypes that the inputs have.
            parts: likewise, of the state.
            rooms: how each part is kept.
            groups: for each part which history or state it belongs to.
        """
        self.programs = programs
        self.frames = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in frames]
        self.frame_values = [lend(x.numpy()) for x in self.frames]
        self.groups = tuple(groups)
        self.buffers: list[tuple[Room, torch.Tensor]] = []
        self.values: list[ort.OrtValue] = []  # of the buffers
        self.rings: dict[int, list[int]] = {}
        for group, part, room in zip(groups, parts, rooms, strict=True):
            self._buffer(group, room, part.dtype)
        last = {group: (room, part.dtype) for group, part, room in zip(groups, parts, rooms, strict=True)}
        for group, kept in last.items():
            new = max(
                sum(isinstance(a, Made) and g == group for a, g in zip(p.after, groups, strict=True)) for p in programs
            )
            for _ in range(new):
                self._buffer(group, *kept)
        self.outputs: dict[tuple[int, int], tuple[torch.Tensor, ort.OrtValue]] = {}
        self.ways: dict[tuple[int, tuple[int, ...]], tuple[ort.IOBinding, tuple[int, ...]]] = {}
        self.live: tuple[Resident | None, Resident | None] = None, None

    def _buffer(self, group: int, room: Room, dtype: torch.dtype) -> None:
        self.rings.setdefault(group, []).append(len(self.buffers))
        memory = torch.zeros(room.lying, dtype=dtype)
        self.buffers.append((room, memory))
        self.values.append(lend(memory.numpy()))

    def load(self, parts: Sequence[torch.Tensor]) -> Resident:
        """Take in a state."""
        places = {group: iter(ring) for group, ring in self.rings.items()}
        at = tuple(next(places[g]) for g in self.groups)
        for i, part in zip(at, parts, strict=True):
            room, memory = self.buffers[i]
            room.write(memory, part)
        state = Resident(self, at)
        self.live = state, None
        return state

    def read(self, state: Resident) -> tuple[torch.Tensor, ...]:
        """Copies of all parts of a state."""
        if not any(state is s for s in self.live):
            raise AssertionError("a state of long ago")
        return tuple(room.read(memory) for room, memory in (self.buffers[i] for i in state.place))

    def step(self, phase: int, frames: Sequence[torch.Tensor], state: Resident) -> tuple[list[Any], Resident]:
        """The outputs, which are the caller's, and the state after; None where nothing is due."""
        program = self.programs[phase]
        if program.session is None:
            return [None] * len(program.results), state
        way = self.ways.get((phase, state.place)) or self._way(program.session, phase, state.place)
        for mine, given in zip(self.frames, frames, strict=True):
            mine.copy_(given)
        after = Resident(self, way[1])
        self.live = state, after
        program.session.run_with_iobinding(way[0])
        outputs = [None if r is None else self.outputs[phase, r.number][0].clone() for r in program.results]
        return outputs, after

    def _way(
        self, session: ort.InferenceSession, phase: int, at: tuple[int, ...]
    ) -> tuple[ort.IOBinding, tuple[int, ...]]:
        """The binding for parts that lie like this, and where they lie after it."""
        program = self.programs[phase]
        after = self._after(program, at)
        binding = session.io_binding()
        given = [*self.frame_values, *(self.values[i] for i in at)]
        for argument, value in zip(session.get_inputs(), given, strict=True):
            binding.bind_ortvalue_input(argument.name, value)
        written = {a.number: self.values[i] for a, i in zip(program.after, after, strict=True) if isinstance(a, Made)}
        for number, made in enumerate(session.get_outputs()):
            if number not in written:
                if (phase, number) not in self.outputs:
                    held = torch.zeros([int(n) for n in made.shape], dtype=getattr(torch, DTYPES[made.type]))
                    self.outputs[phase, number] = held, lend(held.numpy())
                written[number] = self.outputs[phase, number][1]
            binding.bind_ortvalue_output(made.name, written[number])
        if len(self.ways) >= WAYS:
            del self.ways[next(iter(self.ways))]
        way = self.ways[phase, at] = binding, after
        return way

    def _after(self, program: SessionProgram, at: tuple[int, ...]) -> tuple[int, ...]:
        """Where the parts lie after a step: what is new goes on round the ring of its history."""
        used = set(at)
        newest = dict(zip(self.groups, at, strict=True))
        after = []
        for source, group in zip(program.after, self.groups, strict=True):
            if isinstance(source, Passed):
                after.append(at[source.part])
                continue
            ring = self.rings[group]
            place = ring.index(newest[group])
            free = next(i for i in (*ring[place + 1 :], *ring[: place + 1]) if i not in used)
            used.add(free)
            newest[group] = free
            after.append(free)
        return tuple(after)
