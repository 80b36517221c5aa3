"""Dimensions of size 1 come and go between ops that do not care: they are left where they are.

A reshape, permutation or squeeze that only moves dimensions of size 1 gives the same numbers in the same order. Ops
that compute entry by entry, and reductions of other dimensions, are computed on what it was made from; what remains of
such a chain is one reshape, where the result is needed in its own form, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..canonicalize import bind, unbind

if TYPE_CHECKING:
    from .frames import Sizes

aten = torch.ops.aten

_VIEWS = (
    aten.reshape.default,
    aten.view.default,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.select.int,
    aten.expand.default,
)
_REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)


class Units:
    """A graph without the moves of dimensions of size 1 that nothing needs.

    Attributes:
        graph: the copy.
    """

    def __init__(self, graph: fx.Graph, sizes: Sizes, other: Sizes) -> None:
        """
        Args:
            graph: any program.
            sizes: the shapes of its nodes.
            other: the same for another batch size, or for the same where there is only one.
        """
        self.sizes, self.other = sizes, other
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}  # in the form that `source` has
        self.source: dict[fx.Node, fx.Node] = {}  # for each node the one of whose form it is
        self.shaped: dict[fx.Node, fx.Node] = {}  # in its own form
        for node in graph.nodes:
            self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        made = None
        if node in self.sizes and node in self.other and node.op == "call_function":
            if node.target in _VIEWS:
                made = self._view(node)
            elif node.target in _REDUCTIONS:
                made = self._reduction(node)
            elif isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
                made = self._pointwise(node)
        if made is None:
            self.env[node] = self.graph.node_copy(node, self.form)
            self.source[node] = node

    def form(self, node: fx.Node) -> fx.Node:
        """A node in its own form."""
        source = self.source.get(node, node)
        if source is node or self.sizes[source] == self.sizes[node]:
            return self.env[node]
        if node not in self.shaped:
            self.shaped[node] = self._reshaped(self.env[node], self.sizes[node], self.other[node])
        return self.shaped[node]

    def _reshaped(self, node: fx.Node, size: Sequence[int], other: Sequence[int]) -> fx.Node:
        sizes = [n if n == m else -1 for n, m in zip(size, other, strict=True)]
        return self.graph.call_function(aten.reshape.default, (node, sizes))

    def _open(self, node: fx.Node) -> bool:
        """Whether more than one dimension follows the batch size, so that a reshape cannot name them."""
        return sum(n != m for n, m in zip(self.sizes[node], self.other[node], strict=True)) > 1

    def _root(self, node: fx.Node) -> fx.Node:
        return self.source.get(node, node)

    # -- what moves dimensions ---------------------------------------------------------------------------------------

    def _view(self, node: fx.Node) -> fx.Node | None:
        given: Any = node.args[0]
        if not isinstance(given, fx.Node) or given not in self.sizes or self._open(node) or self._open(given):
            return None
        if _kept(self.sizes[given]) != _kept(self.sizes[node]) or _kept(self.other[given]) != _kept(self.other[node]):
            return None
        if not _in_order(node, self.sizes[given]):
            return None
        self.env[node], self.source[node] = self.env[given], self._root(given)
        return self.env[node]

    # -- what is computed elsewhere ----------------------------------------------------------------------------------

    def _pointwise(self, node: fx.Node) -> fx.Node | None:
        """Entry by entry, in the form of the operand that is as large as the result."""
        operands = node.all_input_nodes
        if any(n not in self.sizes or n not in self.other for n in operands):
            return None
        largest = next((n for n in operands if self.sizes[n] == self.sizes[node] and self._moved(n)), None)
        if largest is None or any(self._open(n) for n in (node, *operands)):
            return None
        root = self._root(largest)
        places = _places(self.sizes[node], self.sizes[root])
        if self.other[node] != self.other[largest]:
            return None
        given: dict[fx.Node, fx.Node] = {}
        for n in operands:
            found = self._as(n, node, root, places)
            if found is None:
                return None
            given[n] = found
        self.env[node] = self.graph.node_copy(node, given.__getitem__)
        self.source[node] = root
        return self.env[node]

    def _moved(self, node: fx.Node) -> bool:
        return self.sizes[self._root(node)] != self.sizes[node]

    def _as(self, operand: fx.Node, node: fx.Node, root: fx.Node, places: dict[int, int]) -> fx.Node | None:
        """An operand as it broadcasts to a result that has the form of `root`."""
        size, other = self.sizes[operand], self.other[operand]
        if not size or (size == self.sizes[node] and self._root(operand) is root):
            return self.env[operand]
        rank, ahead = len(self.sizes[root]), len(self.sizes[node]) - len(size)
        wanted, wanted_other = [1] * rank, [1] * rank
        for i, (n, m) in enumerate(zip(size, other, strict=True)):
            if n != 1 or m != 1:
                if i + ahead not in places:
                    return None
                wanted[places[i + ahead]], wanted_other[places[i + ahead]] = n, m
        mine = self._root(operand)
        if tuple(wanted) == self.sizes[mine] and tuple(wanted_other) == self.other[mine]:
            return self.env[operand]
        return self._reshaped(self.env[operand], wanted, wanted_other)

    def _reduction(self, node: fx.Node) -> fx.Node | None:
        """Of dimensions that are there in the other form too."""
        bound = bind(node.target, node.args, node.kwargs)
        given, dims = bound["self"], bound["dim"]
        if given not in self.sizes or not self._moved(given) or not dims or self._open(given) or self._open(node):
            return None
        size, root = self.sizes[given], self._root(given)
        dims = [d % len(size) for d in ([dims] if isinstance(dims, int) else dims)]
        places = _places(size, self.sizes[root])
        kept = [places[d] for d in dims if size[d] != 1]
        if bound.get("dtype") is not None:
            return None
        if not kept:
            self.env[node], self.source[node] = self.env[given], root
            return self.env[node]
        args, kwargs = unbind(node.target, {**bound, "self": self.env[given], "dim": kept, "keepdim": True})
        made = self.graph.call_function(node.target, args, kwargs)
        self._stand_in(node, made, root, kept)
        return made

    def _stand_in(self, node: fx.Node, made: fx.Node, root: fx.Node, reduced: list[int]) -> None:
        """A value in a form that no node of the old graph has: it is given a node of its own to be the form of."""
        form = fx.Graph().placeholder("form")
        self.sizes = {**self.sizes, form: tuple(1 if i in reduced else n for i, n in enumerate(self.sizes[root]))}
        self.other = {**self.other, form: tuple(1 if i in reduced else n for i, n in enumerate(self.other[root]))}
        self.env[node], self.source[node] = made, form


def _kept(size: Sequence[int]) -> list[int]:
    """The sizes that are not 1."""
    return [n for n in size if n != 1]


def _in_order(node: fx.Node, size: Sequence[int]) -> bool:
    """Whether a view leaves the dimensions that are not of size 1 in their order."""
    if node.target is aten.permute.default:
        order = [d % len(size) for d in node.args[1]]  # type: ignore[union-attr]
    elif node.target is aten.transpose.int:
        a, b = (d % len(size) for d in node.args[1:])  # type: ignore[operator]
        order = list(range(len(size)))
        order[a], order[b] = order[b], order[a]
    else:
        return True
    moved = [d for d in order if size[d] != 1]
    return moved == sorted(moved)


def _places(size: Sequence[int], form: Sequence[int]) -> dict[int, int]:
    """Where the dimensions that are not of size 1 lie in another form."""
    here = [i for i, n in enumerate(size) if n != 1]
    there = [i for i, n in enumerate(form) if n != 1]
    return dict(zip(here, there, strict=True))
