"""State in the layout of ONNX Runtime's own convolutions, which work on blocks of channels.

The runtime's optimizer puts a reordering wherever its convolutions meet anything else: at every part of the state, at
every sum. That is a quarter of a step of a net of many small convolutions. Here the graphs that it leaves are taken
once more. Values that lie alike, since they are computed from each other entry by entry or belong to one history, are
kept in blocks where that takes fewer reorderings.

A value ``[N, C, H, W]`` lies in blocks as ``[N, C / block, H, W, block]``, with C filled up to a multiple of the block;
the runtime calls it ``[N, C, H, W]`` all the same. What the further channels hold is finite, and nothing reads it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from networkx.utils import UnionFind
from onnx_ir.passes import common

from ...runtime.onnx_buffers import open_session
from ...runtime.program import Made, Passed

DOMAIN = "com.microsoft.nchwc"
FILL = 1.5  # so many times its channels a value may have

# Ops that compute each entry from the entries beside it, a finite one from zeros.
_ALIKE = {
    "Abs", "Add", "Celu", "Clip", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Max",
    "Min", "Mish", "Mul", "Neg", "QuickGelu", "Relu", "Selu", "Sigmoid", "Softsign", "Sub", "Sum", "Tanh",
}  # fmt: skip
_FUSED = {"Relu", "Sigmoid", "Tanh"}  # what a convolution does with its sum by itself

Part = ir.Value | int  # a value, or the number of a history
Shape = tuple[int, ...]


@functools.cache
def block_size() -> int:
    """The channels of a block on this machine."""
    x = ir.Value(name="x", shape=ir.Shape([1, 64, 1, 2]), type=ir.TensorType(ir.DataType.FLOAT))
    reorder = ir.Node(DOMAIN, "ReorderInput", [x])
    y = reorder.outputs[0]
    y.name, y.type, y.shape = "y", x.type, x.shape
    graph = ir.Graph([x], [y], nodes=[reorder], opset_imports={"": 20, DOMAIN: 1}, name="blocks")
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    session = open_session(model.SerializeToString(), 1, optimize=False)
    lying: Any = session.run(None, {"x": np.arange(128, dtype=np.float32).reshape(1, 64, 1, 2)})[0]
    return int(lying.reshape(-1).tolist().index(1))  # where the second position of the first channel lies


def finds_blocks(models: Sequence[ir.Model | None]) -> bool:
    """Whether ONNX Runtime's optimizer took this layout anywhere, and no branch or loop reads values from outside."""
    nodes = [node for m in models if m is not None for node in m.graph]
    inner = any(
        a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for n in nodes for a in n.attributes.values()
    )
    return not inner and any(node.domain == DOMAIN for node in nodes)


def keep_in_blocks(
    models: Sequence[ir.Model | None],
    afters: Sequence[Sequence[Passed | Made]],
    frames: int,
    groups: Sequence[int],
) -> tuple[set[int], list[onnx.ModelProto | None]]:
    """Keep in blocks what takes fewer reorderings so.

    Args:
        models: the programs of the phases as ONNX Runtime optimizes them; they are changed. None where nothing is
            computed.
        afters: for each phase where each part of the state after comes from.
        frames: how many of the inputs are not state.
        groups: for each part which history or state it belongs to.

    Returns:
        The groups that are kept in blocks, and the models that are others now; None for those that are not.
    """
    choice = _Choice()
    states = [{a.number: g for a, g in zip(p, groups, strict=True) if isinstance(a, Made)} for p in afters]
    for model, made in zip(models, states, strict=True):
        if model is not None:
            choice.read(model.graph, frames, groups, made)
    choice.make()
    new: list[onnx.ModelProto | None] = [None] * len(models)
    for i, (model, made) in enumerate(zip(models, states, strict=True)):
        if model is not None and _Rewriting(model, choice, frames, list(made)).changed:
            new[i] = ir.to_proto(model)
    return {g for g in groups if choice.keeps(g)}, new


