"""Pass 2d, for a model whose trace fixes or bounds the clip's length: trace it at another length and compare.

Where the two graphs have the same form, what differs between them is what depends on the length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from .capture import Capture
from .errors import CaptureError
from .graph_edits import call_at, take_place


def compare_lengths(
    graph: fx.Graph, captured: Capture, again: Callable[[int, bool], tuple[Capture, fx.Graph]]
) -> bool | None:
    """Add the sizes at twice the length as another sample point, if the model can be traced there in the same form.

    Args:
        graph: the canonical graph of `captured`.
        again: traces the model at so many ticks, and gives its canonical graph; with True at one batch size only, which
            costs a third where the graph is large, and may give another form.

    Returns:
        False if the model has another form at that length, None if it cannot be traced there.
    """
    alike: bool | None = None
    for closed in (True, False) if captured.symbolic_batch else (False,):
        try:
            other, twin = again(2 * captured.points[0].ticks, closed)
        except CaptureError:
            alike = None
            continue
        pairs = list(zip(graph.nodes, twin.nodes, strict=False))
        back = {b: a for a, b in pairs}
        alike = len(graph.nodes) == len(twin.nodes) and all(_same_form(a, b, back) for a, b in pairs)
        if not alike:
            continue
        constants = [(a, captured.constants[str(a.target)], other.constants[str(b.target)]) for a, b in pairs
                     if a.op == "get_attr" and str(a.target) in captured.constants]  # fmt: skip
        alike = all(_same_constant(here, there) for _, here, there in constants)
        if alike:
            captured.points.append(other.points[0])
            _add_sizes(pairs, back)
            for node, here, there in constants:
                _as_positions(graph, node, here, there)
            break
    return alike


def _same_constant(here: torch.Tensor, there: torch.Tensor) -> bool:
    """Whether a tensor that the trace took for constant does not depend on the length, or has a size that does."""
    return here.shape != there.shape or bool(((here == there) | (here.isnan() & there.isnan())).all())


def _as_positions(graph: fx.Graph, node: fx.Node, here: torch.Tensor, there: torch.Tensor) -> None:
    """Let evenly spaced numbers that go on where the clip does be positions: NumPy made them, unseen by the trace."""
    if (
        here.dim() != 1
        or not node.users
        or len(here) >= len(there)
        or len(here) < 2
        or here.is_complex()
        or here.dtype is torch.bool
    ):
        return
    start, step = here[0].item(), (here[1] - here[0]).item()
    if any(not torch.equal(x, start + step * torch.arange(len(x)).to(x)) for x in (here, there)):
        return
    like = {"dtype": here.dtype, "device": here.device}
    sizes = node.meta["sizes"]
    calls = [((start, start + step * n, step), like) for (n,) in sizes]
    first = next(n for n in graph.nodes if node in n.all_input_nodes)  # (behind the inputs, whose length they have)
    take_place(node, call_at(graph, first, torch.ops.aten.arange.start_step, calls, sizes, node.meta["val"]))


def _add_sizes(pairs: list[tuple[fx.Node, fx.Node]], back: dict[fx.Node, fx.Node]) -> None:
    """Let the first of each pair know the second's arguments and sizes."""
    for a, b in pairs:
        if a.op != "output":
            a.meta["samples"].append(map_arg(b.meta["samples"][0], lambda n: back[n]))
            a.meta["sizes"].append(b.meta["sizes"][0])


def _same_form(a: fx.Node, b: fx.Node, back: dict[fx.Node, fx.Node]) -> bool:
    return a.op == b.op and str(a.target) == str(b.target) and _nodes(a) == [back[n] for n in _nodes(b)]


def _nodes(node: fx.Node) -> list[Any]:
    return list(node.all_input_nodes)
