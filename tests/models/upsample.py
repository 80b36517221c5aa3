"""Rates that go up: nearest, linear, repeat, pixel shuffle, vocoder-like stacks."""

import torch
import torch.nn.functional as F
from torch import nn

from .sample import Net, Sample


def net(name, function, shape=(2, 3, 9), fields=(), **parts):
    return Sample(f"upsample_{name}", lambda: Net(function, **{k: make() for k, make in parts.items()}), shape,
                  **dict(fields))  # fmt: skip


class ShuffleTime(nn.Module):
    """Channels become frames: (B, C r, T) -> (B, C, T r)."""

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        self.conv, self.factor = nn.Conv1d(3, 2 * factor, 3, padding=1), factor

    def forward(self, x):
        y = self.conv(x)
        batch, channels, time = y.shape
        y = y.view(batch, channels // self.factor, self.factor, time)
        return y.permute(0, 1, 3, 2).reshape(batch, channels // self.factor, time * self.factor)


class UnshuffleTime(nn.Module):
    """Frames become channels and, after a convolution, frames again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 6, 3, padding=1)

    def forward(self, x):
        batch, channels, time = x.size()
        y = x.view(batch, channels, time // 2, 2).transpose(2, 3).reshape(batch, channels * 2, time // 2)
        y = torch.tanh(self.conv(y)).view(batch, channels, 2, time // 2)
        return y.transpose(2, 3).flatten(2)


class Vocoder(nn.Module):
    """Transposed convolutions with residual stacks of several kernels averaged at each rate."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv1d(3, 4, 5, padding=2), nn.Conv1d(2, 1, 5, padding=2)
        self.ups = nn.ModuleList([nn.ConvTranspose1d(4, 3, 4, 2, 1), nn.ConvTranspose1d(3, 2, 6, 3, 2, 1)])
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Conv1d(c, c, k, padding="same", dilation=2) for k in (3, 5)) for c in (3, 2)
        )

    def forward(self, x):
        x = self.enter(x)
        for up, convs in zip(self.ups, self.blocks, strict=True):
            x = up(F.leaky_relu(x, 0.1))
            x = sum(x + conv(F.leaky_relu(x, 0.1)) for conv in convs) / len(convs)
        return torch.tanh(self.leave(F.leaky_relu(x)))


def conv():
    return nn.Conv1d(3, 2, 3, padding=1)


SAMPLES = [
    Sample("upsample_nearest", lambda: nn.Upsample(scale_factor=2), (2, 3, 9)),
    Sample(
        "upsample_nearest_conv", lambda: nn.Sequential(nn.Upsample(scale_factor=3), nn.Conv1d(3, 2, 4, 2, 1)), (2, 3, 9)
    ),
    Sample("upsample_linear", lambda: nn.Upsample(scale_factor=2, mode="linear"), (2, 3, 9)),
    Sample(
        "upsample_linear_conv",
        lambda: nn.Sequential(nn.Conv1d(3, 3, 3, 2), nn.Upsample(scale_factor=4, mode="linear"), nn.Conv1d(3, 2, 3)),
        (2, 3, 12),
    ),
    Sample(
        "upsample_aligned_corners",
        lambda: nn.Upsample(scale_factor=2, mode="linear", align_corners=True),
        (1, 3, 6),
        kind="clip",
        or_kind="prefix",
    ),
    Sample("upsample_bilinear", lambda: nn.Upsample(scale_factor=(2, 2), mode="bilinear"), (1, 2, 8, 3)),
    Sample("upsample_trilinear", lambda: nn.Upsample(scale_factor=(3, 1, 2), mode="trilinear"), (1, 2, 6, 3, 2)),
    Sample(
        "upsample_space_only",
        lambda: nn.Sequential(nn.Upsample(scale_factor=(1, 2, 2)), nn.Conv3d(2, 2, 3, padding=1)),
        (1, 2, 7, 3, 3),
    ),
    net("interpolate_size", lambda m, x: m.conv(F.interpolate(x, size=x.shape[2] * 2)), conv=conv),
    net("nearest_exact", lambda m, x: F.interpolate(m.conv(x), scale_factor=3, mode="nearest-exact"), conv=conv),
    net("repeat_interleave", lambda m, x: m.conv(x.repeat_interleave(2, dim=2)), conv=conv),
    net("expand_flatten", lambda m, x: m.conv(x.unsqueeze(3).expand(-1, -1, -1, 3).flatten(2)), conv=conv),
    Sample("upsample_shuffle_time", ShuffleTime, (1, 3, 9)),
    Sample("upsample_unshuffle_time", UnshuffleTime, (1, 3, 10), multiple=2, length=26, exact=False),
    Sample("upsample_vocoder", Vocoder, (1, 3, 7), exact=False),
    net(
        "down_then_nearest",
        lambda m, x: m.conv(x) + F.interpolate(F.avg_pool1d(x, 2), scale_factor=2)[:, :2],
        conv=conv,
        shape=(1, 3, 12),
        fields={"multiple": 2},
    ),
    net(
        "half_rate_output",
        lambda m, x: F.interpolate(m.down(x), scale_factor=2),
        down=lambda: nn.Conv1d(3, 2, 4, 4),
        shape=(1, 3, 16),
        fields={"length": 38},
    ),
]
