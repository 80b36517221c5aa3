"""A collection of small nets in plain PyTorch, as users write them. ``SAMPLES`` lists all; nothing here knows cofx."""

from collections.abc import Iterable
from typing import Any

import pytest

from . import (
    attention,
    branches,
    conv,
    cumulative,
    fold,
    half_types,
    multi_io,
    norm_act,
    pad_slice,
    pool,
    recurrent,
    seed_library,
    upsample,
    window,
)
from .sample import Kind, Sample

FAMILIES = (
    conv, pool, pad_slice, branches, upsample, norm_act, fold, recurrent, attention, cumulative, multi_io, window,
    half_types, seed_library,
)  # fmt: skip
SAMPLES: list[Sample] = [sample for family in FAMILIES for sample in family.SAMPLES]

__all__ = ["FAMILIES", "SAMPLES", "Kind", "Sample", "batched", "spread"]


def spread(every: int, samples: Iterable[Sample] = SAMPLES) -> list[Any]:
    """All networks as parameters of a test; every so many-th is a default test, the others are slow ones."""
    return [pytest.param(s, id=s.name, marks=[pytest.mark.slow] if i % every else []) for i, s in enumerate(samples)]


def batched(every: int) -> list[Any]:
    """Those whose inputs have a batch dimension, likewise."""
    return spread(every, [s for s in SAMPLES if s.options.get("batch_dim", 0) is not None])
