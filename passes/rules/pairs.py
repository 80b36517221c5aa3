"""Values with an entry for every two frames: attention written by hand, and the masks and biases of any attention.

A `Pair` comes from a product of queries and keys, or from positions compared with positions. It ends where it is summed
over one of its two frames: if its weights reach no further than so many frames ahead, what comes out is a stream.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ..codegen.pairs import (
    Evaluator,
    Reach,
    Scope,
    alike,
    evaluate,
    find_reach,
    frames,
    parts_of,
    streams_of,
    summed_since,
)  # fmt: skip
from ..errors import NonLocal
from ..layout import KEY, TIME, Dim, Layout, from_sizes
from ..registry import Call, Fact, InClip, Pair, Sample, find_rule, lower_call, overloads, pair_rule, rule
from ..schedule import Taps
from ..split_einsums import MATMUL, spelled_out
from ..stream_graph import SAME, Op, Read, Value, Window, positional, read
from .slicing import bound

aten = torch.ops.aten


def make(
    call: Call,
    layout: Layout,
    operands: Sequence[Value],
    *,
    lower: Any = lower_call,
    columns: Sequence[int] = (),
    nodes: Sequence[fx.Node] = (),
    rows: Value,
) -> Pair:
    """A pair whose op is evaluated where it is summed up: nothing is scheduled.

    Args:
        layout: with `TIME` and `KEY`.
        operands: streams and pairs; `columns` are those that are read at the keys.
        rows: a value as long as both of the two dimensions.
    """
    call.require(layout[layout.time] == (TIME,) and layout[layout.key] == (KEY,), "pairs of frames are folded")
    value = call.emit(
        layout, [Read(v, SAME) for v in operands], lower=lower, length_of=[rows], rate=rows.rate, nodes=list(nodes)
    )
    op = call.graph.ops.pop()
    op.columns = frozenset(columns)
    return Pair("pairs of frames are read outside of attention", value=value)


def turn(call: Call, x: Value) -> Value:
    """The same pairs, of which each row is a key and each column a query."""
    weighed = any(v.node is not None and v.node.target in _WEIGHTS for v in parts_of(x))
    call.require(not weighed, "weights of keys are read by their columns")
    layout = x.layout.replace(x.layout.time, (KEY,)).replace(x.layout.key, (TIME,))
    value = make(call, layout, [x], lower=lambda b, op, windows, span, _: windows[0].node, rows=x).value
    value.dtype = x.dtype
    assert isinstance(value.producer, Op)
    value.producer.turns = lambda scope: scope.turned
    return value


_WEIGHTS = (aten.softmax.int, aten._softmax.default)  # they know their keys


def same_clock(call: Call, values: Sequence[Value]) -> None:
    """Both of the two frames of a pair are counted by the same clock."""
    call.require(len({v.rate for v in values}) == 1, "queries and keys have different frame rates")
    call.require(len({v.lengths for v in values}) == 1, "queries and keys have different lengths in time")


def pointwise(call: Call) -> Fact:
    """Any pointwise op, its arguments broadcast over rows and columns."""
    tensors = [n for n in call.node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    rank = len(call.out_sizes)
    axes: set[int] = set()
    given: dict[fx.Node, Value] = {}
    row = column = None
    for n in tensors:
        fact = call.facts[n]
        if isinstance(fact, Pair):
            v = fact.value
            at = rank - len(v.layout)
            if row is not None and (row, column) == (at + v.layout.key, at + v.layout.time):
                v = turn(call, v)
            lies = row is None or (row, column) == (at + v.layout.time, at + v.layout.key)
            call.require(lies, "two masks lie in different dimensions")
            row, column = at + v.layout.time, at + v.layout.key
            axes |= {row, column}
        elif isinstance(fact, Value):
            v = call.ungroup(fact)
            axes.add(rank - len(v.layout) + v.layout.time)
        else:
            continue
        given[n] = v
    call.require(len(axes) == 2, "time lies in different dimensions of its arguments")
    if row is None:
        row, column = sorted(axes)
    assert column is not None
    clock = next(iter(given.values()))
    columns = {n for n, v in given.items() if not v.layout.paired and rank - len(v.layout) + v.layout.time == column}
    for n in tensors:
        if n not in given:
            table, at_keys = _lying_along(call, n, {row: TIME, column: KEY}, rank, clock)
            if table is not None:
                given[n] = table
                columns |= {n} if at_keys else set()
    same_clock(call, list(given.values()))
    layouts = [given[n].layout if n in given else call.static_layout(n) for n in tensors]
    dims: list[Dim] = []
    for i in range(rank):
        present = [d for lay in layouts if (k := i - (rank - len(lay))) >= 0 and (d := lay[k])]
        dims.append((TIME,) if i == row else (KEY,) if i == column else (present or [()])[0])
    nodes = list(given)
    where = [i for i, n in enumerate(nodes) if n in columns]
    return make(call, Layout(tuple(dims)), list(given.values()), columns=where, nodes=nodes, rows=clock)


def _lying_along(
    call: Call, node: fx.Node, axes: Mapping[int, Any], rank: int, clock: Value
) -> tuple[Value | None, bool]:
    """A static tensor that lies along rows or columns or both, as a value; and whether only along columns."""
    shape = node.meta["val"].shape
    along = [i - (rank - len(shape)) for i in axes if i >= rank - len(shape) and shape[i - (rank - len(shape))] != 1]
    if not along:
        return None, False
    table = call.as_table(node, along[0], clock)
    if len(along) == 1:
        return table, axes[along[0] + rank - len(shape)] is KEY
    return second_axis(call, table, along[1]).value, False


def second_axis(call: Call, table: Value, axis: int) -> Pair:
    """A table of which another dimension lies along the keys."""
    size = call.sizes_of(table.node)[axis][0] if table.node is not None else 0

    def lower(b: Any, op: Op, windows: list[Window], span: range, _: Any) -> Any:
        at = b.aten("clamp.default", b.index_range(op.outputs[0], b.scope.columns), 0, size - 1)
        return b.aten("index_select.default", windows[0].node, axis, at)

    return make(call, table.layout.replace(axis, (KEY,)), [table], lower=lower, rows=table)


# -- where pairs come from ---------------------------------------------------------------------------------------------


@pair_rule(aten.full.default)
def full(call: Call) -> Fact:
    """The same number for every two frames."""
    along = []
    for i, s in enumerate(call.out_sizes):
        by_batch = {n for n, b in zip(s, call.graph.batch, strict=True) if b == call.graph.batch[0]}
        along += [i] if len(by_batch) > 1 else []
    call.require(len(along) == 2, "a tensor with more than two time axes")
    like, length = call.length_like(call.out_sizes[along[0]])
    call.require(like.lengths == call.out_sizes[along[0]] == call.out_sizes[along[1]], "its sides differ in length")
    dims = [
        (TIME,) if i == along[0] else (KEY,) if i == along[1] else from_sizes([s], call.graph.batch)[0]
        for i, s in enumerate(call.out_sizes)
    ]
    layout, number, dtype = Layout(tuple(dims)), call.arg("fill_value"), call.dtype()
    lower = lambda b, op, windows, span, _: b.full(b.sizes(layout, len(span)), number, dtype)  # noqa: E731
    return make(call, layout, [], lower=lower, rows=like)


@pair_rule(*overloads("slice.Tensor narrow.default"))
def slice_(call: Call) -> Fact:
    """A table that is read along time in a second dimension; or a slice that takes all frames."""
    fact = call.facts[call.samples[0]["self"]]
    x = fact.value if isinstance(fact, Pair) else call.stream("self")
    axis = call.arg("dim", 0) % len(x.layout)
    sizes = call.out_sizes[axis]
    starts = bound(call.sampled("start"), x.lengths, (0,) * len(x.lengths))
    call.require(set(starts) == {0} and call.arg("step", 1) == 1, "part of a mask is read")
    call.require(sizes == x.lengths, "its length is not that of the clip")
    if isinstance(fact, Pair):
        call.require(axis in (x.layout.time, x.layout.key), "part of the heads are read")
        return fact
    call.require(x.layout.clean and axis != x.layout.time, "the slice is no table")
    return second_axis(call, x, axis)


@pair_rule(*overloads("tril.default triu.default"))
def triangle(call: Call) -> Fact:
    """The entries on one side of a diagonal, zero elsewhere."""
    x = _pair(call, "self")
    x = x if x.layout.time < x.layout.key else turn(call, x)
    layout = x.layout
    rank = len(layout)
    call.require((layout.time, layout.key) == (rank - 2, rank - 1), "a triangle of other dimensions")
    diagonal, lower_half = call.arg("diagonal", 0), "tril" in str(call.node.target)

    def lower(b: Any, op: Op, windows: list[Window], span: range, _: Any) -> Any:
        ahead = b.distance(b.scope)
        keep = b.aten("le.Scalar" if lower_half else "ge.Scalar", ahead, diagonal)
        return b.aten("where.self", keep, windows[0].node, b.like(0, windows[0].node))

    return make(call, layout, [x], lower=lower, rows=x)


@pair_rule(aten.index.Tensor)
def lookup(call: Call) -> Fact:
    """A table looked up at indices made of two positions, as relative position biases are."""
    indices = call.samples[0]["indices"]
    call.require(len(indices) == 1 and isinstance(call.fact(indices[0]), Pair), "indices of several dimensions")
    x = call.facts[indices[0]].value
    of = call.fact(call.samples[0]["self"])
    if isinstance(of, Value):
        return _row_at_distance(call, of, x, indices[0])
    table = call.static_layout(call.samples[0]["self"])
    return make(call, Layout((*x.layout, *table.dims[1:])), [x], nodes=[indices[0]], rows=x, lower=lower_lookup)


def _row_at_distance(call: Call, table: Value, at: Value, node: fx.Node) -> Pair:
    """Rows that are made of positions, looked up at the distances of every two frames."""
    call.require(positional(table) and table.layout.time == 0 and table.layout.clean, "frames are looked up")
    call.require(not streams_of(at) and table.rate == at.rate, "frames are looked up at indices that follow the data")

    def lower(b: Any, op: Op, windows: list[Window], span: range, _: Any) -> Any:
        most = max(b.scope.rows.stop - b.scope.columns.start, b.scope.columns.stop - b.scope.rows.start, 1)
        rows = frames(b, table, range(most))
        index = b.aten("clamp.default", windows[0].node, 0, most - 1)
        return b.aten("index.Tensor", rows, [index])

    value = make(call, Layout((*at.layout, *table.layout.dims[1:])), [at], nodes=[node], rows=at, lower=lower)
    known = evaluator(call)
    call.require(value.value in alike(known, value.value, None), "rows are looked up at more than distances")
    return value


def lower_lookup(b: Any, op: Op, windows: list[Window], span: range, _: Any) -> Any:
    """``table[indices]``; entries of keys that do not exist may point anywhere."""
    assert op.node is not None
    table = op.node.args[0]
    size = table.meta["val"].shape[0]  # type: ignore[union-attr]
    at = b.aten("clamp.default", windows[0].node, -size, size - 1)
    return b.aten("index.Tensor", b.static(table), [at])


# -- ops that treat a pair as any tensor -------------------------------------------------------------------------------


@pair_rule(
    *overloads(
        "view.default reshape.default _unsafe_view.default flatten.using_ints unflatten.int squeeze.default "
        "squeeze.dim squeeze.dims unsqueeze.default permute.default transpose.int swapaxes.default t.default "
        "mT.default movedim.int movedim.intlist embedding.default select.int"
    )
)
def as_frames(call: Call) -> Fact:
    """The frames' rule, the second frame's dimension being one like any other."""
    apply = find_rule(call.node.target)
    assert apply is not None
    pairs = {n: f.value for n in call.node.all_input_nodes if isinstance(f := call.facts[n], Pair)}
    call.require(bool(pairs), "it is no pair of frames")
    known = len(call.graph.ops)
    value = apply(dataclasses.replace(call, facts={**call.facts, **pairs}))
    del call.graph.ops[known:]
    call.require(isinstance(value, Value) and value.layout.paired and value.layout.clean, "pairs of frames are folded")
    call.require(value.layout[value.layout.key] == (KEY,), "pairs of frames are folded")
    return Pair("pairs of frames are read outside of attention", value=value)


@pair_rule(*overloads("expand.default repeat.default"))
def spread(call: Call) -> Fact:
    """A stream repeated along a second time axis: an entry for every two frames, which depends on one of them."""
    if isinstance(call.fact(call.samples[0]["self"]), Pair):
        return as_frames(call)
    x = call.ungroup(call.stream("self"))
    sizes, added = call.out_sizes, len(call.out_sizes) - len(x.layout)
    at = added + x.layout.time
    along = [i for i, s in enumerate(sizes) if i != at and s == x.lengths and not x.layout[i - added]]
    call.require(len(along) == 1 and len(set(x.lengths)) > 1, "something without time is expanded along time")
    row, column = sorted((at, along[0]))
    dims: list[Dim] = []
    for i, s in enumerate(sizes):
        before = x.layout[i - added] if i >= added else ()
        dims.append((TIME,) if i == row else (KEY,) if i == column else before or from_sizes([s], call.graph.batch)[0])
    layout = Layout(tuple(dims))

    def lower(b: Any, op: Op, windows: list[Window], span: range, _: Any) -> Any:
        return b.aten("expand.default", windows[0].node, b.sizes(layout, len(span)))

    columns = [0] if at == column else []
    return make(call, layout, [x], columns=columns, nodes=call.stream_nodes[:1], rows=x, lower=lower)


@pair_rule(aten.cumsum.default)
def cumsum(call: Call) -> Fact:
    """What has been added up from after a key on to its query, as the decay of a state-space model ("segsum")."""
    x = _pair(call, "self")
    axis, layout = call.arg("dim") % len(x.layout), x.layout
    call.require(axis == layout.time and summed_since(evaluator(call), x), "pairs of frames are summed up")

    def lower(b: Any, op: Op, windows: list[Window], span: range, _: Any) -> Any:
        each = b.aten("transpose.int", windows[0].node, layout.time, layout.key)  # of the only column, for each key
        keep = b.aten("le.Scalar", b.distance(b.scope), 0)
        sizes = [1] * len(layout)
        sizes[layout.time], sizes[layout.key] = len(b.scope.rows), len(b.scope.columns)
        keep = keep if layout.time < layout.key else b.aten("transpose.int", keep, 0, 1)
        kept = b.aten("where.self", b.aten("reshape.default", keep, sizes), each, b.like(0, each))
        back = b.aten("flip.default", b.aten("cumsum.default", b.aten("flip.default", kept, [layout.key]), layout.key),
                      [layout.key])  # fmt: skip
        later = b.aten("slice.Tensor", back, layout.key, 1, len(b.scope.columns))
        return b.aten("constant_pad_nd.default", later, [0] * (2 * (len(layout) - 1 - layout.key)) + [0, 1], 0.0)

    pair = make(call, layout, [x], lower=lower, rows=x)
    assert isinstance(pair.value.producer, Op)
    pair.value.producer.turns = lambda scope: scope.before
    return pair


@pair_rule(*overloads("softmax.int _softmax.default"))
def softmax(call: Call) -> Fact:
    """Weights of the keys; keys that do not exist have none."""
    x = _pair(call, "self")
    axis = call.arg("dim") % len(x.layout)
    x = turn(call, x) if axis == x.layout.time else x

    def lower(b: Any, op: Op, windows: list[Window], span: range, _: Any) -> Any:
        scores = windows[0].node
        if axis == x.layout.key:
            scores = b.where_exists(scores, x.layout, torch.finfo(x.dtype).min)
        return b.call(op, [Window(scores, span.start, span.stop)])

    return make(call, x.layout, [x], lower=lower, nodes=[call.samples[0][_name(call)]], rows=x)


def _name(call: Call) -> str:
    return "input" if "input" in call.samples[0] else "self"


def _pair(call: Call, name: str) -> Value:
    """The pair given as this argument.

    Raises:
        NonLocal: it is none.
    """
    fact = call.fact(call.samples[0].get(name))
    if not isinstance(fact, Pair):
        raise NonLocal(f"its argument '{name}' is no pair of frames")
    return fact.value


# -- products ----------------------------------------------------------------------------------------------------------


@pair_rule(*overloads("matmul.default bmm.default baddbmm.default"))
def matmul(call: Call) -> Fact:
    """Queries times keys, or weights times values."""
    args = call.samples[0]
    names = next(n for n in (("self", "other"), ("batch1", "batch2"), ("self", "mat2")) if n[1] in args)
    nodes = [args[n] for n in names]
    left, right = (_tensor(call, n) for n in nodes)
    rank = max(len(left), len(right))
    call.require(len(left) >= 2 and len(right) >= 2, "a product with a vector")
    batch = [
        next((d for lay in (left, right) if (k := i - rank + len(lay)) >= 0 and (d := lay[k])), ())
        for i in range(rank - 2)
    ]
    terms, result = spelled_out(MATMUL, [len(left), len(right)])
    dims = {**dict(zip(result, batch, strict=False)), "i": left[len(left) - 2], "j": right[len(right) - 1]}
    added = args["self"] if "batch1" in args else None
    return _Product(call, nodes, [list(t) for t in terms], list(result), dims).fact(added)


@pair_rule(aten.einsum.default)
def einsum(call: Call) -> Fact:
    """The same, by letters."""
    equation = call.arg("equation").replace(" ", "")
    call.require("." not in equation and "->" in equation, "an einsum with an ellipsis or without '->'")
    nodes = list(call.samples[0]["tensors"])
    call.require(len(nodes) == 2, "an einsum of more than two tensors over time")
    given, result = equation.split("->")
    terms = [list(t) for t in given.split(",")]
    dims: dict[str, Dim] = {}
    for term, node in zip(terms, nodes, strict=True):
        for letter, d in zip(term, _tensor(call, node), strict=True):
            dims[letter] = dims.get(letter) or d
    return _Product(call, nodes, terms, list(result), dims).fact(None)


def _tensor(call: Call, node: fx.Node) -> Layout:
    fact = call.facts[node]
    if isinstance(fact, Pair):
        return fact.value.layout
    return call.ungroup(fact).layout if isinstance(fact, Value) else call.static_layout(node)


@dataclass(frozen=True)
class _Product:
    """A sum of products of two tensors, their dimensions named by letters.

    Attributes:
        nodes: the tensors.
        terms: the letters of each.
        result: those of the sum.
        dims: what of frames, batch and sizes lies along each.
    """

    call: Call
    nodes: list[fx.Node]
    terms: list[list[str]]
    result: list[str]
    dims: Mapping[str, Dim]

    def fact(self, added: Any) -> Fact:
        """What the sum is: `added` is added to it."""
        facts = [self.call.facts[n] for n in self.nodes]
        values = [
            f.value if isinstance(f, Pair) else self.call.ungroup(f) if isinstance(f, Value) else None for f in facts
        ]
        if all(isinstance(f, Value) for f in facts):
            left, right = (v for v in values if v is not None)
            return self._of_frames(left, right, added)
        self.call.require(added is None, "weights are multiplied and added to")
        paired = [i for i, f in enumerate(facts) if isinstance(f, Pair)]
        self.call.require(bool(paired), "a product that sums over the time axis")
        weights, other = values[paired[0]], values[1 - paired[0]]
        assert weights is not None
        if self.terms[paired[0]][weights.layout.key] in self.result and other is not None and not other.layout.paired:
            weights = weights if self.terms[paired[0]][weights.layout.time] in self.result else turn(self.call, weights)
        row, column = self.terms[paired[0]][weights.layout.time], self.terms[paired[0]][weights.layout.key]
        if {row, column} <= set(self.result):
            return self._entry_by_entry((row, column))
        self.call.require(other is not None, "pairs are multiplied with something without time")
        assert other is not None
        if other.layout.paired:
            return self._summed_with((row, column))
        self.call.require(
            self.terms[1 - paired[0]][other.layout.time] == column, "weights are multiplied with their queries' frames"
        )
        self.call.require(column not in self.result and row in self.result, "weights are multiplied but not summed")
        same_clock(self.call, [weights, other])
        layout = self._layout(row)
        order = [self.nodes[paired[0]], self.nodes[1 - paired[0]]]

        def lower(b: Any, op: Op, scope: Scope) -> Any:
            node = b.where_exists(evaluate(b, weights, scope), weights.layout, 0, scope)
            windows = [
                Window(node, scope.rows.start, scope.rows.stop),
                Window(scope.frames[other, True], scope.columns.start, scope.columns.stop),
            ]
            return b.call(dataclasses.replace(op, stream_nodes=order), windows)

        return summed_up(self.call, layout, weights, [(other, True)], lower)

    def _of_frames(self, left: Value, right: Value, added: Any) -> Pair:
        """An entry for every frame of one stream and every frame of another: queries times keys."""
        row, column = self.terms[0][left.layout.time], self.terms[1][right.layout.time]
        self.call.require(row != column and {row, column} <= set(self.result), "a product that sums over the time axis")
        self.call.require(row not in self.terms[1] and column not in self.terms[0], "frames lie along features")
        same_clock(self.call, [left, right])
        layout = self._layout(row, column)
        operands, all_nodes, columns = [left, right], list(self.nodes), [1]
        if isinstance(self.call.fact(added), Pair):
            mask = self.call.facts[added].value
            at = len(layout) - len(mask.layout)
            self.call.require(
                (at + mask.layout.time, at + mask.layout.key) == (layout.time, layout.key), "a mask lies crosswise"
            )
            same_clock(self.call, [left, mask])
            operands, all_nodes = [*operands, mask], [*all_nodes, added]
        elif isinstance(self.call.fact(added), Value):
            one = self.call.ungroup(self.call.facts[added])
            at = len(layout) - len(one.layout) + one.layout.time
            self.call.require(at in (layout.time, layout.key), "what is added lies along features")
            same_clock(self.call, [left, one])
            columns += [2] if at == layout.key else []
            operands, all_nodes = [*operands, one], [*all_nodes, added]
        elif added is not None:
            shape = added.meta["val"].shape
            self.call.require(all(s == 1 for s in shape[-2:]), "what is added lies along time")
        return make(self.call, layout, operands, columns=columns, nodes=all_nodes, rows=left)

    def _layout(self, row: str, column: str | None = None) -> Layout:
        """The result's layout, with frames along these letters."""
        return Layout(tuple((TIME,) if x == row else (KEY,) if x == column else self.dims[x] for x in self.result))

    def _entry_by_entry(self, pair: tuple[str, str]) -> Pair:
        """Products of vectors that there are for every two frames, as of queries and embeddings of distances."""
        values = {n: self._factor(n, term, pair) for n, term in zip(self.nodes, self.terms, strict=True)}
        given = {n: v for n, v in values.items() if v is not None}
        clock = next(v for v in given.values() if v.layout.paired)
        same_clock(self.call, list(given.values()))
        layout = self._layout(*pair)
        term_of = dict(zip(self.nodes, self.terms, strict=True))
        columns = [
            i for i, (n, v) in enumerate(given.items()) if not v.layout.paired and term_of[n][v.layout.time] == pair[1]
        ]
        return make(self.call, layout, list(given.values()), columns=columns, nodes=list(given), rows=clock)

    def _factor(self, node: fx.Node, term: list[str], pair: tuple[str, str]) -> Value | None:
        """A factor of such a product, if it depends on time: its frames lie along those of the pairs."""
        fact = self.call.facts[node]
        if isinstance(fact, Pair):
            lies = (term[fact.value.layout.time], term[fact.value.layout.key])
            self.call.require(lies == pair, "pairs of frames are multiplied crosswise")
            return fact.value
        if isinstance(fact, Value):
            value = self.call.ungroup(fact)
            self.call.require(term[value.layout.time] in pair, "frames lie along features")
            return value
        self.call.require(not set(pair) & set(term), "something without time lies along the time axis")
        return None

    def _summed_with(self, pair: tuple[str, str]) -> Value:
        """Weights times vectors that there are for every two frames, summed over the keys."""
        weights, other = (self._factor(n, term, pair) for n, term in zip(self.nodes, self.terms, strict=True))
        assert weights is not None and other is not None
        self.call.require(
            pair[0] in self.result and pair[1] not in self.result, "weights are multiplied but not summed"
        )
        same_clock(self.call, [weights, other])
        layout = self._layout(pair[0])
        known = evaluator(self.call)
        if not streams_of(weights):
            weights, other = other, weights
        reach = find_reach(known, weights)
        reach = dataclasses.replace(reach, alike=reach.alike | alike(known, other, reach.limit))
        factors = [f.value for n in self.nodes if isinstance(f := self.call.facts[n], Pair)]

        def lower(b: Any, op: Op, scope: Scope) -> Any:
            windows = [
                Window(b.where_exists(evaluate(b, v, scope), v.layout, 0, scope), scope.rows.start, scope.rows.stop)
                for v in factors
            ]
            return b.call(dataclasses.replace(op, stream_nodes=self.nodes), windows)

        return summed_up(self.call, layout, weights, streams_of(other), lower, reach)


