"""Dimensions of size 1 come and go between ops that do not care: they are left where they are.

A reshape, permutation or squeeze that only moves dimensions of size 1 gives the same numbers in the same order. Ops
that compute entry by entry, and reductions of other dimensions, are computed on what it was made from; what remains of
such a chain is one reshape, where the result is needed in its own form, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from ..canonicalize import bind, unbind
from ..registry import is_pointwise
from .frames import REDUCTIONS, Sizes

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


Form = tuple[tuple[int, ...], tuple[int, ...]]  # a shape, for two batch sizes


class Units:
    """A graph without the moves of dimensions of size 1 that nothing needs.

    Attributes:
        graph: the copy.
        sizes: the shapes of its nodes.
    """

    def __init__(self, graph: fx.Graph, sizes: Sizes, other: Sizes) -> None:
        """
        Args:
            graph: any program.
            sizes: the shapes of its nodes.
            other: the same for another batch size, or for the same where there is only one.
        """
        self.own: dict[fx.Node, Form] = {n: (size, other[n]) for n, size in sizes.items() if n in other}
        self.graph = fx.Graph()
        self.sizes: dict[fx.Node, tuple[int, ...]] = {}
        self.env: dict[fx.Node, fx.Node] = {}
        self.form: dict[fx.Node, Form] = {}  # that in which `env` has a node
        self.shaped: dict[fx.Node, fx.Node] = {}  # in its own form
        for node in graph.nodes:
            self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        found = None
        if node in self.own and node.op == "call_function":
            if node.target in _VIEWS:
                found = self._view(node)
            elif node.target in REDUCTIONS:
                found = self._reduction(node)
            elif is_pointwise(node.target):
                found = self._pointwise(node)
        if found is not None:
            self.env[node], self.form[node] = found
        else:
            self.env[node] = self.graph.node_copy(node, self._own)
            if node in self.own:
                self.form[node] = self.own[node]
        if node in self.own:
            self.sizes.setdefault(self.env[node], self.form[node][0])

    def _own(self, node: fx.Node) -> fx.Node:
        """A node in its own form."""
        if not self._moved(node):
            return self.env[node]
        if node not in self.shaped:
            self.shaped[node] = self._reshaped(self.env[node], self.own[node])
        return self.shaped[node]

    def _reshaped(self, node: fx.Node, form: Form) -> fx.Node:
        sizes = [n if n == m else -1 for n, m in zip(*form, strict=True)]
        made = self.graph.call_function(aten.reshape.default, (node, sizes))
        self.sizes[made] = form[0]
        return made

    def _open(self, node: fx.Node) -> bool:
        """Whether more than one dimension follows the batch size, so that a reshape cannot name them."""
        return sum(n != m for n, m in zip(*self.own[node], strict=True)) > 1

    def _moved(self, node: fx.Node) -> bool:
        return self.form.get(node) != self.own.get(node)

    # -- what moves dimensions ---------------------------------------------------------------------------------------

    def _view(self, node: fx.Node) -> tuple[fx.Node, Form] | None:
        given: Any = node.args[0]
        if not isinstance(given, fx.Node) or given not in self.own or self._open(node) or self._open(given):
            return None
        if any(_kept(a) != _kept(b) for a, b in zip(self.own[given], self.own[node], strict=True)):
            return None
        return (self.env[given], self.form[given]) if _in_order(node, self.own[given][0]) else None

    # -- what is computed elsewhere ----------------------------------------------------------------------------------

    def _pointwise(self, node: fx.Node) -> tuple[fx.Node, Form] | None:
        """Entry by entry, in the form of the operand that is as large as the result."""
        operands = node.all_input_nodes
        if any(n not in self.own or self._open(n) for n in (node, *operands)):
            return None
        largest = next((n for n in operands if self.own[n] == self.own[node] and self._moved(n)), None)
        if largest is None:
            return None
        form = self.form[largest]
        places = _places(self.own[node][0], form[0])
        given: dict[fx.Node, fx.Node] = {}
        for n in operands:
            found = self._as(n, node, form, places)
            if found is None:
                return None
            given[n] = found
        return self.graph.node_copy(node, given.__getitem__), form

    def _as(self, operand: fx.Node, node: fx.Node, form: Form, places: dict[int, int]) -> fx.Node | None:
        """An operand as it broadcasts to a result of that form."""
        size, other = self.own[operand]
        if not size:
            return self.env[operand]
        rank, ahead = len(form[0]), len(self.own[node][0]) - len(size)
        wanted, wanted_other = [1] * rank, [1] * rank
        for i, (n, m) in enumerate(zip(size, other, strict=True), ahead):
            if n != 1 or m != 1:
                if i not in places:
                    return None
                wanted[places[i]], wanted_other[places[i]] = n, m
        needed = tuple(wanted), tuple(wanted_other)
        return self.env[operand] if needed == self.form[operand] else self._reshaped(self.env[operand], needed)

    def _reduction(self, node: fx.Node) -> tuple[fx.Node, Form] | None:
        """Of dimensions that are there in the other form too."""
        target: Any = node.target
        bound = bind(target, node.args, node.kwargs)
        given, dims = bound["self"], bound["dim"]
        if given not in self.own or not self._moved(given) or not dims or self._open(given) or self._open(node):
            return None
        if bound.get("dtype") is not None:
            return None
        (size, _), (here, there) = self.own[given], self.form[given]
        places = _places(size, here)
        dims = [d % len(size) for d in ([dims] if isinstance(dims, int) else dims)]
        reduced = [places[d] for d in dims if size[d] != 1]
        if not reduced:
            return self.env[given], self.form[given]
        args, kwargs = unbind(target, {**bound, "self": self.env[given], "dim": reduced, "keepdim": True})
        form = tuple(tuple(1 if i in reduced else n for i, n in enumerate(sizes)) for sizes in (here, there))
        return self.graph.call_function(target, args, kwargs), (form[0], form[1])


def _kept(size: Sequence[int]) -> list[int]:
    """The sizes that are not 1."""
    return [n for n in size if n != 1]


def _in_order(node: fx.Node, size: Sequence[int]) -> bool:
    """Whether a view leaves the dimensions that are not of size 1 in their order."""
    given: Any = node.args[1:]
    if node.target is aten.permute.default:
        order = [d % len(size) for d in given[0]]
    elif node.target is aten.transpose.int:
        one, two = (d % len(size) for d in given)
        order = list(range(len(size)))
        order[one], order[two] = two, one
    else:
        return True
    moved = [d for d in order if size[d] != 1]
    return moved == sorted(moved)


def _places(size: Sequence[int], form: Sequence[int]) -> dict[int, int]:
    """Where the dimensions that are not of size 1 lie in another form."""
    here = [i for i, n in enumerate(size) if n != 1]
    there = [i for i, n in enumerate(form) if n != 1]
    return dict(zip(here, there, strict=True))
