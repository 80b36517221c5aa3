"""The order of the passes, read from top to bottom; nobody else knows it.

    capture -> canonicalize -> propagate facts -> build clips -> check -> schedule delays -> generate code

`compile_plan` does all but the last; programs are generated from a `Plan` when they are first needed.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .build_clips import build_clips
from .canonicalize import canonicalize
from .capture import Capture, Clock, Point, SizeReturned, capture, named_tensors
from .codegen.constants import Constants
from .compare_lengths import compare_lengths
from .compare_runs import Runs
from .drop_caches import Kept, dropped, kept_by, ways_without
from .endings import Endings, General, Trace, find_general, in_steps
from .errors import CaptureError, CompileError, NonLocalError, Refusal, RefusedError, module_path
from .fold_positions import fold_positions
from .layout import TIME
from .loops import Loop
from .place_delays import place_delays
from .propagate_facts import Facts, propagate_facts
from .registry import Call, Fact, InClip, Static
from .roll_up_loops import gather_assignments, roll_up_loops
from .schedule_delays import Schedule, phases, reach, schedule_delays
from .sink_slices import sink_slices
from .split_einsums import split_einsums
from .split_keys import split_keys
from .stream_graph import Clip, Op, Value, View, read
from .unfold_spectra import unfold_spectra
from .unskew_distances import unskew_distances

# a stream that does the same again only after more ticks is recomputed over clips where it ends in a clip anyway
MOST_PHASES = 1 << 14


@dataclass(eq=False)
class Timing:
    """Where a value stands in time, in ticks of the input: ``meta["cofx"]`` of every generated node.

    Worked out when asked for: a receptive field is a walk through the graph.
    """

    schedule: Schedule
    value: Value

    @cached_property
    def fact(self) -> str:
        """What the value is: its layout, or the promise of the clip that it is evaluated from."""
        clip = clip_of(self.value)
        return f"Clip({clip.equivalence})" if clip else f"Stream({self.value.layout})"

    @cached_property
    def delay(self) -> int:
        """The index of the tick at which its first frame comes."""
        low, high = 0, 1
        while self.schedule.count(self.value, high) < 1:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.schedule.count(self.value, middle) >= 1 else (middle, high)
        return high - 1

    @cached_property
    def _reach(self) -> Fraction:
        return reach(self.schedule, self.value)

    @property
    def receptive_field(self) -> float | int | Fraction:
        """Ticks of input on which a frame depends; infinite with memory."""
        return math.inf if self.value.memory else whole(self._reach)

    @property
    def stride(self) -> int | Fraction:
        """Ticks per frame."""
        return whole(1 / self.value.rate)

    @property
    def padding(self) -> int | Fraction:
        """``receptive_field - 1 - delay``, memory left out of the receptive field."""
        return whole(self._reach - 1 - self.delay)

    def __str__(self) -> str:
        return f"{self.fact} delay={self.delay} rf={self.receptive_field} stride={self.stride} pad={self.padding}"


@dataclass(frozen=True)
class Leaf:
    """One leaf of the model's output.

    Attributes:
        node, value: the traced node, and the stream that has its frames (None: it does not depend on time).
        equivalence: what holds for it.
        single: a step yields one frame at most, so that frames come without time axis.
        clip: its frames are evaluations of whole clips.
        reason: what ended the stream, for a clip.
    """

    node: fx.Node
    value: Value | None
    equivalence: str
    single: bool
    clip: bool
    reason: str


@dataclass
class Plan:
    """A compiled model before code generation."""

    graph: fx.Graph
    facts: Facts
    schedule: Schedule
    inputs: list[tuple[fx.Node, Value | None]]
    outputs: list[Leaf]
    out_spec: pytree.TreeSpec
    constants: Constants
    clock: Clock
    capture: Capture
    runs: Runs | None  # None if the module is not there, see saved_plan.py
    ends: dict[str, Any] | None  # then: the lengths at which a stream may end
    limit: (
        tuple[int, str | None] | None
    )  # the last tick up to which the model does as it was traced, and where it ceases to
    branch: str | None  # a line that does otherwise at other lengths, for which whole clips are recomputed
    endings: Endings | None = None  # the traces that were put together, if there are several
    replaced: tuple[str, ...] = ()  # what the module that is compiled does otherwise than the user's
    timings: dict[Value, Timing] = field(default_factory=dict)

    def equivalence(self, leaf: Leaf) -> str:
        """What holds for an output: less than was planned if the user allowed it."""
        less = self.replaced or any(op.approximate for op in self.schedule.graph.ops)
        return "approximate" if less and leaf.value is not None else leaf.equivalence

    def about(self, value: Value | None) -> Timing | None:
        """The timing of a value."""
        if value is None:
            return None
        if value not in self.timings:
            self.timings[value] = Timing(self.schedule, value)
        return self.timings[value]

    def batch_input(self, frames: bool) -> tuple[int, int] | None:
        """An input and its dimension from which a program reads the batch size."""
        if not self.capture.symbolic_batch:
            return None
        for i, ((_, value), axis) in enumerate(zip(self.inputs, self.clock.batch_dims, strict=True)):
            if value is not None and axis is not None:
                dropped = frames and value.rate == 1 and value.layout.time < axis
                return i, axis - dropped
        return None


def compile_plan(
    model: nn.Module,
    example: Sequence[torch.Tensor],
    clock: Clock,
    ticks: int,
    batch: int,
    equivalence: str | None,
    newest: bool,
    context: int | None = None,
    choose: Callable[[str, str], str] | None = None,
    without: Sequence[Kept] = (),
) -> Plan:
    """Everything from the user's module to a schedule.

    Args:
        model: as it is; it is not changed.
        example: an input of each kind, at any length.
        clock: how the inputs' axes lie.
        ticks, batch: the clip length in ticks and the batch size to trace with.
        equivalence: the equivalence that is asked for, or None for the best that the ops allow.
        newest: return only the newest frame of a clip's output.
        context: frames that attention may read, its own included, where the model sets no bound.
        choose: what becomes of a clip-wide op, by the path of its module and its name: "refuse" raises.
        without: what the model kept from earlier calls, and is compiled without.

    Raises:
        CaptureError: the model cannot be traced.
        RefusedError: it holds ops that cannot be given as asked; all are listed.
    """

    def anew() -> Plan | None:
        """The plan of the model as it is before its first call, if it gives the same and does alike at all lengths."""
        if without:
            return None
        kept = kept_by(model, clock.resized(example, Point(batch, 2 * ticks)))
        for way in ways_without(model, kept, example):
            with dropped(way), contextlib.suppress(CompileError):
                plan = compile_plan(model, example, clock, ticks, batch, equivalence, newest, context, choose, way)
                if plan.branch is None:
                    return plan
        return None

    try:
        captured = capture(model, example, clock, ticks, batch)
    except CaptureError as error:
        if not error.always and (plan := anew()) is not None:
            return plan
        raise
    found = _at_all_lengths(model, example, clock, batch, context, captured)
    captured, graph, constants, facts, alike = found.captured, found.graph, found.constants, found.facts, found.alike
    leaves = _leaves(graph)
    values = _values(facts, leaves, equivalence, newest)
    loops = any(isinstance(n.target, Loop) for n in graph.nodes)
    runs = Runs(model, captured, clock, example, loops)
    runs.without = without
    words = {_word(v) for v in values if v is not None}
    limit = runs.limit() if words & {"stream", "prefix"} else None
    branch = _branch(captured, runs, facts, values, alike, limit)
    if branch is not None and (forgetful := anew()) is not None:
        return forgetful
    if branch is not None:  # every clip has the traced length
        _may_be_clips(leaves[0], branch, equivalence)
        facts = propagate_facts(graph, captured, clock, constants, context)
        values = _values(facts, leaves, "clip", newest)
    if equivalence is None and words == {"first-clip"} and phases(facts.streams, values) > MOST_PHASES:
        facts = propagate_facts(graph, captured, clock, constants, context)
        values = _values(facts, leaves, "clip", newest)
    _check(facts, leaves, values, equivalence, choose)
    plan = _plan(
        graph, captured, clock, constants, facts, leaves, values, limit if branch is None else None, branch, runs
    )
    if found.traces and branch is None:
        plan.endings = Endings(found.traces, facts, plan.schedule.period)
    return plan


@dataclass
class _Found:
    """What is known of a traced model.

    Attributes:
        captured, graph, constants, facts: its trace, canonical graph, constants, and a fact for every value.
        alike: whether the graph holds at all lengths; None if that could not be told.
        traces: those from which it was put together.
    """

    captured: Capture
    graph: fx.Graph
    constants: Constants
    facts: Facts
    alike: bool | None
    traces: list[Trace]


def _at_all_lengths(
    model: nn.Module, example: Sequence[torch.Tensor], clock: Clock, batch: int, context: int | None, captured: Capture
) -> _Found:
    """A trace, or several of them put together, as a graph that holds at as many lengths as there are such graphs."""
    graph, facts, constants = _understand(model, captured, clock, context)
    traces: list[Trace] = []
    if (general := _general(model, example, clock, captured, graph, facts, batch)) is not None:
        whole = _understand(model, general.captured, clock, context, general.graph)
        if _streams(*whole[:2]):
            captured, traces, (graph, facts, constants) = general.captured, general.traces, whole

    def again(longer: int, closed: bool) -> tuple[Capture, fx.Graph]:
        other = capture(model, example, clock, longer, batch, captured, closed)
        if other.out_spec != captured.out_spec:
            raise SizeReturned("the model returns a number that follows from the length of its inputs")
        return other, _understand(model, other, clock, context)[0]

    alike = captured.symbolic_time or compare_lengths(graph, captured, again)
    if alike and not captured.symbolic_time:
        fold_positions(graph)
        unfold_spectra(graph)
        constants = Constants(tensors(model, captured), not_constant(graph, captured))
        facts = propagate_facts(graph, captured, clock, constants, context)
    return _Found(captured, graph, constants, facts, alike, traces)


def plan_of(
    model: nn.Module,
    graph: fx.Graph,
    captured: Capture,
    clock: Clock,
    *,
    equivalence: str | None,
    newest: bool,
    context: int | None,
    limit: tuple[int, str | None] | None,
    branch: str | None,
    ends: dict[str, Any],
) -> Plan:
    """The plan of a canonical graph that was a plan's before, see saved_plan.py; its module cannot be run."""
    constants = Constants(tensors(model, captured), not_constant(graph, captured))
    facts = propagate_facts(graph, captured, clock, constants, context)
    leaves = list(pytree.tree_leaves(graph.output_node().args[0]))
    values = _values(facts, leaves, "clip" if branch is not None else equivalence, newest)
    return _plan(graph, captured, clock, constants, facts, leaves, values, limit, branch, None, ends)


