"""Channels up to a multiple of four, for ONNX Runtime: its fast depthwise convolutions take no other number of them.

Frames whose channels a depthwise convolution reads are made, kept and computed with a few more, which are zeros: the
weights of what makes them and of what reads them have zeros there. Everything else gets the frames as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..canonicalize import bind, unbind
from ..registry import is_pointwise
from .frames import REDUCTIONS, Sizes

aten = torch.ops.aten

MULTIPLE = 4


def pad_channels(
    graph: fx.Graph, sizes: Sizes, tensors: dict[str, torch.Tensor], states: Sequence[fx.Node]
) -> dict[fx.Node, int]:
    """Pad what is worth it in a program; give the channels that its padded states have.

    Args:
        graph: ``(frames..., states...) -> (results, states after)``; it is changed.
        sizes: the shapes of its nodes.
        tensors: what its get_attr nodes name; padded ones are added.
        states: those of its arguments that are states.
    """
    return _Padding(graph, sizes, tensors, states).padded_states


class _Padding:
    def __init__(
        self, graph: fx.Graph, sizes: Sizes, tensors: dict[str, torch.Tensor], states: Sequence[fx.Node]
    ) -> None:
        self.graph, self.sizes, self.tensors = graph, sizes, tensors
        self.padded_states: dict[fx.Node, int] = {}
        self.slow = {sizes[n][1] for n in graph.nodes if self._depthwise(n) and sizes[n][1] % MULTIPLE}
        if not self.slow:
            return
        self.states = set(states)
        self.family: set[fx.Node] = set()
        for node in graph.nodes:
            if self._belongs(node):
                self.family.add(node)
        self.made: dict[fx.Node, fx.Node] = {}  # with more channels, or without
        for node in list(graph.nodes):
            if node.op == "output":
                self._output(node, states)
            elif node.op == "call_function" and node.target is aten.conv2d.default:
                self._convolution(node)
            elif node in self.family and node.op == "call_function":
                for n in node.all_input_nodes:
                    if len(self.sizes[n]) == 4 and self.sizes[n][1] == self.sizes[node][1]:
                        node.replace_input_with(n, self._as(n, node, padded=True))
            elif node.op == "call_function":
                for n in node.all_input_nodes:
                    node.replace_input_with(n, self._as(n, node, padded=False))
        self.padded_states = {n: _more(sizes[n][1]) for n in states if n in self.family}

    def _held(self, node: Any) -> torch.Tensor | None:
        return self.tensors[str(node.target)] if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def _given(self, node: fx.Node) -> dict[str, Any] | None:
        """The arguments of a convolution of frames whose weights are held."""
        if node.target is not aten.conv2d.default or len(self.sizes.get(node, ())) != 4:
            return None
        given = bind(node.target, node.args, node.kwargs)
        held = self._held(given["weight"]) is not None and (
            given["bias"] is None or self._held(given["bias"]) is not None
        )
        return given if held else None

    def _depthwise(self, node: fx.Node) -> bool:
        given = self._given(node)
        channels = 0 if given is None else self.sizes[node][1]
        return given is not None and given["groups"] == channels == self.sizes[given["input"]][1] > 1

    def _belongs(self, node: fx.Node) -> bool:
        """Whether a node is computed, or kept, with more channels."""
        size = self.sizes.get(node, ())
        if len(size) != 4 or size[1] not in self.slow:
            return False
        if node.op == "placeholder":
            return node in self.states
        if node.target is aten.conv2d.default:
            given = self._given(node)
            return self._depthwise(node) or (given is not None and given["groups"] == 1)
        if node.target in REDUCTIONS:  # of each channel by itself
            reduced = bind(node.target, node.args, node.kwargs)
            dims = [reduced["dim"]] if isinstance(reduced["dim"], int) else reduced["dim"] or [1]
            return reduced["self"] in self.family and reduced["keepdim"] and all(d % 4 > 1 for d in dims)
        if not is_pointwise(node.target):
            return False
        operands = [self.sizes.get(n) for n in node.all_input_nodes]
        return all(s is not None and (len(s) == 0 or (len(s) == 4 and s[1] in (1, size[1]))) for s in operands)

    def _as(self, node: fx.Node, reader: fx.Node, padded: bool) -> fx.Node:
        """A node with or without the further channels."""
        if (node in self.family) == padded:
            return node
        if node not in self.made:
            channels = self.sizes[node][1]
            with self.graph.inserting_before(reader):
                if padded:
                    more = [0, 0, 0, 0, 0, _more(channels) - channels]
                    made = self.graph.call_function(aten.constant_pad_nd.default, (node, more))
                else:
                    made = self.graph.call_function(aten.slice.Tensor, (node, 1, 0, channels))
            self.made[node] = made
        return self.made[node]

    def _convolution(self, node: fx.Node) -> None:
        given = self._given(node)
        if given is None:
            for n in node.all_input_nodes:
                node.replace_input_with(n, self._as(n, node, padded=False))
            return
        source, weight, bias = given["input"], self._held(given["weight"]), self._held(given["bias"])
        assert weight is not None
        out = _more(len(weight)) - len(weight) if node in self.family else 0
        if self._depthwise(node):
            given["input"] = self._as(source, node, padded=bool(out))
            given["groups"] += out
            inward = 0
        elif given["groups"] == 1:
            inward = _more(weight.shape[1]) - weight.shape[1] if source in self.family else 0
        else:
            given["input"], inward = self._as(source, node, padded=False), 0
        if out or inward:
            given["weight"] = self._hold(node, F.pad(weight, [0, 0, 0, 0, 0, inward, 0, out]))
            given["bias"] = None if bias is None else self._hold(node, F.pad(bias, [0, out]))
        node.args, node.kwargs = unbind(aten.conv2d.default, given)

    def _hold(self, before: fx.Node, tensor: torch.Tensor) -> fx.Node:
        name = f"padded_{len(self.tensors)}"
        self.tensors[name] = tensor
        with self.graph.inserting_before(before):
            return self.graph.create_node("get_attr", name)

    def _output(self, node: fx.Node, states: Sequence[fx.Node]) -> None:
        returned: Any = node.args[0]
        results, after = returned
        results = tuple(None if y is None else self._as(y, node, padded=False) for y in results)
        after = tuple(self._as(s, node, padded=b in self.family) for s, b in zip(after, states, strict=True))
        node.args = ((results, after),)


def _more(channels: int) -> int:
    return -(-channels // MULTIPLE) * MULTIPLE
