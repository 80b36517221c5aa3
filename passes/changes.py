"""Whether tensors have changed since they were last looked at."""

from __future__ import annotations

from collections.abc import Iterable

import torch

ENTRIES = 64  # of a tensor, for a glimpse of it


def version(tensor: torch.Tensor) -> int:
    """A number that goes up with what is written to a tensor in place; 0 for those that do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def content(tensor: torch.Tensor) -> str:
    """What a tensor holds as one number: also what is written past the counter (``.data``, NumPy, ``Module.to``).

    A product with fixed weights, at the speed of memory. What it overlooks is below the rounding of single precision.
    """
    if not tensor.numel() or tensor.is_meta:
        return ""
    with torch.no_grad():
        x = tensor.detach()
        x = torch.view_as_real(x).flatten(-2) if x.is_complex() else x
        rows = x.reshape(len(x) if x.dim() > 1 else 1, -1)
        rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
        total = _weights(rows.shape[0], rows) @ (rows @ _weights(rows.shape[1], rows))
        return str(total.item())  # as text NaN equals itself


def _weights(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.cos(torch.arange(count, dtype=like.dtype, device=like.device)) + 2


def glimpse(tensors: Iterable[torch.Tensor]) -> bytes:
    """Some entries of each of many tensors, spread evenly over it: what is written to all of one shows there."""
    parts = []
    for x in tensors:
        if x.numel() and not x.is_meta:
            x = x.detach().contiguous()
            few = min(ENTRIES, x.numel())
            some = x.as_strided((few,), (x.numel() // few,), x.storage_offset())
            parts.append(some.cpu().contiguous().view(torch.uint8))
    return torch.cat(parts).numpy().tobytes() if parts else b""
