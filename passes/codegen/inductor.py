"""Code generation: the program of a step in mid-stream, as inductor compiles it.

Inductor makes one loop of what is computed entry by entry, and calls libraries for the rest. So here

- a depthwise convolution is a sum of shifted products: a loop that takes in what comes before and after it, for which
  the libraries have no good kernel,
- a convolution of single pixels is a matrix product of rows of channels, whose bias joins the loop that follows,
- frames are kept as the program makes them, channels last.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ...runtime.program import Made, Passed
from ..canonicalize import bind, listed
from ..capture import untraced
from .frames import Sizes
from .lower import shapes_of
from .rows import from_rows, to_rows
from .session import as_module, split_results

aten = torch.ops.aten

_POSITIONS: dict[Any, int] = {aten.conv1d.default: 1, aten.conv2d.default: 2}  # dimensions beside the channels
TAPS = 25  # of a depthwise kernel that is written out


@untraced
def compile_inductor(
    graph: fx.Graph, tensors: Mapping[str, torch.Tensor], arguments: Sequence[torch.Tensor], frames: int
) -> Callable[..., Any]:
    """A program compiled for arguments of just these shapes.

    Args:
        graph: ``(frames..., parts of the state...) -> (outputs, parts of the state after)``.
        tensors: what its get_attr nodes name.
        arguments: of the shapes and dtypes in question.
        frames: how many of them are not state.
    """
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    held = {name: t.detach() for name, t in tensors.items()}
    sizes = shapes_of(copy, held, [(tuple(x.shape), x.dtype) for x in arguments])
    loops = _Loops(copy, sizes, held)
    given = [n for n in copy.nodes if n.op == "placeholder"]
    results, after = split_results(copy, given[frames:])
    if not copy.output_node().args[0]:
        return lambda *given: ([None] * len(results), given[frames:])
    turned = _turn_kept(copy, loops.sizes, after)
    strides = [_strides(x, number >= frames) for number, x in enumerate(arguments)]
    with torch.no_grad():
        examples: list[Any] = [_laid_out(x, s) for x, s in zip(arguments, strides, strict=True)]
        compiled: Any = torch._inductor.compile(as_module(copy, held), examples, options={"freezing": loops.dense})

    def run(*given: torch.Tensor) -> Any:
        with torch.no_grad():
            found = compiled(*(x if x.stride() == s else _laid_out(x, s) for x, s in zip(given, strides, strict=True)))
            found = [y.permute(0, 3, 1, 2) if number in turned else y for number, y in enumerate(found)]
        outputs = [None if r is None else found[r.number] for r in results]
        return outputs, tuple(given[frames + a.part] if isinstance(a, Passed) else found[a.number] for a in after)

    return run


class _Loops:
    """Convolutions of frames as what inductor makes loops of; a graph is changed.

    Attributes:
        sizes: the shapes of its nodes.
        dense: most weights are of other convolutions, which are faster if inductor lays out their weights itself.
    """

    def __init__(self, graph: fx.Graph, sizes: Sizes, tensors: dict[str, torch.Tensor]) -> None:
        """
        Args:
            graph: a program.
            sizes: the shapes of its nodes.
            tensors: what its get_attr nodes name; new ones are added.
        """
        self.graph, self.sizes, self.tensors = graph, dict(sizes), tensors
        products = others = 0
        for node in list(graph.nodes):
            if node.target not in _POSITIONS or not {node, node.args[0]} <= self.sizes.keys():
                continue
            given = bind(node.target, node.args, node.kwargs)
            weight, n = self._held(given["weight"]), _POSITIONS[node.target]
            if weight is None or isinstance(given["padding"], str) or len(self.sizes[node]) != n + 2:
                continue
            spans = [listed(given[name], n) for name in ("stride", "padding", "dilation")]
            channels, taps = self.sizes[given["input"]][1], math.prod(weight.shape[2:])
            with graph.inserting_before(node):
                if given["groups"] == channels == len(weight) and channels > 1 and taps <= TAPS:
                    made = self._shifted(given["input"], weight, self.sizes[node], *spans)
                elif given["groups"] == taps == 1 and not any(spans[1]):
                    made = self._product(given["input"], weight, self.sizes[node], spans[0])
                    products += weight.numel()
                else:
                    others += weight.numel()
                    self._turn(node, given["input"])
                    continue
                if given["bias"] is not None:
                    shape = [-1, *[1] * n]
                    bias = self._held(given["bias"])
                    column = (
                        graph.call_function(aten.reshape.default, (given["bias"], shape))
                        if bias is None
                        else self._hold(bias.reshape(shape))
                    )
                    made = self._call(aten.add.Tensor, made, column)
            self.sizes[made] = self.sizes[node]
            node.replace_all_uses_with(made)
            graph.erase_node(node)
        graph.eliminate_dead_code()
        self.dense = others > products

    def _held(self, node: Any) -> torch.Tensor | None:
        return self.tensors[str(node.target)] if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def _hold(self, tensor: torch.Tensor) -> fx.Node:
        name = f"loop_{len(self.tensors)}"
        self.tensors[name] = tensor.contiguous()
        return self.graph.create_node("get_attr", name)

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def _turn(self, node: fx.Node, x: fx.Node) -> None:
        """Let a convolution read channels last what comes from outside, as it gives its result."""
        if x.op == "placeholder" and len(self.sizes[x]) == 4:
            turned = self.graph.call_function(aten.clone.default, (x,), {"memory_format": torch.channels_last})
            node.replace_input_with(x, turned)

    def _shifted(
        self,
        x: fx.Node,
        weight: torch.Tensor,
        out: Sequence[int],
        stride: list[int],
        padding: list[int],
        dilation: list[int],
    ) -> fx.Node:
        """A depthwise convolution: for each tap the picture moved by so much, times a number for each channel."""
        if any(padding):
            x = self._call(aten.constant_pad_nd.default, x, [p for p in reversed(padding) for _ in range(2)])
        total, numbers = None, weight.flatten(1)
        for number, tap in enumerate(itertools.product(*map(range, weight.shape[2:]))):
            moved = x
            for axis, (i, step, apart, size) in enumerate(zip(tap, stride, dilation, out[2:], strict=True), 2):
                first = i * apart
                moved = self._call(aten.slice.Tensor, moved, axis, first, first + (size - 1) * step + 1, step)
            scaled = self._call(aten.mul.Tensor, moved, self._hold(numbers[:, number].reshape(-1, *[1] * len(tap))))
            total = scaled if total is None else self._call(aten.add.Tensor, total, scaled)
        assert total is not None
        return total

    def _product(self, x: fx.Node, weight: torch.Tensor, out: Sequence[int], stride: list[int]) -> fx.Node:
        """Pixels times weights: (pixels, in) x (in, out)."""
        rows = to_rows(self._call, [x], weight.shape[1], stride)
        found = self._call(aten.mm.default, rows, self._hold(weight.flatten(1).t()))
        return from_rows(self._call, found, out[2:], out[1])


def _turn_kept(graph: fx.Graph, sizes: Sizes, after: Sequence[Made | Passed]) -> set[int]:
    """Let a program return the pictures that it keeps channels last; give the numbers of these results.

    Inductor gives results as they lie, or contiguous: so it gets them as (batch, height, width, channels), and whatever
    else reads such a picture reads that.
    """
    output = graph.output_node()
    returned: Any = output.args[0]
    results, turned = list(returned), set()
    for number in (a.number for a in after if isinstance(a, Made)):
        node = results[number]
        if len(sizes.get(node, ())) != 4 or node.op != "call_function":
            continue
        with graph.inserting_after(node):
            last = graph.call_function(aten.permute.default, (node, [0, 2, 3, 1]))
        with graph.inserting_after(last):
            kept = graph.call_function(aten.clone.default, (last,), {"memory_format": torch.contiguous_format})
        with graph.inserting_after(kept):
            back = graph.call_function(aten.permute.default, (kept, [0, 3, 1, 2]))
        node.replace_all_uses_with(back, lambda user, last=last: user not in (last, output))
        results[number] = kept
        turned.add(number)
    output.args = (tuple(results),)
    return turned


def _strides(x: torch.Tensor, kept: bool) -> tuple[int, ...]:
    """How an argument lies in memory: pictures that are kept channels last, all else contiguous."""
    pictures = kept and x.dim() == 4
    return x.contiguous(memory_format=torch.channels_last if pictures else torch.contiguous_format).stride()


def _laid_out(x: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A tensor that lies in memory like this."""
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