def summed_up(
    call: Call,
    layout: Layout,
    weights: Value | None,
    others: Sequence[tuple[Value, bool]],
    lower: Any,
    reach: Reach | None = None,
) -> Value:
    """Pairs summed over their keys: a stream, if they reach no further than so many frames ahead.

    Args:
        layout: of the result.
        weights: zero, or so low that softmax makes it zero, where a query does not read a key; None if `reach` is all
            that is known.
        others: streams that are read besides, and whether at the keys.
        lower: ``lower(builder, op, scope)``, with the frames of `others` in ``scope.frames``.

    Raises:
        NonLocal: they reach to the end of the clip.
    """
    if reach is None:
        assert weights is not None
        reach = find_reach(evaluator(call), weights)
    beyond = weights is not None and any(no_key_ahead(v) for v in parts_of(weights))
    call.require(not beyond or reach.ahead <= 0, "there are no embeddings of distances to keys ahead")
    streams = list(dict.fromkeys([*(streams_of(weights) if weights is not None else []), *others]))
    call.require(any(at_keys for _, at_keys in streams), "positions are compared with positions alone")
    back = reach.back if reach.back is not None else None if call.context is None else call.context - 1
    everything, found = back is None, reach
    taps = Taps(1, 1, -(back or 0), reach.ahead)
    reads = [read(v, taps, fill=0.0, everything=everything) if at_keys else read(v) for v, at_keys in streams]

    def lowered(b: Any, op: Op, windows: list[Window], span: range, _: Any) -> Any:
        scope = Scope(span, b.reached(op, taps, everything, span), alike=found.alike, limit=found.limit)
        scope.frames.update({key: w.node for key, w in zip(streams, windows, strict=True)})
        scope.exists = b.existing(op, scope, masked=everything, back=back if found.back is None else None)
        return lower(b, op, scope)

    clock = weights or others[0][0]
    value = call.emit(
        layout,
        reads,
        rate=clock.rate,
        length_of=[clock],
        lower=lowered,
        memory=everything,
        limit=reach.limit,
        indexed=weights is not None and not _by_distance(weights, reach),
    )
    op = value.producer
    assert isinstance(op, Op)
    op.approximate = not everything and reach.back is None
    return value


