"""Pass 5: when each frame is computed, and which frames are kept.

An output frame is due when its taps are there and it is sure to exist: ``A_out = min(taps, length(n))``. Each op runs
as soon as it can, or as much later as place_delays.py says; a value that is needed again later has one history, shared
by all that read it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .stream_graph import Op, Read, Rounded, StreamGraph, Value, View


@dataclass(frozen=True)
class Count:
    """Frames after n ticks: `available` so far, and the `length` if the input ended now."""

    available: dict[Value, int]
    length: dict[Value, int]


class Counter:
    """Counts frames after n ticks; unclamped, so negative counts stand for garbage before the start.

    With `waiting`, frames that need no input (padding beyond the kernel's reach) wait for the first tick, so that no
    count is above what the rate gives.
    """

    def __init__(self, graph: StreamGraph, waiting: bool = False) -> None:
        self.graph, self.waiting = graph, waiting
        self._cache: dict[int, Count] = {}

    def at(self, n: int) -> Count:
        """The counts after `n` ticks."""
        if n not in self._cache:
            self._cache[n] = Count(*self._count(n))
        return self._cache[n]

    def _count(self, n: int) -> tuple[dict[Value, int], dict[Value, int]]:
        length: dict[Value, int] = {}
        for v in self.graph.values:
            length[v] = v.length(*(length[s] for s in v.length_sources)) if v.length_sources else v.length(n)
        available = {v: length[v] for v in self.graph.inputs}
        for op in self.graph.ops:
            ready = [
                r.ready_taps.ready(min([available[r.source], *(length[v] + shift for v, shift in r.through)]))
                for r in op.reads
            ]
            for v in op.outputs:
                available[v] = min([length[v], *ready, *([math.floor(v.rate * n)] if self.waiting else [])])
        for op in self.graph.ops:
            for v in op.outputs:
                available[v] -= op.late
        for v in self.graph.values:
            if isinstance(v.producer, View) and v.producer.source in available:
                available[v] = min(length[v], available[v.producer.source] - v.producer.offset)
        return available, length


@dataclass
class Schedule:
    """Everything about time in a compiled model.

    Attributes:
        graph: the live ops, in order.
        outputs: the values that the model returns (None: a static output).
        period: S; steps n and n + S do the same work.
        history: frames of each value that are kept between calls.
        growing: values of which all frames are kept: for each reader its result, and how many frames more than that.
        settled: ticks after which no mask at the start is needed any more.
        sequential_from: ticks after which every sequential op has come to its first frame.
    """

    graph: StreamGraph
    outputs: list[Value | None]
    period: int
    history: dict[Value, int]
    growing: dict[Value, list[tuple[Value, int]]]
    settled: int
    sequential_from: int
    counter: Counter

    def counts(self, n: int) -> dict[Value, int]:
        """Frames of every value after `n` ticks."""
        cycles, phase = divmod(n, self.period)
        at = self.counter.at(phase).available
        return {v: a + int(v.rate * self.period) * cycles for v, a in at.items()} if cycles else at

    def count(self, value: Value, n: int) -> int:
        """Frames of one value after `n` ticks."""
        cycles, phase = divmod(n, self.period)
        return self.counter.at(phase).available[value] + int(value.rate * self.period) * cycles

    def kept(self, value: Value, capacity: int) -> int:
        """Frames of a value that are kept between calls, in a state that is made for streams of so many ticks."""
        return max(
            [self.history.get(value, 0), *(self.length(v, capacity) + m for v, m in self.growing.get(value, []))]
        )

    def work(self, phase: int, ticks: int) -> tuple[Any, ...]:
        """What a program without masks does that takes so many ticks from a phase on: with equal work, it is the same.

        For each op the frames that it makes, and where the frames that it reads lie among those that there are.
        """
        before, after = self.counts(phase), self.counts(phase + ticks)
        done: list[Any] = []
        for op in self.graph.ops:
            start, stop = before[op.outputs[0]], after[op.outputs[0]]
            done.append(max(stop - start, 0))
            if stop > start:
                done.append(start % self.upsampled)
                done += [
                    (r.taps.lo(start) - before[r.source], r.taps.hi(stop - 1) - before[r.source]) for r in op.reads
                ]
        return *done, *(max(after[v] - before[v], 0) for v in self.graph.inputs)

    @functools.cached_property
    def upsampled(self) -> int:
        """The least number by which frames can be counted on so that all upsampling begins anew."""
        return math.lcm(1, *(r.taps.up for op in self.graph.ops for r in op.reads))

    def length(self, value: Value, n: int) -> int:
        """Frames of one value if the stream ends after `n` ticks."""
        cycles, phase = divmod(n, self.period)
        return self.counter.at(phase).length[value] + int(value.rate * self.period) * cycles


def schedule_delays(graph: StreamGraph, outputs: Sequence[Value | None], waiting: bool = False) -> Schedule:
    """Drop what no output needs, then settle counts and histories (`waiting`: see `Counter`)."""
    live = _live(graph, outputs)
    period = phases(graph, outputs)
    graph.ops = [op for op in graph.ops if op in live]
    counter = Counter(graph, waiting)
    values = [v for op in graph.ops for v in op.outputs] + graph.inputs
    schedule = Schedule(graph, list(outputs), period, {}, {}, 0, 0, counter)
    schedule.history, schedule.growing = _histories(schedule, values)
    schedule.settled, schedule.sequential_from = _settled(schedule)
    return schedule


def phases(graph: StreamGraph, outputs: Sequence[Value | None]) -> int:
    """The period: after so many ticks the same is done again."""
    live = _live(graph, outputs)
    values = [v for op in graph.ops if op in live for v in op.outputs] + graph.inputs
    steps = [
        (v.length.multiple / s.rate).numerator
        for v in graph.values
        if isinstance(v.length, Rounded)
        for s in v.length_sources
    ]
    return math.lcm(*(v.rate.denominator for v in values), *steps)


def _live(graph: StreamGraph, outputs: Sequence[Value | None]) -> set[Op]:
    queue = [v for v in outputs if v is not None]
    seen: set[Value] = set()
    live: set[Op] = set()
    while queue:
        value = queue.pop()
        if value in seen:
            continue
        seen.add(value)
        if isinstance(value.producer, View):
            queue.append(value.producer.source)
        elif value.producer is not None:
            live.add(value.producer)
            queue.extend(r.source for r in value.producer.reads)
    return live


def _histories(
    schedule: Schedule, values: list[Value]
) -> tuple[dict[Value, int], dict[Value, list[tuple[Value, int]]]]:
    """For each value the most that any reader still needs, over all phases; and what is kept from its beginning on."""
    longest = dict.fromkeys(values, 0)
    growing: dict[Value, dict[Value, int]] = {}
    for n in range(schedule.period):
        available = schedule.counts(n)
        for op in schedule.graph.ops:
            nxt = available[op.outputs[0]]
            for r in op.reads:
                longest[r.source] = max(longest[r.source], available[r.source] - r.kept_taps.lo(nxt))
                if r.everything:
                    more = growing.setdefault(r.source, {})
                    lag = available[r.source] - r.taps.hi(nxt) - 1
                    more[op.outputs[0]] = max(more.get(op.outputs[0], 0), lag)
    history = {v: h for v, h in longest.items() if h > 0 or v in growing}
    return history, {v: list(readers.items()) for v, readers in growing.items()}


def _settled(schedule: Schedule) -> tuple[int, int]:
    """From which tick on no read reaches before the start, and all sequential ops have begun."""
    settled = sequential = 0
    for op in schedule.graph.ops:
        for r in op.reads:
            if r.levels and not r.everything:
                settled = max(settled, _first(schedule, op, lambda j, r=r: r.kept_taps.lo(j) >= _start(r)))
        if op.carries or op.masked_until:
            settled = max(settled, _first(schedule, op, lambda j, op=op: j >= max(1, op.masked_until)))
        if op.sequential:
            sequential = max(sequential, _first(schedule, op, lambda j: j >= 0))
    return settled, sequential


def _start(read: Read) -> int:
    """The source index from which on all of a read's levels are inside."""
    return max(level.shift for level in read.levels)


def _first(schedule: Schedule, op: Op, holds: Any) -> int:
    """The smallest n with ``holds(next output index after n ticks)`` (which stays true once it is)."""
    value = op.outputs[0]
    low, high = 0, 1
    while not holds(schedule.count(value, high)):
        low, high = high, high * 2
        if high > 1 << 40:
            raise AssertionError(f"{op.name} never settles")
    while low < high:
        middle = (low + high) // 2
        if holds(schedule.count(value, middle)):
            high = middle
        else:
            low = middle + 1
    return low


def reach(schedule: Schedule, value: Value) -> Fraction:
    """The receptive field of a value in ticks, memory left out."""
    cycle = int(value.rate * schedule.period)
    return max(_reach(schedule.graph, value, j) for j in range(1000 * cycle, 1001 * cycle))


def _reach(graph: StreamGraph, value: Value, j: int) -> Fraction:
    """The span of input ticks on which frame `j` depends."""
    ranges: dict[Value, tuple[int, int]] = {}

    def need(v: Value, lo: int, hi: int) -> None:
        while isinstance(v.producer, View):
            lo, hi, v = lo + v.producer.offset, hi + v.producer.offset, v.producer.source
        have = ranges.get(v, (lo, hi))
        ranges[v] = (min(lo, have[0]), max(hi, have[1]))

    need(value, j, j)
    for op in reversed(graph.ops):
        asked = [ranges[v] for v in op.outputs if v in ranges]
        if not asked:
            continue
        lo, hi = min(a[0] for a in asked), max(a[1] for a in asked)
        for r in op.reads:
            field = r.field or r.taps
            need(r.source, field.lo(lo), field.hi(hi))
    spans = []
    for v in (v for v in graph.inputs if v in ranges):
        first, last = (Fraction(i) // v.rate for i in ranges[v])
        spans.append(Fraction(last - first + 1))
    return max(spans, default=Fraction(0))