def _plan(
    graph: fx.Graph,
    captured: Capture,
    clock: Clock,
    constants: Constants,
    facts: Facts,
    leaves: list[fx.Node],
    values: list[Value | None],
    limit: tuple[int, str | None] | None,
    branch: str | None,
    runs: Runs | None,
    ends: dict[str, Any] | None = None,
) -> Plan:
    schedule = place_delays(schedule_delays(facts.streams, values))
    nodes = [n for n in graph.nodes if n.op == "placeholder"]
    by_node = {v.node: v for v in facts.streams.inputs}
    return Plan(
        graph=graph,
        facts=facts,
        schedule=schedule,
        inputs=[(n, by_node.get(n)) for n in nodes],
        outputs=[_leaf(schedule, n, v) for n, v in zip(leaves, values, strict=True)],
        out_spec=captured.out_spec,
        constants=constants,
        clock=clock,
        capture=captured,
        runs=runs,
        ends=ends,
        limit=limit,
        branch=branch,
    )


def _general(
    model: nn.Module,
    example: Sequence[torch.Tensor],
    clock: Clock,
    captured: Capture,
    graph: fx.Graph,
    facts: Facts,
    batch: int,
) -> General | None:
    """A graph that holds at more lengths than this one, where all outputs are streams."""
    if not captured.symbolic_time or not _streams(graph, facts):
        return None
    found = (facts.of[n] for n in pytree.tree_leaves(graph.output_node().args[0]))
    period = phases(facts.streams, [f for f in found if isinstance(f, Value)])
    retrace = lambda ticks: capture(model, example, clock, ticks, batch, captured)  # noqa: E731
    return find_general(captured, facts, period, retrace)


