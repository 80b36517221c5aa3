"""Pass 2b, for a model whose trace fixes or bounds the clip's length: trace it at another length and compare.

Where the two graphs have the same form, what differs between them is what depends on the length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from .canonicalize import canonicalize
from .capture import Capture
from .errors import CaptureError


def compare_lengths(graph: fx.Graph, captured: Capture, again: Callable[[int], Capture]) -> None:
    """Add the sizes at twice the length as another sample point, if the model can be traced there in the same form.

    Args:
        graph: the canonical graph of `captured`.
        again: traces the model at so many ticks.
    """
    try:
        other = again(2 * captured.points[0].ticks)
    except CaptureError:
        return
    twin = canonicalize(other)
    pairs = list(zip(graph.nodes, twin.nodes, strict=False))
    back = {b: a for a, b in pairs}
    if len(graph.nodes) != len(twin.nodes) or not all(_same_form(a, b, back) for a, b in pairs):
        return
    captured.points.append(other.points[0])
    for a, b in pairs:
        if a.op != "output":
            a.meta["samples"].append(map_arg(b.meta["samples"][0], lambda n: back[n]))
            a.meta["sizes"].append(b.meta["sizes"][0])


def compare_beyond(graph: fx.Graph, captured: Capture, again: Callable[[int], Capture]) -> None:
    """Where the model does the same on clips longer than ``captured.most``, take such a one as a sample point.

    A bound may be the model's own (``if n < 100``, a table that ends), or only torch's, of a formula for a shape, which
    tells nothing about longer clips. The model's own stays.
    """
    ticks = captured.points[0].ticks
    try:
        other = again(ticks * ((captured.most or 0) // ticks + 1))
    except CaptureError:
        return
    twin = canonicalize(other)
    pairs = list(zip(graph.nodes, twin.nodes, strict=False))
    back = {b: a for a, b in pairs}
    if len(graph.nodes) != len(twin.nodes) or not all(
        _same_form(a, b, back) and _same_numbers(a, b, back) for a, b in pairs
    ):
        return
    kept = [i for i, p in enumerate(captured.points) if p.ticks == ticks]
    captured.points = [*(captured.points[i] for i in kept), other.points[0]]
    captured.most = None
    for a, b in pairs:
        if a.op != "output":
            a.meta["samples"] = [a.meta["samples"][i] for i in kept]
            a.meta["samples"].append(map_arg(b.meta["samples"][0], lambda n: back[n]))
            a.meta["sizes"] = [*(a.meta["sizes"][i] for i in kept), b.meta["sizes"][0]]


def _same_numbers(a: fx.Node, b: fx.Node, back: dict[fx.Node, fx.Node]) -> bool:
    """Whether the arguments that are the same at all sample points of `a` are those of `b` too."""
    if a.op != "call_function":
        return True
    given = map_arg(b.meta["samples"][0], lambda n: back[n])
    return all(
        len({str(s.get(name)) for s in a.meta["samples"]}) > 1 or str(a.meta["samples"][0].get(name)) == str(value)
        for name, value in given.items()
    )


def _same_form(a: fx.Node, b: fx.Node, back: dict[fx.Node, fx.Node]) -> bool:
    return a.op == b.op and str(a.target) == str(b.target) and _nodes(a) == [back[n] for n in _nodes(b)]


def _nodes(node: fx.Node) -> list[Any]:
    return list(node.all_input_nodes)
