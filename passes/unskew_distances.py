"""Pass 2i: scores of queries and distances that are moved to queries and keys are looked up there in the first place.

Transformer-XL, Music Transformer and Conformers multiply queries with an embedding of each distance, which gives a
row of distances for each query, and then move entry (i, m) to where the key lies at that distance: by a pad, a reshape
and a slice (``rel_shift``, "skewing"). What such moves do is found by making them with the numbers of the entries.
Where entry (i, j) of the result is that of distance i - j, it is the product of query i with the embedding of i - j;
written so, it is a pair of frames like any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from .graph_edits import call_at, moves, sizes_of, take_place
from .layout import Sizes

aten = torch.ops.aten
_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.einsum.default}
_MOVES = {
    aten.pad.default, aten.constant_pad_nd.default, aten.cat.default, aten.reshape.default, aten.slice.Tensor,
    aten.narrow.default, aten.squeeze.dim, aten.unsqueeze.default, aten.clone.default,
}  # fmt: skip
TRIED = (5, 6)  # lengths at which the moves are made
NONE = -1  # stands where something else than an entry is


def unskew_distances(graph: fx.Graph, known: Mapping[str, torch.Tensor]) -> bool:
    """Rewrite a canonical graph so, with these parameters and constants; whether anything was found.

    Entries of keys ahead of their query may become others where there are no embeddings for them: of such a node
    ``meta["no_key_ahead"]`` is set, and nothing may read them.
    """
    fed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in fed for n in node.all_input_nodes):
            fed.add(node)
    found = False
    for node in list(graph.nodes):
        if node.target in _PRODUCTS and node in fed and (product := _Product.of(node, fed)) is not None:
            moved = _moved(product)
            if moved is not None and (new := _by_distance(graph, product, *moved, known)) is not None:
                take_place(moved[0], new)
                found = True
    graph.eliminate_dead_code()
    return found


@dataclass
class _Product:
    """A product of queries with a row for each distance, as an Einstein sum; rows and distances lie last.

    Attributes:
        node: the product.
        queries, rows: its factors; `rows` is made without the inputs.
        query_term, row_term, result: their letters.
        length, count: the clip's length and the number of rows at each sample point.
    """

    node: fx.Node
    queries: fx.Node
    rows: fx.Node
    query_term: str
    row_term: str
    result: str
    length: Sizes
    count: Sizes

    @staticmethod
    def of(node: fx.Node, fed: set[fx.Node]) -> _Product | None:
        """The product, if it is one."""
        args = node.meta["samples"][0]
        if node.target is aten.einsum.default:
            equation = args["equation"].replace(" ", "")
            nodes = list(args["tensors"])
            if "." in equation or "->" not in equation or len(nodes) != 2:
                return None
            given, result = equation.split("->")
            terms = given.split(",")
        else:
            nodes = [args["self"], args["other" if "other" in args else "mat2"]]
            ranks = [n.meta["val"].dim() for n in nodes]
            if min(ranks) < 2:
                return None
            lead = "abcdefgh"[: max(ranks) - 2]
            terms = [lead[len(lead) - ranks[0] + 2 :] + "xy", lead[len(lead) - ranks[1] + 2 :] + "yz"]
            result = lead + "xz"
        if nodes[0] not in fed:
            nodes, terms = nodes[::-1], terms[::-1]
        if nodes[0] not in fed or nodes[1] in fed or len(result) < 2:
            return None
        length, count = sizes_of(node)[-2:]
        double = tuple(2 * n - 1 for n in length)
        own = result[-1] in terms[1] and result[-1] not in terms[0] and result[-2] in terms[0]
        if not own or result[-2] in terms[1] or len(set(length)) < 2 or count not in (length, double):
            return None
        return _Product(node, nodes[0], nodes[1], terms[0], terms[1], result, length, count)


def _moved(product: _Product) -> tuple[fx.Node, bool] | None:
    """The node at which each entry has come to the key at its distance; and whether that is so for keys ahead too."""
    chain: list[fx.Node] = []
    best: tuple[fx.Node, bool] | None = None
    node = product.node
    while len(users := list(node.users)) == 1 and users[0].target in _MOVES:
        node = users[0]
        chain.append(node)
        if sizes_of(node)[-2:] == [product.length, product.length]:
            known = [_reads_distances(product, chain, n) for n in TRIED]
            if all(k is not None for k in known):
                best = node, all(k for k in known)
    return best


def _reads_distances(product: _Product, chain: list[fx.Node], n: int) -> bool | None:
    """Whether after these moves, made at a clip of so many frames, entry (i, j) is that of distance i - j: for all j
    (True) or those not ahead of i (False); None if it is not."""
    at = _Linear(product, n)
    try:
        shape = [at(s) for s in sizes_of(product.node)]
        numbers = {product.node: torch.arange(math.prod(shape)).reshape(shape)}
        for node in chain:
            numbers[node] = _move(node, numbers, at)
        moved = numbers[chain[-1]].reshape(-1, n, n)
    except (RuntimeError, IndexError, TypeError, KeyError, ValueError):
        return None
    queries, rows = math.prod(shape[:-2]), shape[-1]
    if shape[-2] != n or len(moved) != queries:
        return None
    place = torch.arange(n)[:, None] * rows + n - 1 - torch.arange(n)[:, None] + torch.arange(n)
    wanted = place + torch.arange(queries)[:, None, None] * (n * rows)
    same = moved == wanted
    if rows == 2 * n - 1 and bool(same.all()):
        return True
    return False if bool((same | torch.ones(n, n, dtype=torch.bool).triu(1)).all()) else None


class _Linear:
    """Numbers at a clip of so many frames, from those at the sample points, which they follow in proportion."""

    def __init__(self, product: _Product, n: int) -> None:
        self.lengths, self.n = product.length, n

    def __call__(self, seen: Sequence[int]) -> int:
        """The number; what follows the batch size is as it was traced.

        Raises:
            ValueError: it follows the length otherwise.
        """
        first = self.lengths[0]
        slopes = {
            Fraction(s - seen[0], length - first)
            for length, s in zip(self.lengths, seen, strict=True)
            if length != first
        }
        if len(slopes) != 1:
            raise ValueError
        return int(seen[0] + slopes.pop() * (self.n - first))


def _move(node: fx.Node, numbers: dict[fx.Node, torch.Tensor], at: _Linear) -> torch.Tensor:
    """One move, made with the numbers of entries."""
    samples = node.meta["samples"]

    def number(name: str, i: int | None = None) -> Any:
        seen = [s.get(name) if i is None else s[name][i] for s in samples]
        return None if seen[0] is None else at(seen)

    if node.target is aten.cat.default:
        dim, parts = samples[0].get("dim", 0), []
        for part in samples[0]["tensors"]:
            if part in numbers:
                parts.append(numbers[part])
            elif part.target is aten.full.default:
                sizes: Any = [at(s) for s in sizes_of(part)]
                parts.append(torch.full(sizes, NONE))
        return torch.cat(parts, dim)
    x = numbers[samples[0]["self"]]
    if "pad" in samples[0] or "padding" in samples[0]:
        name = "pad" if "pad" in samples[0] else "padding"
        pads = [number(name, i) for i in range(len(samples[0][name]))]
        if samples[0].get("mode", "constant") != "constant":
            raise ValueError
        return torch.nn.functional.pad(x, pads, value=NONE)
    if node.target is aten.reshape.default:
        name = "shape" if "shape" in samples[0] else "size"
        return x.reshape([number(name, i) for i in range(len(samples[0][name]))])
    if node.target is aten.slice.Tensor:
        end = [s.get("end") for s in samples]
        stop = None if end[0] is None or max(e if e is not None else 0 for e in end) > 1 << 40 else at(end)
        index = slice(number("start"), stop, number("step"))
        return x[(slice(None),) * (samples[0].get("dim", 0) % x.dim()) + (index,)]
    if node.target is aten.narrow.default:
        return x.narrow(samples[0]["dim"], number("start"), number("length"))
    if node.target is aten.clone.default:
        return x
    result: torch.Tensor = node.target(x, samples[0]["dim"])  # type: ignore[operator]
    return result


def _by_distance(
    graph: fx.Graph, product: _Product, moved: fx.Node, ahead: bool, known: Mapping[str, torch.Tensor]
) -> fx.Node | None:
    """The moved product as one of queries with the embedding of each distance."""
    source = _source(product)
    if source is None:
        return None
    letter = product.result[-1]
    tables = [_rows_by_distance(graph, product, source, sign, moved) for sign in ((1, -1) if ahead else (1,))]
    if any(t is None for t in tables) or not _as_traced(product, tables, known):
        return None
    dim = product.row_term.index(letter)
    order = [dim, *(i for i in range(len(product.row_term)) if i != dim)]
    squeezed = [i for i in order[1:] if set(sizes_of(product.rows)[i]) == {1} and product.row_term[i] in
                product.query_term and set(_size_of(product, product.row_term[i])) != {1}]  # fmt: skip
    rest = "".join(product.row_term[i] for i in order[1:] if i not in squeezed)
    looked_up = [_looked_up(graph, t, order, squeezed, product, sign, moved)
                 for t, sign in zip(tables, (1, -1), strict=False)]  # fmt: skip
    chosen = looked_up[0]
    if ahead:
        chosen = _where_behind(graph, looked_up, product, moved)
    first, second = [c for c in "ijklmnopqrstuvw" if c not in product.query_term + product.row_term][:2]
    row = product.result[-2]
    letters = product.query_term.replace(row, first), first + second + rest, product.result[:-2] + first + second
    equation = f"{letters[0]},{letters[1]}->{letters[2]}"
    calls: Any = [((equation, [product.queries, chosen]), {})] * len(product.length)
    new = call_at(graph, moved, aten.einsum.default, calls, moved.meta["sizes"], moved.meta["val"])
    new.meta["no_key_ahead"] = not ahead
    return new


def _size_of(product: _Product, letter: str) -> Sizes:
    """The sizes of the queries' dimension with this letter."""
    return sizes_of(product.queries)[product.query_term.index(letter)]


