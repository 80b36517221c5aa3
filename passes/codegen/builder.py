"""Builds one step program from the scheduled stream graph: which frames each op reads, and where they lie."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from ..layout import Layout
from ..schedule import Taps
from ..schedule_delays import Schedule
from ..stream_graph import Carry, Constant, Mirror, Op, Read, Value, Window
from .constants import Constants
from .emitter import Emitter
from .index import Index
from .key import Key
from .states import carry_name

aten = torch.ops.aten


class Builder(Emitter):
    """Emits one program. Rules' lowerings call its methods."""

    def __init__(
        self,
        schedule: Schedule,
        key: Key,
        batch_input: tuple[int, int] | None,
        constants: Constants,
        device: torch.device,
        about_of: Callable[[Value], Any],
    ) -> None:
        """
        Args:
            schedule, key, batch_input, constants, device: see `Emitter`.
            about_of: where a value stands in the stream, for the ``meta["cofx"]`` of its nodes.
        """
        super().__init__(schedule, key, batch_input, constants, device)
        self.about_of = about_of
        self.absolute = False
        self.before = schedule.counts(key.phase)
        self.after = schedule.counts(key.phase + key.ticks)
        self.chunks: dict[Value, Window | None] = {}
        self.buffers: dict[Value, Window] = {}
        self.states: dict[str, fx.Node] = {}
        self.next_states: dict[str, fx.Node] = {}

    # -- properties of the program -----------------------------------------------------------------------------------

    @property
    def masked(self) -> bool:
        """Whether windows may reach outside of their values."""
        return self.key.masked

    @property
    def holding(self) -> bool:
        """Whether sequential ops may not have come to their first frame."""
        return self.key.holding

    def span(self, value: Value) -> range:
        """The frames of a value that this program makes."""
        start = min(0, self.before[value]) if self.key.first else self.before[value]
        return range(start, max(start, self.after[value]))

    # -- indices, for programs that know where in the stream they are ------------------------------------------------

    def indices(self, op: Op, span: range) -> fx.Node:
        """The true indices of the frames `span` that an op makes: int64, one for each."""
        return self.index_range(op.outputs[0], span)

    def table(self, node: fx.Node, axis: int, start: int, size: int, op: Op, span: range) -> fx.Node:
        """Frames `span` of a static table that lies along time."""
        at = self.aten("clamp.default", self.indices(op, span), 0, size - start - 1)
        if start:
            at = self.aten("add.Tensor", at, start)
        return self.aten("index_select.default", self.static(node), axis, at)

    @contextlib.contextmanager
    def from_the_start(self) -> Iterator[None]:
        """Lowerings take a stream to begin with this program, as they may where nothing but distances counts."""
        before, self.absolute = self.absolute, True
        yield
        self.absolute = before

    def index_range(self, value: Value, span: range) -> fx.Node:
        """True indices for frames that this program calls `span` (of `value`)."""
        if self.absolute:
            return self.constant(list(span), torch.int64)
        per_period = int(value.rate * self.schedule.period)
        key = ("index", per_period, span)
        if key not in self._memo:
            before = self.cycles if per_period == 1 else self.aten("mul.Tensor", self.cycles, per_period)
            self._memo[key] = self.aten("add.Tensor", self.constant(list(span), torch.int64), before)
        node: fx.Node = self._memo[key]
        return node

    def inside(self, value: Value, span: range) -> fx.Node:
        """Which of the frames that this program calls `span` exist: bool, one for each."""
        key = ("inside", self._length(value), value.rate, span)
        if key not in self._memo:
            self._memo[key] = self.within(self.index_range(value, span), value)
        node: fx.Node = self._memo[key]
        return node

    @property
    def cycles(self) -> fx.Node:
        """How many whole periods came before this call."""
        if "cycles" not in self._memo:
            since = self.states["count"]
            if self.key.phase:
                since = self.aten("sub.Tensor", since, self.key.phase)
            self._memo["cycles"] = (
                since
                if self.schedule.period == 1
                else self.aten("floor_divide.default", since, self.constant(self.schedule.period, torch.int64))
            )
        node: fx.Node = self._memo["cycles"]
        return node

    def length(self, value: Value, more: int = 0) -> fx.Node:
        """The number of frames of a value when the stream has ended (beyond all indices before that)."""
        node = self._length(value)
        return node.plus(more).node if more else node.node

    def _length(self, value: Value) -> Index:
        key = ("length", value)
        if key not in self._memo:
            sources = [self._length(s) for s in value.length_sources] or [Index(self, self.states["length"])]
            self._memo[key] = value.length(*sources)
        found: Index = self._memo[key]
        return found

    def within(self, index: fx.Node, value: Value) -> fx.Node:
        """Which of these indices lie in ``[0, length)`` of a value."""
        begun = self.aten("ge.Scalar", index, 0)
        if self.key.endless:
            return begun
        return self.aten("logical_and.default", begun, self.aten("lt.Tensor", index, self.length(value)))

    # -- reading -----------------------------------------------------------------------------------------------------

    def window(self, r: Read, span: range, op: Op) -> Window:
        """The frames that an op needs for its outputs `span`, with fills where they lie outside."""
        asked = self.reached(op, r.taps, r.everything, span)
        start, stop = asked.start, asked.stop
        value = r.source
        layout = value.layout.split()
        mirrored = self.masked and any(isinstance(level.fill, Mirror) for level in r.levels)
        first = min(start, r.kept_taps.lo(span.start)) if mirrored else start
        last = max(stop, r.ready_taps.hi(span.stop - 1) + 1) if mirrored else stop
        buffer = self.buffer(value, first, last)
        node, low = buffer.node, buffer.start
        if (self.masked or r.everything) and r.levels:
            node = self.filled(r, buffer, range(start, stop), layout)
        elif (start, stop) != (buffer.start, buffer.stop):
            if start < low:
                node = self.garbage_before(node, layout, low - start)
                low = start
            node = self.narrow(node, layout.time, start - low, stop - start)
        return Window(self.merge(node, value.layout, stop - start), start - r.offset, stop - r.offset)

    def buffer(self, value: Value, start: int, stop: int) -> Window:
        """History and new frames of a value, at least as far as ``start .. stop`` goes into them (split layout)."""
        new = self.chunks.get(value)
        if new is not None and new.start <= start:
            return Window(self.split(new.node, value.layout, new.stop - new.start), new.start, new.stop)
        if value not in self.buffers:
            history = self.schedule.kept(value, self.key.capacity)
            at = self.span(value)
            parts = []
            if history:
                parts.append(self.states[f"state_{value.name}"])
            if new is not None:
                parts.append(self.split(new.node, value.layout, new.stop - new.start))
            if not parts:  # nothing is there yet: what is asked lies before the start
                return Window(self.full(self.sizes(value.layout.split(), stop - start), 0, value.dtype), start, stop)
            about, self.about = self.about, self.about_of(value)
            node = self.cat(parts, value.layout.split().time, name=f"delay_{value.name}")
            self.about = about
            self.buffers[value] = Window(node, at.start - history, at.stop)
        return self.buffers[value]

    def garbage_before(self, node: fx.Node, layout: Layout, frames: int) -> fx.Node:
        """Frames before the start of what is kept: they only stand where nothing valid is asked."""
        time = layout.time
        some = self.narrow(node, time, 0, 1)
        sizes = [frames if i == time else -1 for i in range(len(layout))]
        return self.cat([self.aten("expand.default", some, sizes), node], time)

    def filled(self, r: Read, buffer: Window, span: range, layout: Layout) -> fx.Node:
        """Frames `span` of a source, with the fills of all levels where they lie outside."""
        index = self.index_range(r.source, span)
        masks: list[tuple[fx.Node, float]] = []
        mirrored = False
        for level in reversed(r.levels):
            if isinstance(level.fill, Constant) and not mirrored:
                moved = range(span.start - level.shift, span.stop - level.shift)
                masks.append((self.inside(level.value, moved), level.fill.number))
                continue
            at = index if level.shift == 0 else self.aten("sub.Tensor", index, level.shift)
            if isinstance(level.fill, Constant):
                masks.append((self.within(at, level.value), level.fill.number))
            else:
                at = self.mirrored(at, self.length(level.value), level.fill.mode)
                index = at if level.shift == 0 else self.aten("add.Tensor", at, level.shift)
                mirrored = True
        time = layout.time
        if mirrored:
            base = self.index_range(r.source, range(buffer.start, buffer.start + 1))
            place = self.aten("clamp.default", self.aten("sub.Tensor", index, base), 0, buffer.stop - buffer.start - 1)
            node = self.aten("index_select.default", buffer.node, time, place)
        else:
            node, low = buffer.node, buffer.start
            if span.start < low:
                node, low = self.garbage_before(node, layout, low - span.start), span.start
            if (span.start, span.stop) != (low, buffer.stop):
                node = self.narrow(node, time, span.start - low, len(span))
        for inside, number in reversed(masks):
            node = self.aten("where.self", self.along_time(inside, layout), node, self.like(number, node))
        return node

    def mirrored(self, at: fx.Node, end: fx.Node, mode: str) -> fx.Node:
        """Indices outside of ``[0, end)`` turned to the frames that stand for them."""
        last = self.aten("sub.Tensor", end, 1)
        if mode == "reflect":
            at = self.aten("abs.default", at)
            back = self.aten("sub.Tensor", self.aten("mul.Tensor", last, 2), at)
            return self.aten("minimum.default", at, back)
        return self.aten("minimum.default", self.aten("clamp_min.default", at, 0), last)

    def where_inside(self, r: Read, window: Window, other: fx.Node, layout: Layout) -> fx.Node:
        """The window's frames where they lie inside of a read's innermost level, another's elsewhere."""
        if not self.masked:
            return window.node
        level = r.levels[0]
        shift = r.offset - level.shift
        inside = self.inside(level.value, range(window.start + shift, window.stop + shift))
        return self.aten("where.self", self.along_time(inside, layout), window.node, other)

    # -- pairs of frames, see pairs.py -------------------------------------------------------------------------------

    def unknown(self, value: Value, span: range) -> Any:
        """Frames of a stream that the op does not read."""
        raise AssertionError(f"{value.name} is not read")

    def reached(self, op: Op, taps: Taps, everything: bool, span: range) -> range:
        """The frames that an op reads for its outputs `span`, through these taps or from the first frame on."""
        stop = taps.hi(span.stop - 1) + 1
        start = stop - self.schedule.length(op.outputs[0], self.key.capacity) if everything else taps.lo(span.start)
        return range(start, stop)

    def distance(self, scope: Any) -> fx.Node:
        """How many frames each column lies ahead of each row: int64, rows x columns."""
        rows, columns = scope.rows, scope.columns
        name = f"distance_{rows.start - columns.start}_{len(rows)}_{len(columns)}"
        ahead = torch.arange(columns.start, columns.stop) - torch.arange(rows.start, rows.stop)[:, None]
        return self.attribute(name, ahead.to(self.device))

    def existing(self, op: Op, scope: Any, masked: bool, back: int | None) -> fx.Node | None:
        """Which keys there are for each query, as bool that broadcasts to rows x columns; None if all.

        `masked`: some may not exist, whatever the program; `back`: those further back are left away.
        """
        exists = None
        if self.masked or masked:
            exists = self.inside(op.outputs[0], scope.columns)
        if back is not None and len(scope.rows) > 1:
            near = self.aten("ge.Scalar", self.distance(scope), -back)
            exists = near if exists is None else self.aten("logical_and.default", near, exists)
        return exists

    def where_exists(self, node: fx.Node, layout: Layout, number: float, scope: Any = None) -> fx.Node:
        """Pairs of frames with a number where there is no key."""
        scope = scope or self.scope
        if scope.exists is None:
            return node
        key = ("exists", layout.time, layout.key, len(layout))
        if key not in scope.made:
            mask = self.aten("expand.default", scope.exists, [len(scope.rows), len(scope.columns)])
            mask = mask if layout.time < layout.key else self.aten("transpose.int", mask, 0, 1)
            sizes = [1] * len(layout)
            sizes[layout.time], sizes[layout.key] = len(scope.rows), len(scope.columns)
            scope.made[key] = self.aten("reshape.default", mask, sizes)
        return self.aten("where.self", scope.made[key], node, self.like(number, node))

    # -- carried states ----------------------------------------------------------------------------------------------

    def carried(self, op: Op, carry: Carry) -> fx.Node:
        """A carried state as it is before this call's first frame."""
        state = self.states[carry_name(op, carry)]
        if not self.masked:
            return state
        span = self.span(op.outputs[0])
        begun = self.aten("gt.Scalar", self.index_range(op.outputs[0], range(span.start, span.start + 1)), 0)
        init = self.like(carry.init, state) if not isinstance(carry.init, fx.Node) else self.static(carry.init)
        return self.aten("where.self", begun, state, init)

    def hold(self, op: Op, j: int, after: list[fx.Node], before: list[fx.Node]) -> list[fx.Node]:
        """The state after frame `j`, or the one before it if that frame lies before the start."""
        if not self.holding:
            return after
        real = self.aten("ge.Scalar", self.index_range(op.outputs[0], range(j, j + 1)), 0)
        return [self.aten("where.self", real, a, b) for a, b in zip(after, before, strict=True)]
