"""Pass 2h, for a stream that may end at a length at which the model pads or crops otherwise than where it was traced.

A U-Net pads what it has upsampled where the clip's length is odd (``if u.shape[2] != x.shape[2]: u = F.pad(...)``),
others pad a clip to a multiple of their strides, or drop what is left over. Such branches go by the length modulo
something. So the model is traced at lengths on their other sides too; where the traces are the same but for paddings
and slices that one of them leaves away, these take nothing or add nothing there, and what the traces know of sizes is
put together in one graph.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from .canonicalize import canonicalize
from .capture import CONGRUENT, Assumptions, Capture, Point
from .errors import CaptureError, user_frame
from .propagate_facts import Facts
from .stream_graph import Value

MOST_PROBES = 8
MOST_TRACES = 3
aten = torch.ops.aten


@dataclass
class Trace:
    """A trace of the model, and what its nodes are called in the graph that all traces share.

    Attributes:
        nodes: its nodes by those of that graph; None if the graph is its own.
    """

    captured: Capture
    nodes: dict[fx.Node, fx.Node] | None

    def holds(self, ticks: int) -> bool:
        """Whether what it took for certain holds at so many ticks."""
        return self.captured.assumed(ticks)

    def size(self, node: fx.Node, axis: int) -> Any:
        """The size of a node of the shared graph, as it was traced; None if it is not known here."""
        there = node if self.nodes is None else self.nodes.get(node)
        return None if there is None else there.meta["val"].shape[axis]

    def at(self, size: Any, ticks: int) -> Any:
        """What a size is at so many ticks."""
        return self.captured.sample(size, Point(self.captured.points[0].batch, ticks))


@dataclass
class General:
    """A graph that holds at the lengths of several traces; `captured` is the one whose nodes it has."""

    captured: Capture
    graph: fx.Graph
    traces: list[Trace]


def probes(period: int) -> list[int]:
    """Lengths modulo the period that are looked at: all of them, or some where there are many."""
    return list(range(period)) if period <= MOST_PROBES else sorted({0, 1, 2, period // 2, period - 1})


def find_general(captured: Capture, facts: Facts, period: int, again: Callable[[int], Capture]) -> General | None:
    """A graph that holds at lengths at which this trace does not; None if there is none, or it holds at all.

    Args:
        captured: the trace, with open length, and its `facts`.
        period: ticks after which the work of a step begins anew.
        again: traces the model at so many ticks.
    """
    if period < 2:
        return None
    start, own = captured.points[0].ticks, Trace(captured, None)
    holds = [r for r in probes(period) if own.holds(start + r) and in_steps(facts, own, start + r) is None]
    left = [r for r in probes(period) if r not in holds]
    if not left:
        return None
    known = _covered(captured, start, left)
    left = [r for r in left if r not in known]
    taken = [(captured, [*holds, *known])]
    for _ in range(MOST_TRACES):
        if not left:
            break
        at = left.pop(0)
        with contextlib.suppress(CaptureError):
            other = again(start + at)
            known = _covered(other, start, [at, *left])
            left = [r for r in left if r not in known]
            taken += [(other, known)] if known else []
    return _put_together(taken, start)


def _covered(captured: Capture, start: int, residues: list[int]) -> list[int]:
    """Those lengths, counted from `start`, at which the trace takes the same branches."""
    assumed = captured.assumed
    if not isinstance(assumed, Assumptions):
        return []
    return [r for r in residues if assumed.same_branches(start + r)]


def _put_together(taken: list[tuple[Capture, list[int]]], start: int) -> General:
    """One graph of several traces, with sample points at the lengths that each covers."""
    graphs: list[tuple[Capture, fx.Graph]] = []
    for captured, residues in taken:
        batch = captured.points[0].batch
        points = [*captured.points, *(Point(batch, start + r + CONGRUENT) for r in residues)]
        known = replace(captured, points=list(dict.fromkeys(points)), assumed=_knowing(captured.assumed, points))
        graphs.append((known, canonicalize(known)))
    most = max(range(len(graphs)), key=lambda i: len(graphs[i][1].nodes))
    if most and _align(graphs[most][1], graphs[0][1], graphs[most][0], graphs[0][0]) is None:
        most = 0  # where the example's length lies, the model does otherwise
    base, graph = graphs[most]
    traces = [Trace(base, None)]
    for captured, other in (g for i, g in enumerate(graphs) if i != most):
        if (nodes := _align(graph, other, base, captured)) is not None:
            base.points = [*base.points, *captured.points]
            _add_sizes(graph, nodes)
            traces.append(Trace(captured, nodes))
    return General(base, graph, traces)


def _knowing(assumed: Any, points: list[Point]) -> Any:
    if not isinstance(assumed, Assumptions):
        return assumed
    known = copy.copy(assumed)
    known.know(points)
    return known


def _align(graph: fx.Graph, other: fx.Graph, here: Capture, there: Capture) -> dict[fx.Node, fx.Node] | None:
    """For each node of a graph the one of another graph that gives the same there; None if the graphs differ by more
    than paddings and slices that the other leaves away."""
    rest = list(other.nodes)
    twin: dict[fx.Node, fx.Node] = {}
    at = 0
    for node in graph.nodes:
        like = rest[at] if at < len(rest) else None
        if like is not None and _same_form(node, like, twin) and _same_constant(node, like, here, there):
            twin[node] = like
            at += 1
        elif node.target in _LEFT_AWAY and node.all_input_nodes[0] in twin:
            twin[node] = twin[node.all_input_nodes[0]]
        else:
            return None
    return twin if at == len(rest) else None


_LEFT_AWAY = {aten.pad.default, aten.constant_pad_nd.default, aten.slice.Tensor, aten.narrow.default}


def _same_form(a: fx.Node, b: fx.Node, twin: dict[fx.Node, fx.Node]) -> bool:
    named = a.op == "placeholder"
    if a.op != b.op or (str(a.target) != str(b.target) and a.op != "get_attr"):
        return False
    return named or [twin[n] for n in a.all_input_nodes] == list(b.all_input_nodes)


def _same_constant(a: fx.Node, b: fx.Node, here: Capture, there: Capture) -> bool:
    """Whether two tensors that the traces created are the same."""
    one, other = here.constants.get(str(a.target)), there.constants.get(str(b.target))
    if a.op != "get_attr":
        return True
    if one is None or other is None:
        return one is other and a.target == b.target
    return one.dtype == other.dtype and bool(torch.equal(one.nan_to_num(), other.nan_to_num()))


def _add_sizes(graph: fx.Graph, nodes: dict[fx.Node, fx.Node]) -> None:
    """Let each node know its arguments and sizes at the other graph's sample points."""
    back: dict[fx.Node, fx.Node] = {}
    for node, there in nodes.items():
        left_away = back.setdefault(there, node) is not node
        for sample, size in zip(there.meta.get("samples", ()), there.meta.get("sizes", ()), strict=True):
            own = node.meta["samples"][0]
            node.meta["samples"].append(_nothing(own, size) if left_away else _with_numbers(own, sample))
            node.meta["sizes"].append(size)