# -- the embeddings of distances, in the order of distances ------------------------------------------------------------


@dataclass
class _Source:
    """What the rows are made from: falling positions, or the end of a table; and the nodes from there to the rows."""

    node: fx.Node
    way: list[fx.Node]


def _source(product: _Product) -> _Source | None:
    """The one node in which the rows begin to follow the length, if it counts down from the end of the clip."""
    way: list[fx.Node] = []
    queue, begins = [product.rows], set()
    while queue:
        node = queue.pop()
        if node in way or not moves(node):
            continue
        way.append(node)
        before = [n for n in node.all_input_nodes if moves(n)]
        queue += before
        if not before:
            begins.add(node)
    if len(begins) != 1:
        return None
    (node,) = begins
    return _Source(node, sorted(way, key=list(product.node.graph.nodes).index))


def _rows_by_distance(graph: fx.Graph, product: _Product, source: _Source, sign: int, like: fx.Node) -> fx.Node | None:
    """The rows of distances 0, 1, 2 ... (or 0, -1, -2 ...), as many as the clip has frames."""
    begin = _begin(graph, product, source.node, sign, like)
    if begin is None:
        return None
    copies = {source.node: begin}
    for node in source.way:
        if node is source.node:
            continue
        samples = [_renamed(s, copies) for s in _swapped(node.meta["samples"], product)]
        sizes = [tuple(s) for s in _swapped(node.meta["sizes"], product)]
        value = node.meta["val"].new_empty(sizes[0])
        args = [_unbound(node.target, s) for s in samples]
        copies[node] = call_at(graph, like, node.target, args, sizes, value)
    return copies[product.rows]


