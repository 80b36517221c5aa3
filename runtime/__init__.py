"""Run time: state, step programs and lanes. Importable without torch."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {"OnnxStep": "onnx_step", "LanePool": "lane_pool", "Stream": "lane_pool", "PoolFull": "lane_pool"}

__all__ = ["LanePool", "OnnxStep", "PoolFull", "Stream"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cofx.runtime' has no attribute '{name}'")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
