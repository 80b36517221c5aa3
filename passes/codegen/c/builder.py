"""The values of a step program and the statements that compute them: views as far as there are, loops for the rest."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx

from ...canonicalize import bind, listed
from ...errors import CompileError
from ...registry import is_pointwise
from . import views
from .expressions import Call, Dot, Expression, Load, Number, Value, dots_of, factors_of, replaced
from .kernels import Kernels
from .operators import COMPARISONS, DIVISIONS, FLOATS, LOGICAL, TYPES, base_name, operator_text
from .products import natural
from .statements import Arg, Check, Copy, Lines, Reduce, Scan, Store
from .views import Buffer, Change, Margin, NoView, View, contiguous


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
        kernels: what it calls.
        statements: its body.
        scratch: buffers for what is in between.
        loops: loop nests so far.
    """

    kernels: Kernels
    statements: list[Lines] = field(default_factory=list)
    scratch: list[Buffer] = field(default_factory=list)
    loops: int = 0

    def room(
        self, dtype: torch.dtype, shape: Sequence[int], order: Sequence[int], margin: Margin | None = None,
        zeros: bool = False,
    ) -> View:  # fmt: skip
        """A buffer for what is in between.

        Args:
            dtype: of its entries.
            shape: of the tensor.
            order: of its dimensions.
            margin: around it, of zeros.
            zeros: what is not written is zero.
        """
        self.scratch.append(views.buffer(f"t{len(self.scratch)}", dtype, shape, order, margin, zeros))
        return views.ordered(self.scratch[-1], shape, order, margin)

    def add(self, statement: Store | Reduce | Check | Copy | Arg | Scan) -> None:
        """The next statement."""
        self.statements.append(Lines(statement.lines()))
        self.loops += 1


