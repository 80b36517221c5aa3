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

from .onnx import LARGEST, OPSET, blame, quiet
from .onnx_decompositions import decompositions

if TYPE_CHECKING:
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
    plan: Plan, graph: fx.Graph, tensors: Mapping[str, torch.Tensor], arguments: Sequence[torch.Tensor], frames: int
) -> SessionProgram:
    """A program as a session of ONNX Runtime, for arguments of just these shapes.

    Args:
        plan: what it is the program of, for error messages.
        graph: ``(frames..., parts of the state...) -> (outputs, parts of the state after)``.
        tensors: what its get_attr nodes name.
        arguments: of the shapes and dtypes in question.
        frames: how many of them are not state.

    Raises:
        OnnxError: an op has no ONNX form.
        ImportError: onnxruntime, onnx or onnxscript is not installed.
    """
    from ...runtime.resident import Made, Passed, SessionProgram, open_session

    copy = fx.Graph()
    returned: Any = copy.graph_copy(graph, {})
    outputs, after = returned
    parts = [n for n in copy.nodes if n.op == "placeholder"][frames:]
    made: list[fx.Node] = []

    def output(node: fx.Node) -> Made:
        made.append(copy.call_function(torch.ops.aten.clone.default, (node,)) if node in made else node)
        return Made(len(made) - 1)

    results = tuple(None if y is None else output(y) for y in outputs)
    sources = tuple(Passed(parts.index(s)) if s in parts else output(s) for s in after)
    if not made:
        return SessionProgram(None, results, sources)
    copy.output(tuple(made))
    with torch.no_grad(), quiet():
        exported = torch.export.export(_module(copy, tensors), tuple(arguments), strict=False)
        if table := decompositions(exported.graph):
            exported = exported.run_decompositions(table)
        try:
            converted = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, verbose=False)
        except torch.onnx.errors.OnnxExporterError as error:
            raise blame(plan, error) from error
    assert converted is not None
    model = converted.model_proto
    with tempfile.TemporaryDirectory() as scratch:
        if model.ByteSize() > LARGEST:
            import onnx

            file = os.path.join(scratch, "step.onnx")
            onnx.save(model, file, save_as_external_data=True)
            return SessionProgram(open_session(file, torch.get_num_threads()), results, sources)
    return SessionProgram(open_session(model.SerializeToString(), torch.get_num_threads()), results, sources)


def _module(graph: fx.Graph, tensors: Mapping[str, torch.Tensor]) -> fx.GraphModule:
    root = nn.Module()
    for name in {str(n.target) for n in graph.nodes if n.op == "get_attr"}:
        root.register_buffer(name, tensors[name].detach(), persistent=False)
    return fx.GraphModule(root, graph, class_name="StepProgram")
