"""Integers inside a program: the arithmetic in which the lengths of values are written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from .emitter import Emitter


class Index:
    """An integer inside a program, with the arithmetic that lengths are written in."""

    def __init__(self, builder: Emitter, node: fx.Node) -> None:
        self.builder, self.node = builder, node

    def plus(self, other: Any) -> Index:
        if not isinstance(other, Index) and other == 0:
            return self
        return Index(self.builder, self.builder.aten("add.Tensor", self.node, _node(other)))

    __add__ = __radd__ = plus

    def __sub__(self, other: Any) -> Index:
        if not isinstance(other, Index) and other == 0:
            return self
        return Index(self.builder, self.builder.aten("sub.Tensor", self.node, _node(other)))

    def __mul__(self, other: Any) -> Index:
        if not isinstance(other, Index) and other == 1:
            return self
        return Index(self.builder, self.builder.aten("mul.Tensor", self.node, _node(other)))

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> Index:
        if other == 1:
            return self
        divisor = self.builder.constant(other, torch.int64)
        return Index(self.builder, self.builder.aten("floor_divide.default", self.node, divisor))

    def minimum(self, other: Any) -> Index:
        assert isinstance(other, Index)
        return Index(self.builder, self.builder.aten("minimum.default", self.node, other.node))


def _node(other: Any) -> Any:
    return other.node if isinstance(other, Index) else other
