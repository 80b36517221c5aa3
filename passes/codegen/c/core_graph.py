"""A step program in few ops, on static shapes, none in place: what the C generator starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._decomp import core_aten_decompositions, decomposition_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from ...symbolic_recurrence import LAYERS

aten = torch.ops.aten

_OWN = (aten.sigmoid.default, aten.tanh.default, aten.relu.default)  # they have a form of their own
_FURTHER = (
    aten.baddbmm.default, aten.native_layer_norm.default, aten.native_group_norm.default, aten.gelu.default,
    aten.elu.default, aten.hardtanh.default, aten._softmax.default, aten._log_softmax.default, aten.leaky_relu.default,
    aten.native_batch_norm.default, aten._native_batch_norm_legit_no_training.default, aten.upsample_bilinear2d.default,
    aten.upsample_trilinear3d.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten.linalg_vector_norm.default, aten.rrelu_with_noise.default, aten._trilinear.default,
    aten.std_mean.correction,
)  # fmt: skip


def _lstm_layer(
    x: torch.Tensor, w0: torch.Tensor, w1: torch.Tensor, b0: torch.Tensor, b1: torch.Tensor, h: torch.Tensor,
    c: torch.Tensor, reverse: bool, sizes: Any, mode: int, hidden: int, layers: int, biases: bool,
    bidirectional: bool, batch_first: bool, train: bool,
) -> Any:  # fmt: skip
    """An LSTM layer of oneDNN, frame by frame: ``(time, batch, in) -> (time, batch, hidden)``."""
    if mode != 2 or reverse or layers != 1 or bidirectional or batch_first or not biases:
        return NotImplemented
    h, c, made = h.reshape(x.shape[1], -1), c.reshape(x.shape[1], -1), []
    for frame in x.unbind(0):
        i, f, g, o = (frame @ w0.t() + b0 + h @ w1.t() + b1).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        made.append(h)
    return torch.stack(made), h[None], c[None], x.new_empty(0)


def _table() -> dict[Any, Callable[..., Any]]:
    table = {op: f for op, f in core_aten_decompositions().items() if op not in _OWN}
    further = (op for op in _FURTHER if op in decomposition_table)
    further_table = {op: decomposition_table[op] for op in further}
    return {**table, **further_table, aten.mkldnn_rnn_layer.default: _lstm_layer}


def core_graph(
    graph: fx.Graph, tensors: Mapping[str, torch.Tensor], arguments: Sequence[torch.Tensor]
) -> tuple[fx.Graph, list[str]]:
    """The same program for arguments of just these shapes, and the names of the tensors that follow its arguments.

    Args:
        graph: ``(frames..., parts of the state...) -> (outputs, parts of the state after)``.
        tensors: what its get_attr nodes name; they become arguments.
        arguments: of the shapes and dtypes in question.

    Returns:
        a graph of few ops that returns one tuple, and whose nodes have what they give in ``meta["val"]``.
    """
    names = sorted({str(n.target) for n in graph.nodes if n.op == "get_attr"})
    copy = fx.Graph()
    env = {n: copy.placeholder(n.name) for n in graph.nodes if n.op == "placeholder"}
    held = {name: copy.placeholder(f"held_{i}") for i, name in enumerate(names)}
    for node in graph.nodes:
        if node.op == "get_attr":
            env[node] = held[str(node.target)]
        elif node.op == "call_function":
            env[node] = made = copy.node_copy(node, env.__getitem__)
            if node.target in LAYERS:
                made.target = decomposition_table[node.target]
        elif node.op == "output":
            results, after = node.args[0]
            copy.output(tuple(None if y is None else env[y] for y in (*results, *after)))
    module = fx.GraphModule(nn.Module(), copy)
    given = [*arguments, *(tensors[name].detach() for name in names)]
    with _disable_current_modes(), torch.no_grad(), fx.traceback.preserve_node_meta():
        run = torch.func.functionalize(fx.Interpreter(module).run, remove="mutations")
        traced = make_fx(run, _table(), tracing_mode="fake")(*given)
    traced.graph.eliminate_dead_code()
    return traced.graph, names
