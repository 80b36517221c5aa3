"""The front door: `compile` and the step model that it returns."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from . import traced_calls
from .call_modes import call_mode, current_mode, known_mode
from .compiled import Compiled
from .exporting import export, export_quantized
from .inputs import make_clock
from .lanes import POSITION, Lanes, lanes_of
from .opaque import as_it_is, handle
from .options import Options, whole
from .output_info import OutputInfo
from .passes.codegen.key import Key
from .report import Report, report, tell_ptflops
from .runtime.alone import alone, in_use
from .runtime.errors import InputError, StateError
from .runtime.lane_layout import LaneLayout
from .runtime.lane_state import LaneState, lane_indices, take_lanes
from .runtime.state import StreamState, restore, snapshot
from .runtime.state_file import HELD, read_state, write_state
from .saving import save_step
from .tracing import Traced, trace, trace_alone, trace_at
from .verification import Verification, verify

__all__ = ["OutputInfo", "StepModule", "call_mode", "compile"]


def compile(
    model: nn.Module,
    example: torch.Tensor | Sequence[torch.Tensor] | None = None,
    *,
    time_dim: int | Sequence[int | None] = 2,
    batch_dim: int | Sequence[int | None] | None = 0,
    clip_length: int | None = None,
    equivalence: str | None = None,
    window_output: str = "last",
    nonlocal_ops: str | Mapping[str, str] = "recompute",
    context: int | None = None,
    backend: str = "eager",
) -> StepModule:
    """Compile a clip model into a step model.

    Args:
        model: any module; it is not changed, its parameters are shared.
        example: a clip, or a tuple of clips for several inputs. Without it the model is traced at the first call.
        time_dim: the time axis of the inputs, one for all or one for each; None for an input without time.
        batch_dim: the batch axis likewise; None if there is none.
        clip_length: frames of a clip, for models that need whole clips; default the example's length.
        equivalence: "stream", "clip", "prefix" or "first-clip" asks for that promise; default the best there is.
        window_output: of a clip's output that keeps time, return the newest frame ("last") or all of it ("all").
        nonlocal_ops: what becomes of ops over the whole clip: "recompute" them over the last `clip_length` frames;
            "continual": inside the model, let them look on the frames so far instead (at most `clip_length` of them,
            see `StepModule.reference_module`); "refuse" them. Or one of these for each module or op, by patterns:
            ``{"blocks.*.se": "continual", "aten.mean.dim": "refuse"}``.
        context: the most frames, the current one included, that attention without a bound of its own reads. It is then
            approximate. None keeps everything, exactly.
        backend: of steps in mid-stream without gradients: "eager" (torch's own kernels), "inductor" (`torch.compile`,
            compiled for a while at the first step), "onnxruntime" (in buffers of its own, for each batch size), "c" (C
            that is generated for the step and compiled on this machine: for small nets), or "auto": the fastest of
            those that can run the model here, measured once for a model and machine and then remembered
            (``COFX_MEASURE=0`` takes ONNX Runtime where it is installed, without measuring). All else, the first
            frames, chunks, lanes and the end of a stream, runs eagerly.

    Raises:
        CaptureError: the model cannot be traced.
        RefusedError: it holds ops that cannot be given as asked; every one is listed with its line.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"compile takes an nn.Module, not {type(model).__name__}")
    options = Options(time_dim, batch_dim, clip_length, equivalence, window_output, nonlocal_ops, context, backend)
    step = StepModule(model, options)
    if example is not None:
        step.trace(*(example if isinstance(example, (tuple, list)) else (example,)))
    return step


