"""WaveNet (van den Oord 2016), Conv-TasNet (Luo and Mesgarani 2019), SEANet as in EnCodec (Defossez 2022)."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class WaveNet(nn.Module):
    """Gated dilated causal convolutions with residual and skip connections."""

    def __init__(self, channels: int = 256, width: int = 64, skip: int = 128, cycles: int = 2, depth: int = 10) -> None:
        super().__init__()
        self.dilations = [2**i for _ in range(cycles) for i in range(depth)]
        self.stem = nn.Conv1d(channels, width, 1)
        self.gates = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=d) for d in self.dilations)
        self.residuals = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in self.dilations)
        self.skips = nn.ModuleList(nn.Conv1d(width, skip, 1) for _ in self.dilations)
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(skip, skip, 1), nn.ReLU(), nn.Conv1d(skip, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time) -> (batch, channels, time)"""
        x, total = self.stem(x), 0
        for dilation, gate, residual, skip in zip(self.dilations, self.gates, self.residuals, self.skips, strict=True):
            signal, control = gate(F.pad(x, (dilation, 0))).chunk(2, 1)
            y = signal.tanh() * control.sigmoid()
            x, total = x + residual(y), total + skip(y)
        return self.head(total)


class CumulativeNorm(nn.Module):
    """cLN: each frame by the statistics of all frames up to it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(channels, 1)), nn.Parameter(torch.zeros(channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        count = x.shape[1] * torch.ones_like(x[:1, :1]).cumsum(2)
        mean = x.sum(1, keepdim=True).cumsum(2) / count
        square = x.pow(2).sum(1, keepdim=True).cumsum(2) / count
        return (x - mean) / (square - mean.pow(2) + 1e-8).sqrt() * self.gain + self.bias


class SeparatorBlock(nn.Module):
    """1x1, depthwise dilated, 1x1, with a skip output."""

    def __init__(self, width: int, inner: int, dilation: int, causal: bool) -> None:
        super().__init__()
        self.pad = (2 * dilation, 0) if causal else (dilation, dilation)
        norm = CumulativeNorm if causal else lambda c: nn.GroupNorm(1, c, 1e-8)
        self.expand = nn.Sequential(nn.Conv1d(width, inner, 1), nn.PReLU(), norm(inner))
        self.depth = nn.Conv1d(inner, inner, 3, dilation=dilation, groups=inner)
        self.after = nn.Sequential(nn.PReLU(), norm(inner))
        self.residual, self.skip = nn.Conv1d(inner, width, 1), nn.Conv1d(inner, width, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.after(self.depth(F.pad(self.expand(x), self.pad)))
        return x + self.residual(y), self.skip(y)


class ConvTasNet(nn.Module):
    """Encoder, masks, decoder. Causal (cLN) or not (gLN, over the whole clip)."""

    def __init__(
        self, sources: int = 2, filters: int = 512, kernel: int = 16, width: int = 128, inner: int = 512,
        depth: int = 8, repeats: int = 3, causal: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sources = sources
        self.encoder = nn.Conv1d(1, filters, kernel, kernel // 2, bias=False)
        self.decoder = nn.ConvTranspose1d(filters, 1, kernel, kernel // 2, bias=False)
        self.norm = CumulativeNorm(filters) if causal else nn.GroupNorm(1, filters, 1e-8)
        self.narrow = nn.Conv1d(filters, width, 1)
        self.blocks = nn.ModuleList(
            SeparatorBlock(width, inner, 2**i, causal) for _ in range(repeats) for i in range(depth)
        )
        self.mask = nn.Sequential(nn.PReLU(), nn.Conv1d(width, sources * filters, 1), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 1, time) -> (batch, sources, time)"""
        code = self.encoder(x)
        y, total = self.narrow(self.norm(code)), 0
        for block in self.blocks:
            y, skip = block(y)
            total = total + skip
        masks = self.mask(total).unflatten(1, (self.sources, -1))
        sources = [self.decoder(code * masks[:, i]) for i in range(self.sources)]
        return torch.cat(sources, 1)


class CausalConv(nn.Conv1d):
    """A convolution whose padding lies in front, and which pads the end so that all frames are used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        span = self.dilation[0] * (self.kernel_size[0] - 1) + 1
        before = span - self.stride[0]
        frames = math.ceil((x.shape[2] - span + before) / self.stride[0]) + 1
        after = (frames - 1) * self.stride[0] + span - before - x.shape[2]
        return super().forward(F.pad(x, (before, after)))


class Residual(nn.Module):
    """ELU, a small convolution, ELU, 1x1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ELU(), CausalConv(width, width // 2, 3), nn.ELU(), CausalConv(width // 2, width, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class Memory(nn.Module):
    """An LSTM beside the identity, channels first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.lstm(x.transpose(1, 2))[0].transpose(1, 2)


class SEANetEncoder(nn.Sequential):
    """(batch, 1, time) -> (batch, codes, time / 320)"""

    def __init__(self, width: int = 32, codes: int = 128, strides: tuple[int, ...] = (2, 4, 5, 8)) -> None:
        layers: list[nn.Module] = [CausalConv(1, width, 7)]
        for s in strides:
            layers += [Residual(width), nn.ELU(), CausalConv(width, 2 * width, 2 * s, s)]
            width *= 2
        super().__init__(*layers, Memory(width), nn.ELU(), CausalConv(width, codes, 7))


class CausalUp(nn.ConvTranspose1d):
    """A transposed convolution whose excess is cut off at the end."""

    def forward(self, x: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        return super().forward(x)[:, :, : x.shape[2] * self.stride[0]]


class SEANetDecoder(nn.Sequential):
    """(batch, codes, time) -> (batch, 1, time * 320)"""

    def __init__(self, width: int = 32, codes: int = 128, strides: tuple[int, ...] = (8, 5, 4, 2)) -> None:
        width *= 2 ** len(strides)
        layers: list[nn.Module] = [CausalConv(codes, width, 7), Memory(width)]
        for s in strides:
            layers += [nn.ELU(), CausalUp(width, width // 2, 2 * s, s), Residual(width // 2)]
            width //= 2
        super().__init__(*layers, nn.ELU(), CausalConv(width, 1, 7))
