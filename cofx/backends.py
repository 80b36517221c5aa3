"""Which backend runs the steps in mid-stream: what there is, and which is the fastest on this machine."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from . import __version__
from .passes.codegen.c.compiler import c_compiler
from .runtime.cache import cache_folder
from .runtime.errors import InputError
from .runtime.state_file import replace_file

BACKENDS = ("eager", "inductor", "onnxruntime", "c", "auto")
ROUNDS, SECONDS = 15, 0.3  # of one backend's measurement: at most so many blocks, and so long


def known_backend(name: str) -> str:
    """The name, if there is such a backend and what it needs is installed.

    Raises:
        InputError: there is none, or something is missing.
    """
    if name not in BACKENDS:
        raise InputError(f"backend is one of {', '.join(map(repr, BACKENDS))}, not {name!r}")
    if name == "onnxruntime" and (missing := _missing("onnxruntime", "onnx", "onnxscript")):
        raise InputError(f"backend='onnxruntime' needs {', '.join(missing)}: pip install 'cofx[onnx]'")
    if name == "inductor" and not _compiler():
        raise InputError("backend='inductor' needs a C++ compiler (g++, clang++, or the one that $CXX names)")
    if name == "c" and c_compiler() is None:
        raise InputError("backend='c' needs a C compiler (cc, gcc, clang, or the one that $CC names)")
    return name


def installed() -> list[str]:
    """The backends of which "auto" takes the fastest, the documented default first."""
    found = [] if _missing("onnxruntime", "onnx", "onnxscript") else ["onnxruntime"]
    return [*found, "eager", *(["c"] if c_compiler() else []), *(["inductor"] if _compiler() else [])]


def measures() -> bool:
    """Whether "auto" measures; with ``COFX_MEASURE=0`` it takes the first of `installed`."""
    return os.environ.get("COFX_MEASURE", "1") != "0"


def _missing(*names: str) -> list[str]:
    return [n for n in names if importlib.util.find_spec(n) is None]


def _compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)


def fastest(ways: Mapping[str, Callable[[], object]]) -> str:
    """The way that takes the least time: blocks of a few calls in turn, compared by the fastest of each.

    Other work on the machine only ever makes a block slower, and some of them by far.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    calls = {}
    for name, way in ways.items():
        for _ in range(3):
            began = time.perf_counter()
            way()
            calls[name] = max(1, int(0.002 / max(time.perf_counter() - began, 1e-7)))
    until = time.perf_counter() + SECONDS * len(ways)
    for _ in range(ROUNDS):
        for name, way in ways.items():
            began = time.perf_counter()
            for _ in range(calls[name]):
                way()
            taken[name].append((time.perf_counter() - began) / calls[name])
        if time.perf_counter() > until:
            break
    return min(taken, key=lambda name: min(taken[name]))


def question(about: object) -> str:
    """A key for what is asked: which backend is the fastest for this, on this machine, with these versions."""
    versions = [importlib.metadata.version(n) for n in ("torch", "onnxruntime") if not _missing(n)] + [__version__]
    machine = [platform.machine(), processor(), torch.get_num_threads(), installed()]
    return hashlib.sha256(json.dumps([about, versions, machine], default=str).encode()).hexdigest()


def processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _answers() -> Path:
    return cache_folder() / "backends.json"


def remembered(key: str) -> str | None:
    """What was measured before."""
    try:
        answer = json.loads(_answers().read_text())[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return answer if answer in installed() else None


def remember(key: str, answer: str) -> None:
    """Keep what was measured; a folder that cannot be written is no error."""
    path = _answers()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        known = known if isinstance(known, dict) else {}
        replace_file(path, json.dumps({**known, key: answer}, indent=1).encode())
    except OSError:
        pass
