"""Snapshots of streams in files: safetensors, with the fingerprint of the model that they belong to.

What a file holds is read without executing anything, and a file is replaced all at once or not at all.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

from .errors import StateError

FORMAT = 1
KEY = "cofx"
HELD = "held_input_"  # the last call's inputs without time, which a flush needs


def write_state(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], about: Mapping[str, Any], framework: str
) -> None:
    """Write a snapshot (`framework`: "torch" or "numpy"); whatever happens, the path holds the old one or the new one.

    Raises:
        OSError: it cannot be written.
    """
    library = importlib.import_module(f"safetensors.{framework}")
    data: bytes = library.save(dict(tensors), metadata={KEY: json.dumps({"format": FORMAT, **about})})
    replace_file(path, data)


def folder_of(path: str | os.PathLike[str]) -> str:
    """The folder in which a file is to be.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = os.path.dirname(os.path.abspath(os.fspath(path)))
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "no such folder to write to", folder)
    return folder


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file all at once or not at all."""
    target = os.path.abspath(os.fspath(path))
    handle, draft = tempfile.mkstemp(dir=folder_of(path), prefix=".cofx-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, target)
    except BaseException:
        os.unlink(draft)
        raise


def read_tensors(path: str | os.PathLike[str], key: str, framework: str) -> tuple[dict[str, Any], Any]:
    """The tensors of a safetensors file, and what its metadata has under a key, as JSON.

    Raises:
        ValueError: it is no such file.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    name = os.fspath(path)
    with open(name, "rb"):
        pass  # a file that is not there, or may not be read, is no bad file
    try:
        with safe_open(name, framework="pt" if framework == "torch" else "np") as file:
            about = json.loads((file.metadata() or {})[key])
            return {k: file.get_tensor(k) for k in file.keys()}, about  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error


def read_state(path: str | os.PathLike[str], fingerprint: str, framework: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a snapshot, and what is said about them.

    Raises:
        StateError: it is no snapshot, or one of another model, or of a layout that is not understood.
        OSError: it cannot be read.
    """
    name = os.fspath(path)
    try:
        tensors, about = read_tensors(path, KEY, framework)
    except ValueError as error:
        raise StateError(f"{name} is not a snapshot of a cofx stream: {error}") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise StateError(f"{name} is a snapshot of a format that this version does not read")
    if about.get("fingerprint") != fingerprint:
        raise StateError(f"{name} is a snapshot of another model, or of other parameters")
    return tensors, about