def _swapped(seen: Sequence[Any], product: _Product) -> list[Any]:
    """Numbers at the sample points, those that are the number of rows as the clip's length."""
    first = seen[0]
    if isinstance(first, dict):
        parts = {k: _swapped([s[k] for s in seen], product) for k in first}
        return [{k: v[p] for k, v in parts.items()} for p in range(len(seen))]
    if isinstance(first, (list, tuple)):
        entries = [_swapped([s[i] for s in seen], product) for i in range(len(first))]
        return [[e[p] for e in entries] for p in range(len(seen))]
    return list(product.length) if tuple(seen) == product.count else list(seen)


def _as_traced(product: _Product, tables: Sequence[Any], known: Mapping[str, torch.Tensor]) -> bool:
    """Whether rows in the order of distances are the traced ones, turned around: none depends on where others lie."""
    dim = product.row_term.index(product.result[-1])
    memo: dict[fx.Node, Any] = {}
    try:
        with torch.no_grad():
            rows = _value(product.rows, known, memo)
            parts = [_value(t, known, memo) for t in tables]
    except (RuntimeError, KeyError, TypeError):
        return False
    n = product.length[0]
    wanted = [rows.narrow(dim, 0, n).flip(dim), rows.narrow(dim, rows.shape[dim] - n, n)][: len(parts)]
    return all(a.shape == b.shape and torch.allclose(a, b, equal_nan=True) for a, b in zip(parts, wanted, strict=True))


