"""Whether the model does at other lengths what it did where it was traced.

A branch in Python on the clip's length leaves no mark in a trace. The trace tells at which lengths it can be relied on
(`Capture.assumed`); elsewhere the model is run on fake tensors, which computes nothing, and what it calls is compared:
every call of torch with the way through the code that led to it, and the numbers that it was given. Numbers that grow
with the length are left out, and those of a loop over frames, which is called as often as there are frames.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .assertions import truth_without_error
from .capture import CONGRUENT, Capture, Clock
from .drop_caches import Kept, dropped
from .errors import is_users, line_of
from .fake_run import on_fake_tensors
from .leave_as_found import tensor_leaves

# how far ahead one looks for numbers that follow the length: by a multiple of all strides, so that nothing is rounded,
# by a clip or half of one, or less far (behind, at last) where a table ends or frames are looped over
FOLLOWED, NEARBY = (11520, 60, 12), (4, 2, 1, -1, -2, -4)
KEPT_RUNS = 64
MORE_CALLS = 4  # a run with so many times the calls of the traced one is not seen to its end
# how far ahead a trace with open length is looked at, in steps of `CONGRUENT` ticks
AHEAD = (1, 3, 10, 30, 100, 300, 1000)
AHEAD_FIXED = (2, 16, 512)  # one with a fixed length, in lengths of the trace: each is a run

Place = tuple[Any, ...]
Numbers = tuple[float | str, ...]
Line = tuple[str, int, str]  # file, number, function


@dataclass
class Run:
    """What the model did at one length.

    Attributes:
        calls: the numbers that torch was called with, by place; each with the user's line.
        counts: how many calls there were, by place.
        shapes: of the outputs.
        cut: it was not seen to its end.
    """

    calls: dict[Place, dict[Numbers, Line | None]] = field(default_factory=dict)
    counts: Counter[Place] = field(default_factory=Counter)
    shapes: list[torch.Size] = field(default_factory=list)
    cut: bool = False


class Runs:
    """Runs of a model on fake tensors, at the batch size of its trace."""

    def __init__(
        self, model: nn.Module, captured: Capture, clock: Clock, example: Sequence[torch.Tensor], loops: bool = False
    ) -> None:
        """`loops`: loops over frames were found in the trace and rolled up."""
        self.model, self.captured, self.clock = model, captured, clock
        self.like = [(tuple(x.shape), x.dtype, x.device) for x in example]
        self.seen: dict[int, Run | None] = {}
        self.traced, self.loops = captured.points[0].ticks, loops
        self.without: Sequence[Kept] = ()  # what the model kept from earlier calls, and is run without
        self._reference: tuple[Run, set[Place]] | None = None

    def at(self, ticks: int) -> Run | None:
        """The run at a length; None if the model cannot be run there, or not on fake tensors."""
        if ticks not in self.seen:
            if len(self.seen) >= KEPT_RUNS:
                del self.seen[next(iter(self.seen))]
            self.seen[ticks] = self._run(ticks)
        return self.seen[ticks]

    def _run(self, ticks: int) -> Run | None:
        if any(isinstance(m, torch.jit.ScriptModule) for m in self.model.modules()):
            return None  # its calls do not pass through Python
        run = Run()
        try:
            reference = self.seen.get(self.traced)
            most = MORE_CALLS * (1 + reference.counts.total()) if reference else None
            with dropped(self.without), on_fake_tensors(self.model):
                inputs = [
                    torch.empty(s, dtype=d, device=v)
                    for s, (_, d, v) in zip(self._sizes(ticks), self.like, strict=True)
                ]
                with _Recorder(run, most, {id(m) for m in self.model.modules()}):
                    outputs = self.model(*inputs)
        except _TooMany:
            run.cut = True
            return run
        except Exception:
            return None
        run.shapes = [x.shape for x in tensor_leaves(outputs)]
        return run

    def _sizes(self, ticks: int) -> Iterator[list[int]]:
        axes = zip(self.like, self.clock.time_dims, self.clock.batch_dims, self.clock.frames, strict=True)
        for (shape, _, _), t, b, frames in axes:
            size = list(shape)
            if t is not None:
                size[t] = ticks * frames
            if b is not None:
                size[b] = self.captured.points[0].batch
            yield size

    def otherwise(self, ticks: int) -> str | None:
        """The user's line at which the model does otherwise at this length than where it was traced, or None."""
        reference, run = self._traced(), self.at(ticks)
        if reference is None or run is None:
            return None
        base, moving = reference
        pairs = [(run, base)] if run.cut else [(run, base), (base, run)]
        for line in itertools.chain(*(_missing(a, b, m) for m in (None, moving) for a, b in pairs)):
            return line_of(*line) if line is not None else "(unknown line)"
        return None

    def _traced(self) -> tuple[Run, set[Place]] | None:
        """The run at the traced length, and the places whose numbers follow the length."""
        if self._reference is None:
            base = self.at(self.traced)
            if base is None:
                return None
            moving: set[Place] = set()
            steps = (*FOLLOWED, self.traced, (self.traced + 1) // 2, *NEARBY)
            for ahead in (CONGRUENT, *steps) if self.captured.symbolic_time else steps:
                if self.loops and self.traced + 3 * ahead > MORE_CALLS * self.traced:
                    continue  # it would not be seen to its end
                far = self.at(self.traced + ahead)
                farther = self.at(self.traced + 3 * ahead) if far is not None and not far.cut else None
                if far is None or farther is None or farther.cut:
                    continue
                for place in base.calls.keys() & far.calls.keys() & farther.calls.keys():
                    seen = [list(run.calls[place]) for run in (base, far, farther)]
                    calls, more, most = (run.counts[place] for run in (base, far, farther))
                    loops = self.loops and more > calls and most - calls == 3 * (more - calls)
                    if loops or (seen[0] != seen[1] and _follow(*seen)):
                        moving.add(place)
                break
            self._reference = base, moving
        return self._reference

    def one_length(self) -> bool:
        """Whether the model can be run where it was traced and at none of the lengths around (an exported program)."""
        t = self.traced
        others = {t + d for n in (1, 2, 4, 8, 16, 32, t // 2) for d in (n, -n)} | {2 * t}
        return self.at(t) is not None and not any(self.at(n) for n in sorted(others) if n > 0 and n != t)

    def limit(self) -> tuple[int, str | None] | None:
        """The last length up to which the model does as it was traced, and the line at which it then does otherwise
        (None: it cannot be run there).

        Only lengths that lie a multiple of some step beyond the traced one are looked at, so that a model that takes
        none but even lengths, say, is not asked for others.
        """
        base = self.traced
        if self.captured.symbolic_time:
            ahead = [base + CONGRUENT * k for k in AHEAD]
        else:
            ahead = [base * k for k in AHEAD_FIXED]
        good = base
        for far in ahead:
            if self._agrees(far):
                good = far
                if (run := self.seen.get(far)) is not None and run.cut:
                    return None  # as those further ahead would be
                continue
            step = next((d for d in (1, 2, 4, 8, 16, 32) if self._agrees(base + d)), base)
            low, high = (good - base) // step, -((base - far) // step)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self._agrees(base + middle * step) else (low, middle)
            return base + low * step, self.otherwise(base + high * step)
        return None

    def _agrees(self, ticks: int) -> bool:
        """Whether the model does at this length what it did where it was traced, as far as can be told."""
        if self.captured.assumed(ticks) or self.at(self.traced) is None:
            return True
        return self.at(ticks) is not None and self.otherwise(ticks) is None


def _missing(run: Run, other: Run, moving: set[Place] | None) -> Iterator[Line | None]:
    """Lines of calls that the other run does not have; of places that both have only where numbers must be the same."""
    for place, calls in run.calls.items():
        there = other.calls.get(place)
        if there is None:
            yield from calls.values()
        elif moving is not None and place not in moving:
            yield from (line for numbers, line in calls.items() if numbers not in there)
            if run.counts[place] > other.counts[place]:
                yield next(iter(calls.values()))


class _TooMany(Exception):
    """A loop that grows with the length."""


class _Recorder(TorchFunctionMode):
    """Writes down each call of torch, up to so many; `modules`: the identities of the model's own."""

    def __init__(self, run: Run, most: int | None, modules: set[int]) -> None:
        super().__init__()
        self.run, self.most, self.modules = run, most, modules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "__get__":
            place, line = _place(sys._getframe(1), self.modules)
            self.run.calls.setdefault((func, place), {})[tuple(_numbers((args, kwargs)))] = line
            self.run.counts[(func, place)] += 1
            if self.most is not None and self.run.counts.total() > self.most:
                raise _TooMany
        if (holds := truth_without_error(func)) is not None:
            return holds
        return func(*args, **kwargs)


def _numbers(args: Any) -> Iterator[float | str]:
    """What a call was given beside tensors."""
    for x in pytree.tree_leaves(args):
        if isinstance(x, slice):
            yield from _numbers((x.start, x.stop, x.step))
        elif not isinstance(x, torch.Tensor):
            yield x if type(x) is int or (type(x) is float and math.isfinite(x)) else str(x)


def _follow(base: list[Numbers], far: list[Numbers], farther: list[Numbers]) -> bool:
    """Whether numbers grow with the length: three times as much where that has grown three times as much."""
    if not len(base) == len(far) == len(farther):
        return False
    triples = [t for calls in zip(base, far, farther, strict=True) for t in itertools.zip_longest(*calls)]
    return all(a == b == c or _grows(a, b, c) for a, b, c in triples)


def _grows(a: Any, b: Any, c: Any) -> bool:
    if not all(isinstance(x, (int, float)) for x in (a, b, c)):
        return False
    more, most = b - a, c - a
    return bool(most == 3 * more or (isinstance(most, float) and math.isclose(most, 3 * more)))


def _place(frame: FrameType | None, modules: set[int]) -> tuple[Place, Line | None]:
    """The way through the code to this frame, and the innermost line of it that is the user's."""
    way: list[Any] = []
    line: Line | None = None
    while frame is not None and frame.f_code is not Runs._run.__code__:
        code = frame.f_code
        if code.co_filename == "<string>":  # written by the program itself, perhaps for each length anew
            frame = frame.f_back
            continue
        owner = frame.f_locals.get("self") if "self" in code.co_varnames[:1] else None
        way += (code, frame.f_lasti, id(owner) if id(owner) in modules else None)  # others are made for each call
        if line is None and is_users(code.co_filename):
            line = code.co_filename, frame.f_lineno, code.co_name
        frame = frame.f_back
    return tuple(way), line