def _with_numbers(own: Any, other: Any) -> Any:
    """Arguments with the nodes of the one and the numbers of the other."""
    if isinstance(own, fx.Node):
        return own
    if isinstance(own, dict):
        return {k: _with_numbers(v, other[k]) for k, v in own.items()}
    if isinstance(own, (list, tuple)) and isinstance(other, (list, tuple)) and len(own) == len(other):
        return type(own)(_with_numbers(a, b) for a, b in zip(own, other, strict=True))
    return other


def _nothing(own: dict[str, Any], size: Any) -> dict[str, Any]:
    """The arguments with which a padding or a slice hands on what it is given, which has this size."""
    sample = dict(own)
    for name in ("pad", "padding"):
        if name in sample:
            sample[name] = [0] * len(sample[name])
    if "end" in sample or "start" in sample:
        sample |= {"start": 0, ("length" if "length" in sample else "end"): size[sample.get("dim", 0)]}
    return sample


@dataclass
class Endings:
    """At which lengths a stream may end: where one of several traces takes the branches that it took.

    Attributes:
        traces: put together in one graph.
        facts: of that graph.
        period: ticks after which the work of a step begins anew.
    """

    traces: list[Trace]
    facts: Facts
    period: int
    _in_steps: dict[tuple[int, int], bool] = field(default_factory=dict)

    def trace(self, ticks: int) -> Trace | None:
        """A trace that holds at so many ticks, and whose sizes are there those of the stream."""
        start = self.traces[0].captured.points[0].ticks
        like = start + (ticks - start) % self.period
        for i, trace in enumerate(self.traces):
            if not trace.holds(ticks):
                continue
            if (i, like) not in self._in_steps:
                self._in_steps[i, like] = in_steps(self.facts, trace, like) is not None
            if not self._in_steps[i, like]:
                return trace
        return None


def in_steps(facts: Facts, trace: Trace, ticks: int) -> str | None:
    """The user's line at which a size does not follow the length as it does at the sample points: it goes in steps."""
    known: dict[Value, int] = {}

    def length(value: Value) -> int:
        if value not in known:
            known[value] = value.length(*(map(length, value.length_sources) if value.length_sources else (ticks,)))
        return known[value]

    for node, fact in facts.of.items():
        if isinstance(fact, Value):
            size = trace.size(node, fact.layout.time)
            if isinstance(size, torch.SymInt):
                found = trace.at(size, ticks)
                wanted = fact.layout.sizes(trace.captured.points[0].batch, length(fact))[fact.layout.time]
                if found != wanted and max(found, wanted) > 0:
                    return user_frame(node)
    return None
