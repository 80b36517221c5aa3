"""Code generation: a scheduled stream graph becomes a torch.fx.GraphModule.

A program takes some new ticks of the inputs and the state, and returns the new outputs and the new state::

    (frames..., [count, length,] state...) -> (outputs, state)

It is specialised by phase and number of ticks. A *masked* program also takes how many ticks came before (`count`) and
when the stream ends (`length`); wherever a window reaches outside of a value it puts in what the op pads with. In
between, where nothing reaches outside, the plain program does without.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.node import map_arg

from ...runtime.program import OutputSpan, Program, StateSpec
from ..canonicalize import unbind
from ..capture import untraced
from ..changes import content, version
from ..errors import module_path
from ..layout import BATCH, KEY, TIME, Layout
from ..loops import Loop
from ..schedule import Taps
from ..schedule_delays import Schedule
from ..stream_graph import Carry, Constant, Mirror, Op, Read, Value, Window
from .aliases import base
from .flat import flatten
from .frames import LARGE, MOST
from .lower import Lowering

if TYPE_CHECKING:
    from ..pipeline import Plan

aten = torch.ops.aten
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


def state_specs(schedule: Schedule, capacity: int = 0) -> list[StateSpec]:
    """What a program keeps between calls, in the order of its arguments, for streams of so many ticks."""
    specs = []
    for value in schedule.history:
        frames = schedule.kept(value, capacity)
        dims = [_affine(d) for d in value.layout.split()]
        time = value.layout.split().time
        dims[time] = (0, frames)
        specs.append(
            StateSpec(
                f"state_{value.name}",
                tuple(dims),
                value.dtype,
                f"the last {frames} frames of {_named(value.name, value.node)}",
                grows=time if value in schedule.growing else None,
                apart=time if 1 <= frames <= MOST and _large(value) else None,
            )
        )
    for op in schedule.graph.ops:
        for carry in op.carries:
            dims = [_affine(d) for d in carry.layout]
            holds = f"{carry.name} of {_named(op.name, op.node)}"
            specs.append(StateSpec(carry_name(op, carry), tuple(dims), carry.dtype, holds))
    return specs


def _named(name: str, node: fx.Node | None) -> str:
    """A value, and the module that it comes from."""
    module = "" if node is None else module_path(node)
    return f"{name} in {module}" if module else name


def _large(value: Value) -> bool:
    """Whether a frame of a value has positions beside its channels, and takes longer to move than a call takes."""
    layout = value.layout.split()
    numbers = prod(f for d in layout for f in d if isinstance(f, int))
    return len(layout) in (4, 5) and numbers * value.dtype.itemsize >= LARGE


def carry_name(op: Op, carry: Carry) -> str:
    """The name under which a carried state is kept."""
    return f"state_{op.name}_{carry.name}"


def _affine(dimension: Sequence[Any]) -> tuple[int, int]:
    """A static dimension's size as (per lane, constant)."""
    size, batched = 1, False
    for f in dimension:
        if f is BATCH:
            batched = True
        elif f is not TIME:
            size *= f
    return (size, 0) if batched else (0, size)


class Constants:
    """Tensors that depend on parameters alone, computed once and renewed when asked."""

    def __init__(self, tensors: dict[str, torch.Tensor], batched: set[fx.Node]) -> None:
        self.tensors = tensors
        self.batched = batched
        self.folded: dict[int, tuple[torch.Tensor, int, str]] = {}  # what was computed from: version, content then
        self.made: dict[Any, Any] = {}  # by lowerings
        self._values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """The value of a node of the traced graph that depends on parameters alone."""
        if node not in self._values:
            if node.op == "get_attr":
                return self.tensors[str(node.target)]
            self.note(self.tensors[str(n.target)] for n in node.all_input_nodes if n.op == "get_attr")
            with torch.no_grad():
                args, kwargs = map_arg((node.args, node.kwargs), self.value)
                self._values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._values[node]

    def note(self, sources: Iterable[torch.Tensor | None]) -> None:
        """Constants were computed from these: programs that hold them are stale once one of these changes."""
        for tensor in sources:
            if tensor is not None and id(tensor) not in self.folded:
                self.folded[id(tensor)] = tensor, version(tensor), content(tensor)

    def outdated(self) -> bool:
        """Whether what was computed from has changed since."""
        return any((version(t), content(t)) != (v, c) for t, v, c in self.folded.values())

    def known(self, node: fx.Node) -> bool:
        """Whether a node depends on parameters alone."""
        return node not in self.batched

    def renew(self, tensors: dict[str, torch.Tensor]) -> None:
        """Forget what was computed: the parameters have changed."""
        self.tensors = tensors
        self._values.clear()
        self.folded.clear()
        self.made.clear()


