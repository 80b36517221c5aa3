"""A step program as statements in C: every op of its graph has a form here, or none."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx

from ...canonicalize import bind, listed
from ...errors import CompileError
from ...registry import is_pointwise
from . import views
from .expressions import Call, Expression, Load, Number, Value, factors_of
from .operators import COMPARISONS, FLOATS, LOGICAL, TYPES, base_name, operator_text
from .products import Kernels, Product
from .statements import Arg, Copy, Reduce, Scan, Store
from .views import Buffer, Change, Dim, NoView, View, contiguous, one

aten = torch.ops.aten


class NativeError(CompileError):
    """The step program holds ops that have no form in C."""


class NoForm(Exception):
    """An op has no form in C. `op`: its name."""

    def __init__(self, op: str, why: str = "") -> None:
        super().__init__(f"{op} {why}".strip())
        self.op = ".".join(op.split(".")[:2])

    def of(self, node: fx.Node) -> bool:
        """Whether a node is such an op."""
        return ".".join(str(node.target).split(".")[:2]) == self.op


@dataclass
class Code:
    """A C function in the making.

    Attributes:
        lines: its body.
        scratch: buffers for what is in between.
    """

    kernels: Kernels
    lines: list[str] = field(default_factory=list)
    scratch: list[Buffer] = field(default_factory=list)
    loops: int = 0

    def room(self, dtype: torch.dtype, size: int) -> Buffer:
        """A buffer for what is in between."""
        self.scratch.append(Buffer(f"t{len(self.scratch)}", dtype, size))
        return self.scratch[-1]

    def add(self, statement: Store | Reduce | Copy | Arg | Scan) -> None:
        """The next statement."""
        self.lines += statement.lines()
        self.loops += 1


class Builder:
    """The values of a graph, and the statements that compute them."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self.env: dict[fx.Node, Any] = {}

    # -- values --------------------------------------------------------------------------------------------------------

    def of(self, x: Any, dtype: torch.dtype | None = None) -> Value:
        """An argument as a tensor: a node's, or a number's."""
        if isinstance(x, fx.Node):
            found: Value = self.env[x]
            return found
        return Value((), Number(x, dtype or _kind(x)))

    def lying(self, value: Value, name: str) -> View:
        """Where a tensor lies; it is put somewhere if it lies nowhere yet."""
        found = value.view
        return found if found is not None else self.put(value, name)

    def put(self, value: Value, name: str, order: Sequence[int] | None = None) -> View:
        """Compute a tensor into a buffer of its own, in the order in which it comes about (or a given one)."""
        lies = value.view
        if lies is not None and lies.buffer is not None and lies.buffer.tensor is not None:
            return contiguous(self.code.kernels.hold(lies), value.shape)
        room = self.code.room(value.dtype, max(1, prod(value.shape)))
        if order is not None:
            to = views.ordered(room, value.shape, order)
        else:
            leaves = [v for v in value.expression.leaves() if v.buffer is not None]
            try:
                to = _alike(room, value.shape, leaves)
            except NoView:
                to = contiguous(room, value.shape)
        self.store(value, to, name)
        return to

    def store(self, value: Value, to: View, name: str) -> None:
        """Compute a tensor into a place."""
        if prod(value.shape):
            self.code.add(Store(value, to, name))

    def changed(self, value: Value, change: Change, shape: Sequence[int], name: str) -> Value:
        """Another order, or choice, of a tensor's entries; a copy if there is no other way."""
        try:
            return Value(tuple(shape), value.expression.through(change))
        except NoView:
            to = self.put(value, name, range(len(value.shape)))
            return Value(tuple(shape), Load(change(to), value.dtype))

    def spread(self, value: Value, shape: Sequence[int]) -> Value:
        """A tensor as it broadcasts to a shape."""
        return value if value.shape == tuple(shape) else Value(tuple(shape), value.expression.through(views.expand(shape)))

    def fitting(self, values: Sequence[Value], shape: Sequence[int], name: str) -> list[Value]:
        """Tensors of one shape that loops can walk through together."""
        try:
            factors_of(shape, [v for x in values for v in x.expression.leaves()])
            return list(values)
        except NoView:
            order = range(len(shape))
            return [
                x if all(len(d) <= 1 for v in x.expression.leaves() for d in v.dims)
                else Value(x.shape, Load(self.put(x, name, order), x.dtype))
                for x in values
            ]  # fmt: skip

    def call(self, text: str, given: Sequence[Value], shape: Sequence[int], dtype: torch.dtype, within: torch.dtype, name: str) -> Value:
        """An operator on tensors that broadcast to a shape."""
        found = self.fitting([self.spread(x, shape) for x in given], shape, name)
        return Value(tuple(shape), Call(text, tuple(x.expression for x in found), dtype, within))

    def pointwise(self, op: str, given: Sequence[Any], node: fx.Node, within: torch.dtype | None = None) -> Value:
        """An op of the table on arguments of a node."""
        out = node.meta["val"]
        within = within or out.dtype
        text = operator_text(op, len(given), within)
        if text is None:
            raise NoForm(f"aten.{op}", f"in {within}")
        return self.call(text, [self.of(x, within) for x in given], out.shape, out.dtype, within, node.name)

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def visit(self, node: fx.Node) -> None:
        """Compute a node."""
        if node.target is operator.getitem:
            self.env[node] = self.env[node.args[0]][node.args[1]]  # type: ignore[index]
            return
        form = FORMS.get(node.target)
        out = node.meta.get("val")
        if isinstance(out, torch.Tensor) and out.dtype not in TYPES:
            raise NoForm(str(node.target), f"gives {out.dtype}")
        if form is not None:
            found = form(self, node, bind(node.target, node.args, node.kwargs))
        elif is_pointwise(node.target):
            found = self._pointwise(node)
        else:
            raise NoForm(str(node.target))
        if isinstance(found, Value):
            assert found.shape == tuple(out.shape), (node, found.shape, out.shape)
            found = self._settled(found, node)
        self.env[node] = found

    def _settled(self, value: Value, node: fx.Node) -> Value:
        """What more than one reader needs is computed once."""
        if value.simple or (_uses(node) <= 1 and _size(value.expression) <= 24):
            return value
        return Value(value.shape, Load(self.put(value, node.name), value.dtype))

    def _pointwise(self, node: fx.Node) -> Value:
        op, _ = base_name(node.target)
        given = [a for a in node.args if isinstance(a, (fx.Node, int, float, bool))]
        tensors = [a for a in given if isinstance(a, fx.Node)]
        if any(isinstance(a, fx.Node) and not isinstance(a.meta.get("val"), torch.Tensor) for a in given):
            raise NoForm(str(node.target))
        if node.kwargs or len(given) != len(node.args):
            raise NoForm(str(node.target), "with such arguments")
        out = node.meta["val"].dtype
        within = out
        if op in COMPARISONS or op in LOGICAL:
            kinds = [a.meta["val"] if isinstance(a, fx.Node) else a for a in given]
            within = torch.result_type(*kinds) if len(kinds) == 2 else tensors[0].meta["val"].dtype
        return self.pointwise(op, given, node, within)


