"""Einstein sums of two tensors in mid-stream, as what they are: one product of matrices.

Every runtime parses the equation, and most permute both tensors; here the one that is a parameter is permuted once.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from .lower import Lowering

aten = torch.ops.aten

Sizes = dict[fx.Node, tuple[int, ...]]


def expand_einsums(lowering: Lowering, other: Sizes) -> None:
    """Put products in the place of the sums in a graph.

    Args:
        lowering: what is to be changed; `size_of` gets the shapes of new nodes.
        other: the shapes for another batch size, likewise.
    """
    for node in list(lowering.graph.nodes):
        if node.target is aten.einsum.default and node in lowering.size_of:
            with lowering.graph.inserting_before(node):
                made = _product(lowering, lowering.size_of, other, node)
            if made is not None:
                node.replace_all_uses_with(made)
                lowering.graph.erase_node(node)


def _product(lowering: Lowering, sizes: Sizes, other: Sizes, node: fx.Node) -> fx.Node | None:
    """The sum as (pixels, summed) x (summed, rest) with what both have in front; None if it is no such product."""
    equation, operands = node.args[:2]
    assert isinstance(equation, str) and isinstance(operands, Sequence)
    terms, _, out = equation.replace(" ", "").partition("->")
    labels = terms.split(",")
    if (
        len(operands) != 2
        or "->" not in equation
        or "." in equation
        or any(len(set(t)) < len(t) for t in (*labels, out))
    ):
        return None
    given: list[Any] = list(operands)
    if lowering.held(given[0]) is not None:
        labels, given = labels[::-1], given[::-1]
    left, right = labels
    if any(n not in sizes or n not in other for n in given):
        return None
    size: dict[str, tuple[int, int]] = {}
    for term, n in zip(labels, given, strict=True):
        for letter, pair in zip(term, zip(sizes[n], other[n], strict=True), strict=True):
            if size.setdefault(letter, pair) != pair:
                return None  # one is broadcast
    both = [i for i in out if i in left and i in right]
    rows, columns = ([i for i in out if i in t and i not in both] for t in labels)
    summed = [i for i in left if i in right and i not in out]
    if {*both, *rows, *columns} != set(out) or {*both, *rows, *columns, *summed} != {*left, *right}:
        return None
    if sum(one != two for one, two in size.values()) > 1 or not summed:
        return None

    def shaped(groups: Sequence[Sequence[str]]) -> list[int]:
        """A shape of which each dimension is a group of letters."""
        pairs = [tuple(prod(size[i][k] for i in g) for k in (0, 1)) for g in groups]
        return [one if one == two else -1 for one, two in pairs]

    def call(target: Any, letters: Sequence[Sequence[str]], *args: Any) -> fx.Node:
        made = lowering.call(target, *args)
        for k, known in enumerate((sizes, other)):
            known[made] = tuple(prod(size[i][k] for i in g) for g in letters)
        return made

    def matrix(n: Any, term: str, groups: list[list[str]]) -> fx.Node:
        """An operand as a matrix, or as one for each entry of what both have."""
        order = [term.index(i) for g in groups for i in g]
        parts = groups if both else groups[1:]
        tensor = lowering.held(n)
        if tensor is not None and -1 not in shaped(parts):
            shape = shaped(parts)
            found = lowering.derived(f"einsum {order} {shape}", [tensor], lambda: tensor.permute(order).reshape(shape))
            other[found] = sizes[found]
            return found
        turned = call(aten.permute.default, [i for g in groups for i in g], n, order)
        return call(aten.reshape.default, parts, turned, shaped(parts))

    fixed = [i for i in rows if size[i][0] == size[i][1]]
    last = max(fixed, key=lambda i: size[i][0]) if fixed else ""
    wide = bool(last) and size[last][0] > prod(size[i][0] for i in columns)
    if lowering.held(given[1]) is not None and not both and wide:
        # the widest dimension last, as rows of channels lie: what is summed over lies before it, in reverse
        outer, summed = [i for i in rows if i != last], summed[::-1]
        turned = matrix(given[1], right, [[], columns, summed])
        letters, groups = [*outer, *summed, last], [outer, summed, [last]]
        found = call(aten.permute.default, letters, given[0], [left.index(i) for i in letters])
        found = call(aten.reshape.default, groups, found, shaped(groups))
        found = call(aten.matmul.default, [outer, columns, [last]], turned, found)
        letters = [*outer, *columns, last]
        found = call(aten.reshape.default, letters, found, shaped(letters))
        return call(aten.permute.default, out, found, [letters.index(i) for i in out])
    one = matrix(given[0], left, [both, rows, summed])
    two = matrix(given[1], right, [both, summed, columns])
    parts = [both, rows, columns] if both else [rows, columns]
    found = call(aten.bmm.default if both else aten.mm.default, parts, one, two)
    letters = [*both, *rows, *columns]
    found = call(aten.reshape.default, letters, found, shaped(letters))
    return call(aten.permute.default, out, found, [letters.index(i) for i in out])