class Builder:
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
        self.device = device
        self.about_of = about_of
        self.schedule = schedule
        self.key = key
        self.absolute = False
        self.constants = constants
        self.graph = fx.Graph()
        self.root: dict[str, torch.Tensor] = {}
        self.batch_input = batch_input
        self.before = schedule.counts(key.phase)
        self.after = schedule.counts(key.phase + key.ticks)
        self.chunks: dict[Value, Window | None] = {}
        self.buffers: dict[Value, Window] = {}
        self.states: dict[str, fx.Node] = {}
        self.next_states: dict[str, fx.Node] = {}
        self.statics: dict[fx.Node, Any] = {}
        self.inputs: dict[fx.Node, fx.Node] = {}
        self.about: Any = None
        self.scope: Any = None  # the rows and columns on which pairs of frames are being evaluated
        self._memo: dict[Any, Any] = {}

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

    # -- emitting ----------------------------------------------------------------------------------------------------

    def emit(self, target: Any, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        """One call of a function."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta["cofx"] = self.about
        return node

    def aten(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """One call of an ATen overload, by its name (``"add.Tensor"``)."""
        packet, overload = name.split(".")
        return self.emit(getattr(getattr(aten, packet), overload), *args, **kwargs)

    def getitem(self, node: fx.Node, index: int) -> fx.Node:
        """One of several results."""
        return self.emit(operator.getitem, node, index)

    def narrow(self, node: fx.Node, axis: int, start: int, frames: int) -> fx.Node:
        """Some entries of a dimension."""
        return self.aten("slice.Tensor", node, axis, start, start + frames)

    def every(self, node: fx.Node, axis: int, step: int) -> fx.Node:
        """Every `step`-th entry of a dimension."""
        return self.aten("slice.Tensor", node, axis, 0, FOREVER, step)

    def cat(self, nodes: list[fx.Node], axis: int, name: str | None = None) -> fx.Node:
        """Tensors side by side."""
        return nodes[0] if len(nodes) == 1 else self.emit(aten.cat.default, nodes, axis, name=name)

    def pad_end(self, node: fx.Node, layout: Layout, frames: int) -> fx.Node:
        """Zeros after the last frame."""
        return self.aten("constant_pad_nd.default", node, [0, 0] * (len(layout) - 1 - layout.time) + [0, frames])

    def call(self, op: Op, windows: list[Window], target: Any = None, **overrides: Any) -> fx.Node:
        """The op's own traced call on the windows of its streams, with some arguments (or the overload) replaced."""
        assert op.node is not None
        replaced = {n: w.node for n, w in zip(op.stream_nodes, windows, strict=False)}

        def substitute(n: fx.Node) -> Any:
            return replaced[n] if n in replaced else self.static(n)

        bound = dict(op.node.meta["samples"][0])
        for name, value in overrides.items():
            bound[name] = value
        mapped = {
            k: v if k in overrides else self.numbers(op.node, k, map_arg(v, substitute)) for k, v in bound.items()
        }
        target = target or op.node.target
        args, kwargs = unbind(target, mapped)
        return self.emit(target, *args, **kwargs)

    def numbers(self, node: fx.Node, name: str, value: Any) -> Any:
        """An argument with the numbers that follow the batch size computed from it."""
        samples = node.meta["samples"]
        return self.by_batch([value, *(s.get(name) for s in samples[1:])])

    def by_batch(self, seen: Sequence[Any]) -> Any:
        """Numbers that may follow the batch size, from what they are at each sample point."""
        batch = self.schedule.graph.batch
        other = next((i for i, b in enumerate(batch) if b != batch[0]), None)
        if other is None or self.batch_input is None:
            return seen[0]
        return self._with_batch(seen[0], seen[other], batch[0], batch[other])

    def _with_batch(self, here: Any, there: Any, b0: int, b1: int) -> Any:
        if isinstance(here, (list, tuple)):
            return [self._with_batch(h, t, b0, b1) for h, t in zip(here, there, strict=True)]
        if isinstance(here, int) and not isinstance(here, bool) and here != there:
            slope, left = divmod(there - here, b1 - b0)
            if left:
                raise AssertionError("a number that does not follow the batch size in a line")
            rest = here - slope * b0
            product = self.batch if slope == 1 else self.emit(operator.mul, self.batch, slope)
            return product if rest == 0 else self.emit(operator.add, product, rest)
        return here

    # -- sizes -------------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> fx.Node:
        """The batch size, read from the first input."""
        if "batch" not in self._memo:
            assert self.batch_input is not None
            index, axis = self.batch_input
            self._memo["batch"] = self.aten("sym_size.int", list(self.inputs.values())[index], axis)
        node: fx.Node = self._memo["batch"]
        return node

    def sizes(self, layout: Layout, frames: int) -> list[Any]:
        """A layout's shape with that many frames."""
        out: list[Any] = []
        for d in layout:
            size, batched = 1, False
            for f in d:
                batched = batched or f is BATCH
                size *= self._extent(f, frames)
            if not batched:
                out.append(size)
            elif size == 1:
                out.append(self.batch)
            else:
                if (size, "batch") not in self._memo:
                    self._memo[size, "batch"] = self.emit(operator.mul, self.batch, size)
                out.append(self._memo[size, "batch"])
        return out

    def _extent(self, factor: Any, frames: int) -> int:
        if factor is KEY:
            return len(self.scope.columns)
        return frames if factor is TIME else 1 if factor is BATCH else factor

    def reshape(self, node: fx.Node, layout: Layout, frames: int) -> fx.Node:
        """A row-major reshape to a layout."""
        return self.aten("reshape.default", node, self.sizes(layout, frames))

    def split(self, node: fx.Node, layout: Layout, frames: int) -> fx.Node:
        """Time in a dimension of its own."""
        return node if layout.clean else self.reshape(node, layout.split(), frames)

    def merge(self, node: fx.Node, layout: Layout, frames: int) -> fx.Node:
        """The inverse of `split`."""
        return node if layout.clean else self.reshape(node, layout, frames)

    def narrow_merged(self, value: Value, window: Window, up: int, span: range) -> fx.Node:
        """Frames `span` of a value whose frames come in groups of `up`, from the groups in `window`."""
        skip = span.start - window.start * up
        if skip == 0 and len(span) == (window.stop - window.start) * up:
            return window.node
        return self.narrow(window.node, value.layout.time, skip, len(span))

    def repeat_frames(self, window: Window, axis: int, times: int, span: range) -> fx.Node:
        """Each frame `times` times, cropped to `span`."""
        wide = self.aten("repeat_interleave.self_int", window.node, times, axis)
        skip, total = span.start - window.start * times, (window.stop - window.start) * times
        return wide if (skip, total) == (0, len(span)) else self.narrow(wide, axis, skip, len(span))

    def index_frames(self, node: fx.Node, axis: int, indices: list[int]) -> fx.Node:
        """Chosen entries of a dimension."""
        return self.aten("index_select.default", node, axis, self.constant(indices, torch.int64))

    def owned(self, node: fx.Node | None) -> fx.Node | None:
        """A tensor that shares no memory with the inputs or the state: outputs are the caller's."""
        source = None if node is None else base(node)
        kept = source is not None and (source.op == "placeholder" or source.name.startswith("delay_"))
        return self.aten("clone.default", node) if kept and node is not None else node

    # -- constants and static values ---------------------------------------------------------------------------------

    def constant(self, numbers: Any, dtype: torch.dtype) -> fx.Node:
        """A small tensor of known numbers."""
        key = ("constant", str(numbers), dtype)
        if key not in self._memo:
            self._memo[key] = self.attribute(
                f"constant_{len(self.root)}", torch.tensor(numbers, dtype=dtype, device=self.device)
            )
        node: fx.Node = self._memo[key]
        return node

    def attribute(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """A tensor that the program holds."""
        if name not in self.root:
            self.root[name] = tensor
        if ("attribute", name) not in self._memo:
            node = self.graph.get_attr(name)
            node.meta["cofx"] = self.about
            self._memo["attribute", name] = node
        found: fx.Node = self._memo["attribute", name]
        return found

    def static(self, node: fx.Node) -> Any:
        """A value that does not depend on time, inside the program."""
        if node not in self.statics:
            self.statics[node] = self._static(node)
        return self.statics[node]

    def _static(self, node: fx.Node) -> Any:
        if node in self.inputs:
            return self.inputs[node]
        if node.op == "get_attr":
            return self.attribute(str(node.target).replace(".", "_"), self.constants.value(node))
        if node not in self.constants.batched and self.key.folded:
            value = self.constants.value(node)
            if isinstance(value, torch.Tensor):
                return self.attribute(f"folded_{node.name}", value)
            if isinstance(value, (tuple, list)):
                return [self.attribute(f"folded_{node.name}_{i}", v) for i, v in enumerate(value)]
        return self.copy(node, self.static)

    def copy(self, node: fx.Node, value_of: Any) -> Any:
        """A node of the traced graph as it was at the first sample point, its batch size left open."""
        if node.target is operator.getitem:
            source = value_of(node.args[0])
            return source[node.args[1]] if isinstance(source, (list, tuple)) else self.getitem(source, node.args[1])  # type: ignore[arg-type,index]
        bound = {k: self.numbers(node, k, map_arg(v, value_of)) for k, v in node.meta["samples"][0].items()}
        if isinstance(node.target, Loop):
            return self.loop(node.target, list(bound.values()), node)
        args, kwargs = unbind(node.target, bound)
        return self.emit(node.target, *args, **kwargs)

    def loop(self, loop: Loop, args: list[Any], node: fx.Node) -> list[Any]:
        """A loop over all frames of whole clips."""
        streams = args[: len(loop.dims)]
        state = [] if loop.starts else args[len(streams) : len(streams) + len(loop.carried)]
        given = args[len(streams) + len(state) :]
        collected: list[list[Any]] = [[] for _ in loop.results]
        length = node.meta["samples"][0]["0"].meta["sizes"][0][loop.dims[0]] // loop.widths[0]
        for t in range(length):
            frames = loop.frames(streams, t, functools.partial(self.aten, "select.int"), self.narrow)
            if t < len(loop.starts):
                after = self.inline(loop.starts[t], [*frames, *given])
                made = loop.of_start(t, after)
            else:
                ramps = [
                    self.constant(at + t * step, dtype)
                    for (at, step), dtype in zip(loop.ramps, loop.ramp_dtypes(), strict=True)
                ]
                after = self.inline(loop.body, [*frames, *ramps, *state, *given])
                made = list(enumerate(after[len(loop.carried) :]))
            state = after[: len(loop.carried)] if t + 1 >= len(loop.starts) else []
            for i, value in made:
                collected[i].append(value)
        return [
            part[-1] if r.how == "last" else self.aten(f"{r.how}.default", part, r.dim)
            for part, r in zip(collected, loop.results, strict=True)
        ]

    def inline(self, graph: fx.Graph, given: list[Any]) -> list[Any]:
        """The results of a graph of traced nodes on these inputs."""
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        env: dict[fx.Node, Any] = dict(zip(inputs, given, strict=True))
        for node in graph.nodes:
            if node.op == "call_function":
                env[node] = self.copy(node, env.__getitem__)
        return [env[n] for n in graph.output_node().args[0]]  # type: ignore[union-attr,index]

    def view_as_channel(self, node: Any, axis: int, rank: int) -> fx.Node:
        """A vector as a tensor of `rank` dimensions, lying along `axis`."""
        return self.aten("reshape.default", node, [-1 if i == axis else 1 for i in range(rank)])

    def along_time(self, node: fx.Node, layout: Layout) -> fx.Node:
        """A vector with an entry per frame, shaped to broadcast along a (clean) layout's time axis."""
        return self.view_as_channel(node, layout.time, len(layout))

    def like(self, number: float, node: fx.Node) -> fx.Node:
        """A number as a tensor of a node's dtype and device."""
        return self.aten("new_full.default", node, [], number)

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Another dtype."""
        return node if dtype == torch.int64 else self.aten("_to_copy.default", node, dtype=dtype)

    def full(self, sizes: list[Any], number: float, dtype: torch.dtype) -> fx.Node:
        """The same number everywhere."""
        return self.aten("new_full.default", next(iter(self.inputs.values())), sizes, number, dtype=dtype)

    def table(self, node: fx.Node, axis: int, start: int, size: int, op: Op, span: range) -> fx.Node:
        """Frames `span` of a static table that lies along time."""
        at = self.aten("clamp.default", self.indices(op, span), 0, size - start - 1)
        if start:
            at = self.aten("add.Tensor", at, start)
        return self.aten("index_select.default", self.static(node), axis, at)

    # -- indices, for programs that know where in the stream they are ------------------------------------------------

    def indices(self, op: Op, span: range) -> fx.Node:
        """The true indices of the frames `span` that an op makes: int64, one for each."""
        return self.index_range(op.outputs[0], span)

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


class Index:
    """An integer inside a program, with the arithmetic that lengths are written in."""

    def __init__(self, builder: Builder, node: fx.Node) -> None:
        self.builder, self.node = builder, node

    def plus(self, other: Any) -> Index:
        if not isinstance(other, Index) and other == 0:
            return self
        return Index(self.builder, self.builder.aten("add.Tensor", self.node, _node(other)))

    __add__ = __radd__ = plus

    def __sub__(self, other: Any) -> Index:
        if not isinstance(other, Index) and other == 0:
            return self
        return Index(self.builder, self.builder.aten("sub.Tensor", self.node, _node(other)))

    def __mul__(self, other: Any) -> Index:
        if not isinstance(other, Index) and other == 1:
            return self
        return Index(self.builder, self.builder.aten("mul.Tensor", self.node, _node(other)))

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> Index:
        if other == 1:
            return self
        divisor = self.builder.constant(other, torch.int64)
        return Index(self.builder, self.builder.aten("floor_divide.default", self.node, divisor))

    def minimum(self, other: Any) -> Index:
        assert isinstance(other, Index)
        return Index(self.builder, self.builder.aten("minimum.default", self.node, other.node))


def _node(other: Any) -> Any:
    return other.node if isinstance(other, Index) else other


@untraced
def generate(plan: Plan, key: Key, device: torch.device, validity: bool = False) -> Program:
    """The program of a key, its small constants on `device`.

    With `validity` it returns a third tuple: for each output with time, which of its frames exist (bool, one for each).
    """
    b = Builder(plan.schedule, key, plan.batch_input(key.frames), plan.constants, device, plan.about)
    _inputs(b, plan)
    specs = state_specs(plan.schedule, key.capacity)
    kept = [*plan.schedule.history, *(op.outputs[0] for op in plan.schedule.graph.ops for _ in op.carries)]
    for spec, value in zip(specs, kept, strict=True):
        b.about = plan.about(value)
        b.states[spec.name] = _placeholder(b, spec.name)
    for op in plan.schedule.graph.ops:
        _emit_op(b, op, plan)
    spans, results = _outputs(b, plan)
    _keep_histories(b, plan)
    b.about = None
    after = tuple(b.next_states.get(s.name, b.states[s.name]) for s in specs)
    exist = (_validity(b, plan, spans),) if validity else ()
    b.graph.output((tuple(results), after, *exist))
    b.graph.output_node().meta["cofx"] = None
    b.graph.eliminate_dead_code()
    where = [b.states["count"], b.states["length"]]
    for node in where:
        if not node.users:
            b.graph.erase_node(node)
    b.graph.lint()
    module = fx.GraphModule(_root(b.root), b.graph, class_name="StepProgram")
    graph, tensors, done = b.graph, b.root, False
    if key.folded:
        apart = {b.states[s.name].name: s.apart for s in specs if s.apart is not None} if key.apart else None
        batches = [p.batch for p in plan.capture.points]
        other = next((i for i, n in enumerate(batches) if n != batches[0]), 0)
        arguments = _arguments(b, plan, specs), _arguments(b, plan, specs, other)
        lowered = Lowering(module, plan.constants, arguments, device, apart, key.kernels)
        graph, tensors, done = lowered.graph, lowered.tensors, not apart or bool(lowered.size_of)
    wants = tuple(w for w in ("count", "length") if b.states[w].users)
    return Program(module, flatten(graph, tensors), graph, tensors, spans, wants, key.apart and done)


def _arguments(
    b: Builder, plan: Plan, specs: list[StateSpec], point: int = 0
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """The shapes and dtypes of a program's arguments, for the batch size of a sample point."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for traced, value in plan.inputs:
        size = list(traced.meta["sizes"][point])
        if value is not None:
            size[value.layout.time] = len(b.span(value))
            if b.key.frames and value.rate == 1:
                del size[value.layout.time]
        shapes[b.inputs[traced].name] = tuple(size), traced.meta["val"].dtype
    batch = plan.capture.points[point].batch
    for spec in specs:
        shapes[b.states[spec.name].name] = spec.shape(batch), spec.dtype
    for name in ("count", "length"):
        shapes[b.states[name].name] = (), torch.int64
    return [shapes[n.name] for n in b.graph.nodes if n.op == "placeholder"]


def _root(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.nn.Parameter):
            root.register_parameter(name, tensor)
        else:
            root.register_buffer(name, tensor, persistent=False)
    return root


def _placeholder(b: Builder, name: str) -> fx.Node:
    node = b.graph.placeholder(name)
    node.target = node.name  # another where an input has that name already
    node.meta["cofx"] = b.about
    return node


def _inputs(b: Builder, plan: Plan) -> None:
    for traced, value in plan.inputs:
        b.about = plan.about(value)
        b.inputs[traced] = _placeholder(b, traced.name)
    b.about = None
    for name in ("count", "length"):
        b.states[name] = _placeholder(b, name)
    for traced, value in plan.inputs:
        if value is None:
            continue
        b.about = plan.about(value)
        span = b.span(value)
        node = b.inputs[traced]
        if b.key.frames and value.rate == 1:
            node = b.aten("unsqueeze.default", node, value.layout.time)
        b.chunks[value] = Window(node, span.start, span.stop)


def _emit_op(b: Builder, op: Op, plan: Plan) -> None:
    b.about = plan.about(op.outputs[0])
    span = b.span(op.outputs[0])
    if not span or (op.clip is not None and b.key.idle):
        b.chunks.update(dict.fromkeys(op.outputs))
        return
    windows = [b.window(r, span, op) for r in op.reads]
    result = op.lower(b, op, windows, span, [b.carried(op, c) for c in op.carries])
    if op.carries:
        result, after = result
        for carry, node in zip(op.carries, after, strict=True):
            b.next_states[carry_name(op, carry)] = node
    if op.several and not isinstance(result, tuple):
        result = tuple(b.getitem(result, i) for i in range(len(op.outputs)))
    for v, node in zip(op.outputs, result if isinstance(result, tuple) else [result], strict=True):
        b.chunks[v] = None if node is None else Window(node, span.start, span.stop)


def _outputs(b: Builder, plan: Plan) -> tuple[list[OutputSpan], list[Any]]:
    spans, results = [], []
    for leaf in plan.outputs:
        b.about = plan.about(leaf.value)
        if leaf.value is None:
            spans.append(OutputSpan(0, 1))
            results.append(b.static(leaf.node))
            continue
        span, chunk = b.span(leaf.value), b.chunks.get(leaf.value)
        spans.append(OutputSpan(span.start, len(span)))
        node = None if chunk is None else chunk.node
        if node is not None and b.key.frames and leaf.single:
            node = b.aten("select.int", node, leaf.value.layout.time, 0)
        results.append(b.owned(node))
    return spans, results


def _validity(b: Builder, plan: Plan, spans: list[OutputSpan]) -> tuple[fx.Node | None, ...]:
    """For each output with time, which of the returned frames exist; none do where a table has run out."""
    within = None
    for op in b.schedule.graph.ops:
        if op.limit is not None:
            value = op.outputs[0]
            stop = b.index_range(value, range(b.after[value], b.after[value] + 1))
            ok = b.aten("le.Scalar", b.aten("minimum.default", stop, b.length(value)), op.limit)
            within = ok if within is None else b.aten("logical_and.default", within, ok)
    if b.key.capacity and b.schedule.growing:
        room = b.aten("le.Scalar", b.states["count"], b.key.capacity - b.key.ticks)
        ok = b.aten("unsqueeze.default", room, 0)
        within = ok if within is None else b.aten("logical_and.default", within, ok)
    exist: list[fx.Node | None] = []
    for leaf, span in zip(plan.outputs, spans, strict=True):
        if leaf.value is None:
            exist.append(within)
            continue
        inside = b.inside(leaf.value, range(span.start, span.start + span.frames))
        exist.append(inside if within is None else b.aten("logical_and.default", inside, within))
    return tuple(exist)


def _keep_histories(b: Builder, plan: Plan) -> None:
    for value in b.schedule.history:
        frames = b.schedule.kept(value, b.key.capacity)
        b.about = plan.about(value)
        new = b.chunks.get(value)
        if new is None:
            continue
        time = value.layout.split().time
        made = new.stop - new.start
        if made >= frames:
            last = b.narrow(b.split(new.node, value.layout, made), time, made - frames, frames)
            node = b.emit(
                aten.clone.default, last, memory_format=torch.contiguous_format, name=f"state_{value.name}_out"
            )
        else:
            buffer = b.buffer(value, new.start - 1, new.stop)
            total = buffer.stop - buffer.start
            node = b.emit(aten.slice.Tensor, buffer.node, time, total - frames, total, name=f"state_{value.name}_out")
        b.next_states[f"state_{value.name}"] = node
