"""Convolutions and transposed convolutions: every stride, dilation, grouping and padding."""

import torch
import torch.nn.functional as F
from torch import nn

from .sample import Net, Sample, parameter


def conv1d(name, *geometry, shape=(2, 3, 11), channels=4, length=0, kind="stream", lag=0, **options):
    return Sample(
        f"conv1d_{name}",
        lambda: nn.Conv1d(shape[1], channels, *geometry, **options),
        shape,
        kind=kind,
        length=length,
        lag=lag,
    )


def conv2d(name, *geometry, shape=(2, 3, 10, 5), time_dim=2, channels=4, **options):
    return Sample(
        f"conv2d_{name}", lambda: nn.Conv2d(shape[1], channels, *geometry, **options), shape, time_dim=time_dim
    )


def conv3d(name, *geometry, shape=(1, 4, 8, 4, 5), time_dim=2, channels=4, **options):
    return Sample(
        f"conv3d_{name}", lambda: nn.Conv3d(shape[1], channels, *geometry, **options), shape, time_dim=time_dim
    )


def transposed1d(name, *geometry, shape=(2, 4, 9), channels=4, exact=True, **options):
    return Sample(
        f"transposed1d_{name}",
        lambda: nn.ConvTranspose1d(shape[1], channels, *geometry, **options),
        shape,
        exact=exact,
    )


class Bottleneck(nn.Module):
    """The time axis changes place: (batch, time, features) outside, channels first inside."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.reduce = nn.Linear(6, width)
        self.mix = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.expand = nn.Linear(width, 6)

    def forward(self, x):
        hidden = F.relu(self.reduce(x)).transpose(1, 2)
        return self.expand(self.mix(hidden).transpose(1, 2))


class Functional(nn.Module):
    """F.conv1d on bare parameters, with string padding and a stride read from an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.bias, self.hop = parameter(5, 2, 4), parameter(5), 2

    def forward(self, x):
        y = F.conv1d(x, self.kernel, self.bias, padding="valid")
        return F.conv1d(y, self.kernel[:2].mean(1, keepdim=True).expand(2, 5, 4), stride=self.hop, padding=3)


class Deltas(nn.Module):
    """Differences of frames by a filter that is repeated for every row of the batch (torchaudio's deltas)."""

    def forward(self, x):
        flat = F.pad(x.reshape(1, -1, x.shape[-1]), (2, 2), mode="replicate")
        filters = torch.arange(-2, 3, 1.0).repeat(flat.shape[1], 1, 1)
        return (F.conv1d(flat, filters, groups=flat.shape[1]) / 10).reshape(x.shape)