def _streams(graph: fx.Graph, facts: Facts) -> bool:
    """Whether every output is a stream or does not depend on time, and one is a stream."""
    found = [facts.of[n] for n in pytree.tree_leaves(graph.output_node().args[0])]
    return all(isinstance(f, (Value, Static)) for f in found) and any(isinstance(f, Value) for f in found)


def _word(value: Value) -> str:
    clip = clip_of(value)
    return clip.equivalence if clip else "stream"


def _branch(
    captured: Capture,
    runs: Runs,
    facts: Facts,
    values: list[Value | None],
    alike: bool | None,
    limit: tuple[int, str | None] | None,
) -> str | None:
    """A line at which the model does otherwise at lengths that a stream of it has, so that there is no such stream.

    A stream that could not come to twice the clip's length is none. It has one length only: where it ends the model is
    asked again. A prefix has each length in turn.
    """
    words = {_word(v) for v in values if v is not None}
    length = captured.points[0].ticks
    if alike is False and words & {"stream", "prefix"}:
        return runs.otherwise(2 * length) or "(unknown line)"
    if limit is not None and limit[0] < 2 * length and limit[1] is not None:
        return limit[1]
    if limit == (length, None) and runs.one_length():
        return f"(it takes clips of {length} frames, and no others)"
    if "prefix" in words:
        first = min(c.first for v in values if (c := clip_of(v)) is not None and c.equivalence == "prefix")
        shorter = range(first, length) if captured.symbolic_time else {first, (first + length) // 2, length - 1}
        for ticks in shorter:
            if not captured.assumed(ticks) and (line := runs.otherwise(ticks)) is not None:
                return line
        for ticks in (*shorter, *range(length, length + 9)) if captured.symbolic_time else ():
            if (line := in_steps(facts, Trace(captured, None), ticks)) is not None:
                return line
    return None


def _may_be_clips(leaf: fx.Node, branch: str, equivalence: str | None) -> None:
    """Raise unless whole clips are what was asked for, or nothing was."""
    if equivalence in (None, "clip"):
        return
    reason = "what the model computes depends on the clip's length"
    raise RefusedError([Refusal(reason, leaf, "equivalence='clip' recomputes whole clips", branch)])


def _understand(
    model: nn.Module, captured: Capture, clock: Clock, context: int | None, graph: fx.Graph | None = None
) -> tuple[fx.Graph, Facts, Constants]:
    """The canonical graph of a capture (`graph`, if it is made already), with its facts."""
    unskewed = canonicalize(captured)
    if graph is None and unskew_distances(unskewed, tensors(model, captured)):
        found = _with_facts(model, captured, clock, context, unskewed)
        if _streams(*found[:2]):
            return found
    return _with_facts(model, captured, clock, context, graph or canonicalize(captured))


def _with_facts(
    model: nn.Module, captured: Capture, clock: Clock, context: int | None, graph: fx.Graph
) -> tuple[fx.Graph, Facts, Constants]:
    """A canonical graph in its simplest form, with its facts."""
    gather_assignments(graph)
    split_einsums(graph)
    sink_slices(graph)
    split_keys(graph)
    fold_positions(graph)
    unfold_spectra(graph)
    while True:
        constants = Constants(tensors(model, captured), not_constant(graph, captured))
        facts = propagate_facts(graph, captured, clock, constants, context)
        if not roll_up_loops(graph, facts):
            return graph, facts, constants


def tensors(model: nn.Module, captured: Capture) -> dict[str, torch.Tensor]:
    """The model's parameters and buffers as they are now, and the constants of its trace."""
    return {**captured.constants, **named_tensors(model)}


def _leaves(graph: fx.Graph) -> list[fx.Node]:
    """The leaves of the model's output.

    Raises:
        CompileError: one is no tensor.
    """
    leaves = pytree.tree_leaves(graph.output_node().args[0])
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, fx.Node):
            what = repr(leaf)[:60] if isinstance(leaf, (str, bool, int, float, type(None))) else "a number"
            raise CompileError(
                f"leaf {i} of the model's output is {what}, not a tensor\n"
                "    try     a module around it that returns its tensors only"
            )
    return leaves


