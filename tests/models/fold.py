"""Time folded into other axes, in any place, and arithmetic over the features of a frame."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .sample import Net, Sample, integers, parameter


class FramesThenTime(nn.Module):
    """A picture net on (B T), then a convolution over time."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveMaxPool2d(1))
        self.time = nn.Conv1d(3, 2, 3, padding=1)

    def forward(self, x):
        batch, channels, time, height, width = x.shape
        frames = x.permute(0, 2, 1, 3, 4).reshape(batch * time, channels, height, width)
        return self.time(self.picture(frames).view(batch, time, -1).permute(0, 2, 1))


class FramesThenRecurrence(nn.Module):
    """(B, T, C, H, W) by flatten and unflatten, with a GRU behind."""

    def __init__(self) -> None:
        super().__init__()
        self.picture, self.norm = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)
        self.memory, self.head = nn.GRU(4, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x):
        frames = F.silu(self.norm(self.picture(x.flatten(0, 1)))).mean(dim=(2, 3))
        return self.head(self.memory(frames.unflatten(0, x.shape[:2]))[0])


class ChannelsTimesTime(nn.Module):
    """Channels and time as the rows of one matrix: (B, C T, V) @ (V, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.time = parameter(4, 4), nn.Conv2d(3, 2, (3, 1), padding=(1, 0))

    def forward(self, x):
        n, c, t, v = x.shape
        return self.time(torch.matmul(x.reshape(n, c * t, v), self.mix).view(n, c, t, v))


class TimeFirst(nn.Module):
    """(T, B, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(3, 4), nn.Conv1d(4, 4, 3, 2, 1)

    def forward(self, x):
        return self.conv(F.relu(self.linear(x)).permute(1, 2, 0)).permute(2, 0, 1)


class JointAttention(nn.Module):
    """The joints of one frame attend to one another."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.time = nn.Conv2d(dim, dim, (3, 1), padding=(1, 0))

    def forward(self, x):  # (B, T, V, C)
        scores = self.query(x) @ self.key(x).transpose(2, 3) / math.sqrt(x.size(3))
        y = scores.softmax(-1) @ self.value(x)
        return self.time(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class FoldedAttention(nn.Module):
    """The same by nn.MultiheadAttention on (B T, V, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        batch, time, joints, dim = x.shape
        z = x.reshape(batch * time, joints, dim)
        return x + self.attention(z, z, z, need_weights=False)[0].reshape(batch, time, joints, dim)


class BlockAttention(nn.Module):
    """Attention within blocks of four frames; a last, incomplete block is dropped."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        batch, time, dim = x.shape
        blocks = time // 4
        q, k, v = self.project(x[:, : blocks * 4].reshape(batch * blocks, 4, dim)).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v)).reshape(batch, blocks * 4, dim)


class BlockMixer(nn.Module):
    """A Linear over the four frames of each block."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x):
        batch, time, dim = x.shape
        blocks = x.view(batch, time // 4, 4, dim)
        return (blocks + self.mix(blocks.transpose(2, 3)).transpose(2, 3)).view(batch, time, dim)


class Positions(nn.Module):
    """Sines of arange(T), a slice of a learned table, and a looked-up one."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.table, self.lookup = parameter(1, 400, dim), nn.Embedding(400, dim)
        self.linear = nn.Linear(dim, dim)

    def forward(self, x):
        time = x.size(1)
        position = torch.arange(time, device=x.device)
        wave = torch.sin(position.to(x.dtype)[:, None] * torch.tensor([1.0, 0.5, 0.25, 0.125]))
        return self.linear(x + self.table[:, :time] + wave) * torch.sigmoid(self.lookup(position))


class Tokens(nn.Module):
    """Integer frames, embedded, convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(11, 4), nn.Conv1d(4, 3, 3, padding=2, dilation=2)

    def forward(self, tokens):
        return self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)


class Spectrogram(nn.Module):
    """(B, 1, F, T): strided 2-d convolutions, frequency folded into features, a GRU, log-probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(1, 2, 3, (2, 2), 1),
            nn.BatchNorm2d(2),
            nn.Hardtanh(0, 20),
            nn.Conv2d(2, 2, (3, 5), (2, 1), (1, 2)),
        )
        self.memory, self.head = nn.GRU(4, 3), nn.Linear(3, 4)

    def forward(self, x):
        z = self.convs(x)
        z = z.permute(3, 0, 1, 2).flatten(2)
        return F.log_softmax(self.head(self.memory(z)[0]), -1).transpose(0, 1)


def rate_halved(m, x):
    return m.linear(x.reshape(x.shape[0], x.shape[1] // 2, x.shape[2] * 2))


SAMPLES = [
    Sample("fold_frames_then_time", FramesThenTime, (2, 2, 7, 4, 4)),
    Sample("fold_frames_then_recurrence", FramesThenRecurrence, (2, 7, 2, 4, 4), time_dim=1, unbounded=True),
    Sample("fold_channels_times_time", ChannelsTimesTime, (2, 3, 7, 4)),
    Sample("fold_time_first", TimeFirst, (10, 2, 3), time_dim=0, batch_dim=1),
    Sample(
        "fold_time_last_linear",
        lambda: Net(lambda m, x: m.linear(x.mT).mT, linear=nn.Linear(5, 3)),
        (2, 5, 9),
        time_dim=-1,
    ),
    Sample(
        "fold_vectors",
        lambda: Net(lambda m, x: m.conv(x.unsqueeze(1)).squeeze(1), conv=nn.Conv1d(1, 1, 4, padding=3)),
        (2, 12),
        time_dim=1,
    ),
    Sample(
        "fold_einsum",
        lambda: Net(
            lambda m, x: m.time(torch.einsum("bctv,vw,cd->bdtw", x, m.joints, m.mix)),
            joints=parameter(4, 5),
            mix=parameter(2, 3),
            time=nn.Conv2d(3, 2, (3, 1)),
        ),
        (1, 2, 8, 4),
    ),
    Sample(
        "fold_filterbank", lambda: Net(lambda m, x: (m.bank @ x).clamp(min=1e-3).log(), bank=parameter(4, 6)), (2, 6, 9)
    ),
    Sample(
        "fold_tensordot",
        lambda: Net(lambda m, x: torch.tensordot(x, m.mix, dims=([2], [0])), mix=parameter(3, 4)),
        (2, 8, 3),
        time_dim=1,
    ),
    Sample(
        "fold_outer_product",
        lambda: Net(lambda m, x: (x.unsqueeze(3) @ x.unsqueeze(2)).flatten(2)),
        (2, 8, 3),
        time_dim=1,
    ),
    Sample(
        "fold_bilinear",
        lambda: Net(lambda m, x: m.form(x, x.flip(-1)), form=nn.Bilinear(3, 3, 2)),
        (2, 8, 3),
        time_dim=1,
    ),
    Sample(
        "fold_features_convolved",
        lambda: Net(
            lambda m, x: m.conv(x.flatten(0, 1).unsqueeze(1)).mean(1).unflatten(0, x.shape[:2]),
            conv=nn.Conv1d(1, 2, 3, padding=1),
        ),
        (2, 8, 5),
        time_dim=1,
    ),
    Sample("fold_joint_attention", JointAttention, (1, 7, 3, 4), time_dim=1),
    Sample("fold_multihead_attention", FoldedAttention, (2, 6, 3, 4), time_dim=1),
    Sample("fold_block_attention", BlockAttention, (1, 12, 4), time_dim=1, length=32, multiple=4),
    Sample("fold_block_mixer", BlockMixer, (1, 12, 3), time_dim=1, length=32, multiple=4),
    Sample(
        "fold_pairs_of_frames",
        lambda: Net(rate_halved, linear=nn.Linear(6, 3)),
        (1, 10, 3),
        time_dim=1,
        length=26,
        multiple=2,
    ),
    Sample("fold_positions", Positions, (2, 8, 4), time_dim=1),
    Sample("fold_tokens", Tokens, (2, 9), time_dim=1, draws={0: integers(11)}),
    Sample(
        "fold_one_hot",
        lambda: Net(lambda m, x: m.linear(F.one_hot(x, 5).to(torch.float32)), linear=nn.Linear(5, 2)),
        (2, 9),
        time_dim=1,
        draws={0: integers(5)},
    ),
    Sample("fold_spectrogram", Spectrogram, (1, 1, 8, 14), time_dim=3, output_time_dim=1, unbounded=True),
    Sample(
        "fold_channel_shuffle",
        lambda: Net(
            lambda m, x: m.conv(x.view(x.size(0), 2, -1, x.size(2)).transpose(1, 2).reshape_as(x)),
            conv=nn.Conv1d(4, 4, 3, groups=2),
        ),
        (2, 4, 9),
    ),
    Sample(
        "fold_space_to_features",
        lambda: Net(lambda m, x: m.linear(x.movedim(2, 1).flatten(2)), linear=nn.Linear(12, 3)),
        (2, 3, 7, 2, 2),
        output_time_dim=1,
    ),
    Sample(
        "fold_shape_arithmetic",
        lambda: Net(
            lambda m, x: m.conv(x.view(x.size(0), -1, x.size(2), 2, x.size(3) // 2).sum(-1).flatten(1, 1).amax(3)),
            conv=nn.Conv1d(4, 2, 3),
        ),
        (1, 4, 9, 4),
    ),
]
