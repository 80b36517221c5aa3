"""The same kinds of net in float16, bfloat16 and float64."""

import torch
import torch.nn.functional as F
from torch import nn

from .sample import Net, Sample


def typed(name, build, dtype, shape=(2, 3, 10), **fields):
    return Sample(f"{str(dtype).removeprefix('torch.')}_{name}", build, shape, dtype=dtype, **fields)


def conv_stack():
    return nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 3, stride=2, padding=2), nn.Tanh()
    )


def residual():
    return Net(lambda m, x: x + m.out(F.gelu(m.norm(m.conv(x).mT))).mT, conv=nn.Conv1d(3, 4, 5, padding=2),
               norm=nn.LayerNorm(4), out=nn.Linear(4, 3))  # fmt: skip


def pools():
    return nn.Sequential(nn.AvgPool1d(3, 1, 1), nn.MaxPool1d(2, ceil_mode=True), nn.ConvTranspose1d(3, 2, 4, 2, 1))


def memory():
    return Net(lambda m, x: m.memory(x.mT)[0].mT, memory=nn.GRU(3, 4, batch_first=True))


SAMPLES = [
    typed("conv_stack", conv_stack, torch.float16),
    typed("conv_stack", conv_stack, torch.bfloat16),
    typed("conv_stack", conv_stack, torch.float64),
    typed("residual", residual, torch.float16),
    typed("residual", residual, torch.bfloat16),
    typed("residual", residual, torch.float64),
    typed("pools", pools, torch.float16, length=24),
    typed("pools", pools, torch.float64, length=24),
    typed("memory", memory, torch.float64, unbounded=True),
    typed("memory", memory, torch.bfloat16, unbounded=True),
    typed("sum", lambda: Net(lambda m, x: x.cumsum(2) * 0.1), torch.float64, unbounded=True),
    typed("linear_upsample", lambda: nn.Upsample(scale_factor=2, mode="linear"), torch.float64),
    typed("reflect", lambda: nn.Conv1d(3, 2, 5, padding=2, padding_mode="reflect"), torch.float16),
]
