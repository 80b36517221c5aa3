"""A step model in an ONNX file, run by ONNX Runtime on numpy arrays. Imports neither torch nor onnx.

::

    step = OnnxStep("step.onnx")
    y = step.forward_step(x)

The surface is that of the PyTorch step model (`cofx.StepModule`). State lives in two sets of buffers that are bound
once and swapped: a step reads one and writes the other, so that a call that fails leaves the streams where they were.
What takes several runs of the graph is done in a second pair, which replaces the first when all has gone well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .alone import alone
from .errors import InputError, LaneError, StateError
from .lane_layout import LaneAxes, LaneLayout
from .onnx_arrays import Arrays
from .onnx_buffers import Array, Buffers, Now, available_providers, open_session
from .onnx_meta import NUMBERS, may_end, number, read_meta
from .state_file import HELD, read_state, write_state

POSITION = "position"


class OnnxStep:
    """A step model in an ONNX file, made by ``StepModule.to_onnx``.

    A call while another one is running, in a second thread say, is refused. A call that raises leaves the streams where
    they were. Arrays have the shapes that the PyTorch step model takes and gives.

    Args:
        path: of the file.
        threads: that one call may use; 0: one for each core.
        providers: execution providers of ONNX Runtime; their inputs and outputs are in the host's memory.

    Raises:
        InputError: the file is no step model of a version that is understood, or there is no such provider.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int = 1,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
            raise InputError(f"threads is a number of threads (0: one for each core), not {threads!r}")
        asked = [providers] if isinstance(providers, str) else list(providers)
        if absent := [p for p in asked if p not in available_providers()]:  # ONNX Runtime would take another, silently
            raise InputError(f"ONNX Runtime has no {', '.join(absent)} here, but {', '.join(available_providers())}")
        try:
            self.session = open_session(os.fspath(path), threads, asked)
        except Exception as error:
            raise InputError(f"{os.fspath(path)} cannot be run by ONNX Runtime: {error}") from error
        if absent := [p for p in asked if p not in self.session.get_providers()]:
            raise InputError(f"ONNX Runtime cannot use {', '.join(absent)} here")
        self.meta = read_meta(self.session, os.fspath(path))
        self.frames_per_step: int = self.meta["frames_per_step"]
        self._arrays = Arrays(self.meta)
        self._pinned = self.session.get_inputs()[len(self.meta["inputs"])].shape[0]
        self._buffers: Buffers | None = None
        self._spare: Buffers | None = None  # in which calls work that take several runs of the graph
        self._running = False  # within a call

    # -- calls -------------------------------------------------------------------------------------------------------

    @alone
    def forward_step(
        self, *frames: Array, update_state: bool = True, start: Any = None, ready: Any = None, length: Any = None
    ) -> Any:
        """Take one frame of each input (without time axis); see `StepModule.forward_step`.

        Returns:
            the frame that is due, or None; with `start`, `ready` or `length` given, ``(y, valid)``.
        """
        if self.frames_per_step != 1:
            raise self._whole(1)
        chunks = []
        for x, info, rate in zip(frames, self.meta["inputs"], self._arrays.rates, strict=False):
            time = info["model_axes"]["time"]
            one = rate == 1 and time is not None and isinstance(x, np.ndarray) and x.ndim >= time
            chunks.append(np.expand_dims(x, time) if one else x)
        chunks += frames[len(chunks) :]
        return self._call(chunks, 1, True, update_state, {"start": start, "ready": ready, "length": length})

    @alone
    def forward_steps(
        self,
        *chunks: Array,
        pad_end: bool = False,
        update_state: bool = True,
        start: Any = None,
        ready: Any = None,
        length: Any = None,
    ) -> Any:
        """Take a number of frames; see `StepModule.forward_steps`.

        They are a multiple of `frames_per_step`, but before the end (`pad_end`), after which a new stream begins with
        `clean_state` unless they are. With lanes, they are just `frames_per_step`.

        Returns:
            the outputs that are due, with time axis, or None; with `start`, `ready` or `length`, ``(y, valid)``.
        """
        controls = {"start": start, "ready": ready, "length": length}
        ticks = self._arrays.ticks(chunks)
        if any(c is not None for c in controls.values()):
            if pad_end:
                raise InputError("pad_end ends all streams of a batch at once; give the lanes' length instead")
            return self._call(list(chunks), ticks, False, update_state, controls)
        self._together()
        buffers = self._checked(chunks, ticks)
        left = ticks % self.frames_per_step
        if (left and not pad_end) or ticks < 1:
            raise self._whole(ticks)
        self._within_table(buffers, ticks, {})
        parts: list[list[Array]] = [[] for _ in self.meta["outputs"]]
        work = self._work(buffers)
        for at in range(0, ticks - left, self.frames_per_step):
            self._advance(work, self._arrays.part(chunks, at, self.frames_per_step), {}, parts)
        held = self._arrays.untimed(chunks)
        if pad_end:
            after = [x.copy() for x in work.state]
            rest = self._arrays.part(chunks, ticks - left, left) if left else None
            self._flush(work, held, rest, left, parts)
            work.copy(after)
        y = self._arrays.due(parts, frames=False)
        if update_state:
            work.now = Now(work.now.current, held, bool(left))
            self._buffers, self._spare = work, buffers
        return y

    @alone
    def flush(self) -> Any:
        """The stream has ended: what is still due, with time axis, or None. The state stays as it is."""
        buffers = self._buffers
        if buffers is None or not buffers.state[0][:, 0].any():
            return None
        self._together()
        parts: list[list[Array]] = [[] for _ in self.meta["outputs"]]
        self._flush(self._work(buffers), buffers.now.held, None, 0, parts)
        return self._arrays.due(parts, frames=False)

    def _work(self, buffers: Buffers) -> Buffers:
        """Other buffers with the same states, for calls that take several runs of the graph: what they do to those is
        only kept when all has gone well."""
        work = self._room(buffers.lanes)
        work.copy(buffers.state)
        return work

    def _room(self, lanes: int) -> Buffers:
        """Buffers that are not those of the streams."""
        if self._spare is None or self._spare.lanes != lanes:
            self._spare = Buffers(self.session, self.meta, lanes)
        return self._spare

    def _call(
        self, chunks: list[Array], ticks: int, frames: bool, update_state: bool, controls: Mapping[str, Any]
    ) -> Any:
        """One call of the graph."""
        lanes = any(c is not None for c in controls.values())
        if not lanes:
            self._together()
        if ticks != self.frames_per_step:
            raise self._whole(ticks)
        buffers = self._checked(chunks, ticks)
        given = self._controls(controls, buffers.lanes) if lanes else {}
        self._ends_as_traced(buffers, given)
        self._within_table(buffers, ticks, given)
        parts: list[list[Array]] = [[] for _ in self.meta["outputs"]]
        self._arrays.fill(buffers, chunks, given)
        buffers.run()
        after = buffers.after(self._arrays.untimed(chunks))
        if not lanes:
            self._arrays.collect(buffers.outputs, parts)
            due = self._arrays.due(parts, frames)
            if update_state:
                buffers.now = after
                self._buffers = buffers
            return due
        y, valid = [], []
        for info in self.meta["outputs"]:
            y.append(self._arrays.shaped(info, buffers.outputs[info["name"]], frames).copy())
            exists = buffers.outputs[info["valid"]]
            untimed = not info["timed"] or (frames and info["single"])
            valid.append(exists[:, 0].copy() if untimed else exists.copy())
        result = self._arrays.packed(y), self._arrays.packed(valid)
        if update_state:
            buffers.now = after
            self._buffers = buffers
        return result

    # -- inside a call -----------------------------------------------------------------------------------------------

    def _checked(self, chunks: Sequence[Any], ticks: int) -> Buffers:
        """The buffers for these inputs.

        Raises:
            InputError: the inputs do not fit.
        """
        infos = self.meta["inputs"]
        if self._buffers is not None and self._buffers.now.ended:
            raise InputError("the stream has ended: begin a new one with clean_state()")
        if len(chunks) != len(infos):
            names = ", ".join(i["name"] for i in infos)
            raise InputError(f"{len(infos)} inputs are needed ({names}), {len(chunks)} were given")
        lanes = None if self._buffers is None else self._buffers.lanes
        for x, info, rate in zip(chunks, infos, self._arrays.rates, strict=True):
            if not isinstance(x, np.ndarray):
                raise InputError(f"input '{info['name']}' is a {type(x).__name__}, not an array")
            if x.dtype != np.dtype(info["dtype"]):
                raise InputError(f"input '{info['name']}' has dtype {x.dtype}, the model takes {info['dtype']}")
            shape = self._arrays.model_shape(info, ticks * rate)
            batch = info["model_axes"]["batch"]
            if batch is not None:
                if lanes is None and x.ndim == len(shape):
                    lanes = int(x.shape[batch])
                shape[batch] = lanes
            if tuple(x.shape) != tuple(shape):
                raise InputError(
                    f"input '{info['name']}' has shape {tuple(x.shape)}, expected {tuple(shape)} for {ticks} ticks"
                )
        lanes = 1 if lanes is None else lanes
        if isinstance(self._pinned, int) and lanes != self._pinned:
            raise InputError(f"this file was exported for a batch of {self._pinned}, not {lanes}")
        return self._buffers or Buffers(self.session, self.meta, lanes)

    def whole_calls(self, chunks: Sequence[Array]) -> list[Array]:
        """As many of these frames as make whole calls."""
        ticks = self._arrays.ticks(chunks)
        return self._arrays.part(chunks, 0, ticks - ticks % self.frames_per_step)

    def _advance(
        self, buffers: Buffers, chunks: Sequence[Array], controls: Mapping[str, Any], parts: list[list[Array]]
    ) -> None:
        """One call for all lanes together, its valid frames appended to `parts`."""
        self._arrays.fill(buffers, chunks, controls)
        buffers.run()
        buffers.now = buffers.after(())
        self._arrays.collect(buffers.outputs, parts)

    def _flush(
        self, buffers: Buffers, held: Sequence[Array], rest: list[Array] | None, left: int, parts: list[list[Array]]
    ) -> None:
        """Feed what is left, then empty frames until the last output is out. `held`: the inputs without time."""
        if not self.meta["controls"]:
            raise InputError("this file was exported without controls: its streams do not end")
        count = int(buffers.state[0][0, 0]) + left
        if not may_end(self.meta, count):
            raise InputError(_otherwise(count))
        end = {"length": count}
        for call in range(self.meta["flush_calls"] + (rest is not None)):
            chunks = self._arrays.blank(buffers.lanes, held)
            if call == 0 and rest is not None:
                for i, (x, rate) in enumerate(zip(rest, self._arrays.rates, strict=True)):
                    time = self.meta["inputs"][i]["model_axes"]["time"]
                    if rate:
                        at = [slice(None)] * x.ndim
                        at[time] = slice(0, left * rate)
                        chunks[i][tuple(at)] = x
            untimed = [list(p) if not o["timed"] else None for p, o in zip(parts, self.meta["outputs"], strict=True)]
            self._advance(buffers, chunks, end, parts)
            for part, kept in zip(parts, untimed, strict=True):
                if kept is not None and rest is None:
                    part[:] = kept

    # -- lanes -------------------------------------------------------------------------------------------------------

    def _whole(self, ticks: int) -> InputError:
        n = self.frames_per_step
        return InputError(
            f"this file takes {n} frames at a time, not {ticks}: call forward_steps with {n} frames"
            + (f" (or a multiple of {n}, without lane arguments)" if ticks % n or ticks < 1 else "")
        )

    def _together(self) -> None:
        """Raise unless all lanes stand at the same place."""
        if self._buffers is not None:
            position = self._buffers.state[0]
            if (position != position[:1]).any() or position[:, 1].any():
                raise InputError(
                    "the lanes of this batch go each by itself, so that frames may be valid for some of them only: "
                    "give start, ready or length (ready=[True, ...] takes them all; length ends a lane), or "
                    "clean_state()"
                )

    def _controls(self, given: Mapping[str, Any], lanes: int) -> dict[str, Array]:
        if not self.meta["controls"]:
            raise InputError("this file was exported without controls: it has no start, ready or length")
        out = {}
        for name, value in given.items():
            if value is None:
                continue
            array = np.asarray(value)
            kind = "bool" if name != "length" else "whole number"
            fits = array.dtype == np.bool_ if name != "length" else array.dtype.kind in "iu"
            if array.shape not in ((lanes,), (lanes, 1)) or not fits:
                raise InputError(
                    f"{name} has one {kind} for each of the {lanes} lanes, not {array.dtype} of shape {array.shape}"
                )
            out[name] = array.reshape(lanes, 1)
        return out

    def _ends_as_traced(self, buffers: Buffers, given: Mapping[str, Array]) -> None:
        """Raise if a lane is told to end where the model, run offline, does otherwise than where it was traced."""
        if "length" not in given:
            return
        position = np.where(given.get("start", False), 0, buffers.state[0])
        told = given.get("ready", np.True_) & (given["length"] >= 0) & (position[:, 1:] == 0)
        for lane in np.flatnonzero(told[:, 0]).tolist():
            end = max(int(given["length"][lane, 0]), int(position[lane, 0]))
            if not may_end(self.meta, end):
                raise LaneError(lane, _otherwise(end))

    def _within_table(self, buffers: Buffers, ticks: int, given: Mapping[str, Array]) -> None:
        """Raise before a table of positions runs out for any lane."""
        limit = self.meta["limit"]
        if limit is None:
            return
        position = np.where(given.get("start", False), 0, buffers.state[0])
        count = position[:, :1]
        told = given.get("length", np.full_like(count, -1))
        end = np.where(told >= 0, np.maximum(told, count), count + ticks)
        end = np.where(position[:, 1:] > 0, position[:, 1:] - 1, end)
        over = (np.minimum(end, count + ticks) > limit) & given.get("ready", np.ones_like(count, bool))
        if over.any():
            raise LaneError(
                int(np.flatnonzero(over[:, 0])[0]),
                f"the stream is longer than the {limit} frames that this file takes (a table of the model ends there, "
                "or the room that it was exported with); start a new one",
            )

    # -- state -------------------------------------------------------------------------------------------------------

    @alone
    def clean_state(self, lanes: Any = None) -> None:
        """Start a new stream, its batch size may be another; or only these lanes (indices, or a bool for each)."""
        if lanes is None:
            self._buffers = None
        elif self._buffers is not None:
            at = _indices(lanes, self._buffers.lanes)
            self._put([np.zeros_like(x[at]) for x in self._buffers.state], at)

    def _put(self, arrays: Sequence[Array], at: Array) -> None:
        """Replace some lanes of all states at once."""
        assert self._buffers is not None
        buffers, work = self._buffers, self._work(self._buffers)
        for mine, given in zip(work.state, arrays, strict=True):
            mine[at] = given
        work.now = replace(buffers.now, current=work.now.current)
        self._buffers, self._spare = work, buffers

    def get_state(self, lanes: Any = None) -> dict[str, Array]:
        """A snapshot: a flat dict of named arrays, lanes first, nothing shared; of some lanes, or of all."""
        if self._buffers is None:
            if lanes is None:
                return {}
            raise InputError("there are no lanes before the first call")
        at = slice(None) if lanes is None else _indices(lanes, self._buffers.lanes)
        return {s["key"]: a[at].copy() for s, a in zip(self.meta["states"], self._buffers.state, strict=True)}

    @alone
    def set_state(self, state: Mapping[str, Any], lanes: Any = None) -> None:
        """Go on from a snapshot of this step model or of the PyTorch one's lanes; or put it in the place of some lanes.

        Raises:
            StateError: it belongs to another model; nothing has changed.
        """
        self._set(state, lanes, () if self._buffers is None else self._buffers.now.held)

    def _set(self, state: Mapping[str, Any], lanes: Any, held: Sequence[Array]) -> None:
        if not isinstance(state, Mapping):
            raise StateError(f"a state is a dict as get_state() returns it, not a {type(state).__name__}")
        if not state and lanes is None:
            self._buffers = None
            return
        specs = self.meta["states"]
        wanted = {s["key"] for s in specs}
        if set(state) != wanted:
            missing, unknown = sorted(wanted - set(state)), sorted(map(str, set(state) - wanted))
            raise StateError(f"the state is of another model: missing {missing}, unknown {unknown}")
        arrays = [_fitted(np.asarray(state[s["key"]]), s) for s in specs]
        counts = {a.shape[:1] for a in arrays}
        if len(counts) != 1 or counts == {()}:
            raise StateError("the state's arrays do not have the same number of lanes")
        ((count,),) = counts
        for spec, array in zip(specs, arrays, strict=True):
            shape = tuple(count if d == "batch" else d for d in spec["shape"])
            if array.shape != shape or str(array.dtype) != spec["dtype"]:
                raise StateError(
                    f"{spec['key']} does not fit: {array.dtype} {array.shape}, expected {spec['dtype']} {shape}"
                )
        period = self.meta["period"]
        if count and (arrays[0].min() < 0 or (arrays[0][:, 0] % period).any()):
            raise StateError(f"a lane's position is not a number of frames that is a multiple of {period}")
        if isinstance(self._pinned, int) and lanes is None and count != self._pinned:
            raise StateError(f"this file was exported for a batch of {self._pinned}, not {count}")
        if lanes is None:
            buffers = self._room(count)
            buffers.copy(arrays)
            buffers.now = Now(buffers.now.current, tuple(held))
            self._buffers, self._spare = buffers, self._buffers
            return
        if self._buffers is None:
            raise StateError("there are no lanes yet: set_state(state) without lanes, or make a first call")
        at = _indices(lanes, self._buffers.lanes)
        if at.size != count:
            raise InputError(f"a state of {count} lanes for {at.size} lanes")
        self._put(arrays, at)

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Write a snapshot of all lanes to a file; see `StepModule.save_state`, whose model can load it."""
        state = self.get_state()
        together = not state or ((state[POSITION] == state[POSITION][:1]).all() and not state[POSITION][:, 1:].any())
        about = {"fingerprint": self.meta["fingerprint"], "form": "lanes", "together": bool(together)}
        if not state:
            about["form"] = "stream"
            state = {"count": np.zeros((), np.int64)}
        held = () if self._buffers is None else self._buffers.now.held
        state |= {f"{HELD}{i}": np.ascontiguousarray(x) for i, x in enumerate(held)}
        write_state(path, state, about, "numpy")

    @alone
    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Go on from a snapshot in a file, written by this model or by the PyTorch step model that it was made from.

        Raises:
            StateError: it is no snapshot, or one of another model; nothing has changed.
        """
        state, about = read_state(path, self.meta["fingerprint"], "numpy")
        held = [state.pop(k) for k in sorted(state) if k.startswith(HELD)]
        if about.get("form") == "lanes":
            self._set(state, None, held)
        elif state.get("count", 1) == 0:
            self._buffers = None
        else:
            raise StateError(
                f"{os.fspath(path)} holds a stream that stands at a place where no lane can: save it after a multiple "
                f"of {self.meta['period']} frames, begun with start, ready or length given"
            )

    # -- what is known of it -----------------------------------------------------------------------------------------

    def lane_layout(self, frames_per_step: int | None = None) -> LaneLayout:
        """How its arrays look, for `LanePool`."""
        if frames_per_step not in (None, self.frames_per_step):
            raise self._whole(frames_per_step or 0)
        inputs = []
        for info, rate in zip(self.meta["inputs"], self._arrays.rates, strict=True):
            shape = [s for s in self._arrays.model_shape(info, self.frames_per_step * rate) if s is not None]
            axes = info["model_axes"]
            inputs.append(LaneAxes(info["name"], tuple(shape), info["dtype"], axes["batch"], axes["time"], rate))
        outputs = [(o["model_axes"]["batch"], o["model_axes"]["time"]) for o in self.meta["outputs"]]
        return LaneLayout(
            self.frames_per_step,
            inputs,
            outputs,
            self.meta["flush_calls"],
            lambda lanes: self._arrays.blank(lanes, self._arrays.untimed_zeros(lanes)),
            self.forward_steps,
            np.ndarray,
            np.copy,
            lambda: None if self._buffers is None else self._buffers.now,
            self._mark,
        )

    def _mark(self) -> Callable[[], None]:
        """Takes the last run of the graph back."""
        buffers = self._buffers
        now = None if buffers is None else buffers.now

        def back() -> None:
            if buffers is not None and now is not None:
                buffers.now = now
            self._buffers = buffers

        return back

    @property
    def outputs(self) -> list[dict[str, Any]]:
        """Name, delay, receptive field, stride, padding and equivalence of every output."""
        return [
            {"name": o["name"], **{n: number(o[n]) for n in NUMBERS}, "equivalence": o["equivalence"]}
            for o in self.meta["outputs"]
        ]

    @property
    def delay(self) -> Any:
        """The index of the first frame with which an output (the first) comes."""
        return self.outputs[0]["delay"]

    @property
    def receptive_field(self) -> Any:
        """Input frames on which a frame of the first output depends."""
        return self.outputs[0]["receptive_field"]

    @property
    def stride(self) -> Any:
        """Input frames per frame of the first output."""
        return self.outputs[0]["stride"]

    @property
    def padding(self) -> Any:
        """``receptive_field - 1 - delay`` of the first output."""
        return self.outputs[0]["padding"]

    @property
    def equivalence(self) -> str:
        """What holds for the first output."""
        return str(self.outputs[0]["equivalence"])


