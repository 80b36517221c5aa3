"""What a C function of a step does, one after the other, and how each is written in C."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod

import torch

from .expressions import Call, Expression, Number, Value, factors_of, written
from .operators import FLOATS, TYPES, literal
from .views import Dim, View, strides_in

Strides = tuple[int, ...]  # of a view, one for each loop
GROUP = 8  # entries that are computed together, as far as vectors go


@dataclass
class Lines:
    """A statement as it is written.

    Attributes:
        text: its lines.
        tiles: how often the function that it calls may fetch some of what is read next; ``{ahead}`` in the last line
            stands for the arguments that tell what this is.
    """

    text: list[str]
    tiles: int = 0


@dataclass(frozen=True)
class Loop:
    """A loop over a factor of a dimension.

    Attributes:
        dim, part: which factor of which dimension.
        size: its iterations.
    """

    dim: int
    part: int
    size: int


class Nest:
    """Loops over the entries of a shape, and the addresses of views in them."""

    def __init__(self, shape: Sequence[int], views: Sequence[View], first: View, outer: Sequence[int] = ()) -> None:
        """
        Args:
            shape: of the views.
            views: all that are read or written in the loops.
            first: the one that is best walked through in the order in which it lies.
            outer: dimensions whose loops are innermost all the same (reductions).
        """
        self.factors = factors_of(shape, views)
        self.views = list(dict.fromkeys(views))
        loops = [Loop(d, i, n) for d, sizes in enumerate(self.factors) for i, n in enumerate(sizes) if n > 1]
        at = strides_in(first, self.factors)
        loops.sort(key=lambda x: (x.dim in outer, -abs(at[x.dim][x.part]) or -(1 << 62)))
        self.loops: list[tuple[int, dict[View, int]]] = []  # sizes and strides
        self.inner = 0  # how many of the innermost loops are over `outer`
        strides = {v: strides_in(v, self.factors) for v in self.views}
        for x in loops:
            steps = {v: strides[v][x.dim][x.part] for v in self.views}
            last = self.loops[-1] if self.loops else None
            same = last is not None and (x.dim in outer) == (self.inner > 0)
            if last is not None and same and all(last[1][v] == steps[v] * x.size for v in self.views):
                self.loops[-1] = last[0] * x.size, steps
                continue
            self.loops.append((x.size, steps))
            self.inner += x.dim in outer

    def address(self, view: View, terms: Sequence[str] = ()) -> str:
        """The index of an entry, in the loops' variables."""
        parts = [str(view.offset)] if view.offset else []
        for i, (_, steps) in enumerate(self.loops):
            if steps[view]:
                parts.append(f"i{i}" if steps[view] == 1 else f"i{i} * {steps[view]}")
        return " + ".join([*parts, *terms]).replace("+ -", "- ") or "0"

    def entry(self, view: View) -> str:
        """The C expression of an entry."""
        terms = [f"{self.text(e)} * {s}" for e, s in view.terms]
        if view.buffer is None:
            return f"({self.address(view, terms)})"
        return f"{view.buffer.name}[{self.address(view, terms)}]"

    def text(self, e: Expression) -> str:
        """The C expression of what is computed."""
        return written(e, self.entry, declare=False)[1]

    def open(self, stop: int | None = None, start: int = 0) -> list[str]:
        """The heads of loops."""
        lines = []
        for i, (size, _) in list(enumerate(self.loops))[start:stop]:
            if i == len(self.loops) - 1:
                lines.append("  " * i + "#pragma GCC ivdep")
            lines.append("  " * i + f"for (int i{i} = 0; i{i} < {size}; i{i}++)")
        return lines


