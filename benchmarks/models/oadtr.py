"""OadTR (Wang et al. 2021), the encoder: online action detection over a window of features."""

from __future__ import annotations

import torch
from torch import nn


class OadTR(nn.Module):
    """Features of 64 frames, a class token and learnt positions; a transformer; the token decides."""

    def __init__(
        self,
        features: int = 3072,
        classes: int = 22,
        width: int = 1024,
        blocks: int = 2,
        heads: int = 8,
        frames: int = 64,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, frames + 1, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, width, 0.1, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, blocks, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, frames, features) -> (batch, classes)"""
        x = torch.cat([self.embed(x), self.token.expand(x.shape[0], -1, -1)], 1) + self.position
        return self.head(self.encoder(x)[:, -1])
