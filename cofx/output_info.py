"""What a step model tells of each of its outputs."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from .passes.pipeline import Leaf, Plan


@dataclass(frozen=True)
class OutputInfo:
    """What holds for one output of a step model, in input frames (ints where whole).

    Attributes:
        delay: the index of the first step that yields a frame.
        receptive_field: input frames that one output frame depends on; infinite with memory.
        stride: input frames per output frame.
        padding: ``receptive_field - 1 - delay`` (memory left out of the receptive field).
        equivalence: what holds for it (see docs/design.md).
    """

    delay: int | Fraction
    receptive_field: float | int | Fraction
    stride: int | Fraction
    padding: int | Fraction
    equivalence: str

    @classmethod
    def of(cls, plan: Plan, leaf: Leaf) -> OutputInfo:
        """What holds for an output of a plan."""
        about = plan.about(leaf.value)
        if about is None:
            return cls(0, 0, 1, 0, "stream")
        return cls(about.delay, about.receptive_field, about.stride, about.padding, plan.equivalence(leaf))
