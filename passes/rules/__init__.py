"""One file per op family. Importing this package fills the registry."""

from . import (
    attention,
    convolution,
    creation,
    cumulative,
    interpolate,
    join,
    linear,
    loop,
    normalization,
    pad,
    pairs,
    pointwise,
    pool,
    recurrent,
    reduction,
    shape,
    slicing,
    spectral,
)

FAMILIES = (
    attention,
    convolution,
    creation,
    cumulative,
    interpolate,
    join,
    linear,
    loop,
    normalization,
    pad,
    pairs,
    pointwise,
    pool,
    recurrent,
    reduction,
    shape,
    slicing,
    spectral,
)
__all__ = ["FAMILIES"]
