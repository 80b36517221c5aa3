"""Values that hold one number everywhere in mid-stream, whatever the frames are: how many frames a window has, say.

Only at the start of a stream are there fewer, which a program of mid-stream need not look at. Such a value is that
number, and a state that has only ever got it keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from ..canonicalize import bind
from ..registry import is_pointwise

aten = torch.ops.aten

_SAME = (  # of the numbers of their arguments, some or all
    aten.reshape.default, aten.view.default, aten.permute.default, aten.transpose.int, aten.unsqueeze.default,
    aten.squeeze.dim, aten.select.int, aten.slice.Tensor, aten.expand.default, aten.clone.default, aten.unfold.default,
    aten.cat.default, aten.stack.default, aten.amax.default, aten.amin.default, aten.mean.dim,
)  # fmt: skip
_CASTS = {aten._to_copy.default, aten.to.dtype}
_EITHER = {aten.eq.Tensor, aten.ne.Tensor}  # one of them holds for all numbers, NaN too

Shapes = dict[fx.Node, tuple[int, ...]]


class Uniform:
    """The values of a graph that hold one number, which takes their place."""

    def __init__(self, graph: fx.Graph, sizes: Shapes, other: Shapes, hold: Callable[[torch.Tensor], str]) -> None:
        """
        Args:
            graph: of a program in mid-stream; it is changed.
            sizes, other: the shapes of its nodes, for two batch sizes; those of new ones are added.
            hold: the name of an attribute for a tensor.
        """
        self.sizes, self.other = sizes, other
        self.number: dict[fx.Node, torch.Tensor] = {}  # of no dimensions
        if not self._evaluate(graph):
            return
        arguments = [n for n in graph.nodes if n.op == "placeholder"]
        output = graph.output_node()
        returned: Any = output.args[0]
        results, after = returned
        kept: dict[Any, fx.Node] = {}
        for state, new in zip(arguments[len(arguments) - len(after) :], after, strict=True):
            number = self._joined(new, state)
            if number is not None:
                self.number[state] = number
                kept[new] = state
        if kept:
            self._evaluate(graph)
            output.args = ((results, tuple(kept.get(n, n) for n in after)),)
        self._put(graph, hold)

    def _evaluate(self, graph: fx.Graph) -> bool:
        for node in graph.nodes:
            if node.op == "call_function" and node in self.sizes and node not in self.number:
                number = self._of(node)
                if number is not None:
                    self.number[node] = number
        return bool(self.number)

    def _of(self, node: fx.Node) -> torch.Tensor | None:
        given = [n for n in node.all_input_nodes if n in self.sizes]
        if node.target is aten.logical_or.default and {n.target for n in given} == _EITHER:
            compared = {n for pair in given for n in pair.args}
            if len(compared) == 1:
                return torch.tensor(True)
        if not given or any(n not in self.number for n in given):
            return None
        first = self.number[given[0]]
        if node.target in _SAME:
            same = all(torch.equal(self.number[n], first) for n in given)
            return first if same and node.kwargs.get("dtype") is None else None
        if node.target is aten.sum.dim_IntList:
            return self._sum(node, first)
        if (
            isinstance(node.target, torch._ops.OpOverload)
            and len(given) == len(node.all_input_nodes)
            and (is_pointwise(node.target) or node.target in _CASTS)
        ):
            args, kwargs = map_arg((node.args, node.kwargs), self.number.__getitem__)
            return torch.as_tensor(node.target(*args, **kwargs))
        return None

    def _sum(self, node: fx.Node, number: torch.Tensor) -> torch.Tensor | None:
        bound = bind(node.target, node.args, node.kwargs)
        size, other = self.sizes[bound["self"]], self.other[bound["self"]]
        dims: Any = bound["dim"] or range(len(size))
        count = 1
        for d in [dims] if isinstance(dims, int) else dims:
            if size[d] != other[d]:
                return None
            count *= size[d]
        total = number.expand(count).sum()
        return total if bound.get("dtype") is None else total.to(bound["dtype"])

    def _joined(self, new: fx.Node, state: fx.Node) -> torch.Tensor | None:
        """The number of what is joined to a state that keeps the last frames, if it has one."""
        if not isinstance(new, fx.Node) or new.target is not aten.slice.Tensor:
            return None
        joined = new.args[0]
        if not isinstance(joined, fx.Node) or joined.target is not aten.cat.default:
            return None
        parts: Any = joined.args[0]
        others = [p for p in parts if p is not state]
        if len(others) != len(parts) - 1 or not others or any(p not in self.number for p in others):
            return None
        first = self.number[others[0]]
        return first if all(torch.equal(self.number[p], first) for p in others) else None

    def _put(self, graph: fx.Graph, hold: Callable[[torch.Tensor], str]) -> None:
        """Numbers in the place of uniform operands of what is computed entry by entry."""
        for node in list(graph.nodes):
            if not is_pointwise(node.target) or node in self.number or node not in self.sizes:
                continue
            whole = [n for n in node.all_input_nodes if n not in self.number and self.sizes.get(n) == self.sizes[node]]
            for n in node.all_input_nodes if whole else ():
                if n in self.number:
                    number = self.number[n].reshape([1] * len(self.sizes[n]))  # promotes types as it did
                    with graph.inserting_before(node):
                        held = graph.create_node("get_attr", hold(number))
                    self.sizes[held] = self.other[held] = tuple(number.shape)
                    node.replace_input_with(n, held)
