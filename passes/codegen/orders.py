"""Permutations that cost nothing, for runtimes whose tensors have no strides.

In torch a permuted tensor lies in memory as it did. ONNX Runtime makes a copy. Here every tensor of a program is
computed in the order of dimensions in which it comes about; what an op is told of dimensions follows, and a copy is
made only where an op needs another order. State is kept between steps as it comes about, too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch.fx.node import map_arg

from ..canonicalize import bind, unbind
from ..registry import is_pointwise
from .frames import REDUCTIONS, Sizes

aten = torch.ops.aten

Order = tuple[int, ...]  # a tensor's dimensions as they lie, the outermost first

_RESHAPES = (
    aten.reshape.default, aten.view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
)  # fmt: skip
_POOLS = (
    aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default,
)  # fmt: skip


class Orders:
    """A copy of a program without the permutations that need not be copies.

    Attributes:
        graph: the copy; parts of the state come and go in the given orders.
        tensors: what its get_attr nodes name.
        natural: the order in which each result comes about.
    """

    def __init__(
        self,
        graph: fx.Graph,
        sizes: Sizes,
        tensors: Mapping[str, torch.Tensor],
        given: Mapping[fx.Node, Order],
        wanted: Sequence[Order | None],
    ) -> None:
        """
        Args:
            graph: of a program that returns one tuple.
            sizes: the shapes of its nodes.
            tensors: what its get_attr nodes name.
            given: the orders in which arguments lie; others lie as their dimensions are.
            wanted: the same for its results; None for as their dimensions are.
        """
        self.sizes, self.tensors, self.given, self.wanted = sizes, dict(tensors), given, wanted
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.order: dict[fx.Node, Order] = {}  # in which `env` has a node; those without lie as their dimensions are
        self.size: dict[fx.Node, tuple[int, ...]] = {}  # of nodes of the copy
        self.copies: dict[tuple[fx.Node, Order], fx.Node] = {}
        self.natural: list[Order] = []
        for node in graph.nodes:
            self._visit(node)
        self.graph.eliminate_dead_code()

    # -- one value ---------------------------------------------------------------------------------------------------

    def _as(self, node: fx.Node, order: Order | None = None) -> fx.Node:
        """A node in some order; by default in that of its dimensions."""
        if node not in self.sizes:
            return self.env[node]
        size = self.sizes[node]
        wanted = _plain(size) if order is None else order
        here = self.order.get(node, _plain(size))
        if here == wanted:
            return self.env[node]
        moved = tuple(here.index(d) for d in wanted)
        if (self.env[node], moved) not in self.copies:
            self.copies[self.env[node], moved] = self._permuted(self.env[node], moved)
        return self.copies[self.env[node], moved]

    def _permuted(self, lying: fx.Node, dims: Order) -> fx.Node:
        """A node of the copy with its dimensions permuted."""
        size = self.size[lying]
        shape = tuple(size[d] for d in dims)
        if lying.op == "get_attr":
            return self._held(self.tensors[str(lying.target)].permute(dims).contiguous())
        if _kept(dims, size) == sorted(_kept(dims, size)):
            return self._reshape(lying, shape)
        made = self._call(aten.permute.default, lying, list(dims))
        self.size[made] = shape
        return made

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def _held(self, tensor: torch.Tensor) -> fx.Node:
        name = f"turned_{len(self.tensors)}"
        self.tensors[name] = tensor
        node = self.graph.get_attr(name)
        self.size[node] = tuple(tensor.shape)
        return node

    def _reshape(self, node: fx.Node, shape: Sequence[int]) -> fx.Node:
        """A node of the copy in another shape, by one reshape at most."""
        if node.target is aten.reshape.default and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        if self.size.get(node) == tuple(shape):
            return node
        made = self._call(aten.reshape.default, node, list(shape))
        self.size[made] = tuple(shape)
        return made

    def _set(self, node: fx.Node, made: fx.Node, order: Sequence[int]) -> None:
        """A node's copy, and how it lies."""
        size = self.sizes[node]
        self.env[node] = made
        if _kept(order, size) == sorted(_kept(order, size)) and tuple(order) != _plain(size):
            self.env[node], order = self._reshape(made, size), _plain(size)
        if tuple(order) != _plain(size):
            self.order[node] = tuple(order)
        self.size[self.env[node]] = tuple(size[d] for d in order)

    # -- nodes -------------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        if node.op == "output":
            self._output(node)
            return
        if node.op == "call_function" and node in self.sizes and 0 not in self.sizes[node]:
            rule = self._rule(node)
            if rule is not None and rule(node):
                return
        self.env[node] = self.graph.node_copy(node, self._as)
        if node in self.sizes:
            order = self.given.get(node, _plain(self.sizes[node]))
            self.size[self.env[node]] = tuple(self.sizes[node][d] for d in order)
            if order != _plain(self.sizes[node]):
                self.order[node] = order

    def _rule(self, node: fx.Node) -> Callable[[fx.Node], bool] | None:
        target = node.target
        if any(n not in self.sizes for n in node.all_input_nodes if target not in _RESHAPES):
            return None
        if target in (aten.permute.default, aten.transpose.int):
            return self._permute
        if target in _RESHAPES:
            return self._view
        if target in (aten.select.int, aten.slice.Tensor):
            return self._part
        if target is aten.cat.default:
            return self._cat
        if target in REDUCTIONS:
            return self._reduction
        if target in (aten.linear.default, aten.matmul.default):
            return self._product
        if target in _POOLS:
            return self._pool
        if is_pointwise(target) or target in (aten.clone.default, aten._to_copy.default):
            return self._pointwise
        return None

    def _lies(self, node: fx.Node) -> Order:
        return self.order.get(node, _plain(self.sizes[node]))

    def _permute(self, node: fx.Node) -> bool:
        given, *how = cast(Any, node.args)
        rank = len(self.sizes[node])
        if node.target is aten.permute.default:
            dims = [d % rank for d in how[0]]
        else:
            one, two = (d % rank for d in how)
            dims = list(range(rank))
            dims[one], dims[two] = two, one
        self._set(node, self.env[given], [dims.index(d) for d in self._lies(given)])
        return True

    def _view(self, node: fx.Node) -> bool:
        """Dimensions that are joined have to lie side by side; those that are split lie there."""
        given: Any = node.args[0]
        if given not in self.sizes:
            return False
        before, after, lies = self.sizes[given], self.sizes[node], self._lies(given)
        groups = _groups(before, after)
        place = {d: i for i, d in enumerate(d for d in lies if before[d] != 1)}
        order: list[int] = []
        blocks = []
        for taken, made in groups:
            at = [place[d] for d in taken if before[d] != 1]
            if at and at != list(range(at[0], at[0] + len(at))):
                self._set(node, self._reshape(self._as(given), after), _plain(after))
                return True
            blocks.append((at[0] if at else -1, made))
        for _, made in sorted(blocks, key=lambda b: b[0]):
            order += made
        self._set(node, self._reshape(self.env[given], [after[d] for d in order]), order)
        return True

    def _part(self, node: fx.Node) -> bool:
        given: Any = node.args[0]
        lies, bound = self._lies(given), bind(node.target, node.args, node.kwargs)
        dim = bound["dim"] % len(lies)
        args, kwargs = unbind(node.target, {**bound, "self": self.env[given], "dim": lies.index(dim)})
        made = self._call(node.target, *args, **kwargs)
        if node.target is aten.select.int:
            lies = tuple(d - (d > dim) for d in lies if d != dim)
        self._set(node, made, lies)
        return True

    def _cat(self, node: fx.Node) -> bool:
        bound = bind(node.target, node.args, node.kwargs)
        parts, rank = bound["tensors"], len(self.sizes[node])
        if any(len(self.sizes[p]) != rank for p in parts):
            return False
        order, _ = Counter(self._lies(p) for p in parts).most_common(1)[0]
        made = self.graph.call_function(
            aten.cat.default, ([self._as(p, order) for p in parts], order.index(bound["dim"] % rank))
        )
        self._set(node, made, order)
        return True

    def _reduction(self, node: fx.Node) -> bool:
        bound = bind(node.target, node.args, node.kwargs)
        given, dims = bound["self"], bound["dim"]
        lies = self._lies(given)
        if dims is None or dims == []:
            return False
        dims = [d % len(lies) for d in ([dims] if isinstance(dims, int) else dims)]
        if node.target is not aten.sum.dim_IntList and all(self.sizes[given][d] == 1 for d in dims):
            order = _without(lies, () if bound["keepdim"] else dims)
            self._set(node, self._reshape(self.env[given], [self.sizes[node][d] for d in order]), order)
            return True
        more = {**bound, "self": self.env[given], "dim": [lies.index(d) for d in dims]}
        args, kwargs = unbind(node.target, more)
        made = self._call(node.target, *args, **kwargs)
        self._set(node, made, _without(lies, () if bound["keepdim"] else dims))
        return True

    def _pool(self, node: fx.Node) -> bool:
        """To the size that there is."""
        given: Any = node.args[0]
        if self.sizes[given] != self.sizes[node]:
            return False
        self._set(node, self.env[given], self._lies(given))
        return True

    def _product(self, node: fx.Node) -> bool:
        """Of a batch with one matrix: the dimensions of the batch may lie in any order."""
        one, two = node.args[:2]
        assert isinstance(one, fx.Node) and isinstance(two, fx.Node)
        rank = len(self.sizes[node])
        if node.target is aten.linear.default or len(self.sizes[two]) == 2:
            batch, fixed = one, 1  # the last dimension is summed over
        elif len(self.sizes[one]) == 2:
            batch, fixed = two, 2
        else:
            return False
        lies = self._lies(batch)
        if len(lies) != rank or lies[rank - fixed :] != _plain(self.sizes[batch])[rank - fixed :]:
            return False
        made = self.graph.node_copy(node, lambda n: self.env[n] if n is batch else self._as(n))
        self._set(node, made, lies)
        return True

    def _pointwise(self, node: fx.Node) -> bool:
        """In the order of an operand that is as large as the result; the others are brought into it."""
        size = self.sizes[node]
        whole = [self._lies(n) for n in node.all_input_nodes if n.op != "get_attr" and self.sizes[n] == size]
        order = next((o for o in whole if o != _plain(size)), None)
        if order is None:
            return False
        kwargs = {k: v for k, v in node.kwargs.items() if k != "memory_format"}
        args, kwargs = map_arg((node.args, kwargs), lambda n: self._beside(n, size, order))
        self._set(node, self._call(node.target, *args, **kwargs), order)
        return True

    def _beside(self, node: fx.Node, size: Sequence[int], order: Order) -> fx.Node:
        """An operand as it broadcasts to a result in some order."""
        own = self.sizes[node]
        if not own:
            return self.env[node]
        ahead = len(size) - len(own)
        lying = self._as(node, tuple(d - ahead for d in order if d >= ahead))
        shape = [own[d - ahead] if d >= ahead else 1 for d in order]
        if lying.op == "get_attr":
            return self._held(self.tensors[str(lying.target)].reshape(shape))
        return self._reshape(lying, shape)

    def _output(self, node: fx.Node) -> None:
        returned: Any = node.args[0]
        self.natural = [self._lies(n) for n in returned]
        self.graph.output(tuple(self._as(n, order) for n, order in zip(returned, self.wanted, strict=True)))


def _plain(size: Sequence[int]) -> Order:
    return tuple(range(len(size)))


def _without(lies: Order, dims: Sequence[int]) -> Order:
    """How it lies without some dimensions."""
    return tuple(d - sum(e < d for e in dims) for d in lies if d not in dims)


def _kept(order: Sequence[int], size: Sequence[int]) -> list[int]:
    """The dimensions that are not of size 1, as they lie."""
    return [d for d in order if size[d] != 1]


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Which dimensions of a reshape become which: the finest pairs of lists with the same numbers of entries."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        taken, made = [], []
        if i < len(before):
            taken.append(i)
            i += 1
        if j < len(after):
            made.append(j)
            j += 1
        while (one := math.prod(before[d] for d in taken)) != (two := math.prod(after[d] for d in made)):
            if one < two:
                taken.append(i)
                i += 1
            else:
                made.append(j)
                j += 1
        groups.append((taken, made))
    return groups
