"""What a model keeps from one call for the next, such as a table of positions as long as the longest clip so far.

Where there is such a table a trace reads it, at other lengths a new one is made: the model seems to do otherwise there.
So it is traced as if it had not been called yet, if that gives the same numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .fake_run import on_fake_tensors
from .leave_as_found import containers, hold, run, tensor_leaves


@dataclass(frozen=True)
class Kept:
    """Something that a call keeps for later ones.

    Attributes:
        place, name: where: among the attributes or the buffers of a module, or in a dict.
        module: whose buffer it is.
        entry: it is an entry that a call adds to a dict, and so is not there before the first.
        empty: before the first call it is a tensor without entries, not None (or zero, of a number).
        plain: the buffer is an attribute for the time, which may change in size.
    """

    place: dict[Any, Any]
    name: Any
    module: nn.Module | None = None
    entry: bool = False
    empty: bool = False
    plain: bool = False


@contextlib.contextmanager
def dropped(kept: Sequence[Kept]) -> Iterator[None]:
    """While this is open, these are as before the first call."""
    touched = {id(p): p for k in kept for p in (k.place, *([k.module.__dict__] if k.module is not None else []))}
    before = [(p, dict(p)) for p in touched.values()]
    try:
        for k in kept:
            if k.name not in k.place:
                continue  # dropped already
            value = k.place[k.name]
            if k.entry or k.plain:
                del k.place[k.name]
            if not k.entry:
                place = k.module.__dict__ if k.plain and k.module is not None else k.place
                place[k.name] = _blank(value, k.empty)
        yield
    finally:
        for place, content in before:
            hold(place, content)


def _blank(value: Any, empty: bool) -> Any:
    if empty and isinstance(value, torch.Tensor):
        return value.new_empty([0] * value.dim())
    return type(value)(0) if type(value) in (int, float, bool) else None


def kept_by(model: nn.Module, inputs: Sequence[torch.Tensor]) -> list[Kept]:
    """What a call with inputs of these shapes changes of what is there before it."""
    found: list[Kept] = []
    with contextlib.suppress(Exception), on_fake_tensors(model):
        modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        places: list[tuple[dict[Any, Any], nn.Module | None]] = [(m.__dict__, None) for m in modules]
        places += [(m._buffers, m) for m in modules]
        dicts = [c for c in containers(model) if isinstance(c, dict)]
        before = [dict(p) for p in (*(p for p, _ in places), *dicts)]
        model(*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs))
        for (place, module), content in zip(places, before, strict=False):
            found += [Kept(place, name, module) for name, v in content.items() if place.get(name, place) is not v]
        for place, content in zip(dicts, before[len(places) :], strict=True):
            changed = [Kept(place, name) for name, v in content.items() if place.get(name, place) is not v]
            kinds = {_kind(v) for name, v in place.items() if name not in content}  # of what was added
            found += changed or [Kept(place, k, entry=True) for k, v in content.items() if _kind(v) in kinds]
    return found


def _kind(value: Any) -> type:
    return torch.Tensor if isinstance(value, torch.Tensor) else type(value)


def ways_without(model: nn.Module, kept: Sequence[Kept], example: Sequence[torch.Tensor]) -> Iterator[list[Kept]]:
    """Ways to be without what it kept in which the model gives the same."""
    if not kept:
        return
    wanted = _results(model, (), example)
    for empty, plain in ((False, False), (False, True), (True, True)):
        if plain and not empty and not any(k.module is not None for k in kept):
            continue  # as the one before
        way = [replace(k, empty=empty, plain=plain and k.module is not None) for k in kept]
        got = _results(model, way, example)
        if wanted is not None and got is not None and len(wanted) == len(got):
            tensors = [p for p in zip(wanted, got, strict=True) if all(isinstance(x, torch.Tensor) for x in p)]
            if all(a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in tensors):
                yield way


def _results(model: nn.Module, without: Sequence[Kept], example: Sequence[torch.Tensor]) -> list[Any] | None:
    """What the model gives; None if it cannot be run so."""
    try:
        with dropped(without):
            return tensor_leaves(run(model, example))
    except Exception:
        return None
