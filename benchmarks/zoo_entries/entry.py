"""What the zoo holds: models as their packages ship them, from small random configurations."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Shape = tuple[int, ...]
ENTRIES: dict[str, Entry] = {}


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        name: the package and the model, ``package/Model``.
        build: makes the model, with random weights.
        shapes: of an example clip, one for each input.
        time_dim: where the inputs have their time axis.
        length: frames of the stream that is verified, beside the clip itself (default twice the clip's).
        tokens: inputs are integers below this.
        positive: inputs are not below zero (spectra).
    """

    name: str
    build: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]
    time_dim: int | tuple[int | None, ...] = 2
    length: int = 0
    tokens: int = 0
    positive: bool = False

    def inputs(self, frames: int | None = None) -> tuple[torch.Tensor, ...]:
        """Random inputs; `frames` instead of the clip's own number (of the first input)."""
        generator = torch.Generator().manual_seed(0)
        dims = self.time_dim if isinstance(self.time_dim, tuple) else (self.time_dim,) * len(self.shapes)
        found = []
        for shape, dim in zip(self.shapes, dims, strict=True):
            size = list(shape)
            if dim is not None and frames is not None:
                size[dim] = frames * size[dim] // self.clip_length
            if self.tokens:
                found.append(torch.randint(0, self.tokens, size, generator=generator))
            else:
                drawn = torch.randn(size, generator=generator)
                found.append(drawn.abs() if self.positive else drawn)
        return tuple(found)

    @property
    def clip_length(self) -> int:
        """Frames of the example, in the first input's time axis."""
        dims = self.time_dim if isinstance(self.time_dim, tuple) else (self.time_dim,)
        return next(s[d] for s, d in zip(self.shapes, dims, strict=False) if d is not None)


def entry(name: str, *shapes: Shape, time: int | tuple[int | None, ...] = 2, **fields: Any) -> Callable[[Any], Any]:
    """Register a function that builds a model."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        if name in ENTRIES:
            raise ValueError(f"{name} is there already")
        ENTRIES[name] = Entry(name, build, shapes, time, **fields)
        return build

    return register


def add(name: str, build: Callable[[], nn.Module], *shapes: Shape, **fields: Any) -> None:
    """`entry` for a model that needs no function of its own."""
    entry(name, *shapes, **fields)(build)


class Call(nn.Module):
    """A model called in its own way: ``of(model, *inputs)`` picks arguments and the tensor that is wanted."""

    def __init__(self, model: nn.Module, of: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.of = model, of

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.of(self.model, *inputs)


def hidden(model: nn.Module) -> Call:
    """A transformers model that returns its last hidden state alone."""
    return Call(model, lambda m, x: m(x).last_hidden_state)


def load(module: str, name: str) -> Any:
    """An attribute of a module that is only imported when it is needed."""
    return getattr(importlib.import_module(module), name)


def prepare_imports() -> None:
    """Let packages be imported whose compiled parts or helpers are not there; no model's code is changed."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(f"nms{boxes}")
        library.define(f"qnms{boxes}")
        _KEPT.append(library)
    try:
        import scipy.signal as signal  # type: ignore[import-not-found]

        for window in ("hamming", "hann", "blackman"):
            if not hasattr(signal, window):
                setattr(signal, window, getattr(signal.windows, window))
    except ImportError:
        pass
    for name in ("fasthtml", "fasthtml.common"):
        try:
            importlib.import_module(name)
        except Exception:
            sys.modules[name] = types.ModuleType(name)


_KEPT: list[Any] = []
