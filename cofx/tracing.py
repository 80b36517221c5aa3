"""From a model and example clips to a plan: at which clip length, for which batch size, and of which module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from .inputs import check_runs
from .options import Options
from .passes.capture import Clock, untraced
from .passes.errors import CaptureError
from .passes.make_continual import make_continual
from .passes.pipeline import Plan, compile_plan
from .passes.reference import Reference
from .passes.saved_plan import SavedModel
from .runtime.errors import InputError
from .saving import saved_plan

TRIALS = (16, 32, 64, 128, 256, 512, 1024, 2048, 24, 48, 96, 192)  # clip lengths to trace with where none is given


@dataclass(frozen=True)
class Traced:
    """A model that has been traced.

    Attributes:
        plan: what the passes have found.
        reference: the module that the plan is of, in which ops look on the frames so far; None: it is the user's own.
        example: clips of the shapes that were given.
        ticks: the length of a clip.
        batch: the batch size.
    """

    plan: Plan
    reference: nn.Module | None
    example: tuple[torch.Tensor, ...]
    ticks: int
    batch: int


@untraced
def trace(
    model: nn.Module, example: Sequence[torch.Tensor], clock: Clock, ticks: int, options: Options, given: bool
) -> Traced:
    """Trace a model at the first clip length at which that can be done.

    Args:
        model: the user's.
        example: of the shapes and dtypes of its inputs.
        clock: how their axes lie.
        ticks: their length, or the length that was asked for.
        options: of `cofx.compile`.
        given: the example is a clip; else it is a frame or a chunk, which does not tell how long clips are.

    Raises:
        CaptureError: the model cannot be traced at any length.
        InputError: it needs whole clips, and nobody has said how long they are; or it does not take the example.
    """
    lengths = [ticks] if options.clip_length else [ticks, *(ticks * k for k in (2, 4, 8, 16))] if given else TRIALS
    failure = traced = None
    for length in lengths:
        try:
            traced = trace_at(model, example, clock, length, clock.batch(example), options)
            break
        except CaptureError as error:
            failure = failure or error
            if error.always:
                break
    if traced is None:
        assert failure is not None
        if given:
            check_runs(model, example)
        raise failure
    clips = [leaf for leaf in traced.plan.outputs if leaf.equivalence in ("clip", "first-clip")]
    if clips and not given and not options.clip_length:
        reason = next(leaf.reason for leaf in traced.plan.outputs if leaf.clip)
        raise InputError(
            f"this model needs whole clips ({reason}), and a frame or chunk does not tell how long they are: "
            "give compile(..., clip_length=...) or an example clip"
        )
    return traced


@untraced
def trace_at(
    model: nn.Module, example: Sequence[torch.Tensor], clock: Clock, ticks: int, batch: int, options: Options
) -> Traced:
    """Trace a model at one clip length and batch size; see `trace`."""
    kept = tuple(x.detach() for x in example)
    if isinstance(model, SavedModel):
        return Traced(saved_plan(model, batch), None, kept, ticks, batch)
    reference = None
    if "continual" in options.choices:
        window = options.clip_length or ticks
        reference = make_continual(model, example, clock, ticks, batch, window, options.choose)
    plan = _plan(reference or model, example, clock, ticks, batch, options.equivalence, options)
    if isinstance(reference, Reference):
        plan = replace(plan, replaced=tuple(map(str, reference.replaced)))
    return Traced(plan, reference, kept, ticks, batch)


@untraced
def trace_alone(model: nn.Module, traced: Traced, options: Options) -> Plan:
    """The plan for a batch of one, which each lane then is, of a model that fixes its batch size.

    Raises:
        InputError: a batch of one cannot be promised the same.
    """
    kinds = [leaf.equivalence for leaf in traced.plan.outputs]
    for wanted in (options.equivalence, kinds[0]):
        plan = _plan(traced.reference or model, traced.example, traced.plan.clock, traced.ticks, 1, wanted, options)
        if [leaf.equivalence for leaf in plan.outputs] == kinds:
            return replace(plan, replaced=traced.plan.replaced)
    raise InputError(f"this model fixes its batch size, and for a batch of one it is no {kinds[0]!r}: no lanes")


def _plan(
    model: nn.Module, example: Sequence[torch.Tensor], clock: Clock, ticks: int, batch: int, equivalence: str | None,
    options: Options,
) -> Plan:  # fmt: skip
    return compile_plan(
        model, example, clock, ticks, batch, equivalence, options.newest, options.context, options.choose
    )
