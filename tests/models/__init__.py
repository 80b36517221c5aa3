"""A collection of small nets in plain PyTorch, as users write them. ``SAMPLES`` lists all; nothing here knows cofx."""

from collections.abc import Callable
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


def spread(every: int, chosen: Callable[[Sample], bool] = lambda sample: True) -> list[Any]:
    """All networks as parameters of a test; of each family every so many-th is a default test, the others are slow."""
    families = [[s for s in family.SAMPLES if chosen(s)] for family in FAMILIES]
    return [
        pytest.param(s, id=s.name, marks=[pytest.mark.slow] if i % every else [])
        for samples in families
        for i, s in enumerate(samples)
    ]


def batched(every: int) -> list[Any]:
    """Those whose inputs have a batch dimension, likewise."""
    return spread(every, lambda sample: sample.options.get("batch_dim", 0) is not None)
