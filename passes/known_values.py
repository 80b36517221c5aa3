"""Numbers that a model reads from tensors which it made of numbers alone: ``torch.arange(1, x.dim()).tolist()``.

While tracing, tensors have shapes but no values, so that tracing ends where a value is asked for. A tensor that is made
of numbers, and all that is computed from such tensors, is therefore computed beside the trace as well. Nothing that
depends on inputs, parameters, open sizes or random numbers is ever known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

MOST = 1 << 16  # elements of a tensor whose values are kept
_MADE_OF_NUMBERS = {
    torch.arange, torch.as_tensor, torch.full, torch.linspace, torch.ones, torch.scalar_tensor, torch.tensor,
    torch.zeros,
}  # fmt: skip
_OPEN = (torch.SymInt, torch.SymFloat, torch.SymBool)


class KnownValues(TorchFunctionMode):
    """While this is open, values that follow from numbers alone can be read from traced tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._values: Any = WeakTensorKeyDictionary()
        self._spoilt: set[int] = set()  # memory that something unknown was written to

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        if not tensors and func not in _MADE_OF_NUMBERS:
            return func(*args, **kwargs)
        if any(isinstance(x, _OPEN) for x in leaves) or not all(self._is_known(t) for t in tensors):
            if _writes(func, kwargs):
                self._spoilt.update(_memory(self._values[t]) for t in tensors if t in self._values)
            return func(*args, **kwargs)
        known = self._compute(func, args, kwargs)
        if tensors and known is not None and not any(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(known)):
            return known
        traced = func(*args, **kwargs)
        for a, b in zip(pytree.tree_leaves(traced), pytree.tree_leaves(known), strict=False):
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and b.numel() <= MOST:
                self._values[a] = b
        return traced

    def _is_known(self, tensor: torch.Tensor) -> bool:
        return tensor in self._values and _memory(self._values[tensor]) not in self._spoilt

    def _compute(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The call on values; None if it fails there or draws random numbers."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: self._values[t], (args, kwargs))
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            before = torch.get_rng_state()
            try:
                result = func(*args, **kwargs)
            except Exception:
                return None
            if torch.equal(before, torch.get_rng_state()):
                return result
            torch.set_rng_state(before)
            return None


def _writes(func: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name.startswith(("__i", "__set")) or kwargs.get("out") is not None


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())
