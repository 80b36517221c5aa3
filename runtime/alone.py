"""One call at a time: what a step model is in the middle of, no other call gets to see."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from .errors import InputError

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")


def in_use() -> InputError:
    """What a call is told while another one is running."""
    return InputError(
        "this step model is in the middle of a call, in another thread or further up in this one: give each thread a "
        "step model of its own (of one module or one file), or feed a LanePool"
    )


def alone(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Refuse a call while another one is running: a method of an object that has ``_running``.

    Python takes no signal and lets no other thread run between the test and the store, nor between that and the
    ``try``: the mark cannot be left behind, and two threads cannot both set it.
    """

    @functools.wraps(method)
    def guarded(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
        here = self.__dict__
        if here["_running"]:
            raise in_use()
        here["_running"] = True
        try:
            return method(self, *args, **kwargs)
        finally:
            here["_running"] = False

    return guarded
