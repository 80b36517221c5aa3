"""Which step program: what a program takes for granted of the place in the stream at which it runs."""

from __future__ import annotations

from dataclasses import dataclass

FOREVER = 1 << 40  # a stream's length in ticks as long as it has not ended


@dataclass(frozen=True)
class Key:
    """Which program: where in the period it starts, how many ticks it takes, and what it may take for granted.

    Attributes:
        phase: ticks before it, modulo the period.
        ticks: ticks that it takes.
        masked: windows may reach outside of their values.
        first: it is the first of the stream, and makes the frames that need no input too.
        holding: sequential ops may not have come to their first frame.
        frames: inputs and outputs come without time axis.
        folded: what depends on parameters alone is a constant.
        capacity: ticks for which there is room in the state of values that are kept from their beginning on.
        endless: the stream does not end, so that windows reach outside at its start alone.
        apart: histories of large frames come and go frame by frame, see frames.py.
        kernels: it may call kernels that are torch's alone, see kernels.py.
        idle: no evaluation of a clip falls due, so that none is made.
    """

    phase: int
    ticks: int
    masked: bool = False
    first: bool = False
    holding: bool = False
    frames: bool = False
    folded: bool = True
    capacity: int = 0
    endless: bool = False
    apart: bool = False
    kernels: bool = True
    idle: bool = False
