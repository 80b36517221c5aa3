"""Numbers that a model reads from tensors which it made of numbers alone: ``torch.arange(1, x.dim()).tolist()``.

While tracing, tensors have shapes but no values, so that tracing ends where a value is asked for. A tensor that is made
of numbers, and all that is computed from such tensors, is therefore computed beside the trace as well. So are the
model's own buffers (a stride that is kept as one, a flag, a window), parameters of a single number (a temperature), and
what was made before the trace and is neither (a constant of its Python module). Nothing that depends on inputs, other
parameters, open sizes or random numbers is ever known.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from .assertions import truth_without_error

MOST = 1 << 16  # elements of a tensor whose values are kept
_MADE_OF_NUMBERS = {
    torch.arange, torch.as_tensor, torch.full, torch.linspace, torch.ones, torch.scalar_tensor, torch.tensor,
    torch.zeros,
}  # fmt: skip
_READS = {
    "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "is_nonzero", "equal",
    "allclose",
}  # fmt: skip
_TAKES_SIZES = {
    torch._C._nn.pad, torch.nn.functional.pad, torch.Tensor.view, torch.Tensor.reshape, torch.Tensor.expand,
    torch.Tensor.repeat, torch.Tensor.narrow,
}  # fmt: skip
# what is asked about a tensor, which values have no part in: nearly all that torch.export itself calls
_ABOUT = {
    *(getattr(torch.Tensor, name).__get__ for name in (
        "device", "dtype", "grad_fn", "is_cpu", "is_leaf", "is_mkldnn", "is_nested", "is_quantized", "is_sparse",
        "layout", "ndim", "output_nr", "requires_grad", "shape")),
    torch.Tensor._is_view, torch.Tensor.dim, torch.Tensor.is_conj, torch.Tensor.is_inference, torch.Tensor.is_neg,
    torch.Tensor.numel, torch.Tensor.size, torch.Tensor.storage_offset, torch.Tensor.stride,
    torch.Tensor.untyped_storage,
}  # fmt: skip
_NOT_KNOWN = nn.modules.batchnorm._NormBase, torch.jit.ScriptModule  # whose buffers are left alone
_OPEN = (torch.SymInt, torch.SymFloat, torch.SymBool)


class KnownValues(TorchFunctionMode):
    """While this is open, values that follow from numbers alone can be read from traced tensors.

    Attributes:
        read: the names of the buffers and parameters on which a value depends that was read.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.read: set[str] = set()
        held = [
            (place, name, f"{path}.{name}".lstrip("."), tensor.detach())
            for path, module in model.named_modules()
            for place, most in ((module._buffers, MOST), (module._parameters, 1))
            for name, tensor in ({} if isinstance(module, _NOT_KNOWN) else place).items()
            if tensor is not None and tensor.numel() <= most
        ]
        # copies, which share memory where the buffers do: forward may write to them
        copies = copy.deepcopy([tensor for *_, tensor in held])
        self._held = [(*where, value) for (*where, _), value in zip(held, copies, strict=True)]
        self._values: Any = WeakTensorKeyDictionary()
        self._sources: Any = WeakTensorKeyDictionary()  # names of the buffers that values follow from
        self._spoilt: set[int] = set()  # memory that something unknown was written to

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ABOUT:
            return func(*args, **(kwargs or {}))
        sized = func in _TAKES_SIZES
        kwargs = {k: self._with_sizes(a, sized) for k, a in (kwargs or {}).items()}
        args = tuple(self._with_sizes(self._as_number(a) if sized and i else a, sized) for i, a in enumerate(args))
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        if not tensors and func not in _MADE_OF_NUMBERS:
            return func(*args, **kwargs)
        if any(isinstance(x, _OPEN) for x in leaves) or not all(self.knows(t) for t in tensors):
            if (holds := truth_without_error(func)) is not None:
                return holds
            if _writes(func, kwargs):
                self._spoilt.update(_memory(self._values[t]) for t in tensors if t in self._values)
            return func(*args, **kwargs)
        sources = set().union(*(self._sources.get(t, ()) for t in tensors))
        known = self._compute(func, args, kwargs)
        if known is not None and getattr(func, "__name__", "") in _READS:
            self.read |= sources
            return known
        traced = func(*args, **kwargs)
        for a, b in zip(pytree.tree_leaves(traced), pytree.tree_leaves(known), strict=False):
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and b.numel() <= MOST:
                self._values[a], self._sources[a] = b, sources
        return traced

    def _with_sizes(self, arg: Any, sizes: bool) -> Any:
        """A list of sizes with known integers as numbers: ``(0, known)`` in ``F.pad(x, (0, known))``."""
        if not isinstance(arg, (list, tuple)):
            return arg
        sizes = sizes or any(isinstance(a, (int, torch.SymInt)) for a in arg)
        return tuple(self._as_number(a) for a in arg) if sizes else arg

    def _as_number(self, arg: Any) -> Any:
        if not isinstance(arg, torch.Tensor) or not self._is_integer(arg):
            return arg
        self.read |= self._sources.get(arg, set())
        return self._values[arg].item()

    def _is_integer(self, tensor: torch.Tensor) -> bool:
        return tensor.dim() == 0 and tensor.dtype in (torch.int32, torch.int64) and self.knows(tensor)

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether a traced tensor's values can be read."""
        if tensor not in self._values:
            for place, name, path, value in self._held:  # while tracing, they are replaced in place
                if place.get(name) is tensor:
                    self._values[tensor], self._sources[tensor] = value, {path}
            if _is_real(tensor):
                self._values[tensor], self._sources[tensor] = tensor, set()
        return tensor in self._values and _memory(self._values[tensor]) not in self._spoilt

    def _compute(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The call on values; None if it fails there or draws random numbers."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: self._values[t], (args, kwargs))
        with _disable_current_modes(), torch._C.DisableTorchFunction(), _NothingRandom():  # type: ignore[no-untyped-call]
            try:
                return func(*args, **kwargs)
            except Exception:
                return None


def _is_real(tensor: torch.Tensor) -> bool:
    """Whether a tensor has values while everything of the model's is traced: it was made outside of it (a constant)."""
    wrapped = torch._is_functional_tensor(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    plain = type(tensor) is torch.Tensor and not wrapped
    return plain and not tensor.requires_grad and not tensor.is_meta and tensor.numel() <= MOST


class _NothingRandom(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises where random numbers would be drawn."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise RuntimeError("random numbers are not known")
        return func(*args, **(kwargs or {}))


def _writes(func: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name.startswith(("__i", "__set")) or kwargs.get("out") is not None


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())