def no_key_ahead(value: Value) -> bool:
    """Whether entries of keys that lie ahead of their query are not the model's, see unskew_distances.py."""
    return value.node is not None and bool(value.node.meta.get("no_key_ahead"))


def evaluator(call: Call) -> Evaluator:
    """What evaluates masks when compiling."""
    device = next(v.device for v in pytree.tree_leaves(call.node.meta["val"]))
    return Evaluator(call.constants, call.graph, device)


def as_masking(call: Call, node: fx.Node, clock: Value) -> Value:
    """An attention mask (True, or a number that is added, where a query reads a key) as pairs of frames."""
    fact = call.facts[node]
    if isinstance(fact, Pair):
        value = fact.value if fact.value.layout.time < fact.value.layout.key else turn(call, fact.value)
        at = value.layout.time, value.layout.key
        call.require(at == (len(value.layout) - 2, len(value.layout) - 1), "a mask lies in other dimensions")
        return value
    call.require(not isinstance(fact, Value), "a mask for each frame")
    rank = node.meta["val"].dim()
    call.require(rank >= 2, "a mask without rows")
    mask, at_keys = _lying_along(call, node, {rank - 2: TIME, rank - 1: KEY}, rank, clock)
    call.require(mask is not None and mask.layout.paired and not at_keys, "attention over the whole clip")
    assert mask is not None
    return mask


