"""Sums, products and extrema over all frames so far."""

import torch
import torch.nn.functional as F
from torch import nn

from .sample import Net, Sample, parameter


def net(name, function, shape=(2, 3, 9), fields=(), **parts):
    fields = {"unbounded": True} | dict(fields)
    return Sample(
        f"cumulative_{name}", lambda: Net(function, **{k: make() for k, make in parts.items()}), shape, **fields
    )


class RunningNorm(nn.Module):
    """Normalises each frame by the mean and variance of all frames so far."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.scale, self.shift = parameter(channels, 1), parameter(channels, 1)

    def forward(self, x):
        count = torch.arange(1, x.size(2) + 1, device=x.device, dtype=x.dtype) * x.size(1)
        mean = x.sum(1, keepdim=True).cumsum(2) / count
        power = x.square().sum(1, keepdim=True).cumsum(2) / count
        return (x - mean) * torch.rsqrt(power - mean.square() + 0.1) * self.scale + self.shift


class LinearAttention(nn.Module):
    """Causal attention without a softmax: a running sum of outer products."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x):
        q, k, v = F.elu(self.query(x)) + 1, F.elu(self.key(x)) + 1, self.value(x)
        memory = torch.einsum("btd,bte->btde", k, v).cumsum(dim=1)
        weight = (q * k.cumsum(1)).sum(-1, keepdim=True)
        return torch.einsum("btd,btde->bte", q, memory) / weight


class CausalGate(nn.Module):
    """Squeeze and excite by the mean of all frames so far, in three dimensions."""

    def __init__(self, c: int = 3) -> None:
        super().__init__()
        self.time, self.gate = nn.Conv3d(c, c, (3, 1, 1), groups=c), nn.Conv3d(c, c, 1)

    def forward(self, x):
        z = self.time(F.pad(x, (0, 0, 0, 0, 2, 0)))
        count = torch.arange(1, z.shape[2] + 1, dtype=z.dtype)[None, None, :, None, None]
        return x + z * self.gate(z.mean((3, 4), keepdim=True).cumsum(2) / count).sigmoid()


SAMPLES = [
    net("sum", lambda m, x: x.cumsum(2)),
    net("sum_of_conv", lambda m, x: torch.cumsum(m.conv(x), -1) / 4, conv=lambda: nn.Conv1d(3, 2, 3, 2, 2)),
    net("sum_of_pad", lambda m, x: F.pad(x, (3, 2), value=1.0).cumsum(2)),
    net("sum_then_conv", lambda m, x: m.conv(x.cumsum(2)), conv=lambda: nn.Conv1d(3, 2, 3, padding=1)),
    net(
        "sum_over_channels",
        lambda m, x: m.conv(x.cumsum(1)),
        fields={"unbounded": False},
        conv=lambda: nn.Conv1d(3, 2, 3, padding=1),
    ),
    net("product_of_gates", lambda m, x: torch.cumprod(torch.sigmoid(x) * 0.4 + 0.7, dim=2)),
    net("maximum", lambda m, x: x.cummax(2).values - x),
    net("minimum", lambda m, x: torch.cummin(m.conv(x), 2)[0], conv=lambda: nn.Conv1d(3, 2, 3, padding=1)),
    net("logsumexp", lambda m, x: torch.logcumsumexp(x, dim=2)),
    net("mean", lambda m, x: x.cumsum(2) / torch.arange(1, x.shape[2] + 1)),
    net("moving_average", lambda m, x: (lambda c: (c[:, :, 4:] - c[:, :, :-4]) / 4)(F.pad(x.cumsum(2), (1, 0)))),
    Sample("cumulative_norm", RunningNorm, (1, 3, 9), unbounded=True),
    Sample("cumulative_linear_attention", LinearAttention, (2, 8, 4), time_dim=1, unbounded=True),
    Sample("cumulative_gate", CausalGate, (1, 3, 7, 3, 3), unbounded=True),
    net(
        "last_sum",
        lambda m, x: m.conv(F.pad(x, (2, 0))).cumsum(2)[..., -1],
        conv=lambda: nn.Conv1d(3, 4, 3),
        fields={"kind": "prefix", "output_time_dim": None},
    ),
]
