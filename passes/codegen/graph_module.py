"""Code generation: a scheduled stream graph becomes a torch.fx.GraphModule.

A program takes some new ticks of the inputs and the state, and returns the new outputs and the new state::

    (frames..., [count, length,] state...) -> (outputs, state)

It is specialised by phase and number of ticks. A *masked* program also takes how many ticks came before (`count`) and
when the stream ends (`length`); wherever a window reaches outside of a value it puts in what the op pads with. In
between, where nothing reaches outside, the plain program does without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ...runtime.program import OutputSpan, Program, StateSpec
from ..capture import untraced
from ..stream_graph import Op, Window
from .builder import Builder
from .flat import flatten
from .key import Key
from .lower import Lowering
from .states import carry_name, state_specs

if TYPE_CHECKING:
    from ..pipeline import Plan

aten = torch.ops.aten


@untraced
def generate(plan: Plan, key: Key, device: torch.device, validity: bool = False) -> Program:
    """The program of a key, its small constants on `device`.

    With `validity` it returns a third tuple: for each output with time, which of its frames exist (bool, one for each).
    """
    b = Builder(plan.schedule, key, plan.batch_input(key.frames), plan.constants, device, plan.about)
    _inputs(b, plan)
    specs = state_specs(plan.schedule, key.capacity)
    kept = [*plan.schedule.history, *(op.outputs[0] for op in plan.schedule.graph.ops for _ in op.carries)]
    for spec, value in zip(specs, kept, strict=True):
        b.about = plan.about(value)
        b.states[spec.name] = _placeholder(b, spec.name)
    for op in plan.schedule.graph.ops:
        _emit_op(b, op, plan)
    spans, results = _outputs(b, plan)
    _keep_histories(b, plan)
    b.about = None
    after = tuple(b.next_states.get(s.name, b.states[s.name]) for s in specs)
    exist = (_validity(b, plan, spans),) if validity else ()
    b.graph.output((tuple(results), after, *exist))
    b.graph.output_node().meta["cofx"] = None
    b.graph.eliminate_dead_code()
    where = [b.states["count"], b.states["length"]]
    for node in where:
        if not node.users:
            b.graph.erase_node(node)
    b.graph.lint()
    module = fx.GraphModule(_root(b.root), b.graph, class_name="StepProgram")
    graph, tensors, done = b.graph, b.root, False
    if key.folded:
        apart = {b.states[s.name].name: s.apart for s in specs if s.apart is not None} if key.apart else None
        batches = [p.batch for p in plan.capture.points]
        other = next((i for i, n in enumerate(batches) if n != batches[0]), 0)
        arguments = _arguments(b, plan, specs), _arguments(b, plan, specs, other)
        lowered = Lowering(module, plan.constants, arguments, device, apart, key.kernels)
        graph, tensors, done = lowered.graph, lowered.tensors, not apart or bool(lowered.size_of)
    wants = tuple(w for w in ("count", "length") if b.states[w].users)
    return Program(module, flatten(graph, tensors), graph, tensors, spans, wants, key.apart and done)


def _arguments(
    b: Builder, plan: Plan, specs: list[StateSpec], point: int = 0
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """The shapes and dtypes of a program's arguments, for the batch size of a sample point."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for traced, value in plan.inputs:
        size = list(traced.meta["sizes"][point])
        if value is not None:
            size[value.layout.time] = len(b.span(value))
            if b.key.frames and value.rate == 1:
                del size[value.layout.time]
        shapes[b.inputs[traced].name] = tuple(size), traced.meta["val"].dtype
    batch = plan.capture.points[point].batch
    for spec in specs:
        shapes[b.states[spec.name].name] = spec.shape(batch), spec.dtype
    for name in ("count", "length"):
        shapes[b.states[name].name] = (), torch.int64
    return [shapes[n.name] for n in b.graph.nodes if n.op == "placeholder"]


def _root(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.nn.Parameter):
            root.register_parameter(name, tensor)
        else:
            root.register_buffer(name, tensor, persistent=False)
    return root


def _placeholder(b: Builder, name: str) -> fx.Node:
    node = b.graph.placeholder(name)
    node.target = node.name  # another where an input has that name already
    node.meta["cofx"] = b.about
    return node


