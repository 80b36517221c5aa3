"""Average, maximum and power-average pools."""

import torch
import torch.nn.functional as F
from torch import nn

from .sample import Net, Sample


def pool(name, build, shape=(2, 3, 11), **fields):
    return Sample(f"pool_{name}", build, shape, **fields)


SAMPLES = [
    pool("avg1d", lambda: nn.AvgPool1d(3, 1, 1)),
    pool("avg1d_default_stride", lambda: nn.AvgPool1d(4), length=30),
    pool("avg1d_without_padding_counted", lambda: nn.AvgPool1d(4, 2, 2, count_include_pad=False)),
    pool("avg1d_ceil", lambda: nn.AvgPool1d(3, 2, ceil_mode=True), length=28),
    pool("avg1d_ceil_padded", lambda: nn.AvgPool1d(4, 3, 1, ceil_mode=True), length=29),
    pool(
        "avg1d_ceil_without_padding_counted",
        lambda: nn.AvgPool1d(4, 3, 2, ceil_mode=True, count_include_pad=False),
        length=30,
    ),
    pool("avg2d_divisor", lambda: nn.AvgPool2d((3, 2), 1, divisor_override=4), (1, 2, 9, 4)),
    pool(
        "avg2d_ceil_divisor", lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=5), (1, 2, 9, 4), length=24
    ),
    pool("avg2d_time_last", lambda: nn.AvgPool2d((1, 3), (1, 1), (0, 1)), (1, 2, 3, 9), time_dim=3),
    pool("avg3d", lambda: nn.AvgPool3d((2, 2, 3), (1, 2, 1), (1, 0, 1), count_include_pad=False), (1, 2, 7, 4, 4)),
    pool("avg3d_ceil", lambda: nn.AvgPool3d(2, ceil_mode=True), (1, 2, 7, 4, 3), length=19),
    pool("max1d", lambda: nn.MaxPool1d(3, 1, 1)),
    pool("max1d_halves", lambda: nn.MaxPool1d(2), length=26),
    pool("max1d_dilated_ceil", lambda: nn.MaxPool1d(3, 2, 1, dilation=2, ceil_mode=True), length=28),
    pool("max2d_ceil", lambda: nn.MaxPool2d((3, 2), (2, 2), (1, 1), ceil_mode=True), (1, 2, 10, 5), length=27),
    pool("max2d_dilated", lambda: nn.MaxPool2d((2, 1), 1, dilation=(3, 1)), (1, 2, 10, 3)),
    pool("max3d_spatial", lambda: nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)), (1, 2, 7, 4, 4)),
    pool("max3d", lambda: nn.MaxPool3d(3, 2, 1), (1, 2, 8, 4, 4), length=23),
    pool("lp1d", lambda: Net(lambda m, x: m.pool(x.abs() + 0.1), pool=nn.LPPool1d(2, 3, 2))),
    pool(
        "lp2d_ceil",
        lambda: Net(lambda m, x: m.pool(x.abs()), pool=nn.LPPool2d(3, (2, 2), ceil_mode=True)),
        (1, 2, 9, 4),
        length=24,
    ),
    pool(
        "adaptive_space",
        lambda: nn.Sequential(nn.Conv3d(2, 3, 3, padding=1), nn.AdaptiveAvgPool3d((None, 1, 2))),
        (1, 2, 7, 4, 4),
    ),
    # torch traces its output size as a number: it pools to the traced length, so it is a clip of that length
    pool("adaptive_max_height", lambda: nn.AdaptiveMaxPool2d((None, 2)), (1, 2, 9, 5)),
    pool("minimum", lambda: Net(lambda m, x: -F.max_pool1d(-x, 4, 1, 2))),
    pool("causal_maximum", lambda: Net(lambda m, x: F.max_pool1d(F.pad(x, (4, 0), value=-torch.inf), 5, 1))),
    pool("high_pass", lambda: Net(lambda m, x: x - F.avg_pool1d(x, 5, 1, 2))),
    pool(
        "relu_before_padded_maximum", lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.LeakyReLU(), nn.MaxPool1d(4, 2, 2))
    ),
    pool("range", lambda: Net(lambda m, x: F.max_pool1d(x, 3, 1, 1) + F.max_pool1d(-x, 3, 1, 1))),
]
