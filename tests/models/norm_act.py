"""Activations, norms that work frame by frame or with running statistics, other elementwise mathematics."""

import torch
import torch.nn.functional as F
from torch import nn

from .sample import Net, Sample, parameter


def net(name, function, shape=(2, 4, 9), fields=(), **parts):
    return Sample(name, lambda: Net(function, **{k: make() for k, make in parts.items()}), shape, **dict(fields))


def conv(channels=4):
    return nn.Conv1d(4, channels, 3, padding=1)


class Quantizer(nn.Module):
    """The nearest entry of a codebook, per frame; gives the entry and its number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.codebook = nn.Conv1d(4, 3, 3, padding=1), nn.Embedding(6, 3)

    def forward(self, x):
        z = self.conv(x).transpose(1, 2)
        distance = z.square().sum(-1, keepdim=True) - 2 * z @ self.codebook.weight.t()
        code = (distance + self.codebook.weight.square().sum(1)).argmin(-1)
        return self.codebook(code).transpose(1, 2), code


class PerFrameInstanceNorm(nn.Module):
    """Statistics over space, each frame by itself: the time axis is folded into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.InstanceNorm2d(2, affine=True), nn.Conv3d(2, 2, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x):
        batch, channels, time, height, width = x.shape
        frames = self.norm(x.transpose(1, 2).flatten(0, 1))
        return self.conv(frames.unflatten(0, (batch, time)).transpose(1, 2))


class PerFrameGroupNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 4), conv()

    def forward(self, x):
        batch, channels, time = x.shape
        y = self.norm(x.transpose(1, 2).reshape(batch * time, channels))
        return self.conv(y.reshape(batch, time, channels).transpose(1, 2))


ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh,
    nn.LeakyReLU, nn.RReLU, nn.PReLU, nn.Softplus, nn.Softsign, nn.Tanhshrink, nn.LogSigmoid, nn.Hardshrink,
    nn.Softshrink, nn.Sigmoid, nn.Tanh,
)  # fmt: skip


class AllActivations(nn.Module):
    """Their weighted sum, each at its own place in time."""

    def __init__(self) -> None:
        super().__init__()
        self.activations = nn.ModuleList(a() for a in ACTIVATIONS)
        self.weights = parameter(len(ACTIVATIONS))
        self.conv = conv(2)

    def forward(self, x):
        total = F.threshold(x, 0.1, -0.2)
        for weight, activation in zip(self.weights, self.activations, strict=True):
            total = total + weight * activation(x)
        return self.conv(total)


SAMPLES = [
    Sample("activations", AllActivations, (2, 4, 9)),
    Sample(
        "activations_over_channels",
        lambda: nn.Sequential(
            conv(),
            nn.GLU(1),
            nn.Softmax(1),
            nn.Conv1d(2, 4, 2),
            nn.LogSoftmax(1),
            nn.Softmin(dim=1),
            nn.Dropout(),
            nn.AlphaDropout(),
            nn.Dropout1d(),
            nn.Softmax(dim=-2),
        ),
        (2, 4, 9),
    ),
    Sample("activation_per_channel", lambda: nn.Sequential(nn.PReLU(4), conv(), nn.PReLU(4)), (2, 4, 9)),
    net(
        "elementwise",
        lambda m, x: m.conv(
            torch.where(x > 0, x.sqrt(), x.exp() - 1)
            + x.sin().clamp(-0.5, 0.7)
            - torch.lerp(x, x.abs(), 0.3) / (1 + x.square())
            + (x.erf() * 3).round() % 2
        ),
        conv=conv,
    ),
    net("elementwise_in_place", lambda m, x: m.conv(x).mul_(2).add_(1).clamp_(min=0).pow(1.5), conv=conv),
    net(
        "masked_channels",
        lambda m, x: m.conv(x.masked_fill(m.hidden, 0.5)),
        conv=conv,
        hidden=lambda: nn.Buffer(torch.tensor([True, False, False, True])[:, None]),
    ),
    net("comparison_of_frames", lambda m, x: (x[:, :, 1:] > x[:, :, :-1]).to(x.dtype).sum(1, keepdim=True)),
    Sample(
        "batchnorm1d",
        lambda: nn.Sequential(nn.BatchNorm1d(4), conv(), nn.BatchNorm1d(4, affine=False), nn.ReLU(), conv(2)),
        (2, 4, 9),
    ),
    Sample(
        "batchnorm2d",
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, (3, 1), padding=(2, 0)),
            nn.BatchNorm2d(3),
            nn.ELU(),
            nn.Conv2d(3, 2, (2, 3), padding=(1, 1)),
        ),
        (1, 2, 9, 4),
    ),
    Sample(
        "batchnorm3d",
        lambda: nn.Sequential(nn.BatchNorm3d(2), nn.Conv3d(2, 3, 3, padding=1), nn.BatchNorm3d(3)),
        (1, 2, 6, 3, 3),
    ),
    Sample(
        "layernorm_features",
        lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5), nn.GELU(), nn.LayerNorm(5)),
        (2, 9, 4),
        time_dim=1,
    ),
    Sample("layernorm_frames", lambda: nn.LayerNorm([2, 3, 3]), (1, 6, 2, 3, 3), time_dim=1),
    net(
        "layernorm_channels_first",
        lambda m, x: m.conv(m.norm(x.transpose(1, 2)).transpose(1, 2)),
        conv=conv,
        norm=lambda: nn.LayerNorm(4),
    ),
    Sample("groupnorm_folded", PerFrameGroupNorm, (2, 4, 9)),
    Sample(
        "instancenorm_running",
        lambda: nn.Sequential(nn.InstanceNorm1d(4, affine=True, track_running_stats=True), conv()),
        (2, 4, 9),
    ),
    Sample("instancenorm_folded", PerFrameInstanceNorm, (1, 2, 6, 4, 3)),
    Sample("rmsnorm", lambda: nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 3)), (2, 9, 4), time_dim=1),
    net("normalize_and_center", lambda m, x: m.conv(F.normalize(x - x.mean(1, keepdim=True), dim=1)), conv=conv),
    net(
        "moments_per_frame",
        lambda m, x: torch.cat(
            [
                x.std(1, keepdim=True),
                x.var(1, keepdim=True),
                x.amax(1, True),
                x.logsumexp(1, keepdim=True),
                x.norm(dim=1, keepdim=True),
            ],
            1,
        ),
    ),
    net("local_response", lambda m, x: m.conv(F.local_response_norm(x, 3)), conv=conv),
    net(
        "cosine_of_neighbours",
        lambda m, x: F.cosine_similarity(x[:, :, 1:], x[:, :, :-1], dim=1),
        fields={"output_time_dim": 1},
    ),
    Sample(
        "weight_norm",
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(conv()),
            nn.ReLU(),
            nn.utils.parametrizations.spectral_norm(nn.Conv1d(4, 2, 3, padding=2)),
        ),
        (2, 4, 9),
    ),
    Sample("arg_max", lambda: Net(lambda m, x: m.conv(x).argmax(1), conv=conv()), (2, 4, 9), output_time_dim=1),
    Sample("top_values", lambda: Net(lambda m, x: m.conv(x).topk(2, dim=1)[0], conv=conv()), (2, 4, 9)),
    Sample("quantizer", Quantizer, (1, 4, 9), output_time_dim=(2, 1)),
    net(
        "scaled_by_parameters",
        lambda m, x: m.conv(x * m.scale + m.shift) * m.scale[:1].exp(),
        conv=conv,
        scale=lambda: parameter(4, 1),
        shift=lambda: parameter(1, 4, 1),
    ),
]
