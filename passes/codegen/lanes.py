"""Code generation: one program for many streams that begin, pause and end each by itself.

A *lane* is one stream in a batch of streams. A lane program takes ``k * S`` ticks (S: the schedule's period) for every
lane at once, and is the same at the start, in mid-stream and at the end::

    (frames..., start, ready, length, position, state...) -> (outputs, valid, (position, state...))

It is made from a masked program at phase 0, in which `count` and `length` are numbers that hold for the whole batch.
Here they become vectors with a number per lane. What is computed from them alone (indices, masks, rows of tables) has
no batch dimension in the program, so lanes are put in front of it; all else has its lanes in its batch dimension
already. Where the two meet, a pointwise op takes the vector's lanes into the batch dimension; any other op is run under
`torch.vmap`, whose trace takes the op's place. No op is repeated lane by lane.

Nothing is there before a stream's first tick: frames that need no input wait for it (`schedule_delays(waiting=True)`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ...runtime.errors import InputError
from ...runtime.program import Program, StateSpec
from ..canonicalize import bind
from ..capture import untraced
from ..errors import user_frame
from ..layout import BATCH, Layout
from ..schedule_delays import Schedule
from ..symbolic_recurrence import LAYERS
from .flat import flatten
from .graph_module import generate
from .key import FOREVER, Key
from .lane_states import POSITION, around_batch, lane_schedule, lane_shape, lane_state_specs, state_layouts
from .lane_vmap import FRONT, MIXED, Ambiguous, Place, trace_vmapped
from .states import state_specs

if TYPE_CHECKING:
    from ..pipeline import Leaf, Plan

aten = torch.ops.aten

# what they make depends on sizes alone, whatever tensor they are called on
_FACTORIES = {aten.new_full.default, aten.new_zeros.default, aten.new_ones.default, aten.new_empty.default}


# tensors need not have the strides that were traced
_RESHAPES: dict[Any, Any] = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}

# what they are given broadcasts in all dimensions but the last two
_BATCHED = {aten.scaled_dot_product_attention.default}


@dataclass(frozen=True)
class LaneInput:
    """An input of a lane program. `batch`, `time`: its dimensions there, or None. `frames`: frames per call."""

    name: str
    shape: tuple[int, ...]  # for one lane
    dtype: torch.dtype
    batch: int | None
    time: int | None


@dataclass(frozen=True)
class LaneOutput:
    """An output of a lane program.

    Attributes:
        batch, time: its dimensions there, or None.
        frames: per call.
        model_batch, model_time: its dimensions as the model has them (lanes in front where it gives none).
    """

    batch: int | None
    time: int | None
    frames: int
    model_batch: int | None
    model_time: int | None


@dataclass(frozen=True)
class LaneProgram:
    """A pure function for a batch of lanes, and what goes in and comes out.

    Attributes:
        module: ``(frames..., [start, ready, length,] position, state...) -> (outputs, valid, (position, state...))``.
            `start` and `ready` are bool, `length` int64, each of shape (lanes, 1). `valid` has a tensor per output,
            (lanes, frames), or (lanes,) where the output has no time axis.
        run: the same as a plain function, which is what runs.
        ticks: that it takes.
        inputs, outputs: what they look like.
        states: the position, then all that is kept, lanes first; zeros are a lane that has not begun.
        flush_calls: after the call with a lane's last frame, calls until its last output at the most.
        device: where it runs.
    """

    module: fx.GraphModule
    run: Callable[..., Any]
    ticks: int
    inputs: list[LaneInput]
    outputs: list[LaneOutput]
    states: list[StateSpec]
    flush_calls: int
    device: torch.device


@untraced
def generate_lanes(
    plan: Plan,
    ticks: int,
    device: torch.device,
    *,
    frames: bool = False,
    controls: bool = True,
    batch_first: bool = False,
    folded: bool = True,
    capacity: int = 0,
) -> LaneProgram:
    """The lane program of a plan.

    Args:
        plan: traced with an open batch size, or with a batch of one.
        ticks: that a call takes, a multiple of the period.
        device: of its constants.
        frames: inputs and outputs come without time axis.
        controls: it takes start, ready and length; else all lanes begin together and do not end.
        batch_first: lanes come first in inputs and outputs, wherever the model has its batch dimension.
        folded: what depends on parameters alone is a constant.
        capacity: ticks for which there is room, where all of a stream is kept; no output is valid beyond it.
    """
    schedule = lane_schedule(plan)
    if ticks < 1 or ticks % schedule.period:
        raise ValueError(f"a lane program takes a multiple of {schedule.period} ticks, not {ticks}")
    plan = dataclasses.replace(plan, schedule=schedule, timings={})
    key = Key(0, ticks, masked=True, holding=schedule.sequential_from > 0, frames=frames, folded=folded,
              endless=not controls, capacity=capacity)  # fmt: skip
    program = generate(plan, key, device, validity=True)
    has_batch = any(b is not None for b in plan.clock.batch_dims)
    build = functools.partial(
        _Build, plan, key, program, device, controls=controls, batch_first=batch_first, has_batch=has_batch
    )
    if plan.capture.symbolic_batch and has_batch:
        try:
            return build(in_front=False).program()
        except Ambiguous:
            pass
    return build(in_front=True).program()


def generate_exported(plan: Plan, ticks: int, device: torch.device, controls: bool, capacity: int) -> LaneProgram:
    """The lane program as files hold it: lanes first everywhere, and room for `capacity` ticks and the flush calls
    after them, where all of a stream is kept."""
    schedule = lane_schedule(plan)
    room = capacity and -(-capacity // ticks) * ticks + flush_calls(schedule, plan.outputs, ticks) * ticks
    with torch.no_grad():
        return generate_lanes(plan, ticks, device, controls=controls, batch_first=True, capacity=room)


def flush_calls(schedule: Schedule, outputs: Sequence[Leaf], ticks: int) -> int:
    """After the call that a stream's last frame comes with, calls until its last output, at the most."""
    most = 0
    for leaf in outputs:
        if leaf.value is None:
            continue
        for length in range(1, math.lcm(schedule.period, ticks) + 1):
            end, n = schedule.length(leaf.value, length), -(-length // ticks)
            calls = 0
            while schedule.count(leaf.value, (n + calls) * ticks) < end:
                calls += 1
            most = max(most, calls)
    return most


def model_axes(plan: Plan, i: int, out: LaneOutput) -> tuple[int | None, int | None]:
    """The batch and time dimensions of an output as ``forward_steps`` gives it: a clip's evaluations put in place."""
    batch, time = out.model_batch, out.model_time
    if plan.outputs[i].clip and time is not None:
        stacked = next(v.layout.time for _, v in plan.inputs if v is not None)
        time = min(stacked, len(plan.outputs[i].node.meta["sizes"][0]))
        batch = batch if batch is None else batch - 1 + (batch - 1 >= time)
    return batch, time


class _Build:
    """One lane program in the making."""

    def __init__(
        self, plan: Plan, key: Key, program: Program, device: torch.device, *, controls: bool,
        batch_first: bool, has_batch: bool, in_front: bool,
    ) -> None:  # fmt: skip
        self.plan, self.key, self.source, self.device = plan, key, program.module, device
        arguments = [n for n in self.source.graph.nodes if n.op == "placeholder"]
        first, last = len(plan.inputs), len(plan.inputs) + len(program.wants)
        self.inputs, self.states = arguments[:first], arguments[last:]
        self.wanted = dict(zip(program.wants, arguments[first:last], strict=True))
        self.controls, self.batch_first, self.has_batch, self.in_front = controls, batch_first, has_batch, in_front
        self.schedule = plan.schedule
        self.graph = fx.Graph()
        self.places: dict[fx.Node, Any] = {}
        self.env: dict[fx.Node, Any] = {}
        self.root = dict(_attributes(self.source))
        self.about: Any = None
        self.traces: dict[Any, Any] = {}
        self.aligned: dict[Any, fx.Node] = {}
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        batches = (1,) if in_front else (1, 2, 3)
        self.measured = {b: self._measure(b) for b in batches}

    # -- sizes -------------------------------------------------------------------------------------------------------

    def _measure(self, batch: int) -> dict[fx.Node, Any]:
        """What every node of the program gives for a batch size, on fake tensors."""
        found: dict[fx.Node, Any] = {}

        class Record(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                found[n] = super().run_node(n)
                return found[n]

        with self.fake, torch.no_grad():
            arguments = [self._input_example(i, batch) for i in range(len(self.inputs))]
            arguments += [torch.zeros((), dtype=torch.int64) for _ in self.wanted]
            arguments += [
                torch.zeros(s.shape(batch), dtype=s.dtype) for s in state_specs(self.schedule, self.key.capacity)
            ]
            Record(self.source).run(*arguments)
        return found

    def _input_example(self, i: int, batch: int) -> torch.Tensor:
        shape, _ = self._input_shape(i, batch)
        return torch.zeros(shape, dtype=self.plan.inputs[i][0].meta["val"].dtype)

    def _input_shape(self, i: int, batch: int) -> tuple[list[int], tuple[int | None, int | None]]:
        """The shape of an input in the program, and its batch and time dimensions."""
        node, value = self.plan.inputs[i]
        time, at = self.plan.clock.time_dims[i], self.plan.clock.batch_dims[i]
        shape = list(node.meta["sizes"][0])
        if at is not None:
            shape[at] = batch
        if value is None or time is None:
            return shape, (at, None)
        shape[time] = self.key.ticks * int(value.rate)
        if self.key.frames and value.rate == 1:
            del shape[time]
            return shape, (at if at is None or at < time else at - 1, None)
        return shape, (at, time)

    def _place(self, node: fx.Node) -> Any:
        """Where the lanes lie in what a node of the program gives, from its sizes for two batches."""
        return pytree.tree_map(_moved, self.measured[2][node], self.measured[3][node])

    # -- emitting ----------------------------------------------------------------------------------------------------

    def emit(self, target: Any, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        """One call of a function."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta["cofx"] = self.about
        return node

    def placeholder(self, name: str) -> fx.Node:
        """An argument of the lane program."""
        node = self.graph.placeholder(name)
        node.target = node.name  # another where an input has that name already
        node.meta["cofx"] = self.about
        return node

    def lanes(self) -> fx.Node:
        """The number of lanes."""
        if "lanes" not in self.aligned:
            self.aligned["lanes"] = self.emit(aten.sym_size.int, self.position, 0)
        return self.aligned["lanes"]

    # -- the program -------------------------------------------------------------------------------------------------

    def program(self) -> LaneProgram:
        """Everything, in order."""
        nodes = list(self.source.graph.nodes)
        specs = lane_state_specs(self.schedule, self.key.capacity)
        layouts = state_layouts(self.schedule, self.key.capacity)
        given = [self.placeholder(n.name) for n, _ in self.plan.inputs]
        control = [self.placeholder(n) for n in ("start", "ready", "length")] if self.controls else []
        self.position = self.placeholder(POSITION)
        kept = []
        for spec, inner in zip(specs[1:], self.states, strict=True):
            self.about = inner.meta["cofx"]
            kept.append(self.placeholder(spec.name))
        self.about = None
        count, length, ready, position = self._positions(control)
        self.bounds = count, length
        for name, node in (("count", count), ("length", length)):
            if name in self.wanted:
                self.env[self.wanted[name]], self.places[self.wanted[name]] = node, FRONT
        inputs = [self._input(i, node, ready) for i, node in enumerate(given)]
        for inner, node, layout, spec in zip(self.states, kept, layouts, specs[1:], strict=True):
            self._state_in(inner, node, layout, spec)
        for node in nodes:
            if node.op != "output" and node not in self.env:
                self.about = node.meta.get("cofx")
                self._node(node)
        returned: Any = self.source.graph.output_node().args[0]
        results, after, exist = returned
        outputs = [self._output(i, n) for i, n in enumerate(results)]
        valid = [self._valid(n, ready, o) for n, (_, o) in zip(exist, outputs, strict=True)]
        states = [position]
        for spec, node, layout, old in zip(specs[1:], after, layouts, kept, strict=True):
            states.append(self._state_out(node, layout, old, ready, spec))
        self.about = None
        self.graph.output((tuple(n for n, _ in outputs), tuple(valid), tuple(states)))
        self.graph.output_node().meta["cofx"] = None
        self.graph.eliminate_dead_code()
        self.graph.lint()
        module = fx.GraphModule(self.root, self.graph, class_name="LaneProgram")
        tensors = {n.target: getattr(module, n.target) for n in self.graph.nodes if n.op == "get_attr"}
        return LaneProgram(
            module,
            flatten(self.graph, tensors),
            self.key.ticks,
            inputs,
            [o for _, o in outputs],
            specs,
            flush_calls(self.schedule, self.plan.outputs, self.key.ticks),
            self.device,
        )

    def _positions(self, control: list[fx.Node]) -> tuple[fx.Node, fx.Node, fx.Node | None, fx.Node]:
        """For each lane the ticks before this call and the length; who is ready; and the position afterwards."""
        count = self.emit(aten.select.int, self.position, 1, 0)
        ticks = self.key.ticks
        if not control:
            forever = self.emit(aten.full_like.default, count, FOREVER)
            after = self.emit(aten.add.Tensor, self.position, self._constant([[ticks, 0]]), name="position_out")
            return count, forever, None, after
        start, ready, given = control
        before = self.emit(aten.where.ScalarOther, self.emit(aten.logical_not.default, start), self.position, 0)
        count = self.emit(aten.slice.Tensor, before, 1, 0, 1)
        known = self.emit(aten.slice.Tensor, before, 1, 1, 2)
        # a stream cannot end before what it has taken already
        told = self.emit(aten.add.Tensor, self.emit(aten.maximum.default, given, count), 1)
        told = self.emit(aten.where.ScalarOther, self.emit(aten.ge.Scalar, given, 0), told, 0)
        known = self.emit(aten.where.self, self.emit(aten.gt.Scalar, known, 0), known, told)
        length = self.emit(aten.sub.Tensor, known, 1)
        length = self.emit(aten.where.ScalarOther, self.emit(aten.ge.Scalar, length, 0), length, FOREVER)
        moved = self.emit(aten.cat.default, [self.emit(aten.add.Tensor, count, ticks), known], 1)
        position = self.emit(aten.where.self, ready, moved, self.position, name="position_out")
        flat = [self.emit(aten.squeeze.dim, n, 1) for n in (count, length, ready)]
        return flat[0], flat[1], flat[2], position

    # -- its borders -------------------------------------------------------------------------------------------------

    def _input(self, i: int, node: fx.Node, ready: fx.Node | None) -> LaneInput:
        """Take an input in: lanes in its batch dimension, or in front."""
        traced = self.plan.inputs[i][0]
        inner = self.inputs[i]
        shape, (at, time) = self._input_shape(i, 1)
        inner_time = time
        dtype = traced.meta["val"].dtype
        outer = 0 if self.batch_first and at is not None else at
        timed = self.plan.inputs[i][1] is not None
        if at is None and not self.has_batch and timed:
            place: Place = FRONT
            outer, time = 0, None if time is None else time + 1
            shape = [1, *shape]
        elif at is None:
            place = None
        else:
            if outer != at:
                node = self.emit(aten.movedim.int, node, 0, at)
                shape.insert(0, shape.pop(at))
                time = time if time is None or time > at else time + 1
            place = at
            if self.in_front:
                node = self.to_front(node, at)
                place = FRONT
        if ready is not None and place is not None:
            rank = self.measured[1][inner].dim() + (place == FRONT)
            at_time = None if inner_time is None else inner_time + (place == FRONT)
            node = self._only_alive(node, 0 if place == FRONT else place, at_time, rank, i, ready)
        self.env[inner], self.places[inner] = node, place
        return LaneInput(traced.name, tuple(shape), dtype, outer, time)

    def _only_alive(self, node: fx.Node, batch: int, time: int | None, rank: int, i: int, ready: fx.Node) -> fx.Node:
        """Zeros for lanes that are held, and for frames past the end of a stream, whatever they are given.

        Further on they are masked by index, but a number may be no index of anything, and kernels that fill up blocks
        of frames with zeros (bfloat16 convolutions) do not keep NaN to the frame that it is in.
        """
        value = self.plan.inputs[i][1]
        alive = ready
        if value is not None:
            rate = int(value.rate)
            frames = 1 if time is None else self.key.ticks * rate
            ticks = [[j // rate for j in range(frames)]]
            if ("ticks", frames, rate) not in self.aligned:
                count, length = (self.emit(aten.unsqueeze.default, n, 1) for n in self.bounds)
                at = count if self.key.ticks == 1 else self.emit(aten.add.Tensor, count, self._constant(ticks))
                inside = self.emit(aten.lt.Tensor, at, length)
                shaped = self.emit(aten.unsqueeze.default, ready, 1)
                self.aligned["ticks", frames, rate] = self.emit(aten.logical_and.default, shaped, inside)
            alive = self.aligned["ticks", frames, rate]
        sizes = [1] * rank
        sizes[batch] = -1
        if time is not None and self.key.ticks > 1:
            sizes[time] = frames
            if time < batch:
                alive = self.emit(aten.transpose.int, alive, 0, 1)
        shaped = self.emit(aten.reshape.default, alive, sizes)
        nothing = False if self.plan.inputs[i][0].meta["val"].dtype == torch.bool else 0
        return self.emit(aten.where.ScalarOther, shaped, node, nothing)

    def _constant(self, numbers: Any) -> fx.Node:
        name = f"lane_constant_{len(self.root)}"
        self.root[name] = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        node = self.graph.get_attr(name)
        node.meta["cofx"] = self.about
        return node

    def _state_in(self, inner: fx.Node, node: fx.Node, layout: Layout, spec: StateSpec) -> None:
        """Take a state in, lanes first, to where the program has them."""
        sizes = lane_shape(layout)
        if len(spec.dims) < 1 + len(sizes):
            node = self.emit(aten.reshape.default, node, [self.lanes(), *sizes])
        at = next((i for i, d in enumerate(layout) if BATCH in d), None)
        if at is None:
            self.env[inner], self.places[inner] = node, FRONT
            return
        before, after = around_batch(layout[at])
        alone = (before, after) == (1, 1)
        if self.in_front:
            self.env[inner] = self.emit(aten.unsqueeze.default, node, at + 1) if alone else node
            self.places[inner] = FRONT
        elif alone:
            self.env[inner] = self.emit(aten.movedim.int, node, 0, at) if at else node
            self.places[inner] = at
        else:
            node = self.emit(aten.reshape.default, node, [self.lanes(), *sizes[:at], before, after, *sizes[at + 1 :]])
            node = self.emit(aten.movedim.int, node, 0, at + 1)
            sizes = [*sizes[:at], -1, *sizes[at + 1 :]]
            self.env[inner] = self.emit(aten.reshape.default, node, sizes)
            self.places[inner] = MIXED

    def _state_out(
        self, inner: fx.Node, layout: Layout, old: fx.Node, ready: fx.Node | None, spec: StateSpec
    ) -> fx.Node:
        """A state lanes first, as it was for lanes that are held."""
        self.about = old.meta["cofx"]
        node, place = self.env[inner], self.places[inner]
        at = next((i for i, d in enumerate(layout) if BATCH in d), None)
        sizes = lane_shape(layout)
        if place is None:
            node = self.expand(node, len(layout))
        elif place == MIXED:
            assert at is not None
            before, after = around_batch(layout[at])
            parted = [*sizes[:at], before, self.lanes(), after, *sizes[at + 1 :]]
            node = self.emit(aten.movedim.int, self.emit(aten.reshape.default, node, parted), at + 1, 0)
            node = self.emit(aten.reshape.default, node, [self.lanes(), *sizes])
        elif place == FRONT:
            if at is not None and layout[at] == (BATCH,):
                node = self.emit(aten.squeeze.dim, node, at + 1)
        elif place:
            node = self.emit(aten.movedim.int, node, place, 0)
        kept = [n for _, n in spec.dims[1:]]
        if len(kept) < len(sizes):
            node = self.emit(aten.reshape.default, node, [self.lanes(), *kept])
        if ready is None:
            return self.emit(aten.clone.default, node, memory_format=torch.contiguous_format, name=f"{spec.name}_out")
        shaped = self.emit(aten.reshape.default, ready, [-1, *[1] * len(kept)]) if kept else ready
        return self.emit(aten.where.self, shaped, node, old, name=f"{spec.name}_out")

    def _output(self, i: int, inner: fx.Node) -> tuple[fx.Node, LaneOutput]:
        """An output as the caller gets it."""
        leaf = self.plan.outputs[i]
        node, place = self.env[inner], self.places[inner]
        self.about = inner.meta.get("cofx")
        single = leaf.value is None or (self.key.frames and leaf.single)
        time = None if single else leaf.value.layout.time  # type: ignore[union-attr]
        frames = 1 if leaf.value is None else int(leaf.value.rate * self.key.ticks)
        rank = self.measured[1][inner].dim()
        if place == MIXED:
            raise Ambiguous
        own = (None, time) if place is None or not self.has_batch else None  # it has no lanes by itself
        if place is None:
            node = self.expand(node, rank) if self.batch_first else node
            place = 0 if self.batch_first else None
            time = time + 1 if time is not None and self.batch_first else time
        elif place == FRONT:
            at = self._output_batch(inner, time, stacked=leaf.clip and not single)
            if at is None:
                place, time = 0, None if time is None else time + 1
            else:
                node, place = self.emit(aten.movedim.int, self.emit(aten.squeeze.dim, node, at + 1), 0, at), at
        model = own if own is not None else (place, time)
        if self.batch_first and place:
            node = self.emit(aten.movedim.int, node, place, 0)
            time = time if time is None or time > place else time + 1
            place = 0
        return node, LaneOutput(place, time, frames, *model)

    def _output_batch(self, inner: fx.Node, time: int | None, stacked: bool) -> int | None:
        """Where an output whose lanes lie in front has its own batch dimension, of size one.

        `stacked`: it is a clip's, whose evaluations come before its own dimensions.
        """
        if not self.in_front:
            return None
        at = next((b + stacked for b in self.plan.clock.batch_dims if b is not None), None)
        shape = self.measured[1][inner].shape
        if at is not None and time is None and at >= len(shape):
            at = None
        return at if at is not None and at < len(shape) and shape[at] == 1 and at != time else None

    def _valid(self, inner: fx.Node | None, ready: fx.Node | None, output: LaneOutput) -> fx.Node:
        """Whether each frame of an output exists: (lanes, frames), or (lanes,) where it has no time axis."""
        self.about = None
        node = None if inner is None else self.env[inner]
        if node is None:
            node = ready if ready is not None else self.emit(aten.ge.Scalar, self._counts(), 0)
            node = self.emit(aten.unsqueeze.default, node, 1)
        else:
            if self.places[inner] is None:  # type: ignore[index]
                node = self.expand(node, 1)
            if ready is not None:
                shaped = self.emit(aten.unsqueeze.default, ready, 1)
                node = self.emit(aten.logical_and.default, shaped, node)
        if output.time is None:
            node = self.emit(aten.select.int, node, 1, 0)
        return self.emit(aten.clone.default, node)

    def _counts(self) -> fx.Node:
        return self.emit(aten.select.int, self.position, 1, 0)

    # -- lanes -------------------------------------------------------------------------------------------------------

    def expand(self, node: fx.Node, rank: int) -> fx.Node:
        """Something that all lanes share, once for each."""
        return self.emit(aten.expand.default, self.emit(aten.unsqueeze.default, node, 0), [self.lanes(), *[-1] * rank])

    def to_front(self, node: fx.Node, at: int) -> fx.Node:
        """Lanes from a dimension of their own to the front."""
        node = self.emit(aten.movedim.int, node, at, 0) if at else node
        return self.emit(aten.unsqueeze.default, node, at + 1)

    def _node(self, node: fx.Node) -> None:
        """One node of the program, for all lanes."""
        value = self.measured[1][node]
        if node.op == "get_attr":
            self.env[node], self.places[node] = self.graph.node_copy(node), None
            return
        if node.target is operator.getitem:
            source: Any = node.args[0]
            if isinstance(self.env[source], list):
                index: Any = node.args[1]
                self.env[node], self.places[node] = self.env[source][index], self.places[source][index]
                return
        if isinstance(value, int):  # a size
            self.env[node] = value if self.in_front else self.graph.node_copy(node, self.env.__getitem__)
            self.places[node] = None
            return
        places = [p for n in node.all_input_nodes for p in pytree.tree_leaves(self.places[n], is_leaf=_is_place)]
        if node.target in _FACTORIES:
            places = [None]
        if FRONT not in places:
            place = None if self.in_front else self._place(node)
            kept = [p is not None for p in pytree.tree_leaves(place, is_leaf=_is_place)]
            if all(kept) or all(p is None for p in places):
                self.env[node] = self.graph.node_copy(node, self.env.__getitem__)
                self.places[node] = place
                return
        if MIXED in places:
            raise Ambiguous
        if node.target in LAYERS:
            self._recurrent(node)
        elif not self._pointwise(node):
            self._vmapped(node)

    def _pointwise(self, node: fx.Node) -> bool:
        """A pointwise op, or one whose first dimensions broadcast: lanes that lie in front are taken into the batch
        dimension of the result, if it has one."""
        target, value = node.target, self.measured[1][node]
        if not isinstance(target, torch._ops.OpOverload):
            return False
        if torch.Tag.pointwise not in target.tags and target not in _BATCHED:
            return False
        if not isinstance(value, torch.Tensor):
            return False
        arguments = [n for n in node.all_input_nodes if isinstance(self.measured[1][n], torch.Tensor)]
        fronts = [n for n in arguments if self.places[n] == FRONT]
        dtypes = {self.measured[1][n].dtype for n in arguments}
        if len(dtypes) > 1 and any(self.measured[1][n].dim() == 0 for n in fronts):
            return False  # a number does not decide the result's dtype, a vector may
        place = FRONT if self.in_front else self._place(node)
        if place == MIXED:
            return False
        place = FRONT if place is None else place
        if place == FRONT and any(self.places[n] not in (FRONT, None) for n in arguments):
            return False
        moved = {n: self._aligned(n, value.dim(), place) for n in fronts}
        self.env[node] = self.graph.node_copy(node, lambda n: moved.get(n, self.env[n]))
        self.places[node] = place
        return True

    def _aligned(self, node: fx.Node, rank: int, place: int) -> fx.Node:
        """Something with its lanes in front, broadcast to a rank, with its lanes at a dimension if `place` is one."""
        key = (node, rank, place)
        if key not in self.aligned:
            shape = [1] * (rank - self.measured[1][node].dim()) + list(self.measured[1][node].shape)
            if place != FRONT:
                shape[place] = -1
                sizes = [-1, *[s for i, s in enumerate(shape) if i != place]]
                new = self.emit(aten.reshape.default, self.env[node], sizes)
                new = self.emit(aten.movedim.int, new, 0, place) if place else new
            elif rank == self.measured[1][node].dim():
                new = self.env[node]
            else:
                new = self.emit(aten.reshape.default, self.env[node], [-1, *shape])
            self.aligned[key] = new
        return self.aligned[key]

    # -- recurrent layers, of which vmap knows nothing ---------------------------------------------------------------

    def _recurrent(self, node: fx.Node) -> None:
        """Lanes that lie in front go into the batch dimension of a recurrent layer, beside what is there."""
        given = bind(node.target, node.args, node.kwargs)
        hidden = given["hx"] if isinstance(given["hx"], (list, tuple)) else [given["hx"]]
        batched, at = self.measured[1][given["input"]].dim() == 3, 0 if given["batch_first"] else 1
        if not self.in_front:
            raise Ambiguous
        moved = {n: self._folded(n, 1, batched) for n in hidden} | {
            given["input"]: self._folded(given["input"], at, batched)
        }
        copy = self.graph.node_copy(node, lambda n: moved.get(n, self.env[n]))
        found = []
        for i, one in enumerate(self.measured[1][node]):
            dim, got = 1 if i else at, self.emit(operator.getitem, copy, i)
            if batched:
                got = self.emit(aten.reshape.default, got, [*one.shape[:dim], self.lanes(), *one.shape[dim:]])
            found.append(self.emit(aten.movedim.int, got, dim, 0) if dim else got)
        self.env[node], self.places[node] = found, [FRONT] * len(found)

    def _folded(self, node: fx.Node, at: int, batched: bool) -> fx.Node:
        """Something with its lanes at a dimension, which may be one that it has already."""
        one = self.measured[1][node]
        new = self.env[node] if self.places[node] == FRONT else self.expand(self.env[node], one.dim())
        new = self.emit(aten.movedim.int, new, 0, at) if at else new
        return self.emit(aten.reshape.default, new, [*one.shape[:at], -1, *one.shape[at + 1 :]]) if batched else new

    # -- vmap --------------------------------------------------------------------------------------------------------

    def _vmapped(self, node: fx.Node) -> None:
        """Any op: what `torch.vmap` makes of it, traced for two batch sizes to keep the batch open."""
        flat, spec = pytree.tree_flatten((node.args, node.kwargs))
        flat = [self.measured[1][a] if isinstance(a, fx.Node) and isinstance(self.measured[1][a], int) else a
                for a in flat]  # fmt: skip
        tensors = [i for i, a in enumerate(flat) if isinstance(a, fx.Node)]
        places = [self.places[flat[i]] for i in tensors]
        if any(isinstance(p, (tuple, list)) or p == MIXED for p in places):
            raise Ambiguous
        leaves, out_spec = pytree.tree_flatten(self.measured[1][node])
        if self.in_front:
            targets: list[Place] = [FRONT] * len(leaves)
        else:
            targets = [FRONT if p is None or p == MIXED else p for p in self._leaf_places(node)]
        here = {n: self.measured[1][flat[n]] for n in tensors}
        key = (
            node.target,
            str(spec),
            tuple((tuple(here[i].shape), here[i].dtype) if i in here else repr(a) for i, a in enumerate(flat)),
            tuple(places),
            tuple(targets),
        )
        if key not in self.traces:
            filled = [here.get(i, a) for i, a in enumerate(flat)]
            at = dict(zip(tensors, places, strict=True))
            try:
                self.traces[key] = trace_vmapped(self.fake, node.target, filled, spec, at, targets)
            except RuntimeError as error:
                if "Batching rule not implemented" in str(error):
                    raise self._refusal(node) from error
                raise
        traced, slopes = self.traces[key]
        arguments = [self.env[flat[i]] for i in tensors]
        results = self._inline(traced, slopes, arguments)
        self.env[node] = results[0] if isinstance(leaves, list) and out_spec.is_leaf() else results
        self.places[node] = targets[0] if out_spec.is_leaf() else targets

    def _refusal(self, node: fx.Node) -> InputError:
        """That an op cannot be run for all lanes at once."""
        timing = node.meta.get("cofx")
        line = user_frame(timing.value.node) if timing is not None else "(unknown line)"
        return InputError(
            f"this model has no lanes: {node.target} mixes what lies in its batch, and torch.vmap has no rule for it\n"
            f"    at      {line}\n"
            "    try     a step model for each stream (copy.deepcopy), called without start, ready and length"
        )

    def _leaf_places(self, node: fx.Node) -> list[Place]:
        two, three = (pytree.tree_leaves(self.measured[b][node]) for b in (2, 3))
        return [_moved(a, b) for a, b in zip(two, three, strict=True)]

    def _inline(
        self, traced: fx.Graph, slopes: dict[tuple[fx.Node, int], tuple[int, int]], arguments: list[fx.Node]
    ) -> list[fx.Node]:
        """A traced graph put in here."""
        env: dict[fx.Node, fx.Node] = {}
        given = iter(arguments)
        for node in traced.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "output":
                return [env[n] for n in pytree.tree_leaves(node.args[0])]
            elif node.op == "call_function":
                if node.target is aten.detach.default:
                    env[node] = env[node.args[0]]
                    continue
                flat, spec = pytree.tree_flatten((node.args, node.kwargs))
                flat = [
                    self._lane_number(*slopes[node, i]) if (node, i) in slopes else map_arg(a, env.__getitem__)
                    for i, a in enumerate(flat)
                ]
                args, kwargs = pytree.tree_unflatten(flat, spec)
                env[node] = self.emit(_RESHAPES.get(node.target, node.target), *args, **kwargs)
            else:
                raise Ambiguous
        raise AssertionError("a graph without output")

    def _lane_number(self, slope: int, rest: int) -> Any:
        product = self.lanes() if slope == 1 else self.emit(operator.mul, self.lanes(), slope)
        return product if rest == 0 else self.emit(operator.add, product, rest)


def _moved(two: Any, three: Any) -> Place:
    """Where the lanes of a tensor lie, from its shapes for a batch of two and of three."""
    if not isinstance(two, torch.Tensor):
        return None
    moving = [i for i, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]
    if not moving:
        return None
    if len(moving) > 1:
        raise Ambiguous
    return moving[0] if (two.shape[moving[0]], three.shape[moving[0]]) == (2, 3) else MIXED


def _is_place(x: Any) -> bool:
    return x is None or isinstance(x, int)


def _attributes(module: fx.GraphModule) -> list[tuple[str, Any]]:
    return [(str(n.target), getattr(module, str(n.target))) for n in module.graph.nodes if n.op == "get_attr"]