def _uses(node: fx.Node) -> int:
    """How often it is read."""
    found: list[fx.Node] = []
    for user in node.users:
        fx.node.map_arg((user.args, user.kwargs), lambda n: found.append(n) if n is node else None)
    return len(found)


def _size(e: Expression) -> int:
    return 1 + sum(map(_size, e.given)) if isinstance(e, Call) else 1


def _kind(x: Any) -> torch.dtype:
    return torch.bool if isinstance(x, bool) else torch.int64 if isinstance(x, int) else torch.float32


def _alike(room: Buffer, shape: Sequence[int], leaves: Sequence[View]) -> View:
    """A tensor without gaps that lies as most of what it is made of."""
    if not leaves:
        return contiguous(room, shape)
    sizes = factors_of(shape, leaves)
    first = max(leaves, key=lambda v: prod(n for dim in v.dims for n, s in dim if s))
    strides = [views.split(dim, s) if dim else [0] * len(s) for dim, s in zip(first.dims, sizes, strict=True)]
    places = [(d, i) for d, s in enumerate(sizes) for i in range(len(s))]
    # what is repeated goes outside, in its order
    places.sort(key=lambda p: -abs(strides[p[0]][p[1]]) or -(1 << 62))
    made: dict[tuple[int, int], int] = {}
    stride = 1
    for d, i in reversed(places):
        made[d, i] = stride
        stride *= sizes[d][i]
    dims = [views.joined((n, made[d, i]) for i, n in enumerate(s)) for d, s in enumerate(sizes)]
    return View(room, 0, tuple(dims))


# -- forms of ops --------------------------------------------------------------------------------------------------------

Form = Callable[[Builder, fx.Node, dict[str, Any]], Any]
FORMS: dict[Any, Form] = {}


def form(*targets: Any) -> Callable[[Form], Form]:
    """The C form of ops."""

    def register(function: Form) -> Form:
        FORMS.update(dict.fromkeys(targets, function))
        return function

    return register


