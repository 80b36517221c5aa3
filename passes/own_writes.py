"""A forward that writes to the model's own parameters or buffers: a bound on a weight's norm, a counter.

``self.weight.data = torch.renorm(self.weight.data, ...)`` is traced as a write to a copy, which the trace is free to
drop. What the graph then computes is the model's first call, from the parameters as they are. That is what all calls
give if the model repeats itself, which is tried with numbers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from .errors import CaptureError
from .leave_as_found import as_for_inference, note_written, tensor_leaves, written_by

CLOSE = 1e-6  # of the largest number of an output: calls that differ by less are alike
_DATA: Any = torch.Tensor.data
_GET, _SET = _DATA.__get__, _DATA.__set__
_WRITTEN = {"BUFFER_MUTATION", "PARAMETER_MUTATION"}


class OwnWrites(CaptureError):
    """A trace has found that forward writes to tensors of the model."""


class Unsteady(CaptureError):
    """What the model gives depends on the calls before. `hint`: what to do about it."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


class DataAccess(TorchFunctionMode):
    """While this is open, what is done by way of ``tensor.data`` is traced: it is ``tensor.detach()``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _GET:
            return args[0].detach()
        if func == _SET and args[0].shape == args[1].shape and args[0].dtype == args[1].dtype:
            args[0].detach().copy_(args[1])
            return None
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_copies(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """While this is open, each call of the model writes to copies of these parameters and buffers."""
    if not names:
        yield
        return
    forward = model.forward

    @functools.wraps(forward)
    def on_fresh_copies(*args: Any, **kwargs: Any) -> Any:
        with _copied(model, names):
            return forward(*args, **kwargs)

    own = model.__dict__.get("forward")
    model.forward = on_fresh_copies
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


@contextlib.contextmanager
def _copied(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """While this is open, the model has copies in the places of these parameters and buffers."""
    places = [
        (place, name, tensor)
        for path, module in model.named_modules(remove_duplicate=False)
        for place in (module._parameters, module._buffers)
        for name, tensor in place.items()
        if tensor is not None and f"{path}.{name}".lstrip(".") in names
    ]
    copies: dict[int, Any] = {id(tensor): tensor.detach().clone() for *_, tensor in places}
    try:
        for place, name, tensor in places:
            place[name] = copies[id(tensor)]
        yield
    finally:
        for place, name, tensor in places:
            place[name] = tensor


def check_writes(model: nn.Module, program: ExportedProgram) -> None:
    """See whether a trace writes to the model's tensors.

    Raises:
        OwnWrites: it does; they are noted, so that the next trace is `on_copies` of them.
        CaptureError: it writes to an input.
    """
    outputs = program.graph_signature.output_specs
    names = {str(o.target) for o in outputs if o.kind.name in _WRITTEN}
    if names - written_by(model):
        note_written(model, names)
        raise OwnWrites("the model changes its parameters or buffers in forward, even in eval mode")
    if any(o.kind.name != "USER_OUTPUT" for o in outputs):
        raise CaptureError("the model changes its buffers or inputs in forward, even in eval mode")


def check_repeats(model: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """Raise `Unsteady` if a model that writes to its own tensors gives something else at a later call, or on copies."""
    written = written_by(model)
    if not written:
        return
    turned = [x.flip(tuple(range(x.dim()))) for x in inputs]
    with torch.no_grad(), as_for_inference(model):
        with _copied(model, written):
            traced = [y.clone() for y in tensor_leaves(model(*inputs))]
        first, _, second, third = (
            [y.clone() for y in tensor_leaves(model(*x))] for x in (inputs, turned, inputs, inputs)
        )
    if _alike(traced, first) and _alike(first, second):
        return
    reason = f"forward changes {', '.join(sorted(written))}, and the model then gives something else"
    if _alike(second, third):
        raise Unsteady(f"{reason} from its second call on", "call the model once on a clip, then compile it")
    hint = "write forward so that what it gives depends on its inputs alone, not on the calls before"
    raise Unsteady(f"{reason} at each call", hint)


def _alike(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> bool:
    return all(
        a.shape == b.shape and (not a.numel() or torch.allclose(a, b, 0, CLOSE * _largest(a), equal_nan=True))
        for a, b in zip(one, other, strict=True)
    )


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().nan_to_num(0.0, 0.0, 0.0).max())