def _value(node: fx.Node, known: Mapping[str, torch.Tensor], memo: dict[fx.Node, Any]) -> Any:
    """What a node is that follows from parameters and the traced length alone."""
    if node not in memo:
        if node.op == "get_attr":
            memo[node] = known[str(node.target)]
        else:
            for n in node.all_input_nodes:
                _value(n, known, memo)
            args, kwargs = _unbound(node.target, _with_values(node.meta["samples"][0], memo))
            memo[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return memo[node]


def _with_values(sample: Any, values: Mapping[fx.Node, Any]) -> Any:
    if isinstance(sample, fx.Node):
        return values[sample]
    if isinstance(sample, dict):
        return {k: _with_values(v, values) for k, v in sample.items()}
    return [_with_values(v, values) for v in sample] if isinstance(sample, (list, tuple)) else sample


def _renamed(sample: Any, copies: dict[fx.Node, fx.Node]) -> Any:
    if isinstance(sample, fx.Node):
        return copies.get(sample, sample)
    if isinstance(sample, dict):
        return {k: _renamed(v, copies) for k, v in sample.items()}
    if isinstance(sample, (list, tuple)):
        return [_renamed(v, copies) for v in sample]
    return sample


def _unbound(target: Any, sample: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by name as a call takes them."""
    args, kwargs = [], {}
    for argument in target._schema.arguments:
        if argument.name in sample:
            if argument.kwarg_only:
                kwargs[argument.name] = sample[argument.name]
            else:
                args.append(sample[argument.name])
        elif not argument.kwarg_only:
            args.append(argument.default_value)
    return tuple(args), kwargs


def _begin(graph: fx.Graph, product: _Product, node: fx.Node, sign: int, like: fx.Node) -> fx.Node | None:
    """The source of the rows, for distances 0, 1, 2 ... (or 0, -1, -2 ...)."""
    samples, length = node.meta["samples"], product.length
    value = node.meta["val"]
    if node.target is aten.arange.start_step and all(s.get("step", 1) == -1 for s in samples):
        more = {s["start"] - (n - 1) for s, n in zip(samples, length, strict=True)}
        if len(more) != 1:
            return None
        start = more.pop()
        kind = {"dtype": value.dtype, "device": value.device}
        calls: Any = [((start, start + sign * n, sign), kind) for n in length]
        return call_at(graph, like, node.target, calls, [(n,) for n in length], value.new_empty(length[0]))
    if node.target in (aten.slice.Tensor, aten.narrow.default):
        table = samples[0]["self"]
        dim = samples[0].get("dim", 0) % value.dim()
        size = sizes_of(table)[dim]
        starts = [s.get("start") or 0 for s in samples]
        counted = size[0] if all(s < 0 for s in starts) else 0  # from the table's end
        ends = {counted + s + n for s, n in zip(starts, length, strict=True)}
        if len(set(size)) > 1 or len(ends) != 1 or samples[0].get("step", 1) != 1:
            return None
        middle = ends.pop() - 1  # where distance 0 lies
        sizes = [tuple(n if i == dim else s for i, s in enumerate(own)) for own, n in
                 zip(node.meta["sizes"], length, strict=True)]  # fmt: skip
        first, last = (0, middle + 1) if sign > 0 else (middle, size[0])
        rest = [tuple(last - first if i == dim else s for i, s in enumerate(own)) for own in node.meta["sizes"]]
        half: Any = [((table, dim, first, last, 1), {})] * len(length)
        part = call_at(graph, like, aten.slice.Tensor, half, rest, value.new_empty(rest[0]))
        if sign > 0:
            part = call_at(
                graph, like, aten.flip.default, [((part, [dim]), {})] * len(length), rest, value.new_empty(rest[0])
            )
        calls = [((part, dim, 0, n, 1), {}) for n in length]
        return call_at(graph, like, aten.slice.Tensor, calls, sizes, value.new_empty(sizes[0]))
    return None


# -- looked up for every two frames ------------------------------------------------------------------------------------


def _looked_up(
    graph: fx.Graph, table: Any, order: list[int], squeezed: list[int], product: _Product, sign: int, like: fx.Node
) -> fx.Node:
    """The row at the distance of every two frames: (query, key, features)."""
    points = range(len(product.length))
    shapes = table.meta["sizes"]
    if order != list(range(len(order))):
        shapes = [tuple(s[i] for i in order) for s in shapes]
        table = call_at(graph, like, aten.permute.default, [((table, order), {}) for _ in points], shapes,
                        table.meta["val"].permute(order))  # fmt: skip
    if squeezed:
        kept = [i for i, d in enumerate(order) if d not in squeezed]
        dims = [i for i, d in enumerate(order) if d in squeezed]
        shapes = [tuple(s[i] for i in kept) for s in shapes]
        table = call_at(graph, like, aten.squeeze.dims, [((table, dims), {}) for _ in points], shapes,
                        table.meta["val"].squeeze(dims))  # fmt: skip
    at = _distance(graph, product, sign, like)
    sizes = [(n, n, *s[1:]) for n, s in zip(product.length, shapes, strict=True)]
    return call_at(graph, like, aten.index.Tensor, [((table, [at]), {}) for _ in points], sizes,
                   table.meta["val"].new_empty(sizes[0]))  # fmt: skip


def _distance(graph: fx.Graph, product: _Product, sign: int, like: fx.Node) -> fx.Node:
    """How many frames each key lies behind its query (or ahead of it), 0 for the others."""
    length, base = product.length, product.node.meta["val"]
    line = base.new_empty(length[0], dtype=torch.int64)
    kind = {"dtype": torch.int64, "device": base.device}
    square = [(n, n) for n in length]
    at = call_at(graph, like, aten.arange.start_step, [((0, n, 1), kind) for n in length], [(n,) for n in length], line)
    sides = []
    for dim in (1, 0):
        lying = [(n, 1) if dim else (1, n) for n in length]
        sides.append(call_at(graph, like, aten.unsqueeze.default, [((at, dim), {})] * len(length), lying,
                             line.unsqueeze(dim)))  # fmt: skip
    ordered = tuple(sides[::sign])
    away = call_at(graph, like, aten.sub.Tensor, [(ordered, {})] * len(length), square, line.new_empty(square[0]))
    return call_at(graph, like, aten.clamp.default, [((away, 0), {})] * len(length), square, line.new_empty(square[0]))


def _where_behind(graph: fx.Graph, rows: list[fx.Node], product: _Product, like: fx.Node) -> fx.Node:
    """The first's rows for keys that do not lie ahead of their query, the second's for the others."""
    length, sizes = product.length, rows[0].meta["sizes"]
    ahead = _distance(graph, product, -1, like)
    flags = ahead.meta["val"].new_empty((length[0], length[0]), dtype=torch.bool)
    square = [(n, n) for n in length]
    here = call_at(graph, like, aten.eq.Scalar, [((ahead, 0), {})] * len(length), square, flags)
    shapes = [(*s, *[1] * (len(z) - 2)) for s, z in zip(square, sizes, strict=True)]
    wide = call_at(graph, like, aten.reshape.default, [((here, list(s)), {}) for s in shapes], shapes,
                   flags.reshape(shapes[0]))  # fmt: skip
    calls: Any = [((wide, *rows), {})] * len(length)
    return call_at(graph, like, aten.where.self, calls, sizes, rows[0].meta["val"])
