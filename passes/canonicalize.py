"""Pass 2: a graph of tensors only, in functional form, without what does nothing.

Sizes leave the graph: instead of nodes that compute shapes, each node knows its arguments and its result's shape as
they are at each sample point (``meta["samples"]``, ``meta["sizes"]``). Rules then see what depends on the length.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from .capture import Capture, Point
from .errors import CaptureError
from .functionalize import functional, mutates
from .registry import entry, note

aten = torch.ops.aten


def canonicalize(capture: Capture) -> fx.Graph:
    """The canonical graph of a capture. Every node has ``meta`` "val", "samples" and "sizes"."""
    graph = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in capture.graph.nodes:
        value = node.meta.get("val")
        if node.op == "output":
            graph.output(map_arg(node.args[0], lambda n: env[n]))
            continue
        if node.op in ("placeholder", "get_attr"):
            new = graph.node_copy(node)
            env[node] = new
            _sample(new, {}, capture, {})
            continue
        if _is_number(value):
            env[node] = Number(value)
            continue
        if node.target in _ASSERTIONS:
            continue
        if (entry(node.target).hands_on and not _trains(node)) or _keeps(node):
            env[node] = env[node.args[0]]
            continue
        if (only := _only(node)) is not None:
            env[node] = env[only]
            continue
        if node.target is aten.slice_scatter.default and _alike(node.args[1], value):
            env[node] = env[node.args[1]]  # all of it is overwritten
            continue
        if _decomposed_norm(node):
            continue
        written = node.args[0] if mutates(node.target) else None
        target = functional(node.target)
        target = _OTHER_NAMES.get(target, target)
        taken = node
        if node.target is operator.getitem and _decomposed_norm(node.args[0]):
            taken, target = node.args[0], aten.batch_norm.default
        args = map_arg(taken.args, lambda n: env[n])
        kwargs = map_arg(taken.kwargs, lambda n: env[n])
        if taken is not node:
            *tensors, momentum, eps = args
            args = (*tensors, False, momentum, eps, True)
        if target is aten.convolution.default:
            target, args, kwargs = _as_layer(args, kwargs)
        if target in _PADDED_BY_WORD:
            target, args = _with_numbers(graph, node, args, kwargs, capture)
            kwargs = {}
        if target in JOINS and (padded := _as_pad(node)) is not None:
            source, pads, number = padded
            target, args, kwargs = aten.pad.default, (env[source], pads, "constant", number), {}
        if target in _CONVERSIONS and node.args[0].meta["val"].device == value.device:
            target, args, kwargs = aten.to.dtype, (args[0], value.dtype), {}
        elif target in _FILLS:
            target, args, kwargs = _as_full(target, args, kwargs, value)
        elif target is aten.copy.default and _alike(node.args[1], value):
            env[node] = args[1]  # all of it is overwritten
            continue
        elif target in _ASSIGNMENTS and _masks(node):
            target, args, kwargs = aten.where.self, (args[1][0], args[2], args[0]), {}
        elif target in _SHAPED_LIKE:
            target, args, kwargs = _SHAPED_LIKE[target], (args[0], [Number(s) for s in value.shape]), {}
        elif target in (aten.copy.default, aten.fill.Tensor):
            sizes = [Number(s) for s in value.shape]
            target, args, kwargs = aten.expand.default, (args[1], sizes), {}
        if target is aten.view_as_complex.default:  # the one op that wants the strides that it was traced with
            dense = {"memory_format": torch.contiguous_format}
            args = (_make(graph, node.args[0], aten.clone.default, args, dense, capture),)
        if target is aten.as_strided.default:
            args = (_in_memory_order(graph, node, args[0], capture), *args[1:])
            target, args = _as_windows(node, args, capture) or (target, args)
        new = _make(graph, node, target, args, kwargs, capture)
        env[node] = new
        if written is not None:
            for seen in [n for n, e in env.items() if e is env.get(written) and n is not node]:
                env[seen] = new
    for node in capture.graph.nodes:
        node.meta["canonical"] = env.get(node)
    graph.eliminate_dead_code()
    graph.lint()
    return graph


# to a type, which may be another tensor's, perhaps on a device
_CONVERSIONS = (aten.type_as.default, aten.to.other, aten.to.device, aten.to.dtype_layout)
JOINS = (aten.cat.default, aten.concat.default, aten.concatenate.default)

_ASSIGNMENTS = (aten.index_put.default, aten._unsafe_index_put.default)

_OTHER_NAMES = {
    # a program's tensors need not have the strides that were traced
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__and__.Scalar: aten.bitwise_and.Scalar,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__or__.Scalar: aten.bitwise_or.Scalar,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
    aten.__xor__.Scalar: aten.bitwise_xor.Scalar,
}

# convolutions whose padding may be a word
_PADDED_BY_WORD: dict[Any, Any] = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}

# of another tensor nothing but its shape is read
_SHAPED_LIKE = {
    aten.view_as.default: aten.reshape.default,
    aten.reshape_as.default: aten.reshape.default,
    aten.expand_as.default: aten.expand.default,
}

# tensors of one number, some shaped like another: where the number stands among the arguments
_FILLS: dict[Any, float | str] = {
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.empty_like.default: 0,
    aten.full_like.default: "fill_value",
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    aten.new_empty.default: 0,
    aten.new_full.default: "fill_value",
    aten.zeros.default: 0,
    aten.ones.default: 1,
    aten.empty.memory_format: 0,
    aten.fill.Scalar: "value",
    aten.zero.default: 0,
}


def _masks(node: fx.Node) -> bool:
    """Whether an assignment writes one number wherever a mask of the tensor's own shape says so."""
    given = bind(node.target, node.args, node.kwargs)
    x, written, (mask, *more) = given["self"].meta["val"], given["values"].meta["val"], given["indices"]
    alone = mask is not None and not more and not given["accumulate"] and written.numel() == 1
    return bool(alone and mask.meta["val"].dtype == torch.bool and mask.meta["val"].dim() == x.dim() >= written.dim())