def _dim(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def _dims(dims: Any, rank: int) -> tuple[int, ...]:
    if dims is None or dims == []:
        return tuple(range(rank))
    return tuple(sorted({d % rank for d in ([dims] if isinstance(dims, int) else dims)})) if rank else ()


@form(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.squeeze.default, aten.squeeze.dim,
      aten.squeeze.dims, aten.unsqueeze.default, aten.alias.default, aten.clone.default, aten.detach.default,
      aten.lift_fresh_copy.default, aten.view_copy.default)  # fmt: skip
def _reshape(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x, shape = b.of(given["self"]), tuple(node.meta["val"].shape)
    return x if x.shape == shape else b.changed(x, views.reshape(shape), shape, node.name)


@form(aten.as_strided.default)
def _as_strided(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    source, out = given["self"].meta["val"], node.meta["val"]
    if not (source.is_contiguous() and out.is_contiguous() and source.numel() == out.numel()):
        raise NoForm(str(node.target))
    return _reshape(b, node, given)


@form(aten.permute.default)
def _permute(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.of(given["self"])
    order = [d % len(x.shape) for d in given["dims"]]
    return b.changed(x, views.permute(order), [x.shape[d] for d in order], node.name)


@form(aten.transpose.int)
def _transpose(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.of(given["self"])
    rank = len(x.shape)
    order = list(range(rank))
    i, j = given["dim0"] % rank, given["dim1"] % rank
    order[i], order[j] = j, i
    return b.changed(x, views.permute(order), [x.shape[d] for d in order], node.name)


@form(aten.t.default)
def _t(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.of(given["self"])
    order = list(range(len(x.shape)))[::-1]
    return b.changed(x, views.permute(order), x.shape[::-1], node.name)


@form(aten.expand.default)
def _expand(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    return b.spread(b.of(given["self"]), node.meta["val"].shape)


def _part(b: Builder, x: Value, dim: int, start: int, count: int, step: int, name: str) -> Value:
    shape = list(x.shape)
    shape[dim] = count
    return b.changed(x, views.slice_(dim, start, count, step), shape, name)


@form(aten.slice.Tensor)
def _slice(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.of(given["self"])
    dim = _dim(given["dim"], len(x.shape))
    start, stop, step = slice(given["start"], given["end"], given["step"]).indices(x.shape[dim])
    return _part(b, x, dim, start, len(range(start, stop, step)), step, node.name)


@form(aten.select.int)
def _select(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.of(given["self"])
    dim = _dim(given["dim"], len(x.shape))
    return b.changed(x, views.select(dim, given["index"] % x.shape[dim]), node.meta["val"].shape, node.name)


@form(aten.split_with_sizes.default)
def _split(b: Builder, node: fx.Node, given: dict[str, Any]) -> list[Value]:
    x, start, parts = b.of(given["self"]), 0, []
    dim = _dim(given["dim"], len(x.shape))
    x = x if x.simple else Value(x.shape, Load(b.put(x, node.name), x.dtype))
    for count in given["split_sizes"]:
        parts.append(_part(b, x, dim, start, count, 1, node.name))
        start += count
    return parts


@form(aten.flip.default)
def _flip(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.of(given["self"])
    for d in given["dims"]:
        x = b.changed(x, views.flip(_dim(d, len(x.shape))), x.shape, node.name)
    return x


@form(aten.unfold.default)
def _unfold(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.of(given["self"])
    dim = _dim(given["dimension"], len(x.shape))
    return b.changed(x, views.windows(dim, given["size"], given["step"]), node.meta["val"].shape, node.name)


@form(aten.repeat.default)
def _repeat(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x, times = b.of(given["self"]), given["repeats"]
    size = [1] * (len(times) - len(x.shape)) + list(x.shape)
    apart = [n for pair in zip([1] * len(size), size, strict=True) for n in pair]
    spread = [n for pair in zip(times, size, strict=True) for n in pair]
    x = b.changed(x, views.reshape(apart), apart, node.name)
    shape = tuple(node.meta["val"].shape)
    return b.changed(b.spread(x, spread), views.reshape(shape), shape, node.name)


@form(aten.cat.default)
def _cat(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    parts = [b.of(x) for x in given["tensors"]]
    parts = [x for x in parts if x.shape != (0,)]
    if len(parts) == 1:
        return b.call("{0}", parts, out.shape, out.dtype, out.dtype, node.name) if parts[0].dtype != out.dtype else parts[0]
    dim = _dim(given["dim"], len(out.shape))
    room = b.code.room(out.dtype, max(1, out.numel()))
    largest = max(parts, key=lambda x: prod(x.shape))
    to = views.ordered(room, tuple(out.shape), order_of(largest))
    at = 0
    for x in parts:
        place = views.slice_(dim, at, x.shape[dim])(to)
        b.store(x, place, node.name)
        at += x.shape[dim]
    return Value(tuple(out.shape), Load(to, out.dtype))


def order_of(value: Value) -> list[int]:
    """The order of dimensions in which most of a tensor lies, the outermost first."""
    leaves = [v for v in value.expression.leaves() if v.buffer is not None]
    rank = len(value.shape)
    if not leaves:
        return list(range(rank))
    first = max(leaves, key=lambda v: prod(n for dim in v.dims for n, s in dim if s))
    return sorted(range(rank), key=lambda d: -abs(first.dims[d][-1][1]) if first.dims[d] else -(1 << 62))


@form(aten.full.default, aten.full_like.default, aten.scalar_tensor.default)
def _full(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    return Value(tuple(out.shape), Number(given.get("fill_value", given.get("s")), out.dtype))


@form(aten.empty.memory_format, aten.zeros.default, aten.zeros_like.default, aten.empty_like.default)
def _zeros(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    return Value(tuple(out.shape), Number(0, out.dtype))


@form(aten.arange.start_step)
def _arange(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    start, step = given["start"], given["step"]
    if not (isinstance(start, int) and isinstance(step, int)):
        raise NoForm(str(node.target), "of broken numbers")
    index = Value(tuple(out.shape), Load(View(None, start, (one(out.shape[0], step),)), torch.int64))
    return b.call("{0}", [index], out.shape, out.dtype, out.dtype, node.name)


@form(aten._to_copy.default)
def _to_copy(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out, x = node.meta["val"], b.of(given["self"])
    if x.dtype == out.dtype:
        return x
    text = "{0} != 0" if out.dtype == torch.bool else "{0}"
    return b.call(text, [x], out.shape, out.dtype, x.dtype if out.dtype == torch.bool else out.dtype, node.name)


@form(aten.where.self)
def _where(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    cond, x, y = (b.of(given[n], out.dtype) for n in ("condition", "self", "other"))
    x, y = (v if v.dtype == out.dtype else b.call("{0}", [v], v.shape, out.dtype, out.dtype, node.name) for v in (x, y))
    found = b.fitting([b.spread(v, out.shape) for v in (cond, x, y)], out.shape, node.name)
    return Value(tuple(out.shape), Call("{0} ? {1} : {2}", tuple(v.expression for v in found), out.dtype, None))  # type: ignore[arg-type]


@form(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor)
def _add(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    op = base_name(node.target)[0]
    x, y = given["self"], given["other"]
    out = node.meta["val"]
    if given.get("alpha", 1) != 1:
        scaled = b.call("{0} * {1}", [b.of(y, out.dtype), b.of(given["alpha"], out.dtype)],
                        b.of(y).shape, out.dtype, out.dtype, node.name)  # fmt: skip
    else:
        scaled = b.of(y, out.dtype)
    first, second = b.of(x, out.dtype), scaled
    if op == "rsub":
        first, second = second, first
    sign = "+" if op == "add" else "-"
    return b.call(f"{{0}} {sign} {{1}}", [first, second], out.shape, out.dtype, out.dtype, node.name)


@form(aten.div.Tensor_mode)
def _div_mode(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out, mode = node.meta["val"], given["rounding_mode"]
    if out.dtype in FLOATS:
        rounding = {None: "", "floor": "floor", "trunc": "trunc"}[mode] + ("f" if mode and out.dtype == torch.float32 else "")
        text = f"{rounding}({{0}} / {{1}})"
    else:
        text = "{0} / {1}" if mode == "trunc" else "floor_div_i({0}, {1})"
    return b.call(text, [b.of(given["self"], out.dtype), b.of(given["other"], out.dtype)], out.shape, out.dtype, out.dtype, node.name)


@form(aten.pow.Tensor_Scalar)
def _pow(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    exponent = given["exponent"]
    out = node.meta["val"]
    if exponent == 2:
        x = b.of(given["self"])
        if not x.simple:
            x = Value(x.shape, Load(b.put(x, node.name), x.dtype))
        return b.call("{0} * {0}", [x], out.shape, out.dtype, out.dtype, node.name)
    if exponent == 0.5:
        return b.pointwise("sqrt", [given["self"]], node)
    return b.pointwise("pow", [given["self"], exponent], node)


@form(aten.clamp.default, aten.clamp.Tensor, aten.clamp_min.default, aten.clamp_max.default)
def _clamp(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    x = b.of(given["self"])
    for name, op in (("min", "maximum"), ("max", "minimum")):
        if given.get(name) is not None:
            text = operator_text(op, 2, out.dtype)
            assert text is not None
            if "{0} >" in text or "{0} <" in text:
                x = x if x.simple else Value(x.shape, Load(b.put(x, node.name), x.dtype))
            x = b.call(text, [x, b.of(given[name], out.dtype)], out.shape, out.dtype, out.dtype, node.name)
    return x


# -- sums of products ----------------------------------------------------------------------------------------------------


def _product(b: Builder, x: View, w: View, shape: tuple[list[int], list[int], list[int]], p: Product) -> View:
    """The sums, `b`, `m` and `n` as dimensions in this order, whose sizes are `shape`."""
    bs, ms, ns = shape
    sizes = [*bs, *ms, *ns]
    room = b.code.room(p.dtype, max(1, prod(sizes)))
    tensor = None if w.buffer is None else w.buffer.tensor
    inner = prod(ns) < 4 and prod(bs) > 1 and tensor is not None
    places = range(len(bs)), range(len(bs), len(bs) + len(ms)), range(len(bs) + len(ms), len(sizes))
    order = [*places[1], *places[2], *places[0]] if inner else [*places[0], *places[1], *places[2]]
    lanes = b.code.kernels.target.lanes(p.dtype)
    if tensor is not None and prod(bs) >= lanes and prod(ns) < lanes:
        order = [*places[1], *places[2], *places[0]]
    out = views.ordered(room, sizes, order)
    dims = ([out.dims[d] for d in places[0]], [out.dims[d] for d in places[1]], [out.dims[d] for d in places[2]])
    b.code.lines += b.code.kernels.call(p, out, dims)
    b.code.loops += 1
    return out


def _matrices(b: Builder, node: fx.Node, x: Value, w: Value) -> Value:
    """``(b, m, k) x (b, k, n)``."""
    dtype = node.meta["val"].dtype
    many, rows, deep = x.shape
    columns = w.shape[2]
    if not many * rows * deep * columns:
        return Value((many, rows, columns), Number(0, dtype))
    one_, two = b.lying(x, node.name), b.lying(w, node.name)

    def constant(v: View) -> bool:
        return v.buffer is not None and v.buffer.tensor is not None

    def beside(v: View, d: int) -> bool:
        return bool(v.dims[d]) and v.dims[d][-1][1] == 1

    turned = (constant(one_) and not constant(two)) or (not constant(two) and not beside(two, 2) and beside(one_, 1))
    for _ in range(2):
        try:
            if turned:
                p = Product(two, one_, [(two.dims[0], one_.dims[0])], [two.dims[2]], [one_.dims[1]],
                            [(two.dims[1], one_.dims[2])], dtype, node.name)  # fmt: skip
                out = _product(b, two, one_, ([many], [columns], [rows]), p)
                change = views.permute([0, 2, 1])
            else:
                p = Product(one_, two, [(one_.dims[0], two.dims[0])], [one_.dims[1]], [two.dims[2]],
                            [(one_.dims[2], two.dims[1])], dtype, node.name)  # fmt: skip
                out = _product(b, one_, two, ([many], [rows], [columns]), p)
                change = views.permute([0, 1, 2])
            return Value((many, rows, columns), Load(change(out), dtype))
        except NoView:
            if not constant(one_):
                one_ = b.put(Value(x.shape, Load(one_, dtype)), node.name, range(3))
            if not constant(two):
                two = b.put(Value(w.shape, Load(two, dtype)), node.name, range(3))
    raise NoForm(str(node.target))


def _raised(b: Builder, x: Value) -> Value:
    return Value((1, *x.shape), x.expression.through(views.insert(0)))


def _first(x: Value) -> Value:
    return Value(x.shape[1:], x.expression.through(views.select(0, 0)))


@form(aten.mm.default)
def _mm(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    return _first(_matrices(b, node, _raised(b, b.of(given["self"])), _raised(b, b.of(given["mat2"]))))


@form(aten.bmm.default)
def _bmm(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    return _matrices(b, node, b.of(given["self"]), b.of(given["mat2"]))


@form(aten.addmm.default)
def _addmm(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    found = _first(_matrices(b, node, _raised(b, b.of(given["mat1"])), _raised(b, b.of(given["mat2"]))))
    start = b.of(given["self"])
    for name, x in (("alpha", found), ("beta", start)):
        if given[name] != 1:
            scaled = b.call("{0} * {1}", [x, b.of(given[name], out.dtype)], x.shape, out.dtype, out.dtype, node.name)
            found, start = (scaled, start) if name == "alpha" else (found, scaled)
    return b.call("{0} + {1}", [found, start], out.shape, out.dtype, out.dtype, node.name)


@form(aten.convolution.default)
def _convolution(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    x, weight, groups = b.of(given["input"]), b.of(given["weight"]), given["groups"]
    n = len(out.shape) - 2
    stride, padding, dilation = (listed(given[name], n) for name in ("stride", "padding", "dilation"))
    if given["transposed"]:
        x, weight, stride, padding = _transposed(b, node, x, weight, stride, padding, dilation, given)
    if any(padding):
        x = _padded(b, x, [(p, p) for p in padding], 0, node.name)
    x = Value(x.shape, Load(b.lying(x, node.name), x.dtype))
    kernel, batch, channels = weight.shape[2:], x.shape[0], x.shape[1]
    shape = (batch, groups, channels // groups, *x.shape[2:])
    x = b.changed(x, views.reshape(shape), shape, node.name)
    for i in range(n):
        shape = (*shape[: 3 + i], out.shape[2 + i], *shape[4 + i :], kernel[i])
        size = dilation[i] * (kernel[i] - 1) + stride[i] * (out.shape[2 + i] - 1) + 1
        x = _part(b, x, 3 + i, 0, size, 1, node.name)
        x = b.changed(x, views.windows(3 + i, kernel[i], stride[i], dilation[i]), shape, node.name)
    taken = b.lying(x, node.name)
    split = (groups, out.shape[1] // groups, *weight.shape[1:])
    weight = Value(weight.shape, Load(b.lying(weight, node.name), weight.dtype))
    w = b.lying(b.changed(weight, views.reshape(split), split, node.name), node.name)
    spatial = list(range(3, 3 + n))
    p = Product(
        taken, w,
        [(taken.dims[1], w.dims[0])],
        [taken.dims[0], *(taken.dims[d] for d in spatial)],
        [w.dims[1]],
        [(taken.dims[2], w.dims[2]), *((taken.dims[3 + n + i], w.dims[3 + i]) for i in range(n))],
        out.dtype, node.name,
    )  # fmt: skip
    made = _product(b, taken, w, ([groups], [batch, *out.shape[2:]], [out.shape[1] // groups]), p)
    order = [1, 0, 2 + n, *range(2, 2 + n)]  # batch, groups, channels, positions
    found = Value(tuple(made.shape[d] for d in order), Load(views.permute(order)(made), out.dtype))
    found = b.changed(found, views.reshape(out.shape), out.shape, node.name)
    if given["bias"] is None:
        return found
    column = [out.shape[1], *[1] * n]
    bias = b.changed(b.of(given["bias"]), views.reshape(column), column, node.name)
    return b.call("{0} + {1}", [found, bias], out.shape, out.dtype, out.dtype, node.name)


def _transposed(
    b: Builder, node: fx.Node, x: Value, weight: Value, stride: list[int], padding: list[int], dilation: list[int],
    given: dict[str, Any],
) -> tuple[Value, Value, list[int], list[int]]:  # fmt: skip
    """A transposed convolution as one with gaps between the entries of its input and a turned kernel."""
    n, groups = len(stride), given["groups"]
    kernel, more = weight.shape[2:], listed(given["output_padding"], n)
    apart = list(x.shape)
    for i in range(n):
        apart[2 + i] = (x.shape[2 + i] - 1) * stride[i] + 1
    sides = [(dilation[i] * (kernel[i] - 1) - padding[i], dilation[i] * (kernel[i] - 1) - padding[i] + more[i]) for i in range(n)]
    whole = [*x.shape[:2], *(apart[2 + i] + max(sides[i][0], 0) + max(sides[i][1], 0) for i in range(n))]
    to = b.put(Value(tuple(whole), Number(0, x.dtype)), node.name)
    place = to
    for i in range(n):
        place = views.slice_(2 + i, max(sides[i][0], 0), x.shape[2 + i], stride[i])(place)
    b.store(x, place, node.name)
    found = Value(tuple(whole), Load(to, x.dtype))
    for i in range(n):
        first, last = (max(-s, 0) for s in sides[i])
        found = _part(b, found, 2 + i, first, whole[2 + i] - first - last, 1, node.name)
    size = (groups, weight.shape[0] // groups, *weight.shape[1:])
    weight = b.changed(weight, views.reshape(size), size, node.name)
    order = [0, 2, 1, *range(3, 3 + n)]
    weight = b.changed(weight, views.permute(order), [size[d] for d in order], node.name)
    for i in range(n):
        weight = b.changed(weight, views.flip(3 + i), weight.shape, node.name)
    joined = (size[0] * size[2], size[1], *kernel)
    return found, b.changed(weight, views.reshape(joined), joined, node.name), [1] * n, [0] * n


def _padded(b: Builder, x: Value, sides: Sequence[tuple[int, int]], fill: float | int, name: str) -> Value:
    """A tensor with entries before and behind those of its last dimensions."""
    rank, n = len(x.shape), len(sides)
    whole = list(x.shape)
    for i, (before, behind) in enumerate(sides):
        whole[rank - n + i] += before + behind
    room = b.code.room(x.dtype, max(1, prod(whole)))
    to = views.ordered(room, whole, order_of(x))
    b.store(Value(tuple(whole), Number(fill, x.dtype)), to, name)
    place = to
    for i, (before, behind) in enumerate(sides):
        d = rank - n + i
        if before < 0 or behind < 0:
            x = _part(b, x, d, max(0, -before), x.shape[d] + min(before, 0) + min(behind, 0), 1, name)
        place = views.slice_(d, max(before, 0), x.shape[d])(place)
    b.store(x, place, name)
    return Value(tuple(whole), Load(to, x.dtype))


@form(aten.constant_pad_nd.default)
def _pad(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    pad = given["pad"]
    sides = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)][::-1]
    return _padded(b, b.of(given["self"]), sides, given["value"], node.name)


# -- reductions ----------------------------------------------------------------------------------------------------------


def _reduced(b: Builder, x: Value, kind: str, dims: tuple[int, ...], keep: bool, name: str) -> Value:
    kept = tuple(1 if d in dims else n for d, n in enumerate(x.shape))
    order = [d for d in order_of(x) if d not in dims] + list(dims)
    room = b.code.room(x.dtype, max(1, prod(kept)))
    to = views.ordered(room, kept, order)
    if prod(x.shape) == prod(kept) and kind != "any":
        b.store(Value(kept, x.expression), to, name)
    else:
        b.code.add(Reduce(kind, x, dims, views.expand(x.shape)(to), name))
    shape = kept if keep else tuple(n for d, n in enumerate(kept) if d not in dims)
    return Value(shape, Load(views.reshape(shape)(to), x.dtype))


def _as(b: Builder, x: Value, dtype: torch.dtype, name: str) -> Value:
    if x.dtype == dtype:
        return x
    within = x.dtype if dtype == torch.bool else dtype
    return b.call("{0} != 0" if dtype == torch.bool else "{0}", [x], x.shape, dtype, within, name)


@form(aten.sum.dim_IntList, aten.sum.default, aten.prod.dim_int, aten.prod.default, aten.amax.default,
      aten.amin.default, aten.any.dim, aten.any.dims, aten.any.default, aten.all.dim, aten.all.dims, aten.all.default)  # fmt: skip
def _reduction(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = _as(b, b.of(given["self"]), node.meta["val"].dtype, node.name)
    dims = _dims(given.get("dim"), len(x.shape))
    return _reduced(b, x, base_name(node.target)[0], dims, given.get("keepdim", False), node.name)


def _mean(b: Builder, x: Value, dims: tuple[int, ...], keep: bool, name: str, less: float = 0) -> Value:
    total = _reduced(b, x, "sum", dims, keep, name)
    count = prod(x.shape[d] for d in dims) - less
    factor = Value((), Number(1 / count if count else float("nan"), x.dtype))
    return b.call("{0} * {1}", [total, factor], total.shape, x.dtype, x.dtype, name)


@form(aten.mean.dim, aten.mean.default)
def _mean_form(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = _as(b, b.of(given["self"]), node.meta["val"].dtype, node.name)
    return _mean(b, x, _dims(given.get("dim"), len(x.shape)), given.get("keepdim", False), node.name)


@form(aten.var_mean.correction, aten.var.correction)
def _var(b: Builder, node: fx.Node, given: dict[str, Any]) -> Any:
    x = b.of(given["self"])
    x = x if x.simple else Value(x.shape, Load(b.put(x, node.name), x.dtype))
    dims = _dims(given["dim"], len(x.shape))
    mean = _mean(b, x, dims, True, node.name)
    mean = Value(mean.shape, Load(b.put(mean, node.name), mean.dtype))
    apart = b.call("({0} - {1}) * ({0} - {1})", [x, mean], x.shape, x.dtype, x.dtype, node.name)
    correction = 1 if given["correction"] is None else given["correction"]
    var = _mean(b, apart, dims, given["keepdim"], node.name, correction)
    if node.target is aten.var.correction:
        return var
    var = Value(var.shape, Load(b.put(var, node.name), var.dtype))
    return [var, b.changed(mean, views.reshape(var.shape), var.shape, node.name)]


@form(aten.argmax.default, aten.argmin.default)
def _arg(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.of(given["self"])
    if given["dim"] is None:
        x = b.changed(x, views.reshape([prod(x.shape)]), [prod(x.shape)], node.name)
    dim = _dim(given["dim"] or 0, len(x.shape))
    return _arg_along(b, x, dim, given["keepdim"], node.target is aten.argmax.default, node.name)[1]


def _arg_along(b: Builder, x: Value, dim: int, keep: bool, greatest: bool, name: str) -> list[Value]:
    """The greatest (or least) entries along a dimension, and where they are."""
    kept = [1 if d == dim else n for d, n in enumerate(x.shape)]
    best, index = (contiguous(b.code.room(t, max(1, prod(kept))), kept) for t in (x.dtype, torch.int64))
    wide = views.expand(x.shape)
    b.code.add(Arg(x, dim, greatest, wide(index), wide(best), name))
    shape = tuple(kept) if keep else tuple(n for d, n in enumerate(kept) if d != dim)
    return [Value(shape, Load(views.reshape(shape)(v), t)) for v, t in ((best, x.dtype), (index, torch.int64))]


@form(aten.max.dim, aten.min.dim)
def _max_dim(b: Builder, node: fx.Node, given: dict[str, Any]) -> list[Value]:
    x = b.of(given["self"])
    return _arg_along(b, x, _dim(given["dim"], len(x.shape)), given["keepdim"], node.target is aten.max.dim, node.name)


@form(aten.cumsum.default, aten.cumprod.default)
def _running(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    x = _as(b, b.of(given["self"]), out.dtype, node.name)
    if not x.shape:
        return x
    to = contiguous(b.code.room(out.dtype, max(1, out.numel())), out.shape)
    text = "{0} + {1}" if node.target is aten.cumsum.default else "{0} * {1}"
    b.code.add(Scan(text, x, _dim(given["dim"], len(x.shape)), to, node.name))
    return Value(x.shape, Load(to, out.dtype))


# -- pools -----------------------------------------------------------------------------------------------------------------


def _windows(b: Builder, x: Value, n: int, given: dict[str, Any], outs: Sequence[int], fill: float | int, name: str) -> Value:
    """The windows of a pool: their places, then what is within, as further dimensions."""
    kernel = listed(given["kernel_size"], n)
    stride = listed(given["stride"], n) if given.get("stride") else kernel
    padding, dilation = listed(given["padding"], n), listed(given.get("dilation", 1), n)
    rank = len(x.shape)
    reach = [(outs[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 for i in range(n)]
    sides = [(padding[i], max(0, reach[i] - padding[i] - x.shape[rank - n + i])) for i in range(n)]
    if any(map(any, sides)):
        x = _padded(b, x, sides, fill, name)
    x = x if x.simple else Value(x.shape, Load(b.put(x, name), x.dtype))
    for i in range(n):
        d = rank - n + i
        x = _part(b, x, d, 0, reach[i], 1, name)
        shape = (*x.shape[:d], outs[i], *x.shape[d + 1 :], kernel[i])
        x = b.changed(x, views.windows(d, kernel[i], stride[i], dilation[i]), shape, name)
    return x


@form(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
def _max_pool(b: Builder, node: fx.Node, given: dict[str, Any]) -> list[Value]:
    if any(n.target is operator.getitem and n.args[1] == 1 for n in node.users):
        raise NoForm(str(node.target), "with indices")
    n = 2 if node.target is aten.max_pool2d_with_indices.default else 3
    x, outs = b.of(given["self"]), node.meta["val"][0].shape[-n:]
    fill = float("-inf") if x.dtype in FLOATS else torch.iinfo(x.dtype).min
    x = _windows(b, x, n, given, outs, fill, node.name)
    rank = len(x.shape) - n
    return [_reduced(b, x, "amax", tuple(range(rank, rank + n)), False, node.name)]


@form(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def _avg_pool(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    n = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2}.get(node.target, 3)
    out, source = node.meta["val"], b.of(given["self"])
    outs = out.shape[-n:]
    x = _windows(b, source, n, given, outs, 0, node.name)
    rank = len(x.shape) - n
    total = _reduced(b, x, "sum", tuple(range(rank, rank + n)), False, node.name)
    kernel = listed(given["kernel_size"], n)
    stride = listed(given["stride"], n) if given.get("stride") else kernel
    padding = listed(given["padding"], n)
    sizes = source.shape[-n:]
    if given.get("divisor_override"):
        counts = torch.full(outs, 1 / given["divisor_override"], dtype=torch.float64)
    else:
        counts = torch.ones(outs, dtype=torch.float64)
        for i in range(n):
            inside = []
            for j in range(outs[i]):
                first = j * stride[i] - padding[i]
                last = min(first + kernel[i], sizes[i] + padding[i])
                if not given.get("count_include_pad", True):
                    first, last = max(first, 0), min(last, sizes[i])
                inside.append(1 / (last - first))
            counts = counts * torch.tensor(inside, dtype=torch.float64).reshape([-1 if d == i else 1 for d in range(n)])
    if (counts == counts.flatten()[0]).all():
        factor = Value((), Number(float(counts.flatten()[0]), out.dtype))
    else:
        held = b.code.kernels.constant(counts.to(out.dtype))
        factor = Value(tuple(outs), Load(contiguous(held, outs), out.dtype))
    return b.call("{0} * {1}", [total, factor], out.shape, out.dtype, out.dtype, node.name)


@form(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default, aten.adaptive_max_pool2d.default,
      aten.adaptive_max_pool3d.default)  # fmt: skip
def _adaptive(b: Builder, node: fx.Node, given: dict[str, Any]) -> Any:
    greatest = "max" in str(node.target)
    x, n = b.of(given["self"]), len(given["output_size"])
    for i, out in enumerate(given["output_size"]):
        d = len(x.shape) - n + i
        size = x.shape[d]
        parts = []
        x = x if x.simple else Value(x.shape, Load(b.put(x, node.name), x.dtype))
        for j in range(out):
            first, last = j * size // out, -(-(j + 1) * size // out)
            part = _part(b, x, d, first, last - first, 1, node.name)
            parts.append(_reduced(b, part, "amax", (d,), True, node.name) if greatest else _mean(b, part, (d,), True, node.name))
        shape = (*x.shape[:d], out, *x.shape[d + 1 :])
        to = contiguous(b.code.room(x.dtype, max(1, prod(shape))), shape)
        for j, part in enumerate(parts):
            b.store(part, views.slice_(d, j, 1)(to), node.name)
        x = Value(shape, Load(to, x.dtype))
    return [x] if greatest else x


# -- entries by index --------------------------------------------------------------------------------------------------------


def _taken(b: Builder, x: Value, indices: Mapping[int, Value], name: str) -> Value:
    """``x[:, i, j]``: entries at places that are computed; `indices` of some dimensions, which broadcast together."""
    source = b.lying(x, name)
    if any(len(source.dims[d]) > 1 for d in indices):
        source = b.put(Value(x.shape, Load(source, x.dtype)), name, range(len(x.shape)))
    told = sorted(indices)
    beside = told[-1] - told[0] == len(told) - 1
    first = told[0] if beside else 0
    common = torch.broadcast_shapes(*(i.shape for i in indices.values()))
    rest = [d for d in range(len(x.shape)) if d not in indices]
    before, behind = rest[:first], rest[first:]
    shape = (*(x.shape[d] for d in before), *common, *(x.shape[d] for d in behind))
    terms = []
    for d, index in indices.items():
        size, stride = source.dims[d][0] if source.dims[d] else (1, 0)
        index = b.spread(index, common)
        for _ in behind:
            index = Value((*index.shape, 1), index.expression.through(views.insert(len(index.shape))))
        index = b.spread(index, shape)
        wrapped = Call(f"{{0}} < 0 ? {{0}} + {size} : {{0}}", (index.expression,), torch.int64, torch.int64)
        terms.append((wrapped, stride))
    dims = [*(source.dims[d] for d in before), *(one(n, 0) for n in common), *(source.dims[d] for d in behind)]
    return Value(shape, Load(View(source.buffer, source.offset, tuple(dims), tuple(terms)), x.dtype))


def _integers(b: Builder, index: Value, node: fx.Node) -> Value:
    """An index; it is computed before, where that takes work."""
    if index.dtype not in (torch.int64, torch.int32):
        raise NoForm(str(node.target), f"with indices of {index.dtype}")
    index = _as(b, index, torch.int64, node.name)
    return index if index.simple else Value(index.shape, Load(b.put(index, node.name), index.dtype))


@form(aten.index_select.default)
def _index_select(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x = b.of(given["self"])
    return _taken(b, x, {_dim(given["dim"], len(x.shape)): _integers(b, b.of(given["index"]), node)}, node.name)


@form(aten.embedding.default)
def _embedding(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    return _taken(b, b.of(given["weight"]), {0: _integers(b, b.of(given["indices"]), node)}, node.name)


@form(aten.index.Tensor, aten._unsafe_index.Tensor)
def _index(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    told = {i: _integers(b, b.of(n), node) for i, n in enumerate(given["indices"]) if n is not None}
    return _taken(b, b.of(given["self"]), told, node.name)


@form(aten.slice_scatter.default, aten.select_scatter.default)
def _scatter(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    x, out = b.of(given["self"]), node.meta["val"]
    dim = _dim(given["dim"], len(x.shape))
    to = b.put(x, node.name, range(len(x.shape)))
    if node.target is aten.select_scatter.default:
        place = views.select(dim, given["index"] % x.shape[dim])(to)
    else:
        start, stop, step = slice(given["start"], given["end"], given["step"]).indices(x.shape[dim])
        place = views.slice_(dim, start, len(range(start, stop, step)), step)(to)
    b.store(_as(b, b.of(given["src"]), out.dtype, node.name), place, node.name)
    return Value(x.shape, Load(to, out.dtype))


@form(aten.copy.default)
def _copy(b: Builder, node: fx.Node, given: dict[str, Any]) -> Value:
    out = node.meta["val"]
    return b.spread(_as(b, b.of(given["src"]), out.dtype, node.name), out.shape)
