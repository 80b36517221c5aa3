"""What lane programs keep: for each lane a position, and the states of a program with lanes in front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...runtime.program import StateSpec
from ..layout import BATCH, Layout
from ..schedule_delays import Schedule, schedule_delays
from .states import state_specs

if TYPE_CHECKING:
    from ..pipeline import Plan

POSITION = "position"
KEPT_RANK = 4  # dimensions that a state has at the most


def lane_schedule(plan: Plan) -> Schedule:
    """The plan's schedule, or one in which nothing is there before the first tick."""
    before = plan.schedule.counts(0)
    if all(before[v] <= 0 for op in plan.schedule.graph.ops for v in op.outputs):
        return plan.schedule
    return schedule_delays(plan.schedule.graph, plan.schedule.outputs, waiting=True)


def lane_state_specs(schedule: Schedule, capacity: int = 0) -> list[StateSpec]:
    """What a lane program keeps: `state_specs` with lanes first, after the position, in at most four dimensions."""
    holds = "ticks so far, and the stream's length + 1 once it is known"
    specs = [StateSpec(POSITION, ((1, 0), (0, 2)), torch.int64, holds)]
    for spec, layout in zip(state_specs(schedule, capacity), state_layouts(schedule, capacity), strict=True):
        grows = None if spec.grows is None else spec.grows - any(d == (BATCH,) for d in layout.dims[: spec.grows])
        sizes, grows = _merged(lane_shape(layout), grows)
        grows = None if grows is None else grows + 1
        specs.append(StateSpec(spec.name, ((1, 0), *((0, s) for s in sizes)), spec.dtype, spec.holds, grows))
    return specs


def state_layouts(schedule: Schedule, capacity: int = 0) -> list[Layout]:
    """The layout of each state, time as the number of frames that it has."""
    layouts = []
    for value in schedule.history:
        split = value.layout.split()
        layouts.append(split.replace(split.time, (schedule.kept(value, capacity),)))
    layouts += [carry.layout for op in schedule.graph.ops for carry in op.carries]
    return layouts


def lane_shape(layout: Layout) -> list[int]:
    """The shape that a state has for one lane: its batch dimension dropped, or only the lanes in it."""
    return [math.prod(f for f in d if isinstance(f, int)) for d in layout if d != (BATCH,)]


def _merged(sizes: list[int], grows: int | None) -> tuple[list[int], int | None]:
    """Three dimensions at most, as many runtimes want them: neighbours are made one, but not the one that grows."""
    sizes = list(sizes)
    while len(sizes) > KEPT_RANK - 1:
        if grows is None or grows < len(sizes) - 2:
            sizes[-2:] = [sizes[-2] * sizes[-1]]
        else:
            sizes[:2] = [sizes[0] * sizes[1]]
            grows -= 1
    return sizes, grows


def to_lanes_first(tensor: torch.Tensor, layout: Layout, lanes: int) -> torch.Tensor:
    """A program's state with lanes in front, its other dimensions as they were."""
    at = next((i for i, d in enumerate(layout) if BATCH in d), None)
    if at is None:
        return tensor.unsqueeze(0).expand(lanes, *tensor.shape)
    before, after = around_batch(layout[at])
    shape = tensor.shape
    parted = tensor.reshape(*shape[:at], before, lanes, after, *shape[at + 1 :]).movedim(at + 1, 0)
    return parted.reshape(lanes, *lane_shape(layout))


def from_lanes_first(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The inverse of `to_lanes_first`, of a tensor whose other dimensions may have been made one."""
    at = next((i for i, d in enumerate(layout) if BATCH in d), None)
    sizes = lane_shape(layout)
    if at is None:
        return tensor[0].reshape(sizes)
    before, after = around_batch(layout[at])
    head, tail = sizes[:at], sizes[at + (layout[at] != (BATCH,)) :]
    parted = tensor.reshape(len(tensor), *head, before, after, *tail).movedim(0, at + 1)
    return parted.reshape(*head, before * len(tensor) * after, *tail)


def around_batch(dimension: Sequence[Any]) -> tuple[int, int]:
    """The product of the factors before the batch in a dimension, and of those behind it."""
    i = dimension.index(BATCH)
    return math.prod(dimension[:i]), math.prod(dimension[i + 1 :])
