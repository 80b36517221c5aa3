"""Pass 4: gather what must be recomputed from whole clips.

All `InClip` nodes that lead to the same outputs are evaluated together, on the last frames of the streams at their
border. What depends on positions alone is evaluated inside the clip too, so that positions count from its start.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import fx

from .codegen.clips import evaluate_clip
from .layout import TIME, Layout
from .partial_reductions import reduced_frames
from .propagate_facts import Facts
from .registry import InClip, Static, Tail
from .schedule import Int, Taps, floor_affine, minimum
from .schedule_delays import Counter
from .stream_graph import Border, Clip, Op, Read, StreamGraph, Value, View, read


@dataclass
class Part:
    """Nodes that are evaluated together, the nodes at which their streams come in, and what is asked of them."""

    nodes: set[fx.Node]
    borders: set[fx.Node]
    leaves: list[fx.Node]


def build_clips(facts: Facts, leaves: list[fx.Node], wanted: str | None, newest: bool) -> dict[fx.Node, Value]:
    """An op for each clip; returns the value (one frame for each evaluation) of every leaf.

    Args:
        leaves: the model's outputs that are `InClip` (or any, with ``wanted="clip"``).
        wanted: the equivalence that the user asked for, if any.
        newest: of an output that keeps its time axis only the newest frame is asked.
    """
    parts: list[Part] = []
    for leaf in leaves:
        part = _part(facts, leaf, everything=wanted == "clip")
        for other in [p for p in parts if p.nodes & part.nodes]:
            parts.remove(other)
            part = Part(part.nodes | other.nodes, part.borders | other.borders, other.leaves + part.leaves)
        parts.append(part)
    values: dict[fx.Node, Value] = {}
    for part in parts:
        values |= _build(facts, part, newest)
    return values


def _part(facts: Facts, leaf: fx.Node, everything: bool) -> Part:
    part = Part(set(), set(), [leaf])
    queue = [leaf]
    while queue:
        node = queue.pop()
        if node in part.nodes or isinstance(facts.of[node], Static):
            continue
        if _is_border(facts, node, everything):
            part.borders.add(node)
        else:
            part.nodes.add(node)
            queue.extend(node.all_input_nodes)
    return part


def _is_border(facts: Facts, node: fx.Node, everything: bool) -> bool:
    """Whether a clip takes this node's frames from the stream, rather than evaluating it."""
    fact = facts.of[node]
    if node.op == "placeholder":
        return True
    value = fact.of if isinstance(fact, Tail) else fact
    if not isinstance(value, Value):
        return False
    if everything:
        return not (value.padded or value.memory or value.indexed)
    padding = isinstance(value.producer, View) and value.producer.fill is not None
    return not (value.indexed and not value.memory) and (isinstance(fact, Tail) or not padding)


