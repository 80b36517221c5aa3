"""Histories frame by frame: a program of one tick in which large frames are tensors of their own.

A program keeps the frames of a value side by side in one tensor, and moves all of them to append one. Where frames are
large that takes longer than to compute with them one by one, so here

- a history comes and goes as one tensor for each frame, and is moved on by naming: nothing is copied,
- a convolution over time is a sum of convolutions of frames, one for each tap, that have a dimension less (for which
  the libraries have better kernels, above all where it is depthwise),
- what is elementwise, or looks at one frame alone, is computed on the frame.

Everything else gets its frames stacked, and gives the numbers it gave before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from ..canonicalize import bind, listed, unbind
from ..registry import is_pointwise
from .aliases import base
from .rows import from_rows, to_rows

aten = torch.ops.aten

LARGE = 1 << 12  # bytes of a frame from which on moving it takes longer than a call
FEW = 64  # positions up to which one product of all taps takes less than one for each
MOST = 32  # frames of a history that are kept one by one

_POOLS: dict[Any, Any] = {
    aten.avg_pool3d.default: aten.avg_pool2d.default,
    aten.max_pool3d.default: aten.max_pool2d.default,
    aten.adaptive_avg_pool3d.default: aten.adaptive_avg_pool2d.default,
}
_CONVOLUTIONS: dict[Any, Any] = {  # of frames, in the place of those over time
    aten.conv3d.default: aten.conv2d.default,
    aten.conv2d.default: aten.conv1d.default,
}
REDUCTIONS = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default)

Sizes = Mapping[fx.Node, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Frames:
    """A tensor, as one tensor for each entry of a dimension.

    Attributes:
        axis: the dimension.
        nodes: its entries, which have no such dimension.
    """

    axis: int
    nodes: tuple[fx.Node, ...]


class Apart:
    """A copy of a program's graph in which some states are taken apart.

    Attributes:
        graph: the copy; its placeholders are those of the program, but for the states taken apart, which have one for
            each frame.
    """

    def __init__(
        self,
        graph: fx.Graph,
        sizes: Sizes,
        states: Mapping[fx.Node, int],
        kept: Sequence[int | None],
        derive: Callable[[fx.Node, str, Callable[[torch.Tensor], torch.Tensor]], str | None],
        blocks: bool,
    ) -> None:
        """
        Args:
            graph: of a program that takes one tick.
            sizes: the shapes of its nodes.
            states: the placeholders that are taken apart, with their dimension of frames.
            kept: for each state that is returned the dimension in which it is taken apart, or None.
            derive: the name of an attribute computed from the one that a node names; None if it names none.
            blocks: it runs where pictures lie in blocks of channels (`blocked.py`).
        """
        self.blocks = blocks
        self.old, self.sizes, self.states, self.kept, self.derive = graph, sizes, states, kept, derive
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.whole: dict[Frames, fx.Node] = {}
        self.attributes: dict[str, fx.Node] = {}
        self.given: set[fx.Node] = set()
        for node in graph.nodes:
            self.env[node] = self._visit(node)

    # -- one value, in one form or the other ---------------------------------------------------------------------------

    def plain(self, node: fx.Node) -> fx.Node:
        """A node as one tensor."""
        value = self.env[node]
        if not isinstance(value, Frames):
            return value  # type: ignore[no-any-return]
        if value not in self.whole:
            if len(value.nodes) == 1:
                self.whole[value] = self._call(aten.unsqueeze.default, value.nodes[0], value.axis)
            else:
                self.whole[value] = self._call(aten.stack.default, list(value.nodes), value.axis)
        return self.whole[value]

    def apart(self, node: fx.Node, axis: int) -> Frames:
        """A node as frames along a dimension."""
        value = self.env[node]
        if isinstance(value, Frames) and value.axis == axis:
            return value
        whole = self.plain(node)
        entries = range(self.sizes[node][axis])
        return Frames(axis, tuple(self._call(aten.select.int, whole, axis, i) for i in entries))

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def _attribute(self, name: str) -> fx.Node:
        if name not in self.attributes:
            self.attributes[name] = self.graph.get_attr(name)
        return self.attributes[name]

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if node in self.states:
                count = self.sizes[node][self.states[node]]
                names = [f"{node.name}_{i}" for i in range(count)]
                return Frames(self.states[node], tuple(self.graph.placeholder(n) for n in names))
            made = self.graph.placeholder(str(node.target))
            self.given.add(made)
            return made
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        if node.op == "output":
            return self._output(node)
        return self._by_frame(node) or self.graph.node_copy(node, self.plain)

    def _by_frame(self, node: fx.Node) -> Frames | fx.Node | None:
        """What a node gives, computed on frames; None if it has to have one tensor."""
        given = [self.env[n] for n in node.all_input_nodes]
        if node.target is aten.unsqueeze.default:
            source = self.env[node.args[0]]  # type: ignore[index]
            if isinstance(source, fx.Node) and source.op == "placeholder":
                axis = int(node.args[1])  # type: ignore[arg-type]
                return Frames(axis % len(self.sizes[node]), (source,))
            return None
        if node.target is aten.cat.default:
            return self._cat(node)
        if node not in self.sizes:
            return None
        if not any(isinstance(v, Frames) for v in given) and node.target is not aten.conv3d.default:
            return None
        bound = bind(node.target, node.args, node.kwargs) if isinstance(node.target, torch._ops.OpOverload) else {}
        if node.target in _CONVOLUTIONS:
            return self._convolution(node, bound)
        if node.target is aten.slice.Tensor:
            return self._slice(node, bound)
        if node.target is aten.select.int:
            source = self.env[bound["self"]]
            same = bound["dim"] % len(self.sizes[bound["self"]]) == source.axis
            return source.nodes[bound["index"]] if same else None
        if node.target is aten.clone.default:
            return self.env[bound["self"]]  # type: ignore[no-any-return]
        if node.target in _POOLS:
            return self._pool(node, bound)
        if node.target in REDUCTIONS:
            return self._reduce(node, bound)
        if node.target is aten.batch_norm.default:
            return self._alone(node, bound, "input", lambda axis: axis >= 2)
        if node.target is aten.linear.default:
            return self._alone(node, bound, "input", lambda axis: axis < len(self.sizes[node]) - 1)
        if node.target is aten.permute.default:
            return self._permute(bound)
        if is_pointwise(node.target):
            return self._elementwise(node)
        return None

    def _cat(self, node: fx.Node) -> Frames | None:
        parts: Any = node.args[0]
        axis: Any = node.args[1] if len(node.args) > 1 else 0
        if not any(isinstance(self.env[p], Frames) and self.env[p].axis == axis for p in parts):
            return None
        if any(p not in self.sizes for p in parts) or self.sizes[node][axis] > MOST + 1:
            return None
        if any(not isinstance(self.env[p], Frames) and self.sizes[p][axis] > 1 for p in parts):
            return None  # frames that are kept side by side stay so: taken apart, they would be put together again
        return Frames(axis, tuple(n for p in parts for n in self.apart(p, axis).nodes))

    def _slice(self, node: fx.Node, bound: dict[str, Any]) -> Frames | None:
        source, limits = self.env[bound["self"]], (bound["start"], bound["end"], bound["step"])
        if bound["dim"] != source.axis or not all(n is None or isinstance(n, int) for n in limits):
            return None
        nodes = source.nodes[slice(*limits)]
        return Frames(source.axis, nodes) if nodes else None

    def _convolution(self, node: fx.Node, bound: dict[str, Any]) -> Frames | None:
        """The sum of its taps."""
        size, taken, weight = self.sizes[node], self.sizes[bound["input"]], bound["weight"]
        spatial = len(self.sizes[weight]) - 2
        if isinstance(bound["padding"], str) or weight.op != "get_attr" or len(size) != spatial + 2:
            return None
        given = self.env[bound["input"]]
        if isinstance(given, Frames) and given.axis != 2:
            return None
        stride, padding, dilation = (listed(bound[name], spatial) for name in ("stride", "padding", "dilation"))
        taps = self.sizes[weight][2]
        if size[2] != 1 or padding[0] or taps > MOST or taken[2] != dilation[0] * (taps - 1) + 1:
            return None
        frames = self.apart(bound["input"], 2).nodes[:: dilation[0]]
        alone = {*self.sizes[weight][3:], *stride[1:]} == {1} and not any(padding)  # each position by itself
        positions = prod(size[3:])
        pictures = self.blocks and node.target is aten.conv3d.default and positions > 1  # they lie in blocks
        if alone and bound["groups"] == 1 and positions <= FEW and not pictures:
            return Frames(2, (self._rows(frames, weight, bound["bias"], size),))
        total = None
        for i, frame in enumerate(frames):
            tap = self._tap(weight, i)
            bias = None if i or bound["bias"] is None else self.plain(bound["bias"])
            made = self._call(
                _CONVOLUTIONS[node.target], frame, tap, bias, stride[1:], padding[1:], dilation[1:], bound["groups"]
            )
            total = made if total is None else self._call(aten.add.Tensor, total, made)
        assert total is not None
        return Frames(2, (total,))

    def _rows(self, frames: Sequence[fx.Node], weight: fx.Node, bias: fx.Node | None, size: Sequence[int]) -> fx.Node:
        """All taps as one product, with a row for each position: (positions, taps * in) x (taps * in, out)."""
        out, channels = self.sizes[weight][:2]
        rows = to_rows(self._call, frames, channels, [1] * len(size[3:]))
        name = self.derive(weight, "rows of taps", lambda w: w.flatten(2).permute(2, 1, 0).flatten(0, 1).contiguous())
        assert name is not None
        turned = self._attribute(name)
        product = (aten.mm.default,) if bias is None else (aten.addmm.default, self.plain(bias))
        return from_rows(self._call, self._call(*product, rows, turned), size[3:], out)

    def _tap(self, weight: fx.Node, i: int) -> fx.Node:
        name = self.derive(weight, f"tap {i}", lambda w: w.select(2, i).contiguous())
        assert name is not None
        return self._attribute(name)

    def _pool(self, node: fx.Node, bound: dict[str, Any]) -> Frames | None:
        """A pool of single frames."""
        source = self.env[bound["self"]]
        if source.axis != len(self.sizes[node]) - 3 or len(source.nodes) != 1:
            return None
        if "output_size" in bound:
            if bound["output_size"][0] != 1:
                return None
            return Frames(source.axis, (self._call(_POOLS[node.target], source.nodes[0], bound["output_size"][1:]),))
        named = ("kernel_size", "stride", "padding", "dilation")  # no stride is the kernel's
        spans = {k: listed(v, 3) for k, v in bound.items() if k in named and v != []}
        if spans["kernel_size"][0] != 1 or spans["padding"][0]:
            return None
        given = {**bound, **{k: v[1:] for k, v in spans.items()}, "self": source.nodes[0]}
        args, kwargs = unbind(_POOLS[node.target], given)
        return Frames(source.axis, (self._call(_POOLS[node.target], *args, **kwargs),))

    def _reduce(self, node: fx.Node, bound: dict[str, Any]) -> Frames | None:
        """A reduction of other dimensions of a single frame."""
        source = self.env[bound["self"]]
        rank = len(self.sizes[bound["self"]])
        dims = bound["dim"]
        if not isinstance(source, Frames) or len(source.nodes) != 1 or not dims:
            return None
        dims = [d % rank for d in ([dims] if isinstance(dims, int) else dims)]
        if source.axis in dims:
            return None
        given = {**bound, "self": source.nodes[0], "dim": [d - (d > source.axis) for d in dims]}
        args, kwargs = unbind(node.target, given)
        axis = source.axis if bound["keepdim"] else source.axis - sum(d < source.axis for d in dims)
        return Frames(axis, (self._call(node.target, *args, **kwargs),))

    def _alone(self, node: fx.Node, bound: dict[str, Any], name: str, fits: Callable[[int], bool]) -> Frames | None:
        """The same call on a single frame."""
        source = self.env[bound[name]]
        others = [n for n in node.all_input_nodes if n is not bound[name]]
        if not isinstance(source, Frames) or len(source.nodes) != 1 or not fits(source.axis):
            return None
        if any(isinstance(self.env[n], Frames) for n in others):
            return None
        given = map_arg({k: v for k, v in bound.items() if k != name}, self.plain)
        args, kwargs = unbind(node.target, {**bound, **given, name: source.nodes[0]})
        return Frames(source.axis, (self._call(node.target, *args, **kwargs),))

    def _permute(self, bound: dict[str, Any]) -> Frames | None:
        source, rank = self.env[bound["self"]], len(self.sizes[bound["self"]])
        if len(source.nodes) != 1:
            return None
        dims = [d % rank for d in bound["dims"]]
        order = [d - (d > source.axis) for d in dims if d != source.axis]
        return Frames(dims.index(source.axis), (self._call(aten.permute.default, source.nodes[0], order),))

    def _elementwise(self, node: fx.Node) -> Frames | None:
        """An elementwise op on single frames and on what broadcasts along them."""
        rank = len(self.sizes[node])
        from_right = {
            len(self.sizes[n]) - self.env[n].axis for n in node.all_input_nodes if isinstance(self.env[n], Frames)
        }
        if len(from_right) != 1 or self.sizes[node][rank - next(iter(from_right))] != 1:
            return None
        place = from_right.pop()
        frames: dict[fx.Node, fx.Node] = {}
        for n in node.all_input_nodes:
            value, size = self.env[n], self.sizes.get(n)
            if isinstance(value, Frames):
                if len(value.nodes) != 1:
                    return None
                frames[n] = value.nodes[0]
            elif size is None:
                return None
            elif len(size) < place:
                frames[n] = value
            elif size[len(size) - place] != 1:
                return None
            else:
                frames[n] = self._squeezed(n, len(size) - place)
        return Frames(rank - place, (self.graph.node_copy(node, frames.__getitem__),))

    def _squeezed(self, node: fx.Node, axis: int) -> fx.Node:
        derived = self.derive(node, f"without {axis}", lambda t: t.squeeze(axis))
        return self._call(aten.squeeze.dim, self.plain(node), axis) if derived is None else self._attribute(derived)

    # -- results -------------------------------------------------------------------------------------------------------

    def _output(self, node: fx.Node) -> fx.Node:
        results, states = map(list, node.args[0])  # type: ignore[arg-type]
        after: list[fx.Node] = []
        own: set[fx.Node] = set()  # memory that is kept
        for state, axis in zip(states, self.kept, strict=True):
            if axis is None:
                after.append(self.plain(state))
                continue
            for frame in self.apart(state, axis).nodes:
                kept = self._cloned(frame) if base(frame) in self.given else frame
                own.add(base(kept))
                after.append(kept)
        outputs = []
        for result in results:
            made = None if result is None else self.plain(result)
            shared = made is not None and (base(made).op == "placeholder" or base(made) in own)
            outputs.append(self._call(aten.clone.default, made) if shared else made)
        returned: fx.Node = self.graph.output((tuple(outputs), tuple(after)))
        return returned

    def _cloned(self, frame: fx.Node) -> fx.Node:
        """A copy of a caller's frame, in whose place all that reads it then uses it."""
        with self.graph.inserting_after(frame):
            copy = self._call(aten.clone.default, frame)
        frame.replace_all_uses_with(copy, lambda user: user is not copy)
        return copy
