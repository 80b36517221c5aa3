"""What a program keeps between calls: its histories and carries as `StateSpec`s."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import fx

from ...runtime.program import StateSpec
from ..errors import module_path
from ..layout import BATCH, TIME
from ..schedule_delays import Schedule
from ..stream_graph import Carry, Op, Value
from .frames import LARGE, MOST


def state_specs(schedule: Schedule, capacity: int = 0) -> list[StateSpec]:
    """What a program keeps between calls, in the order of its arguments, for streams of so many ticks."""
    specs = []
    for value in schedule.history:
        frames = schedule.kept(value, capacity)
        dims = [_affine(d) for d in value.layout.split()]
        time = value.layout.split().time
        dims[time] = (0, frames)
        specs.append(
            StateSpec(
                f"state_{value.name}",
                tuple(dims),
                value.dtype,
                f"the last {frames} frames of {_named(value.name, value.node)}",
                grows=time if value in schedule.growing else None,
                apart=time if 1 <= frames <= MOST and _large(value) else None,
            )
        )
    for op in schedule.graph.ops:
        for carry in op.carries:
            dims = [_affine(d) for d in carry.layout]
            holds = f"{carry.name} of {_named(op.name, op.node)}"
            specs.append(StateSpec(carry_name(op, carry), tuple(dims), carry.dtype, holds))
    return specs


def _named(name: str, node: fx.Node | None) -> str:
    """A value, and the module that it comes from."""
    module = "" if node is None else module_path(node)
    return f"{name} in {module}" if module else name


def _large(value: Value) -> bool:
    """Whether a frame of a value has positions beside its channels, and takes longer to move than a call takes."""
    layout = value.layout.split()
    numbers = prod(f for d in layout for f in d if isinstance(f, int))
    return len(layout) in (4, 5) and numbers * value.dtype.itemsize >= LARGE


def carry_name(op: Op, carry: Carry) -> str:
    """The name under which a carried state is kept."""
    return f"state_{op.name}_{carry.name}"


def _affine(dimension: Sequence[Any]) -> tuple[int, int]:
    """A static dimension's size as (per lane, constant)."""
    size, batched = 1, False
    for f in dimension:
        if f is BATCH:
            batched = True
        elif f is not TIME:
            size *= f
    return (size, 0) if batched else (0, size)