class _Choice:
    """Which values are kept in blocks: all that lie alike, or none of them."""

    def __init__(self) -> None:
        self.alike: UnionFind[Part] = UnionFind()
        self.inside: set[ir.Value] = set()  # in blocks as the optimizer leaves them
        self.plain_only: set[ir.Value] = set()
        # Where values are made or read in blocks, and where not. If they lie the other way, each is a reordering.
        self.ends: dict[bool, set[tuple[ir.Value, str]]] = {True: set(), False: set()}
        self.chosen: set[Part] = set()

    def keeps(self, part: Part) -> bool:
        """Whether a value, or the parts of a history, which the optimizer left plain, are in blocks."""
        return self.alike[part] in self.chosen

    def read(self, graph: ir.Graph, frames: int, groups: Sequence[int], states: dict[int, int]) -> None:
        """Take in a graph.

        Args:
            graph: of a program.
            frames: how many of its inputs are not state.
            groups: of the others.
            states: of those of its outputs that are state.
        """
        for value in graph.inputs[:frames]:
            self._end(value, "made", blocked=False)
        for value, group in zip(graph.inputs[frames:], groups, strict=True):
            self._join(value, group)
        for node in graph:
            self._node(node)
        for number, value in enumerate(graph.outputs):
            if number in states:
                self._join(value, states[number])
            else:
                self._end(value, "read", blocked=False)

    def _node(self, node: ir.Node) -> None:
        given, out = _given(node), node.outputs[0]
        if _reorders(node, "ReorderOutput"):
            self._end(out, "made", blocked=True)
        elif _reorders(node, "ReorderInput"):
            self._end(given[0], "read", blocked=True)
            self.inside.add(out)
        elif node.domain == DOMAIN or any(x in self.inside for x in given):
            for x in given:
                if x not in self.inside:
                    self._end(x, "read", blocked=False)
            if node.op_type == "ReorderOutput":  # to channels last
                self._end(out, "made", blocked=False)
            else:
                self.inside.update(node.outputs)
        elif _lies_alike(node):
            for x in given:
                self._join(x, out)
        elif (product := _scaled(node)) is not None:
            self._join(product[0], out)
            self._end(product[1], "read", blocked=False)
        else:
            for x in given if not _averages(node) else ():
                self._end(x, "read", blocked=False)
            for x in node.outputs:
                self._end(x, "made", blocked=False)

    def _join(self, value: ir.Value, other: Part) -> None:
        self.alike.union(value, other)
        for x in (value, other):
            if isinstance(x, ir.Value) and not _fits(_shape(x)):
                self.plain_only.add(x)

    def _end(self, value: ir.Value, how: str, blocked: bool) -> None:
        self.ends[blocked].add((value, how))
        if not _fits(_shape(value)):
            self.plain_only.add(value)

    def make(self) -> None:
        """Choose."""
        gain: dict[Part, int] = {}
        for blocked, ends in self.ends.items():
            for value, _ in ends:
                if (shape := _shape(value)) is not None:
                    root, entries = self.alike[value], math.prod(_filled(shape))
                    gain[root] = gain.get(root, 0) + (entries if blocked else -entries)
        plain = {self.alike[x] for x in self.plain_only}
        self.chosen = {root for root, entries in gain.items() if entries > 0 and root not in plain}


