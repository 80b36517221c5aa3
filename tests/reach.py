"""Delay and receptive field as measured: change one frame of a clip and see which output frames of the module move."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from models.sample import Sample
from streaming import Case, same

Frames = tuple[Tensor, ...]


@dataclass
class Reach:
    """Of each frame of one output: the first and the last step it depends on, and the step that makes it certain."""

    first: list[int]
    last: list[int]
    certain: list[int]

    def due(self, rate: Fraction) -> list[int]:
        """The earliest step at which each frame is fixed and sure to exist.

        Frames come in order, and at an even rate: those at the start that depend on no input are not pulled ahead.
        """
        steps = [max(0, a, b) for a, b in zip(self.last, self.certain, strict=True)]
        fixed = next((j for j, last in enumerate(self.last) if last >= 0), 0)
        for j in range(fixed):
            steps[j] = max(steps[j], steps[fixed] - math.floor((fixed - j) / rate))
        return [max(steps[: j + 1]) for j in range(len(steps))]

    def span(self) -> int:
        """The most steps that one frame depends on, those between included."""
        return max((b - a + 1 for a, b in zip(self.first, self.last, strict=True) if b >= 0), default=0)


def measure_reach(case: Case, steps: int, draws: int = 3) -> list[Reach]:
    """The reach of each streamed output in a clip of so many steps."""
    if not case.streams:
        return []
    sample, batch = case.sample, max(4, case.sample.batch)
    clips = sample.inputs(steps, batch=batch)
    base = split_outputs(case, clips)
    reaches = [Reach([steps] * len(frames), [-1] * len(frames), [-1] * len(frames)) for frames in base]
    for seed in range(1, draws + 1):  # one value may not show in a maximum or behind an activation
        other = sample.inputs(steps, seed=seed, batch=batch, scale=4.0)
        for t in range(steps):
            moved = split_outputs(case, exchange_step(sample, clips, other, t))
            for reach, before, after in zip(reaches, base, moved, strict=True):
                for j in (j for j in range(len(before)) if not torch.equal(before[j], after[j])):
                    reach.first[j], reach.last[j] = min(reach.first[j], t), max(reach.last[j], t)
    mark_certain(case, clips, base, reaches)
    return reaches


def split_outputs(case: Case, clips: Sequence[Tensor]) -> list[Frames]:
    """Frames of the streamed outputs."""
    outputs = case.offline(clips)
    return [outputs[i].unbind(case.time_dims[i]) for i in case.streams]


def exchange_step(sample: Sample, clips: Sequence[Tensor], other: Sequence[Tensor], t: int) -> list[Tensor]:
    """The clips with step t taken from others."""
    mixed = [clip.clone() for clip in clips]
    for clip, source, d, r in zip(mixed, other, sample.time_dims, sample.rates, strict=True):
        if d is not None:
            clip.narrow(d, t * r, r).copy_(source.narrow(d, t * r, r))
    return mixed


def mark_certain(case: Case, clips: Sequence[Tensor], base: list[Frames], reaches: list[Reach]) -> None:
    """A frame is certain when every longer clip has it, and with this value: the length alone may change what is there.

    Before the first length at which the module runs nothing is certain. Later lengths at which it does not run say
    nothing; a frame may come at the next one at which it does.
    """
    steps, shorter = case.sample.steps(clips), {}
    for n in range(1, case.sample.steps(clips) + 1):
        try:
            shorter[n] = split_outputs(case, case.sample.chunk(clips, 0, n))
        except (RuntimeError, IndexError, ValueError):
            continue
    for i, (reach, frames) in enumerate(zip(reaches, base, strict=True)):
        for j, frame in enumerate(frames):
            there = {n: outputs[i][j] for n, outputs in shorter.items() if len(outputs[i]) > j}
            missing = max(shorter.keys() - there.keys(), default=min(shorter, default=steps) - 1)
            differs = max((n for n, value in there.items() if not same(value, frame)), default=-1)
            exists = min((n for n in shorter if n > missing), default=steps) - 1
            reach.certain[j] = max(exists, differs)
