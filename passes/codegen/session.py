"""Code generation: the program of a step in mid-stream as a session of ONNX Runtime.

It is made of the graph that `lower.py` and `frames.py` leave, without the kernels of `kernels.py`.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from ...runtime.errors import InputError
from ...runtime.program import Made, Passed, Program
from .channels import pad_channels
from .lower import Shapes, shapes_of
from .onnx import OPSET, onnx_model, too_large
from .orders import Order, Orders

aten = torch.ops.aten

if TYPE_CHECKING:
    import onnxruntime as ort

    from ...runtime.resident import Room, SessionProgram
    from ..pipeline import Plan


def compile_sessions(
    plan: Plan, programs: Sequence[Program], arguments: Sequence[torch.Tensor], frames: int, groups: Sequence[int]
) -> tuple[list[SessionProgram], list[Room]]:
    """The programs of a step as sessions of ONNX Runtime, for arguments of just these shapes, and how state is kept.

    Args:
        plan: what they are the programs of, for error messages.
        programs: one for each phase, all on the same state:
            ``(frames..., parts of the state...) -> (outputs, parts of the state after)``.
        arguments: of the shapes and dtypes in question.
        frames: how many of them are not state.
        groups: for each part which history or state it belongs to.

    Raises:
        OnnxError: an op has no ONNX form.
        InputError: ONNX Runtime has no kernel for an op, or no arrays of a type.
        ImportError: onnxruntime, onnx or onnxscript is not installed.
    """
    from ...runtime.resident import Room, SessionProgram

    made = [_Phase(p, arguments, frames, alone=len(programs) == 1) for p in programs]
    orders = _orders(made, groups)
    sessions = []
    for phase in made:
        phase.turn(orders)
        session = None
        if phase.made:
            step = as_module(phase.graph, phase.tensors)
            session = _session(onnx_model(plan, step, phase.examples, opset_version=OPSET))
        sessions.append(SessionProgram(session, phase.results, phase.after))
    return sessions, [Room(shape, order) for shape, order in zip(made[0].rooms, orders, strict=True)]


class _Phase:
    """A program on its way to a session."""

    def __init__(self, program: Program, arguments: Sequence[torch.Tensor], frames: int, alone: bool) -> None:
        """
        Args:
            program: of one phase.
            arguments: examples.
            frames: how many of them are not state.
            alone: no other program works on the same state.
        """
        self.graph, self.tensors = fx.Graph(), dict(program.tensors)
        self.graph.output(self.graph.graph_copy(program.graph, {}))
        self.parts = [n for n in self.graph.nodes if n.op == "placeholder"][frames:]
        channels: dict[fx.Node, int] = {}
        if alone:
            sizes = shapes_of(self.graph, self.tensors, _shapes(arguments))
            channels = pad_channels(self.graph, sizes, self.tensors, self.parts)
        kept = zip(self.parts, arguments[frames:], strict=True)
        self.examples = [*arguments[:frames], *(_with_channels(x, channels.get(n)) for n, x in kept)]
        self.rooms = [tuple(x.shape) for x in self.examples[frames:]]
        self.results, self.after = split_results(self.graph, self.parts)
        self.made = sum(isinstance(x, Made) for x in (*self.results, *self.after))
        self.sizes = shapes_of(self.graph, self.tensors, _shapes(self.examples))
        self.frames = frames

    def natural(self) -> dict[int, Order]:
        """For the parts of the state that it makes, the order of dimensions in which each comes about."""
        natural = Orders(self.graph, self.sizes, self.tensors, {}, [None] * self.made).natural
        return {i: natural[a.number] for i, a in enumerate(self.after) if isinstance(a, Made)}

    def turn(self, orders: Sequence[Order]) -> None:
        """Let everything be computed in the order in which it comes about, with parts of the state that lie like this.

        Args:
            orders: of the dimensions of each part.
        """
        given = dict(zip(self.parts, orders, strict=True))
        wanted: list[Order | None] = [None] * self.made
        for made, order in zip(self.after, orders, strict=True):
            if isinstance(made, Made):
                wanted[made.number] = order
        turned = Orders(self.graph, self.sizes, self.tensors, given, wanted)
        self.graph, self.tensors = turned.graph, turned.tensors
        kept = zip(self.examples[self.frames :], orders, strict=True)
        self.examples[self.frames :] = [x.permute(order).contiguous() for x, order in kept]


def _shapes(arguments: Sequence[torch.Tensor]) -> Shapes:
    return [(tuple(x.shape), x.dtype) for x in arguments]


def _orders(phases: Sequence[_Phase], groups: Sequence[int]) -> list[Order]:
    """For each part the order in which most of its group come about."""
    found: dict[int, Counter[Order]] = {}
    for phase in phases:
        for part, order in phase.natural().items():
            found.setdefault(groups[part], Counter())[order] += 1
    plain = [tuple(range(len(room))) for room in phases[0].rooms]
    return [found[g].most_common(1)[0][0] if g in found else order for g, order in zip(groups, plain, strict=True)]


def _session(model: Any) -> ort.InferenceSession:
    """A session of an ONNX model; through a file if it is too large for one message."""
    from ...runtime.onnx_buffers import open_session

    threads = torch.get_num_threads()
    try:
        if not too_large(model):
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
