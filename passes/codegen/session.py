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
    import onnx_ir as ir
    import onnxruntime as ort

    from ...runtime.resident_session import SessionResidence
    from ..pipeline import Plan


def compile_sessions(
    plan: Plan, programs: Sequence[Program], arguments: Sequence[torch.Tensor], frames: int, groups: Sequence[int]
) -> SessionResidence:
    """The programs of a step as sessions of ONNX Runtime, for arguments of just these shapes, with the state's buffers.

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
    from ...runtime.resident_session import Room, SessionProgram, SessionResidence

    made = [_Phase(p, arguments, frames, alone=len(programs) == 1) for p in programs]
    orders = _orders(made, groups)
    for phase in made:
        phase.turn(orders)
    models = [onnx_model(plan, p.module(), p.examples, opset_version=OPSET) if p.made else None for p in made]
    sessions, blocked = _sessions(models, [p.after for p in made], frames, groups)
    rooms = [
        Room(tuple(x.shape), shape, order, blocked.get(group, 1))
        for x, shape, order, group in zip(arguments[frames:], made[0].rooms, orders, groups, strict=True)
    ]
    turned = [SessionProgram(s, p.results, p.after) for s, p in zip(sessions, made, strict=True)]
    return SessionResidence(turned, arguments[:frames], arguments[frames:], rooms, groups)


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

    def module(self) -> fx.GraphModule:
        """As it is now."""
        return as_module(self.graph, self.tensors)

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


def _sessions(
    models: Sequence[Any], afters: Sequence[Sequence[Passed | Made]], frames: int, groups: Sequence[int]
) -> tuple[list[ort.InferenceSession | None], dict[int, int]]:
    """Sessions of the ONNX models of a step, and the groups of its state that lie in blocks of so many channels.

    Args:
        models: one for each phase; None where nothing is computed.
        afters: for each phase where each part of the state after comes from.
        frames: how many of their inputs are not state.
        groups: for each part which history or state it belongs to.
    """
    from . import blocked

    opened = [None if m is None else _open(m) for m in models]
    sessions = [None if x is None else x[0] for x in opened]
    optimized = [None if x is None else x[1] for x in opened]
    if not blocked.finds_blocks(optimized):
        return sessions, {}
    kept, models = blocked.keep_in_blocks(optimized, afters, frames, groups)
    sessions = [s if m is None else _open(m, optimize=False)[0] for s, m in zip(sessions, models, strict=True)]
    return sessions, dict.fromkeys(kept, blocked.block_size())


def _open(model: Any, optimize: bool = True) -> tuple[ort.InferenceSession, ir.Model | None]:
    """A session of an ONNX model, and what ONNX Runtime makes of one with convolutions that is not too large."""
    import onnx
    import onnx_ir as ir

    from ...runtime.onnx_buffers import open_session

    threads = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            if too_large(model):  # for one message
                file = os.path.join(scratch, "step.onnx")
                onnx.save(model, file, save_as_external_data=True)
                return open_session(file, threads, optimize=optimize), None
            convolves = optimize and any(node.op_type == "Conv" for node in model.graph.node)
            file = os.path.join(scratch, "optimized.onnx") if convolves else ""
            session = open_session(model.SerializeToString(), threads, optimize=optimize, optimized=file)
            return session, ir.load(file) if convolves else None
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
