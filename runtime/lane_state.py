"""The state of many streams in one batch: named tensors, lanes first, and where each lane is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import InputError, StateError
from .program import StateSpec


@dataclass(frozen=True)
class LaneState:
    """Where each lane is: its position (ticks taken, and the length + 1 once known), and what is kept of it.

    Lanes come first in every tensor. Zeros are a lane that has not begun. `capacity`: ticks for which there is room,
    where all of a stream is kept.
    """

    tensors: tuple[torch.Tensor, ...]
    capacity: int = 0

    @property
    def lanes(self) -> int:
        """How many there are."""
        return int(self.tensors[0].shape[0])


def fresh(specs: Sequence[StateSpec], lanes: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The tensors of lanes of which none has begun."""
    return tuple(torch.zeros(s.shape(lanes), dtype=s.dtype, device=device) for s in specs)


def lane_indices(lanes: Any, total: int) -> torch.Tensor:
    """Lanes given as a list of indices, or as a bool for each, as indices.

    Raises:
        InputError: they are neither, or there is no such lane.
    """
    try:
        given = torch.as_tensor(lanes)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "infer dtype" not in str(error):
            raise  # of whatever went wrong, not of what was given
        raise InputError(f"lanes are a list of indices, or a bool for each lane, not {lanes!r:.100}") from error
    if given.dtype == torch.bool:
        if tuple(given.shape) != (total,):
            raise InputError(f"a mask of lanes has shape ({total},), not {tuple(given.shape)}")
        return given.nonzero().flatten().cpu()
    if given.dim() == 0:
        given = given.unsqueeze(0)
    if given.dim() != 1 or (given.numel() and given.dtype.is_floating_point):
        raise InputError("lanes are a list of indices, or a bool for each lane")
    indices = given.to(torch.int64).cpu()
    if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < total):
        raise InputError(f"there are lanes 0 to {total - 1}, not {indices.tolist()}")
    if len(set(indices.tolist())) != indices.numel():
        raise InputError(f"a lane is named twice: {indices.tolist()}")
    return indices


def take_lanes(state: LaneState, specs: Sequence[StateSpec], lanes: Any = None) -> dict[str, torch.Tensor]:
    """A flat dict of copies of some lanes (default all), nothing shared with the streams."""
    if lanes is None:
        return {s.name: t.clone() for s, t in zip(specs, state.tensors, strict=True)}
    at = lane_indices(lanes, state.lanes)
    return {s.name: t.index_select(0, at.to(t.device)) for s, t in zip(specs, state.tensors, strict=True)}


def put_lanes(state: LaneState, other: LaneState, lanes: Any) -> LaneState:
    """The state with some lanes replaced by those of another, in order.

    Raises:
        InputError: there are not as many of them.
    """
    at = lane_indices(lanes, state.lanes)
    if at.numel() != other.lanes:
        raise InputError(f"a state of {other.lanes} lanes for {at.numel()} lanes")
    return LaneState(
        tuple(old.index_copy(0, at.to(old.device), new) for old, new in zip(state.tensors, other.tensors, strict=True)),
        state.capacity,
    )


def check_lanes(
    snap: dict[str, torch.Tensor], specs: Sequence[StateSpec], period: int, device: torch.device, capacity: int = 0
) -> LaneState:
    """The state of a snapshot of lanes, copied.

    Raises:
        StateError: it is not one of this model.
    """
    wanted = {s.name for s in specs}
    if set(snap) != wanted:
        raise StateError(
            f"the state is of another model: missing {sorted(wanted - set(snap))}, unknown {sorted(set(snap) - wanted)}"
        )
    lanes = {tuple(t.shape[:1]) for t in snap.values() if isinstance(t, torch.Tensor)}
    if len(lanes) != 1 or lanes == {()}:
        raise StateError("the state's tensors do not have the same number of lanes")
    ((count,),) = lanes
    tensors = []
    for spec in specs:
        t = snap[spec.name]
        if not isinstance(t, torch.Tensor) or t.dtype != spec.dtype or tuple(t.shape) != spec.shape(count):
            what = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, torch.Tensor) else type(t).__name__
            raise StateError(f"{spec.name} does not fit: {what}, expected {spec.dtype} {spec.shape(count)}")
        tensors.append(t.detach().clone().to(device))
    position = tensors[0]
    if count and (int(position.min()) < 0 or int((position[:, 0] % period).max())):
        raise StateError(f"a lane's position is not a number of frames that is a multiple of {period}")
    return LaneState(tuple(tensors), capacity)
