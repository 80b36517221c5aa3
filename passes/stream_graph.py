"""The program between the traced graph and the generated one: values that are made of frames, and ops on them.

A `Value` is a tensor that grows by frames. It is made by an `Op`, or is a `View`: another value read at shifted
indices, with a fill outside (padding and cropping compute nothing). An op says by its `Read`s which source frames
each of its output frames needs; everything about delays and buffers follows from that in `schedule_delays`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from .layout import Layout, Sizes
from .schedule import Int, Taps

Length = Callable[..., Int]


@dataclass(frozen=True)
class Rounded:
    """A length that is another one, and so many frames `more`, down to a multiple of something (and `left` frames)."""

    more: int
    multiple: int
    left: int

    def __call__(self, frames: Any) -> Any:
        """The length."""
        return (frames + self.more) // self.multiple * self.multiple + self.left


@dataclass(frozen=True)
class Constant:
    """Outside of the value stands this number."""

    number: float


@dataclass(frozen=True)
class Mirror:
    """Outside of the value stand its own frames: the edge frame (replicate) or the mirrored ones (reflect)."""

    mode: str
    right: int  # frames of padding at the end


Fill = Constant | Mirror


@dataclass(eq=False, repr=False)
class View:
    """Frame i is frame ``i + offset`` of `source`, or the fill where that lies outside of the source."""

    source: Value
    offset: int
    fill: Fill | None


@dataclass(eq=False, repr=False)
class Value:
    """A tensor that grows by frames.

    Attributes:
        layout: its shape offline, time and batch marked.
        rate: frames per tick.
        lengths: its number of frames at each sample point.
        length: the values whose lengths decide its own, and how.
        indexed: depends on the frame's index beyond padding (positions, tables).
        padded: depends on where the stream begins or ends (padding).
        memory: depends on all frames so far (recurrent, cumulative).
    """

    name: str
    layout: Layout
    dtype: torch.dtype
    rate: Fraction
    lengths: Sizes
    length_sources: tuple[Value, ...]
    length: Length
    producer: Op | View | None
    node: fx.Node | None
    indexed: bool = False
    padded: bool = False
    memory: bool = False
    normalised: dict[Any, Value] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"{self.name}: Stream({self.layout}) at {self.rate}"


@dataclass(frozen=True)
class Level:
    """One layer of padding around a read: outside ``[0, length)`` of `value` stands `fill`.

    The level's index is the source's index minus `shift`.
    """

    value: Value
    shift: int
    fill: Fill


@dataclass(frozen=True)
class Read:
    """How an op reads one source: which frames, and what stands in for those that do not exist.

    Attributes:
        source: a value that has a producing op (views are resolved into levels).
        taps: the frames that the op is handed.
        levels: layers of fill, innermost first; empty where every index read exists.
        wait: further frames that must be there before (mirrored padding at the start).
        keep: further frames to keep in history (mirrored padding at the end).
        field: the frames that an output frame depends on, where an op carries some of them as a sum.
        offset: source index minus the index that the op sees (it may read through views).
        through: the views, each with source index minus its own: a frame is there once it is sure to exist in all.
        everything: all frames so far are read, from the first on (`taps` says up to which).
    """

    source: Value
    taps: Taps
    levels: tuple[Level, ...] = ()
    wait: int = 0
    keep: int = 0
    field: Taps | None = None
    offset: int = 0
    through: tuple[tuple[Value, int], ...] = ()
    everything: bool = False

    @functools.cached_property
    def ready_taps(self) -> Taps:
        """The taps that decide when an output frame is due."""
        return self.taps.widened(later=self.wait)

    @functools.cached_property
    def kept_taps(self) -> Taps:
        """The taps that decide which frames stay in history."""
        return self.taps.widened(earlier=self.keep)


@dataclass(frozen=True)
class Window:
    """Consecutive frames of a value inside a generated program: indices ``start .. stop-1``, as the op sees them."""

    node: fx.Node
    start: int
    stop: int


@dataclass(frozen=True)
class Carry:
    """A state that an op hands from frame to frame: its shape (no time), and what it is before the first frame."""

    name: str
    layout: Layout
    dtype: torch.dtype
    init: float | fx.Node  # a number, or a node of the traced graph that does not depend on time


@dataclass(eq=False)
class Border:
    """A node whose frames a clip takes from a stream.

    Attributes:
        node, value: the traced node, and the stream that has its frames.
        first, count: frames ``first .. first+count-1`` of the clip's own.
        squeeze: the single frame's time axis is dropped.
        back: for frames counted from the end of the stream: how far back the first lies; else None.
    """

    node: fx.Node
    value: Value
    first: int
    count: int
    squeeze: bool
    back: int | None


@dataclass(eq=False)
class Clip:
    """A part of the model that is evaluated on whole clips, offline.

    Attributes:
        borders: where its streams come in.
        nodes: the traced nodes to evaluate, in order.
        leaves: the nodes that are asked of it.
        newest: for each leaf the dimension of which only the last entry is asked, or None for all of it.
        equivalence: what holds for its outputs.
        first, every: the tick after which the first evaluation is due at the earliest, and the ticks between two.
        reason: what ended the stream.
    """

    borders: list[Border]
    nodes: list[fx.Node]
    leaves: list[fx.Node]
    newest: list[int | None]
    equivalence: str
    first: int
    every: int
    reason: str


Lower = Callable[..., Any]  # (builder, op, windows, span) -> nodes; see codegen.graph_module.Builder


@dataclass(eq=False, repr=False)
class Op:
    """One operation on frames.

    Attributes:
        node: the traced node that it came from.
        reads: what it reads, in order.
        outputs: the values that it makes, all on one clock.
        lower: emits the op into a generated program: ``lower(builder, windows, span, carries)``.
        carries: states that it hands on from frame to frame.
        sequential: its frames must be taken in order and none before the first (recurrent ops).
        limit: the number of frames after which it has no more to give (tables).
        stream_nodes: the traced arguments that the reads stand for, in the same order.
        several: the traced op returns a tuple.
        masked_until: its first so many frames need a masked program, whatever it reads.
        clip: what it evaluates, if it recomputes a clip.
        columns: the reads that it takes at the frames of the keys (an op whose result has pairs of frames).
        turns: the rows of its (only) operand are its keys (an op whose result has pairs of frames): of the rows and
            columns of the result, those of the operand.
        unrolled: a program repeats it frame by frame.
        approximate: it reads no further back than the user allowed, where the model reads everything.
        late: frames that its results come later than they could, see place_delays.py.
    """

    name: str
    node: fx.Node | None
    reads: list[Read]
    lower: Lower
    outputs: list[Value] = field(default_factory=list)
    carries: list[Carry] = field(default_factory=list)
    sequential: bool = False
    limit: int | None = None
    stream_nodes: list[fx.Node] = field(default_factory=list)
    several: bool = False
    masked_until: int = 0
    clip: Clip | None = None
    columns: frozenset[int] = frozenset()
    turns: Callable[[Any], Any] | None = None
    unrolled: bool = False
    approximate: bool = False
    late: int = 0


@dataclass
class StreamGraph:
    """All ops of a model in topological order, its inputs and its sample points."""

    batch: Sizes
    ticks: Sizes
    inputs: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)

    def add_value(self, value: Value) -> Value:
        """Give the value a name of its own and append it."""
        base, k = value.name, 1
        while value.name in self._names:
            value.name, k = f"{base}_{k}", k + 1
        self._names.add(value.name)
        self.values.append(value)
        return value


SAME = Taps()


def read(
    value: Value,
    taps: Taps = SAME,
    fill: float | None = None,
    field: Taps | None = None,
    everything: bool = False,
) -> Read:
    """A read of `value`, resolved through its views to the value that has the frames.

    Args:
        value: the value as the op sees it.
        taps: which frames each output frame needs.
        fill: what stands outside of the value, if the taps can reach there.
        field: the frames that each output frame depends on, if more than the taps.
        everything: all frames before them are read too.
    """
    levels: list[Level] = []
    offset = wait = keep = 0
    if fill is not None:
        levels.append(Level(value, 0, Constant(fill)))
    through: list[tuple[Value, int]] = []
    while isinstance(value.producer, View):
        through.append((value, 0))
        view = value.producer
        offset += view.offset
        through = [(v, shift + view.offset) for v, shift in through]
        levels = [Level(level.value, level.shift + view.offset, level.fill) for level in levels]
        if view.fill is not None:
            levels.insert(0, Level(view.source, 0, view.fill))
            if isinstance(view.fill, Mirror):
                at_start = taps.shifted(offset)
                reach = -at_start.lo(0) if view.fill.mode == "reflect" else 0
                wait = max(wait, reach - at_start.hi(0)) if at_start.lo(0) < 0 else wait
                keep += (
                    2 if view.fill.mode == "reflect" else 1
                ) * view.fill.right  # one pad's end may lie in another's
        value = view.source
    # shifts are relative to the index of the value that is finally read
    return Read(
        value,
        taps.shifted(offset),
        tuple(levels),
        max(wait, 0),
        keep,
        field and field.shifted(offset),
        offset,
        tuple(through),
        everything,
    )


def positional(value: Value) -> bool:
    """Whether a value is made of nothing but positions, so that its frames can be made anew anywhere."""
    if isinstance(value.producer, View):
        return value.producer.fill is None and positional(value.producer.source)
    op = value.producer
    return (
        op is not None
        and op.clip is None
        and not op.carries
        and all(not r.levels and positional(r.source) for r in op.reads)
    )
