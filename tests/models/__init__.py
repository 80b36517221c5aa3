"""A collection of small nets in plain PyTorch, as users write them. ``SAMPLES`` lists all; nothing here knows cofx."""

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

__all__ = ["FAMILIES", "SAMPLES", "Kind", "Sample"]