class Builder:
    """The values of a graph, and the statements that compute them."""

    def __init__(self, code: Code, forms: Mapping[Any, Form], graph: fx.Graph, homes: Mapping[fx.Node, View]) -> None:
        """
        Args:
            code: what statements are added to.
            forms: those of ops.
            graph: what is built.
            homes: places where nodes belong.
        """
        self.code, self.forms, self.homes = code, forms, homes
        self.margins = margins(graph)
        self.place = {n: i for i, n in enumerate(graph.nodes)}
        self.env: dict[fx.Node, Any] = {}
        self.came: dict[fx.Node, list[int]] = {}  # the order in which came about what is at home somewhere

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

    def put(self, value: Value, name: str, order: Sequence[int] | None = None, margin: Margin | None = None) -> View:
        """Compute a tensor into a buffer of its own.

        Args:
            value: the tensor.
            name: for the reader.
            order: of its dimensions, or None for the one in which it comes about.
            margin: around it, of zeros.
        """
        lies = value.view
        if lies is not None and lies.constant and margin is None:
            return contiguous(self.code.kernels.hold(lies), value.shape)
        if order is not None or margin is not None:
            to = self.code.room(value.dtype, value.shape, order or self.order(value), margin)
        else:
            to = self.code.room(value.dtype, value.shape, range(len(value.shape)))
            with contextlib.suppress(NoView):
                to = _alike(to, value.shape, self.lie(value))
        self.store(value, to, name)
        return to

    def lie(self, value: Value) -> list[View]:
        """The views that a tensor is made of; for a sum of products how it comes about."""

        def leaves(e: Expression) -> Iterator[View]:
            if isinstance(e, Dot):
                yield natural(e, value.shape, self.code.kernels.target)
            elif isinstance(e, Call):
                for x in e.given:
                    yield from leaves(x)
            else:
                yield from e.leaves()

        return [v for v in leaves(value.expression) if v.buffer is not None]

    def order(self, value: Value) -> list[int]:
        """The order of dimensions in which most of a tensor lies, the outermost first."""
        leaves, rank = self.lie(value), len(value.shape)
        if not leaves:
            return list(range(rank))
        first = max(leaves, key=_extent)
        return sorted(range(rank), key=lambda d: -abs(first.dims[d][-1][1]) if first.dims[d] else -(1 << 62))

    def store(self, value: Value, to: View, name: str) -> None:
        """Compute a tensor into a place."""
        if not prod(value.shape):
            return
        dots = sorted(dots_of(value.expression), key=lambda dot: -len(dot.pairs))
        for dot in dots[1:]:
            value = self._put_dot(value, dot)
        if dots:
            dot = dots[0]
            try:
                self._product(value, dot, to, name)
                return
            except NoView:
                value = self._put_dot(value, dot)
        self.code.add(Store(value, to, name))

    def _put_dot(self, value: Value, dot: Dot) -> Value:
        """The same expression with a sum of products computed already."""
        alone = Value(value.shape, dot)
        to = self.code.room(dot.dtype, value.shape, range(len(value.shape)))
        to = _alike(to, value.shape, [natural(dot, value.shape, self.code.kernels.target)])
        self._product(alone, dot, to, dot.name)
        return Value(value.shape, replaced(value.expression, dot, Load(to, dot.dtype)))

    def _product(self, value: Value, dot: Dot, to: View, name: str) -> None:
        self.code.statements.append(self.code.kernels.compute(value, dot, to, name))
        self.code.loops += 1

    def changed(self, value: Value, change: Change, shape: Sequence[int], name: str) -> Value:
        """Another order, or choice, of a tensor's entries; a copy if there is no other way."""
        if prod(shape) > prod(value.shape):
            value = self.simple(value, name)
        try:
            return Value(tuple(shape), value.expression.through(change))
        except NoView:
            to = self.put(value, name, range(len(value.shape)))
            return Value(tuple(shape), Load(change(to), value.dtype))

    def spread(self, value: Value, shape: Sequence[int]) -> Value:
        """A tensor as it broadcasts to a shape."""
        if value.shape == tuple(shape):
            return value
        if prod(shape) > prod(value.shape):
            value = self.simple(value, "spread")
        return Value(tuple(shape), value.expression.through(views.expand(shape)))

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

    def sum(self, x: Value, y: Value, shape: Sequence[int], dtype: torch.dtype, name: str) -> Value:
        """``x + y``, in which sums of products of one kind are one."""
        parts = [*_addends(x.expression), *_addends(y.expression)]
        dots = [e for e in parts if isinstance(e, Dot)]
        alike = [e for e in dots[1:] if dots[0].joins(e)]
        if not alike or dtype not in FLOATS or x.shape != y.shape or any(e.dtype != dtype for e in parts):
            return self.call("{0} + {1}", [x, y], shape, dtype, dtype, name)
        pairs = tuple(pair for e in (dots[0], *alike) for pair in e.pairs)
        total: Expression = Dot(pairs, dots[0].k, dtype, f"{dots[0].name} to {alike[-1].name}")
        for e in parts:
            if e is not dots[0] and not any(e is z for z in alike):
                total = Call("{0} + {1}", (total, e), dtype, dtype)
        return Value(tuple(shape), total)

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
            try:
                found = form(self, node, bind(node.target, node.args, node.kwargs))
            except NoView:
                raise NoForm(str(node.target), "on operands that lie in different ways") from None
        elif is_pointwise(node.target):
            found = self._pointwise(node)
        else:
            raise NoForm(str(node.target))
        if isinstance(found, Value):
            assert found.shape == tuple(out.shape), (node, found.shape, out.shape)
            found = self.settled(found, node)
        self.env[node] = found

    def settled(self, value: Value, node: fx.Node) -> Value:
        """What belongs somewhere, or more than one reader needs, is computed; the rest once somebody asks for it."""
        if (home := self.homes.get(node)) is not None:
            self.came[node] = self.order(value)
            self.store(value, home, node.name)
            return Value(value.shape, Load(home, value.dtype))
        if value.simple:
            return value
        joins = self._meets(node) or _uses(node) <= 1
        if joins and _size(value.expression) <= 24 and (not dots_of(value.expression) or self._walked(node)):
            return value
        to = self.put(value, node.name, margin=self.margins.get(node))
        return Value(value.shape, Load(to, value.dtype))

    def _meets(self, node: fx.Node) -> bool:
        """Whether all that reads a node is computed entry by entry, and comes together again soon."""
        shape, front = node.meta["val"].shape, set(node.users)
        for _ in range(4):
            if not all(_entrywise(n) and n.meta["val"].shape == shape and n not in self.homes for n in front):
                return False
            if len(front) <= 1:
                return True
            first = min(front, key=self.place.__getitem__)
            front = front - {first} | set(first.users)
        return False

    def _walked(self, node: fx.Node) -> bool:
        """Whether what reads a node asks for each entry once, where a sum of products may wait."""
        return all(_entrywise(n) or n.target in _MOVES or n.op == "output" for n in node.users)

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


