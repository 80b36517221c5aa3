"""Sums of products in C, matrix products and convolutions: ``out[b, m, n] = sum over k of a[b, m, k] * w[b, k, n]``.

Each of `b`, `m`, `n` and `k` may be several dimensions. What lies innermost in vectors is

- `n`, if the second operand is a constant, which is stored as the loops read it, or has its `n` side by side,
- `b`, if there are many of these and few `n`: depthwise convolutions,
- `k`, summed up in the end, where both operands have it side by side.

A row of vectors of the result stays in registers over all of `k`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from .operators import FLOATS, TYPES
from .views import Buffer, Dim, View, refine, size_of, split

Axis = tuple[int, tuple[int, ...]]  # a size, and the strides of all operands in it


@dataclass(frozen=True)
class Target:
    """What the compiler compiles for.

    Attributes:
        bytes: of a vector register.
        registers: vectors that fit in them.
    """

    bytes: int = 16
    registers: int = 16

    def lanes(self, dtype: torch.dtype) -> int:
        """Numbers in a vector."""
        return max(1, self.bytes // dtype.itemsize)


@dataclass
class Product:
    """A sum of products.

    Attributes:
        a, w: the operands.
        b, k: dimensions of both, as pairs.
        m, n: dimensions of one of them.
        start: what sums begin with, for each entry of `n` (with many b and few n: of `b` and `n`), or None.
        name: for the reader.
    """

    a: View
    w: View
    b: list[tuple[Dim, Dim]]
    m: list[Dim]
    n: list[Dim]
    k: list[tuple[Dim, Dim]]
    dtype: torch.dtype
    name: str


def _axes(pairs: Sequence[Sequence[Dim]]) -> list[Axis]:
    """Dimensions of several operands, cut into factors that all of them have; those that continue each other as one."""
    axes: list[Axis] = []
    for dims in pairs:
        size = next((size_of(d) for d in dims if d), 1)
        sizes = refine([d for d in dims if d] or [((size, 0),)])
        strides = [split(d, sizes) if d else [0] * len(sizes) for d in dims]
        axes += [(n, tuple(s[i] for s in strides)) for i, n in enumerate(sizes) if n > 1]
    return axes


def merged(axes: Sequence[Axis]) -> list[Axis]:
    """Axes, each of which continues none of those before it."""
    found: list[Axis] = []
    for size, strides in axes:
        if found and all(s == t * size for s, t in zip(found[-1][1], strides, strict=True)):
            found[-1] = found[-1][0] * size, strides
        else:
            found.append((size, strides))
    return found


def _index(terms: Sequence[tuple[str, int]]) -> str:
    parts = [v if s == 1 else f"{v} * {s}" for v, s in terms if s and v != "0"]
    return " + ".join(parts) or "0"


class Kernels:
    """The C functions of sums of products, each written once.

    Attributes:
        target: what they are for.
        functions: by their text, their names.
        packed: constants as the loops read them.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.functions: dict[str, str] = {}
        self.packed: list[Buffer] = []
        self._known: dict[Any, Buffer] = {}
        self.multiplies = 0

    def call(self, p: Product, out: View, out_dims: tuple[list[Dim], list[Dim], list[Dim]]) -> list[str]:
        """The lines that compute a sum of products.

        Args:
            p: of what.
            out: where it goes.
            out_dims: its dimensions `b`, `m` and `n`.
        """
        ob, om, on = out_dims
        b = _axes([(*pair, o) for pair, o in zip(p.b, ob, strict=True)])
        m = _axes(list(zip(p.m, om, strict=True)))
        n = _axes(list(zip(p.n, on, strict=True)))
        k = merged(sorted(_axes(p.k), key=lambda x: -abs(x[1][0])))
        sizes = [prod(x[0] for x in axes) for axes in (b, m, n, k)]
        self.multiplies += prod(sizes)
        lanes = self.target.lanes(p.dtype)
        tensor = None if p.w.buffer is None else p.w.buffer.tensor
        floats = p.dtype in FLOATS
        across = (
            floats and tensor is not None and sizes[0] >= lanes and sizes[2] < lanes and bool(b) and b[-1][0] >= lanes
        )
        if across:
            body, arguments = self._across(p, out, b, m, n, k)
        elif floats and tensor is not None and sizes[2] >= 2:
            body, arguments = self._packed(p, out, merged(b), merged(m), n, k)
        elif floats and n and merged(n)[-1][1][0] == 1 and merged(n)[-1][0] >= lanes:
            body, arguments = self._rows(p, out, merged(b), merged(m), merged(n), k)
        else:
            body, arguments = self._plain(p, out, merged(b), merged(m), merged(n), k)
        times = f", {sizes[0]} times" if sizes[0] > 1 else ""
        return [
            f"/* {p.name}: {sizes[1]} x {sizes[3]} times {sizes[3]} x {sizes[2]}{times} */",
            f"{self._function(sizes, body)}({', '.join(arguments)});",
        ]

    def _function(self, sizes: Sequence[int], body: Sequence[str]) -> str:
        text = "\n".join(body)
        if text not in self.functions:
            b, m, n, k = sizes
            self.functions[text] = f"product_{len(self.functions)}_{f'{b}x' if b > 1 else ''}{m}x{k}x{n}"
        return self.functions[text]

    def source(self) -> list[str]:
        """All functions in C."""
        lines: list[str] = []
        for text, name in self.functions.items():
            lines += [text.replace("NAME", name), ""]
        return lines

    def constant(self, tensor: torch.Tensor) -> Buffer:
        """A constant that a program reads as it is."""
        self.packed.append(Buffer(f"w{len(self.packed)}", tensor.dtype, tensor.numel(), tensor.contiguous()))
        return self.packed[-1]

    def hold(self, view: View) -> Buffer:
        """A constant's entries, put in the order of a view."""
        axes = [(n, (s,)) for dim in view.dims for n, s in dim]
        return self._stored(view, axes, "as it is", lambda whole: whole)

    def _stored(
        self, view: View, axes: Sequence[Axis], how: str, lay: Callable[[torch.Tensor], torch.Tensor]
    ) -> Buffer:
        """A constant, laid out once for all that read it so."""
        assert view.buffer is not None and view.buffer.tensor is not None
        key = id(view.buffer.tensor), view.offset, tuple(axes), how
        if key not in self._known:
            self._known[key] = self.constant(lay(_gathered(view, axes)))
        return self._known[key]

    # -- ways ----------------------------------------------------------------------------------------------------------

    def _packed(
        self, p: Product, out: View, b: list[Axis], m: list[Axis], n: list[Axis], k: list[Axis]
    ) -> tuple[list[str], list[str]]:
        """A constant second operand, stored as ``[b][panel][k][entries of n in a panel]``."""
        lanes, kind = self.target.lanes(p.dtype), TYPES[p.dtype]
        many, depth = _entries(n), _entries(k)
        step = self._panel(max((x[0] for x in m), default=1), -(-many // lanes)) * lanes
        room = -(-many // lanes) * lanes  # filled up with zeros
        widths = [(at, min(step, room - at)) for at in range(0, room, step)]

        def lay(whole: torch.Tensor) -> torch.Tensor:
            whole = torch.nn.functional.pad(whole.reshape(-1, depth, many), (0, room - many))
            return torch.cat([whole[:, :, at : at + width].flatten(1) for at, width in widths], 1)

        axes = [*((s, (t[1],)) for s, t in b), *((s, (t[1],)) for s, t in k), *((s, (t[0],)) for s, t in n)]
        held = self._stored(p.w, axes, f"panels {widths}", lay)
        lines = self._head(p.dtype)
        body = _Body(lines, p.dtype, lanes, k, _row_strides([x[0] for x in k], 1), merged([(s, (t[1],)) for s, t in n]))
        body.open(b, m)
        strides = _row_strides([x[0] for x in b], depth * room)
        w_at = [(f"b{i}", stride) for i, stride in enumerate(strides)]
        for first, width, times in _alike_panels(widths, many if body.even else 0, many):
            column = self._columns(body, first, width, times)
            place = _index([*w_at, (column, depth) if times > 1 else (str(depth * first), 1)])
            body.line(f"  const {kind} *restrict panel = w + {place};")
            self._blocks(body, width, min(width, many - first), column, width)
            body.line("}")
        body.close()
        return lines, self._arguments(p, out, held.name)

    def _rows(
        self, p: Product, out: View, b: list[Axis], m: list[Axis], n: list[Axis], k: list[Axis]
    ) -> tuple[list[str], list[str]]:
        """A second operand that is computed, with its last `n` side by side."""
        lanes, kind = self.target.lanes(p.dtype), TYPES[p.dtype]
        *above, (many, (_, out_stride)) = n
        lines = self._head(p.dtype)
        body = _Body(lines, p.dtype, lanes, k, [t[1] for _, t in k], [(many, (out_stride,))])
        body.open(b, m)
        w_at = [(f"b{i}", t[1]) for i, (_, t) in enumerate(b)]
        for i, (size, (ws, os)) in enumerate(above):
            body.line(f"for (int n{i} = 0; n{i} < {size}; n{i}++) {{")
            w_at.append((f"n{i}", ws))
            body.o_at.append((f"n{i}", os))
        step, room = self._panel(max((x[0] for x in m), default=1), many // lanes) * lanes, many // lanes * lanes
        widths = [(at, min(step, room - at)) for at in range(0, room, step)]
        for first, width, times in _alike_panels(widths, many, many):
            column = self._columns(body, first, width, times)
            body.line(f"  const {kind} *restrict panel = w + {_index([*w_at, (column, 1)])};")
            self._blocks(body, width, width, column, 1)
            body.line("}")
        if room < many:
            body.tail(room, many, w_at, out_stride)
        for _ in above:
            body.line("}")
        body.close()
        assert p.w.buffer is not None
        return lines, self._arguments(p, out, p.w.buffer.name, p.w.offset)

    def _columns(self, body: _Body, first: int, width: int, times: int) -> str:
        """Panels one after the other; the first column of each."""
        if times == 1:
            body.line(f"{{ /* columns {first} to {first + width - 1} */")
            return str(first)
        body.line(f"for (int c = {first}; c < {first + width * times}; c += {width}) {{")
        return "c"

    def _panel(self, rows: int, vectors: int) -> int:
        """Vectors of a panel: so that a block of rows of them fits into registers."""
        most = 24 if self.target.registers >= 32 else 12
        widest = 8 if self.target.registers >= 32 else 4
        fits = next(
            x for x in (8, 4, 3, 2, 1) if x <= widest and (x * min(rows, 8) <= most or x == (4 if most == 24 else 2))
        )
        return max(1, min(fits, vectors))

    def _head(self, dtype: torch.dtype) -> list[str]:
        kind = TYPES[dtype]
        return [f"static void NAME(const {kind} *restrict a, const {kind} *restrict w, {kind} *restrict out)", "{"]

    def _arguments(self, p: Product, out: View, w: str, offset: int = 0) -> list[str]:
        def place(name: str, at: int) -> str:
            return f"{name} + {at}" if at else name

        return [place(p.a.buffer.name, p.a.offset), place(w, offset), place(out.buffer.name, out.offset)]  # type: ignore[union-attr]

    def _blocks(self, body: _Body, width: int, wide: int, column: str, w_row: int) -> None:
        """The rows of a panel, some at a time: their sums are in registers."""
        vectors = width // body.lanes
        most = 24 if self.target.registers >= 32 else 12
        size = body.row[0]
        block = min(size, max(1, most // vectors), 8)
        block = -(-size // -(-size // block))  # as even as can be
        full, rest = divmod(size, block)
        if full > 1:
            body.line(f"  for (int m = 0; m < {full * block}; m += {block})")
        if full:
            body.block("m" if full > 1 else "0", block, vectors, wide, column, w_row)
        if rest:
            body.block(str(full * block), rest, vectors, wide, column, w_row)

    def _across(
        self, p: Product, out: View, b: list[Axis], m: list[Axis], n: list[Axis], k: list[Axis]
    ) -> tuple[list[str], list[str]]:
        """A constant second operand with many `b`, which lie innermost: stored as ``[b...][n][k][last b]``."""
        kind, lanes = TYPES[p.dtype], self.target.lanes(p.dtype)
        b = merged(sorted(b, key=lambda x: -abs(x[1][0])))
        *above, (many, (a_b, _, o_b)) = b
        order = [
            *((s, (t[1],)) for s, t in above),
            *((s, (t[0],)) for s, t in n),
            *((s, (t[1],)) for s, t in k),
            (many, (b[-1][1][1],)),
        ]
        held = self._stored(p.w, order, "as it is", lambda whole: whole)
        w_strides = _row_strides([x[0] for x in order], 1)
        lines, at = self._head(p.dtype), 0
        a_at: list[tuple[str, int]] = []
        o_at: list[tuple[str, int]] = []
        w_at: list[tuple[str, int]] = []
        pad = "  "

        def loop(name: str, size: int, a: int, w: int, o: int) -> None:
            nonlocal pad
            lines.append(f"{pad}for (int {name} = 0; {name} < {size}; {name}++)")
            a_at.append((name, a))
            w_at.append((name, w))
            o_at.append((name, o))

        for i, (size, strides) in enumerate(above):
            loop(f"b{i}", size, strides[0], w_strides[at], strides[2])
            at += 1
        for i, (size, strides) in enumerate(m):
            loop(f"m{i}", size, strides[0], 0, strides[1])
        for i, (size, strides) in enumerate(n):
            loop(f"n{i}", size, 0, w_strides[at], strides[1])
            at += 1
        lines.append(f"{pad}{{")
        full = many // lanes * lanes if a_b == 1 and o_b == 1 else 0
        k_w = [(f"k{i}", w_strides[at + i]) for i in range(len(k))]
        k_a = [(f"k{i}", t[0]) for i, (_, t) in enumerate(k)]
        heads = [f"for (int k{i} = 0; k{i} < {s}; k{i}++)" for i, (s, _) in enumerate(k)]
        if full:
            vector = f"{kind}{lanes}"
            lines.append(f"{pad}  for (int c = 0; c < {full}; c += {lanes}) {{")
            lines.append(f"{pad}    {vector} sum = {{0}};")
            lines += [f"{pad}    {x}" for x in heads]
            x, y = _index([*a_at, *k_a, ("c", 1)]), _index([*w_at, *k_w, ("c", 1)])
            lines.append(f"{pad}      sum += *(const {vector} *)(a + {x}) * *(const {vector} *)(w + {y});")
            lines.append(f"{pad}    *({vector} *)(out + {_index([*o_at, ('c', 1)])}) = sum;")
            lines.append(f"{pad}  }}")
        if full < many:
            lines.append(f"{pad}  for (int c = {full}; c < {many}; c++) {{")
            lines.append(f"{pad}    {kind} sum = 0;")
            lines += [f"{pad}    {x}" for x in heads]
            lines.append(
                f"{pad}      sum += a[{_index([*a_at, *k_a, ('c', a_b)])}] * w[{_index([*w_at, *k_w, ('c', 1)])}];"
            )
            lines.append(f"{pad}    out[{_index([*o_at, ('c', o_b)])}] = sum;")
            lines.append(f"{pad}  }}")
        return [*lines, f"{pad}}}", "}"], self._arguments(p, out, held.name)

    def _plain(
        self, p: Product, out: View, b: list[Axis], m: list[Axis], n: list[Axis], k: list[Axis]
    ) -> tuple[list[str], list[str]]:
        """Sum by sum; vectors along `k` where it lies side by side in both."""
        kind = TYPES[p.dtype]
        lines, pad = self._head(p.dtype), "  "
        a_at: list[tuple[str, int]] = []
        w_at: list[tuple[str, int]] = []
        o_at: list[tuple[str, int]] = []
        for name, axes, places in (("b", b, (0, 1, 2)), ("m", m, (0, None, 1)), ("n", n, (None, 0, 1))):
            for i, (size, strides) in enumerate(axes):
                lines.append(f"{pad}for (int {name}{i} = 0; {name}{i} < {size}; {name}{i}++)")
                for into, place in zip((a_at, w_at, o_at), places, strict=True):
                    if place is not None:
                        into.append((f"{name}{i}", strides[place]))
        lines += [f"{pad}{{", f"{pad}  {kind} sum = 0;"]
        for i, (size, strides) in enumerate(k):
            if i == len(k) - 1 and strides == (1, 1) and p.dtype in FLOATS:
                lines.append("#pragma omp simd reduction(+:sum)")
            lines.append(f"{pad}  for (int k{i} = 0; k{i} < {size}; k{i}++)")
            a_at.append((f"k{i}", strides[0]))
            w_at.append((f"k{i}", strides[1]))
        lines += [
            f"{pad}    sum += a[{_index(a_at)}] * w[{_index(w_at)}];",
            f"{pad}  out[{_index(o_at)}] = sum;",
            f"{pad}}}",
            "}",
        ]
        return lines, self._arguments(p, out, p.w.buffer.name, p.w.offset)  # type: ignore[union-attr]


def _entries(axes: Sequence[Axis]) -> int:
    return prod(x[0] for x in axes)


def _alike_panels(widths: Sequence[tuple[int, int]], loop: int, many: int) -> list[tuple[int, int, int]]:
    """Panels as ``(first column, width, how many such follow each other)``; one by one unless they may be a `loop`."""
    found: list[tuple[int, int, int]] = []
    for at, width in widths:
        if found and loop and found[-1][1] == width and at + width <= many:
            found[-1] = found[-1][0], width, found[-1][2] + 1
        else:
            found.append((at, width, 1))
    return found


class _Body:
    """A function's loops over rows and columns of the result, whose sums are in registers.

    Attributes:
        lines: of the function.
        lanes: numbers in a vector.
        row: the longest axis of `m`, which is cut into blocks of rows.
        even: the columns of the result have one stride.
    """

    def __init__(
        self, lines: list[str], dtype: torch.dtype, lanes: int, k: list[Axis], w_strides: list[int], columns: list[Axis]
    ) -> None:
        """
        Args:
            lines: so far.
            dtype: of all operands.
            lanes: numbers in a vector.
            k: what is summed over.
            w_strides: of the second operand along it.
            columns: the columns of the result, with their strides there.
        """
        self.lines, self.kind, self.lanes = lines, TYPES[dtype], lanes
        self.vector = f"{self.kind}{lanes}"
        self.k, self.w_strides, self.columns = k, w_strides, columns
        self.even = len(columns) <= 1
        self.pad = "  "
        self.a_at: list[tuple[str, int]] = []
        self.o_at: list[tuple[str, int]] = []
        self.row: Axis = (1, (0, 0))

    def line(self, text: str) -> None:
        """One more."""
        self.lines.append(self.pad + text)

    def open(self, b: list[Axis], m: list[Axis]) -> None:
        """Loops over `b` and all of `m` but the longest."""
        for i, (size, strides) in enumerate(b):
            self.line(f"for (int b{i} = 0; b{i} < {size}; b{i}++)")
            self.a_at.append((f"b{i}", strides[0]))
            self.o_at.append((f"b{i}", strides[2]))
        longest = max(range(len(m)), key=lambda i: m[i][0]) if m else None
        for i, (size, strides) in enumerate(m):
            if i == longest:
                self.row = m[i]
            else:
                self.line(f"for (int m{i} = 0; m{i} < {size}; m{i}++)")
                self.a_at.append((f"m{i}", strides[0]))
                self.o_at.append((f"m{i}", strides[1]))
        self.line("{")
        self.pad += "  "

    def close(self) -> None:
        """The end of the function."""
        self.pad = "  "
        self.line("}")
        self.lines.append("}")

    def block(self, first: str, rows: int, vectors: int, wide: int, column: str, w_row: int) -> None:
        """Some rows of a panel.

        Args:
            first: the first row.
            rows: how many.
            vectors: of a row.
            wide: columns that are there.
            column: the first.
            w_row: the stride of the innermost entries of a panel's rows: its width, if it is packed.
        """
        k, kind, vector = self.k, self.kind, self.vector
        a_row, o_row = self.row[1]
        strides = [s * w_row for s in self.w_strides]
        copies = 2 if rows * vectors <= 4 and k and k[-1][0] % 2 == 0 else 1  # enough sums to hide what one takes
        self.line("  {")
        outer, self.pad = self.pad, self.pad + "    "
        sums = [
            [[f"s{r}_{v}{'ab'[c] if copies > 1 else ''}" for c in range(copies)] for v in range(vectors)]
            for r in range(rows)
        ]
        for r in range(rows):
            self.line(f"{vector} " + ", ".join(f"{x} = {{0}}" for v in sums[r] for x in v) + ";")
        self.line(f"const {kind} *restrict x = a + {_index([*self.a_at, (first, a_row)])};")
        for i, (size, _) in enumerate(k):
            step = copies if i == len(k) - 1 else 1
            self.line("  " * i + f"for (int k{i} = 0; k{i} < {size}; k{i} += {step})")
        self.pad += "  " * len(k)
        self.line("{")
        a_k = [(f"k{i}", t[0]) for i, (_, t) in enumerate(k)]
        w_k = [(f"k{i}", s) for i, s in enumerate(strides)]
        for c in range(copies):
            more_a, more_w = ([(str(k[-1][1][0]), 1)], [(str(strides[-1]), 1)]) if c else ([], [])
            self.line(f"  const {kind} *restrict y{c} = panel + {_index([*w_k, *more_w])};")
            for r in range(rows):
                self.line(f"  const {kind} x{r}_{c} = x[{_index([*a_k, *more_a, (str(r * a_row), 1)])}];")
            for v in range(vectors):
                self.line(f"  const {vector} w{v}_{c} = *(const {vector} *)(y{c} + {v * self.lanes});")
            for r in range(rows):
                for v in range(vectors):
                    self.line(f"  {sums[r][v][c]} += x{r}_{c} * w{v}_{c};")
        self.line("}")
        self.pad = outer + "    "
        for r in range(rows):
            for v in range(vectors):
                self._store(" + ".join(sums[r][v]), [*self.o_at, (first, o_row), (str(r * o_row), 1)], column, v, wide)
        self.pad = outer
        self.line("  }")

    def _store(self, total: str, base: list[tuple[str, int]], column: str, v: int, wide: int) -> None:
        """A vector of the result."""
        first, count = v * self.lanes, min(self.lanes, wide - v * self.lanes)
        if count <= 0:
            return
        stride = self.columns[0][1][0] if self.columns else 1
        if self.even and stride == 1:
            place = f"out + {_index([*base, (column, 1), (str(first), 1)])}"
            if count == self.lanes:
                self.line(f"*({self.vector} *)({place}) = {total};")
            else:
                self.line(f"{{ {self.vector} t = {total}; memcpy({place}, &t, {count} * sizeof({self.kind})); }}")
            return
        self.line(f"{{ {self.vector} t = {total};")
        for j in range(count):
            if self.even:
                at = _index([*base, (column, stride), (str((first + j) * stride), 1)])
            else:
                at = _index([*base, (str(_place(int(column) + first + j, self.columns)), 1)])
            self.line(f"  out[{at}] = t[{j}];")
        self.line("}")

    def tail(self, first: int, many: int, w_at: list[tuple[str, int]], out_stride: int) -> None:
        """The last columns, one by one."""
        size, (a_row, o_row) = self.row
        self.line(f"for (int m = 0; m < {size}; m++)")
        self.line(f"for (int n = {first}; n < {many}; n++) {{")
        self.line(f"  {self.kind} sum = 0;")
        for i, (s, _) in enumerate(self.k):
            self.line(f"  for (int k{i} = 0; k{i} < {s}; k{i}++)")
        a = _index([*self.a_at, ("m", a_row), *((f"k{i}", t[0]) for i, (_, t) in enumerate(self.k))])
        w = _index([*w_at, ("n", 1), *((f"k{i}", s) for i, s in enumerate(self.w_strides))])
        self.line(f"    sum += a[{a}] * w[{w}];")
        self.line(f"  out[{_index([*self.o_at, ('m', o_row), ('n', out_stride)])}] = sum;")
        self.line("}")


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


def _place(i: int, axes: Sequence[Axis]) -> int:
    """The address of an entry of dimensions taken as one."""
    at = 0
    for size, strides in reversed(axes):
        i, j = divmod(i, size)
        at += j * strides[0]
    return at