def _by_distance(weights: Value, reach: Reach) -> bool:
    """Whether what is made of positions alone depends on nothing but distances."""
    queue, seen = [weights], set()
    while queue:
        v = queue.pop()
        if v in seen or v in reach.alike:
            continue
        seen.add(v)
        if v.layout.paired:
            if not streams_of(v):
                return False
            assert isinstance(v.producer, Op)
            queue.extend(r.source for r in v.producer.reads)
    return True


@pair_rule(*overloads("sum.dim_IntList amax.default logsumexp.default max.dim"))
def reduction(call: Call) -> Fact:
    """A sum or the like over the keys of each query."""
    x = _pair(call, "self")
    given = call.arg("dim")
    over = {d % len(x.layout) for d in ([given] if isinstance(given, int) else given or range(len(x.layout)))}
    call.require(len({x.layout.key, x.layout.time} & over) == 1, "a reduction over queries and keys, or over neither")
    x = turn(call, x) if x.layout.time in over else x
    keep = bool(call.arg("keepdim", False))
    layout = Layout(tuple(() if i in over else d for i, d in enumerate(x.layout) if keep or i not in over))
    summed, indexed = call.node.target is aten.sum.dim_IntList, call.node.target is aten.max.dim
    call.require(not indexed or all(u.args[1] == 0 for u in call.node.users), "where the largest key lies is asked for")
    node = call.samples[0]["self"]

    def lower(b: Any, op: Op, scope: Scope) -> Any:
        pairs = evaluate(b, x, scope)
        pairs = b.where_exists(pairs, x.layout, 0 if summed else torch.finfo(x.dtype).min, scope)
        found = b.call(dataclasses.replace(op, stream_nodes=[node]), [Window(pairs, scope.rows.start, scope.rows.stop)])
        return b.getitem(found, 0) if indexed else found

    reach = None if summed else find_reach(evaluator(call), x, scores=True)
    # of positions alone, which keep no frames: their own count is what is read at the keys
    others = [] if streams_of(x) else [(_count(call, x), True)]
    result = summed_up(call, layout, x, others, lower, reach)
    return (result, NO_INDEX) if indexed else result


