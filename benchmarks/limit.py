"""The least that a step's calls take: each convolution and product alone, on inputs that lie ready, by its best kernel.

What a step takes beyond this is what it keeps, moves, and computes entry by entry. `benchmarks/run.py` asks for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper
from torch import fx
from torch.fx.node import map_arg

import cofx
from cofx.passes.canonicalize import bind, listed
from cofx.passes.codegen.key import Key
from cofx.runtime.onnx_buffers import open_session

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn
CONVOLUTIONS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
PRODUCTS = (
    aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.matmul.default,
    aten.linear.default, aten.einsum.default, aten.scaled_dot_product_attention.default, aten.gru.input,
    aten.lstm.input, aten.rnn_tanh.input, aten.rnn_relu.input,
)  # fmt: skip
Call = Callable[[], Any]


def limit(step: cofx.StepModule, frames: list[torch.Tensor]) -> float:
    """Seconds per step of a model in mid-stream, the mean over a period; no gradients, on as many threads as torch has.

    Args:
        step: a compiled model.
        frames: one of each input.
    """
    compiled = step.compiled
    period, known = compiled.plan.schedule.period, dict[Any, float]()
    total = 0.0
    for phase in range(period):
        program = compiled.program(Key(phase, 1, frames=True, apart=True, kernels=False))
        parts = compiled.mid_stream._parts(step._state)
        total += sum(_times(program.graph, program.tensors, [*frames, *parts], known))
    return total / period


def _times(graph: fx.Graph, tensors: Any, arguments: list[torch.Tensor], known: dict[Any, float]) -> list[float]:
    """The best time of each call in a program that is more than moving numbers."""
    values: dict[fx.Node, Any] = {}
    given, found = iter(arguments), []
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            values[node] = tensors[str(node.target)]
        elif node.op == "call_function":
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
            if node.target in CONVOLUTIONS or node.target in PRODUCTS:
                key = str(node.target), str(map_arg((node.args, node.kwargs), lambda n: tuple(values[n].shape)))
                if key not in known:
                    known[key] = min(map(_seconds, _ways(node.target, args, kwargs)))
                found.append(known[key])
    return found


def _seconds(call: Call) -> float:
    """CPU time of a call, the median of some blocks of a millisecond or so."""
    call()
    began = time.process_time()
    call()
    calls = max(1, int(0.001 / max(time.process_time() - began, 1e-6)))
    taken = []
    for _ in range(7):
        began = time.process_time()
        for _ in range(calls):
            call()
        taken.append((time.process_time() - began) / calls)
    return statistics.median(taken)


def _ways(target: Any, args: Any, kwargs: Any) -> list[Call]:
    """The kernels that compute a call."""
    ways: list[Call] = [lambda: target(*args, **kwargs)]
    if target not in CONVOLUTIONS:
        return ways
    n = CONVOLUTIONS[target]
    given = bind(target, args, kwargs)
    x, weight, bias, groups = given["input"], given["weight"], given["bias"], given["groups"]
    if isinstance(given["padding"], str):
        return ways
    stride, padding, dilation = (listed(given[k], n) for k in ("stride", "padding", "dilation"))
    if n == 2 and x.dtype is torch.float32:
        lies = x.contiguous(memory_format=torch.channels_last)
        turned = weight.contiguous(memory_format=torch.channels_last)
        more = padding, stride, dilation, groups
        packed = mkldnn._reorder_convolution_weight(turned, *more, list(x.shape))
        ways.append(lambda: target(lies, turned, bias, stride, padding, dilation, groups))
        ways.append(lambda: mkldnn._convolution_pointwise(lies, packed, bias, *more, "none", [], ""))
    if weight[0, 0].numel() == groups == 1 and not any(padding) and set(stride) == {1}:
        rows = x.movedim(1, -1).flatten(0, -2).contiguous()
        columns = weight.flatten(1).t().contiguous()
        ways.append(lambda: torch.mm(rows, columns))
    if x.dtype is torch.float32:
        ways.append(_session(x, weight, bias, stride, padding, dilation, groups))
    return ways


def _session(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> Call:
    """A convolution in ONNX Runtime."""
    held = [helper.make_tensor("w", TensorProto.FLOAT, weight.shape, weight.contiguous().numpy().tobytes(), raw=True)]
    if bias is not None:
        held.append(
            helper.make_tensor("b", TensorProto.FLOAT, bias.shape, bias.contiguous().numpy().tobytes(), raw=True)
        )
    spans = {"strides": stride, "pads": padding * 2, "dilations": dilation, "group": groups}
    node = helper.make_node("Conv", ["x", *(t.name for t in held)], ["y"], **spans)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        held,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = open_session(model.SerializeToString(), torch.get_num_threads())
    array = np.ascontiguousarray(x.numpy())
    return lambda: session.run(None, {"x": array})
