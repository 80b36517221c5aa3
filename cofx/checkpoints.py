"""Reading what others have saved: state dicts in safetensors or torch's own format, and models by name."""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .passes.capture import quiet
from .runtime.errors import InputError

WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which trainers keep the parameters


@dataclass(frozen=True)
class Fit:
    """How a checkpoint fits a model: names, after a common prefix was taken off."""

    prefix: str
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_model(name: str, kwargs: Mapping[str, Any] | None = None, trust_pickle: bool = False) -> nn.Module:
    """The module that ``package.module:factory`` makes, or that a .pt2 file (`torch.export.save`) holds; in eval mode.

    Either is a program, which is run: name one that you trust.

    Raises:
        InputError: there is no such thing, or it makes no nn.Module; or a .pt2 holds pickles, without `trust_pickle`.
    """
    if name.endswith(".pt2"):
        return _exported(Path(name), trust_pickle)
    path, colon, attribute = name.partition(":")
    parts = [*path.split("."), *attribute.split(".")]
    if not colon or not all(p.isidentifier() and not p.startswith("__") for p in parts):
        raise InputError(f"a model is given as package.module:factory or as a .pt2 file, not {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(path)
        for part in attribute.split("."):
            found = getattr(found, part)
        if _is_pythons(found):
            raise InputError("it is of Python's own library")
        made = found if isinstance(found, nn.Module) else found(**(kwargs or {}))
    except (Exception, SystemExit) as error:
        raise InputError(f"{name} cannot be made: {_told(error)}") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"{name} makes a {type(made).__name__}, not an nn.Module")
    return made.eval()


def _is_pythons(found: Any) -> bool:
    """Whether something is of Python's own library, which has no models but much else to call."""
    while isinstance(found, functools.partial):
        found = found.func
    home = found.__name__ if isinstance(found, ModuleType) else getattr(found, "__module__", None) or ""
    return home.split(".")[0] in sys.stdlib_module_names


def _exported(path: Path, trust_pickle: bool) -> nn.Module:
    """The module in a .pt2 file."""
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    _refuse_packed(path)
    try:
        if not trust_pickle and (parts := _pickles(path)):
            raise InputError(
                f"{path} holds pickles ({', '.join(parts[:3])}), and reading them may run any code that is in them: "
                "give --trust-pickle if you trust where it comes from"
            )
        with quiet():
            return torch.export.load(path).module()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} cannot be read as an exported program: {_first(error)}") from error


def _pickles(path: Path) -> list[str]:
    """The parts of a .pt2 that `torch.export.load` unpickles, and that hold more than tensors; compiled ones, too."""
    found = []
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickled = {n for n in names if n.endswith(".pt")}
        for name in (n for n in names if n.endswith("_config.json")):
            folder = name.rpartition("/")[0]
            for part in json.loads(archive.read(name))["config"].values():
                member = f"{folder}/{part['path_name']}"
                if not part["path_name"].startswith(("weight_", "tensor_")):
                    found.append(member)
                elif part["use_pickle"]:
                    pickled.add(member)
        for name in sorted(pickled):
            if content := archive.read(name):
                try:
                    torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
                except Exception:
                    found.append(name)
    return found + [n for n in names if "/aotinductor/" in n or n.endswith(".so")]


def _refuse_packed(path: Path) -> None:
    """Raise if an archive says that it holds more than its own bytes: torch packs nothing, a zip bomb does."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # whoever reads it will say what it is instead
    if size > path.stat().st_size:
        raise InputError(f"{path} has {path.stat().st_size:,} bytes and would unpack to {size:,}: torch saves unpacked")


def load_state_dict(path: str | os.PathLike[str], trust_pickle: bool = False) -> dict[str, torch.Tensor]:
    """The parameters in a checkpoint: .safetensors, or .pt, .pth, .ckpt as torch and Lightning save them.

    Args:
        trust_pickle: read files that can only be unpickled, which may run any code that is in them.

    Raises:
        InputError: it cannot be read, holds no state dict, or could only be unpickled.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise InputError("reading safetensors takes the package safetensors") from error
        try:
            return dict(load_file(path))
        except Exception as error:
            raise InputError(f"{path} cannot be read as safetensors: {_first(error)}") from error
    _refuse_packed(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not trust_pickle:
            raise InputError(
                f"{path} holds more than tensors, and unpickling it may run any code that is in it: save a state dict, "
                "or give --trust-pickle if you trust where it comes from"
            ) from error
        try:
            held = torch.load(path, map_location="cpu", weights_only=False)
        except Exception as error:
            raise InputError(f"{path} cannot be unpickled: {_told(error)}") from error
    except Exception as error:
        raise InputError(f"{path} cannot be read: {_first(error)}") from error
    return _state_dict(held, path)


def _state_dict(held: Any, path: Path) -> dict[str, torch.Tensor]:
    for _ in range(len(WRAPPERS) + 1):  # one in the other, no deeper
        if isinstance(held, nn.Module):
            return dict(held.state_dict())
        if not isinstance(held, Mapping):
            break
        inner = next((held[key] for key in WRAPPERS if isinstance(held.get(key), (Mapping, nn.Module))), None)
        if inner is None:
            if held and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in held.items()):
                return dict(held)
            break
        held = inner
    raise InputError(f"{path} holds no state dict")


def apply_checkpoint(model: nn.Module, state: Mapping[str, torch.Tensor], strict: bool = True) -> Fit:
    """Load parameters into a model, a common prefix such as ``model.`` or ``module.`` taken off or put before.

    Raises:
        InputError: names are missing or unexpected and `strict` is set, or shapes do not fit. Nothing is loaded then.
    """
    wanted = model.state_dict()
    heads = {"".join(f"{p}." for p in name.split(".")[:n]) for name in state for n in range(4)}
    prefix = max(sorted(heads, key=len), key=lambda h: sum(n.startswith(h) and n[len(h) :] in wanted for n in state))
    fitting = {n[len(prefix) :]: t for n, t in state.items() if n.startswith(prefix) and n[len(prefix) :] in wanted}
    fit = Fit(
        prefix,
        tuple(n for n in wanted if n not in fitting),
        tuple(n for n in state if not n.startswith(prefix) or n[len(prefix) :] not in wanted),
    )
    shapes = [
        f"{n}: {tuple(t.shape)}, expected {tuple(wanted[n].shape)}"
        for n, t in fitting.items()
        if t.shape != wanted[n].shape
    ]
    if shapes:
        raise InputError("the checkpoint has other shapes:\n    " + "\n    ".join(shapes))
    if strict and (fit.missing or fit.unexpected):
        lines = [f"missing     {n}" for n in fit.missing] + [f"unexpected  {n}" for n in fit.unexpected]
        raise InputError("the checkpoint does not fit the model (--no-strict takes it):\n    " + "\n    ".join(lines))
    model.load_state_dict(fitting, strict=False)
    return fit


def parse_kwargs(text: str | None) -> dict[str, Any]:
    """Arguments of a factory, in JSON."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"--kwargs is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError("--kwargs is a JSON object")
    return found


def _told(error: BaseException) -> str:
    return _first(error) if isinstance(error, InputError) else f"{type(error).__name__}: {_first(error)}"


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