class _Rewriting:
    """A graph with the chosen values in blocks.

    Attributes:
        changed: whether there are any.
    """

    def __init__(self, model: ir.Model, choice: _Choice, frames: int, states: Sequence[int]) -> None:
        """
        Args:
            model: it is changed.
            choice: of values.
            frames: how many of its inputs are not state.
            states: the numbers of its outputs that are state.
        """
        self.graph, self.choice = model.graph, choice
        self.at: ir.Node | None = None  # before which nodes are put; None: at the end
        self.shapes: dict[ir.Value, Shape] = {}  # of the chosen values
        self.ways: dict[ir.Value, dict[bool, ir.Value]] = {}  # what each of them is in blocks, and plain
        for i, value in enumerate(self.graph.inputs):
            if self._takes(value):
                self.ways[value] = {i >= frames: value}
        for node in list(self.graph):
            self._node(node)
        self.changed = bool(self.ways)
        if self.changed:
            self._outputs(states)
            common.RemoveUnusedNodesPass()(model)
            for node in list(self.graph):
                self._join_convolution(node)
            common.RemoveUnusedNodesPass()(model)

    def _takes(self, value: ir.Value) -> bool:
        """Whether a value is chosen; its shape is noted then."""
        shape = _shape(value)
        if shape is None or not self.choice.keeps(value):
            return False
        self.shapes[value] = shape
        return True

    def _node(self, node: ir.Node) -> None:
        self.at = node
        given, out = _given(node), node.outputs[0]
        product = _scaled(node)
        if _reorders(node, "ReorderInput") and given[0] in self.ways:
            self.ways[out] = {True: self._as(given[0], blocked=True)}
        elif _reorders(node, "ReorderOutput") and self._takes(out):
            self.ways[out] = {True: self._as(given[0], blocked=True), False: out}
            self._give(node, blocked=True)
        elif _lies_alike(node) and self._takes(out):
            self._give(node, blocked=True)
            self.ways[out] = {True: out}
        elif product is not None and self._takes(out):
            self.ways[out] = {True: self._scale(*product)}
        elif _averages(node) and given[0] in self.ways:
            assert out.shape is not None
            _replace(out, self._average(given[0], tuple(out.shape.numpy())))
        else:
            self._give(node, blocked=False)
            for value in node.outputs:
                if self._takes(value):
                    self.ways[value] = {False: value}

    def _as(self, value: ir.Value, blocked: bool) -> ir.Value:
        """A value in blocks or not."""
        ways = self.ways.get(value)
        if ways is None:
            return value
        if blocked not in ways:
            if blocked:
                ways[True] = self._add("ReorderInput", ways[False], domain=DOMAIN)
            else:
                ways[False] = self._add("ReorderOutput", ways[True], domain=DOMAIN, channels=self.shapes[value][1])
        return ways[blocked]

    def _give(self, node: ir.Node, blocked: bool) -> None:
        for i, value in enumerate(node.inputs):
            if value is not None:
                node.replace_input_with(i, self._as(value, blocked or value in self.choice.inside))

    def _add(self, op: str, *given: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """The result of an op."""
        node = ir.node(op, given, attributes, domain=domain)
        if self.at is None:
            self.graph.append(node)
        else:
            self.graph.insert_before(self.at, node)
        return node.outputs[0]

    def _numbers(self, *numbers: int) -> ir.Value:
        name = f"blocked_{len(self.graph.initializers)}"
        value = ir.Value(name=name, const_value=ir.tensor(list(numbers), ir.DataType.INT64, name))
        self.graph.register_initializer(value)
        return value

    def _scale(self, whole: ir.Value, scale: ir.Value) -> ir.Value:
        """The channels of a value times a number each: a convolution of single positions."""
        batch, channels, *positions = self.shapes[whole]
        lying, weights = self._as(whole, blocked=True), self._as(scale, blocked=False)
        filled = _filled(self.shapes[whole])[1]
        if filled != channels:
            weights = self._add("Pad", weights, self._numbers(0, 0, 0, 0, 0, filled - channels, 0, 0))
        every = batch * filled  # the pictures of a batch are as further channels of one
        weights = self._add("Reshape", weights, self._numbers(every, 1, 1, 1))
        if batch > 1:
            lying = self._add("Reshape", lying, self._numbers(1, every, *positions))
        once = {"kernel_shape": [1, 1], "strides": [1, 1], "dilations": [1, 1], "pads": [0, 0, 0, 0]}
        made = self._add("Conv", lying, weights, domain=DOMAIN, group=every, **once)
        return made if batch == 1 else self._add("Reshape", made, self._numbers(batch, filled, *positions))

    def _average(self, value: ir.Value, shape: Shape) -> ir.Value:
        """The averages of a value's channels in some shape."""
        batch, channels, *_ = self.shapes[value]
        made = self._add("GlobalAveragePool", self._as(value, blocked=True), domain=DOMAIN)
        if _filled(self.shapes[value])[1] != channels:
            made = self._add("Slice", made, self._numbers(0), self._numbers(channels), self._numbers(1))
        return made if shape == (batch, channels, 1, 1) else self._add("Reshape", made, self._numbers(*shape))

    def _outputs(self, states: Sequence[int]) -> None:
        for value, ways in self.ways.items():
            if ways.get(True) is value and value in self.shapes:
                value.shape = ir.Shape(_filled(self.shapes[value]))
        self.at = None
        for number, value in enumerate(self.graph.outputs):
            if value not in self.ways:
                continue
            new = self._as(value, blocked=number in states)
            if new.is_graph_output() and new is not value:
                new = self._add("Identity", new)
            new.type = value.type
            new.shape = ir.Shape(_filled(self.shapes[value]) if number in states else self.shapes[value])
            self.graph.outputs[number] = new

    def _join_convolution(self, node: ir.Node) -> None:
        """Let a convolution take in a sum, or what is done with its result."""
        if node.domain == "" and node.op_type == "Add":
            for one, other in (tuple(node.inputs), tuple(node.inputs)[::-1]):
                before = _convolution(one)
                if before is not None and other is not None and other.const_value is None and len(before.inputs) <= 3:
                    self.at = node
                    given = (*before.inputs, None)[:3]
                    attributes = {k: a.value for k, a in before.attributes.items()}
                    _replace(node.outputs[0], self._add("Conv", *given, other, domain=DOMAIN, **attributes))
                    self.graph.remove([node, before], safe=True)
                    return
        elif node.domain == "" and node.op_type in _FUSED and (before := _convolution(node.inputs[0])) is not None:
            before.attributes["activation"] = ir.AttrString("activation", node.op_type)
            _replace(node.outputs[0], before.outputs[0])


def _convolution(value: ir.Value | None) -> ir.Node | None:
    """The convolution in blocks whose result is read only once, if it does nothing with it as yet."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.domain != DOMAIN or node.op_type != "Conv":
        return None
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    return node if alone and "activation" not in node.attributes else None


def _replace(old: ir.Value, new: ir.Value) -> None:
    """Let all nodes read another value, and the graph return it."""
    if old.is_graph_output():
        new.type, new.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _given(node: ir.Node) -> list[ir.Value]:
    """What a node reads that is not constant."""
    return [x for x in node.inputs if x is not None and x.const_value is None]


def _shape(value: ir.Value) -> Shape | None:
    """Of frames of channels; None for other values."""
    shape = value.shape
    if shape is None or len(shape) != 4 or value.dtype != ir.DataType.FLOAT or not shape.is_static():
        return None
    return tuple(shape.numpy())


def _filled(shape: Shape) -> Shape:
    """A shape with whole blocks of channels."""
    block = block_size()
    return (shape[0], -(-shape[1] // block) * block, *shape[2:])


def _fits(shape: Shape | None) -> bool:
    return shape is not None and 0 < _filled(shape)[1] <= FILL * shape[1]


def _reorders(node: ir.Node, op: str) -> bool:
    """Whether it is a reordering of plain values, not of such as have their channels last."""
    last = node.attributes.get("channels_last")
    return node.domain == DOMAIN and node.op_type == op and (last is None or last.as_int() == 0)


def _lies_alike(node: ir.Node) -> bool:
    """Whether a node computes its result entry by entry from values of the same shape."""
    shape = _shape(node.outputs[0])
    return (
        node.domain in ("", "com.microsoft")
        and node.op_type in _ALIKE
        and len(node.outputs) == 1
        and shape is not None
        and all(_shape(x) == shape for x in _given(node))
        and all(x is None or x.const_value is None or x.const_value.size == 1 for x in node.inputs)
    )


def _scaled(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """A value and what its channels are multiplied with."""
    shape = _shape(node.outputs[0])
    if node.domain or node.op_type != "Mul" or shape is None or len(_given(node)) != 2:
        return None
    for whole, scale in (_given(node), _given(node)[::-1]):
        if _shape(whole) == shape and _shape(scale) == (*shape[:2], 1, 1):
            return whole, scale
    return None


def _averages(node: ir.Node) -> bool:
    """Whether a node computes the averages of channels."""
    value, shape = node.inputs[0] if node.inputs else None, node.outputs[0].shape
    if node.domain or value is None or _shape(value) is None or shape is None or not shape.is_static():
        return False
    axes = node.inputs[1] if node.op_type == "ReduceMean" and len(node.inputs) == 2 else None
    if axes is None or axes.const_value is None:
        return node.op_type == "GlobalAveragePool"
    return sorted(n % 4 for n in axes.const_value.numpy().reshape(-1).tolist()) == [2, 3]
