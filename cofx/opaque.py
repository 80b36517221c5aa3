"""Calls that `torch.compile` takes as they are: ops of torch's own, of which it knows the shapes and nothing else.

A step in mid-stream is traced, program and all. What comes before (the first frames, for which there is a program for
each count), chunks, and steps whose program looks at the count, go through `cofx::advance`: the state goes in, another
comes out, and the graph does not break. What Python must know while it traces is how many frames are due; `Pace` tells
it from the count with few questions, as each of them is a guard and may be a graph more.
"""

from __future__ import annotations

import contextlib
import operator
import secrets
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch

from .passes.layout import from_sizes
from .runtime.errors import CofxError
from .runtime.lane_state import LaneState
from .runtime.state import StreamState

if TYPE_CHECKING:
    from .compiled import Compiled
    from .passes.pipeline import Leaf

P = ParamSpec("P")
R = TypeVar("R")

WHY = (
    "torch.compile takes the calls of a step model without gradients (torch.no_grad()), compiled with an example, and "
    "with lane arguments that are tensors, given from the stream's first frame on"
)

_known: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def handle(thing: Any) -> str:
    """A name by which an op knows a compiled model: like no other, for torch keeps graphs from process to process."""
    name = secrets.token_hex(8)
    _known[name] = thing
    return name


def as_it_is(function: Callable[P, R]) -> Callable[P, R]:
    """What torch.compile leaves alone, with all that it calls: also where it has given up on a function further up."""
    left: Callable[P, R] = torch.compiler.disable(function, reason=WHY)  # type: ignore[no-untyped-call, unused-ignore]
    return left


def constant(function: Callable[P, R]) -> Callable[P, R]:
    """What torch.compile computes, from constants, while it traces."""
    marked: Callable[P, R] = torch.compiler.assume_constant_result(function)  # type: ignore[no-untyped-call]
    return marked


# How many frames of an output are due in a call, by the count of ticks before it: the count from which on that repeats
# itself with the period; the counts before that at which frames are due, with how many; frames at most phases; the
# other phases, with how many. Plain tuples, as torch.compile takes constants of Python's own types only.
Pace = tuple[int, tuple[tuple[int, int], ...], int, tuple[tuple[int, int], ...]]


