"""The kernels of torch's CPU build for frames: which computes a convolution of one frame, and what else it takes in.

- 1 x 1: a matrix product of the frame's pixels (channels last, so that they are rows) with the transposed weight; taps
  are added up by the product itself.
- All others: oneDNN with the weight in the layout that oneDNN wants, reordered once; what is added to the result and an
  activation after it are computed where the result is written.

Chosen by `benchmarks/ops.py`. There are no gradients through these, and no other dtype than float32.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..canonicalize import bind, listed
from .rows import from_rows, to_rows

if TYPE_CHECKING:
    from .lower import Lowering

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn

ACTIVATIONS: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.relu_.default: "relu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.hardswish.default: "hardswish",
    aten.hardswish_.default: "hardswish",
    aten.silu.default: "swish",
    aten.silu_.default: "swish",
}


_POSITIONS: dict[Any, int] = {aten.conv1d.default: 1, aten.conv2d.default: 2}  # dimensions beside the channels

IN_PLACE: dict[Any, Any] = {
    aten.relu.default: aten.relu_.default,
    aten.silu.default: aten.silu_.default,
    aten.hardswish.default: aten.hardswish_.default,
}


def choose_kernels(lowering: Lowering, inputs: Container[str]) -> None:
    """Put kernels in the place of the convolutions of frames in a graph without gradients.

    Args:
        lowering: what is to be changed.
        inputs: the names of the arguments that are the caller's.
    """
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        Pictures(lowering, inputs)


class Pictures:
    """The convolutions of single frames in a graph, as kernels."""

    def __init__(self, lowering: Lowering, inputs: Container[str]) -> None:
        self.lowering, self.graph, self.size = lowering, lowering.graph, lowering.size_of
        self.fresh: set[fx.Node] = set()  # results of kernels, which nothing else looks at
        for node in list(self.graph.nodes):
            if node.target in _POSITIONS and self._fits(node):
                self._convolution(node)
        for node in list(self.graph.nodes):
            if node.target is aten.add.Tensor:
                self._sum(node)
        for node in list(self.graph.nodes):
            if node.target in ACTIVATIONS:
                self._activation(node)
        for node in list(self.graph.nodes):
            if node.target is aten.mul.Tensor:
                self._swish(node)
            elif node.target in IN_PLACE:
                self._in_place(node)
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and node.name in inputs:
                self._turn(node)

    def _fits(self, node: fx.Node) -> bool:
        given = bind(node.target, node.args, node.kwargs)
        weight, bias = self.lowering.held(given["weight"]), self.lowering.held(given["bias"])
        plain = weight is not None and weight.dtype is torch.float32 and not isinstance(given["padding"], str)
        rank = _POSITIONS[node.target] + 2
        batched = len(self.size.get(node, ())) == len(self.size.get(given["input"], ())) == rank
        return plain and batched and (given["bias"] is None or bias is not None)

    def _replace(self, node: fx.Node, made: fx.Node) -> None:
        if node in self.size:
            self.size[made] = self.size[node]
        node.replace_all_uses_with(made)
        self.graph.erase_node(node)

    def _convolution(self, node: fx.Node) -> None:
        given = bind(node.target, node.args, node.kwargs)
        weight = self.lowering.held(given["weight"])
        assert weight is not None
        spatial = _POSITIONS[node.target]
        stride, padding, dilation = (listed(given[k], spatial) for k in ("stride", "padding", "dilation"))
        with self.graph.inserting_before(node):
            if all(k == 1 for k in weight.shape[2:]) and given["groups"] == 1 and not any(padding):
                made = self._product(given, weight, stride)
            elif spatial == 2:
                made = self._packed(given, weight, stride, padding, dilation)
            else:
                return
        self._replace(node, made)

    def _product(self, given: dict[str, Any], weight: torch.Tensor, stride: list[int]) -> fx.Node:
        """Pixels times weights: (pixels, in) x (in, out)."""
        call, x = self.lowering.call, given["input"]
        picture = [-(-size // step) for size, step in zip(self.size[x][2:], stride, strict=True)]
        turned = self.lowering.derived("pixels", [weight], lambda: weight.flatten(1).t().contiguous())
        rows = to_rows(call, [x], weight.shape[1], stride)
        if given["bias"] is None:
            found = call(aten.mm.default, rows, turned)
        else:
            found = call(aten.addmm.default, given["bias"], rows, turned)
        made = from_rows(call, found, picture, weight.shape[0])
        made.meta["product"] = rows, turned, found
        return made

    def _packed(
        self, given: dict[str, Any], weight: torch.Tensor, stride: list[int], padding: list[int], dilation: list[int]
    ) -> fx.Node:
        """oneDNN's convolution with its own layout of the weight."""
        groups, size = given["groups"], list(self.size[given["input"]])

        def pack() -> torch.Tensor:
            packed: torch.Tensor = mkldnn._reorder_convolution_weight(
                weight.contiguous(memory_format=torch.channels_last), padding, stride, dilation, groups, size
            )
            return packed

        packed = self.lowering.derived(f"packed {stride} {padding} {dilation} {groups} {size}", [weight], pack)
        more = (padding, stride, dilation, groups)
        made = self.lowering.call(
            mkldnn._convolution_pointwise.default, given["input"], packed, given["bias"], *more, "none", [], ""
        )
        self.fresh.add(made)
        return made

    def _sum(self, node: fx.Node) -> None:
        """What a convolution's result is added to is added where it is written."""
        if node.kwargs or len(node.args) != 2:
            return
        left, right = node.args
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node) or left is right:
            return
        if self.size.get(left) != self.size.get(right):
            return
        for made, other in ((right, left), (left, right)):
            if len(made.users) != 1:
                continue
            if "product" in made.meta and "product" in other.meta and self._sum_of_products(node, made, other):
                return
            if made.target is mkldnn._convolution_pointwise.default and made.args[7] == "none":
                x, packed, bias, *more = made.args[:7]
                with self.graph.inserting_before(node):
                    given = (packed, bias, *more, "add", 1.0, None, [], "")
                    if other in self.fresh and len(other.users) == 1:
                        found = self.lowering.call(mkldnn._convolution_pointwise_.binary, other, x, *given)
                    else:
                        found = self.lowering.call(mkldnn._convolution_pointwise.binary, x, other, *given)
                self.fresh.add(found)
                self._replace(node, found)
                self.graph.erase_node(made)
                return

    def _sum_of_products(self, node: fx.Node, made: fx.Node, other: fx.Node) -> bool:
        """Taps of which each is a matrix product."""
        rows, turned, found = made.meta["product"]
        *_, before = other.meta["product"]
        if found.target is not aten.mm.default or len(other.users) != 1:
            return False
        with self.graph.inserting_before(node):
            total = self.lowering.call(aten.addmm.default, before, rows, turned)
            shaped = self.lowering.call(aten.reshape.default, total, made.args[0].args[1])  # type: ignore[union-attr]
            picture = self.lowering.call(aten.permute.default, shaped, made.args[1])
        picture.meta["product"] = rows, turned, total
        self._replace(node, picture)
        return True

    def _activation(self, node: fx.Node) -> None:
        """An activation after a convolution is computed where its result is written."""
        source = node.args[0]
        if not isinstance(source, fx.Node) or len(source.users) != 1 or len(node.args) != 1 or node.kwargs:
            return
        kind = ACTIVATIONS[node.target]
        if source.target is mkldnn._convolution_pointwise.default and source.args[7] == "none":
            source.update_arg(7, kind)
        elif source.target in (mkldnn._convolution_pointwise.binary, mkldnn._convolution_pointwise_.binary):
            if source.args[10] is not None or kind != "relu":
                return
            source.update_arg(10, kind)
        else:
            return
        node.replace_all_uses_with(source)
        self.graph.erase_node(node)

    def _swish(self, node: fx.Node) -> None:
        """``x * sigmoid(x)`` in one pass."""
        if len(node.args) != 2 or node.kwargs:
            return
        for source, gate in (node.args, node.args[::-1]):
            if isinstance(gate, fx.Node) and gate.target is aten.sigmoid.default and gate.args[0] is source:
                with self.graph.inserting_before(node):
                    made = self.lowering.call(aten.silu.default, source)
                self._replace(node, made)
                if not gate.users:
                    self.graph.erase_node(gate)
                return

    def _in_place(self, node: fx.Node) -> None:
        """An activation is written over a product of which nothing else is read."""
        source = node.args[0]
        if isinstance(source, fx.Node) and "product" in source.meta and len(source.users) == 1:
            node.target = IN_PLACE[node.target]

    def _turn(self, node: fx.Node) -> None:
        """Frames that come from outside are read channels last."""
        readers = [u for u in node.users if u.target is mkldnn._convolution_pointwise.default and u.args[0] is node]
        if not readers:
            return
        with self.graph.inserting_before(readers[0]):
            turned = self.graph.call_function(aten.clone.default, (node,), {"memory_format": torch.channels_last})
        for reader in readers:
            reader.replace_input_with(node, turned)
