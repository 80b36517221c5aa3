"""Pass 5, second half: which ops wait, so that fewer bytes are kept.

An op that runs as soon as it can may have its frames wait for those of a longer branch, in a history. It may as well
run later and have its inputs wait, where these are smaller, or are kept for another reader anyway. How long each op
waits is a minimum-cost flow: frames kept are differences of waiting times, and bytes their cost.

Ops that decide when an output is there never wait, so that no output comes later; nor do ops on both sides of a change
of rate.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

import networkx as nx

from .schedule_delays import Counter, Schedule, schedule_delays
from .stream_graph import Op, Read, Value, View

ROOT = "does not wait"


def place_delays(schedule: Schedule) -> Schedule:
    """The schedule in which ops wait so that histories take the fewest bytes, at the same delay of every output.

    Sets `Op.late`.
    """
    movable = _movable(schedule)
    if not movable:
        return schedule
    for op, late in _cheapest(schedule, movable).items():
        op.late = late
    if all(op.late == 0 for op in movable):
        return schedule
    return schedule_delays(schedule.graph, schedule.outputs)


def _movable(schedule: Schedule) -> set[Op]:
    """The ops that may wait: plain ones on one rate, of which no output of the model is read."""
    fixed: set[Op] = set()
    for value in schedule.outputs:
        while value is not None and isinstance(value.producer, View):
            value = value.producer.source
        if value is not None and isinstance(value.producer, Op):
            fixed.add(value.producer)
    for op in schedule.graph.ops:
        plain = not (op.carries or op.sequential or op.unrolled or op.clip or op.columns or op.masked_until)
        if not plain or op.limit is not None or any(v.layout.paired for v in op.outputs):
            fixed.add(op)
        for r in op.reads:
            if r.taps.step != 1 or r.taps.up != 1 or r.everything:
                fixed.add(op)
                if isinstance(r.source.producer, Op):
                    fixed.add(r.source.producer)
    return {op for op in schedule.graph.ops if op not in fixed and op.reads}


def _cheapest(schedule: Schedule, movable: set[Op]) -> dict[Op, int]:
    """How many frames each op waits, for the fewest bytes.

    With w(o) for how long an op waits and m(v) for the last frame that is kept of a value, both in frames and the first
    of all zero for what does not wait: minimise the sum of ``bytes(v) * (m(v) - w(v))`` where, for every read of v by
    o, ``m(v) >= w(o) + most`` and ``w(o) >= w(v) - slack``. Its dual is a flow.
    """
    flow: nx.DiGraph[Hashable] = nx.DiGraph()
    flow.add_node(ROOT, demand=0)

    def place(value: Value) -> Hashable:
        return value.producer if value.producer in movable else ROOT

    def at_least(one: Hashable, other: Hashable, more: int) -> None:
        """``one >= other + more``"""
        if one == other:
            return
        if not flow.has_edge(other, one) or flow.edges[other, one]["weight"] > -more:
            flow.add_edge(other, one, weight=-more)

    for op in movable:
        flow.add_node(op, demand=0)
        at_least(op, ROOT, 0)
    counters = schedule.counter, Counter(schedule.graph, waiting=True)
    for op in schedule.graph.ops:
        for r in op.reads:
            value, reader = r.source, op if op in movable else ROOT
            if value not in flow:
                size = math.prod(value.layout.sizes(1, 1)) * value.dtype.itemsize
                flow.add_node(value, demand=size)
                flow.nodes[place(value)]["demand"] -= size
                at_least(value, place(value), 0)
            most, slack = _reach(schedule, counters, op, r)
            at_least(value, reader, most)
            at_least(reader, place(value), -slack)
    _, flows = nx.network_simplex(flow)
    tight = nx.DiGraph(flow)
    for one, targets in flows.items():
        for other, amount in targets.items():
            if amount > 0:  # what the flow uses is an equation
                back = -flow.edges[one, other]["weight"]
                if not tight.has_edge(other, one) or tight.edges[other, one]["weight"] > back:
                    tight.add_edge(other, one, weight=back)
    earliest = nx.single_source_bellman_ford_path_length(tight, ROOT)
    return {op: -earliest[op] for op in movable}


def _reach(schedule: Schedule, counters: tuple[Counter, ...], op: Op, r: Read) -> tuple[int, int]:
    """How many frames of its source a read needs kept if nothing waits, and how long the source may wait for nothing.

    Counted over a period, with and without frames from before the first tick.
    """
    most, slack = [], []
    for counter in counters:
        for n in range(schedule.period):
            available = counter.at(n).available
            made, source = available[op.outputs[0]], available[r.source]
            most.append(source - r.kept_taps.lo(made))
            slack.append(r.ready_taps.ready(source) - made)
    return max(most), min(slack)
