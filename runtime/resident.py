"""State that stays in the buffers of a backend, from one step in mid-stream to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Residence(Protocol):
    """The programs of a step in mid-stream, one for each phase, with the buffers in which they work.

    The state of a program is a row of parts: a frame of a history, or a whole state. One stream at a time lives here.
    A step writes beside the state, never over it, so that a call that fails, or whose result is not kept, has changed
    nothing: what `step` returns is valid until the second `step` after it.

    Attributes:
        small: a step takes less time than several of them save as one program.
    """

    small: bool

    def load(self, parts: Sequence[torch.Tensor]) -> Resident:
        """Take in a state."""

    def read(self, state: Resident) -> tuple[torch.Tensor, ...]:
        """Copies of all parts of a state."""

    def step(self, phase: int, frames: Sequence[torch.Tensor], state: Resident) -> tuple[Sequence[Any], Resident]:
        """The outputs, which are the caller's, and the state after; None where nothing is due."""


class Resident:
    """The state of a stream in a backend's buffers.

    Attributes:
        home: whose buffers.
        place: where in them, as `home` tells it.
    """

    __slots__ = ("home", "place")

    def __init__(self, home: Residence, place: Any) -> None:
        self.home, self.place = home, place

    def parts(self) -> tuple[torch.Tensor, ...]:
        """Copies of all parts."""
        return self.home.read(self)
