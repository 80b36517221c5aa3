"""How a step model's arrays look to whoever gathers the frames of many streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LaneAxes:
    """An input: its shape for one lane without the batch dimension, its batch and time dimensions, frames per tick."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    batch: int | None
    time: int | None
    rate: int


@dataclass(frozen=True)
class LaneLayout:
    """What `LanePool` needs to know of a step model.

    Attributes:
        ticks: that a call takes.
        inputs: how they look.
        outputs: the batch and time dimensions of each output leaf, as ``forward_steps`` gives it with lanes.
        flush_calls: after the call with a stream's last frame, calls until its last output at the most.
        blank: empty frames of one call for so many lanes.
        call: runs them, with `start`, `ready` and `length`; keeps nothing for gradients.
        kind: of its arrays.
        copy: an array of its own.
        place: where the streams are: an object that is another one after each call that moves them.
        mark: gives what takes the streams back to where they are now, after one call at the most.
    """

    ticks: int
    inputs: list[LaneAxes]
    outputs: list[tuple[int | None, int | None]]
    flush_calls: int
    blank: Callable[[int], list[Any]]
    call: Callable[..., Any]
    kind: type
    copy: Callable[[Any], Any]
    place: Callable[[], object]
    mark: Callable[[], Callable[[], None]]
