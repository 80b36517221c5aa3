"""Let a model catch what one of its submodules raises, as in ``try: x = layer(x, lengths)`` ``except TypeError: ...``.

The tracer keeps a stack of the modules whose forward it is in, and loses count when one of them is left by an error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn


@contextlib.contextmanager
def caught_errors() -> Iterator[None]:
    """While this is open, the tracer's stack of modules is put right when a module is left by an error."""
    original = fx.Tracer.call_module

    def call_module(self: fx.Tracer, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        depth = len(self.module_stack)
        try:
            return original(self, m, forward, args, kwargs)
        except Exception:
            while len(self.module_stack) > depth:
                self.module_stack.popitem(last=True)
            raise

    fx.Tracer.call_module = call_module  # type: ignore[method-assign]
    try:
        yield
    finally:
        fx.Tracer.call_module = original  # type: ignore[method-assign]
