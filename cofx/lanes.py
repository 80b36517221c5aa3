"""Many streams in one batch: what `StepModule` does when it is given `start`, `ready` or `length`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch.utils import _pytree as pytree

from . import __version__
from .compiled import Compiled
from .opaque import Look, as_it_is, handle
from .passes.codegen.key import FOREVER
from .passes.codegen.lane_states import (
    POSITION,
    from_lanes_first,
    lane_schedule,
    lane_state_specs,
    state_layouts,
    to_lanes_first,
)
from .passes.codegen.lanes import LaneProgram, flush_calls, generate_lanes, model_axes
from .passes.errors import user_frame
from .runtime.errors import InputError, LaneError
from .runtime.lane_layout import LaneAxes, LaneLayout
from .runtime.lane_state import LaneState, check_lanes, fresh, put_lanes
from .runtime.program import StateSpec
from .runtime.state import StreamState, grow

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
CONTROLS = {"start": torch.bool, "ready": torch.bool, "length": torch.int64}


class Lanes:
    """The lane programs of a compiled model.

    `alone` is that model, or the same traced for a batch of one where its batch size is fixed.
    """

    def __init__(self, source: Compiled, alone: Compiled) -> None:
        self.source, self.compiled, self.plan, self.spec = source, alone, alone.plan, alone.spec
        self.schedule = lane_schedule(self.plan)
        self.specs = lane_state_specs(self.schedule)
        self.batchless = all(b is None for b in self.plan.clock.batch_dims)
        self.programs: dict[tuple[int, bool, bool, int], LaneProgram] = {}
        self.grows = bool(self.schedule.growing)
        self.ends: set[int] = set()  # lengths at which a stream may end
        self.rooms: dict[int, list[StateSpec]] = {}
        self.handle = handle(self)
        self.looks: dict[tuple[int, bool], list[Look]] = {}  # of results, for `torch.compile`
        self.tails: dict[int, int] = {}  # for ticks per call, those that a stream may take after its end

    def program(self, ticks: int, frames: bool, capacity: int = 0) -> LaneProgram:
        """The program for so many ticks, generated when first asked for."""
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.compiled.model.parameters())
        capacity = max(capacity, self.compiled.capacity(0))
        key = (ticks, frames, not trains, capacity)
        if key not in self.programs:
            self.programs[key] = generate_lanes(
                self.plan, ticks, self.spec.device, frames=frames, folded=not trains, capacity=capacity
            )
        return self.programs[key]

    def longest(self, given: int | None) -> int:
        """Ticks that a stream may have in a file, where all of it is kept: as given, or four clips; 0 elsewhere."""
        return (given or 4 * self.plan.capture.points[0].ticks) if self.grows else 0

    def specs_for(self, state: LaneState) -> list[StateSpec]:
        """What is kept of these lanes."""
        return self._specs_at(state.capacity) if self.grows else self.specs

    def _specs_at(self, capacity: int) -> list[StateSpec]:
        """What is kept where there is room for so many ticks."""
        if capacity not in self.rooms:
            self.rooms[capacity] = lane_state_specs(self.schedule, capacity)
        return self.rooms[capacity]

    def fresh(self, lanes: int, capacity: int = 0) -> LaneState:
        """Lanes of which none has begun, with room for so many ticks where all of a stream is kept."""
        capacity = max(capacity, self.compiled.capacity(0))
        return LaneState(fresh(self._specs_at(capacity), lanes, self.spec.device), capacity)

    def grown(self, state: LaneState, capacity: int) -> LaneState:
        """Lanes with room for so many ticks at least, where all of a stream is kept."""
        if capacity <= state.capacity:
            return state
        return LaneState(grow(state.tensors, self._specs_at(capacity)), capacity)

    def put(self, state: LaneState, other: LaneState, lanes: Any) -> LaneState:
        """The state with some lanes replaced by those of another."""
        capacity = max(state.capacity, other.capacity)
        return put_lanes(self.grown(state, capacity), self.grown(other, capacity), lanes)

    @as_it_is
    def call(
        self, state: LaneState, inputs: Sequence[torch.Tensor], frames: bool, controls: Mapping[str, Any]
    ) -> tuple[Any, Any, LaneState]:
        """The outputs, which of their frames exist, and the state after.

        Raises:
            InputError: the inputs or the controls do not fit, or a table of positions runs out for a lane.
        """
        ticks = 1 if frames else self.spec.ticks(inputs)
        if ticks % self.schedule.period:
            s = self.schedule.period
            raise InputError(
                f"with lanes this model takes a multiple of {s} frames at a time ({ticks} were given): its layers have "
                f"strides, and lanes that stand at different places can share a call only if it does the same work for "
                f"each. Call forward_steps with {s} frames, or a multiple"
            )
        start, ready, length = self._controls(controls, state.lanes)
        self.check(state.tensors[0], ticks, start, ready, length, controls.get("length") is not None)
        results, valid, after = self.advance(state, inputs, frames, start, ready, length)
        y = self.compiled.pack(list(results), stacked=not frames)
        return y, pytree.tree_unflatten(list(valid), self.plan.out_spec), after

    def check(
        self,
        position: torch.Tensor,
        ticks: int,
        start: torch.Tensor,
        ready: torch.Tensor,
        length: torch.Tensor,
        told: bool,
    ) -> None:
        """Raise if the model would do otherwise for a lane than where it was traced, by its length or at its end.

        `told`: an end may have been told with this call.
        """
        if told:
            self._ends_as_traced(position, start, ready, length)
        if self.compiled.tables or self.plan.limit is not None:
            self._within_tables(position, ticks, start, ready, length)

    def advance(
        self,
        state: LaneState,
        inputs: Sequence[torch.Tensor],
        frames: bool,
        start: torch.Tensor,
        ready: torch.Tensor,
        length: torch.Tensor,
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], LaneState]:
        """The output leaves, which of their frames exist, and the state after."""
        ticks = 1 if frames else self.spec.ticks(inputs)
        capacity = 0
        if self.grows:
            capacity = self._capacity(state, ticks, start, ready, length)
            state = self.grown(state, capacity)
        program = self.program(ticks, frames, capacity)
        given = [x.unsqueeze(0) for x in inputs] if self.batchless else list(inputs)
        results, valid, tensors = program.run(*given, start, ready, length, *state.tensors)
        if self.batchless:
            results = [
                x if leaf.value is None or out.batch is None else x.squeeze(0)
                for x, leaf, out in zip(results, self.plan.outputs, program.outputs, strict=True)
            ]
        return results, valid, LaneState(tuple(tensors), capacity)

    def prepare(self, ticks: int, frames: bool) -> bool:
        """Make what `torch.compile` needs to trace calls of so many ticks, and tell whether it can."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.compiled.model.parameters()):
            return False
        self.program(ticks, frames)
        self.fresh(1)
        if self.whole and (ticks, frames) not in self.looks:
            self.looks[ticks, frames] = self._look(ticks, frames)
        return True

    @property
    def whole(self) -> bool:
        """Whether `torch.compile` has to take calls as they are: what is kept grows, or lanes are put in front."""
        return self.grows or self.batchless

    def _look(self, ticks: int, frames: bool) -> list[Look]:
        """What results and their masks look like: dtype, and for each dimension its size per lane and besides.

        Found by a call of two lanes and one of three.
        """
        found = []
        with torch.no_grad():
            for lanes in (1, 1) if self.batchless else (2, 3):
                blank = self._blank(ticks, lanes)
                inputs = self.spec.frame(blank) if frames else blank
                results, valid, _ = self.advance(self.fresh(lanes), inputs, frames, *self._controls({}, lanes))
                found.append([*results, *valid])
        looks = []
        for a, b in zip(*found, strict=True):
            each = [n - m for m, n in zip(a.shape, b.shape, strict=True)]
            looks.append((a.dtype, [(k, m - 2 * k) for k, m in zip(each, a.shape, strict=True)]))
        return looks

    def traced_call(
        self, state: LaneState, inputs: Sequence[torch.Tensor], ticks: int, frames: bool, controls: Mapping[str, Any]
    ) -> tuple[Any, Any, LaneState]:
        """`call` as `torch.compile` traces it, once `prepare` has been called."""
        start, ready, length = self._controls(controls, state.lanes)
        self.spec.check(inputs, ticks, state.lanes, frames)
        told = controls.get("length") is not None
        if self.whole:
            arguments = list(inputs), start, ready, length, list(state.tensors), state.capacity
            made = torch.ops.cofx.advance_lanes(self.handle, frames, told, *arguments)
            n = len(self.plan.outputs)
            results, valid, after = made[:n], made[n : 2 * n], LaneState(tuple(made[2 * n : -1]), made[-1].shape[0])
        else:
            if told or self.compiled.tables or self.plan.limit is not None:
                length = torch.ops.cofx.check_lanes(self.handle, ticks, told, state.tensors[0], start, ready, length)
            results, valid, after = self.advance(state, inputs, frames, start, ready, length)
        y = self.compiled.pack(list(results), stacked=not frames)
        return y, pytree.tree_unflatten(list(valid), self.plan.out_spec), after

    def _controls(self, given: Mapping[str, Any], lanes: int) -> list[torch.Tensor]:
        """start, ready and length, each of shape (lanes, 1)."""
        defaults = {"start": False, "ready": True, "length": -1}
        out = []
        for name, dtype in CONTROLS.items():
            value = given.get(name)
            if value is None:
                out.append(torch.full((lanes, 1), defaults[name], dtype=dtype, device=self.spec.device))
                continue
            t = torch.as_tensor(value, device=self.spec.device)
            whole = t.dtype == torch.bool if dtype == torch.bool else t.dtype in WHOLE
            if t.numel() != lanes or tuple(t.shape) not in {(lanes,), (lanes, 1)} or not whole:
                kind = "bool" if dtype == torch.bool else "whole number"
                raise InputError(
                    f"{name} has one {kind} for each of the {lanes} lanes, not {t.dtype} of shape {tuple(t.shape)}"
                )
            out.append(t.reshape(lanes, 1).to(dtype))
        return out

    def _capacity(
        self, state: LaneState, ticks: int, start: torch.Tensor, ready: torch.Tensor, length: torch.Tensor
    ) -> int:
        """Ticks for which all lanes together have room after this call, no less than before it."""
        before = torch.where(start, 0, state.tensors[0])
        end = torch.where(before[:, 1:] > 0, before[:, 1:] - 1, torch.where(length >= 0, length, FOREVER))
        if ticks not in self.tails:
            self.tails[ticks] = (1 + flush_calls(self.schedule, self.plan.outputs, ticks)) * ticks
        last = end + self.tails[ticks]  # no call after that matters
        wanted = torch.minimum(before[:, :1] + ticks, last)
        most = int(torch.where(ready, wanted, 0).max())
        return max(state.capacity, self.compiled.capacity(most))

    def _ends_as_traced(
        self, position: torch.Tensor, start: torch.Tensor, ready: torch.Tensor, length: torch.Tensor
    ) -> None:
        """Raise if a lane is told to end where the model, run offline, does otherwise than where it was traced."""
        before = torch.where(start, 0, position)
        told = ready & (length >= 0) & (before[:, 1:] == 0)
        for lane in told[:, 0].nonzero()[:, 0].tolist():
            end = max(int(length[lane]), int(before[lane, 0]))
            if end in self.ends or end == 0:
                continue
            try:
                self.compiled.check_end(end)
            except InputError as error:
                raise LaneError(lane, str(error)) from error
            self.ends.add(end)

    def _within_tables(
        self, position: torch.Tensor, ticks: int, start: torch.Tensor, ready: torch.Tensor, length: torch.Tensor
    ) -> None:
        """Raise before a table of positions runs out for any lane, or the model would do otherwise than where it was
        traced."""
        before = torch.where(start, 0, position).tolist()
        for lane, ((count, end), (go,), (told,)) in enumerate(
            zip(before, ready.tolist(), length.tolist(), strict=True)
        ):
            if not go:
                continue
            last = end - 1 if end else max(told, count) if told >= 0 else count + ticks
            for op in self.compiled.tables:
                assert op.limit is not None
                if self.schedule.count(op.outputs[0], min(last, count + ticks)) > op.limit:
                    line = user_frame(op.node) if op.node is not None else ""
                    raise LaneError(
                        lane,
                        f"the stream is longer than a table of the model: {op.name} has {op.limit} entries ({line}); "
                        "start a new one with start",
                    )
            if self.plan.limit is not None and min(last, count + ticks) > self.plan.limit[0]:
                most, branch = self.plan.limit
                raise LaneError(
                    lane,
                    f"on more than {most} frames the model does otherwise than on the example "
                    f"({branch or 'it cannot be run there'}); start a new stream with start",
                )

    def about(self) -> dict[str, Any]:
        """What holds for the outputs, for the metadata of a file; fractions as strings."""
        plan = dataclasses.replace(self.plan, schedule=self.schedule, timings={})
        outputs = []
        for leaf in plan.outputs:
            timing = plan.about(leaf.value)
            numbers = ("delay", "receptive_field", "stride", "padding")
            known = {n: _plain(getattr(timing, n)) if timing else 0 for n in numbers}
            outputs.append({**known, "equivalence": self.plan.equivalence(leaf)})
        return {"version": __version__, "fingerprint": self.fingerprint, **outputs[0], "outputs": outputs,
                "ends": self.compiled.known_ends()}  # fmt: skip

    def layout(
        self,
        ticks: int,
        call: Callable[..., Any],
        place: Callable[[], object],
        mark: Callable[[], Callable[[], None]],
    ) -> LaneLayout:
        """How the arrays of ``forward_steps`` look, for `LanePool`."""
        program, spec = self.program(ticks, False), self.spec
        inputs = []
        for i, sizes in enumerate(spec.sizes(ticks)):
            batch, time = spec.batches[i], spec.times[i]
            shape = tuple(s for d, s in enumerate(sizes) if d != batch)
            dtype = str(spec.dtypes[i]).removeprefix("torch.")
            inputs.append(LaneAxes(spec.names[i], shape, dtype, batch, time, 0 if time is None else spec.frames[i]))

        outputs = [model_axes(self.plan, i, out) for i, out in enumerate(program.outputs)]
        return LaneLayout(
            ticks,
            inputs,
            outputs,
            program.flush_calls,
            functools.partial(self._blank, ticks),
            torch.no_grad()(call),
            torch.Tensor,
            torch.clone,
            place,
            mark,
        )

    def _blank(self, ticks: int, lanes: int) -> list[torch.Tensor]:
        """Inputs of zeros."""
        out = []
        for sizes, dtype, batch in zip(self.spec.sizes(ticks), self.spec.dtypes, self.spec.batches, strict=True):
            shape = [lanes if d == batch else s for d, s in enumerate(sizes)]
            out.append(torch.zeros(shape, dtype=dtype, device=self.spec.device))
        return out

    # -- states ------------------------------------------------------------------------------------------------------

    def from_stream(self, state: StreamState) -> LaneState:
        """The state of a batch of streams that went step by step together, as lanes.

        Raises:
            InputError: they stand at a place where no lane can.
        """
        lanes = 1 if state.batch is None else state.batch
        if state.tensors is None:
            return self.fresh(lanes)
        if self.schedule is not self.plan.schedule:
            raise InputError(
                "this stream was begun without lanes, and its first output came before lanes give it: begin it with "
                "start, ready or length given, after clean_state()"
            )
        if state.count % self.schedule.period:
            s = self.schedule.period
            left = s - state.count % s
            raise InputError(
                f"a stream can go on in a lane after a multiple of {s} frames, not after {state.count}: feed {left} "
                "more without lane arguments, or begin anew with clean_state()"
            )
        capacity = self.compiled.capacity(state.count)
        position = torch.zeros(lanes, 2, dtype=torch.int64, device=self.spec.device)
        position[:, 0] = state.count
        specs = lane_state_specs(self.schedule, capacity)[1:]
        kept = [
            to_lanes_first(t, layout, lanes).reshape(spec.shape(lanes)).contiguous()
            for t, layout, spec in zip(state.tensors, state_layouts(self.schedule, capacity), specs, strict=True)
        ]
        return LaneState((position, *kept), capacity)

    def to_stream(self, state: LaneState) -> StreamState:
        """The inverse of `from_stream`, for lanes that stand together."""
        position, *kept = state.tensors
        count = int(position[0, 0]) if len(position) else 0
        tensors = []
        layouts = state_layouts(self.schedule, state.capacity)
        for t, layout, spec in zip(kept, layouts, self.compiled.specs_after(count), strict=True):
            plain = from_lanes_first(t, layout)
            if spec.grows is not None:  # what is kept stands at the end
                frames = spec.dims[spec.grows][1]
                plain = plain.narrow(spec.grows, plain.shape[spec.grows] - frames, frames)
            tensors.append(plain.contiguous())
        return StreamState(count, tuple(tensors), None if self.batchless else state.lanes)

    @functools.cached_property
    def fingerprint(self) -> str:
        """What a state depends on: the ops, the parameters, and what is kept."""
        digest = hashlib.sha256()
        ops = [str(n.target) for n in self.plan.graph.nodes if n.op == "call_function"]
        digest.update(json.dumps([ops, [(s.name, s.dims, str(s.dtype)) for s in self.specs]]).encode())
        for name, tensor in sorted(self.plan.constants.tensors.items()):
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        return digest.hexdigest()

    def restore(self, snap: dict[str, torch.Tensor]) -> LaneState:
        """The state of a snapshot.

        Raises:
            StateError: it is of another model.
        """
        capacity = self.compiled.capacity(0)
        while self.grows and any(
            isinstance(t := snap.get(spec.name), torch.Tensor)
            and spec.grows is not None
            and t.dim() > spec.grows
            and t.shape[spec.grows] > spec.dims[spec.grows][1]
            for spec in lane_state_specs(self.schedule, capacity)
        ):
            capacity = self.compiled.capacity(capacity + 1)
        specs = lane_state_specs(self.schedule, capacity)
        known = [s for s in specs if isinstance(snap.get(s.name), torch.Tensor) and snap[s.name].dim() == len(s.dims)]
        snap = snap | dict(zip([s.name for s in known], grow([snap[s.name] for s in known], known), strict=True))
        return check_lanes(snap, specs, self.schedule.period, self.spec.device, capacity)


def _plain(number: float | int | Fraction) -> int | str:
    return number if isinstance(number, int) else str(number)


def lanes_of(compiled: Compiled, inputs: Sequence[torch.Tensor], frames: bool) -> int:
    """How many lanes these inputs have; one where the model has no batch dimension."""
    batch = compiled.spec.batch_of(inputs, frames)
    return 1 if batch is None else batch


__all__ = ["POSITION", "Lanes", "lanes_of"]