def pace_of(compiled: Compiled, leaf: Leaf, ticks: int, end: bool) -> Pace:
    """The pace of an output in calls of so many ticks; `end`: with what would be due if the stream ended then."""
    schedule, value = compiled.plan.schedule, leaf.value
    if value is None:
        return 0, (), int(ticks > 0), ()

    def frames(count: int) -> int:
        before = schedule.count(value, count) if count else 0
        after = (schedule.length if end else schedule.count)(value, count + ticks)
        return max(after, before, 0) - max(before, 0)

    start = 0
    while schedule.count(value, start) < 0 or (start == 0 and schedule.count(value, 0) > 0):
        start += 1
    first = tuple((n, k) for n in range(start) if (k := frames(n)) > 0)
    again = -(-start // schedule.period) * schedule.period
    phases = [frames(again + phase) for phase in range(schedule.period)]
    usual = max(phases, key=phases.count)
    while first and first[-1] == (start - 1, phases[(start - 1) % schedule.period]):
        start, first = start - 1, first[:-1]
    return start, first, usual, tuple((p, k) for p, k in enumerate(phases) if k != usual)


def due(pace: Pace, count: int, period: int) -> int:
    """Frames of an output that are due in the call after so many ticks."""
    start, first, usual, others = pace
    if count < start:
        for n, frames in first:
            if count == n:
                return frames
        return 0
    for phase, frames in others:
        if count % period == phase:
            return frames
    return usual


def graphs(compiled: Compiled) -> int:
    """How many graphs `torch.compile` makes of the steps of a stream: one for each way through the questions above in
    the first frames, and one for each phase in mid-stream."""
    period, ways = compiled.plan.schedule.period, set()
    for n in range(1, compiled.steady_from):
        way: list[object] = []
        for start, first, _, others in compiled.paces(1, end=False):
            known = dict(first) if n < start else dict(others)
            way.append((n < start, n if n < start and n in known else n % period if n % period in known else None))
        ways.add(tuple(way))
    return 1 + len(ways) + period


@constant
def fits(model: str) -> bool:
    """Whether torch.compile may make as many graphs as trace all of a stream's steps."""
    return graphs(_known[model]) <= torch._dynamo.config.recompile_limit


@torch.library.custom_op("cofx::advance", mutates_args=())
def advance(
    model: str,
    count: int,
    ticks: int,
    due: list[int],
    frames: bool,
    end: bool,
    inputs: list[torch.Tensor],
    kept: list[torch.Tensor],
) -> list[torch.Tensor]:
    """`Compiled.advance` from a state of so many ticks: frames of the outputs that are due, and what is kept then.

    Args:
        model: its handle.
        count, ticks: taken before, and now.
        due: for each output the frames that this call gives.
        frames: the inputs have no time axis.
        end: also what would be due if the stream ended then.
        inputs, kept: nothing is kept before the first frame.
    """
    compiled = _known[model]
    batch = compiled.spec.batch_of(inputs, frames)
    state = StreamState(count, tuple(kept) if count else None, batch if count else None)
    parts: list[list[torch.Tensor]] = [[] for _ in due]
    if ticks:
        parts, state = compiled.advance(state, inputs, ticks, None, frames)
        compiled.mid_stream.make_traced()
        if frames:
            compiled.mid_stream.accept(inputs, state.batch)
    if end:
        parts = [a + b for a, b in zip(parts, compiled.flush(state, inputs), strict=True)]
    outputs = [x for x in compiled.join(parts) if x is not None]
    assert len(outputs) == len([k for k in due if k]), "as many outputs as are due"
    return _owned([*outputs, *((ticks and state.tensors) or ())], [*inputs, *kept])


def _owned(tensors: list[torch.Tensor], given: list[torch.Tensor]) -> list[torch.Tensor]:
    """Results as torch wants them of an op: in the order that it expects in memory, and none a view of another."""
    seen = {x.untyped_storage().data_ptr() for x in given}
    out = []
    for x in tensors:
        x = x.contiguous()
        if x.untyped_storage().data_ptr() in seen:
            x = x.clone()
        seen.add(x.untyped_storage().data_ptr())
        out.append(x)
    return out


@advance.register_fake
def _(
    model: str,
    count: int,
    ticks: int,
    due: list[int],
    frames: bool,
    end: bool,
    inputs: list[torch.Tensor],
    kept: list[torch.Tensor],
) -> list[torch.Tensor]:
    compiled, some = _known[model], inputs[0]
    batch = compiled.spec.batch_of(inputs, frames)
    found = []
    for leaf, number in zip(compiled.plan.outputs, due, strict=True):
        if number:
            shape = _shape(compiled, leaf, batch, number, frames)
            found.append(some.new_empty(shape, dtype=leaf.node.meta["val"].dtype))
    for spec in compiled.specs if ticks else ():
        sizes: list[Any] = list(spec.shape(1 if batch is None else batch))
        if spec.grows is not None:
            sizes[spec.grows] = torch.library.get_ctx().new_dynamic_size()
        found.append(some.new_empty(sizes, dtype=spec.dtype))
    return found


def _shape(compiled: Compiled, leaf: Leaf, batch: Any, number: int, frames: bool) -> Sequence[Any]:
    """The shape of an output with so many frames."""
    if leaf.value is None:
        sizes = list(zip(*leaf.node.meta["sizes"], strict=True))
        return from_sizes(sizes, tuple(p.batch for p in compiled.plan.capture.points)).sizes(batch, None)
    shape = leaf.value.layout.sizes(batch, number)
    if frames and leaf.single:
        del shape[leaf.value.layout.time]
    return shape


@constant
def _paces(model: str, ticks: int, end: bool) -> tuple[Pace, ...]:
    return tuple(_known[model].paces(ticks, end))


def opaque_call(
    compiled: Compiled, state: StreamState, inputs: Sequence[torch.Tensor], ticks: int, frames: bool, end: bool
) -> tuple[list[torch.Tensor | None], StreamState] | None:
    """`Compiled.advance` as `torch.compile` traces it: the outputs, and the state after.

    None where it has to run as it is, after a graph break: where gradients are wanted, or the model is of one batch
    size and would have to be traced for another.
    """
    kept = list(state.tensors or ())
    if not compiled.folded() or (torch.is_grad_enabled() and any(x.requires_grad for x in [*inputs, *kept])):
        return None
    batch = compiled.spec.batch_of(inputs, frames)
    if not compiled.open_batch and batch != compiled.batch:
        return None
    ticks = operator.index(ticks)  # a chunk's length is a constant of its graph
    if ticks:
        compiled.spec.check(inputs, ticks, state.batch, frames)
    period = compiled.plan.schedule.period
    numbers = [due(pace, state.count, period) for pace in _paces(compiled.handle, ticks, end)]
    made = torch.ops.cofx.advance(compiled.handle, state.count, ticks, numbers, frames, end, list(inputs), kept)
    outputs: list[torch.Tensor | None] = []
    taken = 0
    for k in numbers:
        outputs.append(made[taken] if k else None)
        taken += 1 if k else 0
    return outputs, StreamState(state.count + ticks, tuple(made[taken:]), batch)


# -- lanes ---------------------------------------------------------------------------------------------------------

Look = tuple[torch.dtype, list[tuple[int, int]]]  # of a result: its dtype, and each dimension per lane and besides


@torch.library.custom_op("cofx::check_lanes", mutates_args=())
def check_lanes(
    lanes: str,
    ticks: int,
    told: bool,
    position: torch.Tensor,
    start: torch.Tensor,
    ready: torch.Tensor,
    length: torch.Tensor,
) -> torch.Tensor:
    """`Lanes.check`, which raises; gives the lengths again, so that it comes before what reads them."""
    _known[lanes].check(position, ticks, start, ready, length, told)
    return length.clone()


@check_lanes.register_fake
def _(
    lanes: str,
    ticks: int,
    told: bool,
    position: torch.Tensor,
    start: torch.Tensor,
    ready: torch.Tensor,
    length: torch.Tensor,
) -> torch.Tensor:
    return torch.empty_like(length)


@torch.library.custom_op("cofx::advance_lanes", mutates_args=())
def advance_lanes(
    lanes: str,
    frames: bool,
    told: bool,
    inputs: list[torch.Tensor],
    start: torch.Tensor,
    ready: torch.Tensor,
    length: torch.Tensor,
    kept: list[torch.Tensor],
    capacity: int,
) -> list[torch.Tensor]:
    """`Lanes.advance`: the outputs, which of their frames exist, what is kept, and as many rows as the capacity is."""
    known = _known[lanes]
    ticks = 1 if frames else known.spec.ticks(inputs)
    known.check(kept[0], ticks, start, ready, length, told)
    state = LaneState(tuple(kept), capacity)
    results, valid, after = known.advance(state, inputs, frames, start, ready, length)
    made = _owned([*results, *valid, *after.tensors], [*inputs, start, ready, length, *kept])
    return [*made, start.new_empty(after.capacity, 0)]


@advance_lanes.register_fake
def _(
    lanes: str,
    frames: bool,
    told: bool,
    inputs: list[torch.Tensor],
    start: torch.Tensor,
    ready: torch.Tensor,
    length: torch.Tensor,
    kept: list[torch.Tensor],
    capacity: int,
) -> list[torch.Tensor]:
    known, n, room = _known[lanes], start.shape[0], torch.library.get_ctx()
    ticks = 1 if frames else known.spec.ticks(inputs)
    made = [start.new_empty([k * n + m for k, m in dims], dtype=dtype) for dtype, dims in known.looks[ticks, frames]]
    for spec in known.specs:
        sizes: list[Any] = list(spec.shape(n))
        if spec.grows is not None:
            sizes[spec.grows] = room.new_dynamic_size()
        made.append(start.new_empty(sizes, dtype=spec.dtype))
    rows: Any = room.new_dynamic_size() if known.grows else 0
    return [*made, start.new_empty(rows, 0)]


@constant
def lanes_traced(step: str, ticks: int, frames: bool) -> bool:
    """Whether torch.compile can trace calls of a step model's lanes; makes their programs."""
    with (
        contextlib.suppress(CofxError),  # the call that is then not traced will raise it
        torch._guards.tracing(None),  # what is traced for this is not part of what torch.compile traces
    ):
        prepared: bool = _known[step].prepare_lanes(ticks, frames)
        return prepared
    return False
