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
Letters = Sequence[str]


def expand_einsums(lowering: Lowering, other: Sizes) -> None:
    """Put products in the place of the sums in a graph.

    Args:
        lowering: what is to be changed; `size_of` gets the shapes of new nodes.
        other: the shapes for another batch size, likewise.
    """
    for node in list(lowering.graph.nodes):
        if node.target is aten.einsum.default and node in lowering.size_of:
            with lowering.graph.inserting_before(node):
                made = _Sum(lowering, other).product(node)
            if made is not None:
                node.replace_all_uses_with(made)
                lowering.graph.erase_node(node)


class _Sum:
    """A sum that becomes a product.

    Attributes:
        size: of each letter, for two batch sizes.
    """

    def __init__(self, lowering: Lowering, other: Sizes) -> None:
        self.lowering, self.sizes, self.other = lowering, lowering.size_of, other
        self.size: dict[str, tuple[int, int]] = {}

    def product(self, node: fx.Node) -> fx.Node | None:
        """The sum as (rows, summed) x (summed, columns) with what both have in front; None if it is no such product."""
        equation, operands = node.args[:2]
        assert isinstance(equation, str) and isinstance(operands, Sequence)
        terms, arrow, out = equation.replace(" ", "").partition("->")
        labels = terms.split(",")
        twice = any(len(set(t)) < len(t) for t in (*labels, out))
        if len(operands) != 2 or not arrow or "." in equation or twice:
            return None
        given: list[Any] = list(operands)
        if self.lowering.held(given[0]) is not None:
            labels, given = labels[::-1], given[::-1]
        if not self._measure(labels, given):
            return None
        left, right = labels
        both = [i for i in out if i in left and i in right]
        rows, columns = ([i for i in out if i in t and i not in both] for t in labels)
        summed = [i for i in left if i in right and i not in out]
        if {*both, *rows, *columns} != set(out) or {*both, *rows, *columns, *summed} != {*left, *right}:
            return None
        if sum(one != two for one, two in self.size.values()) > 1 or not summed:
            return None
        fixed = [i for i in rows if self.size[i][0] == self.size[i][1]]
        last = max(fixed, key=lambda i: self.size[i][0], default="")
        wide = bool(last) and self.size[last][0] > prod(self.size[i][0] for i in columns)
        if self.lowering.held(given[1]) is not None and not both and wide:
            # the widest dimension last, as rows of channels lie: what is summed over lies before it, in reverse
            outer, summed = [i for i in rows if i != last], summed[::-1]
            one = self._matrix(given[1], right, [columns, summed])
            two = self._matrix(given[0], left, [outer, summed, [last]])
            return self._result(aten.matmul.default, one, two, [outer, columns, [last]], out)
        front = [both] if both else []
        one = self._matrix(given[0], left, [*front, rows, summed])
        two = self._matrix(given[1], right, [*front, summed, columns])
        return self._result(aten.bmm.default if both else aten.mm.default, one, two, [*front, rows, columns], out)

    def _measure(self, labels: Sequence[str], given: Sequence[Any]) -> bool:
        """Find the sizes of the letters; tell whether each has one, which no operand broadcasts."""
        if any(n not in self.sizes or n not in self.other for n in given):
            return False
        return all(
            self.size.setdefault(letter, pair) == pair
            for term, n in zip(labels, given, strict=True)
            for letter, pair in zip(term, zip(self.sizes[n], self.other[n], strict=True), strict=True)
        )

    def _shape(self, groups: Sequence[Letters]) -> list[int]:
        """A shape of which each dimension is a group of letters."""
        pairs = [tuple(prod(self.size[i][k] for i in g) for k in (0, 1)) for g in groups]
        return [one if one == two else -1 for one, two in pairs]

    def _call(self, target: Any, groups: Sequence[Letters], *args: Any) -> fx.Node:
        """A call whose result has a dimension for each group of letters."""
        made = self.lowering.call(target, *args)
        for k, known in enumerate((self.sizes, self.other)):
            known[made] = tuple(prod(self.size[i][k] for i in g) for g in groups)
        return made

    def _matrix(self, node: Any, term: str, groups: Sequence[Letters]) -> fx.Node:
        """An operand with a dimension for each group of letters."""
        letters = [i for g in groups for i in g]
        order, shape = [term.index(i) for i in letters], self._shape(groups)
        tensor = self.lowering.held(node)
        if tensor is not None and -1 not in shape:
            name = f"einsum {order} {shape}"
            found = self.lowering.derived(name, [tensor], lambda: tensor.permute(order).reshape(shape).contiguous())
            self.other[found] = self.sizes[found]
            return found
        turned = self._call(aten.permute.default, letters, node, order)
        return self._call(aten.reshape.default, groups, turned, shape)

    def _result(self, target: Any, one: fx.Node, two: fx.Node, groups: Sequence[Letters], out: str) -> fx.Node:
        """The product, with the sum's own dimensions."""
        found = self._call(target, groups, one, two)
        letters = [i for g in groups for i in g]
        found = self._call(aten.reshape.default, letters, found, self._shape([[i] for i in letters]))
        return self._call(aten.permute.default, out, found, [letters.index(i) for i in out])