@dataclass(frozen=True)
class Store:
    """Compute a tensor's entries and put them somewhere."""

    value: Value
    to: View
    name: str

    def lines(self) -> list[str]:
        """In C."""
        views = [self.to, *self.value.expression.leaves()]
        nest = Nest(self.value.shape, views, self.to)
        declared, text = written(self.value.expression, nest.entry)
        body = " ".join([*declared, f"{nest.entry(self.to)} = {text};"])
        body = f"{{ {body} }}" if declared else body
        pad, title = "  " * len(nest.loops), f"/* {self.name}: {list(self.value.shape)} */"
        size, steps = nest.loops[-1] if nest.loops else (1, {self.to: 0})
        if size <= GROUP or size % GROUP == 0 or steps[self.to] != 1 or self.value.simple:
            return [title, *nest.open(), pad + body]
        # no remainder, whose entries would be computed one by one: the last group begins earlier
        lines, name = [title, *nest.open(len(nest.loops) - 1), pad[2:] + "{"], f"i{len(nest.loops) - 1}"
        for first, stop in ((0, size - size % GROUP), (size - GROUP, size)):
            lines += [pad + "#pragma GCC ivdep", f"{pad}for (int {name} = {first}; {name} < {stop}; {name}++) {body}"]
        return [*lines, pad[2:] + "}"]


@dataclass(frozen=True)
class Check:
    """End the step unless all entries lie in ``[low, high)``: nothing may be read at such places.

    What the step has written until then lies beside the state, so that this is whole.
    """

    value: Value
    low: int
    high: int

    def lines(self) -> list[str]:
        """In C."""
        leaves = list(self.value.expression.leaves())
        nest = Nest(self.value.shape, leaves, leaves[0])
        entry = nest.text(self.value.expression)
        body = f"outside |= {entry} < {self.low} || {entry} >= {self.high};"
        return ["{", "int outside = 0;", *nest.open(), "  " * len(nest.loops) + body, "if (outside) return 1;", "}"]


@dataclass(frozen=True)
class Copy:
    """Bytes of a frame into the mirror of its place in a ring."""

    to: str
    source: str
    size: int
    dtype: torch.dtype

    def lines(self) -> list[str]:
        """In C."""
        return [f"memcpy({self.to}, {self.source}, {self.size} * sizeof({TYPES[self.dtype]}));"]


_JOINS: dict[str, tuple[str, int]] = {  # two numbers in one, and what it begins with
    "sum": ("{0} + {1}", 0), "prod": ("{0} * {1}", 1), "any": ("{0} || {1}", 0), "all": ("{0} && {1}", 1),
}  # fmt: skip


def _join(kind: str, dtype: torch.dtype) -> tuple[str, float | int]:
    if kind in _JOINS:
        return _JOINS[kind]
    greatest = kind == "amax"
    if dtype in FLOATS:
        return f"{kind[1:]}_{'f' if dtype == torch.float32 else 'd'}({{0}}, {{1}})", -inf if greatest else inf
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return f"{{0}} {'>' if greatest else '<'} {{1}} ? {{0}} : {{1}}", low if greatest else high


@dataclass(frozen=True)
class Reduce:
    """Join the entries along some dimensions.

    Attributes:
        kind: sum, prod, any, all, amax, amin.
        value: what is reduced.
        dims: over these dimensions.
        to: a view of the value's shape, but that the reduced dimensions have one entry, spread over all.
        name: for the reader.
    """

    kind: str
    value: Value
    dims: tuple[int, ...]
    to: View
    name: str

    def lines(self) -> list[str]:
        """In C."""
        e = self.value.expression
        kind, dtype = TYPES[e.dtype], e.dtype
        join, begin = _join(self.kind, dtype)
        leaves = list(e.leaves())
        dominant = max(leaves, key=_extent) if leaves else self.to
        nest = Nest(self.value.shape, [self.to, *leaves], dominant)
        title = [f"/* {self.name}: {self.kind} of {list(self.value.shape)} over {list(self.dims)} */"]
        if nest.loops and nest.loops[-1][1][self.to] == 1 and nest.loops[-1][0] >= 4:  # numbers side by side
            shape = tuple(1 if d in self.dims else n for d, n in enumerate(self.value.shape))
            start = Store(Value(shape, Number(begin, dtype)), self._kept(), self.name)
            joined = join.format(nest.entry(self.to), nest.text(e))
            return [
                *title,
                *start.lines()[1:],
                *nest.open(),
                "  " * len(nest.loops) + f"{nest.entry(self.to)} = {joined};",
            ]
        nest = Nest(self.value.shape, [self.to, *leaves], dominant, self.dims)
        outer = len(nest.loops) - nest.inner
        pad = "  " * outer
        lines = [*title, *nest.open(outer), pad + "{", pad + f"  {kind} joined = {literal(begin, dtype)};"]
        if self.kind == "sum" and dtype in FLOATS and nest.inner:
            inner = nest.open(None, outer)
            inner = [x.replace("#pragma GCC ivdep", "#pragma omp simd reduction(+:joined)") for x in inner]
        else:
            inner = [x for x in nest.open(None, outer) if "#pragma" not in x]
        lines += ["  " + x for x in inner]
        lines.append("  " * (len(nest.loops) + 1) + f"joined = {join.format('joined', nest.text(e))};")
        return [*lines, pad + f"  {nest.entry(self.to)} = joined;", pad + "}"]

    def _kept(self) -> View:
        dims: tuple[Dim, ...] = tuple(() if d in self.dims else x for d, x in enumerate(self.to.dims))
        return View(self.to.buffer, self.to.offset, dims)


