"""What a step model's inputs look like, and telling the user when they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import nn

from .passes.capture import Clock
from .passes.errors import raised_at
from .passes.leave_as_found import run
from .passes.pipeline import Plan
from .runtime.errors import InputError


def make_clock(
    example: Sequence[torch.Tensor],
    time_dim: int | Sequence[int | None],
    batch_dim: int | Sequence[int | None] | None,
) -> tuple[Clock, int]:
    """How the axes of these inputs lie, and their length in ticks.

    Raises:
        InputError: they are no tensors, or have no such axis.
    """
    for i, x in enumerate(example):
        if not isinstance(x, torch.Tensor):
            raise InputError(f"input {i} is a {type(x).__name__}, not a tensor")
        if x.layout != torch.strided:
            raise InputError(f"input {i} is a tensor of layout {x.layout}: give a dense one (to_dense())")
    times = _each("time_dim", time_dim, example)
    batches = _each("batch_dim", batch_dim, example)
    lengths = [x.shape[t] for x, t in zip(example, times, strict=True) if t is not None]
    if not lengths:
        raise InputError("no input has a time axis")
    if min(lengths) == 0:
        raise InputError("a clip of no frames")
    # where time comes first, the batch is second
    batches = tuple((1 if x.dim() > 1 and t == 0 else None) if b == t and t is not None else b
                    for x, t, b in zip(example, times, batches, strict=True))  # fmt: skip
    ticks = gcd(*lengths)
    frames = tuple(1 if t is None else x.shape[t] // ticks for x, t in zip(example, times, strict=True))
    return Clock(times, batches, frames), ticks


def check_runs(model: nn.Module, example: Sequence[torch.Tensor]) -> None:
    """Raise `InputError` if the model itself, offline, does not take this example."""
    try:
        run(model, example)
    except Exception as error:
        inputs = ", ".join(f"{tuple(x.shape)} of {x.dtype}".replace("torch.", "") for x in example)
        told = (str(error).strip().splitlines() or [""])[0][:500]
        where = raised_at(error)
        lines = [f"the model itself fails on {inputs}: {type(error).__name__}: {told}"]
        lines += [f"    at      {where}"] if where else []
        lines += ["    try     an example of the shape, dtype and device that the model takes"]
        raise InputError("\n".join(lines)) from error


def _each(
    name: str, dims: int | Sequence[int | None] | None, example: Sequence[torch.Tensor]
) -> tuple[int | None, ...]:
    """One dimension for each input, counted from the front."""
    given = list(dims) if isinstance(dims, (list, tuple)) else [dims] * len(example)
    if len(given) != len(example):
        raise InputError(f"{name} has {len(given)} entries for {len(example)} inputs")
    out: list[int | None] = []
    for i, (d, x) in enumerate(zip(given, example, strict=True)):
        if d is not None and (isinstance(d, bool) or not isinstance(d, int)):
            raise InputError(f"{name} is the number of a dimension, or one (or None) for each input, not {d!r}")
        if d is not None and not -x.dim() <= d < x.dim():
            raise InputError(f"input {i} of shape {tuple(x.shape)} has no dimension {d} ({name})")
        out.append(None if d is None else d % x.dim())
    return tuple(out)


@dataclass(frozen=True)
class InputSpec:
    """Shapes, dtypes and axes of the inputs.

    Attributes:
        names: of the arguments of the model's forward.
        shapes: as traced.
        dtypes, device: of the inputs; the device is that of the parameters.
        times, batches: their time and batch dimensions.
        frames: frames of each per tick.
        has_untimed: whether some input has no time axis.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device
    times: tuple[int | None, ...]
    batches: tuple[int | None, ...]
    frames: tuple[int, ...]
    has_untimed: bool

    @classmethod
    def of(cls, plan: Plan) -> InputSpec:
        """The inputs of a plan."""
        nodes = [n for n, _ in plan.inputs]
        device = next((t.device for t in plan.constants.tensors.values()), nodes[0].meta["val"].device)
        return cls(
            tuple(n.name for n in nodes),
            tuple(n.meta["sizes"][0] for n in nodes),
            tuple(n.meta["val"].dtype for n in nodes),
            device,
            plan.clock.time_dims,
            plan.clock.batch_dims,
            plan.clock.frames,
            None in plan.clock.time_dims,
        )

    def _axes(self, i: int, frames: bool) -> tuple[int | None, int | None]:
        """The time and batch dimensions of input `i`, as a frame or as a chunk."""
        t, b = self.times[i], self.batches[i]
        if frames and t is not None and self.frames[i] == 1:
            return None, b if b is None or b < t else b - 1
        return t, b

    def batch_of(self, inputs: Sequence[torch.Tensor], frames: bool) -> int | None:
        """The batch size of these inputs."""
        for i, x in enumerate(inputs):
            if i >= len(self.names):
                return None
            _, b = self._axes(i, frames)
            if b is not None and isinstance(x, torch.Tensor) and x.dim() > b:
                return x.shape[b]
        return None

    def ticks(self, chunks: Sequence[torch.Tensor]) -> int:
        """How many ticks these chunks hold."""
        for x, t, k in zip(chunks, self.times, self.frames, strict=False):
            if t is not None and isinstance(x, torch.Tensor) and x.dim() > t:
                return int(x.shape[t]) // k
        return 1

    def check(self, inputs: Sequence[Any], ticks: int, batch: int | None, frames: bool) -> None:
        """Raise `InputError` unless these inputs fit; `batch` is that of the running stream."""
        if len(inputs) != len(self.names):
            raise InputError(f"{len(self.names)} inputs are needed ({', '.join(self.names)}), {len(inputs)} were given")
        if ticks < 1:
            raise InputError("a chunk of no frames")
        found = batch
        for i, (name, x) in enumerate(zip(self.names, inputs, strict=True)):
            if not isinstance(x, torch.Tensor):
                raise InputError(f"input '{name}' is a {type(x).__name__}, not a tensor")
            if x.dtype != self.dtypes[i]:
                raise InputError(f"input '{name}' has dtype {x.dtype}, the model was traced with {self.dtypes[i]}")
            if x.device != self.device:
                raise InputError(f"input '{name}' is on {x.device}, the model's parameters are on {self.device}")
            t, b = self._axes(i, frames)
            shape: list[Any] = list(self.shapes[i])
            if t is None and self.times[i] is not None:
                del shape[self.times[i]]  # type: ignore[arg-type]
            elif t is not None:
                shape[t] = ticks * self.frames[i]
            if b is not None:
                shape[b] = x.shape[b] if x.dim() == len(shape) and found is None else found
                found = shape[b]
            if tuple(x.shape) != tuple(shape):
                what = "one frame" if frames else f"{ticks} frames" if self.frames[i] == 1 else f"{ticks} ticks"
                wanted = ", ".join("batch" if n is None else str(n) for n in shape) + ("," if len(shape) == 1 else "")
                raise InputError(f"input '{name}' has shape {tuple(x.shape)}, expected ({wanted}) for {what}")

    def part(self, inputs: Sequence[torch.Tensor], start: int, ticks: int) -> list[torch.Tensor]:
        """Some ticks of chunks."""
        return [
            x if t is None else x.narrow(t, start * k, ticks * k)
            for x, t, k in zip(inputs, self.times, self.frames, strict=True)
        ]

    def frame(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The first frame of each, as a step takes it."""
        out = []
        for i, x in enumerate(self.part(inputs, 0, 1)):
            t = self.times[i]
            out.append(x.select(t, 0) if t is not None and self.frames[i] == 1 else x)
        return out

    def untimed(self, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Copies of the inputs that have no time axis."""
        return tuple(x.clone() for x, t in zip(inputs, self.times, strict=True) if t is None)

    def blank(self, batch: int | None, untimed: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Inputs of the traced shapes, for a batch size; those without time as given."""
        out = []
        held = iter(untimed)
        for shape, dtype, t, b in zip(self.shapes, self.dtypes, self.times, self.batches, strict=True):
            if t is None:
                out.append(next(held))
                continue
            size = list(shape)
            if b is not None and batch is not None:
                size[b] = batch
            out.append(torch.zeros(size, dtype=dtype, device=self.device))
        return out

    def sizes(self, ticks: int) -> list[list[int]]:
        """The traced shapes with so many ticks."""
        out = []
        for shape, t, k in zip(self.shapes, self.times, self.frames, strict=True):
            size = list(shape)
            if t is not None:
                size[t] = ticks * k
            out.append(size)
        return out

    def zeros(self, templates: Sequence[torch.Tensor], ticks: int) -> list[torch.Tensor]:
        """Empty frames after the end of a stream; inputs without time stay as they are."""
        out = []
        for x, t, k in zip(templates, self.times, self.frames, strict=True):
            if t is None:
                out.append(x)
            else:
                shape = list(x.shape)
                shape[t] = ticks * k
                out.append(x.new_zeros(shape))
        return out
