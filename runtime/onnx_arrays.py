"""How the arrays of a step graph lie, and those that a caller gives and gets: from its metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .onnx_buffers import Array, Buffers


class Arrays:
    """The inputs and outputs of one step graph.

    Args:
        meta: of the graph, see `read_meta`.
    """

    def __init__(self, meta: Mapping[str, Any]) -> None:
        self.meta = meta
        self.frames_per_step: int = meta["frames_per_step"]
        self.rates: list[int] = [i["frames_per_tick"] for i in meta["inputs"]]

    def ticks(self, chunks: Sequence[Any]) -> int:
        """How many ticks these chunks hold."""
        for x, info, rate in zip(chunks, self.meta["inputs"], self.rates, strict=False):
            time = info["model_axes"]["time"]
            if rate and isinstance(x, np.ndarray) and x.ndim > time:
                return int(x.shape[time]) // int(rate)
        return 1

    def untimed(self, chunks: Sequence[Array]) -> tuple[Array, ...]:
        """The inputs without time, which a flush needs."""
        return tuple(x for x, rate in zip(chunks, self.rates, strict=True) if not rate)

    def model_shape(self, info: Mapping[str, Any], frames: int) -> list[Any]:
        """The shape of an input as the model takes it; None for the batch."""
        shape: list[Any] = list(info["shape"])
        batch, time = info["model_axes"]["batch"], info["model_axes"]["time"]
        if shape[:1] == ["batch"]:
            shape = shape[1:]
            if batch is not None:
                shape.insert(batch, None)
        if time is not None:
            shape[time] = frames
        return shape

    def part(self, chunks: Sequence[Array], start: int, ticks: int) -> list[Array]:
        """Some ticks of chunks; views."""
        out = []
        for x, info, rate in zip(chunks, self.meta["inputs"], self.rates, strict=True):
            time = info["model_axes"]["time"]
            at = [slice(None)] * x.ndim
            if rate:
                at[time] = slice(start * rate, (start + ticks) * rate)
            out.append(x[tuple(at)])
        return out

    def batch_first(self, info: Mapping[str, Any], x: Array) -> Array:
        """An input as the graph takes it; a view."""
        batch = info["model_axes"]["batch"]
        if info["shape"][:1] != ["batch"]:
            return x
        return x[None] if batch is None else np.moveaxis(x, batch, 0)

    def fill(self, buffers: Buffers, chunks: Sequence[Array], controls: Mapping[str, Array]) -> None:
        """Copy what a call is given into what is bound."""
        for x, info in zip(chunks, self.meta["inputs"], strict=True):
            np.copyto(buffers.inputs[info["name"]], self.batch_first(info, x))
        for name, default in (("start", False), ("ready", True), ("length", -1)):
            if name in buffers.controls:
                buffers.controls[name][...] = controls.get(name, default)

    def collect(self, outputs: Mapping[str, Array], parts: list[list[Array]]) -> None:
        """Append the frames of a call's outputs that exist; they are the same for all lanes."""
        for info, part in zip(self.meta["outputs"], parts, strict=True):
            y = self.shaped(info, outputs[info["name"]], False)
            if not info["timed"]:
                part[:] = [y.copy()]
                continue
            exist = np.flatnonzero(outputs[info["valid"]][0])
            if exist.size:
                part.append(np.take(y, exist, axis=info["model_axes"]["time"]))

    def blank(self, lanes: int, held: Sequence[Array]) -> list[Array]:
        """Empty frames for one call, and these inputs without time."""
        untimed = iter(held)
        out = []
        for info, rate in zip(self.meta["inputs"], self.rates, strict=True):
            if rate:
                shape = self.model_shape(info, self.frames_per_step * rate)
                out.append(np.zeros([lanes if s is None else s for s in shape], info["dtype"]))
            else:
                out.append(next(untimed))
        return out

    def untimed_zeros(self, lanes: int) -> list[Array]:
        """Zeros for the inputs without time."""
        shapes = [(self.model_shape(i, 0), i) for i in self.meta["inputs"] if not i["frames_per_tick"]]
        return [np.zeros([lanes if s is None else s for s in shape], i["dtype"]) for shape, i in shapes]

    def shaped(self, info: Mapping[str, Any], y: Array, frames: bool) -> Array:
        """An output of the graph with its axes where the model has them; a view."""
        axes, time = info["model_axes"], info["time_axis"]
        batch = axes["batch"]
        if batch is None:
            y = y[0]
            time = None if time is None else time - 1
        elif time is None:
            y = np.moveaxis(y, 0, batch)
        else:
            y = np.moveaxis(y, (0, time), (batch, axes["time"]))
            time = axes["time"]
        if time is not None and time != axes["time"]:
            y = np.moveaxis(y, time, axes["time"])
        if frames and info["timed"] and info["single"]:
            y = y[(slice(None),) * axes["time"] + (0,)]
        return y

    def due(self, parts: list[list[Array]], frames: bool) -> Any:
        """The frames of each output, in the model's structure; None if nothing at all is due."""
        leaves: list[Array | None] = []
        for info, part in zip(self.meta["outputs"], parts, strict=True):
            if not part:
                leaves.append(None)
                continue
            time = info["model_axes"]["time"]
            y = part[-1] if not info["timed"] else part[0] if len(part) == 1 else np.concatenate(part, time)
            if frames and info["timed"] and info["single"]:
                y = y[(slice(None),) * time + (0,)]
            leaves.append(np.ascontiguousarray(y))
        timed = [y for y, info in zip(leaves, self.meta["outputs"], strict=True) if info["timed"]]
        if timed and all(y is None for y in timed):
            return None
        return self.packed(leaves)

    def packed(self, leaves: Sequence[Any]) -> Any:
        """Outputs in the model's own structure."""

        def build(node: Any) -> Any:
            if isinstance(node, int):
                return leaves[node]
            ((kind, entries),) = node.items()
            if kind == "dict":
                return {k: build(v) for k, v in entries}
            return (list if kind == "list" else tuple)(build(e) for e in entries)

        return build(self.meta["structure"])
