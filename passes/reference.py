"""The offline module that a step model with ``nonlocal_ops="continual"`` equals, see make_continual.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree


@dataclass(eq=False)
class Replaced:
    """One op that was replaced: what it was, where, and for what."""

    op: str
    module: str
    at: str

    def __str__(self) -> str:
        return f"{self.op} of {self.module or 'the model itself'} ({self.at}) looks on the frames so far"


class Reference(nn.Module):
    """The offline model that a step model with ``nonlocal_ops="continual"`` equals. Parameters are the model's own.

    Attributes:
        traced: what it computes.
        replaced: the ops that look on the frames so far.
        input_names: those of the model's own `forward`.
    """

    def __init__(
        self, graph: fx.GraphModule, inputs: Sequence[str], out_spec: pytree.TreeSpec, replaced: Sequence[Replaced]
    ) -> None:
        super().__init__()
        self.traced, self.replaced = graph, list(replaced)
        self.input_names = list(inputs)
        self._out_spec = out_spec

    def forward(self, *inputs: torch.Tensor) -> Any:
        """As the model's own, its inputs in their order."""
        return pytree.tree_unflatten(list(self.traced(*inputs)), self._out_spec)
