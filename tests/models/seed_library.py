"""What each name of continual-inference stands for in plain PyTorch: nets that the other families lack, and the table.

`ROWS` tells for every module of that library which nets of the collection do the same. `LAYERS` are the layers of
torch.nn that it converts as they are.
"""

import torch
from torch import nn

from .sample import Net, Sample, parameter
from .window import POOLED, Encoder


def net(name, function, shape=(2, 3, 9), fields=(), **parts):
    return Sample(f"seed_{name}", lambda: Net(function, **{k: make() for k, make in parts.items()}), shape,
                  **dict(fields))  # fmt: skip


def pooled(name, pool, shape):
    return Sample(
        f"seed_{name}", lambda: nn.Sequential(nn.Conv2d(2, 3, 1) if len(shape) == 4 else nn.Conv3d(2, 3, 1), pool),
        shape, kind="clip", output_time_dim=2,
    )  # fmt: skip


def encoder(name, **options):
    return Sample(f"seed_{name}", lambda: Encoder("last", **options), (1, 4, 6), kind="clip", **POOLED)


class Chosen(nn.Module):
    """One of two branches of different reach: by a flag of the module, or frame by frame by the data."""

    def __init__(self, by_data: bool) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv1d(3, 3, 5, padding=2), nn.Conv1d(3, 3, 3, padding=1)
        self.by_data, self.accurate = by_data, True

    def forward(self, x):
        if self.by_data:
            loud = x.abs().amax(1, keepdim=True) > 1.5
            return torch.where(loud, self.wide(x), self.narrow(x))
        return self.wide(x) if self.accurate else self.narrow(x)


class Dispatched(nn.Module):
    """Streams of different reach, copied and grouped in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 2, 5, padding=2), nn.Conv1d(3, 2, 3, padding=1)
        self.outer, self.inner = nn.Conv1d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 1)

    def forward(self, x):
        streams = [self.a(x), self.b(x)]
        one, (two, three) = streams[1], (streams[0], streams[1])
        return torch.cat([self.outer(one), self.inner(two) * three], 1)


class Recycled(nn.Module):
    """Positions that begin again after so many frames."""

    def __init__(self, learned: bool, count: int = 5) -> None:
        super().__init__()
        angle = torch.arange(count)[:, None] * 0.3 ** torch.arange(4)
        self.table = parameter(count, 4) if learned else nn.Buffer(angle.sin())
        self.count = count

    def forward(self, x):
        return x + self.table[torch.arange(x.shape[2]) % self.count].T


class Inception3d(nn.Module):
    """Branches of 1, 3 and 5 frames, and a pooled one, joined by channel."""

    def __init__(self) -> None:
        super().__init__()

        def part(*layers):
            return nn.Sequential(*layers, nn.BatchNorm3d(2), nn.ReLU())

        self.branches = nn.ModuleList([
            part(nn.Conv3d(3, 2, 1)),
            part(nn.Conv3d(3, 2, 1), nn.Conv3d(2, 2, 3, padding=1)),
            part(nn.Conv3d(3, 2, 1), nn.Conv3d(2, 2, 5, padding=2)),
            part(nn.MaxPool3d((1, 3, 3), 1, (0, 1, 1)), nn.Conv3d(3, 2, 1)),
        ])  # fmt: skip

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


def attend(first):
    """Attention of one query, counted from the end, over the whole clip."""

    def function(m, x):
        last = first + 1 or None
        return m.attention(x.mT[:, first:last], x.mT, x.mT, need_weights=False)[0].squeeze(1)

    return function


def attention():
    return nn.MultiheadAttention(4, 2, batch_first=True)


SAMPLES = [
    net("add_and_multiply", lambda m, x: (x + 3) * 0.5),
    net("constants", lambda m, x: torch.cat([torch.full_like(x, 2.5), torch.zeros_like(x), torch.ones_like(x)], 1)),
    net("linear_on_channels", lambda m, x: m.linear(x.movedim(1, -1)).movedim(-1, 1), linear=lambda: nn.Linear(3, 4)),
    net("reshape", lambda m, x: x.reshape(x.shape[0], 2, 3, x.shape[2], 4).flatten(1, 2).mean(-1), (2, 6, 9, 4)),
    net("function", lambda m, x: (lambda frame: frame.sin() / (1 + frame.exp()))(x)),
    net("function_of_each_frame", lambda m, x: torch.stack([m.fn(x[:, :, t]) for t in range(x.shape[2])], 2),
        fn=lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU())),
    net("reduce", lambda m, x: torch.maximum(m.a(x) * m.b(x), m.a(x) + m.b(x)),
        a=lambda: nn.Conv1d(3, 2, 5, padding=2), b=lambda: nn.Conv1d(3, 2, 3, padding=1)),
    Sample("seed_chosen_by_flag", lambda: Chosen(False), (2, 3, 9)),
    Sample("seed_chosen_by_data", lambda: Chosen(True), (2, 3, 9)),
    Sample("seed_dispatched", Dispatched, (2, 3, 9)),
    Sample("seed_inception", Inception3d, (1, 3, 7, 4, 4)),
    Sample("seed_recycled_positions", lambda: Recycled(False), (2, 4, 9)),
    Sample("seed_recycled_learned", lambda: Recycled(True), (2, 4, 9)),
    pooled("adaptive_average_2d", nn.AdaptiveAvgPool2d((1, 2)), (1, 2, 7, 4)),
    pooled("adaptive_maximum_2d", nn.AdaptiveMaxPool2d(1), (1, 2, 7, 4)),
    pooled("adaptive_average_3d", nn.AdaptiveAvgPool3d(1), (1, 2, 7, 4, 4)),
    pooled("adaptive_maximum_3d", nn.AdaptiveMaxPool3d((1, 2, 1)), (1, 2, 7, 4, 4)),
    net("attention_of_earlier", attend(-3), (1, 4, 6), attention=attention, fields={"kind": "clip"} | POOLED),
    encoder("encoder_two_layers", layers=2),
    encoder("encoder_three_pre_norm", layers=3, norm_first=True),
]  # fmt: skip


def _layer(layer, shape=(2, 4, 9), time_dim=2):
    return layer, shape, time_dim


class FrameNorm(nn.Module):
    """A norm over each frame by itself: time beside the batch."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