def _extent(view: View) -> int:
    """Entries that are not repeated."""
    return prod(n for dim in view.dims for n, s in dim if s) if view.buffer is not None else 0


@dataclass(frozen=True)
class Arg:
    """The index of the first greatest (or least) entry along a dimension; NaN counts as that."""

    value: Value
    dim: int
    greatest: bool
    index: View | None
    best: View | None
    name: str

    def lines(self) -> list[str]:
        """In C."""
        e = self.value.expression
        outs = [v for v in (self.index, self.best) if v is not None]
        step = View(
            None,
            0,
            tuple(((n, 1),) if d == self.dim else (((n, 0),) if n > 1 else ()) for d, n in enumerate(self.value.shape)),
        )
        nest = Nest(self.value.shape, [*outs, step, *e.leaves()], outs[0], (self.dim,))
        outer = len(nest.loops) - nest.inner
        pad, sign = "  " * outer, ">" if self.greatest else "<"
        lines = [f"/* {self.name} */", *[x for x in nest.open(outer) if "#pragma" not in x], pad + "{"]
        lines += [pad + f"  {TYPES[e.dtype]} best = 0;", pad + "  int64_t at = -1;"]
        lines += ["  " + x for x in nest.open(None, outer) if "#pragma" not in x]
        inner = "  " * (len(nest.loops) + 1)
        lines += [inner + "{", inner + f"  {TYPES[e.dtype]} x = {nest.text(e)};"]
        lines += [
            inner
            + f"  if (at < 0 || (best == best && (x != x || x {sign} best))) {{ best = x; at = {nest.entry(step)}; }}",
            inner + "}",
        ]
        if self.index is not None:
            lines.append(pad + f"  {nest.entry(self.index)} = at;")
        if self.best is not None:
            lines.append(pad + f"  {nest.entry(self.best)} = best;")
        return [*lines, pad + "}"]


@dataclass(frozen=True)
class Scan:
    """Join each entry with all before it along a dimension.

    Attributes:
        text: what joins two numbers in C.
        value: what is joined.
        dim: along which.
        to: where it goes.
        name: for the reader.
    """

    text: str
    value: Value
    dim: int
    to: View
    name: str

    def lines(self) -> list[str]:
        """In C."""
        e = self.value.expression
        step = View(
            None,
            0,
            tuple(
                ((n, 1),) if d == self.dim and n > 1 else (((n, 0),) if n > 1 else ())
                for d, n in enumerate(self.value.shape)
            ),
        )
        nest = Nest(self.value.shape, [self.to, step, *e.leaves()], self.to, (self.dim,))
        outer = len(nest.loops) - nest.inner
        pad = "  " * outer
        lines = [f"/* {self.name} */", *[x for x in nest.open(outer) if "#pragma" not in x], pad + "{"]
        lines.append(pad + f"  {TYPES[e.dtype]} joined = 0;")
        lines += ["  " + x for x in nest.open(None, outer) if "#pragma" not in x]
        inner = "  " * (len(nest.loops) + 1)
        text = self.text.format("joined", nest.text(e))
        lines += [inner + "{", inner + f"  joined = {nest.entry(step)} == 0 ? {nest.text(e)} : ({text});"]
        return [*lines, inner + f"  {nest.entry(self.to)} = joined;", inner + "}", pad + "}"]


def pointwise(text: str, given: Sequence[Expression], dtype: torch.dtype, within: torch.dtype) -> Call:
    """An operator on expressions."""
    return Call(text, tuple(given), dtype, within)