SAMPLES = [
    Sample("conv_repeated_over_the_batch", Deltas, (2, 3, 9)),
    conv2d("same_uneven", (4, 2), padding="same"),
    conv2d("same_uneven_in_space", (3, 4), padding="same", dilation=(1, 3)),
    conv1d("valid", 4),
    conv1d("partial_padding", 5, padding=1),
    conv1d("full_padding", 3, padding=2),
    conv1d("beyond_reach", 2, padding=4),
    conv1d("beyond_reach_strided", 3, stride=2, padding=5),
    conv1d("same", 5, padding="same"),
    conv1d("same_even_dilated", 4, padding="same", dilation=3, length=33),
    conv1d("stride_dilation", 3, stride=3, dilation=2, padding=4),
    conv1d("stride_exceeds_kernel", 2, stride=5, padding=1, length=34),
    conv1d("pointwise_strided", 1, stride=3),
    conv1d("pointwise_padded", 1, padding=2),
    conv1d("depthwise", 4, groups=3, channels=6, padding=2),
    conv1d("long_kernel", 9, padding=4, bias=False, shape=(1, 2, 12)),
    conv1d("replicate", 5, padding=3, padding_mode="replicate"),
    conv1d("replicate_beyond_reach", 3, padding=4, padding_mode="replicate", stride=2, lag=2),
    conv1d("reflect", 5, padding=2, padding_mode="reflect"),
    conv1d("reflect_strided", 4, padding=3, padding_mode="reflect", stride=2, lag=3),
    conv1d("reflect_beyond_reach", 3, padding=4, padding_mode="reflect", lag=6),
    conv1d("circular", 3, padding=1, padding_mode="circular", kind="clip", shape=(1, 3, 7)),
    conv2d("time_and_height", (3, 2), stride=(2, 1), padding=(1, 0)),
    conv2d("same_dilated", (3, 3), padding="same", dilation=(2, 1)),
    conv2d("replicate_both", 3, padding=(2, 1), padding_mode="replicate"),
    conv2d("time_last", (3, 4), stride=2, padding=(1, 2), shape=(2, 1, 6, 11), time_dim=3),
    conv2d("spatial_only", (1, 3), stride=(1, 2), padding=(0, 1)),
    conv2d("grouped_strided", (5, 1), stride=(3, 1), padding=(2, 0), groups=2, shape=(1, 4, 12, 3)),
    conv3d("same", 3, padding=1),
    conv3d("strided", 3, stride=(2, 1, 2), padding=(1, 1, 0)),
    conv3d("dilated_grouped", (3, 2, 2), dilation=(2, 1, 1), padding=(3, 0, 0), groups=2),
    conv3d("temporal", (4, 1, 1), padding=(1, 0, 0)),
    conv3d("time_last", (2, 2, 3), padding=(0, 1, 2), shape=(1, 2, 4, 4, 8), time_dim=-1),
    Sample(
        "conv_strides_stack",
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, 2, 1), nn.ReLU(), nn.Conv1d(4, 4, 4, 3, 2), nn.ELU(), nn.Conv1d(4, 3, 3, 1, 1)
        ),
        (1, 2, 24),
        length=53,
    ),
    Sample(
        "conv_paddings_stack",
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 3, padding=4), nn.Conv1d(3, 3, 4), nn.Tanh(), nn.Conv1d(3, 2, 3, stride=2, padding=3)
        ),
        (1, 2, 12),
    ),
    Sample(
        "conv_unbatched",
        lambda: nn.Conv1d(3, 2, 4, stride=2, padding=1),
        (3, 11),
        time_dim=1,
        batch_dim=None,
        options={"batch_dim": None},
    ),
    Sample("conv_features_last", Bottleneck, (2, 10, 6), time_dim=1),
    Sample("conv_functional", Functional, (1, 2, 12), exact=False),
    transposed1d("double", 4, stride=2, padding=1),
    transposed1d("output_padding", 3, stride=2, padding=1, output_padding=1),
    transposed1d("longer", 3),
    transposed1d("cropped", 5, stride=2, padding=4),
    transposed1d("gaps", 2, stride=3, output_padding=1),
    transposed1d("dilated_grouped", 3, stride=3, dilation=2, groups=2, padding=1, bias=False, exact=False),
    Sample("transposed2d_time_and_height", lambda: nn.ConvTranspose2d(2, 3, (3, 3), (2, 1), (1, 1)), (1, 2, 8, 4)),
    Sample(
        "transposed2d_time_last", lambda: nn.ConvTranspose2d(2, 3, (3, 4), (2, 2), (0, 1)), (1, 2, 3, 8), time_dim=3
    ),
    Sample("transposed3d", lambda: nn.ConvTranspose3d(2, 2, (3, 2, 2), (2, 2, 1), (1, 0, 0)), (1, 2, 6, 3, 3)),
    Sample("transposed3d_spatial", lambda: nn.ConvTranspose3d(2, 3, (1, 3, 3), (1, 2, 2), (0, 1, 1)), (1, 2, 6, 3, 3)),
    Sample(
        "transposed_after_delay",
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 5, padding=1), nn.ReLU(), nn.ConvTranspose1d(3, 3, 4, 2, 1), nn.Conv1d(3, 2, 3, padding=1)
        ),
        (1, 2, 12),
    ),
    Sample(
        "transposed_between_strides",
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3, 2, 1), nn.ConvTranspose1d(3, 4, 4, 4, 0), nn.Conv1d(4, 2, 3, 2, 1)),
        (1, 2, 12),
        length=31,
    ),
    Sample(
        "transposed_causal_trim",
        lambda: Net(lambda m, x: m.up(x)[..., : x.shape[-1] * 2], up=nn.ConvTranspose1d(3, 2, 4, 2)),
        (1, 3, 9),
    ),
]
