"""A model that is run or traced comes out as it went in, whatever its forward keeps for the next call.

What is kept during a trace holds no numbers, and belongs to the clip's length of that trace; and what was kept before
makes a trace of that length another than it is at others. So results of functions that remember them
(``functools.lru_cache``) are not remembered while a model is traced, and what modules, their classes and files keep in
dicts, lists and objects is as it was afterwards.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

DEPTH = 2  # so deep a module's lists, dicts and objects are looked into
Container = dict[Any, Any] | list[Any]

_OF_MODULES = nn.Module().__dict__.keys()
_NOT_USERS = {*sys.stdlib_module_names, "torch", "torchgen", "functorch", "numpy", "sympy", "mpmath", "networkx",
              "onnx", "onnxruntime", "onnxscript", "safetensors", "pytest", "cofx"} - {"__main__"}  # fmt: skip


@contextlib.contextmanager
def as_for_inference(model: nn.Module) -> Iterator[None]:
    """The module in eval mode, remembering nothing; afterwards each submodule has its mode, attributes and buffers
    again as they were, and what they hold is held again."""
    before = [(m, m.training, dict(m.__dict__), _own_buffers(m)) for m in model.modules()]
    given = [p for p in model.parameters() if not isinstance(p, nn.parameter.UninitializedParameter)]
    with _disable_current_modes():
        data = [(p, p.detach()) for p in given]
    held = [(c, list(c) if isinstance(c, list) else dict(c)) for c in containers(model)]
    names = written_by(model)
    written = [t for n, t in (*model.named_parameters(), *model.named_buffers()) if n in names and not t.is_inference()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        for m, *_ in before:
            m.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        with _computed_anew(), _unwritten(written):
            yield
    finally:
        for m, training, attributes, buffers in before:
            m.training = training
            now = _own_buffers(m)
            if now.keys() != buffers.keys() or any(now[name] is not b for name, b in buffers.items()):
                m._buffers.clear()
                m._buffers.update(buffers)
            for name in m.__dict__.keys() - attributes.keys():
                del m.__dict__[name]
            m.__dict__.update(attributes)
        for container, content in held:
            hold(container, content)
        with _disable_current_modes():
            for parameter, values in data:
                if parameter.data_ptr() != values.data_ptr():  # its ``data`` was replaced
                    parameter.data = values
        torch.backends.mha.set_fastpath_enabled(fastpath)


def tensor_leaves(outputs: Any) -> list[torch.Tensor]:
    """The tensors of a module's output, in order."""
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor)]


def run(model: nn.Module, inputs: Sequence[torch.Tensor]) -> Any:
    """What a model gives offline; its buffers, which forward may write to, are left alone as well."""
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    with torch.no_grad(), as_for_inference(model):
        return torch.func.functional_call(model, buffers, tuple(inputs))


@contextlib.contextmanager
def _unwritten(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Afterwards these hold what they held before, and count no writes."""
    with _disable_current_modes():
        content = [x.detach().clone() for x in tensors]
    versions = [x._version for x in tensors]
    try:
        yield
    finally:
        with _disable_current_modes(), torch.no_grad():
            for x, before in zip(tensors, content, strict=True):
                x.copy_(before)
            torch._C._autograd._unsafe_set_version_counter(tuple(tensors), tuple(versions))


_written: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def written_by(model: nn.Module) -> set[str]:
    """The names of the parameters and buffers to which forward writes, as far as is known."""
    return _written.get(model, set())


def note_written(model: nn.Module, names: Iterable[str]) -> None:
    """Forward writes to these."""
    _written.setdefault(model, set()).update(names)


def _own_buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    return {} if isinstance(module, torch.jit.ScriptModule) else dict(module._buffers)


# -- what is held ------------------------------------------------------------------------------------------------------


def containers(model: nn.Module) -> list[Container]:
    """The lists and dicts in which a model may keep things: in attributes of its modules, of the objects there (whose
    own attributes are such a dict), of its modules' classes, and in their files."""
    roots: list[Any] = [v for m in model.modules() for name, v in m.__dict__.items() if name not in _OF_MODULES]
    classes = {c for m in model.modules() for c in type(m).__mro__ if _of_user(c.__module__)}
    files = {c.__module__ for c in classes} & sys.modules.keys()
    found: dict[int, Container] = {}
    _hold(roots, DEPTH, found)
    _hold([v for c in classes for name, v in vars(c).items() if not name.startswith("__")], 1, found)
    # (a list in a file is rather a list of what there is)
    _hold([v for f in files for n, v in vars(sys.modules[f]).items() if type(v) is dict and n[:2] != "__"], 1, found)
    return list(found.values())


def _hold(values: Iterable[Any], depth: int, found: dict[int, Container]) -> None:
    """Add the containers among these, and within them."""
    for _ in range(depth):
        inner: list[Any] = []
        for value in values:
            held = value if isinstance(value, (list, dict)) else _attributes(value)
            if held is not None and id(held) not in found:
                found[id(held)] = held
                inner += held if isinstance(held, list) else held.values()
        values = inner


def _attributes(value: Any) -> dict[str, Any] | None:
    """The attributes of an object of a class that a user wrote."""
    apart = (nn.Module, torch.Tensor, type, types.ModuleType, types.FunctionType, types.MethodType)
    if isinstance(value, apart) or not _of_user(type(value).__module__):
        return None
    attributes = getattr(value, "__dict__", None)
    return attributes if type(attributes) is dict else None


def hold(container: Container, content: Container) -> None:
    """Let a container hold these again."""
    if same(container, content):
        return
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def same(container: Container, content: Container) -> bool:
    """Whether a container holds the very same things."""
    if len(container) != len(content):
        return False
    if isinstance(container, list):
        return all(a is b for a, b in zip(container, content, strict=True))
    return all(container.get(k, container) is v for k, v in content.items())  # type: ignore[union-attr]


# -- what is remembered ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _computed_anew() -> Iterator[None]:
    """While this is open, functions of users that remember their results do not."""
    places = _remembering(len(sys.modules))
    for owner, name, _, plain in places:
        setattr(owner, name, plain)
    try:
        yield
    finally:
        for owner, name, found, plain in places:
            if vars(owner).get(name) is plain:
                setattr(owner, name, found)


@functools.lru_cache(maxsize=1)
def _remembering(_: int) -> list[tuple[Any, str, Any, Any]]:
    """Where such functions are: in which file or class, by which name, and what they are without memory."""
    found = []
    for file in [m for name, m in list(sys.modules.items()) if _of_user(name) and isinstance(m, types.ModuleType)]:
        values = list(vars(file).items())
        classes = {v for _, v in values if isinstance(v, type) and v.__module__ == file.__name__}
        for owner, members in ((file, values), *((c, list(vars(c).items())) for c in classes)):
            for name, value in members:
                plain = _without_memory(value)
                if plain is not None:
                    found.append((owner, name, value, plain))
    return found


def _without_memory(value: Any) -> Callable[..., Any] | staticmethod[..., Any] | None:
    if isinstance(value, functools._lru_cache_wrapper):
        plain: Callable[..., Any] = value.__wrapped__
        return plain if _of_user(plain.__module__) else None
    if isinstance(value, staticmethod) and (inner := _without_memory(value.__func__)) is not None:
        return staticmethod(inner)
    return None


def _of_user(module: str | None) -> bool:
    """Whether a module, by its name, is not of Python or of what cofx stands on."""
    return isinstance(module, str) and module.partition(".")[0] not in _NOT_USERS