_PICTURES, _CUBES = (2, 4, 7, 3), (1, 4, 6, 3, 3)
# name in torch.nn -> (module, example, time axis): 27 activations, 8 norms, 6 dropouts
LAYERS = {
    "Threshold": _layer(lambda: nn.Threshold(0.1, -0.2)), "ReLU": _layer(nn.ReLU), "RReLU": _layer(nn.RReLU),
    "Hardtanh": _layer(nn.Hardtanh), "ReLU6": _layer(nn.ReLU6), "Sigmoid": _layer(nn.Sigmoid),
    "Hardsigmoid": _layer(nn.Hardsigmoid), "Tanh": _layer(nn.Tanh), "SiLU": _layer(nn.SiLU),
    "Hardswish": _layer(nn.Hardswish), "ELU": _layer(nn.ELU), "CELU": _layer(nn.CELU), "SELU": _layer(nn.SELU),
    "GLU": _layer(lambda: nn.GLU(1)), "GELU": _layer(nn.GELU), "Hardshrink": _layer(nn.Hardshrink),
    "LeakyReLU": _layer(nn.LeakyReLU), "LogSigmoid": _layer(nn.LogSigmoid), "Softplus": _layer(nn.Softplus),
    "Softshrink": _layer(nn.Softshrink), "PReLU": _layer(lambda: nn.PReLU(4)), "Softsign": _layer(nn.Softsign),
    "Tanhshrink": _layer(nn.Tanhshrink), "Softmin": _layer(lambda: nn.Softmin(1)),
    "Softmax": _layer(lambda: nn.Softmax(1)), "Softmax2d": _layer(nn.Softmax2d, _PICTURES),
    "LogSoftmax": _layer(lambda: nn.LogSoftmax(1)),
    "BatchNorm1d": _layer(lambda: nn.BatchNorm1d(4)), "BatchNorm2d": _layer(lambda: nn.BatchNorm2d(4), _PICTURES),
    "BatchNorm3d": _layer(lambda: nn.BatchNorm3d(4), _CUBES),
    "GroupNorm": _layer(lambda: FrameNorm(nn.GroupNorm(2, 4)), _CUBES),
    "InstanceNorm1d": _layer(lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
    "InstanceNorm2d": _layer(lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), _PICTURES),
    "InstanceNorm3d": _layer(lambda: nn.InstanceNorm3d(4, affine=True, track_running_stats=True), _CUBES),
    "LayerNorm": _layer(lambda: nn.LayerNorm(4), (2, 9, 4), 1),
    "Dropout": _layer(nn.Dropout), "Dropout1d": _layer(nn.Dropout1d), "Dropout2d": _layer(nn.Dropout2d, _PICTURES),
    "Dropout3d": _layer(nn.Dropout3d, _CUBES), "AlphaDropout": _layer(nn.AlphaDropout),
    "FeatureAlphaDropout": _layer(nn.FeatureAlphaDropout),
}  # fmt: skip
LAYER_SAMPLES = [Sample(f"layer_{name}", *row) for name, row in LAYERS.items()]

