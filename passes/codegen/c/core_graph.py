"""A step program in few ops, on static shapes, none in place: what the C generator starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._decomp import core_aten_decompositions, decomposition_table
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes

from ...symbolic_recurrence import LAYERS

aten = torch.ops.aten

_WHOLE: dict[Any, Any] = {}  # what takes the place of whole calls, before torch takes them apart itself
_OWN = (aten.sigmoid.default, aten.tanh.default, aten.relu.default)  # they have a form of their own
_FURTHER = (
    aten.baddbmm.default, aten.native_layer_norm.default, aten.native_group_norm.default, aten.gelu.default,
    aten.elu.default, aten.hardtanh.default, aten._softmax.default, aten._log_softmax.default, aten.leaky_relu.default,
    aten.native_batch_norm.default, aten._native_batch_norm_legit_no_training.default, aten.upsample_bilinear2d.default,
    aten.upsample_trilinear3d.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten.linalg_vector_norm.default, aten.rrelu_with_noise.default, aten._trilinear.default,
    aten.std_mean.correction,
)  # fmt: skip


def _pad(x: torch.Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> torch.Tensor:
    """Padding; the circular one joins parts, where torch writes in place."""
    if mode != "circular":
        return aten.pad.default(x, pad, mode, value)  # type: ignore[no-any-return]
    for i in range(0, len(pad), 2):
        dim = x.dim() - 1 - i // 2
        size, before, behind = x.shape[dim], pad[i], pad[i + 1]
        first, last = max(0, -before), size + min(0, behind)
        parts = [x.narrow(dim, size - before, before)] if before > 0 else []
        parts.append(x.narrow(dim, first, last - first))
        x = torch.cat([*parts, x.narrow(dim, 0, behind)] if behind > 0 else parts, dim)
    return x


def _lstm_layer(
    x: torch.Tensor, w0: torch.Tensor, w1: torch.Tensor, b0: torch.Tensor, b1: torch.Tensor, h: torch.Tensor,
    c: torch.Tensor, reverse: bool, sizes: Any, mode: int, hidden: int, layers: int, biases: bool,
    bidirectional: bool, batch_first: bool, train: bool,
) -> Any:  # fmt: skip
    """An LSTM layer of oneDNN, frame by frame: ``(time, batch, in) -> (time, batch, hidden)``."""
    if mode != 2 or layers != 1 or bidirectional or batch_first or not biases:
        return NotImplemented
    h, c, made = h.reshape(x.shape[1], -1), c.reshape(x.shape[1], -1), []
    for frame in x.flip(0).unbind(0) if reverse else x.unbind(0):
        i, f, g, o = (frame @ w0.t() + b0 + h @ w1.t() + b1).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        made.append(h)
    return torch.stack(made[::-1] if reverse else made), h[None], c[None], x.new_empty(0)


def _rrelu(
    x: torch.Tensor, noise: torch.Tensor, low: float = 1 / 8, high: float = 1 / 3, *training: Any
) -> torch.Tensor:
    return aten.leaky_relu.default(x, (low + high) / 2)  # type: ignore[no-any-return]


_WHOLE |= {aten.pad.default: _pad, **{op: decomposition_table[op] for op in LAYERS}}


def _table() -> dict[Any, Callable[..., Any]]:
    table = {op: f for op, f in dict(core_aten_decompositions()).items() if op not in _OWN}
    further = (op for op in _FURTHER if op in decomposition_table)
    further_table = {op: decomposition_table[op] for op in further}
    own = {aten.mkldnn_rnn_layer.default: _lstm_layer, aten.rrelu_with_noise.default: _rrelu}
    return {**table, **further_table, **own}


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
            made.target = _WHOLE.get(node.target, node.target)
        elif node.op == "output":
            results, after = node.args[0]
            copy.output(tuple(None if y is None else env[y] for y in (*results, *after)))
    given = [*arguments, *(tensors[name].detach() for name in names)]
    for _ in range(2):  # what torch writes in place while it takes a call apart is seen the second time
        run = torch.func.functionalize(fx.Interpreter(fx.GraphModule(nn.Module(), copy)).run, remove="mutations")
        with _disable_current_modes(), torch.no_grad():
            copy = make_fx(run, _table(), tracing_mode="fake")(*given).graph
        copy.eliminate_dead_code()
        if not any(isinstance(n.target, OpOverload) and n.target._schema.is_mutable for n in copy.nodes):
            break
    return copy, names
