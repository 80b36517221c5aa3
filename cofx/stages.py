"""A compiled model submodule by submodule: what streams, what it costs, and what is kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod

from torch import fx
from torch.utils import _pytree as pytree

from .passes.errors import module_path, user_frame
from .passes.pipeline import Plan
from .passes.registry import Static
from .passes.stream_graph import Value
from .runtime.program import StateSpec


@dataclass(frozen=True)
class Stage:
    """What one submodule does in one go, in the order of the model's own forward.

    Attributes:
        module: its path ("" for the model itself).
        ops: the names of its ops.
        at: the user's line.
        fact: "stream": computed once per frame; "clip": again for each clip; "static": not from frames.
        delay, receptive_field, stride: of what it gives, in input frames; None if that is no stream.
        macs: multiply-adds on one clip.
        state_bytes: kept between steps, of what it gives or hands on from frame to frame.
        reads: the stages from which its inputs come, by their numbers.
    """

    module: str
    ops: tuple[str, ...]
    at: str
    fact: str
    delay: int | Fraction | None
    receptive_field: float | int | Fraction | None
    stride: int | Fraction | None
    macs: int
    state_bytes: int
    reads: tuple[int, ...]


def stages_of(
    plan: Plan, macs: Mapping[fx.Node, int], repeated: Collection[fx.Node], specs: Sequence[StateSpec], batch: int
) -> tuple[Stage, ...]:
    """Neighbouring nodes of one submodule as one stage; of what depends on parameters alone only what is work."""
    kept = _kept(plan, specs, batch)
    groups: list[list[fx.Node]] = []
    stage: dict[fx.Node, int] = {}
    static = {n for n in plan.graph.nodes if isinstance(plan.facts.of.get(n), Static | None)}
    for node in plan.graph.nodes:
        work = node not in static or macs.get(node)
        if not (node.op == "placeholder" or (node.op == "call_function" and work)):
            continue
        alone = not groups or node.op == "placeholder" or groups[-1][-1].op == "placeholder"
        if alone or module_path(groups[-1][-1]) != module_path(node):
            groups.append([])
        groups[-1].append(node)
        stage[node] = len(groups) - 1
    scheduled = plan.schedule.counter.at(0).available
    stages = []
    for i, nodes in enumerate(groups):
        stream = [v for n in nodes for v in pytree.tree_leaves(plan.facts.of.get(n)) if isinstance(v, Value)]
        clip = any(n in repeated for n in nodes)
        about = plan.about(stream[-1]) if stream and not clip and stream[-1] in scheduled else None
        stages.append(
            Stage(
                module="input" if nodes[0].op == "placeholder" else module_path(nodes[0]),
                ops=tuple(dict.fromkeys(_op_name(n) for n in nodes)),
                at="" if nodes[0].op == "placeholder" else user_frame(nodes[0]),
                fact="clip" if clip else "static" if static.issuperset(nodes) else "stream",
                delay=None if about is None else about.delay,
                receptive_field=None if about is None else about.receptive_field,
                stride=None if about is None else about.stride,
                macs=sum(macs.get(n, 0) for n in nodes),
                state_bytes=sum(kept.get(n, 0) for n in nodes),
                reads=tuple(sorted({stage[a] for n in nodes for a in n.all_input_nodes if a in stage} - {i})),
            )
        )
    return tuple(stages)


def _kept(plan: Plan, specs: Sequence[StateSpec], batch: int) -> dict[fx.Node, int]:
    """Bytes of state by the traced node that they are of."""
    made = {v: op.node for op in plan.schedule.graph.ops for v in op.outputs}
    values = [*plan.schedule.history, *(op.outputs[0] for op in plan.schedule.graph.ops for _ in op.carries)]
    found: dict[fx.Node, int] = {}
    for spec, value in zip(specs, values, strict=True):
        node = value.node or made.get(value)
        if node is not None:
            found[node] = found.get(node, 0) + bytes_of(spec, batch)
    return found


def _op_name(node: fx.Node) -> str:
    if node.op == "placeholder":
        return node.name
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def bytes_of(spec: StateSpec, batch: int) -> int:
    """What a part of the state takes."""
    return prod(spec.shape(batch)) * spec.dtype.itemsize