NO_INDEX = InClip("where the largest key lies is asked for")


def _count(call: Call, like: Value) -> Value:
    """A frame of nothing for each frame of another value."""
    lower = lambda b, op, windows, span, _: b.full([len(span)], 0, torch.bool)  # noqa: E731
    layout = Layout(((TIME,),))
    return call.emit(layout, [], rate=like.rate, length_of=[like], lower=lower, dtypes=[torch.bool])


# triangles and masks that do not depend on time have no rule of their own: they are static
rule(*overloads("tril.default triu.default"))(lambda call: _within_frames(call))


def _within_frames(call: Call) -> Fact:
    x = call.stream("self")
    call.require(x.layout.time < len(x.layout) - 2, "a triangle over the time axis")
    return call.framewise(x.layout)


class _Attention(nn.Module):
    def __init__(self, band: int = 0) -> None:
        super().__init__()
        self.qkv, self.band = nn.Linear(4, 12), band

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, 4): each frame attends to those before it, by hand."""
        q, k, v = self.qkv(x).chunk(3, -1)
        i = torch.arange(x.shape[1])
        ahead = i[None] - i[:, None]
        mask = (ahead > 0) | (ahead < -self.band) if self.band else ahead > 0
        scores = (q @ k.transpose(1, 2) / 2 + 0.1 * ahead).masked_fill(mask, -torch.inf)
        y: torch.Tensor = scores.softmax(-1) @ v
        return y


class _Linear(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, 4): attention without softmax, weights that sum to one."""
        w = torch.einsum("bic,bjc->bij", x.exp(), x.exp()).tril()
        return torch.einsum("bij,bjc->bic", w, x) / w.sum(-1, keepdim=True)


class _Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.keys, self.values = nn.Linear(4, 12), nn.Embedding(7, 4), nn.Embedding(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, 4): embeddings of distances beside keys and values (Shaw et al., 2018)."""
        q, k, v = self.qkv(x).chunk(3, -1)
        i = torch.arange(x.shape[1])
        distance = (i[None] - i[:, None]).clamp(-3, 3) + 3
        scores = q @ k.transpose(1, 2) + torch.einsum("btd,tsd->bts", q, self.keys(distance))
        weights = scores.masked_fill(i[None] > i[:, None], -torch.inf).softmax(-1)
        y: torch.Tensor = weights @ v + (weights.unsqueeze(2) @ self.values(distance)).squeeze(2)
        return y


SAMPLES = [
    Sample("embeddings_of_distances", _Distances, (2, 9, 4), 1, unbounded=True),
    Sample("causal_attention_by_hand", _Attention, (2, 9, 4), 1, unbounded=True),
    Sample("banded_attention_by_hand", lambda: _Attention(3), (2, 9, 4), 1),
    Sample("linear_attention", _Linear, (2, 9, 4), 1, unbounded=True),
]
