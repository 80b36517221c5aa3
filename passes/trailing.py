"""Clip-wide ops over the frames so far: what they become in the reference module of ``nonlocal_ops="continual"``.

Each is plain PyTorch, offline and differentiable. For frame t it looks at the last ``min(t + 1, window)`` frames up to
and including t. What it yields has the frames in front: entry t stands for what the clip-wide op yields for the clip
that ends with frame t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .canonicalize import bind

aten = torch.ops.aten
Tensor = torch.Tensor


def to_frames(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """The frames of a stream in front, each a clip of one frame: time lies in `dim` between these other factors."""
    x = torch.unflatten(x, dim, (before, -1, after)).movedim(dim + 1, 0)
    return x.flatten(dim + 1, dim + 2)


def from_frames(y: Tensor, dim: int, before: int, after: int) -> Tensor:
    """The inverse of `to_frames`."""
    y = torch.unflatten(y, dim + 1, (before, after)).movedim(0, dim + 1)
    return y.flatten(dim, dim + 2)


def per_frame(op: Any, batched: Sequence[bool], args: Any, kwargs: Any) -> Any:
    """An op on each frame by itself; `batched` tells which of its tensors have frames in front.

    Most ops take the frames as one more dimension of their batch. Anything else is mapped by torch.vmap, which costs
    the tracing of the whole graph a second time.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [(x, x.dim() - b) for x, b in zip(leaves, batched, strict=True) if isinstance(x, Tensor)]
    products = op in PRODUCTS and min(rank for _, rank in tensors) > 1
    if products or torch.Tag.pointwise in getattr(op, "tags", ()):
        rank = max(rank for _, rank in tensors)
        wide = [
            x.reshape(x.shape[0], *[1] * (rank + 1 - x.dim()), *x.shape[1:]) if b and x.dim() <= rank else x
            for x, b in zip(leaves, batched, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(wide, spec)
        return (aten.matmul.default if products else op)(*args, **kwargs)
    if op in OF_A_BATCH and batched[0] and not any(batched[1:]) and args[0].dim() == OF_A_BATCH[op]:
        y = op(args[0].flatten(0, 1), *args[1:], **kwargs)
        return torch.unflatten(y, 0, args[0].shape[:2])
    if len(tensors) == sum(batched) and len({rank for _, rank in tensors}) == 1:
        given = _shifted(op, bind(op, args, kwargs), tensors[0][0].shape[0])
        if given is not None:
            return op(**given)

    def one(*frames: Tensor) -> Any:
        given = iter(frames)
        full = [next(given) if b else leaf for leaf, b in zip(leaves, batched, strict=True)]
        a, k = pytree.tree_unflatten(full, spec)
        return op(*a, **k)

    return torch.vmap(one)(*(leaf for leaf, b in zip(leaves, batched, strict=True) if b))


def _shifted(op: Any, given: dict[str, Any], frames: int | torch.SymInt) -> dict[str, Any] | None:
    """Arguments of an op that tells dimensions or a shape, where one more dimension lies in front; None of others."""
    if op in SHAPED:
        return given | {SHAPED[op]: [frames, *given[SHAPED[op]]]}
    dims = {name: value for name, value in given.items() if name in DIMENSIONS}
    if not dims or any(value is None or value == [] for value in dims.values()):
        return None  # over all of them

    shifted = pytree.tree_map(lambda dim: dim + 1 if dim >= 0 else dim, dims)
    if op is aten.permute.default:
        shifted["dims"] = [0, *shifted["dims"]]
    return {**given, **shifted}


# what dimensions are called in schemas; the ops that take a whole shape, and what it is called there
DIMENSIONS = {"dim", "dims", "dim0", "dim1", "start_dim", "end_dim", "dimension"}
SHAPED = {aten.reshape.default: "shape", aten.view.default: "size"}
PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default}
# ops whose first argument is a batch, and how many dimensions that has with frames in front
OF_A_BATCH = {aten.linear.default: 3, aten.conv1d.default: 4, aten.conv2d.default: 5, aten.conv3d.default: 6}


def ones_of(x: Tensor) -> Tensor:
    """One for each frame of x (in front). Made from the frames, so that it has as many of them as a stream has."""
    first = x.flatten(1)[:, 0]
    return torch.logical_or(first == first, first != first).to(x.dtype)


def present(x: Tensor, window: int) -> Tensor:
    """How many frames there are for each frame of x (in front), shaped to broadcast."""
    return trailing_sum(ones_of(x), window).reshape(-1, *[1] * (x.dim() - 1))


def windows(x: Tensor, window: int, fill: float = 0.0) -> Tensor:
    """The last `window` frames for each frame (in front), as a last dimension; `fill` before the first."""
    padding = [0, 0] * (x.dim() - 1) + [window - 1, 0]
    return torch.nn.functional.pad(x, padding, value=fill).unfold(0, window, 1)


def trailing_sum(x: Tensor, window: int) -> Tensor:
    """Sums over the frames so far."""
    return windows(x, window).sum(-1)


def trailing_mean(x: Tensor, window: int) -> Tensor:
    """Means over the frames so far."""
    return trailing_sum(x, window) / present(x, window)


def trailing_moments(f: Tensor, dims: list[int], window: int) -> tuple[Tensor, Tensor, int]:
    """Mean and summed squares about it over dimensions `dims` (kept) of the frames so far, and how many numbers a frame
    has. Squares are taken about the mean itself, so that nothing cancels."""
    mean = f.mean(dims, keepdim=True)
    squares = ((f - mean) ** 2).sum(dims, keepdim=True)
    size = 1
    for d in dims:
        size *= f.shape[d]
    of_all = trailing_mean(mean, window)
    there = windows(ones_of(mean), window).reshape(-1, *[1] * (mean.dim() - 1), window)
    off = (windows(mean, window) - of_all.unsqueeze(-1)) * there
    return of_all, trailing_sum(squares, window) + size * (off * off).sum(-1), size


def reduced(f: Tensor, dims: Sequence[int], keepdim: bool, given: Tensor) -> Tensor:
    """A reduction's result (with its dimensions kept) as the op would give it."""
    return given if keepdim else given.squeeze([d % f.dim() for d in dims])


def trailing(op: Any, window: int, given: dict[str, Any], streams: Sequence[tuple[int, int, int] | None]) -> Tensor:
    """A clip-wide op over the frames so far.

    Args:
        op: an overload that `FORMS` has.
        window: the most frames that it looks back on, its own included.
        given: its arguments by the names of its schema.
        streams: where time lies in each tensor argument that is a stream (see `to_frames`), in order.
    """
    return FORMS[op](window, given, list(streams))


def _first(kwargs: dict[str, Any], streams: list[Any]) -> Tensor:
    return to_frames(kwargs["input"] if "input" in kwargs else kwargs["self"], *streams[0])


def _dims(f: Tensor, kwargs: dict[str, Any]) -> list[int]:
    given = kwargs.get("dim")
    rank = f.dim() - 1
    given = list(range(rank)) if given is None or given == [] else [given] if isinstance(given, int) else given
    return [d % rank + 1 for d in given]


def _mean(window: int, kwargs: dict[str, Any], streams: list[Any]) -> Tensor:
    f = _first(kwargs, streams)
    dims = _dims(f, kwargs)
    return reduced(f, dims, kwargs.get("keepdim", False), trailing_mean(f.mean(dims, keepdim=True), window))


def _sum(window: int, kwargs: dict[str, Any], streams: list[Any]) -> Tensor:
    f = _first(kwargs, streams)
    dims = _dims(f, kwargs)
    return reduced(f, dims, kwargs.get("keepdim", False), trailing_sum(f.sum(dims, keepdim=True), window))


def _extremum(name: str, fill: float) -> Callable[..., Tensor]:
    def form(window: int, kwargs: dict[str, Any], streams: list[Any]) -> Tensor:
        f = _first(kwargs, streams)
        dims = _dims(f, kwargs)
        each = getattr(f, name)(dims, keepdim=True)
        return reduced(f, dims, kwargs.get("keepdim", False), getattr(windows(each, window, fill), name)(-1))

    return form


def _spread(root: bool) -> Callable[..., Tensor]:
    def form(window: int, kwargs: dict[str, Any], streams: list[Any]) -> Tensor:
        f = _first(kwargs, streams)
        dims = _dims(f, kwargs)
        _, squares, size = trailing_moments(f, dims, window)
        correction = kwargs.get("correction")
        if correction is None:
            correction = int(kwargs.get("unbiased", True))
        var = squares / (present(f, window) * size - correction).clamp(min=0)
        return reduced(f, dims, kwargs.get("keepdim", False), var.sqrt() if root else var)

    return form


def _adaptive(window: int, kwargs: dict[str, Any], streams: list[Any]) -> Tensor:
    f = _first(kwargs, streams)
    size = kwargs["output_size"]
    dims = [d - len(size) + f.dim() for d in range(len(size))]
    return trailing_mean(f.mean(dims, keepdim=True), window)


def _product(window: int, kwargs: dict[str, Any], streams: list[Any]) -> Tensor:
    left = to_frames(kwargs["self"], *streams[0])
    right = to_frames(kwargs["other"] if "other" in kwargs else kwargs["mat2"], *streams[1])
    return trailing_sum(torch.matmul(left, right), window)


def _group_norm(window: int, kwargs: dict[str, Any], streams: list[Any], groups: int | None = None) -> Tensor:
    f = _first(kwargs, streams)
    channels = f.shape[2]
    parts = torch.unflatten(f, 2, (groups or kwargs["num_groups"], -1))
    over = list(range(3, parts.dim()))
    mean, squares, size = trailing_moments(parts, over, window)
    var = squares / (present(parts, window) * size)
    y = ((parts - mean) / torch.sqrt(var + kwargs["eps"])).flatten(2, 3)
    shape = [1, 1, channels, *[1] * (f.dim() - 3)]
    if kwargs.get("weight") is not None:
        y = y * kwargs["weight"].reshape(shape)
    if kwargs.get("bias") is not None:
        y = y + kwargs["bias"].reshape(shape)
    return from_frames(y, *streams[0])


def _instance_norm(window: int, kwargs: dict[str, Any], streams: list[Any]) -> Tensor:
    return _group_norm(window, kwargs, streams, groups=kwargs["input"].shape[1])


def _attention(window: int, kwargs: dict[str, Any], streams: list[Any]) -> Tensor:
    i = torch.arange(kwargs["query"].shape[-2], device=kwargs["query"].device)
    back = i[:, None] - i[None, :]
    near = (back >= 0) & (back < window)
    return torch.nn.functional.scaled_dot_product_attention(
        kwargs["query"], kwargs["key"], kwargs["value"], attn_mask=near, scale=kwargs.get("scale"),
        enable_gqa=kwargs.get("enable_gqa", False))  # fmt: skip


FORMS: dict[Any, Callable[..., Tensor]] = {
    aten.mean.dim: _mean,
    aten.mean.default: _mean,
    aten.sum.dim_IntList: _sum,
    aten.amax.default: _extremum("amax", -torch.inf),
    aten.amin.default: _extremum("amin", torch.inf),
    aten.var.dim: _spread(False),
    aten.var.correction: _spread(False),
    aten.std.dim: _spread(True),
    aten.std.correction: _spread(True),
    aten.adaptive_avg_pool1d.default: _adaptive,
    aten.adaptive_avg_pool2d.default: _adaptive,
    aten.adaptive_avg_pool3d.default: _adaptive,
    aten.matmul.default: _product,
    aten.bmm.default: _product,
    aten.group_norm.default: _group_norm,
    aten.instance_norm.default: _instance_norm,
    aten.scaled_dot_product_attention.default: _attention,
}
# of these each frame has its own result: they give a stream again
STREAMS = {aten.group_norm.default, aten.instance_norm.default, aten.scaled_dot_product_attention.default}