note(*_PADDED_BY_WORD, *_CONVERSIONS, *_OTHER_NAMES, *_SHAPED_LIKE, *_FILLS, *JOINS, stays=True)


def _alike(node: Any, value: torch.Tensor) -> bool:
    """Whether a tensor has the shape and dtype of another."""
    given = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(given, torch.Tensor) and given.dtype == value.dtype and str(given.shape) == str(value.shape)


def _decomposed_norm(node: Any) -> bool:
    """Whether a node is what torch's decompositions make of a batch norm of which nothing else is used."""
    return (
        isinstance(node, fx.Node)
        and node.target is aten._native_batch_norm_legit_no_training.default
        and all(u.target is operator.getitem and u.args[1] == 0 for u in node.users)
    )


def _as_layer(args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """A general convolution as the op of a layer."""
    given = bind(aten.convolution.default, args, kwargs)
    rank = given["weight"].meta["val"].dim() - 2
    geometry = [given["input"], given["weight"], given["bias"], given["stride"], given["padding"]]
    if given["transposed"]:
        target = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)[rank - 1]
        return target, (*geometry, given["output_padding"], given["groups"], given["dilation"]), {}
    target = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)[rank - 1]
    return target, (*geometry, given["dilation"], given["groups"]), {}


def _with_numbers(graph: fx.Graph, node: fx.Node, args: Any, kwargs: Any, capture: Capture) -> tuple[Any, Any]:
    """A convolution whose padding is ``"same"`` or ``"valid"``; where that is uneven the input is padded before it."""
    given = bind(node.target, args, kwargs)
    kernel = given["weight"].meta["val"].shape[2:]
    n = len(kernel)
    total = [d * (k - 1) for d, k in zip(listed(given["dilation"], n, 1), kernel, strict=True)]
    total = total if given["padding"] == "same" else [0] * n
    uneven = [t if t % 2 else 0 for t in total]
    if any(uneven):
        x: Any = bind(node.target, node.args, node.kwargs)["input"]
        more = [0] * (x.meta["val"].dim() - n) + uneven
        value = x.meta["val"].new_empty([s + m for s, m in zip(x.meta["val"].shape, more, strict=True)])
        pads = [p for t in reversed(uneven) for p in (t // 2, t - t // 2)]
        given["input"] = _make(graph, node, aten.pad.default, (given["input"], pads), {}, capture, value)
    given["padding"] = [0 if u else t // 2 for u, t in zip(uneven, total, strict=True)]
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    return _PADDED_BY_WORD[node.target], tuple(given[name] for name in names)


def _in_memory_order(graph: fx.Graph, node: fx.Node, source: Any, capture: Capture) -> fx.Node:
    """What ``as_strided`` reads, in the order in which it was traced to lie in memory, and dense.

    Raises:
        CaptureError: it reads beyond what it is given.
    """
    given = node.args[0]
    assert isinstance(given, fx.Node)
    x = given.meta["val"]
    if not x.is_contiguous() or bind(aten.as_strided.default, node.args, {}).get("storage_offset"):
        raise CaptureError("as_strided reads a tensor that is no contiguous one from its beginning on")
    return _make(graph, given, aten.clone.default, (source,), {"memory_format": torch.contiguous_format}, capture)


def _as_windows(node: fx.Node, args: Any, capture: Capture) -> tuple[Any, Any] | None:
    """``as_strided`` that cuts a dimension into windows, its last dimension, as the op that says so."""
    given: Any = node.args[0]

    def at(numbers: Any) -> list[list[int]]:
        traced = [s.meta["val"] if isinstance(s, fx.Node) else s for s in numbers]
        return [[capture.sample(s, p) for p in capture.points] for s in traced]

    size, stride = at(node.args[1]), at(node.args[2])
    before, steps = at(given.meta["val"].shape), at(given.meta["val"].stride())
    if len(size) != len(before) + 1:
        return None
    cut = [d for d in range(len(before)) if (size[d], stride[d]) != (before[d], steps[d])]
    dim = cut[0] if cut else len(before) - 1
    hop = stride[dim][0] // max(steps[dim][0], 1)
    fits = (
        len(cut) <= 1
        and stride[-1] == steps[dim]
        and stride[dim] == [hop * s for s in steps[dim]]
        and len(set(size[-1])) == 1
        and hop > 0
        and size[dim] == [(n - size[-1][0]) // hop + 1 for n in before[dim]]
    )
    return (aten.unfold.default, (args[0], dim, size[-1][0], hop)) if fits else None


def _as_pad(node: fx.Node) -> tuple[fx.Node, list[Number], float] | None:
    """A tensor joined with as many zeros (or another number) as the clip's length asks for, as padding."""
    parts: Any = node.args[0]
    others = [n for n in parts if n.target not in _FILLS and n.target is not aten.full.default]
    if len(others) != 1 or parts.count(others[0]) != 1 or any(_dtype(n) != _dtype(node) for n in parts):
        return None
    at, rank = parts.index(others[0]), others[0].meta["val"].dim()
    dim = bind(node.target, node.args, node.kwargs).get("dim", 0) % rank
    sizes = [n.meta["val"].shape[dim] for n in parts]
    numbers = {_filled_with(n) for n in parts if n is not others[0]}
    if len(numbers) != 1 or not any(isinstance(s, torch.SymInt) for i, s in enumerate(sizes) if i != at):
        return None
    pads = [Number(0)] * (2 * (rank - 1 - dim)) + [Number(sum(sizes[:at])), Number(sum(sizes[at + 1 :]))]
    return others[0], pads, float(numbers.pop())


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def _filled_with(node: fx.Node) -> float:
    """The number of which a tensor is full."""
    number = _FILLS.get(node.target, "fill_value")
    return float(bind(node.target, node.args, node.kwargs)[number] if isinstance(number, str) else number)


def _as_full(target: Any, args: Any, kwargs: Any, value: torch.Tensor) -> tuple[Any, Any, Any]:
    """Any such op as ``aten.full``: it depends on sizes alone."""
    number = _FILLS[target]
    if isinstance(number, str):
        number = bind(target, args, kwargs)[number]
    sizes = [Number(s) for s in value.shape]
    return aten.full.default, (sizes, number), {"dtype": value.dtype, "device": value.device}


class Number:
    """A size or number that the traced graph computes: not a tensor, known at each sample point."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _make(
    graph: fx.Graph, node: fx.Node, target: Any, args: Any, kwargs: Any, capture: Capture, value: Any = None
) -> fx.Node:
    """A node in the place of a traced one; `value`: what it is, if that is not what the traced one is."""
    base = capture.points[0]
    concrete_args, concrete_kwargs = (_at(a, capture, base) for a in (args, kwargs))
    new = graph.create_node("call_function", target, concrete_args, concrete_kwargs, name=node.name)
    new.meta = {k: node.meta[k] for k in ("val", "stack_trace", "nn_module_stack") if k in node.meta}
    new.meta["traced"] = node
    if value is not None:
        new.meta["val"] = value
    _sample(new, args, capture, kwargs)
    return new


def _sample(node: fx.Node, args: Any, capture: Capture, kwargs: Any) -> None:
    node.meta["samples"] = [
        bind(node.target, _at(args, capture, p), _at(kwargs, capture, p)) if node.op == "call_function" else {}
        for p in capture.points
    ]
    value = node.meta.get("val")
    node.meta["sizes"] = [_shape(value, capture, p) for p in capture.points]
    if node.target is aten.linear.default:  # torch's own algebra of its last size is wrong for some strides
        x, weight = node.args[:2]
        node.meta["sizes"] = [(*s[:-1], *weight.meta["sizes"][0][:-1]) for s in x.meta["sizes"]]  # type: ignore[union-attr]


def _shape(value: Any, capture: Capture, point: Point) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(capture.sample(s, point) for s in value.shape)
    if isinstance(value, (list, tuple)):
        return tuple(_shape(v, capture, point) for v in value)
    return None


def _at(args: Any, capture: Capture, point: Point) -> Any:
    """The arguments with all numbers as they are at a point."""
    if isinstance(args, Number):
        return capture.sample(args.value, point)
    if isinstance(args, (list, tuple)):
        return type(args)(_at(a, capture, point) for a in args)
    if isinstance(args, dict):
        return {k: _at(a, capture, point) for k, a in args.items()}
    if isinstance(args, slice):
        return slice(*(_at(a, capture, point) for a in (args.start, args.stop, args.step)))
    return capture.sample(args, point)


def listed(value: int | Sequence[int] | None, n: int, default: int = 0) -> list[int]:
    """A parameter given once for all spatial dimensions, as a list with one entry for each."""
    if value is None or value == []:
        return [default] * n
    if isinstance(value, int):
        return [value] * n
    return list(value) if len(value) == n else list(value) * n


def bind(target: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Arguments by their schema names (for ``getitem`` and other functions: by position, as "0", "1", ...)."""
    if not isinstance(target, torch._ops.OpOverload):
        return {**{str(i): a for i, a in enumerate(args)}, **kwargs}
    names = [a.name for a in target._schema.arguments]
    defaults = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


def unbind(target: Any, bound: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inverse of `bind`: positional and keyword arguments, trailing defaults left away."""
    if not isinstance(target, torch._ops.OpOverload):
        return tuple(v for k, v in bound.items() if k.isdigit()), {k: v for k, v in bound.items() if not k.isdigit()}
    positional, keywords = [], {}
    for a in target._schema.arguments:
        if a.name not in bound:
            continue
        default = a.has_default_value() and _equal(bound[a.name], a.default_value)
        if a.kwarg_only:
            if not default:
                keywords[a.name] = bound[a.name]
        else:
            positional.append((bound[a.name], default))
    while positional and positional[-1][1]:
        positional.pop()
    return tuple(v for v, _ in positional), keywords


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b) if not isinstance(a, fx.Node) else False


_ASSERTIONS = {
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten._assert_async.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
    torch.sym_not,
}


def _trains(node: fx.Node) -> bool:
    """Whether a dropout was asked to drop even in eval mode."""
    return bool(bind(node.target, node.args, node.kwargs).get("train", False))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def _keeps(node: fx.Node) -> bool:
    """Whether a conversion, clone or expansion changes nothing."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    name = node.target._schema.name
    numbers: Any = node.args[1] if len(node.args) > 1 else ()
    if name == "aten::pad":
        return not any(numbers)
    if name == "aten::repeat":
        return len(numbers) == before.dim() and all(n == 1 for n in numbers)
    same = before.dtype == after.dtype and before.device == after.device
    if name in ("aten::to", "aten::_to_copy", "aten::type_as", "aten::clone"):
        return same
    if name == "aten::slice":
        bounds = bind(node.target, node.args, node.kwargs)
        start, stop, step = bounds["start"], bounds["end"], bounds["step"]
        whole = isinstance(stop, int) and stop >= torch.iinfo(torch.int64).max
        return bool(start in (0, None) and (stop is None or whole) and step == 1)
    return False


def _only(node: fx.Node) -> fx.Node | None:
    """The one tensor that is joined with no other."""
    joined: Any = node.args[0] if node.target in JOINS else ()
    return joined[0] if len(joined) == 1 else None
