"""Numeric verification: a step model against the offline model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from .compiled import Compiled
from .passes.leave_as_found import as_for_inference, tensor_leaves
from .passes.pipeline import Leaf, clip_of
from .runtime.errors import InputError
from .runtime.state import StreamState

# relative and absolute, as docs/design.md promises them
TOLERANCES = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (2e-2, 2e-2),
    torch.bfloat16: (2e-2, 2e-2),
}


@dataclass(frozen=True)
class Verification:
    """What a verification found.

    Attributes:
        exact: every output agrees with the offline model within the tolerance of its dtype.
        difference: the largest absolute difference; infinite if frames are missing.
        compared: how many frames were compared, over all outputs.
        equivalences: what was checked, for each output.
    """

    exact: bool
    difference: float
    compared: int
    equivalences: tuple[str, ...]


def verify(model: nn.Module, compiled: Compiled, inputs: Sequence[torch.Tensor]) -> Verification:
    """Stream the inputs, frame by frame at first and then in one chunk, and compare every output with its promise."""
    ticks = compiled.spec.ticks(inputs)
    if any(leaf.equivalence == "first-clip" for leaf in compiled.plan.outputs):
        ticks = compiled.plan.facts.streams.ticks[0]  # the promise is about the first clip
        if compiled.spec.ticks(inputs) < ticks:
            raise InputError(f"verifying this model takes a clip of at least {ticks} frames")
    inputs = compiled.spec.part(inputs, 0, ticks)
    worst, exact, compared = 0.0, True, 0
    with torch.no_grad(), as_for_inference(model):
        streamed = _stream(compiled, inputs, ticks)
        for i, leaf in enumerate(compiled.plan.outputs):
            pairs = _pairs(model, compiled, inputs, ticks, i, leaf, streamed[i])
            for got, expected in pairs:
                difference, fine = _compare(got, expected, _coarsest(leaf.node, expected.dtype))
                worst, exact, compared = max(worst, difference), exact and fine, compared + 1
    if not compared:
        raise InputError("nothing was compared: the clip is too short for the model to give an output")
    return Verification(exact, worst, compared, tuple(leaf.equivalence for leaf in compiled.plan.outputs))


def _stream(compiled: Compiled, inputs: Sequence[torch.Tensor], ticks: int) -> list[torch.Tensor | None]:
    """All frames of each output: half of the ticks one by one, the rest as a chunk, then the flush."""
    state, parts = StreamState(), [list[torch.Tensor]() for _ in compiled.plan.outputs]
    single = ticks // 2
    pieces = [(i, 1) for i in range(single)] + [(single, ticks - single)]
    for start, count in pieces:
        got, state = compiled.advance(state, compiled.spec.part(inputs, start, count), count, None, frames=False)
        parts = [a + b for a, b in zip(parts, got, strict=True)]
    tail = compiled.flush(state, inputs)
    return compiled.join([a + b for a, b in zip(parts, tail, strict=True)])


def _pairs(
    model: nn.Module,
    compiled: Compiled,
    inputs: Sequence[torch.Tensor],
    ticks: int,
    i: int,
    leaf: Leaf,
    streamed: torch.Tensor | None,
) -> list[tuple[torch.Tensor | None, torch.Tensor]]:
    """What was streamed beside what it should be: frame by frame, or one for each evaluation of a clip."""
    clip = clip_of(leaf.value)
    if leaf.value is None or clip is None:
        expected: torch.Tensor = tensor_leaves(model(*inputs))[i]
        if leaf.value is None:
            return [(streamed, expected)]
        axis = leaf.value.layout.time
        if streamed is None or streamed.shape != expected.shape:
            return [(streamed, expected)] if expected.numel() else []
        return list(zip(streamed.unbind(axis), expected.unbind(axis), strict=True))
    length = compiled.plan.facts.streams.ticks[0]
    newest = clip.newest[clip.leaves.index(leaf.node)]
    stops = range(clip.first, ticks + 1, clip.every) if clip.equivalence != "first-clip" else [length]
    pairs: list[tuple[torch.Tensor | None, torch.Tensor]] = []
    for j, stop in enumerate(stops):
        start = 0 if clip.equivalence == "prefix" else stop - length
        expected = tensor_leaves(model(*compiled.spec.part(inputs, start, stop - start)))[i]
        expected = expected if newest is None else expected.select(newest, -1)
        pairs.append((None if streamed is None or j >= streamed.shape[0] else streamed[j], expected))
    return pairs


def _coarsest(leaf: fx.Node, dtype: torch.dtype) -> torch.dtype:
    """The floating dtype with the fewest bits of those that an output is computed in: within autocast, say."""
    seen, waiting = {leaf}, [leaf]
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node not in seen:
                seen.add(node)
                waiting.append(node)
    dtypes = {x.dtype for n in seen if isinstance(x := n.meta.get("val"), torch.Tensor) and x.is_floating_point()}
    return max(dtypes & TOLERANCES.keys(), key=lambda d: torch.finfo(d).eps, default=dtype)


def _compare(got: torch.Tensor | None, expected: torch.Tensor, dtype: torch.dtype) -> tuple[float, bool]:
    if got is None or got.shape != expected.shape:
        return math.inf, False
    if expected.is_complex():
        got, expected = torch.view_as_real(got.resolve_conj()), torch.view_as_real(expected.resolve_conj())
    rtol, atol = TOLERANCES.get(dtype, (0.0, 0.0)) if expected.is_floating_point() else (0.0, 0.0)
    difference = (got.double() - expected.double()).abs().nan_to_num(0.0, math.inf) if got.numel() else got.new_zeros(1)
    fine = torch.allclose(got.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True)
    return float(difference.max()), fine
