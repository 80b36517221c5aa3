"""One file per op family. Importing this package fills the registry."""

from . import (
    convolution,
    creation,
    cumulative,
    interpolate,
    join,
    linear,
    normalization,
    pad,
    pointwise,
    pool,
    recurrent,
    reduction,
    shape,
    slicing,
)

FAMILIES = (
    convolution,
    creation,
    cumulative,
    interpolate,
    join,
    linear,
    normalization,
    pad,
    pointwise,
    pool,
    recurrent,
    reduction,
    shape,
    slicing,
)
__all__ = ["FAMILIES"]
