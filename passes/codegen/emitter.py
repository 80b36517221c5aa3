"""Emits the calls of a step program: ATen ops, constants, and values that do not depend on time."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from ..canonicalize import unbind
from ..layout import BATCH, KEY, TIME, Layout
from ..loops import Loop
from ..schedule_delays import Schedule
from ..stream_graph import Op, Value, Window
from .aliases import base
from .constants import Constants
from .key import FOREVER, Key

aten = torch.ops.aten


class Emitter:
    """A step program in the making: a graph that calls ATen ops, and the tensors that it holds.

    Attributes:
        graph: of the program.
        root: the tensors that it holds, by the names of its get_attr nodes.
        inputs: for each input of the traced graph the program's argument.
        about: goes into the ``meta["cofx"]`` of every node that is emitted.
        scope: the rows and columns on which pairs of frames are being evaluated, see pairs.py.
    """

    def __init__(
        self,
        schedule: Schedule,
        key: Key,
        batch_input: tuple[int, int] | None,
        constants: Constants,
        device: torch.device,
    ) -> None:
        """
        Args:
            schedule: of the model.
            key: which program.
            batch_input: an input and its dimension from which the batch size is read; None if it is fixed.
            constants: what depends on parameters alone.
            device: of the tensors that the program holds.
        """
        self.schedule = schedule
        self.key = key
        self.batch_input = batch_input
        self.constants = constants
        self.device = device
        self.graph = fx.Graph()
        self.root: dict[str, torch.Tensor] = {}
        self.inputs: dict[fx.Node, fx.Node] = {}
        self.statics: dict[fx.Node, Any] = {}
        self.about: Any = None
        self.scope: Any = None
        self._memo: dict[Any, Any] = {}

    # -- emitting ----------------------------------------------------------------------------------------------------

    def emit(self, target: Any, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
        """One call of a function."""
        node = self.graph.create_node("call_function", target, args, kwargs, name=name)
        node.meta["cofx"] = self.about
        return node

    def aten(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """One call of an ATen overload, by its name (``"add.Tensor"``)."""
        packet, overload = name.split(".")
        return self.emit(getattr(getattr(aten, packet), overload), *args, **kwargs)

    def getitem(self, node: fx.Node, index: int) -> fx.Node:
        """One of several results."""
        return self.emit(operator.getitem, node, index)

    def narrow(self, node: fx.Node, axis: int, start: int, frames: int) -> fx.Node:
        """Some entries of a dimension."""
        return self.aten("slice.Tensor", node, axis, start, start + frames)

    def every(self, node: fx.Node, axis: int, step: int) -> fx.Node:
        """Every `step`-th entry of a dimension."""
        return self.aten("slice.Tensor", node, axis, 0, FOREVER, step)

    def cat(self, nodes: list[fx.Node], axis: int, name: str | None = None) -> fx.Node:
        """Tensors side by side."""
        return nodes[0] if len(nodes) == 1 else self.emit(aten.cat.default, nodes, axis, name=name)

    def pad_end(self, node: fx.Node, layout: Layout, frames: int) -> fx.Node:
        """Zeros after the last frame."""
        return self.aten("constant_pad_nd.default", node, [0, 0] * (len(layout) - 1 - layout.time) + [0, frames])

    def call(self, op: Op, windows: list[Window], target: Any = None, **overrides: Any) -> fx.Node:
        """The op's own traced call on the windows of its streams, with some arguments (or the overload) replaced."""
        assert op.node is not None
        replaced = {n: w.node for n, w in zip(op.stream_nodes, windows, strict=False)}

        def substitute(n: fx.Node) -> Any:
            return replaced[n] if n in replaced else self.static(n)

        bound = dict(op.node.meta["samples"][0])
        for name, value in overrides.items():
            bound[name] = value
        mapped = {
            k: v if k in overrides else self.numbers(op.node, k, map_arg(v, substitute)) for k, v in bound.items()
        }
        target = target or op.node.target
        args, kwargs = unbind(target, mapped)
        return self.emit(target, *args, **kwargs)

    def numbers(self, node: fx.Node, name: str, value: Any) -> Any:
        """An argument with the numbers that follow the batch size computed from it."""
        samples = node.meta["samples"]
        return self.by_batch([value, *(s.get(name) for s in samples[1:])])

    def by_batch(self, seen: Sequence[Any]) -> Any:
        """Numbers that may follow the batch size, from what they are at each sample point."""
        batch = self.schedule.graph.batch
        other = next((i for i, b in enumerate(batch) if b != batch[0]), None)
        if other is None or self.batch_input is None:
            return seen[0]
        return self._with_batch(seen[0], seen[other], batch[0], batch[other])

    def _with_batch(self, here: Any, there: Any, b0: int, b1: int) -> Any:
        if isinstance(here, (list, tuple)):
            return [self._with_batch(h, t, b0, b1) for h, t in zip(here, there, strict=True)]
        if isinstance(here, int) and not isinstance(here, bool) and here != there:
            slope, left = divmod(there - here, b1 - b0)
            if left:
                raise AssertionError("a number that does not follow the batch size in a line")
            rest = here - slope * b0
            product = self.batch if slope == 1 else self.emit(operator.mul, self.batch, slope)
            return product if rest == 0 else self.emit(operator.add, product, rest)
        return here

    # -- sizes -------------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> fx.Node:
        """The batch size, read from the first input."""
        if "batch" not in self._memo:
            assert self.batch_input is not None
            index, axis = self.batch_input
            self._memo["batch"] = self.aten("sym_size.int", list(self.inputs.values())[index], axis)
        node: fx.Node = self._memo["batch"]
        return node

    def sizes(self, layout: Layout, frames: int) -> list[Any]:
        """A layout's shape with that many frames."""
        out: list[Any] = []
        for d in layout:
            size, batched = 1, False
            for f in d:
                batched = batched or f is BATCH
                size *= self._extent(f, frames)
            if not batched:
                out.append(size)
            elif size == 1:
                out.append(self.batch)
            else:
                if (size, "batch") not in self._memo:
                    self._memo[size, "batch"] = self.emit(operator.mul, self.batch, size)
                out.append(self._memo[size, "batch"])
        return out

    def _extent(self, factor: Any, frames: int) -> int:
        if factor is KEY:
            return len(self.scope.columns)
        return frames if factor is TIME else 1 if factor is BATCH else factor

    def reshape(self, node: fx.Node, layout: Layout, frames: int) -> fx.Node:
        """A row-major reshape to a layout."""
        return self.aten("reshape.default", node, self.sizes(layout, frames))

    def split(self, node: fx.Node, layout: Layout, frames: int) -> fx.Node:
        """Time in a dimension of its own."""
        return node if layout.clean else self.reshape(node, layout.split(), frames)

    def merge(self, node: fx.Node, layout: Layout, frames: int) -> fx.Node:
        """The inverse of `split`."""
        return node if layout.clean else self.reshape(node, layout, frames)

    def narrow_merged(self, value: Value, window: Window, up: int, span: range) -> fx.Node:
        """Frames `span` of a value whose frames come in groups of `up`, from the groups in `window`."""
        skip = span.start - window.start * up
        if skip == 0 and len(span) == (window.stop - window.start) * up:
            return window.node
        return self.narrow(window.node, value.layout.time, skip, len(span))

    def repeat_frames(self, window: Window, axis: int, times: int, span: range) -> fx.Node:
        """Each frame `times` times, cropped to `span`."""
        wide = self.aten("repeat_interleave.self_int", window.node, times, axis)
        skip, total = span.start - window.start * times, (window.stop - window.start) * times
        return wide if (skip, total) == (0, len(span)) else self.narrow(wide, axis, skip, len(span))

    def index_frames(self, node: fx.Node, axis: int, indices: list[int]) -> fx.Node:
        """Chosen entries of a dimension."""
        return self.aten("index_select.default", node, axis, self.constant(indices, torch.int64))

    def owned(self, node: fx.Node | None) -> fx.Node | None:
        """A tensor that shares no memory with the inputs or the state: outputs are the caller's."""
        source = None if node is None else base(node)
        kept = source is not None and (source.op == "placeholder" or source.name.startswith("delay_"))
        return self.aten("clone.default", node) if kept and node is not None else node

    # -- constants and static values ---------------------------------------------------------------------------------

    def constant(self, numbers: Any, dtype: torch.dtype) -> fx.Node:
        """A small tensor of known numbers."""
        key = ("constant", str(numbers), dtype)
        if key not in self._memo:
            self._memo[key] = self.attribute(
                f"constant_{len(self.root)}", torch.tensor(numbers, dtype=dtype, device=self.device)
            )
        node: fx.Node = self._memo[key]
        return node

    def attribute(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """A tensor that the program holds."""
        if name not in self.root:
            self.root[name] = tensor
        if ("attribute", name) not in self._memo:
            node = self.graph.get_attr(name)
            node.meta["cofx"] = self.about
            self._memo["attribute", name] = node
        found: fx.Node = self._memo["attribute", name]
        return found

    def static(self, node: fx.Node) -> Any:
        """A value that does not depend on time, inside the program."""
        if node not in self.statics:
            self.statics[node] = self._static(node)
        return self.statics[node]

    def _static(self, node: fx.Node) -> Any:
        if node in self.inputs:
            return self.inputs[node]
        if node.op == "get_attr":
            return self.attribute(str(node.target).replace(".", "_"), self.constants.value(node))
        if node not in self.constants.batched and self.key.folded:
            value = self.constants.value(node)
            if isinstance(value, torch.Tensor):
                return self.attribute(f"folded_{node.name}", value)
            if isinstance(value, (tuple, list)):
                return [self.attribute(f"folded_{node.name}_{i}", v) for i, v in enumerate(value)]
        return self.copy(node, self.static)

    def copy(self, node: fx.Node, value_of: Any) -> Any:
        """A node of the traced graph as it was at the first sample point, its batch size left open."""
        if node.target is operator.getitem:
            source = value_of(node.args[0])
            return source[node.args[1]] if isinstance(source, (list, tuple)) else self.getitem(source, node.args[1])  # type: ignore[arg-type,index]
        bound = {k: self.numbers(node, k, map_arg(v, value_of)) for k, v in node.meta["samples"][0].items()}
        if isinstance(node.target, Loop):
            return self.loop(node.target, list(bound.values()), node)
        args, kwargs = unbind(node.target, bound)
        return self.emit(node.target, *args, **kwargs)

    def loop(self, loop: Loop, args: list[Any], node: fx.Node) -> list[Any]:
        """A loop over all frames of whole clips."""
        streams = args[: len(loop.dims)]
        state = [] if loop.starts else args[len(streams) : len(streams) + len(loop.carried)]
        given = args[len(streams) + len(state) :]
        collected: list[list[Any]] = [[] for _ in loop.results]
        length = node.meta["samples"][0]["0"].meta["sizes"][0][loop.dims[0]] // loop.widths[0]
        for t in range(length):
            frames = loop.frames(streams, t, functools.partial(self.aten, "select.int"), self.narrow)
            if t < len(loop.starts):
                after = self.inline(loop.starts[t], [*frames, *given])
                made = loop.of_start(t, after)
            else:
                ramps = [
                    self.constant(at + t * step, dtype)
                    for (at, step), dtype in zip(loop.ramps, loop.ramp_dtypes(), strict=True)
                ]
                after = self.inline(loop.body, [*frames, *ramps, *state, *given])
                made = list(enumerate(after[len(loop.carried) :]))
            state = after[: len(loop.carried)] if t + 1 >= len(loop.starts) else []
            for i, value in made:
                collected[i].append(value)
        return [
            part[-1] if r.how == "last" else self.aten(f"{r.how}.default", part, r.dim)
            for part, r in zip(collected, loop.results, strict=True)
        ]

    def inline(self, graph: fx.Graph, given: list[Any]) -> list[Any]:
        """The results of a graph of traced nodes on these inputs."""
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        env: dict[fx.Node, Any] = dict(zip(inputs, given, strict=True))
        for node in graph.nodes:
            if node.op == "call_function":
                env[node] = self.copy(node, env.__getitem__)
        return [env[n] for n in graph.output_node().args[0]]  # type: ignore[union-attr,index]

    def view_as_channel(self, node: Any, axis: int, rank: int) -> fx.Node:
        """A vector as a tensor of `rank` dimensions, lying along `axis`."""
        return self.aten("reshape.default", node, [-1 if i == axis else 1 for i in range(rank)])

    def along_time(self, node: fx.Node, layout: Layout) -> fx.Node:
        """A vector with an entry per frame, shaped to broadcast along a (clean) layout's time axis."""
        return self.view_as_channel(node, layout.time, len(layout))

    def like(self, number: float, node: fx.Node) -> fx.Node:
        """A number as a tensor of a node's dtype and device."""
        return self.aten("new_full.default", node, [], number)

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """Another dtype."""
        return node if dtype == torch.int64 else self.aten("_to_copy.default", node, dtype=dtype)

    def full(self, sizes: list[Any], number: float, dtype: torch.dtype) -> fx.Node:
        """The same number everywhere."""
        return self.aten("new_full.default", next(iter(self.inputs.values())), sizes, number, dtype=dtype)
