"""Code generation: the program of a step in mid-stream as a session of ONNX Runtime.

It is made of the graph that `lower.py` and `frames.py` leave, without the kernels of `kernels.py`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from ...runtime.errors import InputError
from ...runtime.program import Made, Passed
from .channels import pad_channels
from .lower import shapes_of
from .onnx import LARGEST, OPSET, onnx_model

aten = torch.ops.aten

if TYPE_CHECKING:
    import onnxruntime as ort

    from ...runtime.resident import SessionProgram
    from ..pipeline import Plan


def compile_session(
    plan: Plan,
    graph: fx.Graph,
    tensors: Mapping[str, torch.Tensor],
    arguments: Sequence[torch.Tensor],
    frames: int,
    alone: bool,
) -> SessionProgram:
    """A program as a session of ONNX Runtime, for arguments of just these shapes.

    Args:
        plan: what it is the program of, for error messages.
        graph: ``(frames..., parts of the state...) -> (outputs, parts of the state after)``.
        tensors: what its get_attr nodes name.
        arguments: of the shapes and dtypes in question.
        frames: how many of them are not state.
        alone: no other program works on the same state.

    Raises:
        OnnxError: an op has no ONNX form.
        InputError: ONNX Runtime has no kernel for an op, or no arrays of a type.
        ImportError: onnxruntime, onnx or onnxscript is not installed.
    """
    from ...runtime.resident import SessionProgram

    copy, tensors = fx.Graph(), dict(tensors)
    copy.output(copy.graph_copy(graph, {}))
    parts = [n for n in copy.nodes if n.op == "placeholder"][frames:]
    sizes = shapes_of(copy, tensors, [(tuple(x.shape), x.dtype) for x in arguments])
    channels = pad_channels(copy, sizes, tensors, parts) if alone else {}
    kept = zip(parts, arguments[frames:], strict=True)
    given = [*arguments[:frames], *(_with_channels(x, channels.get(n)) for n, x in kept)]
    results, sources = split_results(copy, parts)
    rooms = tuple(tuple(x.shape) for x in given[frames:])
    if not copy.output_node().args[0]:
        return SessionProgram(None, results, sources, rooms)
    model = onnx_model(plan, as_module(copy, tensors), given, opset_version=OPSET)
    return SessionProgram(_session(model), results, sources, rooms)


def _session(model: Any) -> ort.InferenceSession:
    """A session of an ONNX model; through a file if it is too large for one message."""
    from ...runtime.onnx_buffers import open_session

    threads = torch.get_num_threads()
    try:
        if model.ByteSize() <= LARGEST:
            return open_session(model.SerializeToString(), threads)
        import onnx

        with tempfile.TemporaryDirectory() as scratch:
            file = os.path.join(scratch, "step.onnx")
            onnx.save(model, file, save_as_external_data=True)
            return open_session(file, threads)
    except Exception as error:  # no kernel for an op in a type, say
        raise InputError(
            f"ONNX Runtime cannot run the step program: {error}\n    try     backend='eager', or 'auto', which takes "
            "what can run"
        ) from error


def _with_channels(frame: torch.Tensor, channels: int | None) -> torch.Tensor:
    """A frame of state with room for so many channels."""
    return frame if channels is None else frame.new_zeros(frame.shape[0], channels, *frame.shape[2:])


def split_results(
    graph: fx.Graph, parts: Sequence[fx.Node]
) -> tuple[tuple[Made | None, ...], tuple[Made | Passed, ...]]:
    """Make a program return only what it computes, each thing once; give where its outputs and its state after it are.

    Args:
        graph: ``(..., parts...) -> (outputs, parts after)``; it is changed, to return one tuple.
        parts: its arguments that are parts of the state.
    """
    last = graph.output_node()
    returned: Any = last.args[0]
    made: list[fx.Node] = []

    def output(node: fx.Node) -> Made:
        with graph.inserting_before(last):
            made.append(graph.call_function(aten.clone.default, (node,)) if node in made else node)
        return Made(len(made) - 1)

    results = tuple(None if y is None else output(y) for y in returned[0])
    after = tuple(Passed(parts.index(s)) if s in parts else output(s) for s in returned[1])
    last.args = (tuple(made),)
    return results, after


def as_module(graph: fx.Graph, tensors: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    """A program as a module that has its tensors as buffers."""
    root = nn.Module()
    for name in {str(n.target) for n in graph.nodes if n.op == "get_attr"}:
        root.register_buffer(name, tensors[name].detach(), persistent=False)
    return fx.GraphModule(root, graph, class_name="StepProgram")
