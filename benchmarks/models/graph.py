"""Networks on skeletons: ST-GCN (Yan et al. 2018), A-GCN (Shi et al. 2019), S-TR (Plizzari et al. 2021).

Input (batch, channels, time, joints), output (batch, classes). All are ten blocks of something over the joints and a
convolution of 9 frames, then the mean over time and joints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

# NTU RGB+D: 25 joints, each with the one towards the centre
BONES = [
    (0, 1), (1, 20), (2, 20), (3, 2), (4, 20), (5, 4), (6, 5), (7, 6), (8, 20), (9, 8), (10, 9), (11, 10), (12, 0),
    (13, 12), (14, 13), (15, 14), (16, 0), (17, 16), (18, 17), (19, 18), (21, 22), (22, 7), (23, 24), (24, 11),
]  # fmt: skip
BLOCKS = [(64, 1), (64, 1), (64, 1), (64, 1), (128, 2), (128, 1), (128, 1), (256, 2), (256, 1), (256, 1)]


def adjacency(joints: int = 25) -> torch.Tensor:
    """(3, joints, joints): each joint itself, its neighbours towards the centre, and those away from it."""
    inward = torch.zeros(joints, joints)
    for i, j in BONES:
        inward[j, i] = 1
    parts = [torch.eye(joints), inward, inward.t()]
    return torch.stack([a / a.sum(0, keepdim=True).clamp(min=1) for a in parts])


class GraphConvolution(nn.Module):
    """``sum_k (x A_k) W_k`` over fixed neighbourhoods, each weighted by what is learnt."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.register_buffer("neighbours", adjacency())
        self.importance = nn.Parameter(torch.ones(3, 25, 25))
        self.mix, self.norm, self.out = nn.Conv2d(channels, 3 * out, 1), nn.BatchNorm2d(out), out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time, joints) -> (batch, out, time, joints)"""
        y = self.mix(x).unflatten(1, (3, self.out))
        return self.norm(torch.einsum("nkctv,kvw->nctw", y, self.neighbours * self.importance))


class AdaptiveGraphConvolution(nn.Module):
    """Fixed, learnt and data-dependent neighbourhoods; the last compare joints over the whole clip."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        inner = out // 4
        self.register_buffer("neighbours", adjacency())
        self.learnt = nn.Parameter(torch.full((3, 25, 25), 1e-6))
        self.query = nn.ModuleList(nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.key = nn.ModuleList(nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.value = nn.ModuleList(nn.Conv2d(channels, out, 1) for _ in range(3))
        self.norm = nn.BatchNorm2d(out)
        self.down = (
            nn.Sequential(nn.Conv2d(channels, out, 1), nn.BatchNorm2d(out)) if channels != out else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time, joints) -> (batch, out, time, joints)"""
        batch, channels, time, joints = x.shape
        y = 0
        for k in range(3):
            query = self.query[k](x).permute(0, 3, 1, 2).reshape(batch, joints, -1)
            key = self.key[k](x).reshape(batch, -1, joints)
            alike = (query @ key / query.shape[-1]).softmax(-2)
            weights = alike + self.neighbours[k] + self.learnt[k]
            y = y + self.value[k]((x.reshape(batch, channels * time, joints) @ weights).view_as(x))
        return (self.norm(y) + self.down(x)).relu()


class SpatialAttention(nn.Module):
    """Multi-head attention between the joints of each frame."""

    def __init__(self, channels: int, out: int, heads: int = 8) -> None:
        super().__init__()
        self.heads, self.inner = heads, out // 4
        self.project = nn.Conv2d(channels, 2 * self.inner + out, 1)
        self.output, self.norm = nn.Conv2d(out, out, 1), nn.BatchNorm2d(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time, joints) -> (batch, out, time, joints)"""
        batch, _, time, joints = x.shape
        frames = self.project(x).permute(0, 2, 1, 3).reshape(batch * time, -1, joints)
        query, key, value = frames.split([self.inner, self.inner, frames.shape[1] - 2 * self.inner], 1)
        query, key, value = (t.unflatten(1, (self.heads, -1)) for t in (query, key, value))
        weights = (query.transpose(2, 3) @ key / math.sqrt(query.shape[2])).softmax(-1)
        mixed = (value @ weights.transpose(2, 3)).reshape(batch, time, -1, joints).transpose(1, 2)
        return self.norm(self.output(mixed))


class Block(nn.Module):
    """Over the joints, then over 9 frames, beside a residual."""

    def __init__(self, joints: nn.Module, channels: int, out: int, stride: int, residual: bool = True) -> None:
        super().__init__()
        self.joints = joints
        self.time = nn.Sequential(nn.ReLU(), nn.Conv2d(out, out, (9, 1), (stride, 1), (4, 0)), nn.BatchNorm2d(out))
        same = channels == out and stride == 1
        self.past = nn.Identity() if same else nn.Sequential(
            nn.Conv2d(channels, out, 1, (stride, 1)), nn.BatchNorm2d(out)
        )  # fmt: skip
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.time(self.joints(x))
        return (y + self.past(x) if self.residual else y).relu()


class SkeletonNet(nn.Module):
    """Ten blocks and a classifier. `stem` blocks at the start are graph convolutions."""

    def __init__(
        self,
        joints: Callable[[int, int], nn.Module],
        classes: int = 60,
        width: int = 64,
        stem: int = 0,
        depth: Sequence[tuple[int, int]] = BLOCKS,
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3 * 25)
        blocks, channels = [], 3
        for i, (wide, stride) in enumerate(depth):
            out = wide * width // 64
            over = GraphConvolution if i < stem else joints
            blocks.append(Block(over(channels, out), channels, out, stride, residual=i > 0))
            channels = out
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 3, time, 25) -> (batch, classes)"""
        x = self.norm(x.permute(0, 3, 1, 2).flatten(1, 2)).unflatten(1, (25, 3)).permute(0, 2, 3, 1)
        return self.head(self.blocks(x).mean((2, 3)))


class STGCN(SkeletonNet):
    """Spatial temporal graph convolutional network."""

    def __init__(self, classes: int = 60, width: int = 64, depth: Sequence[tuple[int, int]] = BLOCKS) -> None:
        super().__init__(GraphConvolution, classes, width, depth=depth)


class AGCN(SkeletonNet):
    """Adaptive graph convolutional network (one stream)."""

    def __init__(self, classes: int = 60, width: int = 64, depth: Sequence[tuple[int, int]] = BLOCKS) -> None:
        super().__init__(AdaptiveGraphConvolution, classes, width, depth=depth)


class STR(SkeletonNet):
    """Spatial transformer: three graph convolutions, then attention between joints."""

    def __init__(self, classes: int = 60, width: int = 64, depth: Sequence[tuple[int, int]] = BLOCKS) -> None:
        super().__init__(SpatialAttention, classes, width, stem=3, depth=depth)