def _values(facts: Facts, leaves: list[fx.Node], equivalence: str | None, newest: bool) -> list[Value | None]:
    """A value for every output leaf that depends on time."""
    in_clip = [n for n in leaves if _ends(facts.of[n]) or (equivalence == "clip" and _timed(facts, n))]
    clips = build_clips(facts, list(dict.fromkeys(in_clip)), equivalence, newest)
    values: list[Value | None] = []
    for leaf in leaves:
        fact = facts.of[leaf]
        if leaf in clips:
            values.append(clips[leaf])
        elif isinstance(fact, Value):
            values.append(_materialized(facts, leaf, fact))
        else:
            values.append(None)
    return values


def _ends(fact: Fact) -> bool:
    """Whether an output is given for clips: it is no stream, or its frames lie among something else's (B*T)."""
    if not isinstance(fact, Value):
        return isinstance(fact, InClip)
    place = fact.layout[fact.layout.time]
    return place[0] is not TIME or not all(isinstance(f, int) for f in place[1:])


def _timed(facts: Facts, leaf: fx.Node) -> bool:
    return isinstance(facts.of[leaf], (Value, InClip))


def _materialized(facts: Facts, leaf: fx.Node, value: Value) -> Value:
    """An output that is a way of reading another value, or whose time is folded, as a value of its own."""
    call = Call(leaf, facts.streams, facts.of, leaf.meta["samples"], leaf.meta["sizes"])
    value = value if value.layout.clean else call.ungroup(value)
    if not isinstance(value.producer, View):
        return value
    made: Value = call.emit(
        value.layout,
        [read(value)],
        length_of=[value],
        lower=lambda b, op, windows, span, _: b.aten("clone.default", windows[0].node),
        nodes=[],
        dtypes=[value.dtype],
    )
    return made