# name in continual-inference -> nets of the collection
ROWS = {
    "Conv1d": ("conv1d_valid", "conv1d_partial_padding", "conv1d_stride_dilation", "conv1d_replicate"),
    "Conv2d": ("conv2d_time_and_height", "conv2d_grouped_strided"),
    "Conv3d": ("conv3d_same", "conv3d_strided"),
    "AvgPool1d": ("pool_avg1d", "pool_avg1d_without_padding_counted", "pool_avg1d_ceil"),
    "AvgPool2d": ("pool_avg2d_divisor",),
    "AvgPool3d": ("pool_avg3d", "pool_avg3d_ceil"),
    "MaxPool1d": ("pool_max1d", "pool_max1d_dilated_ceil"),
    "MaxPool2d": ("pool_max2d_ceil", "pool_max2d_dilated"),
    "MaxPool3d": ("pool_max3d", "pool_max3d_spatial"),
    "AdaptiveAvgPool2d": ("seed_adaptive_average_2d",),
    "AdaptiveAvgPool3d": ("seed_adaptive_average_3d", "window_squeeze_excite"),
    "AdaptiveMaxPool2d": ("seed_adaptive_maximum_2d",),
    "AdaptiveMaxPool3d": ("seed_adaptive_maximum_3d",),
    "Linear": ("seed_linear_on_channels", "layernorm_features"),
    "Identity": ("identity",),
    "Add": ("seed_add_and_multiply",),
    "Multiply": ("seed_add_and_multiply",),
    "RNN": ("recurrent_rnn_tanh", "recurrent_rnn_relu"),
    "GRU": ("recurrent_gru", "recurrent_channels_first", "window_bidirectional_gru_last"),
    "LSTM": ("recurrent_lstm", "recurrent_lstm_stacked", "window_bidirectional_lstm"),
    "TransformerEncoder": ("window_encoder_last", "seed_encoder_two_layers", "seed_encoder_three_pre_norm"),
    "TransformerEncoderLayerFactory": ("window_encoder_last",),
    "SingleOutputTransformerEncoderLayer": ("window_encoder_last",),
    "RetroactiveTransformerEncoderLayer": ("window_encoder",),
    "SingleOutputMultiheadAttention": ("window_attention_of_last", "seed_attention_of_earlier"),
    "RetroactiveMultiheadAttention": ("window_multihead_attention",),
    "RecyclingPositionalEncoding": ("seed_recycled_positions", "seed_recycled_learned"),
    "Sequential": ("conv_strides_stack", "conv_paddings_stack"),
    "Broadcast": ("inception",),
    "Parallel": ("seed_dispatched", "inception_strided"),
    "ParallelDispatch": ("seed_dispatched",),
    "Reduce": ("seed_reduce", "join_maximum"),
    "BroadcastReduce": ("seed_inception", "join_strides"),
    "Residual": ("residual_padded", "residual_centre", "residual_lagging", "residual_leading", "mobile_block_3d"),
    "Conditional": ("seed_chosen_by_flag", "seed_chosen_by_data"),
    "Delay": ("residual_padded", "pad_delay_line"),
    "Skip": ("slice_start", "residual_leading"),
    "Reshape": ("seed_reshape",),
    "Lambda": ("seed_function", "seed_function_of_each_frame"),
    "Constant": ("seed_constants",),
    "Zero": ("seed_constants",),
    "One": ("seed_constants",),
    "continual": ("conv_strides_stack", "unet_learned"),
    "forward_stepping": ("pointwise_only",),
}
