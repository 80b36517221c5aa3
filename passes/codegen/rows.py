"""Frames as rows of channels, one for each position: convolutions of single positions are then matrix products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

aten = torch.ops.aten

Call = Callable[..., fx.Node]  # (op, *arguments) -> a node of the graph in the making


def to_rows(call: Call, frames: Sequence[fx.Node], channels: int, stride: Sequence[int]) -> fx.Node:
    """(batch, channels, positions...) each -> (batch * positions, frames * channels), of every so many-th position."""
    last = []
    for frame in frames:
        for axis, step in enumerate(stride, 2):
            if step > 1:
                frame = call(aten.slice.Tensor, frame, axis, 0, 1 << 40, step)
        last.append(call(aten.permute.default, frame, [0, *range(2, len(stride) + 2), 1]))
    beside = last[0] if len(last) == 1 else call(aten.cat.default, last, len(stride) + 1)
    return call(aten.reshape.default, beside, [-1, len(last) * channels])


def from_rows(call: Call, rows: fx.Node, positions: Sequence[int], channels: int) -> fx.Node:
    """(batch * positions, channels) -> (batch, channels, positions...), channels last in memory."""
    n = len(positions)
    shaped = call(aten.reshape.default, rows, [-1, *positions, channels])
    return call(aten.permute.default, shaped, [0, n + 1, *range(1, n + 1)])
