"""The forms of ops in C, by family. An op that torch tags as pointwise has one by a line in `operators.py`."""

from ..builder import FORMS
from . import indices, moves, pointwise, pools, products, reductions

__all__ = ["FORMS", "indices", "moves", "pointwise", "pools", "products", "reductions"]
