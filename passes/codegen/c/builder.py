"""The values of a step program and the statements that compute them: views as far as there are, loops for the rest."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx

from ...canonicalize import bind
from ...errors import CompileError
from ...registry import is_pointwise
from . import views
from .expressions import Call, Expression, Load, Number, Value, factors_of
from .operators import COMPARISONS, DIVISIONS, FLOATS, LOGICAL, TYPES, base_name, operator_text
from .products import Kernels
from .statements import Arg, Check, Copy, Reduce, Scan, Store
from .views import Buffer, Change, NoView, View, contiguous


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

    def add(self, statement: Store | Reduce | Check | Copy | Arg | Scan) -> None:
        """The next statement."""
        self.lines += statement.lines()
        self.loops += 1


class Builder:
    """The values of a graph, and the statements that compute them."""

    def __init__(self, code: Code, forms: Mapping[Any, Form]) -> None:
        """
        Args:
            code: what statements are added to.
            forms: those of ops.
        """
        self.code, self.forms = code, forms
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
        return (
            value if value.shape == tuple(shape) else Value(tuple(shape), value.expression.through(views.expand(shape)))
        )

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

    def call(
        self,
        text: str,
        given: Sequence[Value],
        shape: Sequence[int],
        dtype: torch.dtype,
        within: torch.dtype,
        name: str,
    ) -> Value:
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
        if op in DIVISIONS and within not in FLOATS:
            self.divides(given[1], node)
        return self.call(text, [self.of(x, within) for x in given], out.shape, out.dtype, within, node.name)

    def part(self, x: Value, dim: int, start: int, count: int, step: int, name: str) -> Value:
        """Some entries of a dimension."""
        shape = list(x.shape)
        shape[dim] = count
        return self.changed(x, views.slice_(dim, start, count, step), shape, name)

    def cast(self, x: Value, dtype: torch.dtype, name: str) -> Value:
        """The same in another dtype."""
        if x.dtype == dtype:
            return x
        if dtype == torch.bool:
            return self.call("{0} != 0", [x], x.shape, dtype, x.dtype, name)
        return self.call("{0}", [x], x.shape, dtype, dtype, name)

    def simple(self, x: Value, name: str) -> Value:
        """The same, computed already."""
        return x if x.simple else Value(x.shape, Load(self.put(x, name), x.dtype))

    def divides(self, divisor: Any, node: fx.Node) -> None:
        """See that an integer divisor is no zero, of which a processor makes an end of the process.

        Raises:
            NoForm: it is computed.
        """
        if isinstance(divisor, fx.Node) or divisor == 0:
            raise NoForm(str(node.target), "of integers by what is computed")

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def visit(self, node: fx.Node) -> None:
        """Compute a node."""
        if node.target is operator.getitem:
            self.env[node] = self.env[node.args[0]][node.args[1]]  # type: ignore[index]
            return
        form = self.forms.get(node.target)
        out: Any = node.meta.get("val")
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


Form = Callable[[Builder, fx.Node, dict[str, Any]], Any]
FORMS: dict[Any, Form] = {}


def form(*targets: Any) -> Callable[[Form], Form]:
    """The C form of ops."""

    def register(function: Form) -> Form:
        FORMS.update(dict.fromkeys(targets, function))
        return function

    return register


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


def dim_of(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def dims_of(dims: Any, rank: int) -> tuple[int, ...]:
    if dims is None or dims == []:
        return tuple(range(rank))
    return tuple(sorted({d % rank for d in ([dims] if isinstance(dims, int) else dims)})) if rank else ()


def order_of(value: Value) -> list[int]:
    """The order of dimensions in which most of a tensor lies, the outermost first."""
    leaves = [v for v in value.expression.leaves() if v.buffer is not None]
    rank = len(value.shape)
    if not leaves:
        return list(range(rank))
    first = max(leaves, key=lambda v: prod(n for dim in v.dims for n, s in dim if s))
    return sorted(range(rank), key=lambda d: -abs(first.dims[d][-1][1]) if first.dims[d] else -(1 << 62))
