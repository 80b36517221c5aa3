"""The last resort of capture: run the model on real tensors and record which ops it calls.

A record knows nothing of where a number in it came from. So the model is recorded again with another batch size and
another length: an axis is left open only where the record is the same. And the record is run on other data beside the
model, since what leaves torch in between (to NumPy, say) would be a constant in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from .errors import CaptureError

aten = torch.ops.aten
Inputs = tuple[torch.Tensor, ...]


def record_calls(
    model: nn.Module, inputs: Inputs, others: Sequence[Callable[[], Inputs]]
) -> tuple[fx.GraphModule, list[bool]]:
    """A module of the calls that the model makes, with the model's own parameters under their own names.

    Args:
        inputs: the example; the module is valid for its shapes.
        others: examples with one of the axes changed; for each it is told whether the record is the same.

    Raises:
        CaptureError: the record gives other numbers than the model, or the model changes its buffers.
    """
    with _left_alone(model):
        recorded = _record(model, inputs)
        _compare(model, recorded, inputs)
        same = []
        for other in others:
            try:
                same.append(_record(model, other()).code == recorded.code)
            except Exception:
                same.append(False)
    return recorded, same


def _record(model: nn.Module, inputs: Inputs) -> fx.GraphModule:
    recorded = make_fx(lambda *xs: model(*xs), tracing_mode="real", pre_dispatch=True, record_stack_traces=True)(
        *inputs
    )
    names = {id(t): n for n, t in (*model.named_buffers(), *model.named_parameters())}
    root: dict[str, Any] = {}
    for node in list(recorded.graph.nodes):
        if node.op == "get_attr":
            tensor = getattr(recorded, node.target)
            node.target = names.get(id(tensor), node.target)
            root[node.target] = tensor
        elif node.target is torch._C._set_grad_enabled:
            recorded.graph.erase_node(node)
        elif node.target in (aten._convolution.default, aten.convolution.default):
            _name_convolution(node)
    return fx.GraphModule(root, recorded.graph)


def _name_convolution(node: fx.Node) -> None:
    """TorchScript's tracer has one op for all convolutions: give it the name that everyone else uses."""
    x, weight, bias, stride, padding, dilation, transposed, more, groups = node.args[:9]
    n = weight.meta["val"].dim() - 2  # type: ignore[union-attr]
    if transposed:
        node.target = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)[n - 1]
        node.args = (x, weight, bias, stride, padding, more, groups, dilation)
    else:
        node.target = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)[n - 1]
        node.args = (x, weight, bias, stride, padding, dilation, groups)


def _compare(model: nn.Module, recorded: fx.GraphModule, inputs: Inputs) -> None:
    """Run both on other data of the same shapes."""
    other = tuple(x.flip(tuple(range(x.dim()))) * (0.5 if x.is_floating_point() else 1) for x in inputs)
    expected, got = (_tensors(m(*(x.clone() for x in other))) for m in (model, recorded))
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise CaptureError("part of what the model computes cannot be recorded: it leaves torch in between")


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor)]


@contextlib.contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Put back what running the model changes: its buffers and torch's random state.

    Raises:
        CaptureError: buffers were changed, which a step model cannot do.
    """
    buffers = [(t, t.clone()) for t in model.buffers()]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            yield
        finally:
            changed = [t for t, before in buffers if not torch.equal(t, before)]
            for t, before in buffers:
                t.copy_(before)
            if changed:
                raise CaptureError("the model changes its buffers in forward, even in eval mode")