def _fitted(array: Array, spec: Mapping[str, Any]) -> Array:
    """A state with the room that a file has, where all of a stream is kept: its frames stand at the end.

    Raises:
        StateError: the stream is too long for the file.
    """
    axis = spec.get("grows")
    if axis is None or array.ndim != len(spec["shape"]):
        return array
    missing = spec["shape"][axis] - array.shape[axis]
    if missing >= 0:
        return np.pad(array, [(missing * (d == axis), 0) for d in range(array.ndim)])
    front = (slice(None),) * axis
    if array[(*front, slice(0, -missing))].any():
        raise StateError(f"{spec['key']} is too long for this file: export one with more room (longest=...)")
    return array[(*front, slice(-missing, None))]


def _otherwise(length: int) -> str:
    return (
        f"a stream of {length} frames cannot end here: at this length the model does otherwise than where it was "
        "traced; compile(..., equivalence='clip') recomputes whole clips"
    )


def _indices(lanes: Any, total: int) -> Array:
    """Lanes given as a list of indices, or as a bool for each, as indices."""
    given = np.asarray(lanes)
    if given.dtype == np.bool_:
        if given.shape != (total,):
            raise InputError(f"a mask of lanes has shape ({total},), not {given.shape}")
        return np.flatnonzero(given)
    given = np.atleast_1d(given)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise InputError("lanes are a list of indices, or a bool for each lane")
    given = given.astype(np.int64)
    if given.size and not (given.min() >= 0 and given.max() < total):
        raise InputError(f"there are lanes 0 to {total - 1}, not {given.tolist()}")
    if len(set(given.tolist())) != given.size:
        raise InputError(f"a lane is named twice: {given.tolist()}")
    return given


__all__ = ["OnnxStep"]