def _check(
    facts: Facts,
    leaves: list[fx.Node],
    values: list[Value | None],
    equivalence: str | None,
    choose: Callable[[str, str], str] | None,
) -> None:
    """Collect what stands against the wish, and raise once."""
    refusals = list(facts.refusals)
    if refusals:
        raise RefusedError(refusals)
    asked = [c for v in values if (c := clip_of(v)) is not None and c.equivalence != "prefix"]
    named = [n for n in ends(facts) if any(n in c.nodes for c in asked) and choose and _choice(choose, n) == "refuse"]
    if named:
        hint = "nonlocal_ops='recompute' or 'continual' takes it; or keep it out of the compiled model"
        raise NonLocalError([Refusal(facts.of[n].reason, n, hint) for n in named])
    for value in values:
        clip = clip_of(value)
        got = clip.equivalence if clip else "stream"
        if equivalence in (None, got) or (equivalence == "first-clip" and got == "clip"):
            continue
        ended = ends(facts)
        unasked = f"equivalence '{equivalence}' was asked for, but this output is a '{got}'"
        hint = "equivalence='clip' gives model(last clip) at every step, recomputed; None gives the best there is"
        if equivalence == "clip":
            hint = "leave equivalence=None, or keep this op out of the compiled model"
        raise NonLocalError([Refusal(getattr(facts.of[n], "reason", unasked), n, hint) for n in ended or leaves[:1]])


def ends(facts: Facts) -> list[fx.Node]:
    """The ops that ended a stream."""
    return [
        n
        for n, f in facts.of.items()
        if isinstance(f, InClip) and not any(isinstance(facts.of[i], InClip) for i in n.all_input_nodes)
    ]


def _choice(choose: Callable[[str, str], str], node: fx.Node) -> str:
    return choose(module_path(node), str(node.target))


def _leaf(schedule: Schedule, node: fx.Node, value: Value | None) -> Leaf:
    if value is None:
        return Leaf(node, None, "stream", True, False, "")
    clip = clip_of(value)
    most = max(schedule.count(value, n + 1) - schedule.count(value, n) for n in range(schedule.period))
    most = max(most, schedule.count(value, 1))
    return Leaf(
        node,
        value,
        clip.equivalence if clip else "stream",
        most <= 1,
        clip is not None,
        clip.reason if clip else "",
    )


def not_constant(graph: fx.Graph, captured: Capture) -> set[fx.Node]:
    """Static nodes that are not known before the inputs are: they depend on the batch size or on a static input."""
    found: set[fx.Node] = set()
    batch = [p.batch for p in captured.points]
    other = next((i for i, b in enumerate(batch) if b != batch[0]), None)
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in found for n in node.all_input_nodes):
            found.add(node)
        elif other is not None and node.op == "call_function":
            samples = node.meta["samples"]
            if str(samples[0]) != str(samples[other]):
                found.add(node)
    return found


def clip_of(value: Value | None) -> Clip | None:
    """The clip that a value is evaluated from, if it is."""
    return value.producer.clip if value is not None and isinstance(value.producer, Op) else None


def whole(number: Fraction) -> int | Fraction:
    """An int where a Fraction is whole."""
    return int(number) if number.denominator == 1 else number
