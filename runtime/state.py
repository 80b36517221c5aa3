"""The state of a stream: named tensors and a counter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .errors import StateError
from .program import StateSpec

if TYPE_CHECKING:
    from .resident import Resident

COUNT, BATCH = "count", "batch"


class StreamState:
    """Where a stream is. Not to be changed.

    Attributes:
        count: ticks consumed.
        batch: its batch size; None before the first frame, or where there is no batch axis.
        apart: what is kept, histories frame by frame as far as they are kept so; None if it is not in this form.
        resident: what is kept, in the buffers of a backend; None if it is not there.
    """

    __slots__ = ("_specs", "_tensors", "apart", "batch", "count", "resident")

    def __init__(
        self,
        count: int = 0,
        tensors: tuple[torch.Tensor, ...] | None = None,
        batch: int | None = None,
        apart: tuple[torch.Tensor, ...] | None = None,
        specs: Sequence[StateSpec] = (),
        resident: Resident | None = None,
    ) -> None:
        """`specs`: of what is kept, if it is given apart or resident."""
        self.count, self.batch, self.apart, self.resident = count, batch, apart, resident
        self._tensors, self._specs = tensors, specs

    @property
    def tensors(self) -> tuple[torch.Tensor, ...] | None:
        """What is kept, one tensor for each history; None before the first frame."""
        if self._tensors is None and self.resident is not None:
            self._tensors = tuple(join(self.resident.parts(), self._specs))
        if self._tensors is None and self.apart is not None:
            self._tensors = tuple(join(self.apart, self._specs))
        return self._tensors

    def leave(self) -> Resident | None:
        """Take what is kept out of the buffers of a backend, in which the stream goes on; where in them it was."""
        here = self.resident
        if here is not None:
            self._tensors, self.resident = self.tensors, None
        return here

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow through what is kept; through a backend's buffers there are none."""
        kept = self.apart if self.apart is not None else self._tensors
        return kept is not None and any(x.requires_grad for x in kept)


def take_apart(tensors: Sequence[torch.Tensor], specs: Sequence[StateSpec]) -> tuple[torch.Tensor, ...]:
    """State tensors with histories frame by frame, as far as they are kept so in mid-stream."""
    parts: list[torch.Tensor] = []
    for tensor, spec in zip(tensors, specs, strict=True):
        parts += [tensor] if spec.apart is None else map(_picture, tensor.unbind(spec.apart))
    return tuple(parts)


def _picture(frame: torch.Tensor) -> torch.Tensor:
    """A frame as it lies in memory in mid-stream: channels last."""
    return frame.movedim(1, -1).contiguous().movedim(-1, 1) if frame.dim() > 2 else frame.contiguous()


def join(parts: Sequence[torch.Tensor], specs: Sequence[StateSpec]) -> Iterator[torch.Tensor]:
    """The inverse of `take_apart`."""
    left = iter(parts)
    for spec in specs:
        if spec.apart is None:
            yield next(left)
        else:
            yield torch.stack([next(left) for _ in range(spec.dims[spec.apart][1])], spec.apart)


def allocate(specs: Sequence[StateSpec], batch: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """State tensors for a new stream. Their content does not matter: frames before the start are masked."""
    return tuple(torch.zeros(s.shape(batch), dtype=s.dtype, device=device) for s in specs)


def grow(tensors: Sequence[torch.Tensor], specs: Sequence[StateSpec]) -> tuple[torch.Tensor, ...]:
    """State tensors with room for more frames: what is kept stands at the end."""
    grown = []
    for tensor, spec in zip(tensors, specs, strict=True):
        axis = spec.grows
        missing = 0 if axis is None else spec.dims[axis][1] - tensor.shape[axis]
        if axis is not None and missing > 0:
            room = tensor.new_zeros([missing if i == axis else n for i, n in enumerate(tensor.shape)])
            tensor = torch.cat([room, tensor], axis)
        grown.append(tensor)
    return tuple(grown)


def snapshot(state: StreamState, specs: Sequence[StateSpec]) -> dict[str, torch.Tensor]:
    """A flat dict of copies, nothing shared with the stream."""
    tensors = {} if state.tensors is None else {s.name: t.clone() for s, t in zip(specs, state.tensors, strict=True)}
    batch = {} if state.batch is None else {BATCH: torch.tensor(state.batch, dtype=torch.int64)}
    return {COUNT: torch.tensor(state.count, dtype=torch.int64), **batch, **tensors}


def restore(
    snap: dict[str, torch.Tensor], specs_after: Callable[[int], Sequence[StateSpec]], device: torch.device
) -> StreamState:
    """The state of a snapshot, copied. `specs_after`: what is kept after so many ticks.

    Raises:
        StateError: it is not a snapshot of this model.
    """
    if not isinstance(snap, dict) or COUNT not in snap:
        raise StateError("a state is a dict as get_state() returns it, with an entry 'count'")
    names = set(snap) - {COUNT, BATCH}
    count = _whole(snap, COUNT)
    if count < 0:
        raise StateError(f"a stream cannot have had {count} frames")
    specs = specs_after(count)
    wanted = {s.name for s in specs}
    batch = _whole(snap, BATCH) if BATCH in snap else None
    if not names and count == 0:
        return StreamState()
    if names != wanted:
        raise StateError(
            f"the state is of another model: missing {sorted(wanted - names)}, unknown {sorted(names - wanted)}"
        )
    tensors = []
    batches = set() if batch is None else {batch}
    for spec in specs:
        t = snap[spec.name]
        if not isinstance(t, torch.Tensor) or t.dtype != spec.dtype or len(t.shape) != len(spec.dims):
            got = f"{t.dtype} {tuple(t.shape)}" if isinstance(t, torch.Tensor) else f"a {type(t).__name__}"
            raise StateError(f"{spec.name} does not fit: {got}, expected a tensor {spec.dtype} {_shape(spec)}")
        for size, (per_lane, constant) in zip(t.shape, spec.dims, strict=True):
            if per_lane:
                batches.add(size // per_lane)
            elif size != constant:
                raise StateError(f"{spec.name} does not fit: shape {tuple(t.shape)}, expected {_shape(spec)}")
        tensors.append(t.detach().clone().to(device))
    if len(batches) > 1:
        raise StateError(f"the state's tensors have different batch sizes: {sorted(batches)}")
    return StreamState(count, tuple(tensors), batch)


def _whole(snap: Mapping[str, Any], name: str) -> int:
    """A number of a snapshot.

    Raises:
        StateError: it is none.
    """
    value = snap[name]
    if isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_floating_point():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise StateError(f"'{name}' of a state is a whole number, not {value!r}")


def _shape(spec: StateSpec) -> str:
    """The shape of a state, its batch size left open."""
    sizes = [(f"{n} * batch" if n > 1 else "batch") if n else str(m) for n, m in spec.dims]
    return f"({', '.join(sizes)}{',' * (len(sizes) == 1)})"
