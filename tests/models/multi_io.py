"""Several inputs and outputs, of one rate or of many, conditioning, and outputs that are inputs."""

import torch
import torch.nn.functional as F
from torch import nn

from .sample import Net, Net2, Sample, integers


class Film(nn.Module):
    """A condition without time scales and shifts each frame."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.condition = nn.Conv1d(3, 4, 3, padding=1), nn.Linear(5, 8)

    def forward(self, x, condition):
        scale, shift = self.condition(condition).unsqueeze(-1).chunk(2, dim=1)
        return F.relu(self.conv(x) * scale + shift)


class SlowAndFast(nn.Module):
    """Two clocks: the fast pathway comes down to the slow one's rate."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = nn.Conv1d(3, 4, 3, padding=1), nn.Conv1d(2, 3, 5, padding=2)
        self.lateral, self.out = nn.Conv1d(3, 3, 7, stride=4, padding=3), nn.Conv1d(7, 2, 3, padding=1)

    def forward(self, slow, fast):
        fast = F.relu(self.fast(fast))
        return self.out(torch.cat([F.relu(self.slow(slow)), self.lateral(fast)], 1))


class SlowFromFast(nn.Module):
    """Both pathways read the same input, one every fourth frame of it."""

    def __init__(self) -> None:
        super().__init__()
        self.slow, self.fast = (
            nn.Conv3d(2, 3, (1, 3, 3), padding=(0, 1, 1)),
            nn.Conv3d(2, 2, (5, 1, 1), padding=(2, 0, 0)),
        )
        self.lateral, self.out = (
            nn.Conv3d(2, 2, (5, 1, 1), (4, 1, 1), (2, 0, 0)),
            nn.Conv3d(5, 2, (3, 1, 1), padding=(1, 0, 0)),
        )

    def forward(self, x):
        return self.out(torch.cat([self.slow(x[:, :, ::4]), self.lateral(F.relu(self.fast(x)))], 1)).mean(dim=(3, 4))


class Heads(nn.Module):
    """A trunk with heads of different delay, rate and shape, in a nest of containers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv1d(3, 4, 3, padding=1)
        self.now, self.later, self.slow = nn.Conv1d(4, 2, 1), nn.Conv1d(4, 2, 7, padding=3), nn.Conv1d(4, 3, 4, 2, 1)

    def forward(self, x):
        z = F.relu(self.trunk(x))
        return {"now": self.now(z), "more": [self.later(z), (self.slow(z), z.mean(1))]}


class EarlyAndDouble(nn.Module):
    """One output at the input's rate, one at twice that."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 2, 3), nn.ConvTranspose1d(2, 2, 4, 2, 1)

    def forward(self, x):
        y = self.a(x)
        return y, self.b(y)


class AnyNumber(nn.Module):
    """Inputs as *args."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv1d(2, 2, k, padding=k // 2) for k in (1, 3, 5))

    def forward(self, *clips):
        return sum(conv(x) for conv, x in zip(self.convs, clips, strict=True))


def late_fusion(m, x, y):
    return m.out(torch.cat([m.video(x).mean((3, 4)), m.audio(y)], 1))


SAMPLES = [
    Sample(
        "inputs_of_different_reach",
        lambda: Net2(
            lambda m, x, y: m.a(x) + m.b(y), a=nn.Conv1d(2, 3, 5, padding=2), b=nn.Conv1d(4, 3, 2, padding="same")
        ),
        [(2, 2, 9), (2, 4, 9)],
    ),
    Sample(
        "inputs_fused_late",
        lambda: Net2(
            late_fusion,
            video=nn.Conv3d(1, 2, 3, padding=1),
            audio=nn.Conv1d(3, 2, 3, padding=1),
            out=nn.Conv1d(4, 2, 3),
        ),
        [(1, 1, 9, 3, 3), (1, 3, 9)],
    ),
    Sample(
        "inputs_of_different_layout",
        lambda: Net2(
            lambda m, x, y: m.conv(x).mT * m.linear(y),
            conv=nn.Conv1d(3, 4, 3, padding=2, dilation=2),
            linear=nn.Linear(2, 4),
        ),
        [(2, 3, 9), (2, 9, 2)],
        time_dim=(2, 1),
        output_time_dim=1,
    ),
    Sample("inputs_condition", Film, [(2, 3, 9), (2, 5)], time_dim=(2, None)),
    Sample(
        "inputs_tokens_and_features",
        lambda: Net2(
            lambda m, x, y: m.conv((m.embed(x) + y).mT), embed=nn.Embedding(7, 4), conv=nn.Conv1d(4, 2, 3, 2, 1)
        ),
        [(2, 10), (2, 10, 4)],
        time_dim=1,
        output_time_dim=2,
        draws={0: integers(7)},
    ),
    Sample("inputs_slow_and_fast", SlowAndFast, [(1, 3, 6), (1, 2, 24)], length=13),
    Sample("inputs_any_number", AnyNumber, [(1, 2, 9)] * 3),
    Sample("input_every_fourth_frame", SlowFromFast, (1, 2, 16, 3, 3), length=37),
    Sample("outputs_nested", Heads, (2, 3, 10), output_time_dim=(2, 2, 2, 1)),
    Sample("outputs_of_two_rates", EarlyAndDouble, (1, 3, 9)),
    Sample(
        "outputs_with_input", lambda: Net(lambda m, x: (x, m.conv(x)), conv=nn.Conv1d(3, 2, 4, padding=1)), (1, 3, 9)
    ),
    Sample(
        "outputs_repeated",
        lambda: Net(lambda m, x: (lambda y: [y, y, y[:, :1]])(m.conv(x)), conv=nn.Conv1d(3, 2, 3)),
        (1, 3, 9),
    ),
    Sample(
        "outputs_single_in_tuple", lambda: Net(lambda m, x: (m.conv(x).relu(),), conv=nn.Conv1d(3, 2, 3)), (1, 3, 9)
    ),
    Sample("identity", nn.Identity, (2, 3, 8)),
    Sample("pointwise_only", lambda: nn.Sequential(nn.Conv1d(3, 2, 1), nn.Sigmoid()), (2, 3, 8)),
]
