"""Streams that share a batch: each lane begins, pauses, ends and is reset at random, beside lanes full of NaN.

`check_lanes` walks such a batch through anything that takes ``(chunks, start, ready, length)`` and returns the outputs
and their validity, and holds every lane's frames against those of the same stream run alone.
"""

import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import cofx
from models.sample import Sample
from streaming import Case, Run, difference, require, same

Leaves = list[Tensor]
Call = Callable[[list[Tensor], list[bool], list[bool], list[int]], tuple[Leaves, Leaves]]


@dataclass
class Stream:
    """One stream: what is fed, what it gives when run alone, and what came out of its lane."""

    clips: Sequence[Tensor]
    steps: int
    wanted: list[Leaves]
    poison: bool
    fed: int = 0
    told: bool = False
    idle: int = 0
    stop: int | None = None  # reset after so many steps
    got: list[Leaves] = field(default_factory=list)


class Batch:
    """Random streams in the lanes of one batch."""

    def __init__(
        self,
        sample: Sample,
        lanes: int,
        seed: int,
        same: Callable[[Tensor, Tensor], bool] = same,
        offline: bool = False,
    ) -> None:
        """`offline`: streams are held against the offline net, if it streams: quicker than to run each alone."""
        self.sample, self.lanes, self.rng, self.same = sample, lanes, random.Random(f"{sample.name}{seed}"), same
        model = sample.model()
        example = tuple(sample.inputs(sample.clip_length, seed=9, batch=1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.alone = cofx.compile(model, example, time_dim=sample.time_dim, **sample.options)
        self.case = Case(sample, self.alone, model)
        self.case.kinds = [o.equivalence for o in self.alone.outputs]  # of a batch of one, which may be another
        self.offline = offline and set(self.case.kinds) == {"stream"}
        self.splitter = Run(self.case, example)
        self.period = self.alone.compiled.plan.schedule.period
        self.streams: list[Stream] = [self.stream() for _ in range(lanes)]
        self.fresh = [True] * lanes
        self.compared = 0
        shapes = [[o.shape for o in pytree.tree_leaves(model(*sample.inputs(sample.clip_length, batch=b)))]
                  for b in (2, 3)]  # fmt: skip
        self.axes = [next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), None)
                     for x, y in zip(*shapes, strict=True)]  # fmt: skip

    def stream(self) -> Stream:
        sample, rng = self.sample, self.rng
        least = rng.choice((1, sample.clip_length))
        for steps in (sample.whole(rng.randint(least, sample.length)), sample.length):
            clips = sample.inputs(steps, seed=rng.randrange(10**6), batch=1)
            self.alone.clean_state()
            try:
                if self.offline:
                    out = self.case.model(*clips)
                    break
                out = self.alone.forward_steps(*clips, pad_end=True)
                if len(self.case.streams) == len(self.case.kinds):
                    self.case.model(*clips)
                break
            except (cofx.InputError, RuntimeError, IndexError):  # the model does not take this length
                if steps == sample.length:
                    raise
        leaves = [None] * len(self.case.kinds) if out is None else pytree.tree_leaves(out, is_leaf=lambda x: x is None)
        wanted = [[] if leaf is None else self.splitter.split(leaf, i, "alone") for i, leaf in enumerate(leaves)]
        made = Stream(clips, steps, wanted, poison=rng.random() < 0.15)
        made.got = [[] for _ in wanted]
        if rng.random() < 0.2:
            made.stop = rng.randint(1, steps)
        if made.poison:
            for clip in clips:
                _spoil(clip, rng.choice((math.nan, math.inf)))
        return made

    def run(self, call: Call, calls: int, sizes: Sequence[int] = (1, 1, 2)) -> None:
        """So many calls, of 1 or 2 periods each."""
        for number in range(calls):
            self.one(call, self.period * self.rng.choice(sizes), number)

    def one(self, call: Call, ticks: int, number: int) -> None:
        rng, sample = self.rng, self.sample
        start, ready, length, parts = [], [], [], []
        for lane in range(self.lanes):
            s = self.streams[lane]
            over = s.fed >= s.steps + ticks and all(len(g) >= len(w) for g, w in zip(s.got, s.wanted, strict=True))
            if (s.stop is not None and s.fed >= s.stop) or s.idle > 3 * sample.length or (over and rng.random() < 0.8):
                self.finished(lane, s)
                s = self.streams[lane] = self.stream()
                self.fresh[lane] = True
            go = rng.random() < 0.75
            take = max(0, min(ticks, s.steps - s.fed))
            begins = self.fresh[lane] and (number > 0 or rng.random() < 0.5)  # zeros are a fresh lane
            tell = s.fed + ticks >= s.steps or rng.random() < 0.1
            ready.append(go)
            start.append((begins and go) or (not go and rng.random() < 0.3))
            length.append(s.steps if tell or (s.told and rng.random() < 0.5) else -1)
            chunk = sample.chunk(s.clips, min(s.fed, s.steps), min(s.fed, s.steps) + take) if go else []
            parts.append(self.padded(s, chunk, ticks, go))
            if go:
                self.fresh[lane] = False
                s.fed, s.told = s.fed + ticks, s.told or tell
                s.idle += take == 0
        dims = [sample.batch_dim] * len(sample.input_shapes)
        chunks = [torch.cat(tensors, d or 0) for tensors, d in zip(zip(*parts, strict=True), dims, strict=True)]
        outputs, valid = call(chunks, start, ready, length)
        for i, (y, v) in enumerate(zip(outputs, valid, strict=True)):
            self.collect(i, y, v, ready, number)

    def padded(self, s: Stream, chunk: Sequence[Tensor], ticks: int, go: bool) -> list[Tensor]:
        """A chunk filled up with garbage: behind the end of a stream, or where the lane is held."""
        out = []
        template = self.sample.inputs(ticks, batch=1)
        for i, (x, d) in enumerate(zip(template, self.sample.time_dims, strict=True)):
            if not go:
                x = x.clone()
                _spoil(x, math.nan, 10**9)
            elif d is None:
                x = s.clips[i]
            else:
                x = x.clone()
                _spoil(x, math.nan)
                if chunk[i].shape[d]:
                    x.narrow(d, 0, chunk[i].shape[d]).copy_(chunk[i])
            out.append(x)
        return out

    def collect(self, i: int, y: Tensor, valid: Tensor, ready: list[bool], number: int) -> None:
        """Take the valid frames of an output to their streams, and compare each."""
        label = f"{self.sample.name}, call {number}, output {i}"
        require(valid.dtype == torch.bool and valid.shape[0] == self.lanes, f"{label}: valid {tuple(valid.shape)}")
        axis = self.axes[i]
        frames = self.splitter.split(y, i, label)
        if valid.dim() == 1:
            require(len(frames) == 1, f"{label}: {len(frames)} frames, valid {tuple(valid.shape)}")
            valid = valid.unsqueeze(1)
        require(valid.shape[1] == len(frames), f"{label}: {len(frames)} frames, valid {tuple(valid.shape)}")
        time = self.case.time_dims[i]
        dropped = frames[0].dim() < self.case.example[0][i].dim()
        if dropped and axis is not None and time is not None and time < axis:
            axis -= 1
        for lane, s in enumerate(self.streams):
            for j, frame in enumerate(frames):
                if not valid[lane, j]:
                    continue
                require(ready[lane], f"{label}: lane {lane} is held and gave a frame")
                frame = frame if axis is None else frame.narrow(axis, lane, 1)
                n = len(s.got[i])
                s.got[i].append(frame)
                if time is None and self.case.kinds[i] == "stream":  # it does not depend on time
                    continue
                require(n < len(s.wanted[i]), f"{label}: lane {lane} gave {n + 1} frames of {len(s.wanted[i])}")
                want = s.wanted[i][n]
                ok = s.poison or self.same(frame, want)
                require(ok, f"{label}: lane {lane}, its frame {n} {difference(frame, want)}")
                self.compared += not s.poison

    def finished(self, lane: int, s: Stream) -> None:
        if s.stop is not None:
            return
        for i, (got, want) in enumerate(zip(s.got, s.wanted, strict=True)):
            if self.case.time_dims[i] is None and self.case.kinds[i] == "stream":
                continue
            require(
                len(got) == len(want), f"{self.sample.name}: lane {lane}, output {i} gave {len(got)} of {len(want)}"
            )


def _spoil(tensor: Tensor, number: float, whole: int = 0) -> None:
    if tensor.is_floating_point():
        tensor.fill_(number)
    else:
        tensor.fill_(whole)


def step_call(step: Any, sample: Sample, period: int) -> Call:
    """Lane calls of a PyTorch step model: by frames where it can, else by chunks."""
    count = 0

    def call(chunks: list[Tensor], start: list[bool], ready: list[bool], length: list[int]) -> tuple[Leaves, Leaves]:
        nonlocal count
        count += 1
        lanes = {"start": torch.tensor(start), "ready": ready, "length": torch.tensor(length)}
        if period == 1 and sample.steps(chunks) == 1 and count % 2:
            y, valid = step.forward_step(*sample.frames(chunks, 0), **lanes)
        else:
            y, valid = step.forward_steps(*chunks, **lanes)
        return pytree.tree_leaves(y), pytree.tree_leaves(valid)

    return call
