"""How sums of products are computed: in what order, by how large tiles, and how constants lie for that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch

from .expressions import Dot, Value
from .operators import FLOATS, TYPES
from .products import OUT, A, Axis, Product, Target, W, entries, merged, product
from .statements import Lines
from .tiles import Sum, Writer, panels_of, row_parts, sums_of
from .views import Buffer, NoView, View

CACHED = 1 << 17  # bytes of weights up to which they are read again for every few rows, not the rows for all of them
DEEP = 512  # products that are summed up at a time: the operands of several tiles then stay in the caches
BLOCK = 160 << 10  # bytes of rows that are multiplied by all columns before the next ones


class Kernels:
    """The C functions of sums of products, each written once.

    Attributes:
        target: what they are for.
        functions: by their text, their names.
        packed: constants as the loops read them.
        multiplies: of all products so far.
    """

    def __init__(self, target: Target, far: bool = False) -> None:
        """
        Args:
            target: what they are for.
            far: more is read than the caches hold: while a function computes, it fetches what the next ones read.
        """
        self.target, self.far = target, far
        self.functions: dict[str, str] = {}
        self.packed: list[Buffer] = []
        self._known: dict[Any, Buffer] = {}
        self.multiplies = 0

    def compute(self, value: Value, dot: Dot, to: View, name: str) -> Lines:
        """The statement that computes an expression which holds one sum of products.

        Args:
            value: the expression.
            dot: the sum.
            to: where the entries go.
            name: for the reader.

        Raises:
            NoView: that takes the sum in a buffer of its own first.
        """
        p = product(value, dot, to)
        lanes, sizes, fixed = self.target.lanes(dot.dtype), p.sizes(), dot.pairs[0][1].constant
        floats = dot.dtype in FLOATS
        across = _merged_across(p.b)
        if floats and fixed and sizes[0] >= lanes > sizes[2] and across[-1][0] >= lanes and across[-1][1][A] == 1:
            writer, w = self._across(p, across)
        elif floats and fixed and sizes[2] >= 2:
            writer, w = self._packed(p)
        elif floats and not fixed and (n := merged(p.n)) and n[-1][1][W] == 1 and n[-1][0] >= lanes:
            writer, w = self._rows(p, n)
        else:
            writer, w = self._plain(p)
        self.multiplies += prod(sizes)
        times = f", {sizes[0]} times" if sizes[0] > 1 else ""
        arguments = [
            _list([a.pointer for a, _ in dot.pairs], dot.dtype),
            _list(w, dot.dtype),
            *(v.pointer for v in p.others),
            to.pointer,
            *(["{ahead}"] if writer.far else []),
        ]
        text = [
            f"/* {dot.name} to {name}: {sizes[1]} x {sizes[3]} times {sizes[3]} x {sizes[2]}{times} */",
            f"{self._function(sizes, writer.whole(len(w) > 1))}({', '.join(arguments)});",
        ]
        return Lines(text, writer.tiles)

    def _function(self, sizes: Sequence[int], text: str) -> str:
        if text not in self.functions:
            b, m, n, k = sizes
            self.functions[text] = f"product_{len(self.functions)}_{f'{b}x' if b > 1 else ''}{m}x{k}x{n}"
        return self.functions[text]

    def source(self) -> list[str]:
        """All functions in C."""
        return [line for text, name in self.functions.items() for line in (text.replace("NAME", name), "")]

    def constant(self, tensor: torch.Tensor) -> Buffer:
        """A constant that a program reads as it is."""
        self.packed.append(Buffer(f"w{len(self.packed)}", tensor.dtype, tensor.numel(), tensor.contiguous()))
        return self.packed[-1]

    def hold(self, view: View) -> Buffer:
        """A constant's entries, put in the order of a view."""
        axes = [(n, (s,)) for dim in view.dims for n, s in dim]
        return self._stored([view], axes, "as it is", lambda whole: whole[0])

    def _stored(
        self, of: Sequence[View], axes: Sequence[Axis], how: str, lay: Callable[[torch.Tensor], torch.Tensor]
    ) -> Buffer:
        """Constants, ``[which, axes...]``, laid out once for all that read them so."""
        key = tuple((id(v.buffer.tensor), v.offset) for v in of), tuple(axes), how  # type: ignore[union-attr]
        if key not in self._known:
            self._known[key] = self.constant(lay(torch.stack([_gathered(v, axes) for v in of])))
        return self._known[key]

    # -- ways ----------------------------------------------------------------------------------------------------------

    def _packed(self, p: Product) -> tuple[Writer, list[str]]:
        """A constant second operand, stored as ``[b][panel][operand][k][entries of n in a panel]``."""
        lanes, b, m, columns = self.target.lanes(p.dot.dtype), merged(p.b), merged(p.m), _columns(p.n)
        many, depth, size = columns[0], p.depth, p.dot.dtype.itemsize
        total = depth * len(p.dot.pairs)
        by_rows = total * many * size <= CACHED
        sums = sums_of(p, _row_strides([x[0] for x in p.k], 1), depth)
        parts_of_sums: list[Sum] = []
        if not by_rows and many % lanes == 0 and columns[1][OUT] == 1 and p.value.dtype == p.dot.dtype:
            parts_of_sums, sums = _in_parts(sums)
        outer, m = ([], m) if by_rows else _in_blocks(m, BLOCK // (prod(x.size for x in sums) * size))
        row = _row(p, m)
        width, rows = self._tile(row[0], -(-many // lanes))
        panels = panels_of(many, width * lanes, lanes)
        room = sum(w * times for _, w, times in panels)

        def lay(whole: torch.Tensor) -> torch.Tensor:
            """``[operand, b, k, n]`` as panels."""
            whole = whole.reshape(len(p.dot.pairs), -1, depth, many).permute(1, 0, 2, 3)
            whole = torch.nn.functional.pad(whole, (0, max(0, panels[0][1] - many)))
            firsts = [(at + i * w, w) for at, w, times in panels for i in range(times)]
            return torch.cat([whole[..., at : at + w].flatten(1) for at, w in firsts], 1)

        axes = [*((s, (t[W],)) for s, t in b), *((s, (t[1],)) for s, t in p.k), *((s, (t[W],)) for s, t in p.n)]
        held = self._stored([w for _, w in p.dot.pairs], axes, f"panels {panels}", lay)
        writer = Writer(p, lanes, self.far)
        place = [(f"b{i}", s) for i, s in enumerate(_row_strides([x[0] for x in b], total * room))]
        behind, parts = 0, []
        for at, w, times in panels:
            parts.append((at, w, times, [*place, (str(behind), 1)], total))
            behind += w * times * total
        with writer.loops("b", b), writer.parts(parts_of_sums), writer.loops("o", outer):
            writer.grid(m, row, rows, parts, by_rows, sums, columns)
        return writer, [held.name]

    def _rows(self, p: Product, n: list[Axis]) -> tuple[Writer, list[str]]:
        """A second operand that is computed, with its last `n` side by side."""
        lanes, b, m = self.target.lanes(p.dot.dtype), merged(p.b), merged(p.m)
        *above, columns = n
        row = _row(p, m)
        width, rows = self._tile(row[0], columns[0] // lanes)
        writer = Writer(p, lanes, self.far)
        panels = panels_of(columns[0], width * lanes, lanes)
        sums = sums_of(p, [t[1] for _, t in p.k], 0)
        with writer.loops("b", [*b, *above]):
            place = [(name, strides[W]) for name, strides in writer.at]
            parts = [(at, w, times, [*place, (str(at), 1)], 1) for at, w, times in panels]
            writer.grid(m, row, rows, parts, False, sums, columns, packed=False)
        return writer, [p.dot.pairs[0][1].pointer]

    def _tile(self, rows: int, vectors: int) -> tuple[int, int]:
        """Vectors of a panel, and rows of a tile, that take least work: sums of products, or loading the operands."""
        best: tuple[float, int, int] | None = None
        for width in range(min(4, vectors), 0, -1):
            held = (self.target.registers - 1 - width) // width  # rows whose sums stay beside what they are sums of
            block = _even(rows, min(8, max(1, held)))
            full, rest = divmod(vectors, width)
            work = full * max(block * width, block + width, 4) + (max(block * rest, block + rest, 4) if rest else 0)
            cost = work * -(-rows // block)
            if best is None or cost < best[0]:
                best = cost, width, block
        assert best is not None
        return best[1], best[2]

    def _across(self, p: Product, b: list[Axis]) -> tuple[Writer, list[str]]:
        """A constant second operand with many `b`, which lie innermost: stored as ``[b...][n][operand][k][last b]``."""
        lanes, pairs = self.target.lanes(p.dot.dtype), len(p.dot.pairs)
        *above, last = b
        outer = [*above, *p.n]
        axes = [*((s, (t[W],)) for s, t in outer), *((s, (t[1],)) for s, t in p.k), (last[0], (last[1][W],))]
        size = p.depth * last[0]

        def lay(whole: torch.Tensor) -> torch.Tensor:
            return whole.reshape(pairs, -1, size).permute(1, 0, 2)

        held = self._stored([w for _, w in p.dot.pairs], axes, "operands inside", lay)
        writer = Writer(p, lanes, self.far)
        row = _row(p, p.m)
        block = _even(row[0], 8)
        most = max(1, min(8 // block, last[0] // lanes))
        vectors = min(range(1, most + 1), key=lambda v: (-(-last[0] // (v * lanes)) * v, -v))
        place = [(f"b{i}", s) for i, s in enumerate(_row_strides([x[0] for x in outer], pairs * size))]
        beside = [x for x in p.m if x is not row]
        sums = sums_of(p, _row_strides([x[0] for x in p.k], last[0]), size)
        with writer.loops("b", outer), writer.loops("m", beside):
            for first, count, times in row_parts(row[0], block):
                with writer.each("m", first, count, times) as at, writer.channels(last, vectors):
                    writer.taps((at, row[1]), count, vectors, [*place, ("c", 1)], last, sums)
        return writer, [held.name]

    def _plain(self, p: Product) -> tuple[Writer, list[str]]:
        """Sum by sum; vectors along `k` where it lies side by side in both."""
        writer = Writer(p, 1, False)
        axes = [*merged(p.b), *merged(p.m), *merged(p.n)]
        with writer.loops("b", axes):
            writer.alone()
        return writer, [w.pointer for _, w in p.dot.pairs]


def _in_parts(sums: list[Sum]) -> tuple[list[Sum], list[Sum]]:
    """Long sums as loops over parts of them, and what is within a part: about `DEEP` products."""
    outer: list[Sum] = []
    while (count := prod(x.size for x in sums)) > DEEP * 3 // 2:
        first, *rest = sums
        below = count // first.size
        if below >= DEEP // 4 or first.name == "t":
            outer, sums = [*outer, first], rest
            continue
        each = _divisor(first.size, DEEP // below)
        if each * below < DEEP // 4:
            break
        outer.append(Sum(f"{first.name}_", first.size // each, first.a * each, first.w * each))
        return outer, [replace(first, size=each), *rest]
    return outer, sums


def _in_blocks(m: list[Axis], most: int) -> tuple[list[Axis], list[Axis]]:
    """Rows as axes of blocks, and the axes of the rows of a block: about so many."""
    outer: list[Axis] = []
    while m and (count := entries(m)) > most * 3 // 2:
        (size, strides), *rest = m
        below = count // size
        if below >= most:
            outer, m = [*outer, m[0]], rest
            continue
        each = _divisor(size, max(1, most // below))
        if each * below < most // 4:
            break
        outer.append((size // each, tuple(s * each for s in strides)))
        return outer, [(each, strides), *rest] if each > 1 else rest
    return outer, m


def _divisor(n: int, most: int) -> int:
    """The largest one up to a number."""
    return max(d for d in range(1, min(n, most) + 1) if n % d == 0)


def _merged_across(b: list[Axis]) -> list[Axis]:
    """Axes of which the one that lies innermost in the first operand is the last."""
    return merged(sorted(b, key=lambda x: -abs(x[1][A])))


def _list(pointers: Sequence[str], dtype: torch.dtype) -> str:
    """One pointer, or many as an array."""
    if len(pointers) == 1:
        return pointers[0]
    return f"(const {TYPES[dtype]} *const[]){{{', '.join(pointers)}}}"


def _columns(n: Sequence[Axis]) -> Axis:
    """All columns as one axis of what is read and written besides the second operand.

    Raises:
        NoView: they do not lie evenly.
    """
    found = merged([(size, (0, 0, *strides[OUT:])) for size, strides in n])
    if len(found) != 1:
        raise NoView
    return found[0]


def _row(p: Product, m: Sequence[Axis]) -> Axis:
    """The axis of which tiles take some entries: that which lies innermost, unless it has but few."""
    if not m:
        return 1, (0,) * (OUT + 1 + len(p.others))
    return m[-1] if m[-1][0] >= 4 else max(m, key=lambda x: x[0])


def _even(rows: int, most: int) -> int:
    """The size of blocks of at most so many rows, as even as can be."""
    return -(-rows // -(-rows // min(rows, most)))


def _gathered(view: View, axes: Sequence[Axis]) -> torch.Tensor:
    """A constant with these axes as dimensions."""
    assert view.buffer is not None and view.buffer.tensor is not None
    place = torch.tensor(view.offset)
    for size, strides in axes:
        place = place[..., None] + torch.arange(size) * strides[0]
    return view.buffer.tensor.contiguous().reshape(-1)[place]


def _row_strides(sizes: Sequence[int], inner: int) -> list[int]:
    """The strides of dimensions without gaps, of which the last has entries of so many numbers."""
    strides, stride = [], inner
    for size in reversed(sizes):
        strides.append(stride)
        stride *= size
    return strides[::-1]
