"""DS-CNN for keyword spotting (Zhang et al. 2017, "Hello Edge"): depthwise separable convolutions on MFCCs."""

from __future__ import annotations

import torch
from torch import nn


def _separable(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU(),
    )  # fmt: skip


class DSCNN(nn.Module):
    """DS-CNN-S: 49 frames of 10 coefficients, 64 channels, 4 blocks, 12 words."""

    def __init__(self, words: int = 12, width: int = 64, blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, (10, 4), (2, 2), (5, 1)), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.Sequential(*(_separable(width) for _ in range(blocks)))
        self.head = nn.Linear(width, words)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 1, time, coefficients) -> (batch, words)"""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))
