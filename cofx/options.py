"""What `cofx.compile` is asked for."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .backends import known_backend
from .runtime.errors import InputError

EQUIVALENCES = ("stream", "clip", "prefix", "first-clip")
NONLOCAL_OPS = ("recompute", "continual", "refuse")


@dataclass(frozen=True)
class Options:
    """The arguments of `cofx.compile` beside the model and the example; it says what they mean.

    Raises:
        InputError: one of them is out of its range.
    """

    time_dim: int | Sequence[int | None] = 2
    batch_dim: int | Sequence[int | None] | None = 0
    clip_length: int | None = None
    equivalence: str | None = None
    window_output: str = "last"
    nonlocal_ops: str | Mapping[str, str] = "recompute"
    context: int | None = None
    backend: str = "eager"
    matched: set[str] = field(default_factory=set, init=False, repr=False, compare=False)
    """The patterns in `nonlocal_ops` that fitted an op so far."""

    def __post_init__(self) -> None:
        _one_of("window_output", self.window_output, ("last", "all"))
        if self.equivalence is not None:
            _one_of("equivalence", self.equivalence, EQUIVALENCES)
        for choice in self.choices:
            _one_of("nonlocal_ops", choice, NONLOCAL_OPS)
        for name in ("clip_length", "context"):
            frames = getattr(self, name)
            if frames is not None and not whole(frames, 1):
                raise InputError(f"{name} is a number of frames, at least 1, not {frames!r}")
        known_backend(self.backend)

    @property
    def unmatched(self) -> list[str]:
        """The patterns in `nonlocal_ops` that no op over the whole clip has fitted."""
        return [] if isinstance(self.nonlocal_ops, str) else [p for p in self.nonlocal_ops if p not in self.matched]

    @property
    def newest(self) -> bool:
        """Of a clip's output that keeps time only the newest frame is returned."""
        return self.window_output == "last"

    @property
    def choices(self) -> list[str]:
        """Whatever may become of ops over the whole clip."""
        return [self.nonlocal_ops] if isinstance(self.nonlocal_ops, str) else list(self.nonlocal_ops.values())

    def choose(self, module: str, op: str) -> str:
        """What becomes of an op over the whole clip, by the first pattern that fits its module's path or its name."""
        if isinstance(self.nonlocal_ops, str):
            return self.nonlocal_ops
        for pattern, choice in self.nonlocal_ops.items():
            if fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(op, pattern):
                self.matched.add(pattern)
                return choice
        return "recompute"


def whole(value: Any, least: int) -> bool:
    """Whether this is a whole number, and at least so large."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _one_of(name: str, given: Any, known: Sequence[str]) -> None:
    if given not in known:
        raise InputError(f"{name} is one of {', '.join(map(repr, known))}, not {given!r}")
