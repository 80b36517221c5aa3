"""cofx: turn a PyTorch model trained on clips into an exact frame-by-frame step model.

step = cofx.compile(model, example_clip, time_dim=2)
y_t = step.forward_step(x_t)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .passes.errors import CaptureError, CompileError, NonLocalError, RefusedError
    from .runtime.errors import CofxError, InputError, StateError
    from .step_module import OutputInfo, StepModule, call_mode, compile

__version__ = "0.1.0"

# resolved on first use, so that cofx.runtime can be imported where there is no torch
_HOME = {
    "compile": "step_module",
    "call_mode": "step_module",
    "load": "saving",
    "StepModule": "step_module",
    "OutputInfo": "step_module",
    "CofxError": "runtime.errors",
    "InputError": "runtime.errors",
    "StateError": "runtime.errors",
    "CompileError": "passes.errors",
    "CaptureError": "passes.errors",
    "RefusedError": "passes.errors",
    "NonLocalError": "passes.errors",
}

__all__ = [
    "CaptureError",
    "CofxError",
    "CompileError",
    "InputError",
    "NonLocalError",
    "OutputInfo",
    "RefusedError",
    "StateError",
    "StepModule",
    "call_mode",
    "compile",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cofx' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
