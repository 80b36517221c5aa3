"""Pass 3: a fact for every value of the canonical graph, by the rules of the registry.

What depends on time becomes a `Value` with its op; what needs the whole clip, and all that follows it, becomes
`InClip`; the rest is `Static`. Nothing is decided here about *when* anything is computed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from .capture import Capture, Clock
from .codegen.constants import Constants
from .errors import NonLocal, Refusal, Refuse
from .layout import BATCH, TIME, Layout, Unshapeable, dim
from .registry import (
    Call,
    Fact,
    Head,
    InClip,
    Pair,
    Rolled,
    Static,
    Tail,
    entry,
    find_pair_rule,
    find_rule,
    takes_edges,
)
from .stream_graph import StreamGraph, Value

aten = torch.ops.aten


@dataclass(frozen=True)
class PerFrame(InClip):
    """What a clip-wide op in its trailing form yields, and what follows from it: another for each frame."""


@dataclass
class Facts:
    """The facts of a canonical graph, and the stream graph that was built with them.

    Attributes:
        trailing: clip-wide ops that take their trailing form.
        joined: ops in which what a clip-wide op yields for each frame comes back to the frames.
    """

    graph: fx.Graph
    streams: StreamGraph
    of: dict[fx.Node, Fact] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    trailing: set[fx.Node] = field(default_factory=set)
    joined: set[fx.Node] = field(default_factory=set)


def propagate_facts(
    graph: fx.Graph,
    capture: Capture,
    clock: Clock,
    constants: Constants,
    context: int | None = None,
    trail: Callable[[Call], Fact] | None = None,
) -> Facts:
    """Facts for all nodes. Refusals are collected, not raised.

    `trail`: the fact of a clip-wide op in its trailing form, or None where it has none.
    """
    streams = StreamGraph(tuple(p.batch for p in capture.points), tuple(p.ticks for p in capture.points))
    facts = Facts(graph, streams)
    inputs = iter(zip(clock.time_dims, clock.batch_dims, clock.frames, strict=True))
    for node in graph.nodes:
        if node.op == "placeholder":
            facts.of[node] = _input(node, streams, *next(inputs))
        elif node.op == "get_attr":
            facts.of[node] = Static()
        elif node.op == "call_function":
            facts.of[node] = _fact(node, facts, constants, context, trail)
    return facts


def _input(node: fx.Node, streams: StreamGraph, time: int | None, batch: int | None, frames: int) -> Fact:
    if time is None:
        return Static()
    val = node.meta["val"]
    dims = [
        (TIME,) if i == time else (BATCH,) if i == batch and len(set(streams.batch)) > 1 else dim(int(s))
        for i, s in enumerate(node.meta["sizes"][0])
    ]
    value = Value(
        name=node.name,
        layout=Layout(tuple(dims)),
        dtype=val.dtype,
        rate=Fraction(frames),
        lengths=tuple(t * frames for t in streams.ticks),
        length_sources=(),
        length=lambda n: n * frames,
        producer=None,
        node=node,
    )
    streams.inputs.append(streams.add_value(value))
    return value


def _fact(
    node: fx.Node, facts: Facts, constants: Constants, context: int | None, trail: Callable[[Call], Fact] | None
) -> Fact:
    given = [facts.of[n] for n in node.all_input_nodes]
    if node.target is operator.getitem:
        source, index = node.args
        fact = facts.of[source]  # type: ignore[index]
        return fact[index] if isinstance(fact, tuple) else fact  # type: ignore[index]
    flat = [f for g in given for f in (g if isinstance(g, tuple) else (g,))]
    if any(isinstance(f, PerFrame) for f in flat):
        return _back_to_frames(node, facts, flat, constants)
    paired = any(isinstance(f, Pair) for f in flat)
    ended = next((f for f in flat if isinstance(f, InClip) and not isinstance(f, Pair)), None)
    understood = takes_edges(node.target) and all(isinstance(f, (Head, Tail, Value, Static)) for f in flat)
    understood |= entry(node.target).takes_rolled and all(isinstance(f, (Rolled, Value, Static)) for f in flat)
    if ended is not None and not understood:
        spectral = any(isinstance(f, InClip) and f.spectral for f in flat) or "fft" in str(node.target)
        back = _back_from_spectra(node, facts, constants, context) if spectral else None
        return back or InClip(ended.reason, spectral=spectral)
    call = Call(node, facts.streams, facts.of, node.meta["samples"], node.meta["sizes"], constants, context)
    timeless = ended is None and not paired and not any(isinstance(f, Value) for f in flat)
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    if timeless and not random and not _depends_on_length(node, facts.streams):
        return Static()
    known = len(facts.streams.ops), len(facts.streams.values)
    try:
        if random and not entry(node.target).draws_in_training:
            hint = "pass the noise as an input, or leave it away in eval mode"
            raise Refuse("random numbers are drawn in forward", hint)
        fact = _apply(call, paired)
        _check(node, fact, facts.streams)
        return fact
    except (NonLocal, Unshapeable) as why:
        del facts.streams.ops[known[0] :], facts.streams.values[known[1] :]
        if trail is not None and (fact := trail(call)) is not None:
            facts.trailing.add(node)
            return fact
        return InClip(str(why), spectral="fft" in str(node.target))
    except Refuse as why:
        facts.refusals.append(Refusal(str(why), node, why.hint))
        return InClip(str(why))


def _back_from_spectra(node: fx.Node, facts: Facts, constants: Constants, context: int | None) -> Fact | None:
    """The fact of an op that makes frames again of a product of spectra, if it does."""
    apply = entry(node.target).spectral_rule
    if apply is None:
        return None
    call = Call(node, facts.streams, facts.of, node.meta["samples"], node.meta["sizes"], constants, context)
    known = len(facts.streams.ops), len(facts.streams.values)
    try:
        fact = apply(call)
        _check(node, fact, facts.streams)
        return fact
    except (NonLocal, Unshapeable):
        del facts.streams.ops[known[0] :], facts.streams.values[known[1] :]
        return None


def _back_to_frames(node: fx.Node, facts: Facts, flat: list[Fact], constants: Constants) -> Fact:
    """The fact of an op on what a clip-wide op yields for each frame, perhaps with the frames themselves."""
    if all(isinstance(f, (PerFrame, Static)) for f in flat):
        return PerFrame("")
    if not all(isinstance(f, (PerFrame, Static, Value)) for f in flat):
        return InClip("a clip-wide op meets another")
    as_static = {n: Static() for n in node.all_input_nodes if isinstance(facts.of[n], PerFrame)}
    call = Call(
        node, facts.streams, {**facts.of, **as_static}, node.meta["samples"], node.meta["sizes"], constants, None
    )
    known = len(facts.streams.ops), len(facts.streams.values)
    try:
        fact = _apply(call, False)
        if not isinstance(fact, Value):
            raise NonLocal("a clip-wide op comes back to the frames in several results")
        _check(node, fact, facts.streams)
    except (NonLocal, Unshapeable) as why:
        del facts.streams.ops[known[0] :], facts.streams.values[known[1] :]
        return InClip(str(why))
    facts.joined.add(node)
    return fact


def _apply(call: Call, paired: bool) -> Fact:
    """What the rule of frames says; and where that cannot or pairs of frames go in, the one of pairs."""
    target = call.node.target
    apply, of_pairs = find_rule(target), find_pair_rule(target)
    if paired:
        if of_pairs is None:
            raise NonLocal("pairs of frames are read outside of attention")
        return of_pairs(call)
    if apply is None and of_pairs is None:
        raise NonLocal(f"there is no rule for {target}")
    known = len(call.graph.ops), len(call.graph.values)
    try:
        if apply is None:
            raise NonLocal(f"there is no rule for {target}")
        return apply(call)
    except (NonLocal, Unshapeable) as why:
        del call.graph.ops[known[0] :], call.graph.values[known[1] :]
        if of_pairs is None:
            raise
        try:
            return of_pairs(call)
        except (NonLocal, Unshapeable) as more:
            raise (more if "whole clip" in str(more) else why) from None


def _depends_on_length(node: fx.Node, streams: StreamGraph) -> bool:
    """Whether something that is made of no stream has a size or a number that follows the clip's length."""
    by_batch: dict[int, list[Any]] = {}
    for point, sizes, sample in zip(streams.batch, node.meta["sizes"], node.meta["samples"], strict=True):
        by_batch.setdefault(point, []).append((sizes, _numbers(sample)))
    return any(len({str(s) for s in seen}) > 1 for seen in by_batch.values())


def _numbers(sample: dict[str, Any]) -> list[Any]:
    return [v for v in sample.values() if isinstance(v, (int, float, list, tuple))]


def _check(node: fx.Node, fact: Fact, streams: StreamGraph) -> None:
    """The sizes that a rule implies against those that tracing saw: a cross-check of every rule on every model."""
    found = fact if isinstance(fact, tuple) else (fact,)
    for i, each in enumerate(found):
        value = each.value if isinstance(each, Pair) else each
        if not isinstance(value, Value):
            continue
        for batch, frames, seen in zip(streams.batch, value.lengths, node.meta["sizes"], strict=True):
            sizes = seen[i] if isinstance(fact, tuple) else seen
            if tuple(value.layout.sizes(batch, frames)) != tuple(sizes):
                raise NonLocal(
                    f"its shape {tuple(sizes)} is not the one that its rule expects ({value.layout}, T={frames})"
                )