def _inputs(b: Builder, plan: Plan) -> None:
    for traced, value in plan.inputs:
        b.about = plan.about(value)
        b.inputs[traced] = _placeholder(b, traced.name)
    b.about = None
    for name in ("count", "length"):
        b.states[name] = _placeholder(b, name)
    for traced, value in plan.inputs:
        if value is None:
            continue
        b.about = plan.about(value)
        span = b.span(value)
        node = b.inputs[traced]
        if b.key.frames and value.rate == 1:
            node = b.aten("unsqueeze.default", node, value.layout.time)
        b.chunks[value] = Window(node, span.start, span.stop)


def _emit_op(b: Builder, op: Op, plan: Plan) -> None:
    b.about = plan.about(op.outputs[0])
    span = b.span(op.outputs[0])
    if not span or (op.clip is not None and b.key.idle):
        b.chunks.update(dict.fromkeys(op.outputs))
        return
    windows = [b.window(r, span, op) for r in op.reads]
    result = op.lower(b, op, windows, span, [b.carried(op, c) for c in op.carries])
    if op.carries:
        result, after = result
        for carry, node in zip(op.carries, after, strict=True):
            b.next_states[carry_name(op, carry)] = node
    if op.several and not isinstance(result, tuple):
        result = tuple(b.getitem(result, i) for i in range(len(op.outputs)))
    for v, node in zip(op.outputs, result if isinstance(result, tuple) else [result], strict=True):
        b.chunks[v] = None if node is None else Window(node, span.start, span.stop)


def _outputs(b: Builder, plan: Plan) -> tuple[list[OutputSpan], list[Any]]:
    spans, results = [], []
    for leaf in plan.outputs:
        b.about = plan.about(leaf.value)
        if leaf.value is None:
            spans.append(OutputSpan(0, 1))
            results.append(b.static(leaf.node))
            continue
        span, chunk = b.span(leaf.value), b.chunks.get(leaf.value)
        spans.append(OutputSpan(span.start, len(span)))
        node = None if chunk is None else chunk.node
        if node is not None and b.key.frames and leaf.single:
            node = b.aten("select.int", node, leaf.value.layout.time, 0)
        results.append(b.owned(node))
    return spans, results


def _validity(b: Builder, plan: Plan, spans: list[OutputSpan]) -> tuple[fx.Node | None, ...]:
    """For each output with time, which of the returned frames exist; none do where a table has run out."""
    within = None
    for op in b.schedule.graph.ops:
        if op.limit is not None:
            value = op.outputs[0]
            stop = b.index_range(value, range(b.after[value], b.after[value] + 1))
            ok = b.aten("le.Scalar", b.aten("minimum.default", stop, b.length(value)), op.limit)
            within = ok if within is None else b.aten("logical_and.default", within, ok)
    if b.key.capacity and b.schedule.growing:
        room = b.aten("le.Scalar", b.states["count"], b.key.capacity - b.key.ticks)
        ok = b.aten("unsqueeze.default", room, 0)
        within = ok if within is None else b.aten("logical_and.default", within, ok)
    exist: list[fx.Node | None] = []
    for leaf, span in zip(plan.outputs, spans, strict=True):
        if leaf.value is None:
            exist.append(within)
            continue
        inside = b.inside(leaf.value, range(span.start, span.start + span.frames))
        exist.append(inside if within is None else b.aten("logical_and.default", inside, within))
    return tuple(exist)


def _keep_histories(b: Builder, plan: Plan) -> None:
    for value in b.schedule.history:
        frames = b.schedule.kept(value, b.key.capacity)
        b.about = plan.about(value)
        new = b.chunks.get(value)
        if new is None:
            continue
        time = value.layout.split().time
        made = new.stop - new.start
        if made >= frames:
            last = b.narrow(b.split(new.node, value.layout, made), time, made - frames, frames)
            node = b.emit(
                aten.clone.default, last, memory_format=torch.contiguous_format, name=f"state_{value.name}_out"
            )
        else:
            buffer = b.buffer(value, new.start - 1, new.stop)
            total = buffer.stop - buffer.start
            node = b.emit(aten.slice.Tensor, buffer.node, time, total - frames, total, name=f"state_{value.name}_out")
        b.next_states[f"state_{value.name}"] = node