aten = torch.ops.aten
_ENTRYWISE = (
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor,
    aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.where.self, aten._to_copy.default,
)  # fmt: skip
_MOVES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.squeeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.unsqueeze.default, aten.alias.default, aten.clone.default, aten.permute.default,
    aten.transpose.int, aten.t.default, aten.slice.Tensor, aten.select.int, aten.cat.default,
)  # fmt: skip
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


def _extent(view: View) -> int:
    """Entries that are not repeated."""
    return prod(n for dim in view.dims for n, s in dim if s)


def _addends(e: Expression) -> list[Expression]:
    """What is summed up."""
    if isinstance(e, Call) and e.text == "{0} + {1}" and e.dtype == e.within:
        return [y for x in e.given for y in _addends(x)]
    return [e]


def _entrywise(node: fx.Node) -> bool:
    return node.op == "call_function" and (is_pointwise(node.target) or node.target in _ENTRYWISE)


def _alike(room: View, shape: Sequence[int], leaves: Sequence[View]) -> View:
    """A tensor without gaps that lies as most of what it is made of, in the buffer of a view.

    Raises:
        NoView: they have no factors in common.
    """
    if not leaves:
        return room
    sizes = factors_of(shape, leaves)
    first = max(leaves, key=_extent)
    strides = views.strides_in(first, sizes)
    places = [(d, i) for d, s in enumerate(sizes) for i in range(len(s))]
    # what is repeated goes outside, in its order
    places.sort(key=lambda p: -abs(strides[p[0]][p[1]]) or -(1 << 62))
    return View(room.buffer, 0, views.laid(sizes, places))


def margins(graph: fx.Graph) -> dict[fx.Node, Margin]:
    """What is padded with zeros, and by how much: it is kept with room around it."""
    found: dict[fx.Node, Margin] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not isinstance(source := node.args[0] if node.args else None, fx.Node):
            continue
        sides: list[tuple[int, int]] = []
        if node.target is aten.convolution.default and not node.args[6]:
            n = node.meta["val"].dim() - 2
            sides = [(p, p) for p in listed(node.args[4], n)]
        elif node.target is aten.constant_pad_nd.default and (len(node.args) < 3 or node.args[2] == 0):
            pad: Any = node.args[1]
            sides = [(pad[i], pad[i + 1]) for i in range(0, len(pad), 2)][::-1]
        if not any(map(any, sides)) or min(map(min, sides)) < 0:
            continue
        rank = source.meta["val"].dim()
        whole = [(0, 0)] * (rank - len(sides)) + sides
        before = found.get(source, ((0, 0),) * rank)
        found[source] = tuple((max(a, x), max(b, y)) for (a, b), (x, y) in zip(before, whole, strict=True))
    return found


def dim_of(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def dims_of(dims: Any, rank: int) -> tuple[int, ...]:
    if dims is None or dims == []:
        return tuple(range(rank))
    return tuple(sorted({d % rank for d in ([dims] if isinstance(dims, int) else dims)})) if rank else ()
