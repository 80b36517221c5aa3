"""What is computed, in the fastest way that is known: norms go into the weights before them, convolutions of one frame
become what `benchmarks/ops.py` found faster.

All of it is done on a copy of a program's graph; the program itself stays as the rules wrote it. Only where what
depends on parameters alone may be a constant (`Key.folded`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from ..canonicalize import bind, unbind

if TYPE_CHECKING:
    from .graph_module import Constants

aten = torch.ops.aten

CONVOLUTIONS: dict[Any, int] = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
FULL = (torch.float32, torch.float64)  # in the half types a product of weights would be rounded once more
Shapes = Sequence[tuple[tuple[int, ...], torch.dtype]]


class Lowering:
    """A copy of a program's graph in the making.

    Attributes:
        graph: the copy.
        tensors: what its get_attr nodes name.
    """

    def __init__(self, module: fx.GraphModule, constants: Constants, arguments: Shapes, device: torch.device) -> None:
        self.constants, self.made = constants, constants.made
        self.sizes = _sizes(module, arguments, device)
        self.tensors = {n.target: getattr(module, n.target) for n in module.graph.nodes if n.op == "get_attr"}
        self.graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        result = self.graph.graph_copy(module.graph, copies)
        self.graph.output(result)
        self.size_of = {copies[n]: s for n, s in self.sizes.items() if n in copies}
        for node in list(self.graph.nodes):
            if node.target is aten.batch_norm.default:
                self.fold_norm(node)
        for node in list(self.graph.nodes):
            if node.target in CONVOLUTIONS:
                self.convolution(node)
        self.graph.eliminate_dead_code()

    def held(self, node: Any) -> torch.Tensor | None:
        """The tensor that a get_attr node names."""
        return self.tensors[node.target] if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def derived(self, how: str, sources: Sequence[torch.Tensor | None], make: Callable[[], torch.Tensor]) -> fx.Node:
        """A tensor computed from held ones, once for all programs."""
        key = (how, *map(id, sources))
        if key not in self.made:
            with _disable_current_modes(), torch.no_grad():
                self.made[key] = (make(), sources)  # the sources stay, so that their ids do
            self.constants.note(sources)
        name = f"derived_{len(self.tensors)}"
        self.tensors[name] = self.made[key][0]
        return self.graph.create_node("get_attr", name)

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
        sources = (weight, bias, scale, shift, mean, var)

        def factor() -> torch.Tensor:
            spread: torch.Tensor = (var + given["eps"]).rsqrt()
            return spread if scale is None else scale * spread

        def scaled() -> torch.Tensor:
            return weight * factor().view(-1, *[1] * (weight.dim() - 1))

        def offset() -> torch.Tensor:
            moved = (-mean if bias is None else bias - mean) * factor()
            return moved if shift is None else moved + shift

        with self.graph.inserting_before(conv):
            taken["weight"] = self.derived(f"norm weight {given['eps']}", sources, scaled)
            taken["bias"] = self.derived(f"norm bias {given['eps']}", sources, offset)
        conv.args, conv.kwargs = unbind(conv.target, taken)
        norm.replace_all_uses_with(conv)
        self.graph.erase_node(norm)

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
        stride, padding, dilation = (_each(given[name], n) for name in ("stride", "padding", "dilation"))
        kernel, groups = list(weight.shape[2:]), given["groups"]
        if (out[2], size[2], padding[0]) != (1, kernel[0], 0):
            return
        alone = kernel[1:] == stride[1:] == [1] * (n - 1) and not any(padding)  # no mixing beside time and channels
        rows, picture, positions = size[1] * kernel[0], size[3:], prod(size[3:])
        with self.graph.inserting_before(node):
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
            elif groups == size[1] == len(weight) and alone and n == 3 and kernel[0] > 1:
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

    def call(self, target: Any, *args: Any) -> fx.Node:
        """One call of a function."""
        return self.graph.call_function(target, args)


def _each(value: int | list[int], n: int) -> list[int]:
    """A parameter given once for all spatial dimensions, as a list with one entry for each."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * n if len(numbers) == 1 else numbers


def _sizes(module: fx.GraphModule, arguments: Shapes, device: torch.device) -> dict[fx.Node, tuple[int, ...]]:
    """The shape of every tensor in a program, from arguments of example shapes; none if torch cannot tell."""
    found: dict[fx.Node, tuple[int, ...]] = {}

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, torch.Tensor):
                found[n] = tuple(result.shape)
            return result

    try:
        # the caller's modes, a counter of operations say, are for what a step does
        with _disable_current_modes(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            Record(module).run(*(torch.empty(size, dtype=dtype, device=device) for size, dtype in arguments))
    except (RuntimeError, NotImplementedError):  # an op without a shape function, or whose result's shape is data
        return {}
    return found
