"""What a clip-wide reduction needs of each frame of a stream: the frame reduced by itself.

``x.mean((2, 3, 4))`` is the mean over a clip of the means of its frames. So frames are reduced as they come, and of a
clip no more is kept than one number for each frame and channel. What is kept is summed anew for each clip, in the same
order: nothing can drift.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .layout import BATCH, KEY, TIME, Layout
from .stream_graph import Op, StreamGraph, Value, read

aten = torch.ops.aten


def _given_dims(node: fx.Node, rank: int) -> set[int]:
    given = node.meta["samples"][0].get("dim")
    dims = range(rank) if given is None or given == [] else [given] if isinstance(given, int) else given
    return {d % rank for d in dims}


def _adaptive_dims(node: fx.Node, rank: int) -> set[int]:
    sizes = [s["output_size"] for s in node.meta["samples"]]
    if any(n != 1 for size in sizes for n in (size if isinstance(size, (list, tuple)) else [size])):
        return set()
    n = len(sizes[0]) if isinstance(sizes[0], (list, tuple)) else int(str(node.target).split("pool")[1][0])
    return set(range(rank - n, rank))


# op -> (what frames are reduced with, over which dimensions it goes)
_REDUCTIONS: dict[Any, tuple[str, Callable[[fx.Node, int], set[int]]]] = {
    aten.mean.dim: ("mean.dim", _given_dims),
    aten.sum.dim_IntList: ("sum.dim_IntList", _given_dims),
    aten.amax.default: ("amax.default", _given_dims),
    aten.amin.default: ("amin.default", _given_dims),
    aten.adaptive_avg_pool1d.default: ("mean.dim", _adaptive_dims),
    aten.adaptive_avg_pool2d.default: ("mean.dim", _adaptive_dims),
    aten.adaptive_avg_pool3d.default: ("mean.dim", _adaptive_dims),
}


def reduced_frames(streams: StreamGraph, node: fx.Node, value: Value, readers: list[fx.Node]) -> Value | None:
    """A stream of the frames of `value` reduced by themselves, its reduced dimensions of size 1; None if its readers do
    something else with it.

    Args:
        node: the traced node that has these frames.
        readers: the traced nodes that read it, all of them in the clip.
    """
    layout = value.layout
    found = {_REDUCTIONS[n.target][0] if n.target in _REDUCTIONS else "" for n in readers}
    over = {frozenset(_REDUCTIONS[n.target][1](n, len(layout))) for n in readers if n.target in _REDUCTIONS}
    if len(found) != 1 or "" in found or len(over) != 1 or any(n.meta["samples"][0].get("dtype") for n in readers):
        return None
    (how,), (dims,) = found, over
    if layout.time not in dims or any(f in (BATCH, KEY) for d in dims for f in layout[d]):
        return None
    left = Layout(tuple(((TIME,) if i == layout.time else ()) if i in dims else d for i, d in enumerate(layout)))
    if left == layout:
        return None
    split = layout.split()

    def lower(b: Any, op: Op, windows: list[Any], span: range, _: Any) -> fx.Node:
        frames = b.split(windows[0].node, layout, len(span))
        extra = range(layout.time, layout.time + len(split) - len(layout) + 1)
        over = [i for i in extra if i != split.time] + [_place(i, layout, split) for i in dims if i != layout.time]
        reduced = b.aten(how, frames, sorted(over), True)
        node: fx.Node = b.reshape(reduced, left, len(span))
        return node

    op = Op(f"{node.name}_frames", node, [read(value)], lower, stream_nodes=[node])
    made = Value(
        name=f"{node.name}_frames",
        layout=left,
        dtype=value.dtype,
        rate=value.rate,
        lengths=value.lengths,
        length_sources=(value,),
        length=lambda n: n,
        producer=op,
        node=node,
        indexed=value.indexed,
        padded=value.padded,
        memory=value.memory,
    )
    op.outputs.append(streams.add_value(made))
    streams.ops.append(op)
    return made


def _place(dim: int, layout: Layout, split: Layout) -> int:
    """Where a dimension is once time has one of its own."""
    return dim if dim < layout.time else dim + len(split) - len(layout)
