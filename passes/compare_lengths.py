"""Pass 2b, for a model whose trace fixes or bounds the clip's length: trace it at another length and compare.

Where the two graphs have the same form, what differs between them is what depends on the length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.node import map_arg

from .capture import Capture
from .errors import CaptureError


def compare_lengths(
    graph: fx.Graph, captured: Capture, again: Callable[[int], tuple[Capture, fx.Graph]]
) -> bool | None:
    """Add the sizes at twice the length as another sample point, if the model can be traced there in the same form.

    Args:
        graph: the canonical graph of `captured`.
        again: traces the model at so many ticks, and gives its canonical graph.

    Returns:
        False if the model has another form at that length, None if it cannot be traced there.
    """
    try:
        other, twin = again(2 * captured.points[0].ticks)
    except CaptureError:
        return None
    pairs = list(zip(graph.nodes, twin.nodes, strict=False))
    back = {b: a for a, b in pairs}
    if len(graph.nodes) != len(twin.nodes) or not all(_same_form(a, b, back) for a, b in pairs):
        return False
    captured.points.append(other.points[0])
    for a, b in pairs:
        if a.op != "output":
            a.meta["samples"].append(map_arg(b.meta["samples"][0], lambda n: back[n]))
            a.meta["sizes"].append(b.meta["sizes"][0])
    return True


def _same_form(a: fx.Node, b: fx.Node, back: dict[fx.Node, fx.Node]) -> bool:
    return a.op == b.op and str(a.target) == str(b.target) and _nodes(a) == [back[n] for n in _nodes(b)]


def _nodes(node: fx.Node) -> list[Any]:
    return list(node.all_input_nodes)