def _build(facts: Facts, part: Part, newest: bool) -> dict[fx.Node, Value]:
    streams = facts.streams
    order = list(facts.graph.nodes)
    borders = [_border(facts, n, part.nodes) for n in order if n in part.borders]
    nodes = [n for n in order if n in part.nodes]
    ticks, clock = streams.ticks[0], streams.inputs[0]
    frames = int(clock.rate)
    clean = all(not (b.value.padded or b.value.memory or b.value.indexed) for b in borders)
    prefix = None if clean else _prefix(streams, borders)
    length_of: tuple[Value, ...] = (clock,)
    if prefix is not None:
        equivalence, every, (first, reads) = "prefix", 1, prefix
    else:
        equivalence, first = "clip" if clean else "first-clip", ticks
        every = _period(borders)
        steps = [int(b.value.rate * every) for b in borders]
        reads = [read(b.value, Taps(s, 1, b.first, b.first + b.count - 1)) for b, s in zip(borders, steps, strict=True)]

    def length(*lengths: Int) -> Int:
        if equivalence == "first-clip":  # as many as there are windows of the streams' own frames
            counts = [(n - b.value.lengths[0]) // s + 1 for n, b, s in zip(lengths, borders, steps, strict=True)]
            return functools.reduce(minimum, counts)
        return (lengths[0] // frames - first) // every + 1

    if equivalence == "first-clip":
        length_of = tuple(b.value for b in borders)
    reason = next((f.reason for n in order if n in part.nodes and isinstance(f := facts.of[n], InClip)), "")
    newest_axes = [_time_axis(facts, n) if newest else None for n in part.leaves]
    clip = Clip(borders, nodes, part.leaves, newest_axes, equivalence, first, every, reason)
    op = Op(f"clip_{part.leaves[0].name}", part.leaves[0], reads, _lower, clip=clip)
    for leaf in part.leaves:
        op.outputs.append(
            streams.add_value(
                Value(
                    name=f"{leaf.name}_of_clip",
                    layout=Layout(((TIME,), *((int(s),) for s in leaf.meta["sizes"][0]))),
                    dtype=leaf.meta["val"].dtype,
                    rate=Fraction(1, every),
                    lengths=tuple(length(*(v.lengths[p] for v in length_of)) for p in range(len(streams.ticks))),
                    length_sources=length_of,
                    length=length,
                    producer=op,
                    node=leaf,
                    memory=any(b.value.memory for b in borders),
                )
            )
        )
    streams.ops.append(op)
    return dict(zip(part.leaves, op.outputs, strict=True))


def _period(borders: list[Border]) -> int:
    """Ticks after which the frames of all borders are made alike: of what was slower before, each frame has a place."""
    seen: set[Value] = set()
    queue = [b.value for b in borders]
    while queue:
        value = queue.pop()
        if value not in seen:
            seen.add(value)
            producer = value.producer
            if isinstance(producer, View):
                queue.append(producer.source)
            elif producer is not None:
                queue += [r.source for r in producer.reads]
    return math.lcm(1, *(v.rate.denominator for v in seen))


def _border(facts: Facts, node: fx.Node, inside: set[fx.Node]) -> Border:
    fact = facts.of[node]
    if isinstance(fact, Tail):
        return Border(node, fact.of, fact.of.lengths[0] - fact.first, fact.count, fact.squeeze, fact.first)
    fact = reduced_frames(facts.streams, node, fact, [u for u in node.users if u in inside]) or fact
    return Border(node, fact, 0, fact.lengths[0], False, None)


def _prefix(streams: StreamGraph, borders: list[Border]) -> tuple[int, list[Read]] | None:
    """Reads of the last frames after every tick, if nothing but the last frames of causal streams is asked."""
    if any(b.back is None for b in borders):
        return None
    counter = Counter(streams)
    period = _period(borders)
    first = next(
        (n for n in range(1, 4096) if all(counter.at(n).length[b.value] >= (b.back or 0) for b in borders)), None
    )
    if first is None:
        return None
    reads = []
    for b in borders:
        rate = b.value.rate
        seen = [counter.at(first + i) for i in range(2 * period)]
        if any(s.available[b.value] < s.length[b.value] for s in seen):
            return None
        c = floor_affine([s.length[b.value] - (b.back or 0) for s in seen], rate.numerator, rate.denominator)
        if c is None:
            return None
        reads.append(read(b.value, Taps(rate.numerator, rate.denominator, c, c + (b.count - 1) * rate.denominator)))
    return first, reads


def _time_axis(facts: Facts, leaf: fx.Node) -> int | None:
    """The dimension in which an output of a clip keeps time, or None."""
    fact = facts.of[leaf]
    if isinstance(fact, Value):
        return fact.layout.time
    if isinstance(fact, Tail):
        return None if fact.squeeze else fact.of.layout.time
    by_length: dict[int, tuple[int, ...]] = {}
    for batch, ticks, sizes in zip(facts.streams.batch, facts.streams.ticks, leaf.meta["sizes"], strict=True):
        if batch == facts.streams.batch[0]:
            by_length[ticks] = sizes
    rows = list(by_length.values())
    if len(rows) > 1 and len({len(r) for r in rows}) == 1:
        moving = [i for i, s in enumerate(zip(*rows, strict=True)) if len(set(s)) > 1]
        if moving and not (isinstance(fact, InClip) and fact.spectral):
            return moving[0]
    # pooled over and kept as a dimension of size 1, or traced with the clip's length as a number
    clock = facts.streams.inputs[0]
    time, sizes = clock.layout.time, leaf.meta["sizes"][0]
    if len(sizes) != len(clock.layout) or (isinstance(fact, InClip) and fact.spectral):
        return None
    return time if sizes[time] in {1, *(v.lengths[0] for v in facts.streams.values)} else None


def _lower(b: Any, op: Op, windows: list[Any], span: range, _: Any) -> Any:
    return evaluate_clip(b, op, windows, span)
