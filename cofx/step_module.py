"""The front door: `compile` and the step model that it returns."""

from __future__ import annotations

import contextlib
import contextvars
import fnmatch
import functools
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .backends import known_backend
from .compiled import Compiled
from .inputs import check_runs, make_clock
from .lanes import POSITION, Lanes, lanes_of
from .passes.capture import Clock, untraced
from .passes.codegen.graph_module import Key
from .passes.errors import CaptureError
from .passes.make_continual import make_continual
from .passes.pipeline import Leaf, Plan, compile_plan
from .passes.reference import Reference
from .passes.saved_plan import SavedModel
from .report import Report, report, tell_ptflops
from .runtime.alone import alone, in_use
from .runtime.errors import InputError, StateError
from .runtime.lane_layout import LaneLayout
from .runtime.lane_state import LaneState, lane_indices, take_lanes
from .runtime.state import StreamState, restore, snapshot
from .runtime.state_file import HELD, folder_of, read_state, write_state
from .saving import save_step, saved_plan
from .verification import Verification, verify

MODES = ("forward", "forward_step", "forward_steps")
TRIALS = (16, 32, 64, 128, 256, 512, 1024, 2048, 24, 48, 96, 192)  # clip lengths to trace with where none is given

_mode: contextvars.ContextVar[str | None] = contextvars.ContextVar("cofx_call_mode", default=None)
_modes: dict[int, str] = {}  # in use anywhere: where there is none, torch.compile need not trace a ContextVar


@contextlib.contextmanager
def call_mode(mode: str) -> Iterator[None]:
    """Within this context, calling a step model runs `mode`: "forward", "forward_step" or "forward_steps". Nests."""
    token = _mode.set(_known_mode(mode))
    _modes[id(token)] = mode
    try:
        yield
    finally:
        del _modes[id(token)]
        _mode.reset(token)


def _known_mode(mode: str) -> str:
    if mode not in MODES:
        raise InputError(f"unknown call mode {mode!r}: one of {', '.join(MODES)}")
    return mode


