"""What calling a step model does: ``step(x)`` is the offline model, one step, or several."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

from .runtime.errors import InputError

MODES = ("forward", "forward_step", "forward_steps")

_mode: contextvars.ContextVar[str | None] = contextvars.ContextVar("cofx_call_mode", default=None)
_modes: dict[int, str] = {}  # in use anywhere: where there is none, torch.compile need not trace a ContextVar


@contextlib.contextmanager
def call_mode(mode: str) -> Iterator[None]:
    """Within this context, calling a step model runs `mode`: "forward", "forward_step" or "forward_steps". Nests."""
    token = _mode.set(known_mode(mode))
    _modes[id(token)] = mode
    try:
        yield
    finally:
        del _modes[id(token)]
        _mode.reset(token)


def current_mode() -> str | None:
    """The mode of the innermost context; None outside of all."""
    return _mode.get() if _modes else None


def known_mode(mode: str) -> str:
    """The mode, if there is such a one.

    Raises:
        InputError: there is none.
    """
    if mode not in MODES:
        raise InputError(f"unknown call mode {mode!r}: one of {', '.join(MODES)}")
    return mode
