"""Nets that need the whole clip, or only its last frame: their outputs are Windows."""

import torch
import torch.nn.functional as F
from torch import nn

from .sample import Net, Sample, parameter


def clip(name, build, shape=(1, 3, 7), **fields):
    return Sample(f"window_{name}", build, shape, **({"kind": "clip"} | fields))


def net(name, function, shape=(1, 3, 7), fields=(), **parts):
    return clip(name, lambda: Net(function, **{k: make() for k, make in parts.items()}), shape, **dict(fields))


POOLED = {"output_time_dim": None}


class Recognizer(nn.Module):
    """Features frame by frame, then a head over the clip. Apart, so that a test can pool over the stream's features."""

    def __init__(self, features: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.features, self.head = features, head

    def forward(self, x):
        return self.head(self.features(x))


class PooledLinear(nn.Module):
    """Mean over time and space, then Linear."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, 3)

    def forward(self, z):
        return self.linear(z.flatten(2).mean(2) if z.dim() > 3 else F.adaptive_avg_pool1d(z, 1).flatten(1))


class Memory(nn.Module):
    """(B, C, T) through a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.GRU(3, 4, batch_first=True)

    def forward(self, x):
        return self.memory(x.mT)[0].mT


class SqueezedBlocks(nn.Module):
    """Padded convolutions in space and time with a global gate between them (X3D)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(2, 4, (1, 3, 3), (1, 2, 2), (0, 1, 1)), nn.Conv3d(4, 4, (3, 1, 1),
                                  padding=(1, 0, 0), groups=4), nn.BatchNorm3d(4), nn.ReLU())  # fmt: skip
        self.depth = nn.Conv3d(4, 4, 3, padding=1, groups=4)
        self.gate = nn.Sequential(nn.Conv3d(4, 2, 1), nn.ReLU(), nn.Conv3d(2, 4, 1), nn.Sigmoid())
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        z = self.depth(x)
        z = F.silu(z * self.gate(z.mean(dim=(2, 3, 4), keepdim=True)))
        return self.head((x + z).mean((2, 3, 4)))


class Encoder(nn.Module):
    """A transformer encoder over (B, C, T) whose result is all tokens, the last one, the mean, or a class token."""

    def __init__(self, read: str, layers: int = 1, norm_first: bool = False, positions: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.token, self.table = parameter(1, 1, 4), parameter(1, 40, 4) if positions else None
        self.read = read

    def forward(self, x):
        z = x.mT
        if self.table is not None:
            z = z + self.table[:, : z.size(1)]
        if self.read == "token":
            z = torch.cat([self.token.expand(z.size(0), -1, -1), z], 1)
        z = self.encoder(z)
        return {"all": z.mT, "last": z[:, -1], "mean": z.mean(1), "token": z[:, 0]}[self.read]


class AttentionPool(nn.Module):
    """A softmax over time weighs the frames."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.score = nn.Conv1d(3, 4, 3), nn.Linear(4, 1)

    def forward(self, x):
        z = torch.tanh(self.conv(x)).transpose(1, 2)
        return (self.score(z).softmax(dim=1) * z).sum(1)


class BothDirections(nn.Module):
    def __init__(self, read: str, memory: type[nn.Module] = nn.LSTM) -> None:
        super().__init__()
        self.memory, self.head, self.read = memory(3, 4, batch_first=True, bidirectional=True), nn.Linear(8, 2), read

    def forward(self, x):  # (B, T, C)
        y = self.head(self.memory(x)[0])
        return {"all": y, "last": y[:, -1], "mean": y.mean(1)}[self.read]


def attend(m, x):
    return m.attention(x.mT, x.mT, x.mT, need_weights=False)[0].mT


def attend_last(m, x):
    return m.attention(x.mT[:, -1:], x.mT, x.mT, need_weights=False)[0].squeeze(1)


def attend_by_hand(m, x):
    q, k, v = m.project(x).chunk(3, -1)
    return x + torch.softmax(q @ k.transpose(1, 2) / 2, -1) @ v


def first_clip(name, features, head, shape=(1, 3, 8), **fields):
    fields = {"kind": "first-clip", "output_time_dim": None} | fields
    return Sample(f"first_clip_{name}", lambda: Recognizer(features(), head()), shape, **fields)


def conv(channels=4):
    return nn.Conv1d(3, channels, 3)


SAMPLES = [
    clip("mean_of_conv", lambda: Recognizer(nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU()), PooledLinear(4)), **POOLED),
    clip(
        "mean_of_conv3d",
        lambda: Recognizer(nn.Conv3d(2, 4, 3, padding=(0, 1, 1)), PooledLinear(4)),
        (1, 2, 6, 3, 3),
        **POOLED,
    ),
    clip(
        "mean_of_strided_conv",
        lambda: Recognizer(nn.Conv1d(3, 4, 3, 2), PooledLinear(4)),
        (1, 3, 9),
        stride=2,
        **POOLED,
    ),
    clip("adaptive_mean", lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.AdaptiveAvgPool1d(1)), output_time_dim=2),
    clip(
        "adaptive_bins",
        lambda: nn.Sequential(nn.Conv1d(3, 2, 2), nn.AdaptiveMaxPool1d(3), nn.Flatten(), nn.Linear(6, 2)),
        **POOLED,
    ),
    net(
        "pools_of_pictures",
        lambda m, x: torch.cat(
            [F.relu(x).mean((2, 3, 4)), x.tanh().amax((4, 2)).flatten(1), F.silu(x).flatten(2).sum(2)], 1
        ),
        shape=(2, 3, 5, 2, 3),
        fields=POOLED,
    ),
    net("maximum", lambda m, x: m.conv(x).amax(2), conv=conv, fields=POOLED),
    net("maximum_of_raw", lambda m, x: x.max(dim=2).values, fields=POOLED),
    net("sum_and_norm", lambda m, x: torch.cat([x.sum(2), x.norm(dim=2), x.logsumexp(2)], 1), fields=POOLED),
    net("median_frame", lambda m, x: x.sort(dim=2).values[:, :, x.size(2) // 2], fields=POOLED),
    net(
        "flatten_linear",
        lambda m, x: m.head(m.conv(x).flatten(1)),
        conv=conv,
        head=lambda: nn.Linear(20, 3),
        fields=POOLED,
    ),
    net("linear_over_time", lambda m, x: m.mix(x), mix=lambda: nn.Linear(7, 4), fields=POOLED),
    net(
        "learned_time_weights",
        lambda m, x: (m.conv(x) * m.weights).sum(-1),
        conv=conv,
        weights=lambda: parameter(5),
        fields=POOLED,
    ),
    clip("layernorm_over_time", lambda: nn.LayerNorm([3, 7])),
    clip("instancenorm", lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.InstanceNorm1d(4, affine=True))),
    clip("groupnorm", lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Conv1d(4, 2, 3)), (1, 4, 7)),
    net(
        "standardized", lambda m, x: m.conv((x - x.mean(2, keepdim=True)) / (x.std(2, keepdim=True) + 0.01)), conv=conv
    ),
    net("softmax_over_time", lambda m, x: x.softmax(2)),
    clip("attention_pool", AttentionPool, **POOLED),
    net(
        "squeeze_excite",
        lambda m, x: x * m.gate(x.mean((2, 3, 4), keepdim=True)).sigmoid(),
        shape=(1, 3, 5, 2, 2),
        gate=lambda: nn.Conv3d(3, 3, 1),
    ),
    net(
        "squeeze_excite_then_conv",
        lambda m, x: m.conv(x * m.gate(F.adaptive_avg_pool1d(x, 1)).sigmoid()),
        conv=conv,
        gate=lambda: nn.Conv1d(3, 3, 1),
    ),
    clip("bidirectional_lstm", lambda: BothDirections("all"), (1, 6, 3), time_dim=1),
    clip("bidirectional_gru_last", lambda: BothDirections("last", nn.GRU), (2, 6, 3), time_dim=1, **POOLED),
    clip("bidirectional_mean", lambda: BothDirections("mean"), (1, 6, 3), time_dim=1, **POOLED),
    net(
        "multihead_attention", attend, shape=(1, 4, 6), attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True)
    ),
    net(
        "attention_of_last",
        attend_last,
        shape=(1, 4, 6),
        attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        fields=POOLED,
    ),
    net(
        "attention_of_the_frames_themselves",
        lambda m, x: F.scaled_dot_product_attention(x, x, x)[:, -1],
        shape=(2, 6, 4),
        fields={"time_dim": 1} | POOLED,
    ),
    net("attention_by_hand", attend_by_hand, shape=(2, 6, 4), project=lambda: nn.Linear(4, 12), fields={"time_dim": 1}),
    clip("encoder", lambda: Encoder("all"), (1, 4, 6)),
    clip("encoder_last", lambda: Encoder("last", norm_first=True), (1, 4, 6), **POOLED),
    clip("encoder_mean_positions", lambda: Encoder("mean", layers=2, positions=True), (1, 4, 6), **POOLED),
    clip("encoder_class_token", lambda: Encoder("token"), (1, 4, 6), **POOLED),
    net(
        "encoder_of_conv", lambda m, x: m.encoder(m.conv(x)), conv=conv, encoder=lambda: Encoder("last"), fields=POOLED
    ),
    net("flip", lambda m, x: x.flip(2)),
    net("anticausal_sum", lambda m, x: m.conv(x).flip(-1).cumsum(-1).flip(-1), conv=conv),
    net("fourier_power", lambda m, x: torch.fft.rfft(m.conv(x), dim=2).abs().square(), conv=conv, fields=POOLED),
    net(
        "several_outputs",
        lambda m, x: {"mean": m.conv(x).mean(2), "peak": (x.amax(2), x.amin(2))},
        conv=conv,
        fields=POOLED,
    ),
    net(
        "mean_and_stream",
        lambda m, x: (m.conv(x), x.mean(2)),
        conv=conv,
        fields={"kind": ("stream", "clip"), "output_time_dim": (2, None)},
    ),
    net("mean_joined_to_frames", lambda m, x: torch.cat([x, x.mean(2, keepdim=True).expand_as(x)], 1)),
    net(
        "one_frame_squeezed_away",
        lambda m, x: m.down(x).squeeze(2),
        fields=POOLED,
        down=lambda: nn.Conv1d(3, 4, 7),
    ),
    net("last_frame", lambda m, x: m.conv(x)[:, :, -1], conv=conv, fields={"or_kind": "prefix"} | POOLED),
    net("last_frames", lambda m, x: m.conv(x)[..., -3:].mean(-1), conv=conv, fields={"or_kind": "prefix"} | POOLED),
    net("half_precision_mean", lambda m, x: m.conv(x).mean(2), conv=conv, fields={"dtype": torch.bfloat16} | POOLED),
    first_clip(
        "padded_conv",
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU()),
        lambda: PooledLinear(4),
    ),
    first_clip(
        "padded_conv3d",
        lambda: nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv3d(3, 4, 3, (1, 2, 2), 1)),
        lambda: PooledLinear(4),
        (1, 2, 6, 4, 4),
    ),
    first_clip("padded_strided_conv", lambda: nn.Conv1d(3, 4, 3, 2, 1), lambda: PooledLinear(4), stride=2),
    first_clip(
        "causal_conv", lambda: nn.Sequential(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(3, 4, 3)), lambda: PooledLinear(4)
    ),
    first_clip("memory", Memory, lambda: PooledLinear(4)),
    Sample("first_clip_squeezed_blocks", SqueezedBlocks, (1, 2, 6, 4, 4), kind="first-clip", output_time_dim=None),
]