def _whole(value: Any, least: int) -> bool:
    """Whether this is a whole number, and at least so large."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


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
            compiled for a while at the first step), "onnxruntime" (in buffers of its own, for each batch size), or
            "auto": the fastest of those that can run the model here, measured once for a model and machine and then
            remembered (``COFX_MEASURE=0`` takes ONNX Runtime where it is installed, without measuring). All else, the
            first frames, chunks, lanes and the end of a stream, runs eagerly.

    Raises:
        CaptureError: the model cannot be traced.
        RefusedError: it holds ops that cannot be given as asked; every one is listed with its line.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"compile takes an nn.Module, not {type(model).__name__}")
    if window_output not in ("last", "all"):
        raise InputError(f"window_output is 'last' or 'all', not {window_output!r}")
    if equivalence not in (None, "stream", "clip", "prefix", "first-clip"):
        raise InputError(f"equivalence is 'stream', 'clip', 'prefix' or 'first-clip', not {equivalence!r}")
    given = [nonlocal_ops] if isinstance(nonlocal_ops, str) else list(nonlocal_ops.values())
    if not set(given) <= {"recompute", "continual", "refuse"}:
        raise InputError(f"nonlocal_ops is 'recompute', 'continual' or 'refuse', not {nonlocal_ops!r}")
    for name, number in (("context", context), ("clip_length", clip_length)):
        if number is not None and not _whole(number, 1):
            raise InputError(f"{name} is a number of frames, at least 1, not {number!r}")
    backend = known_backend(backend)
    step = StepModule(
        model, time_dim, batch_dim, clip_length, equivalence, window_output, nonlocal_ops, context, backend
    )
    if example is not None:
        step.trace(*(example if isinstance(example, (tuple, list)) else (example,)))
    return step


@dataclass(frozen=True)
class OutputInfo:
    """What holds for one output of a step model, in input frames (ints where whole).

    Attributes:
        delay: the index of the first step that yields a frame.
        receptive_field: input frames that one output frame depends on; infinite with memory.
        stride: input frames per output frame.
        padding: ``receptive_field - 1 - delay`` (memory left out of the receptive field).
        equivalence: what holds for it (see docs/design.md).
    """

    delay: int | Fraction
    receptive_field: float | int | Fraction
    stride: int | Fraction
    padding: int | Fraction
    equivalence: str


class StepModule(nn.Module):
    """A model that takes a stream frame by frame, or in chunks, and gives what the clip model gives.

    A call while another one is running, in a second thread say, is refused; two step models of one module may run in
    two threads, the module itself not while it is being compiled. A call that raises leaves the stream where it was.
    Offline, ``step(clip)`` is ``model(clip)``.
    """

    def __init__(
        self,
        model: nn.Module,
        time_dim: int | Sequence[int | None],
        batch_dim: int | Sequence[int | None] | None,
        clip_length: int | None,
        equivalence: str | None,
        window_output: str,
        nonlocal_ops: str | Mapping[str, str] = "recompute",
        context: int | None = None,
        backend: str = "eager",
    ) -> None:
        super().__init__()
        self.model = model
        self._backend = backend
        self._nonlocal_ops, self._context = nonlocal_ops, context
        self._matched: set[str] = set()  # of the patterns in `nonlocal_ops`
        self._reference: list[nn.Module] = []  # in place of the model, if clip-wide ops look on the frames so far
        self.training = model.training
        self._time_dim, self._batch_dim = time_dim, batch_dim
        self._clip_length, self._equivalence, self._newest = clip_length, equivalence, window_output == "last"
        self._call_mode: str | None = None
        self._state = StreamState()
        self._lanes: LaneState | None = None  # in place of the state, once lanes go each by itself
        self._compiled: Compiled | None = None
        self._lane_programs: Lanes | None = None
        self._example: tuple[torch.Tensor, ...] = ()
        self._ticks = 0
        self._held: tuple[torch.Tensor, ...] = ()  # the last call's inputs without time, for `flush`
        self._running = False  # within a call

    # -- tracing -----------------------------------------------------------------------------------------------------

    def trace(self, *example: torch.Tensor) -> None:
        """Trace the model now, from clips of these shapes. The stream starts anew."""
        clock, ticks = make_clock(example, self._time_dim, self._batch_dim)
        self._trace(example, clock, self._clip_length or ticks, given=True)

    @untraced
    def _trace(self, example: Sequence[torch.Tensor], clock: Clock, ticks: int, given: bool) -> None:
        batch = clock.batch(example)
        wanted = [ticks] if self._clip_length else [ticks, *(ticks * k for k in (2, 4, 8, 16))] if given else TRIALS
        plan, failure = None, None
        for n in wanted:
            try:
                plan = self._plan(example, clock, n, batch)
                ticks = n
                break
            except CaptureError as error:
                failure = failure or error
        if plan is None:
            assert failure is not None
            if given:
                check_runs(self.model, example)
            raise failure
        patterns = () if isinstance(self._nonlocal_ops, str) else self._nonlocal_ops
        if idle := [repr(p) for p in patterns if p not in self._matched]:
            warnings.warn(f"nonlocal_ops: no op over the whole clip is in, or is, {', '.join(idle)}", stacklevel=5)
        needs_clip = any(leaf.equivalence in ("clip", "first-clip") for leaf in plan.outputs)
        if needs_clip and not given and not self._clip_length:
            reason = next(leaf.reason for leaf in plan.outputs if leaf.clip)
            raise InputError(
                f"this model needs whole clips ({reason}), and a frame or chunk does not tell how long they are: "
                "give compile(..., clip_length=...) or an example clip"
            )
        for leaf in plan.outputs:
            if leaf.equivalence == "first-clip" and self._equivalence is None:
                warnings.warn(
                    f"{leaf.node.name} equals model(clip) after the first {ticks} frames and a flush. From then on it "
                    f"is computed from the last frames of the stream, not of a clip of its own: {leaf.reason} comes "
                    "after padding or memory, which see where a clip begins. compile(..., equivalence='clip') gives "
                    "model(last clip) at every step instead, by recomputing each clip; equivalence='first-clip' asks "
                    "for this one and is silent.",
                    stacklevel=5,
                )
                break
        self._example = tuple(x.detach() for x in example)
        self._ticks = ticks
        compiled = Compiled(self.reference_module, plan, batch, self._backend)
        compiled.mid_stream.make(example)
        self._compiled = compiled
        self._lane_programs = None
        self._place(StreamState())

    def _restore(self, plan: Plan, ticks: int, batch: int, changed: bool) -> None:
        """Go on with a plan from a file; `changed`: it is not the user's own module that it is of."""
        self._reference = [self.model] if changed else []
        self._ticks = ticks
        self._compiled = compiled = Compiled(self.model, plan, batch, self._backend)
        sizes = zip(compiled.spec.sizes(ticks), compiled.spec.dtypes, strict=True)
        self._example = tuple(torch.zeros(s, dtype=d, device=compiled.spec.device) for s, d in sizes)
        compiled.mid_stream.make(self._example)

    @untraced
    def _plan(self, example: Sequence[torch.Tensor], clock: Clock, ticks: int, batch: int) -> Plan:
        if isinstance(self.model, SavedModel):
            return saved_plan(self.model, batch)
        window = self._clip_length or ticks
        chosen = [self._nonlocal_ops] if isinstance(self._nonlocal_ops, str) else self._nonlocal_ops.values()
        reference = None
        if "continual" in chosen:
            reference = make_continual(self.model, example, clock, ticks, batch, window, self._choose)
        self._reference = [] if reference is None else [reference]
        return self._plan_reference(example, clock, ticks, batch, self._equivalence)

    def _plan_reference(
        self, example: Sequence[torch.Tensor], clock: Clock, ticks: int, batch: int, equivalence: str | None
    ) -> Plan:
        model = self.reference_module
        plan = compile_plan(model, example, clock, ticks, batch, equivalence, self._newest, self._context, self._choose)
        replaced = map(str, model.replaced) if self._reference and isinstance(model, Reference) else ()
        return replace(plan, replaced=tuple(replaced))

    def _choose(self, module: str, op: str) -> str:
        """What becomes of a clip-wide op of a module."""
        if isinstance(self._nonlocal_ops, str):
            return self._nonlocal_ops
        for pattern, choice in self._nonlocal_ops.items():
            if fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(op, pattern):
                self._matched.add(pattern)
                return choice
        return "recompute"

    @property
    def reference_module(self) -> nn.Module:
        """The offline model that the step model equals, with the model's own parameters.

        The model itself; with ``nonlocal_ops="continual"`` a module in which clip-wide ops look on the frames so far
        (``min(n, clip_length)`` of them, up to the one that they are applied to). It can be run on clips of any length,
        differentiated and fine-tuned.
        """
        return self._reference[0] if self._reference else self.model

    @property
    def compiled(self) -> Compiled:
        """The compiled model.

        Raises:
            InputError: nothing has been traced yet.
        """
        if self._compiled is None:
            raise InputError("nothing has been traced yet: give compile(...) an example, or call the step model first")
        return self._compiled

    def _ready(self, inputs: tuple[torch.Tensor, ...], frames: bool, lanes: bool = False) -> Compiled:
        """The compiled model for these inputs; traces it if that was not done yet.

        `lanes`: for lane programs, which take any number of lanes whatever batch size the model fixes.
        """
        if self._compiled is None:
            dims = self._time_dim
            example = [
                x.unsqueeze(d if d >= 0 else d + x.dim() + 1) if frames and d is not None else x
                for x, d in zip(inputs, dims if isinstance(dims, (tuple, list)) else [dims] * len(inputs), strict=True)
            ]
            clock, ticks = make_clock(example, self._time_dim, self._batch_dim)
            self._trace(example, clock, self._clip_length or ticks, given=False)
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
            plan = self._plan(self._example, compiled.plan.clock, self._ticks, batch)
            compiled = self._compiled = Compiled(self.reference_module, plan, batch, self._backend)
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
            return self._traced_step(frames, update_state, start=start, ready=ready, length=length)
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

    def _traced_step(self, frames: tuple[torch.Tensor, ...], update_state: bool, **lanes: Any) -> Any:
        """A step within `torch.compile`: in mid-stream it is traced, else it runs as it is, after a graph break."""
        took = self._traced_lanes(frames, True, update_state, **lanes)
        if took is not None:
            return took
        if self._compiled is not None and all(v is None for v in lanes.values()):
            # the count of frames is no constant of the module, for which dynamo would take it
            with torch._dynamo.patch_dynamo_config(allow_unspec_int_on_nn_module=True):
                done = self._compiled.mid_stream.step(self._state, frames)
                if done is not None:
                    if update_state:
                        self._go_on(done[1], frames)
                    return done[0]
        return self._untraced_step(*frames, update_state=update_state, **lanes)

    def _traced_lanes(
        self, inputs: tuple[torch.Tensor, ...], frames: bool, update_state: bool, start: Any, ready: Any, length: Any
    ) -> Any:
        """A call with lanes within `torch.compile`; None if it has to run as it is."""
        if (
            self._lane_programs is None
            or self._lanes is None
            or length is not None
            or (start is None and ready is None)
        ):
            return None
        done = self._lane_programs.traced_call(self._lanes, inputs, frames, start, ready)
        if done is None:
            return None
        if update_state:
            self._go_on(StreamState(), inputs, done[2])
        return done[0], done[1]

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def _untraced(self, method: str, *arguments: Any, **options: Any) -> Any:
        """A method as it is, within `torch.compile` after a graph break."""
        return getattr(self, method)(*arguments, **options)

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def _untraced_step(self, *frames: torch.Tensor, **options: Any) -> Any:
        out = self.forward_step(*frames, **options)
        if torch.is_grad_enabled() or self._lanes is not None:
            return out
        for phase in range(self.compiled.plan.schedule.period):  # what is made while dynamo looks on is compiled anew
            self.compiled.mid_stream.program(phase, apart=not self.compiled.large_frames)
        state = self._state
        object.__setattr__(self, "_state", StreamState(state.count, state.tensors, state.batch))
        return out

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
        lanes = {"start": start, "ready": ready, "length": length}
        if torch.compiler.is_dynamo_compiling():
            took = None if pad_end else self._traced_lanes(chunks, False, update_state, **lanes)
            if took is not None:
                return took
            return self._untraced("forward_steps", *chunks, pad_end=pad_end, update_state=update_state, **lanes)
        return self._steps(chunks, pad_end, update_state, **lanes)

    @alone
    def _steps(
        self, chunks: tuple[torch.Tensor, ...], pad_end: bool, update_state: bool, start: Any, ready: Any, length: Any
    ) -> Any:
        if not (start is None and ready is None and length is None):
            if pad_end:
                raise InputError("pad_end ends all streams of a batch at once; give the lanes' length instead")
            return self._lane_call(chunks, False, update_state, start=start, ready=ready, length=length)
        self._no_lanes()
        compiled = self._ready(chunks, frames=False)
        ticks = compiled.spec.ticks(chunks)
        compiled.spec.check(chunks, ticks, self._state.batch, frames=False)
        parts, state = compiled.advance(self._state, chunks, ticks, None, frames=False)
        if pad_end:
            tail = compiled.flush(state, chunks)
            parts = [a + b for a, b in zip(parts, tail, strict=True)]
        out = compiled.pack(compiled.join(parts), stacked=True)
        if update_state:
            self._go_on(state, chunks)
        return out

    def flush(self) -> Any:
        """The stream has ended: what is still due, with time axis, or None. The state stays as it is."""
        return self._untraced("_flush") if torch.compiler.is_dynamo_compiling() else self._flush()

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
            plan = compiled.plan
            if not plan.capture.symbolic_batch and plan.clock.batch(self._example) != 1:
                self._lane_programs = Lanes(compiled, Compiled(self.reference_module, self._plan_alone(plan), 1))
            else:
                self._lane_programs = Lanes(compiled, compiled)
        return self._lane_programs

    def lane_layout(self, frames_per_step: int | None = None) -> LaneLayout:
        """How its inputs and outputs look with so many frames (default one period), for `cofx.runtime.LanePool`."""
        programs = self._programs()
        ticks = programs.schedule.period if frames_per_step is None else frames_per_step
        if not _whole(ticks, 1) or ticks % programs.schedule.period:
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

    @untraced
    def _plan_alone(self, plan: Plan) -> Plan:
        """The model traced for a batch of one, which each lane then is: it fixes its batch size."""
        kinds = [leaf.equivalence for leaf in plan.outputs]
        for wanted in (self._equivalence, kinds[0]):
            alone = self._plan_reference(self._example, plan.clock, self._ticks, 1, wanted)
            if [leaf.equivalence for leaf in alone.outputs] == kinds:
                return alone
        raise InputError(f"this model fixes its batch size, and for a batch of one it is no {kinds[0]!r}: no lanes")

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
        together = about.get("form") == "lanes" and about.get("together")
        went = (programs.to_stream(programs.restore(tensors)), None) if together else self._restored(tensors)
        self._held = tuple(x.to(self.compiled.spec.device) for x in held)
        self._place(*went)

    def __getstate__(self) -> dict[str, Any]:
        """What `pickle` and `copy.deepcopy` take: the model, how it was compiled, and a snapshot of the stream."""
        compiled = self._compiled
        clock = None if compiled is None else (compiled.plan.clock, compiled.batch)
        return {**self.__dict__, "_compiled": clock, "_state": self.get_state(), "_lanes": None, "_lane_programs": None,
                "_reference": [], "_running": False}  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Trace the model again and go on where the stream was."""
        state = dict(state)
        traced, stream = state.pop("_compiled"), state.pop("_state")
        super().__setstate__({**state, "_compiled": None, "_state": StreamState()})  # type: ignore[no-untyped-call]
        if traced is not None:
            clock, batch = traced
            plan = self._plan(self._example, clock, self._ticks, batch)
            self._compiled = Compiled(self.reference_module, plan, batch, self._backend)
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
        from .quantize import KINDS, quantize_int8

        if quantize is not None:
            if quantize not in KINDS:
                raise InputError(f"quantize is one of {', '.join(KINDS)}, not {quantize!r}")
            with tempfile.TemporaryDirectory(dir=folder_of(path), prefix=".cofx-") as scratch:
                full, small = Path(scratch, "full.onnx"), Path(scratch, "small.onnx")
                self._export(full, frames_per_step, False, opset, controls, longest, plain=True)
                batches = self.compiled.plan.clock.batch_dims
                one = [x if b is None else x.narrow(b, 0, 1) for x, b in zip(self._example, batches, strict=True)]
                found = quantize_int8(full, small, [x.cpu().numpy() for x in one])
                os.replace(small, path)
            print(
                f"int8: differs from full precision by {found['difference']:.3g} (outputs up to {found['largest']:.3g})"
            )
        else:
            self._export(path, frames_per_step, dynamic_batch, opset, controls, longest)

    def _export(
        self, path: str | os.PathLike[str], frames_per_step: int | None, dynamic_batch: bool, opset: int | None,
        controls: bool, longest: int | None, plain: bool = False,
    ) -> None:  # fmt: skip
        """`to_onnx` in full precision; `plain`: recurrent layers as products, which can be quantised."""
        from .passes.codegen.onnx import OPSET, export_onnx

        programs = self._programs()
        period = programs.schedule.period
        if frames_per_step is not None and not (_whole(frames_per_step, 1) and frames_per_step % period == 0):
            raise InputError(f"frames_per_step is a multiple of {period}, the model's period, not {frames_per_step!r}")
        if opset is not None and not _whole(opset, OPSET):
            raise InputError(f"opset is a version of ONNX's operators, {OPSET} or later, not {opset!r}")
        if longest is not None and not _whole(longest, 1):
            raise InputError(f"longest is a number of frames, at least 1, not {longest!r}")
        export_onnx(
            programs.plan,
            path,
            programs.about(),
            ticks=frames_per_step,
            dynamic_batch=dynamic_batch,
            opset=opset,
            controls=controls,
            capacity=programs.longest(longest),
            plain=plain,
        )

    def report(self) -> Report:
        """Multiply-adds per step and per clip, the share that is streamed, bytes of state, and what is recomputed."""
        return report(self.compiled)

    # -- what is known of it -----------------------------------------------------------------------------------------

    @property
    def call_mode(self) -> str:
        """What calling this model does: "forward", "forward_step" or "forward_steps"."""
        return (_mode.get() if _modes else None) or self._call_mode or "forward"

    @call_mode.setter
    def call_mode(self, mode: str | None) -> None:
        self._call_mode = None if mode is None else _known_mode(mode)

    @property
    def outputs(self) -> list[OutputInfo]:
        """Delay, receptive field, stride, padding and equivalence of every output leaf."""
        return [_info(self.compiled.plan, leaf) for leaf in self.compiled.plan.outputs]

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
        return self._ticks if needs else None

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


def _info(plan: Plan, leaf: Leaf) -> OutputInfo:
    about = plan.about(leaf.value)
    if about is None:
        return OutputInfo(0, 0, 1, 0, "stream")
    return OutputInfo(about.delay, about.receptive_field, about.stride, about.padding, plan.equivalence(leaf))
