"""Attention inside a generated program: values with an entry for every two frames, on the frames that a call needs.

Scores, masks and weights are evaluated where they are summed up, for the new frames (rows) against the frames that
these may read (columns). What depends on nothing but the distance of the two becomes a constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import NonLocal
from ..layout import BATCH
from ..stream_graph import Op, StreamGraph, Value, View, Window, positional
from .builder import Builder
from .constants import Constants
from .key import Key

aten = torch.ops.aten
MASKED = -1e4  # a score this low or lower has no weight beside one that is not


@dataclass
class Scope:
    """What pairs are evaluated on.

    Attributes:
        rows, columns: the frames of the queries and of the keys.
        frames: the streams that they are made from, at rows (False) and columns (True).
        exists: which columns hold frames of the stream, as a node that broadcasts to rows x columns; None if all do.
        alike: values that depend on nothing but the distance of the two frames.
        limit: entries of the smallest table that they read, if any.
    """

    rows: range
    columns: range
    frames: dict[tuple[Value, bool], Any] = field(default_factory=dict)
    exists: Any = None
    alike: frozenset[Value] = frozenset()
    limit: int | None = None
    made: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def turned(self) -> Scope:
        """The same with rows and columns exchanged."""
        return Scope(self.columns, self.rows, self._swapped(), alike=self.alike, limit=self.limit)

    @cached_property
    def before(self) -> Scope:
        """The columns as rows, and as the only column the one before all of them."""
        return Scope(self.columns, range(self.columns.start - 1, self.columns.start), self._swapped())

    def _swapped(self) -> dict[tuple[Value, bool], Any]:
        return {(value, not at_keys): node for (value, at_keys), node in self.frames.items()}


def evaluate(b: Builder, value: Value, scope: Scope) -> Any:
    """A value with an entry for every row and column."""
    if value in scope.made:
        return scope.made[value]
    if value in scope.alike and not isinstance(b, Evaluator):
        node = _constant(b, value, scope)
    else:
        op = value.producer
        assert isinstance(op, Op)
        inner = op.turns(scope) if op.turns is not None else scope
        windows = [_operand(b, r.source, i in op.columns, inner) for i, r in enumerate(op.reads)]
        before, b.scope = b.scope, scope
        node = op.lower(b, op, windows, scope.rows, [])
        b.scope = before
    scope.made[value] = node
    return node


def _operand(b: Builder, value: Value, column: bool, scope: Scope) -> Window:
    if value.layout.paired:
        return Window(evaluate(b, value, scope), scope.rows.start, scope.rows.stop)
    span = scope.columns if column else scope.rows
    if (value, column) not in scope.frames:
        scope.frames[value, column] = b.unknown(value, span) if not positional(value) else frames(b, value, span)
    return Window(scope.frames[value, column], span.start, span.stop)


def frames(b: Builder, value: Value, span: range) -> Any:
    """Frames of a value that is made of nothing but positions, made anew."""
    producer = value.producer
    if isinstance(producer, View):
        return frames(b, producer.source, range(span.start + producer.offset, span.stop + producer.offset))
    assert producer is not None
    windows = []
    for r in producer.reads:
        start, stop = r.taps.lo(span.start), r.taps.hi(span.stop - 1) + 1
        windows.append(Window(frames(b, r.source, range(start, stop)), start - r.offset, stop - r.offset))
    result = producer.lower(b, producer, windows, span, [])
    if not producer.several:
        return result
    index = producer.outputs.index(value)
    return result[index] if isinstance(result, (tuple, list)) else b.getitem(result, index)


def _constant(b: Builder, value: Value, scope: Scope) -> Any:
    """A value that depends on nothing but the distance of the two frames."""
    base = scope.rows.start - scope.columns.start
    if scope.limit is not None:
        base = min(base, scope.limit - len(scope.rows))
    shift = base - scope.rows.start
    rows, columns = (range(r.start + shift, r.stop + shift) for r in (scope.rows, scope.columns))
    if not b.key.folded:  # a gradient goes through it
        with b.from_the_start():
            return evaluate(b, value, Scope(rows, columns))
    name = f"constant_{value.name}_{scope.rows.start - scope.columns.start}_{len(scope.rows)}_{len(scope.columns)}"
    if name not in b.root:
        found = evaluate(Evaluator(b.constants, b.schedule.graph, b.device), value, Scope(rows, columns))
        return b.attribute(name, found.contiguous())
    return b.attribute(name, b.root[name])


class Evaluator(Builder):
    """Runs lowerings at once, on what is known when compiling: positions and parameters. NaN stands for what is not.

    Tells which scores are masked whatever the streams hold.
    """

    def __init__(self, constants: Constants, graph: StreamGraph, device: torch.device) -> None:
        self.constants, self.device, self.streams = constants, device, graph
        self.key, self.root, self.inputs, self.scope, self._memo = Key(0, 1), {}, {}, None, {}

    @property
    def batch(self) -> Any:
        """The batch size that was traced first."""
        return self.streams.batch[0]

    def unknown(self, value: Value, span: range) -> torch.Tensor:
        """Frames of a stream."""
        return self._unknown(value.layout.sizes(self.batch, len(span)), value.dtype)

    def _unknown(self, sizes: Any, dtype: torch.dtype) -> torch.Tensor:
        if not dtype.is_floating_point:
            raise NonLocal("which frames attend to which depends on the data")
        return torch.full(tuple(sizes), torch.nan, dtype=dtype, device=self.device)

    def static(self, node: fx.Node) -> Any:
        """A value that does not depend on time."""
        if self.constants.known(node):
            return self.constants.value(node)
        return self._unknown(node.meta["sizes"][0], node.meta["val"].dtype)

    def numbers(self, node: fx.Node, name: str, value: Any) -> Any:
        """An argument as it was traced first."""
        return value

    def index_range(self, value: Value, span: range) -> Any:
        """True indices: this program begins with the stream."""
        return torch.arange(span.start, span.stop, device=self.device)

    def constant(self, numbers: Any, dtype: torch.dtype) -> Any:
        """A small tensor of known numbers."""
        return torch.tensor(numbers, dtype=dtype, device=self.device)

    def attribute(self, name: str, tensor: torch.Tensor) -> Any:
        """A tensor that a program would hold."""
        return tensor

    def full(self, sizes: list[Any], number: float, dtype: torch.dtype) -> Any:
        """The same number everywhere."""
        return torch.full(sizes, number, dtype=dtype, device=self.device)

    @torch.no_grad()
    def emit(self, target: Any, *args: Any, name: str | None = None, **kwargs: Any) -> Any:
        """Run a call now."""
        result = target(*args, **kwargs)
        unknown = [
            a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor) and bool(a.isnan().any())
        ]
        if not unknown or not isinstance(result, torch.Tensor) or target in _MOVES:
            return result
        if not result.dtype.is_floating_point:
            raise NonLocal("which frames attend to which depends on the data")
        if target in (aten.softmax.int, aten._softmax.default):
            low = args[0] <= MASKED
            nothing = low & ~low.all(args[1], keepdim=True)  # where all are, they are alike, or all NaN
            return torch.where(nothing, 0.0, torch.nan).to(result.dtype)
        if target is aten.baddbmm.default:
            return torch.where(args[0] <= MASKED, args[0], result)
        if target in _PRODUCTS:
            return torch.where(_nothing(target, args), 0.0, result)
        if torch.Tag.pointwise in target.tags:
            for a in unknown:
                result = torch.where(a.isnan(), torch.nan, result)
        return _absorbed(target, args, result)


# they hand on what they are given, known or not
_MOVES = {
    aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar, aten.masked_fill.Tensor,
    aten.reshape.default, aten.permute.default, aten.transpose.int, aten.expand.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.clone.default, aten._to_copy.default, aten.to.dtype, aten.slice.Tensor,
    aten.index_select.default, aten.new_full.default, aten.full_like.default, aten.tril.default, aten.triu.default,
}  # fmt: skip


_PRODUCTS = {aten.einsum.default, aten.matmul.default, aten.bmm.default}


def _nothing(target: Any, args: tuple[Any, ...]) -> torch.Tensor:
    """Which entries of a sum of products are zero, because in each product one factor is."""
    some: torch.Tensor = target(*pytree.tree_map_only(torch.Tensor, lambda a: (a != 0).float(), args))
    return some == 0


def _absorbed(target: Any, args: tuple[Any, ...], result: torch.Tensor) -> torch.Tensor:
    """What is known of a result whatever the unknown is: a masked score stays masked, nothing times it is nothing."""
    if target not in _ABSORBING:
        return result
    left, right = (torch.as_tensor(x, device=result.device) for x in args[:2])
    kind = _ABSORBING[target]
    if kind == "add":
        return torch.where((left <= MASKED) | (right <= MASKED), torch.fmin(left, right), result)
    if kind == "sub":
        return torch.where((left <= MASKED) | (right >= -MASKED), torch.fmin(left, -right), result)
    return torch.where((left == 0) | ((right == 0) & (kind == "mul")), 0.0, result)


_ABSORBING = {
    aten.add.Tensor: "add", aten.add.Scalar: "add", aten.sub.Tensor: "sub", aten.sub.Scalar: "sub",
    aten.mul.Tensor: "mul", aten.mul.Scalar: "mul", aten.div.Tensor: "div", aten.div.Scalar: "div",
}  # fmt: skip


@dataclass(frozen=True)
class Reach:
    """Which keys a query can read: those from `back` frames before its own to `ahead` frames after it.

    Attributes:
        back: None for all that came before.
        alike: the values among those that it was found from which depend on the distance alone.
        limit: entries of the smallest table that is read, if any.
        nothing: whether there are queries that read no key.
    """

    back: int | None
    ahead: int
    alike: frozenset[Value] = frozenset()
    limit: int | None = None
    nothing: bool = False


FAR, ROWS, AHEAD = 4096, 64, 128
PERIOD = 1024  # frames over which masks are followed that may have a period


def find_reach(evaluator: Evaluator, weights: Value, scores: bool = False) -> Reach:
    """Which keys have weight for a query whatever the streams hold, found by evaluating the masks.

    `scores`: they are added to scores before a softmax (or say where there is any).

    Raises:
        NonLocal: a query reads keys at the end of the clip, or no query reads any.
    """
    parts = parts_of(weights)
    limit = min((op.limit for v in parts for op in tables_of(v) if op.limit is not None), default=None)
    still = [v for v in parts if not streams_of(v)]
    periodic = any(op.limit is not None or _packet(op) not in _WITHOUT_PERIOD for v in still for op in tables_of(v))
    blocks = [(range(0, 2 * ROWS), 2 * ROWS + AHEAD), (range(FAR, FAR + ROWS), FAR + ROWS + AHEAD)]
    start = FAR + ROWS
    if limit is not None and limit < FAR + ROWS + AHEAD:
        blocks = [(range(0, limit), limit)] if limit <= PERIOD else [
            (range(0, 2 * ROWS), 2 * ROWS + AHEAD), (range(limit - 2 * ROWS, limit), limit)]  # fmt: skip
        start = max(0, limit - 2 * ROWS - PERIOD)
    if periodic and (limit is None or limit > PERIOD):
        blocks += [(range(at - 1, at + ROWS), at + ROWS + AHEAD) for at in range(start, start + PERIOD, ROWS)]
    alike = {v for v in still if _by_distance(evaluator, v, limit)}
    back = ahead = 0
    unbounded = nothing = False
    for rows, stop in blocks:
        scope = Scope(rows, range(stop if limit is None else min(stop, limit)))
        stop = scope.columns.stop
        each = _weighed(evaluator, weights, scope, scores).cpu()
        nothing = nothing or not bool(each.any(2).all())
        found = each.any(0)
        reads = found.any(1)
        if not bool(reads.any()):
            raise NonLocal("queries read no key at all")
        found, at = found[reads], torch.arange(rows.start, rows.stop)[reads]
        first = found.int().argmax(1)
        last = stop - 1 - found.flip(1).int().argmax(1)
        ahead = max(ahead, int((last - at).max()))
        back = max(back, int((at - first).max()))
        if rows.start or stop == limit:  # of the first rows all that came before is near
            unbounded = unbounded or int((at - first).max()) > rows.stop - ROWS
        if ahead >= AHEAD // 2 or (stop == limit and rows.start == 0 and bool((last == stop - 1).all()) and stop > 1):
            raise NonLocal("attention over the whole clip")
        if periodic:
            alike = {v for v in alike if _along_diagonals(evaluate(evaluator, v, scope), v)}
    if len(alike) < len(still) and periodic and back >= PERIOD:
        unbounded = True  # its period may be longer than what was looked at
    return Reach(None if unbounded else back, ahead, frozenset(alike), limit, nothing)


def alike(evaluator: Evaluator, value: Value, limit: int | None) -> frozenset[Value]:
    """The values among those that a value is made from which depend on nothing but the distance of the two frames."""
    still = (v for v in parts_of(value) if not streams_of(v))
    return frozenset(v for v in still if _by_distance(evaluator, v, limit))


def summed_since(evaluator: Evaluator, value: Value) -> bool:
    """Whether there is the same for a row and every column before it, and nothing for other columns."""
    streams = streams_of(value)
    if not streams or any(at_keys for _, at_keys in streams):
        return False
    for at in (0, FAR):
        rows = range(at, at + ROWS)
        scope = Scope(rows, range(at - 1, at + ROWS))
        for stream, _ in streams:
            sizes = stream.layout.sizes(evaluator.batch, ROWS)
            numbers = torch.arange(1.0, 1 + math.prod(sizes), dtype=torch.float64, device=evaluator.device)
            scope.frames[stream, False] = (1 + numbers.sin()).reshape(tuple(sizes)).to(stream.dtype)
        found = evaluate(evaluator, value, scope).movedim((value.layout.time, value.layout.key), (-2, -1))
        since = torch.arange(ROWS + 1) <= torch.arange(ROWS)[:, None]  # the first column lies before all rows
        if not torch.equal(found, torch.where(since.to(found.device), found[..., :1], 0)):
            return False
    return True


# ops by which what is made of positions has no period: whatever is seen of a few frames is so for all
_WITHOUT_PERIOD = {
    "arange", "full", "add", "sub", "rsub", "neg", "abs", "mul", "le", "lt", "ge", "gt", "eq", "ne", "bitwise_and",
    "bitwise_or", "bitwise_not", "logical_and", "logical_or", "logical_not", "where", "masked_fill", "tril", "triu",
    "reshape", "unsqueeze", "squeeze", "expand", "permute", "transpose", "view", "slice", "to", "_to_copy", "clone",
    "clamp", "clamp_min", "clamp_max", "minimum", "maximum",
}  # fmt: skip


def _packet(op: Op) -> str:
    target = op.node.target if op.node is not None else None
    return str(getattr(target, "overloadpacket", target)).rpartition(".")[2]


def _along_diagonals(found: torch.Tensor, value: Value) -> bool:
    """Whether entries of frames at the same distance are the same."""
    entries = found.movedim((value.layout.time, value.layout.key), (-2, -1))
    return bool(torch.equal(entries[..., 1:, 1:], entries[..., :-1, :-1]))


def _weighed(evaluator: Evaluator, weights: Value, scope: Scope, scores: bool) -> torch.Tensor:
    """Which entries can have weight: bool, others (heads) x rows x columns.

    Raises:
        NonLocal: `scores` of a query are low and alike, so that each has weight.
    """
    layout = weights.layout
    last: torch.Tensor = evaluate(evaluator, weights, scope).movedim((layout.time, layout.key), (-2, -1))
    if last.dtype != torch.bool:
        lowest = last.amax(-1)
        if scores and bool(((lowest <= MASKED) & (lowest != -torch.inf)).any()):
            raise NonLocal("a query reads all keys alike, since all are masked by a finite number")
        last = ~(last <= MASKED) if scores else last != 0
    rows, columns = len(scope.rows), len(scope.columns)
    return last.expand(*last.shape[:-2], rows, columns).reshape(-1, rows, columns)


def parts_of(value: Value) -> set[Value]:
    """The values for pairs of frames that a value is made from, itself included."""
    seen: set[Value] = set()
    queue = [value]
    while queue:
        v = queue.pop()
        if v not in seen and v.layout.paired:
            seen.add(v)
            assert isinstance(v.producer, Op)
            queue.extend(r.source for r in v.producer.reads)
    return seen


def streams_of(value: Value) -> list[tuple[Value, bool]]:
    """The streams from which a value for pairs of frames is made, and whether they are read at the keys."""
    found: set[tuple[Value, bool]] = set()
    seen: set[tuple[Value, bool]] = set()
    queue = [(value, False)]
    while queue:
        v, turned = queue.pop()
        if (v, turned) in seen or not v.layout.paired:
            continue
        seen.add((v, turned))
        op = v.producer
        assert isinstance(op, Op)
        for i, r in enumerate(op.reads):
            if r.source.layout.paired:
                queue.append((r.source, turned != (op.turns is not None)))
            elif not positional(r.source):
                found.add((r.source, (i in op.columns) != turned))
    return sorted(found, key=lambda each: (each[0].name, each[1]))


def tables_of(value: Value) -> list[Op]:
    """The ops of nothing but positions that a value is made from."""
    found, queue = [], [value]
    while queue:
        producer = queue.pop().producer
        if isinstance(producer, View):
            queue.append(producer.source)
        elif producer is not None:
            found.append(producer)
            queue.extend(r.source for r in producer.reads)
    return found


def _by_distance(evaluator: Evaluator, value: Value, limit: int | None) -> bool:
    """Whether a value depends on nothing but the distance of the two frames."""
    if any(BATCH in d for d in value.layout) or not all(evaluator.constants.known(n) for n in _statics(value)):
        return False
    size, far = (32, FAR) if limit is None else (max(1, limit // 2), limit - max(1, limit // 2))
    here, there = (evaluate(evaluator, value, Scope(range(at, at + size), range(at, at + size))) for at in (0, far))
    return bool(torch.equal(here, there))


def _statics(value: Value) -> list[fx.Node]:
    return [
        n for op in tables_of(value) if op.node is not None for n in op.node.all_input_nodes if n not in op.stream_nodes
    ]
