"""The C functions of sums of products, written: loops over tiles of the result, and what a tile does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod

from .expressions import written
from .operators import FLOATS, TYPES
from .products import OUT, A, Axis, Product, W, entries
from .views import View

At = tuple[str, tuple[int, ...]]  # a loop's variable, or a number, and the strides of all operands in it
Terms = list[tuple[str, int]]  # of an address: variables, or numbers, times strides
Panel = tuple[int, int, int, Terms, int]  # as of `panels_of`; its address, and how far columns are apart


@dataclass(frozen=True)
class Sum:
    """A loop over what is summed up.

    Attributes:
        name: its variable; ``t`` counts pairs of operands.
        size: its iterations.
        a, w: the strides of the operands in it.
    """

    name: str
    size: int
    a: int
    w: int


def sums_of(p: Product, w: Sequence[int], apart: int) -> list[Sum]:
    """All that is summed up: the strides of the second operands in `k`, and how far they are apart."""
    loops = [Sum(f"k{i}", size, t[A], s) for i, ((size, t), s) in enumerate(zip(p.k, w, strict=True))]
    pairs = len(p.dot.pairs)
    return [Sum("t", pairs, 0, apart), *loops] if pairs > 1 else loops


def panels_of(many: int, width: int, lanes: int) -> list[tuple[int, int, int]]:
    """Columns as panels: the first column, how many, and how many such panels follow each other.

    The last panel begins earlier, where that makes its vectors whole; if it is the only one, some may be missing.
    """
    full, rest = divmod(many, width)
    found = [(0, width, full)] if full else []
    if rest:
        whole = -(-rest // lanes) * lanes
        found.append((max(0, many - whole), whole, 1))
    return found


def row_parts(rows: int, block: int) -> list[tuple[int, int, int]]:
    """Rows in blocks: the first row, how many, and how many such blocks follow each other."""
    full, rest = divmod(rows, block)
    return [(0, block, full), *([(full * block, rest, 1)] if rest else [])]


def _head(name: str, end: int, first: int = 0, step: int = 1) -> str:
    """That of a loop."""
    by = f"{name}++" if step == 1 else f"{name} += {step}"
    return f"for (int {name} = {first}; {name} < {end}; {by})"


def _index(terms: Sequence[tuple[str, int]]) -> str:
    parts = [v if s == 1 else str(int(v) * s) if v.isdigit() else f"{v} * {s}" for v, s in terms if s and v != "0"]
    return " + ".join(parts) or "0"


class Writer:
    """The text of a function.

    Attributes:
        lines: so far.
        at: the variables of the loops that are open, with the strides of all operands in them.
        tiles: how many fetch something.
        times: how often what is in the loops that are open runs.
    """

    def __init__(self, p: Product, lanes: int, far: bool) -> None:
        """
        Args:
            p: what it computes.
            lanes: numbers in a vector.
            far: each tile fetches some of what is read next.
        """
        self.far, self.tiles, self.times = far, 0, 1
        self.p, self.lanes, self.kind = p, lanes, TYPES[p.dot.dtype]
        self.vector, self.several = f"{self.kind}{lanes}", len(p.dot.pairs) > 1
        self.lines: list[str] = []
        self.at: list[At] = []
        self.outside: list[Sum] = []  # loops over parts of the sums that are open
        self.pad = "  "

    def whole(self, lists: bool) -> str:
        """The function; its second operands are an array of pointers, or one."""
        a = f"const {self.kind} *const *a" if self.several else f"const {self.kind} *restrict a"
        w = f"const {self.kind} *const *w" if lists else f"const {self.kind} *restrict w"
        others = [f"const {TYPES[v.buffer.dtype]} *restrict e{i}" for i, v in enumerate(self.p.others)]  # type: ignore[union-attr]
        head = ", ".join([a, w, *others, f"{TYPES[self.p.value.dtype]} *restrict out"])
        head += ", Ahead ahead, int lines" if self.far else ""
        return "\n".join([f"static void NAME({head})", "{", *self.lines, "}"])

    def line(self, text: str) -> None:
        """One more."""
        self.lines.append(self.pad + text)

    def index(self, place: int, more: Sequence[At] = ()) -> str:
        """The address of an operand's entry, in the loops' variables and some more."""
        return _index([(name, strides[place]) for name, strides in (*self.at, *more)])

    # -- loops ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def within(self, heads: Sequence[str], times: int = 1, at: Sequence[At] = ()) -> Iterator[None]:
        """Blocks that are open for a while.

        Args:
            heads: what stands before each.
            times: how often the innermost runs.
            at: the variables of loops.
        """
        outer, count = self.pad, len(self.at)
        for head in heads:
            self.line(f"{head} {{".lstrip())
            self.pad += "  "
        self.at += at
        self.times *= times
        yield
        self.times //= times
        del self.at[count:]
        self.close(outer)

    @contextmanager
    def loops(self, name: str, axes: Sequence[Axis]) -> Iterator[None]:
        """Loops over axes of the result."""
        heads = [_head(f"{name}{i}", size) for i, (size, _) in enumerate(axes)]
        with self.within(heads, entries(axes), [(f"{name}{i}", strides) for i, (_, strides) in enumerate(axes)]):
            yield

    @contextmanager
    def parts(self, sums: Sequence[Sum]) -> Iterator[None]:
        """Loops over parts of the sums, each of which is added to what lies in the result."""
        self.outside = list(sums)
        with self.within([_head(x.name, x.size) for x in sums], prod(x.size for x in sums)):
            if sums:
                self.line(f"const bool first = {' && '.join(f'{x.name} == 0' for x in sums)};")
                self.line(f"const bool last = {' && '.join(f'{x.name} == {x.size - 1}' for x in sums)};")
            yield
        self.outside = []

    @contextmanager
    def channels(self, last: Axis, vectors: int) -> Iterator[None]:
        """A loop over vectors of channels, of which the last begins earlier, where that makes it whole."""
        size, strides = last
        step = vectors * self.lanes
        with self.within([_head("i", size, step=step)], -(-size // step), [("c", strides)]):
            self.line(f"const int c = {'i' if size % step == 0 else f'i < {size - step} ? i : {size - step}'};")
            yield

    @contextmanager
    def each(self, name: str, first: int, step: int, times: int) -> Iterator[str]:
        """A loop, or a block if it runs once; its variable, or the number that this would have."""
        head = _head(name, first + step * times, first, step) if times > 1 else ""
        with self.within([head], times):
            yield name if times > 1 else str(first)

    def grid(
        self, m: Sequence[Axis], row: Axis, rows: int, panels: Sequence[Panel], by_rows: bool, sums: Sequence[Sum],
        columns: Axis, packed: bool = True,
    ) -> None:  # fmt: skip
        """Tiles of rows and columns.

        Args:
            m: the axes of rows.
            row: the one of which a tile takes some.
            rows: how many.
            panels: of columns.
            by_rows: all panels of some rows, then the next rows; not all rows of a panel, then the next panel.
            sums: what a tile sums up, with the strides of the second operand in columns of a panel if it is packed.
            columns: the axis of columns.
            packed: it is.
        """
        parts, beside = row_parts(row[0], rows), [x for x in m if x is not row]

        def tiles(part: tuple[int, int, int], panel: Panel, m: str, c: str) -> None:
            first, width, times, place, apart = panel
            w_at = [*place, (f"({c} - {first})" if first else c, apart)] if times > 1 else list(place)
            scale = width if packed else 1
            w_at += [(x.name, x.w * scale) for x in self.outside]
            scaled = [replace(x, w=x.w * scale) for x in sums]
            self.tile((m, row[1]), part[1], (c, columns[1]), width, min(width, columns[0]), w_at, scaled)

        if by_rows:
            with self.loops("m", beside):
                for part in parts:
                    with self.each("m", *part) as m_at:
                        for panel in panels:
                            with self.each("c", *panel[:3]) as c_at:
                                tiles(part, panel, m_at, c_at)
            return
        for panel in panels:
            with self.each("c", *panel[:3]) as c_at, self.loops("m", beside):
                for part in parts:
                    with self.each("m", *part) as m_at:
                        tiles(part, panel, m_at, c_at)

    # -- tiles ---------------------------------------------------------------------------------------------------------

    def fetch(self) -> None:
        """Bring nearer some of what is read next."""
        if self.far:
            self.line("fetch(&ahead, lines);")
            self.tiles += self.times

    def sums(self, rows: int, vectors: int, copies: int = 1) -> list[list[list[str]]]:
        """The variables of a tile, ``[row][vector][copy]``."""
        ends = ["a", "b"] if copies > 1 else [""]
        names = [[[f"s{r}_{v}{x}" for x in ends] for v in range(vectors)] for r in range(rows)]
        for row in names:
            self.line(f"{self.vector} " + ", ".join(f"{x} = {{0}}" for v in row for x in v) + ";")
        return names

    def over(self, sums: Sequence[Sum], row: At, w_at: Terms, step: int) -> None:
        """The heads of the loops over what is summed up, and where they begin in the operands."""
        short = prod(x.size for x in sums if x.name != "t") <= 32
        if sums and sums[0].name == "t":
            self.line(f"for (int t = 0; t < {sums[0].size}; t++) {{")
            self.pad += "  "
            w_at = [*w_at, ("t", sums[0].w)]
            sums = sums[1:]
        within = [(x.name, x.a) for x in self.outside]
        at = _index([(self.index(A, [row]), 1), *within])
        self.line(f"const {self.kind} *restrict x = a{'[t]' * self.several} + {at};")
        self.line(f"const {self.kind} *restrict y = w + {_index(w_at)};")
        for i, x in enumerate(sums):
            if short:
                self.lines.append(f"#pragma GCC unroll {x.size}")
            by = step if i == len(sums) - 1 else 1
            self.line("  " * i + f"for (int {x.name} = 0; {x.name} < {x.size}; {x.name} += {by})")
        self.line("{")
        self.pad += "  "

    def tile(
        self, row: At, rows: int, column: At, width: int, there: int,
        w_at: Terms, sums: Sequence[Sum],
    ) -> None:  # fmt: skip
        """Some rows of a panel: each vector of the second operand times numbers of the first."""
        vectors, k = width // self.lanes, [x for x in sums if x.name != "t"]
        copies = 2 if rows * vectors <= 4 and k and k[-1].size % 2 == 0 else 1  # enough sums to hide what one takes
        self.fetch()
        made, outer = self.sums(rows, vectors, copies), self.pad
        if self.outside:
            with self.within(["if (!first)"]):
                for r, totals in enumerate(made):
                    for v, (total, *_) in enumerate(totals):
                        self.line(f"{total} = *({self.vector} *)(out + {self.place(row, column, r, v)});")
        self.over(sums, row, w_at, copies)
        a_k, w_k = [(x.name, x.a) for x in k], [(x.name, x.w) for x in k]
        for c in range(copies):
            a_more, w_more = (k[-1].a, k[-1].w) if c else (0, 0)
            for r in range(rows):
                self.line(f"const {self.kind} x{r}_{c} = x[{_index([*a_k, (str(r * row[1][A] + a_more), 1)])}];")
            for v in range(vectors):
                place = _index([*w_k, (str(v * self.lanes + w_more), 1)])
                self.line(f"{self.vector} w{v}_{c} = *(const {self.vector} *)(y + {place});")
                if rows > 1:
                    self.line(f"IN_REGISTER(w{v}_{c});")
            for r in range(rows):
                for v in range(vectors):
                    self.line(f"{made[r][v][c]} += x{r}_{c} * w{v}_{c};")
        self.close(outer)
        totals = [[" + ".join(x) for x in s] for s in made]
        if self.outside and self.p.value.expression != self.p.dot:
            with self.within(["if (!last)"]):
                self.straight(totals, row, column, there)
            with self.within(["else"]):
                self.store(totals, row, column, there)
        else:
            self.store(totals, row, column, there)

    def taps(
        self, row: At, rows: int, vectors: int, w_at: Terms, last: Axis,
        sums: Sequence[Sum],
    ) -> None:  # fmt: skip
        """Some rows of vectors of channels, each of which has its own weights."""
        self.fetch()
        made, outer = self.sums(rows, vectors), self.pad
        self.over(sums, row, w_at, 1)
        k = [x for x in sums if x.name != "t"]
        a_k, w_k = [(x.name, x.a) for x in k], [(x.name, x.w) for x in k]
        for v in range(vectors):
            place = _index([*w_k, (str(v * self.lanes), 1)])
            self.line(f"const {self.vector} w{v} = *(const {self.vector} *)(y + {place});")
            for r in range(rows):
                place = _index([*a_k, (str(r * row[1][A] + v * self.lanes), 1)])
                self.line(f"s{r}_{v} += *(const {self.vector} *)(x + {place}) * w{v};")
        self.close(outer)
        self.store([[x[0] for x in s] for s in made], row, ("0", last[1]), vectors * self.lanes)

    def close(self, outer: str) -> None:
        """The ends of the loops within some place."""
        while len(self.pad) > len(outer):
            self.pad = self.pad[:-2]
            self.line("}")

    def place(self, row: At, column: At, r: int, v: int) -> str:
        """Where a vector of a tile goes."""
        return _index([(self.index(OUT, [row, column]), 1), (str(r * row[1][OUT] + v * self.lanes), 1)])

    def straight(self, sums: list[list[str]], row: At, column: At, width: int) -> None:
        """A tile's sums on their way out."""
        for r, totals in enumerate(sums):
            for v, total in enumerate(totals):
                at, left = self.place(row, column, r, v), width - v * self.lanes
                if left >= self.lanes:
                    self.line(f"*({self.vector} *)(out + {at}) = {total};")
                else:
                    self.line(f"{{ {self.vector} s = {total}; memcpy(out + {at}, &s, {left} * sizeof *out); }}")

    def store(self, sums: list[list[str]], row: At, column: At, width: int) -> None:
        """A tile's entries on their way out, ``[row][vector]``."""
        rows, vectors, strides = len(sums), len(sums[0]), row[1]
        if self.p.value.expression == self.p.dot and (column[1][OUT] == 1 or width == 1):
            self.straight(sums, row, column, width)
            return
        room = vectors * self.lanes
        self.line(f"{self.kind} tile[{rows * room}];")
        for r, totals in enumerate(sums):
            for v, total in enumerate(totals):
                self.line(f"*({self.vector} *)(tile + {r * room + v * self.lanes}) = {total};")
        within = [row, column, ("j", column[1])]
        if rows > 1:
            self.line(f"for (int r = 0; r < {rows}; r++)")
            within.append(("r", strides))
        self.lines.append("#pragma GCC ivdep")
        self.line(f"for (int j = 0; j < {width}; j++) {{")
        self.entry(within, f"tile[{_index([('r', room * (rows > 1)), ('j', 1)])}]", "  ")
        self.line("}")

    def entry(self, within: Sequence[At], dot: str, pad: str = "") -> None:
        """What an entry of the result is, of its sum of products."""

        def read(view: View) -> str:
            i = self.p.others.index(view)
            return f"e{i}[{self.index(OUT + 1 + i, within)}]"

        declared, text = written(self.p.value.expression, read, dot)
        for x in declared:
            self.line(pad + x)
        self.line(f"{pad}out[{self.index(OUT, within)}] = {text};")

    def alone(self) -> None:
        """One entry."""
        k, outer = self.p.k, self.pad
        self.line(f"{self.kind} sum = 0;")
        which = "[t]" * self.several
        if self.several:
            self.line(f"for (int t = 0; t < {len(self.p.dot.pairs)}; t++) {{")
            self.pad += "  "
        self.line(f"const {self.kind} *restrict x = a{which} + {self.index(A)};")
        self.line(f"const {self.kind} *restrict y = w{which} + {self.index(W)};")
        for i, (size, strides) in enumerate(k):
            if i == len(k) - 1 and strides == (1, 1) and self.p.dot.dtype in FLOATS:
                self.lines.append("#pragma omp simd reduction(+:sum)")
            self.line("  " * i + f"for (int k{i} = 0; k{i} < {size}; k{i}++)")
        x, y = (_index([(f"k{i}", t[place]) for i, (_, t) in enumerate(k)]) for place in (A, W))
        self.line("  " * len(k) + f"sum += x[{x}] * y[{y}];")
        self.close(outer)
        self.entry([], "sum")
