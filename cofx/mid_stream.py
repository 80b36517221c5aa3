"""Steps in mid-stream: where what a step does depends on the stream's phase alone, and which backend runs it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .backends import fastest, installed, measures, question, remember, remembered
from .opaque import fits
from .passes.codegen.c import compile_native
from .passes.codegen.inductor import compile_inductor
from .passes.codegen.key import FOREVER, Key
from .passes.codegen.session import compile_sessions
from .runtime.program import Program
from .runtime.state import StreamState, allocate, take_apart

if TYPE_CHECKING:
    from .compiled import Compiled
    from .runtime.resident import Residence, Resident

Shapes = tuple[torch.Size, ...]
RESIDENT = {"onnxruntime", "c"}  # backends that keep the state in buffers of their own


class MidStream:
    """The short way through a step: no masks, no count, no checks that were made before."""

    def __init__(self, compiled: Compiled, backend: str) -> None:
        self.compiled, self.backend = compiled, backend
        plan = compiled.plan
        self._whole = [replace(spec, apart=None) for spec in compiled.specs]
        self._runs: dict[tuple[int, bool, bool], Callable[..., Any] | None] = {}
        self._compiled: dict[Shapes, list[Callable[..., Any]]] = {}
        self._chosen: dict[Shapes, str] = {}  # the backend for frames of these shapes
        self._homes: dict[tuple[str, Shapes], Residence] = {}
        self._accepted: tuple[int | None, Shapes] | None = None
        self._cpu = compiled.spec.device.type == "cpu"
        self._home: Residence | None = None  # where the state is for frames of the accepted shapes, if anywhere
        self._period = plan.schedule.period
        self._pictures = any(n.target is torch.ops.aten.conv3d.default for n in plan.graph.nodes)
        self._single = plan.out_spec.is_leaf()
        self._flat = plan.out_spec.type is tuple and len(plan.outputs) == plan.out_spec.num_children

    def accept(self, frames: Sequence[torch.Tensor], batch: int | None) -> None:
        """These inputs have been checked: frames of the same shapes need not be, in a stream of that batch size."""
        self._accepted = (batch, tuple(x.shape for x in frames))
        self._home = self._homes.get((self._chosen.get(self._accepted[1], ""), self._accepted[1]))

    def step(self, state: StreamState, frames: Sequence[torch.Tensor]) -> tuple[Any, StreamState] | None:
        """A step's output and the state after, the short way; None where it has to be taken the long way.

        The short way is there in mid-stream, for frames of shapes that were accepted before.
        """
        compiled, count, batch = self.compiled, state.count, state.batch
        traced = torch.compiler.is_dynamo_compiling()  # its own kernels fit with histories that are whole
        if count < compiled.steady_from or not self._accepts(frames, batch) or (not traced and _watched()):
            return None
        gradients = torch.is_grad_enabled()
        if gradients and not compiled.folded():
            return None
        if traced and not fits(compiled.handle):
            return None
        if not traced:
            compiled.notice()
        gradients = gradients and (any(x.requires_grad for x in frames) or state.requires_grad)
        phase = count % self._period
        backend = "eager"
        assert self._accepted is not None
        shapes = self._accepted[1]
        if self.backend != "eager" and not traced and not gradients:
            if self._home is None:
                backend = self._chosen.get(shapes) or self.prepare(frames, batch)
                self._home = self._homes.get((backend, shapes))
            if self._home is not None:
                return self._resident_step(self._home, phase, frames, state)
        by_frame = compiled.large_frames and not traced
        if backend == "inductor":
            run: Callable[..., Any] | None = self._compiled[shapes][phase]
        else:
            place = phase, by_frame or not compiled.large_frames, traced or not gradients
            if place not in self._runs:
                if traced:
                    return None
                self.program(*place)
            run = self._runs[place]
        if run is None:
            return None
        kept = self._parts(state) if by_frame else state.tensors
        assert kept is not None
        outputs, after = run(*frames, *kept)
        out = self._packed(outputs)
        if traced:  # a graph for each phase, not for each order in memory as well
            after = tuple(x.contiguous() for x in after)
        if by_frame:
            return out, StreamState(count + 1, None, batch, after, compiled.specs)
        return out, StreamState(count + 1, after, batch)

    def chunk(
        self, state: StreamState, chunks: Sequence[torch.Tensor], ticks: int
    ) -> tuple[list[list[torch.Tensor]], StreamState] | None:
        """The frames of each output and the state after a chunk, taken step by step.

        None where one program of all ticks is faster. It is not where frames are large pictures (three-dimensional
        convolutions): in other backends, and in torch's own kernels for several lanes; nor where a step is one call
        for what stays in the caches.
        """
        compiled = self.compiled
        if state.count < compiled.steady_from or _watched() or not compiled.folded():
            return None
        if torch.is_grad_enabled() and (any(x.requires_grad for x in chunks) or state.requires_grad):
            return None
        frames = compiled.spec.frame(chunks)
        shapes = tuple(x.shape for x in frames)
        if not self._pictures and (self.backend == "eager" or shapes not in self._chosen):
            return None
        compiled.notice()
        backend = "eager" if self.backend == "eager" else self.prepare(frames, state.batch)
        home = self._homes.get((backend, shapes))
        if home is not None and (self._pictures or home.small):
            here = state.leave()  # steps write over what is older than the step before
            if here is None or here.home is not home:
                here = home.load(self._parts(state))
            outputs, placed = self._steps(home.step, state.count, chunks, ticks, here)
            return outputs, self._resident(state, ticks, placed)
        if backend == "eager" and self._pictures and compiled.large_frames and (state.batch or 1) > 1:
            made = [self.program(phase, apart=True) for phase in range(self._period)]
            runs = [run for run in made if run is not None]

            def step(phase: int, frames: Sequence[torch.Tensor], kept: Any) -> Any:
                return runs[phase](*frames, *kept)

            if len(runs) == self._period:
                outputs, kept = self._steps(step, state.count, chunks, ticks, self._parts(state))
                return outputs, StreamState(state.count + ticks, None, state.batch, kept, compiled.specs)
        return None

    def _steps(
        self, step: Callable[..., Any], count: int, chunks: Sequence[torch.Tensor], ticks: int, kept: Any
    ) -> tuple[list[list[torch.Tensor]], Any]:
        """The frames of each output of a chunk, and what is kept after it.

        Args:
            step: ``(phase, frames, kept) -> (outputs, kept after)``.
            count: ticks before the chunk.
            chunks: frames of each input.
            ticks: how many.
            kept: before the chunk.
        """
        spec, leaves = self.compiled.spec, self.compiled.plan.outputs
        parts: list[list[torch.Tensor]] = [[] for _ in leaves]
        for t in range(ticks):
            frames = spec.frame(spec.part(chunks, t, 1))
            outputs, kept = step((count + t) % self._period, frames, kept)
            for part, leaf, y in zip(parts, leaves, outputs, strict=True):
                if y is not None:
                    part.append(y.unsqueeze(leaf.value.layout.time) if leaf.value is not None and leaf.single else y)
        return parts, kept

    def make_traced(self) -> None:
        """Make the programs that `torch.compile` traces: those that are made while it looks on it compiles anew."""
        if not torch.is_grad_enabled():
            for phase in range(self._period):
                self.program(phase, apart=not self.compiled.large_frames)

    def _resident(self, state: StreamState, ticks: int, here: Resident) -> StreamState:
        """A stream so many ticks on, in the buffers of a backend."""
        specs = self.compiled.specs if self.compiled.large_frames else self._whole
        return StreamState(state.count + ticks, None, state.batch, None, specs, here)

    def _resident_step(
        self, home: Residence, phase: int, frames: Sequence[torch.Tensor], state: StreamState
    ) -> tuple[Any, StreamState]:
        """A step in the buffers of a backend."""
        here = state.resident
        if here is None or here.home is not home:
            here = home.load(self._parts(state))
        outputs, placed = home.step(phase, frames, here)
        return outputs[0] if self._single else self._packed(outputs), self._resident(state, 1, placed)

    def _accepts(self, frames: Sequence[torch.Tensor], batch: int | None) -> bool:
        """Whether frames like these have been checked."""
        accepted, spec = self._accepted, self.compiled.spec
        if accepted is None or accepted[0] != batch or len(frames) != len(accepted[1]):
            return False
        cpu = self._cpu
        for x, shape, dtype in zip(frames, accepted[1], spec.dtypes, strict=False):
            if not isinstance(x, torch.Tensor) or x.shape != shape or x.dtype is not dtype:
                return False
            if not (x.is_cpu if cpu else x.device == spec.device):
                return False
        return True

    def _parts(self, state: StreamState) -> tuple[torch.Tensor, ...]:
        """What is kept, as the programs of mid-stream take it."""
        if state.apart is not None:
            return state.apart
        assert state.tensors is not None
        return take_apart(state.tensors, self.compiled.specs) if self.compiled.large_frames else state.tensors

    def _packed(self, outputs: Sequence[torch.Tensor | None]) -> Any:
        """The frames of a step in the model's own structure."""
        if self._single:
            return outputs[0]
        if self._flat and all(y is not None for y in outputs):
            return tuple(outputs)
        return self.compiled.pack(list(outputs), stacked=False)

    def program(self, phase: int, apart: bool, kernels: bool = True) -> Callable[..., Any] | None:
        """The program of a step in mid-stream: the fastest, which takes large frames one by one, or a plain.

        Through kernels that are torch's alone there are no gradients.
        """
        place = phase, apart, kernels
        if place not in self._runs:
            program = self._bare(phase, apart, kernels)
            self._runs[place] = None if program is None else program.run
        return self._runs[place]

    def _others(self, phase: int) -> Program:
        """The program that another backend than torch's kernels compiles, with the parameters as they are now."""
        program = self._bare(phase, True, kernels=False)
        assert program is not None
        self.compiled.plan.constants.note(program.tensors.values())
        return program

    def _bare(self, phase: int, apart: bool, kernels: bool) -> Program | None:
        """The program of a step in mid-stream; None if there is none that depends on the phase alone."""
        program = self.compiled.program(Key(phase, 1, frames=True, apart=apart, kernels=kernels))
        return program if not program.wants and program.apart == apart else None

    # -- backends ----------------------------------------------------------------------------------------------------

    def make(self, example: Sequence[torch.Tensor]) -> None:
        """Make the programs of a backend that takes long to make them, for frames like those of an example clip."""
        if self.backend != "eager":
            frames = self.compiled.spec.frame(example)
            self.prepare(frames, self.compiled.spec.batch_of(frames, frames=True))

    def prepare(self, frames: Sequence[torch.Tensor], batch: int | None) -> str:
        """Make the programs of mid-stream for frames of these shapes, and tell which backend they are of.

        Raises:
            OnnxError: an op has no ONNX form, and ONNX Runtime was asked for.
            NativeError: an op has no form in C, and that was asked for.
        """
        shapes = tuple(x.shape for x in frames)
        if shapes not in self._chosen:
            with torch.no_grad():
                self._chosen[shapes] = self._choose(frames, batch)
            for other in RESIDENT - {self._chosen[shapes]}:
                self._homes.pop((other, shapes), None)
        return self._chosen[shapes]

    def _choose(self, frames: Sequence[torch.Tensor], batch: int | None) -> str:
        """The backend that was asked for; of several the fastest, as far as one may measure."""
        names = installed() if self.backend == "auto" else [self.backend]
        why = self._eager_only()
        if why is not None:
            warnings.warn(f"steps run eagerly, not by {self.backend}: {why}", stacklevel=8)
            names = ["eager"]
        if len(names) == 1:
            self._way(names[0], frames, batch)
            return names[0]
        if not measures():
            return next(n for n in names if self._tried(n, frames, batch) is not None)
        key = question([str(n.target) for n in self.compiled.plan.graph.nodes] + [str(x.shape) for x in frames])
        known = remembered(key)
        if known is None or self._tried(known, frames, batch) is None:
            known = fastest({n: way for n in names if (way := self._tried(n, frames, batch)) is not None})
            remember(key, known)
        return known

    def _eager_only(self) -> str | None:
        """Why no other backend can run the steps of this model."""
        if self.compiled.spec.device.type != "cpu" and self.backend in RESIDENT:
            return f"the model is on {self.compiled.spec.device}"
        if self.compiled.steady_from == FOREVER:
            return "what is kept grows with the stream, or the stream has a longest length"
        phases = range(self._period)
        if any(self._bare(phase, True, kernels=False) is None for phase in phases):
            return "the programs depend on the place in the stream"
        return None

    def _tried(self, backend: str, frames: Sequence[torch.Tensor], batch: int | None) -> Callable[[], object] | None:
        """One period by a backend; None if it cannot run this model."""
        try:
            way = self._way(backend, frames, batch)
            way()
        except Exception:
            return None
        return way

    def _way(self, backend: str, frames: Sequence[torch.Tensor], batch: int | None) -> Callable[[], object]:
        """One period by a backend, on frames of these shapes and a state of zeros."""
        zeros = StreamState(
            self.compiled.steady_from, allocate(self.compiled.specs, batch or 1, self.compiled.spec.device), batch
        )
        parts = self._parts(zeros)
        if backend in RESIDENT:
            home = self._made_home(backend, frames, parts)
            placed = home.load(parts)

            def resident() -> None:  # from step to step, as a stream goes on
                nonlocal placed
                for phase in range(self._period):
                    _, placed = home.step(phase, frames, placed)

            return resident
        runs: list[Callable[..., Any] | None] = []
        if backend == "inductor":
            runs.extend(self._loops(frames, parts))
        else:
            runs.extend(self.program(phase, True) for phase in range(self._period))

        def plain() -> None:
            kept = parts
            for run in runs:
                if run is not None:
                    _, kept = run(*frames, *kept)

        return plain

    def _loops(self, frames: Sequence[torch.Tensor], parts: tuple[torch.Tensor, ...]) -> list[Callable[..., Any]]:
        """The programs of mid-stream as inductor compiles them for frames of these shapes."""
        shapes = tuple(x.shape for x in frames)
        if shapes not in self._compiled:
            runs = []
            for phase in range(self._period):
                program = self._others(phase)
                runs.append(compile_inductor(program.graph, program.tensors, [*frames, *parts], len(frames)))
            self._compiled[shapes] = runs
        return self._compiled[shapes]

    def _made_home(self, backend: str, frames: Sequence[torch.Tensor], parts: tuple[torch.Tensor, ...]) -> Residence:
        """The programs of mid-stream in a backend that keeps their state, for frames of these shapes."""
        place = backend, tuple(x.shape for x in frames)
        if place not in self._homes:
            groups: list[int] = []
            for i, spec in enumerate(self.compiled.specs):
                apart = spec.apart if self.compiled.large_frames else None
                groups += [i] * (1 if apart is None else spec.dims[apart][1])
            make = compile_sessions if backend == "onnxruntime" else compile_native
            programs = [self._others(phase) for phase in range(self._period)]
            self._homes[place] = make(self.compiled.plan, programs, [*frames, *parts], len(frames), groups)
        return self._homes[place]


def _watched() -> bool:
    """Whether somebody looks on at the operations (a counter), or changes them (autocast)."""
    return _dispatch_modes() > 0 or _function_modes() > 0 or _autocast("cpu")


_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_autocast = torch._C.is_autocast_enabled
