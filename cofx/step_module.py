"""The front door: `compile` and the step model that it returns."""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .inputs import InputSpec, make_clock
from .passes.capture import Clock
from .passes.codegen.graph_module import FOREVER, Key, generate, state_specs
from .passes.errors import CaptureError
from .passes.pipeline import Leaf, Plan, compile_plan, tensors
from .runtime.errors import InputError
from .runtime.program import Program
from .runtime.state import StreamState, allocate, restore, snapshot

MODES = ("forward", "forward_step", "forward_steps")
TRIALS = (16, 32, 64, 128, 256, 512, 1024, 2048, 24, 48, 96, 192)  # clip lengths to trace with where none is given

_mode: contextvars.ContextVar[str | None] = contextvars.ContextVar("cofx_call_mode", default=None)


@contextlib.contextmanager
def call_mode(mode: str) -> Iterator[None]:
    """Within this context, calling a step model runs `mode`: "forward", "forward_step" or "forward_steps". Nests."""
    token = _mode.set(_known_mode(mode))
    try:
        yield
    finally:
        _mode.reset(token)


def _known_mode(mode: str) -> str:
    if mode not in MODES:
        raise InputError(f"unknown call mode {mode!r}: one of {', '.join(MODES)}")
    return mode


def compile(
    model: nn.Module,
    example: torch.Tensor | Sequence[torch.Tensor] | None = None,
    *,
    time_dim: int | Sequence[int | None] = 2,
    batch_dim: int | Sequence[int | None] | None = 0,
    clip_length: int | None = None,
    equivalence: str | None = None,
    window_output: str = "last",
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
    step = StepModule(model, time_dim, batch_dim, clip_length, equivalence, window_output)
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

    Not to be used from two threads at once. Offline, ``step(clip)`` is ``model(clip)``.
    """

    def __init__(
        self,
        model: nn.Module,
        time_dim: int | Sequence[int | None],
        batch_dim: int | Sequence[int | None] | None,
        clip_length: int | None,
        equivalence: str | None,
        window_output: str,
    ) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self._time_dim, self._batch_dim = time_dim, batch_dim
        self._clip_length, self._equivalence, self._newest = clip_length, equivalence, window_output == "last"
        self._call_mode: str | None = None
        self._state = StreamState()
        self._compiled: Compiled | None = None
        self._example: tuple[torch.Tensor, ...] = ()
        self._ticks = 0
        self._held: tuple[torch.Tensor, ...] = ()  # the last call's inputs without time, for `flush`

    # -- tracing -----------------------------------------------------------------------------------------------------

    def trace(self, *example: torch.Tensor) -> None:
        """Trace the model now, from clips of these shapes. The stream starts anew."""
        clock, ticks = make_clock(example, self._time_dim, self._batch_dim)
        self._trace(example, clock, self._clip_length or ticks, given=True)

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
            raise failure
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
                    f"{leaf.node.name} equals model(clip) after the first clip; later it pools over the last frames of "
                    f"the stream, because {leaf.reason} follows padding or memory. "
                    "compile(..., equivalence='clip') recomputes each clip instead.",
                    stacklevel=4,
                )
                break
        self._example = tuple(x.detach() for x in example)
        self._ticks = ticks
        self._compiled = Compiled(self.model, plan, batch)
        self._state = StreamState()

    def _plan(self, example: Sequence[torch.Tensor], clock: Clock, ticks: int, batch: int) -> Plan:
        return compile_plan(self.model, example, clock, ticks, batch, self._equivalence, self._newest)

    @property
    def compiled(self) -> Compiled:
        """The compiled model.

        Raises:
            InputError: nothing has been traced yet.
        """
        if self._compiled is None:
            raise InputError("nothing has been traced yet: give compile(...) an example, or call the step model first")
        return self._compiled

    def _ready(self, inputs: tuple[torch.Tensor, ...], frames: bool) -> Compiled:
        """The compiled model for these inputs; traces it if that was not done yet."""
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
        if not compiled.open_batch and batch is not None and batch != compiled.batch and self._state.tensors is None:
            plan = self._plan(self._example, compiled.plan.clock, self._ticks, batch)
            compiled = self._compiled = Compiled(self.model, plan, batch)
        return compiled

    # -- calls -------------------------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """``model(*inputs)``; or a step or steps, if `call_mode` says so."""
        mode = _mode.get() or self._call_mode or "forward"
        if mode == "forward_step":
            return self.forward_step(*inputs, **kwargs)
        if mode == "forward_steps":
            return self.forward_steps(*inputs, **kwargs)
        if self._compiled is None and inputs and all(isinstance(x, torch.Tensor) for x in inputs):
            self.trace(*inputs)
        return self.model(*inputs, **kwargs)

    def forward_step(self, *frames: torch.Tensor, update_state: bool = True) -> Any:
        """Take one frame of each input (without time axis).

        Returns:
            the output frame that is due, or None. An output of which several frames can be due at once keeps its time
            axis. Several outputs come in the model's own structure, with None where nothing is due.
        """
        compiled = self._ready(frames, frames=True)
        compiled.spec.check(frames, 1, self._state.batch, frames=True)
        parts, state = compiled.advance(self._state, frames, 1, None, frames=True)
        out = compiled.pack([p[0] if p else None for p in parts], stacked=False)
        if update_state:
            self._state, self._held = state, compiled.spec.untimed(frames)
        return out

    def forward_steps(self, *chunks: torch.Tensor, pad_end: bool = False, update_state: bool = True) -> Any:
        """Take any number of frames.

        Args:
            chunks: for each input some frames, with time axis.
            pad_end: also return what would be due if the stream ended here; this leaves no trace in the state.
            update_state: False leaves the stream where it is.

        Returns:
            the outputs that are due, with time axis, or None.
        """
        compiled = self._ready(chunks, frames=False)
        ticks = compiled.spec.ticks(chunks)
        compiled.spec.check(chunks, ticks, self._state.batch, frames=False)
        parts, state = compiled.advance(self._state, chunks, ticks, None, frames=False)
        if pad_end:
            tail = compiled.flush(state, chunks)
            parts = [a + b for a, b in zip(parts, tail, strict=True)]
        out = compiled.pack(compiled.join(parts), stacked=True)
        if update_state:
            self._state, self._held = state, compiled.spec.untimed(chunks)
        return out

    def flush(self) -> Any:
        """The stream has ended: what is still due, with time axis, or None. The state stays as it is."""
        if self._compiled is None or self._state.count == 0 or self._state.tensors is None:
            return None
        compiled = self.compiled
        templates = compiled.spec.blank(self._state.batch, self._held)
        return compiled.pack(compiled.join(compiled.flush(self._state, templates)), stacked=True)

    # -- state -------------------------------------------------------------------------------------------------------

    def clean_state(self) -> None:
        """Start a new stream; its batch size may be another. Parameters that have changed are taken up."""
        self._state = StreamState()
        if self._compiled is not None:
            self._compiled.renew()

    def get_state(self) -> dict[str, torch.Tensor]:
        """A snapshot of the stream: a flat dict of named tensors, nothing shared."""
        return snapshot(self._state, self._compiled.specs if self._compiled else ())

    def set_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a snapshot.

        Raises:
            StateError: it belongs to another model; nothing has changed.
        """
        self._state = restore(dict(state), self.compiled.specs, self.compiled.spec.device)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own: its checkpoints load into either."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the model's own state dict."""
        return self.model.load_state_dict(*args, **kwargs)

    # -- what is known of it -----------------------------------------------------------------------------------------

    @property
    def call_mode(self) -> str:
        """What calling this model does: "forward", "forward_step" or "forward_steps"."""
        return self._call_mode or "forward"

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


def _info(plan: Plan, leaf: Leaf) -> OutputInfo:
    about = plan.about(leaf.value)
    if about is None:
        return OutputInfo(0, 0, 1, 0, "stream")
    return OutputInfo(about.delay, about.receptive_field, about.stride, about.padding, leaf.equivalence)


Part = tuple[torch.Tensor, int]  # frames of an output


class Compiled:
    """A plan with its programs: what runs."""

    def __init__(self, model: nn.Module, plan: Plan, batch: int) -> None:
        self.model, self.plan, self.batch = model, plan, batch
        self.open_batch = plan.capture.symbolic_batch or all(b is None for b in plan.clock.batch_dims)
        self.specs = state_specs(plan.schedule)
        self.spec = InputSpec.of(plan)
        self.programs: dict[Key, Program] = {}
        self._seen = self._fingerprint()
        before = plan.schedule.counts(0)
        self.early = any(before[v] > 0 for op in plan.schedule.graph.ops for v in op.outputs)
        self.masks = plan.schedule.settled > 0 or any(
            op.carries or any(r.levels for r in op.reads) for op in plan.schedule.graph.ops
        )

    def _fingerprint(self) -> tuple[tuple[int, int], ...]:
        return tuple((id(t), t._version) for t in (*self.model.parameters(), *self.model.buffers()))

    def renew(self) -> None:
        """Take up parameters that have changed since programs were made."""
        seen = self._fingerprint()
        if seen != self._seen:
            self._seen = seen
            self.plan.constants.renew(tensors(self.model, self.plan.capture))
            self.programs.clear()
            self.spec = InputSpec.of(self.plan)

    def program(self, key: Key) -> Program:
        """The program of a key, generated when first asked for."""
        if key not in self.programs:
            self.programs[key] = generate(self.plan, key, self.spec.device)
        return self.programs[key]

    def advance(
        self, state: StreamState, inputs: Sequence[torch.Tensor], ticks: int, length: int | None, frames: bool
    ) -> tuple[list[list[torch.Tensor]], StreamState]:
        """Run `ticks` ticks from a state: for each output leaf the valid frames, and the state after.

        `length`: the stream's length in ticks, if it has ended.
        """
        parts: list[list[torch.Tensor]] = [[] for _ in self.plan.outputs]
        done = 0
        while done < ticks:
            take = self._piece(state.count, ticks - done)
            piece = inputs if take == ticks else self.spec.part(inputs, done, take)
            got, state = self._run(state, piece, take, length, frames)
            for part, tensor in zip(parts, got, strict=True):
                if tensor is not None:
                    part.append(tensor)
            done += take
        return parts, state

    def _piece(self, count: int, ticks: int) -> int:
        """How many ticks can be taken at once: one by one until sequential ops have begun, to the end of the masks."""
        schedule = self.plan.schedule
        if any(op.sequential for op in schedule.graph.ops) and (count < schedule.sequential_from or self.single_ticks):
            return 1
        return ticks

    @property
    def single_ticks(self) -> bool:
        """Whether some op can only take single ticks."""
        return False

    def _run(
        self, state: StreamState, inputs: Sequence[torch.Tensor], ticks: int, length: int | None, frames: bool
    ) -> tuple[list[torch.Tensor | None], StreamState]:
        schedule = self.plan.schedule
        cycles, phase = divmod(state.count, schedule.period)
        first = state.count == 0 and self.early
        key = Key(
            phase,
            ticks,
            masked=self.masks and (first or length is not None or state.count < schedule.settled),
            first=first,
            holding=state.count < schedule.sequential_from,
            frames=frames,
            folded=not (torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters())),
        )
        program = self.program(key)
        kept, batch = state.tensors, state.batch
        if kept is None:
            batch = self.spec.batch_of(inputs, frames)
            kept = allocate(self.specs, batch or 1, self.spec.device)
        extra = {"count": state.count, "length": FOREVER if length is None else length}
        where = [torch.tensor(extra[w], device=self.spec.device) for w in program.wants]
        outputs, after = program.module(*inputs, *where, *kept)
        results: list[torch.Tensor | None] = []
        for leaf, span, tensor in zip(self.plan.outputs, program.outputs, outputs, strict=True):
            results.append(self._valid(leaf, span, tensor, cycles, length, frames))
        return results, StreamState(state.count + ticks, after, batch)

    def _valid(
        self, leaf: Leaf, span: Any, tensor: torch.Tensor | None, cycles: int, length: int | None, frames: bool
    ) -> torch.Tensor | None:
        """The part of a program's output whose frames exist."""
        if tensor is None or leaf.value is None:
            return tensor
        schedule = self.plan.schedule
        start = span.start + int(leaf.value.rate * schedule.period) * cycles
        stop = start + span.frames
        low = max(start, 0)
        high = stop if length is None else min(stop, schedule.length(leaf.value, length))
        if high <= low:
            return None
        if (low, high) == (start, stop) or (frames and leaf.single):
            return tensor
        return tensor.narrow(leaf.value.layout.time, low - start, high - low)

    def flush(self, state: StreamState, templates: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """What is still due if the stream ends here: frames of each output leaf."""
        schedule = self.plan.schedule
        ticks = 0
        for leaf in self.plan.outputs:
            if leaf.value is not None:
                end = schedule.length(leaf.value, state.count)
                while schedule.count(leaf.value, state.count + ticks) < end:
                    ticks += 1
        if ticks == 0:
            return [[] for _ in self.plan.outputs]
        parts, _ = self.advance(state, self.spec.zeros(templates, ticks), ticks, state.count, frames=False)
        return [p if leaf.value is not None else [] for p, leaf in zip(parts, self.plan.outputs, strict=True)]

    def join(self, parts: list[list[torch.Tensor]]) -> list[torch.Tensor | None]:
        """The frames of each output leaf in one tensor."""
        joined: list[torch.Tensor | None] = []
        for leaf, part in zip(self.plan.outputs, parts, strict=True):
            if not part:
                joined.append(None)
            elif leaf.value is None:
                joined.append(part[-1])
            else:
                joined.append(part[0] if len(part) == 1 else torch.cat(part, leaf.value.layout.time))
        return joined

    def pack(self, leaves: list[torch.Tensor | None], stacked: bool) -> Any:
        """Output leaves in the model's own structure; None if nothing at all is due."""
        out = []
        for leaf, tensor in zip(self.plan.outputs, leaves, strict=True):
            if tensor is not None and leaf.clip and stacked:
                axis = next(v.layout.time for _, v in self.plan.inputs if v is not None)
                tensor = tensor.movedim(0, min(axis, tensor.dim() - 1))
            out.append(tensor)
        timed = [t for leaf, t in zip(self.plan.outputs, out, strict=True) if leaf.value is not None]
        if timed and all(t is None for t in timed):
            return None
        return pytree.tree_unflatten(out, self.plan.out_spec)