class StepModule(nn.Module):
    """A model that takes a stream frame by frame, or in chunks, and gives what the clip model gives.

    A call while another one is running, in a second thread say, is refused; two step models of one module may run in
    two threads, the module itself not while it is being compiled. A call that raises leaves the stream where it was.
    Offline, ``step(clip)`` is ``model(clip)``.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.options = options
        self._call_mode: str | None = None
        self._traced: Traced | None = None
        self._compiled: Compiled | None = None
        self._state = StreamState()
        self._lanes: LaneState | None = None  # in place of the state, once lanes go each by itself
        self._lane_programs: Lanes | None = None
        self._held: tuple[torch.Tensor, ...] = ()  # the last call's inputs without time, for `flush`
        self._running = False  # within a call
        self._handle = handle(self)

    # -- tracing -----------------------------------------------------------------------------------------------------

    def trace(self, *example: torch.Tensor) -> None:
        """Trace the model now, from clips of these shapes. The stream starts anew."""
        self._trace(example, given=True)

    def _trace(self, example: Sequence[torch.Tensor], given: bool) -> None:
        """`given`: the example is a clip; else it is a first frame or chunk."""
        clock, ticks = make_clock(example, self.options.time_dim, self.options.batch_dim)
        traced = trace(self.model, example, clock, self.options.clip_length or ticks, self.options, given)
        if self.options.equivalence is None:
            _warn_first_clip(traced)
        if idle := ", ".join(map(repr, self.options.unmatched)):
            warnings.warn(f"nonlocal_ops: no op over the whole clip is in, or is, {idle}", stacklevel=4)
        compiled = self._compile(traced)
        compiled.mid_stream.make(example)
        self._traced, self._compiled, self._lane_programs = traced, compiled, None
        self._place(StreamState())

    def _compile(self, traced: Traced) -> Compiled:
        return Compiled(traced.reference or self.model, traced.plan, traced.batch, self.options.backend)

    def restore(self, traced: Traced) -> None:
        """Go on with a model that was traced before, in a file say."""
        self._compiled = self._compile(traced)
        self._compiled.mid_stream.make(traced.example)
        self._traced = traced

    @property
    def reference_module(self) -> nn.Module:
        """The offline model that the step model equals, with the model's own parameters.

        The model itself; with ``nonlocal_ops="continual"`` a module in which clip-wide ops look on the frames so far
        (``min(n, clip_length)`` of them, up to the one that they are applied to). It can be run on clips of any length,
        differentiated and fine-tuned.
        """
        return (self._traced and self._traced.reference) or self.model

    @property
    def traced(self) -> Traced:
        """The model as it was traced.

        Raises:
            InputError: nothing has been traced yet.
        """
        if self._traced is None:
            raise untraced_yet()
        return self._traced

    @property
    def compiled(self) -> Compiled:
        """The compiled model.

        Raises:
            InputError: nothing has been traced yet.
        """
        if self._compiled is None:
            raise untraced_yet()
        return self._compiled

    @as_it_is
    def _ready(self, inputs: tuple[torch.Tensor, ...], frames: bool, lanes: bool = False) -> Compiled:
        """The compiled model for these inputs; traces it if that was not done yet.

        `lanes`: for lane programs, which take any number of lanes whatever batch size the model fixes.
        """
        if self._compiled is None:
            dims = self.options.time_dim
            example = [
                x.unsqueeze(d if d >= 0 else d + x.dim() + 1) if frames and d is not None else x
                for x, d in zip(inputs, dims if isinstance(dims, (tuple, list)) else [dims] * len(inputs), strict=True)
            ]
            self._trace(example, given=False)
        compiled = self.compiled
        batch = compiled.spec.batch_of(inputs, frames)
        if (
            not compiled.open_batch
            and not lanes
            and batch is not None
            and batch != compiled.batch
            and self._state.tensors is None
            and self._lanes is None
        ):
            before = self.traced
            traced = trace_at(self.model, before.example, before.plan.clock, before.ticks, batch, self.options)
            compiled = self._compile(traced)
            self._traced, self._compiled = traced, compiled
        return compiled

    # -- calls -------------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """``model(*inputs)``; or a step or steps, if `call_mode` says so."""
        mode = self.call_mode
        if mode == "forward_step":
            return self.forward_step(*inputs, **kwargs)
        if mode == "forward_steps":
            return self.forward_steps(*inputs, **kwargs)
        if self._compiled is None and inputs and all(isinstance(x, torch.Tensor) for x in inputs):
            self.trace(*inputs)
        return self.reference_module(*inputs, **kwargs)

    def forward_step(
        self, *frames: torch.Tensor, update_state: bool = True, start: Any = None, ready: Any = None, length: Any = None
    ) -> Any:
        """Take one frame of each input (without time axis).

        Args:
            frames: one of each input.
            update_state: False leaves the stream where it is.
            start: for each lane (entry of the batch) whether it begins a new stream with this call.
            ready: for each lane whether it takes part; one that does not is left as it is, whatever it is given.
            length: for each lane the number of frames of its stream once that is known, else negative. It is remembered
                until the next `start`; frames past it are ignored, and further calls give what is still due.

        Returns:
            the output frame that is due, or None. An output of which several frames can be due at once keeps its time
            axis. Several outputs come in the model's own structure, with None where nothing is due.

            With `start`, `ready` or `length` given, ``(y, valid)``: `valid` has the structure of `y` and tells for each
            lane, shape (batch,) or (batch, frames) for an output with time axis, whether `y` holds a frame.
        """
        if torch.compiler.is_dynamo_compiling():
            controls = {"start": start, "ready": ready, "length": length}
            return traced_calls.forward_step(self, frames, update_state, controls)
        here = self.__dict__  # as in `alone`, which would cost a call more
        if here["_running"]:
            raise in_use()
        here["_running"] = True
        try:
            if not (start is None and ready is None and length is None):
                return self._lane_call(frames, True, update_state, start=start, ready=ready, length=length)
            if self._compiled is not None:
                done = self._compiled.mid_stream.step(self._state, frames)
                if done is not None:
                    if update_state:
                        self._go_on(done[1], frames)
                    return done[0]
            self._no_lanes()
            compiled = self._ready(frames, frames=True)
            compiled.spec.check(frames, 1, self._state.batch, frames=True)
            parts, state = compiled.advance(self._state, frames, 1, None, frames=True)
            out = compiled.pack([p[0] if p else None for p in parts], stacked=False)
            compiled.mid_stream.accept(frames, state.batch)
            if update_state:
                self._go_on(state, frames)
            return out
        finally:
            here["_running"] = False

    def prepare_lanes(self, ticks: int, frames: bool) -> bool:
        """Make the lane programs that `torch.compile` traces for so many ticks, and tell whether it can."""
        return ticks % self.compiled.plan.schedule.period == 0 and self._programs().prepare(ticks, frames)

    def _go_on(self, state: StreamState, inputs: Sequence[torch.Tensor], lanes: LaneState | None = None) -> None:
        """The stream has moved: the last thing that a call does. These are plain stores, between which Python takes no
        signal and lets no other thread run, so that a call that raises has not moved it."""
        compiled, here = self._compiled, self.__dict__
        held = compiled.spec.untimed(inputs) if compiled is not None and compiled.spec.has_untimed else here["_held"]
        here["_state"] = state
        here["_lanes"] = lanes
        here["_held"] = held

    def _place(self, state: StreamState, lanes: LaneState | None = None) -> None:
        """The stream or the lanes are elsewhere: plain stores, as in `_go_on`."""
        here = self.__dict__
        here["_state"] = state
        here["_lanes"] = lanes

    def forward_steps(
        self,
        *chunks: torch.Tensor,
        pad_end: bool = False,
        update_state: bool = True,
        start: Any = None,
        ready: Any = None,
        length: Any = None,
    ) -> Any:
        """Take any number of frames.

        Args:
            chunks: for each input some frames, with time axis.
            pad_end: also return what would be due if the stream ended here; this leaves no trace in the state.
            update_state: False leaves the stream where it is.
            start, ready, length: one for each lane, see `forward_step`; then the number of frames must be a multiple of
                the model's period.

        Returns:
            the outputs that are due, with time axis, or None; with `start`, `ready` or `length`, ``(y, valid)``.
        """
        controls = {"start": start, "ready": ready, "length": length}
        if torch.compiler.is_dynamo_compiling():
            return traced_calls.forward_steps(self, chunks, pad_end, update_state, controls)
        return self._steps(chunks, pad_end, update_state, controls)

    @alone
    def _steps(
        self, chunks: tuple[torch.Tensor, ...], pad_end: bool, update_state: bool, controls: Mapping[str, Any]
    ) -> Any:
        if traced_calls.given(controls):
            if pad_end:
                raise InputError("pad_end ends all streams of a batch at once; give the lanes' length instead")
            return self._lane_call(chunks, False, update_state, **controls)
        self._no_lanes()
        compiled = self._ready(chunks, frames=False)
        ticks = compiled.spec.ticks(chunks)
        compiled.spec.check(chunks, ticks, self._state.batch, frames=False)
        done = compiled.mid_stream.chunk(self._state, chunks, ticks) if ticks > 1 else None
        parts, state = done or compiled.advance(self._state, chunks, ticks, None, frames=False)
        if pad_end:
            tail = compiled.flush(state, chunks)
            parts = [a + b for a, b in zip(parts, tail, strict=True)]
        out = compiled.pack(compiled.join(parts), stacked=True)
        if update_state:
            self._go_on(state, chunks)
        return out

    def flush(self) -> Any:
        """The stream has ended: what is still due, with time axis, or None. The state stays as it is."""
        return traced_calls.flush(self) if torch.compiler.is_dynamo_compiling() else self._flush()

    @alone
    def _flush(self) -> Any:
        self._no_lanes()
        if self._compiled is None or self._state.count == 0 or self._state.tensors is None:
            return None
        compiled = self.compiled
        templates = compiled.spec.blank(self._state.batch, self._held)
        return compiled.pack(compiled.join(compiled.flush(self._state, templates)), stacked=True)

    # -- lanes -------------------------------------------------------------------------------------------------------

    def _lane_call(self, inputs: tuple[torch.Tensor, ...], frames: bool, update_state: bool, **controls: Any) -> Any:
        """A call in which every lane stands where it stands."""
        compiled = self._ready(inputs, frames, lanes=True)
        lanes = self._lanes
        batch = lanes.lanes if lanes is not None else self._state.batch
        compiled.spec.check(inputs, 1 if frames else compiled.spec.ticks(inputs), batch, frames)
        if lanes is None:
            fresh = self._state.tensors is None
            programs = self._programs()
            count = lanes_of(compiled, inputs, frames)
            lanes = programs.fresh(count) if fresh else programs.from_stream(self._state)
        y, valid, after = self._programs().call(lanes, inputs, frames, controls)
        if update_state:
            self._go_on(StreamState(), inputs, after)
        return y, valid

    def _programs(self) -> Lanes:
        """The lane programs of the compiled model."""
        compiled = self.compiled
        if self._lane_programs is None or self._lane_programs.source is not compiled:
            traced, plan = self.traced, compiled.plan
            one = compiled
            if not plan.capture.symbolic_batch and plan.clock.batch(traced.example) != 1:
                one = Compiled(self.reference_module, trace_alone(self.model, traced, self.options), 1)
            self._lane_programs = Lanes(compiled, one)
        return self._lane_programs

    def lane_layout(self, frames_per_step: int | None = None) -> LaneLayout:
        """How its inputs and outputs look with so many frames (default one period), for `cofx.runtime.LanePool`."""
        programs = self._programs()
        ticks = programs.schedule.period if frames_per_step is None else frames_per_step
        if not whole(ticks, 1) or ticks % programs.schedule.period:
            raise InputError(
                f"frames_per_step is a multiple of {programs.schedule.period}, the model's period, not {ticks!r}"
            )
        return programs.layout(ticks, self.forward_steps, self._place_now, self._mark)

    def _place_now(self) -> object:
        """Where the streams are: another object after each call that moves them."""
        return self._state if self._lanes is None else self._lanes

    def _mark(self) -> Callable[[], None]:
        """Takes calls after this one back."""
        return functools.partial(self.__dict__.update, _state=self._state, _lanes=self._lanes, _held=self._held)

    def _no_lanes(self) -> None:
        if self._lanes is not None:
            raise InputError(
                "the lanes of this batch go each by itself, so that frames may be valid for some of them only: give "
                "start, ready or length (ready=[True, ...] takes them all; length ends a lane), or clean_state()"
            )

    def _as_lanes(self) -> LaneState | None:
        """The lanes, or the running batch of streams as lanes; None before the first call."""
        if self._lanes is None and self._state.tensors is not None:
            return self._programs().from_stream(self._state)
        return self._lanes

    # -- state -------------------------------------------------------------------------------------------------------

    @alone
    def clean_state(self, lanes: Any = None) -> None:
        """Start a new stream; its batch size may be another. Parameters that have changed are taken up.

        Args:
            lanes: only these (indices, or a bool for each): each begins anew, the others go on.
        """
        if lanes is None:
            self.refresh()
            self._place(StreamState())
        elif (running := self._as_lanes()) is not None:
            blank = self._programs().fresh(lane_indices(lanes, running.lanes).numel())
            self._place(StreamState(), self._programs().put(running, blank, lanes))

    def refresh(self) -> None:
        """Take up parameters that have changed, in mid-stream. (`clean_state` does so too.)

        Raises:
            CompileError: a buffer has changed whose value forward looked at (a flag, a stride): compile again.
        """
        if self._compiled is not None and self._compiled.renew():
            self._lane_programs = None

    def get_state(self, lanes: Any = None) -> dict[str, torch.Tensor]:
        """A snapshot of the stream: a flat dict of named tensors, nothing shared.

        Args:
            lanes: only these (indices, or a bool for each), in this order. Tensors then have lanes first, as all
                snapshots have once lanes go each by itself.
        """
        if lanes is None and self._lanes is None:
            return snapshot(self._state, self._compiled.specs_after(self._state.count) if self._compiled else ())
        running = self._as_lanes()
        if running is None:
            raise InputError("there are no lanes before the first call")
        return take_lanes(running, self._programs().specs_for(running), lanes)

    @alone
    def set_state(self, state: Mapping[str, torch.Tensor], lanes: Any = None) -> None:
        """Go on from a snapshot.

        Args:
            state: as `get_state` gave it.
            lanes: put its lanes in the place of these (indices, or a bool for each); the others go on.

        Raises:
            StateError: it belongs to another model; nothing has changed.
        """
        self._place(*self._restored(state, lanes))

    def _restored(self, state: Mapping[str, torch.Tensor], lanes: Any = None) -> tuple[StreamState, LaneState | None]:
        """The stream or the lanes of a snapshot."""
        if not isinstance(state, Mapping):
            raise StateError(f"a state is a dict as get_state() returns it, not a {type(state).__name__}")
        if POSITION in state:
            other = self._programs().restore(dict(state))
        else:
            stream = restore(dict(state), self.compiled.specs_after, self.compiled.spec.device)
            if lanes is None:
                return stream, None
            other = self._programs().from_stream(stream)
        if lanes is not None:
            running = self._as_lanes()
            if running is None:
                raise StateError("there are no lanes yet: set_state(state) without lanes, or make a first call")
            other = self._programs().put(running, other, lanes)
        return StreamState(), other

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Write a snapshot of the stream or of all lanes to a file (safetensors), all at once or not at all.

        It can be loaded by this model in another process, and by `OnnxStep` of its file.
        """
        programs = self._programs()
        about: dict[str, Any] = {"fingerprint": programs.fingerprint, "form": "lanes", "together": self._lanes is None}
        try:
            running = self._as_lanes()
        except InputError:  # at a place where no lane can stand
            running = None
        if running is None:
            about["form"] = "stream"
            tensors = snapshot(self._state, self.compiled.specs_after(self._state.count))
        else:
            tensors = take_lanes(running, programs.specs_for(running))
        tensors |= {f"{HELD}{i}": x for i, x in enumerate(self._held)}
        write_state(path, {k: t.detach().cpu().contiguous() for k, t in tensors.items()}, about, "torch")

    @alone
    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Go on from a snapshot in a file; see `save_state`.

        Raises:
            StateError: it is no snapshot, or one of another model or of other parameters; nothing has changed.
        """
        programs = self._programs()
        tensors, about = read_state(path, programs.fingerprint, "torch")
        held = [tensors.pop(k) for k in sorted(tensors) if k.startswith(HELD)]
        # one whose first output comes earlier without lanes went as lanes, and goes on so
        together = (
            about.get("form") == "lanes" and about.get("together") and programs.schedule is programs.plan.schedule
        )
        went = (programs.to_stream(programs.restore(tensors)), None) if together else self._restored(tensors)
        self._held = tuple(x.to(self.compiled.spec.device) for x in held)
        self._place(*went)

    def __getstate__(self) -> dict[str, Any]:
        """What `pickle` and `copy.deepcopy` take: the model, how it was compiled, and a snapshot of the stream."""
        traced = (
            None
            if self._traced is None
            else (self._traced.plan.clock, self._traced.example, self._traced.ticks, self._traced.batch)
        )
        return {**self.__dict__, "_traced": traced, "_compiled": None, "_state": self.get_state(), "_lanes": None,
                "_lane_programs": None, "_running": False, "_handle": None}  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Trace the model again and go on where the stream was."""
        state = dict(state)
        before, stream = state.pop("_traced"), state.pop("_state")
        super().__setstate__({**state, "_traced": None, "_state": StreamState(), "_handle": handle(self)})  # type: ignore[no-untyped-call]
        if before is not None:
            clock, example, ticks, batch = before
            traced = trace_at(self.model, example, clock, ticks, batch, self.options)
            self._traced, self._compiled = traced, self._compile(traced)
            self.set_state(stream)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the compiled model to a file, with which `cofx.load` goes on at once: nothing is traced again.

        It holds the traced graph as data and the parameters (safetensors), no code. The running stream is not in it
        (see `save_state`), nor is the offline model.

        Raises:
            SavedPlanError: something has no form in a file; none is left behind.
        """
        save_step(self, path)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own: its checkpoints load into either."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the model's own state dict."""
        return self.model.load_state_dict(*args, **kwargs)

    def verify(self, *inputs: torch.Tensor) -> Verification:
        """Stream these clips anew and compare with the offline model; the running stream stays as it is.

        Args:
            inputs: clips of any length that the model takes; the longer, the more is compared.
        """
        self._ready(inputs, frames=False)
        self.compiled.spec.check(inputs, self.compiled.spec.ticks(inputs), None, frames=False)
        return verify(self.reference_module, self.compiled, inputs)

    def to_onnx(
        self,
        path: str | os.PathLike[str],
        frames_per_step: int | None = None,
        dynamic_batch: bool = True,
        opset: int | None = None,
        controls: bool = True,
        longest: int | None = None,
        quantize: str | None = None,
    ) -> None:
        """Write the step model as an ONNX file that is right from the first frame in any runtime.

        The graph takes the model's inputs, batch first, with a time axis; states of zeros to begin with, later those
        that it gave; and for each lane (batch, 1): `start` (bool), `ready` (bool) and `length` (int64), as
        `forward_step` does. It gives the model's outputs, ``<name>_valid`` (bool; batch, frames), and the states.
        ``metadata_props["cofx"]`` describes all of it in JSON. `cofx.runtime.onnx_step.OnnxStep` runs it.

        Args:
            path: of the file.
            frames_per_step: frames of the slowest input per call, a multiple of the model's period; default one period.
            dynamic_batch: the batch size is left open; else it is one.
            opset: version of the operator set, 18 (the default) or later.
            controls: False leaves out start, ready and length, for the barest graph: all lanes begin with states of
                zeros, and none ends.
            longest: frames of the longest stream, for a model that keeps all of a stream (attention over all frames so
                far); no output is valid beyond it. Default four clips.
            quantize: "int8": weights of convolutions and products in 8 bits, by onnxruntime's tool. What goes into them
                is then rounded by the size of what a call has, over its batch, so that the file is for one stream. The
                largest difference to the file in full precision, over the example, is printed, and in the metadata.

        Raises:
            OnnxError: an op has no ONNX form; the message names it. No file is left behind.
            InputError: `frames_per_step` is no multiple of the period.
        """
        programs = self._programs()
        if quantize is None:
            export(programs, path, frames_per_step, dynamic_batch, opset, controls, longest)
        else:
            example = self.traced.example
            export_quantized(programs, path, quantize, example, frames_per_step, opset, controls, longest)

    def report(self) -> Report:
        """Multiply-adds per step and per clip, the share that is streamed, bytes of state, and what is recomputed."""
        return report(self.compiled)

    # -- what is known of it -----------------------------------------------------------------------------------------

    @property
    def call_mode(self) -> str:
        """What calling this model does: "forward", "forward_step" or "forward_steps"."""
        return current_mode() or self._call_mode or "forward"

    @call_mode.setter
    def call_mode(self, mode: str | None) -> None:
        self._call_mode = None if mode is None else known_mode(mode)

    @property
    def outputs(self) -> list[OutputInfo]:
        """Delay, receptive field, stride, padding and equivalence of every output leaf."""
        return [OutputInfo.of(self.compiled.plan, leaf) for leaf in self.compiled.plan.outputs]

    @property
    def delay(self) -> int | Fraction:
        """The index of the first step that yields a frame (of the first output)."""
        return self.outputs[0].delay

    @property
    def receptive_field(self) -> float | int | Fraction:
        """Input frames on which a frame of the first output depends."""
        return self.outputs[0].receptive_field

    @property
    def stride(self) -> int | Fraction:
        """Input frames per frame of the first output."""
        return self.outputs[0].stride

    @property
    def padding(self) -> int | Fraction:
        """``receptive_field - 1 - delay`` of the first output."""
        return self.outputs[0].padding

    @property
    def equivalence(self) -> str:
        """What holds for the first output: "stream", "clip", "prefix" or "first-clip"."""
        return self.outputs[0].equivalence

    @property
    def clip_length(self) -> int | None:
        """Frames of a clip, for a model that needs whole clips; else None."""
        needs = any(leaf.equivalence in ("clip", "first-clip") for leaf in self.compiled.plan.outputs)
        return self.traced.ticks if needs else None

    @property
    def graph_module(self) -> torch.fx.GraphModule:
        """The program of one period in mid-stream: ``(frames..., state...) -> (outputs, state)``.

        One frame without time axis where the period is one frame, else as many frames as the period has. State comes
        in and goes out in the order of its names in `get_state`. Every node's ``meta["cofx"]`` tells where it stands.
        """
        compiled = self.compiled
        period = compiled.plan.schedule.period
        module: torch.fx.GraphModule = compiled.program(Key(0, period, frames=period == 1)).module
        return module


tell_ptflops(StepModule)


def untraced_yet() -> InputError:
    """What is told of a step model that has not seen an example."""
    return InputError("nothing has been traced yet: give compile(...) an example, or call the step model first")


def _warn_first_clip(traced: Traced) -> None:
    """Tell the user, once, of the first output that equals the clip model's for one clip only."""
    for leaf in traced.plan.outputs:
        if leaf.equivalence == "first-clip":
            warnings.warn(
                f"{leaf.node.name} equals model(clip) after the first {traced.ticks} frames and a flush. From then on "
                f"it is computed from the last frames of the stream, not of a clip of its own: {leaf.reason} comes "
                "after padding or memory, which see where a clip begins. compile(..., equivalence='clip') gives "
                "model(last clip) at every step instead, by recomputing each clip; equivalence='first-clip' asks "
                "for this one and is silent.",
                stacklevel=5,
            )
            return
