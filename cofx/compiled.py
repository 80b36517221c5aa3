"""A plan with its programs: what a step model runs. Pure: a state goes in, another comes out."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from .inputs import InputSpec
from .mid_stream import MidStream
from .opaque import Pace, as_it_is, handle, pace_of
from .passes.capture import untraced
from .passes.changes import version
from .passes.codegen.graph_module import generate
from .passes.codegen.key import FOREVER, Key
from .passes.codegen.states import state_specs
from .passes.endings import Trace
from .passes.errors import CompileError, user_frame
from .passes.pipeline import Leaf, Plan, tensors
from .runtime.errors import InputError
from .runtime.onnx_meta import may_end
from .runtime.program import OutputSpan, Program, StateSpec
from .runtime.state import StreamState, allocate, grow

EVALUATIONS = 8  # of a clip or a loop's body in one program
REPEATED = 256  # ops of clips that a program repeats for them, beyond the first evaluation
KEPT_PROGRAMS = 512
GLANCES = 32  # parameters that a step looks at: all of a small net
_VERSION = operator.attrgetter("_version")
CAPACITY = 16  # ticks for which there is room at first, in a state that grows


class Compiled:
    """A plan with its programs: what runs."""

    def __init__(self, model: nn.Module, plan: Plan, batch: int, backend: str = "eager") -> None:
        """`backend`: of the steps in mid-stream."""
        self.model, self.plan, self.batch = model, plan, batch
        self.handle = handle(self)
        self._paces: dict[tuple[int, bool], list[Pace]] = {}
        self.open_batch = plan.capture.symbolic_batch or all(b is None for b in plan.clock.batch_dims)
        self.specs = state_specs(plan.schedule)
        self.grows = bool(plan.schedule.growing)
        self.large_frames = any(spec.apart is not None for spec in self.specs)
        self.spec = InputSpec.of(plan)
        self.programs: dict[Key, Program] = {}
        self._works: dict[Any, tuple[int, Program]] = {}  # for each work that is done, a phase with its program
        self.tables = [op for op in plan.schedule.graph.ops if op.limit is not None]
        clips = [op for op in plan.schedule.graph.ops if op.clip is not None]
        read = {r.source for op in plan.schedule.graph.ops for r in op.reads}
        apart = not any(v in read for op in clips for v in op.outputs)
        self.clips = [
            (c.first, c.every * max(1, min(EVALUATIONS, REPEATED // max(1, len(c.nodes)))))
            for op in clips
            if (c := op.clip) is not None
        ]
        self.first_of_clips = [op.outputs[0] for op in clips] if apart else []
        self.unrolled = any(op.unrolled for op in plan.schedule.graph.ops)
        self._seen = self._fingerprint()
        self._stale = False
        self._looked = 0  # sources of folded constants that are watched
        self._shares: Iterator[Any] = iter(())  # those that count what is written to them, and their counts then
        before = plan.schedule.counts(0)
        self.early = any(before[v] > 0 for op in plan.schedule.graph.ops for v in op.outputs)
        self._parameters = list(model.parameters())
        bounded = self.grows or bool(self.tables) or plan.limit is not None
        # ticks after which a step depends on the stream's phase alone, and every frame of its outputs exists
        settled = max(1, plan.schedule.settled, plan.schedule.sequential_from, *map(self._first, plan.outputs))
        self.steady_from = FOREVER if bounded else settled
        self.mid_stream = MidStream(self, backend)
        self.masks = plan.schedule.settled > 0 or any(
            op.carries or any(r.levels for r in op.reads) for op in plan.schedule.graph.ops
        )

    def _first(self, leaf: Leaf) -> int:
        """Ticks after which every further frame of an output has an index, no longer one before the first."""
        ticks = 0
        while leaf.value is not None and self.plan.schedule.count(leaf.value, ticks) < 0:
            ticks += 1
        return ticks

    def _fingerprint(self) -> tuple[tuple[int, int], ...]:
        return tuple((id(t), version(t)) for t in (*self.model.parameters(), *self.model.buffers()))

    @untraced
    def renew(self) -> bool:
        """Take up parameters that have changed since programs were made, and tell whether any have.

        Raises:
            CompileError: a buffer has changed whose value decided what was traced; nothing is taken up then.
        """
        seen = self._fingerprint()
        changed = seen != self._seen or self.plan.constants.outdated()
        if changed:
            now = tensors(self.model, self.plan.capture)
            for name, value in self.plan.capture.read.items():
                if not torch.equal(now[name], value.to(now[name])):
                    raise CompileError(
                        f"'{name}' has changed, and what forward does depends on its value\n"
                        "    try     compile the model again"
                    )
            self.plan.constants.renew(now)
            self._looked, self._shares = 0, iter(())
            self.programs.clear()
            self._works.clear()
            self._parameters = list(self.model.parameters())
            self.spec = InputSpec.of(self.plan)
            self._seen = seen
            self.mid_stream = MidStream(self, self.mid_stream.backend)
        self._stale = False
        return changed

    def notice(self) -> None:
        """Warn, once, if parameters have changed from which a running program has folded constants.

        Of many, each call looks at some, in turn: their counters lie far from each other in memory.
        """
        folded = self.plan.constants.folded
        if len(folded) != self._looked:
            counted = [(t, v) for t, v, _ in folded.values() if not t.is_inference()]
            shares = [counted[i : i + GLANCES] for i in range(0, len(counted), GLANCES)]
            self._looked, self._shares = len(folded), itertools.cycle(tuple(zip(*s, strict=True)) for s in shares)
        sources, versions = next(self._shares, ((), ()))
        if not self._stale and tuple(map(_VERSION, sources)) != versions:
            if not self.plan.constants.rewritten():  # a forward that bounds its weights, called once more
                self._looked = 0
                return
            self._stale = True
            warnings.warn(
                "parameters have changed from which constants were computed: this stream goes on with the old ones "
                "until clean_state(), or refresh() takes the new ones up now",
                stacklevel=4,
            )

    def capacity(self, ticks: int) -> int:
        """Ticks for which there is room in the state after so many: 0 if it does not grow, else in steps of a half."""
        if not self.grows:
            return 0
        room = CAPACITY
        while room < ticks:
            room += room // 2 if room & (room - 1) == 0 else room // 3  # 16, 24, 32, 48, 64, ...
        return room

    def specs_after(self, ticks: int) -> list[StateSpec]:
        """What is kept after so many ticks."""
        return state_specs(self.plan.schedule, self.capacity(ticks)) if self.grows else self.specs

    def program(self, key: Key) -> Program:
        """The program of a key, generated when first asked for."""
        if key not in self.programs:
            if len(self.programs) >= KEPT_PROGRAMS:
                del self.programs[next(iter(self.programs))]  # the oldest
            self.programs[key] = self._made(key)
        return self.programs[key]

    def _made(self, key: Key) -> Program:
        """A program; that of another phase where the same was done.

        A net that takes thousands of samples for one frame has thousands of phases, and a handful of programs.
        """
        schedule = self.plan.schedule
        if key.masked or key.first or key.holding or not key.kernels or schedule.period == 1:
            return generate(self.plan, key, self.spec.device)
        work = replace(key, phase=0), schedule.work(key.phase, key.ticks)
        if work not in self._works:
            if len(self._works) >= KEPT_PROGRAMS:
                self._works.clear()
            self._works[work] = key.phase, generate(self.plan, key, self.spec.device)
        phase, program = self._works[work]
        if phase == key.phase:
            return program
        if program.wants:  # it counts from its own phase on
            return generate(self.plan, key, self.spec.device)
        spans = []
        for leaf, span in zip(self.plan.outputs, program.outputs, strict=True):
            more = 0
            if leaf.value is not None:
                more = schedule.count(leaf.value, key.phase) - schedule.count(leaf.value, phase)
            spans.append(replace(span, start=span.start + more))
        return replace(program, outputs=spans)

    def folded(self) -> bool:
        """Whether what depends on parameters alone may be a constant: nobody asks for their gradients."""
        return not torch.is_grad_enabled() or not any(p.requires_grad for p in self._parameters)

    @as_it_is
    def advance(
        self, state: StreamState, inputs: Sequence[torch.Tensor], ticks: int, length: int | None, frames: bool
    ) -> tuple[list[list[torch.Tensor]], StreamState]:
        """Run `ticks` ticks from a state: for each output leaf the valid frames, and the state after.

        `length`: the stream's length in ticks, if it has ended.
        """
        self.notice()
        self._within_tables(state.count + ticks if length is None else length)
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

    def _within_tables(self, ticks: int) -> None:
        """Raise before a table of positions runs out, or the model would do otherwise than where it was traced."""
        for op in self.tables:
            assert op.limit is not None
            if self.plan.schedule.count(op.outputs[0], ticks) > op.limit:
                raise InputError(
                    f"the stream is longer than a table of the model: {op.name} has {op.limit} entries "
                    f"({user_frame(op.node) if op.node is not None else ''}); start a new one with clean_state()"
                )
        if self.plan.limit is not None and ticks > self.plan.limit[0]:
            most, line = self.plan.limit
            raise InputError(
                f"on more than {most} frames the model does otherwise than on the example of "
                f"{self.plan.capture.points[0].ticks}\n    at      {line or '(it cannot be run there)'}\n    try     "
                "clean_state() begins a new stream; compile(..., equivalence='clip') recomputes whole clips"
            )

    def _piece(self, count: int, ticks: int) -> int:
        """How many ticks one program takes: single ones until every sequential op has come to its first frame, and
        no more than a few evaluations of a clip or a loop's body, which a program repeats one by one."""
        if count < self.plan.schedule.sequential_from:
            return 1
        if self.unrolled:
            ticks = min(ticks, EVALUATIONS)
        for first, several in self.clips:
            idle = first - 1 - count
            ticks = min(ticks, idle if idle > 0 else several)
        return ticks

    def paces(self, ticks: int, end: bool) -> list[Pace]:
        """How many frames of each output are due in calls of so many ticks, or with the stream's end after them."""
        if (ticks, end) not in self._paces:
            self._paces[ticks, end] = [pace_of(self, leaf, ticks, end) for leaf in self.plan.outputs]
        return self._paces[ticks, end]

    def idle(self, ticks: int) -> bool:
        """Whether within so many ticks no clip is due, so that the programs up to there need not evaluate any."""
        return bool(self.first_of_clips) and all(self.plan.schedule.count(v, ticks) <= 0 for v in self.first_of_clips)

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
            folded=self.folded(),
            capacity=self.capacity(state.count + ticks),
            idle=self.idle(state.count + ticks),
        )
        program = self.program(key)
        kept, batch = state.tensors, state.batch
        if kept is None:
            batch = self.spec.batch_of(inputs, frames)
            kept = allocate(self.specs_after(state.count + ticks), batch or 1, self.spec.device)
        elif key.capacity != self.capacity(state.count):
            kept = grow(kept, self.specs_after(state.count + ticks))
        extra = {"count": state.count, "length": FOREVER if length is None else length}
        where = [torch.tensor(extra[w], device=self.spec.device) for w in program.wants]
        outputs, after = program.run(*inputs, *where, *kept)
        results: list[torch.Tensor | None] = []
        for leaf, span, tensor in zip(self.plan.outputs, program.outputs, outputs, strict=True):
            results.append(self._valid(leaf, span, tensor, cycles, length, frames))
        return results, StreamState(state.count + ticks, after, batch)

    def _valid(
        self, leaf: Leaf, span: OutputSpan, tensor: torch.Tensor | None, cycles: int, length: int | None, frames: bool
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

    @as_it_is
    def flush(self, state: StreamState, templates: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """What is still due if the stream ends here: frames of each output leaf."""
        schedule = self.plan.schedule
        ticks = 0
        self.check_end(state.count)
        for leaf in self.plan.outputs:
            if leaf.value is not None:
                end = schedule.length(leaf.value, state.count)
                while schedule.count(leaf.value, state.count + ticks) < end:
                    ticks += 1
        if ticks == 0:
            return [[] for _ in self.plan.outputs]
        parts, _ = self.advance(state, self.spec.zeros(templates, ticks), ticks, state.count, frames=False)
        return [p if leaf.value is not None else [] for p, leaf in zip(parts, self.plan.outputs, strict=True)]

    def check_end(self, ticks: int) -> None:
        """Raise if the model, run offline on so many ticks, does otherwise than where it was traced."""
        why = self._refused_end(ticks)
        if why is not None:
            raise InputError(
                f"a stream of {ticks} frames cannot end here: {why}\n"
                "    try     compile(..., equivalence='clip') recomputes whole clips of the traced length"
            )

    def _refused_end(self, ticks: int) -> str | None:
        """Why a stream may not end after so many ticks; None if it may."""
        capture, schedule = self.plan.capture, self.plan.schedule
        otherwise = f"at this length the model does otherwise than at the traced {capture.points[0].ticks}"
        if self.plan.runs is None:
            assert self.plan.ends is not None
            return None if may_end({"ends": self.plan.ends}, ticks) else otherwise
        streams = [
            (i, leaf.node, v.layout.time, schedule.length(v, ticks))
            for i, leaf in enumerate(self.plan.outputs)
            if (v := leaf.value) is not None and not leaf.clip
        ]
        if not streams:
            return None
        trace = self._trace_at(ticks)
        if trace is not None:
            pairs = [(trace.at(trace.size(node, axis), ticks), streamed) for _, node, axis, streamed in streams]
            if all(offline == streamed or max(offline, streamed) <= 0 for offline, streamed in pairs):
                return None
        line = self.plan.runs.otherwise(ticks)
        if line is not None:
            return f"{otherwise}\n    at      {line}"
        run = self.plan.runs.at(ticks)
        for i, _, axis, streamed in streams:
            offline = run.shapes[i][axis] if run is not None and not run.cut else streamed
            if offline != streamed and max(offline, streamed) > 0:
                return (
                    "the model's sizes follow the length in steps, and offline it gives "
                    f"{offline} frames where the stream has {streamed}"
                )
        return None

    def _trace_at(self, ticks: int) -> Trace | None:
        """The trace that holds at so many ticks, if it can be told."""
        if self.plan.endings is not None:
            return self.plan.endings.trace(ticks)
        capture = self.plan.capture
        return Trace(capture, None) if capture.symbolic_time and capture.assumed(ticks) else None

    def known_ends(self) -> dict[str, Any]:
        """At which lengths a stream may not end, for the metadata of a file: see `check_end`.

        Lengths `first` to `last` were looked at one by one, `refused` are those of them where the model does otherwise
        than where it was traced. Before and after that they repeat themselves after `every` (0: they do not).
        """
        traced, opened = self.plan.capture.points[0].ticks, self.plan.capture.symbolic_time
        first = 1 if opened else traced  # with a fixed length each one takes a run on fake tensors
        last = min(512, max(64, 2 * traced, 4 * self.plan.schedule.period)) if opened else traced + 31
        refused = {n for n in range(first, last + 1) if self._refused_end(n) is not None}
        middle = (first + last) // 2
        for every in range(1, (last - middle) // 2 + 1):
            if all((n in refused) == (n + every in refused) for n in range(middle, last - every + 1)):
                break
        else:
            every = 0
        return {"first": first, "last": last, "every": every, "refused": sorted(refused)}

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
