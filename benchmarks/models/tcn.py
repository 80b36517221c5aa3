"""Temporal convolutional network (Bai et al. 2018)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm


class TCNBlock(nn.Module):
    """Two causal dilated convolutions beside a residual."""

    def __init__(self, channels: int, out: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.past = dilation * (kernel - 1)
        self.first = weight_norm(nn.Conv1d(channels, out, kernel, dilation=dilation))
        self.second = weight_norm(nn.Conv1d(out, out, kernel, dilation=dilation))
        self.residual = nn.Conv1d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(F.pad(x, (self.past, 0))).relu()
        y = self.second(F.pad(y, (self.past, 0))).relu()
        return (y + self.residual(x)).relu()


class TCN(nn.Module):
    """Blocks whose dilation doubles; a linear layer on every frame."""

    def __init__(self, channels: int, out: int, width: int = 25, blocks: int = 8, kernel: int = 7) -> None:
        super().__init__()
        sizes = [channels] + [width] * blocks
        self.blocks = nn.Sequential(*(TCNBlock(sizes[i], width, kernel, 2**i) for i in range(blocks)))
        self.head = nn.Conv1d(width, out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time) -> (batch, out, time)"""
        return self.head(self.blocks(x))
