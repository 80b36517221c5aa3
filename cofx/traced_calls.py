"""The calls of a step model as `torch.compile` traces them, in place of those of `step_module.py`.

A step in mid-stream and a call with lanes are traced, program and all; other calls become an op (`opaque.py`). What
neither can be runs as it is, after a graph break: a model that has to be traced first, calls through which gradients
are wanted, lane arguments that are no tensors (their values would be constants of the graph), a stream that goes on in
lanes, and what raises.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .lanes import lanes_of
from .opaque import as_it_is, lanes_traced, opaque_call
from .runtime.state import StreamState

if TYPE_CHECKING:
    from .step_module import StepModule


def forward_step(
    step: StepModule, frames: tuple[torch.Tensor, ...], update_state: bool, controls: Mapping[str, Any]
) -> Any:
    """`StepModule.forward_step`."""
    if given(controls):
        took = _lanes(step, frames, True, update_state, controls)
        return _untraced_step(step, frames, update_state, controls) if took is None else took
    compiled = step._compiled
    if compiled is not None and step._lanes is None:
        # the count of frames is no constant of the module, for which dynamo would take it
        with torch._dynamo.patch_dynamo_config(allow_unspec_int_on_nn_module=True):
            done = compiled.mid_stream.step(step._state, frames)
            if done is None:
                made = opaque_call(compiled, step._state, frames, 1, frames=True, end=False)
                done = made and (compiled.pack(made[0], stacked=False), made[1])
            if done is not None:
                if update_state:
                    step._go_on(done[1], frames)
                return done[0]
    return _untraced_step(step, frames, update_state, controls)


def forward_steps(
    step: StepModule,
    chunks: tuple[torch.Tensor, ...],
    pad_end: bool,
    update_state: bool,
    controls: Mapping[str, Any],
) -> Any:
    """`StepModule.forward_steps`."""
    compiled = step._compiled
    if given(controls):
        took = None if pad_end else _lanes(step, chunks, False, update_state, controls)
        if took is not None:
            return took
    elif compiled is not None and step._lanes is None:
        made = opaque_call(compiled, step._state, chunks, compiled.spec.ticks(chunks), frames=False, end=pad_end)
        if made is not None:
            if update_state:
                step._go_on(made[1], chunks)
            return compiled.pack(made[0], stacked=True)
    return _untraced(step, "forward_steps", *chunks, pad_end=pad_end, update_state=update_state, **controls)


def flush(step: StepModule) -> Any:
    """`StepModule.flush`."""
    compiled, state = step._compiled, step._state
    if compiled is not None and step._lanes is None:
        if state.tensors is None:
            return None
        blank = compiled.spec.blank(state.batch, step._held)
        made = opaque_call(compiled, state, blank, 0, frames=False, end=True)
        if made is not None:
            return compiled.pack(made[0], stacked=True)
    return _untraced(step, "flush")


def _lanes(
    step: StepModule,
    inputs: Sequence[torch.Tensor],
    frames: bool,
    update_state: bool,
    controls: Mapping[str, Any],
) -> tuple[Any, Any] | None:
    """A call with lanes; None if it has to run as it is."""
    compiled = step._compiled
    if compiled is None or not all(v is None or isinstance(v, torch.Tensor) for v in controls.values()):
        return None
    ticks = 1 if frames else operator.index(compiled.spec.ticks(inputs))
    if not lanes_traced(step._handle, ticks, frames):
        return None
    programs, lanes = step._lane_programs, step._lanes
    assert programs is not None
    if lanes is None:
        if step._state.tensors is not None:
            return None
        lanes = programs.fresh(lanes_of(compiled, inputs, frames))
    y, valid, after = programs.traced_call(lanes, inputs, ticks, frames, controls)
    if update_state:
        step._go_on(StreamState(), inputs, after)
    return y, valid


def given(controls: Mapping[str, Any]) -> bool:
    """Whether a call has lane arguments."""
    return not all(v is None for v in controls.values())


@as_it_is
def _untraced(step: StepModule, method: str, *arguments: Any, **options: Any) -> Any:
    """A method that is not traced."""
    return getattr(step, method)(*arguments, **options)


@as_it_is
def _untraced_step(
    step: StepModule, frames: tuple[torch.Tensor, ...], update_state: bool, controls: Mapping[str, Any]
) -> Any:
    """A step that is not traced, after which the next may be."""
    out = step.forward_step(*frames, update_state=update_state, **controls)
    if not torch.is_grad_enabled() and step._lanes is None:
        step.compiled.mid_stream.make_traced()
        step._place(StreamState(step._state.count, step._state.tensors, step._state.batch))
    return out
