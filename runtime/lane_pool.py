"""Many live streams on one step model: whoever has frames shares the next batched step.

::

    pool = LanePool(step, capacity=64)
    stream = pool.open()
    stream.feed(frames)
    for stream, y in pool.run():
        ...
    stream.close()

Works with the PyTorch step model and with `OnnxStep`; imports neither.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .errors import CofxError, InputError, LaneError


class PoolFull(CofxError, RuntimeError):
    """Every lane has a stream. Close one, or make the pool larger."""


class Stream:
    """One stream of a pool, made by `LanePool.open`."""

    def __init__(self, pool: LanePool, lane: int) -> None:
        self._pool, self._lane = pool, lane
        self._ticks: list[Any] = []  # for each tick the frames of every input
        self._next = 0  # the first of them that has not been taken
        self._statics: list[Any] = []
        self._begun = False
        self._fed = 0  # ticks taken by the step
        self._length: int | None = None  # in ticks, once it is closed
        self._left = 0  # calls that its tail may still take
        self.closed = False
        self.error: CofxError | None = None

    @property
    def waiting(self) -> int:
        """Ticks that have been fed and not yet been taken."""
        return len(self._ticks) - self._next

    @property
    def open(self) -> bool:
        """Whether anything may still come of it: it has a lane."""
        return self._pool._streams.get(self._lane) is self

    def feed(self, *frames: Any) -> None:
        """Append frames: for each input a chunk as the model takes it, without the batch dimension. They are copied.

        Raises:
            InputError: they do not fit, or the stream has been closed or has failed.
        """
        self._pool._feed(self, frames)

    def close(self, flush: bool = True) -> None:
        """End the stream. With `flush`, runs to come take what has been fed and hand out what is still due, and the
        lane is free after that; without, it is free at once, and nothing more comes."""
        self._pool._close(self, flush)


class LanePool:
    """Streams that join and leave a batch of lanes. Thread-safe; the step model is the pool's alone.

    Args:
        step: a compiled step model whose inputs have a batch dimension, or an `OnnxStep`. Its state is cleaned.
        capacity: lanes.
        frames_per_step: ticks that a run takes of each stream; a multiple of the model's period. Default the least.
    """

    def __init__(self, step: Any, capacity: int, frames_per_step: int | None = None) -> None:
        if not hasattr(step, "lane_layout"):
            raise InputError(f"a pool takes a compiled step model or an OnnxStep, not {type(step).__name__}")
        if not isinstance(capacity, int) or capacity < 1:
            raise InputError(f"a pool has a number of lanes, at least 1, not {capacity!r}")
        self.step, self.capacity = step, capacity
        self._layout = step.lane_layout(frames_per_step)
        if any(i.time is not None and i.batch is None for i in self._layout.inputs):
            raise InputError("this model has no batch dimension, so it has one lane")
        self.frames_per_step = self._layout.ticks
        self._free = list(range(capacity))[::-1]
        self._streams: dict[int, Stream] = {}
        self._mutex, self._running = threading.Lock(), threading.Lock()
        self._moves: list[tuple[Stream, int, int]] = []  # of streams that a step has taken on, see `_settle`
        self._owed: dict[int, list[tuple[Stream, Any]]] = {}  # by thread what its run got and has not returned yet
        step.clean_state()
        self._place = self._layout.place()  # where the last run left the step model

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def waiting(self) -> int:
        """Streams that the next run would take."""
        with self._mutex:
            self._settle()
            return sum(self._due(s) for s in self._streams.values())

    def open(self) -> Stream:
        """A new stream.

        Raises:
            PoolFull: every lane has one.
        """
        with self._mutex:
            self._settle()
            if not self._free:
                raise PoolFull(f"all {self.capacity} lanes have a stream: close one, or make the pool larger")
            stream = Stream(self, self._free[-1])
            self._streams[stream._lane] = stream
            del self._free[-1]
            return stream

    def run(self) -> list[tuple[Stream, Any]]:
        """One batched step for all streams that have frames for it, or are at their end.

        Returns:
            for each stream that got something the new frames, in the model's own structure, without the batch
            dimension and with time axis; None where an output has nothing new.

        Raises:
            InputError: somebody else has called the step model, and moved its streams.
        """
        me = threading.get_ident()
        out = self._owed[me] if me in self._owed else self._run(me)
        if me in self._owed:
            del self._owed[me]
        return out

    def _run(self, me: int) -> list[tuple[Stream, Any]]:
        """A step. Either nothing has moved when it raises, or what came out is owed to this thread.

        A signal may come between any two calls, and so while streams are moved one after the other. That they are to
        be moved, and what is owed, is therefore said in plain stores, between which there comes none.
        """
        with self._running:
            while True:
                with self._mutex:
                    self._settle()
                    most = self.frames_per_step
                    served = {s: min(most, s.waiting) for s in self._streams.values() if self._due(s)}
                    chunks = self._gathered(served) if served else []
                    controls = self._controls(served)
                if not served:
                    return []
                if self._layout.place() is not self._place:
                    raise InputError(
                        "the step model of this pool has been called past the pool, which moved its streams: give the "
                        "pool, and each other one, a step model of its own, and open the streams anew"
                    )
                back, kept = self._layout.mark(), False
                try:
                    y, valid = self._layout.call(*chunks, **controls)
                    with self._mutex:
                        out, moves = self._handed_out(served, y, valid)
                        place = self._layout.place()
                        self._moves = moves
                        self._place = place
                        self._owed[me] = out
                        kept = True
                        self._settle()
                    return out
                except LaneError as error:  # one stream cannot go on; the others can
                    with self._mutex:
                        self._fail(next(s for s in served if s._lane == error.lane), error)
                except BaseException:
                    if not kept:
                        back()
                    raise

    # -- under the mutex ---------------------------------------------------------------------------------------------

    def _feed(self, stream: Stream, frames: Sequence[Any]) -> None:
        ticks, statics = self._parts(frames)
        with self._mutex:
            self._settle()
            if stream.error is not None:
                raise stream.error
            if stream.closed:
                raise InputError("this stream has been closed")
            if stream._next > stream.waiting:
                stream._ticks, stream._next = stream._ticks[stream._next :], 0
            stream._ticks += ticks
            stream._statics = statics

    def _parts(self, frames: Sequence[Any]) -> tuple[list[list[Any]], list[Any]]:
        """Copies of the frames of each tick, and of inputs without time."""
        inputs = self._layout.inputs
        if len(frames) != len(inputs):
            raise InputError(f"{len(inputs)} inputs are needed, {len(frames)} were given")
        counts = set()
        for x, info in zip(frames, inputs, strict=True):
            if not isinstance(x, self._layout.kind):
                raise InputError(f"input '{info.name}' is a {type(x).__name__}, not a {self._layout.kind.__name__}")
            shape = list(info.shape)
            time = _without(info.batch, info.time)
            given = tuple(x.shape)
            if time is not None and len(given) == len(shape):
                counts.add(given[time] // info.rate)
                shape[time] = given[time] // info.rate * info.rate
            if given != tuple(shape) or str(x.dtype).removeprefix("torch.") != info.dtype:
                raise InputError(f"input '{info.name}' is {x.dtype} {given}, expected {info.dtype} {tuple(shape)}")
        if len(counts) != 1:
            raise InputError("the inputs have different numbers of frames")
        copies = [self._layout.copy(x) for x in frames]
        ticks = []
        for t in range(counts.pop()):
            row = []
            for x, info in zip(copies, inputs, strict=True):
                time = _without(info.batch, info.time)
                row.append(None if time is None else _at(x, time, slice(t * info.rate, (t + 1) * info.rate)))
            ticks.append(row)
        return ticks, [x if i.time is None else None for x, i in zip(copies, inputs, strict=True)]

    def _close(self, stream: Stream, flush: bool) -> None:
        with self._mutex:
            self._settle()
            if stream.closed:
                return
            length = stream._fed + stream.waiting
            stream._length, stream._left, stream.closed = length, self._layout.flush_calls, True
            if not flush or length == 0 or stream.error is not None:
                self._release(stream)

    def _release(self, stream: Stream) -> None:
        if self._streams.get(stream._lane) is stream:
            del self._streams[stream._lane]
            self._free += [stream._lane]
        stream._ticks, stream._next = [], 0

    def _settle(self) -> None:
        """Streams that a step has taken on go on: so many ticks, and so many calls that the tail may still take."""
        while self._moves:
            stream, taken, left = self._moves[-1]
            if left < 0:
                self._release(stream)
            start = stream._next
            stream._ticks[start : start + taken] = [None] * taken
            stream._begun, stream._fed, stream._next = True, stream._fed + taken, start + taken
            stream._left = left
            del self._moves[-1]

    def _fail(self, stream: Stream, error: LaneError) -> None:
        stream.error, stream.closed = error, True
        self._release(stream)

    def _due(self, stream: Stream) -> bool:
        return stream.waiting >= self.frames_per_step or stream.closed

    def _gathered(self, served: Mapping[Stream, int]) -> list[Any]:
        chunks: list[Any] = self._layout.blank(self.capacity)
        for stream, taken in served.items():
            for i, info in enumerate(self._layout.inputs):
                if info.batch is None:
                    continue
                lane = _at(chunks[i], info.batch, stream._lane)
                if info.time is None:
                    lane[...] = stream._statics[i]
                    continue
                time = _without(info.batch, info.time)
                for t in range(taken):
                    _at(lane, time, slice(t * info.rate, (t + 1) * info.rate))[...] = stream._ticks[stream._next + t][i]
        return chunks

    def _controls(self, served: Iterable[Stream]) -> dict[str, list[Any]]:
        start, ready, length = [False] * self.capacity, [False] * self.capacity, [-1] * self.capacity
        for s in served:
            start[s._lane], ready[s._lane] = not s._begun, True
            length[s._lane] = -1 if s._length is None else s._length
        return {"start": start, "ready": ready, "length": length}

    def _handed_out(
        self, served: Mapping[Stream, int], y: Any, valid: Any
    ) -> tuple[list[tuple[Stream, Any]], list[tuple[Stream, int, int]]]:
        """What each stream gets, and its move: the ticks taken of it and the calls left of its tail, -1 at its end."""
        out, moves = [], []
        for s, taken in served.items():
            if self._streams.get(s._lane) is not s:  # closed in the meantime, and nothing more is wanted
                continue
            left = s._left
            if s.closed and s.waiting == taken:
                left -= taken == 0
                left = left if left > 0 else -1
            moves.append((s, taken, left))
            outputs = iter(self._layout.outputs)
            found: list[Any] = []

            def part(leaf: Any, exists: Any, lane: int = s._lane, axes: Any = outputs, found: Any = found) -> Any:
                batch, time = next(axes)
                one = leaf if batch is None else _at(leaf, batch, lane)
                rows = exists[lane]
                if time is None or rows.ndim == 0:
                    found.append(bool(rows))
                    return self._layout.copy(one) if bool(rows) else None
                found.append(bool(rows.any()))
                return one[(slice(None),) * _without(batch, time) + (rows,)] if bool(rows.any()) else None

            frames = _map(part, y, valid)
            if any(found):
                out.append((s, frames))
        return out, moves


def _without(batch: int | None, time: int | None) -> Any:
    """A dimension's place once the batch dimension is gone."""
    return time if time is None or batch is None or time < batch else time - 1


def _at(x: Any, axis: int, index: Any) -> Any:
    return x[(slice(None),) * axis + (index,)]


def _map(function: Callable[..., Any], tree: Any, other: Any) -> Any:
    """A function on the leaves of two nested dicts, lists or tuples, in their structure."""
    if isinstance(tree, dict):
        return {k: _map(function, v, other[k]) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        parts = [_map(function, a, b) for a, b in zip(tree, other, strict=True)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return function(tree, other)
