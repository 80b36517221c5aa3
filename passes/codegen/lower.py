"""What is computed, in the fastest way that is known: norms go into the weights before them, convolutions of one frame
become what `benchmarks/ops.py` found faster.

All of it is done on a copy of a program's graph; the program itself stays as the rules wrote it. Only where what
depends on parameters alone may be a constant (`Key.folded`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import _disable_current_modes

from ..canonicalize import bind, listed, unbind
from ..symbolic_recurrence import SHAPE_KERNELS
from .einsum import expand_einsums
from .frames import REDUCTIONS, Apart
from .kernels import choose_kernels
from .uniform import Uniform
from .units import Units

if TYPE_CHECKING:
    from .constants import Constants

aten = torch.ops.aten

CONVOLUTIONS: dict[Any, int] = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
SMALL = 1 << 11  # numbers of a depthwise convolution's matrix for each channel, up to which a product is faster
FULL = (torch.float32, torch.float64)  # in the half types a product of weights would be rounded once more
META = torch.device("meta")
Shapes = Sequence[tuple[tuple[int, ...], torch.dtype]]


class Lowering:
    """A copy of a program's graph in the making.

    Attributes:
        graph: the copy.
        tensors: what its get_attr nodes name.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        constants: Constants,
        arguments: tuple[Shapes, Shapes],
        device: torch.device,
        apart: Mapping[str, int] | None = None,
        kernels: bool = True,
    ) -> None:
        """
        Args:
            module: the program.
            constants: what depends on parameters alone.
            arguments: the shapes and dtypes of the program's arguments, for two batch sizes (or twice for one).
            device: where it runs.
            apart: the states that come and go frame by frame, with their dimension of frames; None if the program is
                not for mid-stream.
            kernels: it may call kernels that are torch's alone.
        """
        self.constants, self.made = constants, constants.made
        self.fast = apart is not None  # also by ways that take more multiply-adds, which nobody then counts
        self.tensors = {n.target: getattr(module, n.target) for n in module.graph.nodes if n.op == "get_attr"}
        self.graph = fx.Graph()
        self.graph.output(self.graph.graph_copy(module.graph, {}))
        one, other = arguments
        self.device = device
        looks = self.fast or any(n.target in CONVOLUTIONS for n in self.graph.nodes)
        self.size_of = shapes_of(self.graph, self.tensors, one) if looks else {}
        for node in list(self.graph.nodes):
            if node.target is aten.batch_norm.default:
                self.fold_norm(node)
        self.inputs: set[str] = set()  # the names of the arguments that are the caller's
        if apart and self.size_of:
            one, other = self.take_apart(apart, not kernels, one, other)
            self.size_of = shapes_of(self.graph, self.tensors, one)
        if self.fast and self.size_of:
            self.expand_norms(one)
            self.reduce_windows()
            other_sizes = shapes_of(self.graph, self.tensors, other) if other != one else dict(self.size_of)
            expand_einsums(self, other_sizes)
            Uniform(self.graph, self.size_of, other_sizes, self.number)
            units = Units(self.graph, self.size_of, other_sizes)
            self.graph, self.size_of = units.graph, units.sizes
            self.graph.eliminate_dead_code()
        for node in list(self.graph.nodes):
            if node.target in CONVOLUTIONS:
                self.convolution(node)
        if apart and kernels and device.type == "cpu":
            choose_kernels(self, self.inputs)
        self.graph.eliminate_dead_code()

    def take_apart(self, apart: Mapping[str, int], blocks: bool, *arguments: Shapes) -> list[Shapes]:
        """Frames of these states one by one; the shapes of the arguments as they are then."""
        given = [n for n in self.graph.nodes if n.op == "placeholder"]
        states = {n: apart[n.name] for n in given if n.name in apart}
        before = list(self.graph.output_node().args[0][1])  # type: ignore[index,arg-type]
        kept = [states.get(n) for n in given[len(given) - len(before) :]]
        self.inputs = {n.name for n in given[: len(given) - len(before)]}

        def derive(node: fx.Node, how: str, make: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
            tensor = self.held(node)
            return None if tensor is None else self.derived_name(how, [tensor], lambda: make(tensor))

        self.graph = Apart(self.graph, self.size_of, states, kept, derive, blocks).graph
        return [list(_single(given, shapes, states)) for shapes in arguments]

    def number(self, number: torch.Tensor) -> str:
        """The name of an attribute for a number that is known."""
        name = f"number_{len(self.tensors)}"
        self.tensors[name] = number.to(self.device)
        return name

    def held(self, node: Any) -> torch.Tensor | None:
        """The tensor that a get_attr node names."""
        return self.tensors[node.target] if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def derived(self, how: str, sources: Sequence[torch.Tensor | None], make: Callable[[], torch.Tensor]) -> fx.Node:
        """A node that gives a tensor computed from held ones, once for all programs."""
        node = self.graph.create_node("get_attr", self.derived_name(how, sources, make))
        self.size_of[node] = tuple(self.tensors[node.target].shape)
        return node

    def derived_name(self, how: str, sources: Sequence[torch.Tensor | None], make: Callable[[], torch.Tensor]) -> str:
        """The name of a tensor computed from held ones."""
        key = (how, *map(id, sources))
        if key not in self.made:
            with _disable_current_modes(), torch.no_grad():
                self.made[key] = (make(), sources)  # the sources stay, so that their ids do
            self.constants.note(sources)
        name = f"derived_{len(self.tensors)}"
        self.tensors[name] = self.made[key][0]
        return name

    def fold_norm(self, norm: fx.Node) -> None:
        """``batch_norm(conv(x, w, b)) = conv(x, w*s, (b - mean)*s + shift)`` with ``s = scale / sqrt(var + eps)``."""
        given = bind(norm.target, norm.args, norm.kwargs)
        conv = given["input"]
        if not isinstance(conv, fx.Node) or conv.target not in CONVOLUTIONS or len(conv.users) != 1:
            return
        taken = bind(conv.target, conv.args, conv.kwargs)
        weight, mean, var = (
            self.held(taken["weight"]),
            self.held(given["running_mean"]),
            self.held(given["running_var"]),
        )
        if weight is None or mean is None or var is None or weight.dtype not in FULL or given["training"]:
            return
        if mean.dtype != weight.dtype or len(self.size_of.get(conv, ())) != weight.dim():
            return
        optional = [taken["bias"], given["weight"], given["bias"]]
        if any(n is not None and self.held(n) is None for n in optional):
            return
        bias, scale, shift = (self.held(n) for n in optional)
        factor, offset = _affine(mean, var, given["eps"], scale, shift, bias)
        sources = (weight, bias, scale, shift, mean, var)

        def scaled() -> torch.Tensor:
            return weight * factor().view(-1, *[1] * (weight.dim() - 1))

        with self.graph.inserting_before(conv):
            taken["weight"] = self.derived(f"norm weight {given['eps']}", sources, scaled)
            taken["bias"] = self.derived(f"norm bias {given['eps']}", sources, offset)
        conv.args, conv.kwargs = unbind(conv.target, taken)
        norm.replace_all_uses_with(conv)
        self.graph.erase_node(norm)

    def expand_norms(self, arguments: Shapes) -> None:
        """Norms that could not be folded, entry by entry: that asks for no order of dimensions."""
        norms = [n for n in self.graph.nodes if n.target is aten.batch_norm.default]
        values = values_of(self.graph, self.tensors, arguments) if norms else {}
        for norm in norms:
            self.expand_norm(norm, values[norm].dtype)

    def expand_norm(self, norm: fx.Node, dtype: torch.dtype) -> None:
        """``batch_norm(x) = x*s + (shift - mean*s)``."""
        given = bind(norm.target, norm.args, norm.kwargs)
        names = ("weight", "bias", "running_mean", "running_var")
        sources = [self.held(given[name]) for name in names]
        size = self.size_of.get(norm)
        if (
            size is None
            or given["training"]
            or any(t is None and given[n] for t, n in zip(sources, names, strict=True))
        ):
            return
        scale, shift, mean, var = sources
        if mean is None or var is None or mean.dtype is not dtype or dtype not in FULL:
            return
        shape = [-1, *[1] * (len(size) - 2)]
        factor, offset = _affine(mean, var, given["eps"], scale, shift)

        with self.graph.inserting_before(norm):
            spread = self.derived(f"norm scale {shape} {given['eps']}", sources, lambda: factor().view(shape))
            moved = self.derived(f"norm shift {shape} {given['eps']}", sources, lambda: offset().view(shape))
            found = self.call(aten.mul.Tensor, given["input"], spread)
            self.size_of[found] = size
            found = self.call(aten.add.Tensor, found, moved)
            self.size_of[found] = size
        norm.replace_all_uses_with(found)
        self.graph.erase_node(norm)

    def reduce_windows(self) -> None:
        """``x.unfold(dim, len, 1).sum(-1) = x.sum(dim, keepdim=True)`` as there is one window; others likewise."""
        for node in list(self.graph.nodes):
            if node.target not in REDUCTIONS or node not in self.size_of:
                continue
            given = bind(node.target, node.args, node.kwargs)
            windows, dims = given["self"], given["dim"]
            rank = len(self.size_of.get(windows, ()))
            if windows.target is not aten.unfold.default or given["keepdim"] or dims not in ([-1], [rank - 1]):
                continue
            source, dim, length, _ = windows.args
            if length == self.size_of[source][dim]:
                args, kwargs = unbind(node.target, {**given, "self": source, "dim": [dim], "keepdim": True})
                with self.graph.inserting_before(node):
                    found = self.graph.call_function(node.target, args, kwargs)
                self.size_of[found] = self.size_of[node]
                node.replace_all_uses_with(found)
                self.graph.erase_node(node)

    def convolution(self, node: fx.Node) -> None:
        """A convolution whose first kernel dimension takes all frames of its input, to one frame of output."""
        given = bind(node.target, node.args, node.kwargs)
        source, n = given["input"], CONVOLUTIONS[node.target]
        weight, bias = self.held(given["weight"]), self.held(given["bias"])
        size, out = self.size_of.get(source), self.size_of.get(node)
        if weight is None or size is None or out is None or len(size) != n + 2:
            return
        if given["bias"] is not None and bias is None:
            return
        stride, padding, dilation = (listed(given[name], n) for name in ("stride", "padding", "dilation"))
        kernel, groups = list(weight.shape[2:]), given["groups"]
        if (out[2], size[2], padding[0]) != (1, dilation[0] * (kernel[0] - 1) + 1, 0):
            return
        alone = kernel[1:] == stride[1:] == [1] * (n - 1) and not any(padding)  # no mixing beside time and channels
        rows, picture, positions = size[1] * kernel[0], size[3:], prod(size[3:])
        depthwise = groups == size[1] == len(weight)
        with self.graph.inserting_before(node):
            if dilation[0] > 1 and (groups == 1 or depthwise):
                source = self.call(aten.slice.Tensor, source, 2, 0, size[2], dilation[0])
            if groups == 1 and alone and positions == 1:
                turned = self.derived("turned", [weight], lambda: weight.reshape(-1, rows).t().contiguous())
                flat = self.call(aten.reshape.default, source, [-1, rows])
                product = (aten.mm.default,) if bias is None else (aten.addmm.default, given["bias"])
                found = self.call(*product, flat, turned)
            elif groups == 1 and alone and n == 2:
                folded = self.derived("rows", [weight], lambda: weight.reshape(-1, rows))
                found = self.call(
                    aten.matmul.default, folded, self.call(aten.reshape.default, source, [-1, rows, positions])
                )
                if bias is not None:
                    found = self.call(aten.add.Tensor, found, self.derived("column", [bias], lambda: bias[:, None]))
            elif groups == 1 and n == 3 and not alone:
                folded = self.derived("frames", [weight], lambda: weight.reshape(-1, rows, *kernel[1:]))
                flat = self.call(aten.reshape.default, source, [-1, rows, *picture])
                spatial = (stride[1:], padding[1:], dilation[1:])
                found = self.call(aten.conv2d.default, flat, folded, given["bias"], *spatial)
            elif self.fast and depthwise and n == 2 and kernel[0] * positions * out[3] <= SMALL:
                given |= {"source": size, "stride": stride, "padding": padding, "dilation": dilation}
                found = self.small_depthwise(source, weight, bias, given)
            elif depthwise and alone and n == 3 and kernel[0] > 1:
                taps = self.derived("taps", [weight], lambda: weight.reshape(-1, 1, kernel[0]))
                flat = self.call(aten.reshape.default, source, [-1, size[1], kernel[0], positions])
                found = self.call(aten.matmul.default, taps, flat)
                if bias is not None:
                    shape = [-1, 1, 1]
                    found = self.call(aten.add.Tensor, found, self.derived("b", [bias], lambda: bias.reshape(shape)))
            else:
                return
            found = self.call(aten.reshape.default, found, [-1, *out[1:]])
        node.replace_all_uses_with(found)
        self.graph.erase_node(node)

    def small_depthwise(
        self, source: fx.Node, weight: torch.Tensor, bias: torch.Tensor | None, given: dict[str, Any]
    ) -> fx.Node:
        """A depthwise convolution of few positions, as one product for each channel with all taps at their places."""
        _, channels, _, places = given["source"]
        frames, extent = weight.shape[2], (given["stride"][1], given["padding"][1], given["dilation"][1])

        def spread() -> torch.Tensor:
            each = torch.eye(frames * places, dtype=weight.dtype, device=weight.device)
            each = each.view(-1, 1, frames, places).expand(-1, channels, -1, -1)
            stride, padding, dilation = extent
            made = aten.conv2d.default(each, weight, None, [1, stride], [0, padding], [1, dilation], channels)
            return made.flatten(2).transpose(0, 1).contiguous()  # type: ignore[no-any-return]

        matrix = self.derived(f"spread {frames} {places} {extent}", [weight], spread)
        rows = self.call(aten.reshape.default, source, [-1, channels, frames * places])
        rows = self.call(aten.transpose.int, rows, 0, 1)
        if bias is None:
            found = self.call(aten.bmm.default, rows, matrix)
        else:
            column = self.derived("each channel", [bias], lambda: bias[:, None, None].contiguous())
            found = self.call(aten.baddbmm.default, column, rows, matrix)
        return self.call(aten.transpose.int, found, 0, 1)

    def call(self, target: Any, *args: Any) -> fx.Node:
        """One call of a function."""
        return self.graph.call_function(target, args)


def _affine(
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """What a norm multiplies with and what it adds then, of each channel; with a `bias` added before it."""

    def factor() -> torch.Tensor:
        spread: torch.Tensor = (var + eps).rsqrt()
        return spread if scale is None else scale * spread

    def offset() -> torch.Tensor:
        moved = (-mean if bias is None else bias - mean) * factor()
        return moved if shift is None else moved + shift

    return factor, offset


def _single(
    given: Sequence[fx.Node], arguments: Shapes, states: Mapping[fx.Node, int]
) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
    """The shapes of arguments, those of some states frame by frame."""
    for node, (size, dtype) in zip(given, arguments, strict=True):
        axis = states.get(node)
        if axis is None:
            yield size, dtype
        else:
            yield from [((*size[:axis], *size[axis + 1 :]), dtype)] * size[axis]


def shapes_of(
    graph: fx.Graph, tensors: Mapping[str, torch.Tensor], arguments: Shapes
) -> dict[fx.Node, tuple[int, ...]]:
    """The shape of every tensor in a graph, from arguments of example shapes; none if torch cannot tell."""
    return {n: tuple(v.shape) for n, v in values_of(graph, tensors, arguments).items()}


def values_of(graph: fx.Graph, tensors: Mapping[str, torch.Tensor], arguments: Shapes) -> dict[fx.Node, torch.Tensor]:
    """Every tensor in a graph on the device "meta", which has shapes and dtypes alone; none if torch cannot tell.

    That takes a fifth of the time of fake tensors.
    """
    values: dict[fx.Node, Any] = {}
    given = iter(arguments)

    def value(arg: Any) -> Any:
        return values[arg] if isinstance(arg, fx.Node) else META if isinstance(arg, torch.device) else arg

    try:
        # the caller's modes, a counter of operations say, are for what a step does
        with _disable_current_modes(), torch.no_grad():
            for node in graph.nodes:
                if node.op == "placeholder":
                    size, dtype = next(given)
                    values[node] = torch.empty(size, dtype=dtype, device=META)
                elif node.op == "get_attr":
                    values[node] = tensors[str(node.target)].to(META)
                elif node.op == "call_function":
                    args, kwargs = map_aggregate((node.args, node.kwargs), value)
                    values[node] = SHAPE_KERNELS.get(node.target, node.target)(*args, **kwargs)
    except (RuntimeError, NotImplementedError):  # an op without a shape function, or whose result's shape is data
        return {}
    return {n: v for n, v in values.items() if isinstance(v, torch.Tensor)}
