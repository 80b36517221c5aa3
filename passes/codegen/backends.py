"""Code generation: the program of a step in mid-stream for backends other than torch's own kernels.

Each takes the graph that `lower.py` and `frames.py` leave, without the kernels of `kernels.py`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from ...runtime.errors import InputError
from .channels import pad_channels
from .lower import shapes_of
from .onnx import LARGEST, OPSET, onnx_model

if TYPE_CHECKING:
    import onnxruntime as ort

    from ...runtime.resident import SessionProgram
    from ..pipeline import Plan


def compile_inductor(graph: fx.Graph, tensors: Mapping[str, torch.Tensor]) -> Callable[..., Any]:
    """A program as `torch.compile` makes it, its tensors frozen: compiled when it is first called, for those shapes."""
    compiled = torch.compile(_module(graph, tensors), dynamic=False, options={"freezing": True})

    def run(*arguments: torch.Tensor) -> Any:
        with torch.no_grad():
            return compiled(*arguments)

    return run


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
    from ...runtime.resident import Made, Passed, SessionProgram

    copy, tensors = fx.Graph(), dict(tensors)
    copy.output(copy.graph_copy(graph, {}))
    parts = [n for n in copy.nodes if n.op == "placeholder"][frames:]
    sizes = shapes_of(copy, tensors, [(tuple(x.shape), x.dtype) for x in arguments])
    channels = pad_channels(copy, sizes, tensors, parts) if alone else {}
    kept = zip(parts, arguments[frames:], strict=True)
    given = [*arguments[:frames], *(_with_channels(x, channels.get(n)) for n, x in kept)]
    returned: Any = copy.output_node().args[0]
    outputs, after = returned
    copy.erase_node(copy.output_node())
    made: list[fx.Node] = []

    def output(node: fx.Node) -> Made:
        made.append(copy.call_function(torch.ops.aten.clone.default, (node,)) if node in made else node)
        return Made(len(made) - 1)

    results = tuple(None if y is None else output(y) for y in outputs)
    sources = tuple(Passed(parts.index(s)) if s in parts else output(s) for s in after)
    rooms = tuple(tuple(x.shape) for x in given[frames:])
    if not made:
        return SessionProgram(None, results, sources, rooms)
    copy.output(tuple(made))
    model = onnx_model(plan, _module(copy, tensors), given, opset_version=OPSET)
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


def _module(graph: fx.Graph, tensors: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    root = nn.Module()
    for name in {str(n.target) for n in graph.nodes if n.op == "get_attr"}:
        root.register_buffer(name, tensors[name].detach(), persistent=False)
    return fx.GraphModule(root, graph, class_name="StepProgram")
