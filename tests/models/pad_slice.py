"""Padding, cropping, slicing, shifting and joining along time."""

import torch
import torch.nn.functional as F
from torch import nn

from .sample import Net, Sample, parameter


def net(name, function, shape=(2, 3, 10), fields=(), **parts):
    """The parts are given as factories, so that each build makes its own."""
    return Sample(name, lambda: Net(function, **{k: make() for k, make in parts.items()}), shape, **dict(fields))


class TemporalShift(nn.Module):
    """A share of the channels looks one frame ahead, another one frame back (TSM), by slice assignment."""

    def __init__(self, both_ways: bool = True) -> None:
        super().__init__()
        self.conv, self.both_ways = nn.Conv2d(6, 6, 3, padding=1), both_ways

    def forward(self, x):
        batch, time, channels, height, width = x.shape
        share = channels // 3
        shifted = torch.zeros_like(x)
        if self.both_ways:
            shifted[:, :-1, :share] = x[:, 1:, :share]
        else:
            shifted[:, :, :share] = x[:, :, :share]
        shifted[:, 1:, share : 2 * share] = x[:, :-1, share : 2 * share]
        shifted[:, :, 2 * share :] = x[:, :, 2 * share :]
        mixed = self.conv(shifted.view(batch * time, channels, height, width))
        return F.relu(x + mixed.view(batch, time, channels, height, width))


class InPlaceShift(nn.Module):
    """Slice assignment into a clone, channels first."""

    def forward(self, x):
        y = x.clone()
        y[:, 1, 2:] = x[:, 1, :-2]
        y[:, 1, :2] = 0.5
        y[:, 2:] *= 2
        return y


class LearnedStart(nn.Module):
    """The frames before the start are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.conv = parameter(1, 3, 2), nn.Conv1d(3, 2, 4)

    def forward(self, x):
        return self.conv(torch.cat([self.start.expand(x.size(0), -1, -1), x], dim=2))


class Framing(nn.Module):
    """A waveform in overlapping frames times a matrix, as a short-time transform does."""

    def __init__(self) -> None:
        super().__init__()
        self.basis = parameter(8, 5)

    def forward(self, x):
        return (x.unfold(1, 8, 4) @ self.basis).square()


def conv3():
    return nn.Conv1d(3, 2, 3)


def rolled_from_the_past(m, x):
    moved = torch.roll(x, 2, 2)
    moved[:, :, :2] = 0
    return m.conv(x + moved)


def rolled_from_ahead(m, x):
    moved = torch.roll(x, shifts=-1, dims=-1)
    moved[:, :, -1] = 1.5
    return m.conv(x * moved)


def overwritten(m, x):
    y = m.conv(x)
    y[y < -0.5] = 0.25
    y[:, [1, 4]] = 0.0
    y[:, torch.tensor([0, 2])] = x[:, 2:4]
    return y.index_fill(1, torch.tensor([5]), 2.0)


class ReplicatedWhereFirst(nn.Module):
    """The first frame put in front where flags say that a stream begins, as in Moshi's convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 2, 3)

    def forward(self, x):
        previous = torch.zeros(x.shape[0], 3, 2)
        first, running = torch.ones(x.shape[0], dtype=torch.bool), torch.ones(x.shape[0], dtype=torch.bool)
        previous[:] = torch.where(first.view(-1, 1, 1) & running.view(-1, 1, 1), x[..., :1], previous)
        return self.conv(torch.cat([previous, x], -1))


SAMPLES = [
    Sample("pad_replicated_where_first", ReplicatedWhereFirst, (2, 3, 9)),
    net("pad_causal", lambda m, x: m.conv(F.pad(x, (2, 0))), conv=conv3),
    net("pad_value_asymmetric", lambda m, x: m.conv(F.pad(x, (1, 3), value=-1.5)), conv=conv3),
    net("pad_crop_both", lambda m, x: m.conv(F.pad(x, (-2, -1))), conv=conv3),
    net("pad_delay_line", lambda m, x: F.pad(x, (3, -3))),
    net("pad_look_ahead", lambda m, x: F.pad(x, (-2, 2), value=1.0) + x),
    net("pad_only", lambda m, x: F.pad(x, (2, 3), value=0.25)),
    net(
        "pad_replicate_asymmetric",
        lambda m, x: m.conv(F.pad(x, (3, 1), mode="replicate")),
        fields={"lag": 1},
        conv=conv3,
    ),
    net("pad_reflect_asymmetric", lambda m, x: m.conv(F.pad(x, (2, 3), mode="reflect")), fields={"lag": 2}, conv=conv3),
    net("pad_replicate_only", lambda m, x: F.pad(x, (2, 2), mode="replicate"), fields={"lag": 2}),
    net(
        "pad_reflect_strided",
        lambda m, x: m.conv(F.pad(x, (3, 2), mode="reflect")),
        conv=lambda: nn.Conv1d(3, 2, 4, 3),
        fields={"length": 26, "lag": 3},
    ),
    net("pad_then_activation", lambda m, x: m.conv(torch.cos(F.pad(x, (2, 2)))), conv=conv3),
    net("pad_twice", lambda m, x: m.conv(F.pad(F.pad(x, (1, 1), value=1.0), (2, 0), mode="replicate")), conv=conv3),
    Sample(
        "pad_modules",
        lambda: nn.Sequential(
            nn.ReplicationPad1d((2, 0)),
            nn.Conv1d(3, 3, 3),
            nn.ReLU(),
            nn.ReflectionPad1d((1, 2)),
            nn.Conv1d(3, 2, 4, 2),
        ),
        (2, 3, 11),
    ),
    Sample(
        "pad_time_and_height", lambda: nn.Sequential(nn.ZeroPad2d((1, 0, 3, 1)), nn.Conv2d(2, 3, (4, 2))), (1, 2, 9, 4)
    ),
    Sample("pad_constant_module", lambda: nn.Sequential(nn.ConstantPad1d((4, 2), 0.5), nn.MaxPool1d(3, 2)), (2, 3, 10)),
    net("slice_start", lambda m, x: m.conv(x[:, :, 3:]), conv=conv3),
    net("slice_end", lambda m, x: x[:, :, :-3]),
    net("slice_step", lambda m, x: x[:, :, 1::3], fields={"length": 25}),
    net("slice_middle_step", lambda m, x: m.conv(x)[..., 1:-3:2], conv=conv3),
    net("slice_conv_end", lambda m, x: m.conv(x)[:, :, :-2] + x[:, :, 1:-3].mean(1, keepdim=True), conv=conv3),
    net("slice_end_then_pad", lambda m, x: x - F.pad(x[:, :, :-3], (0, 3))),
    net("slice_end_then_padded_conv", lambda m, x: m.conv(x[:, :, 1:-2]), conv=lambda: nn.Conv1d(3, 2, 3, padding=3)),
    net("slice_narrow", lambda m, x: m.conv(x.narrow(2, 1, x.size(2) - 3)), conv=conv3),
    net("slice_even_odd", lambda m, x: x[:, :, ::2] * x[:, :, 1::2], fields={"multiple": 2, "length": 24}),
    net(
        "chunk_channels",
        lambda m, x: torch.tanh((c := m.conv(x).chunk(2, 1))[0]) * c[1],
        conv=lambda: nn.Conv1d(3, 6, 3, padding=1),
    ),
    net(
        "split_channels_unequal",
        lambda m, x: (lambda a, b: torch.cat([m.conv(b), a], 1))(*x.split([1, 2], dim=1)),
        conv=lambda: nn.Conv1d(2, 2, 5, padding=2),
    ),
    net(
        "select_channel",
        lambda m, x: m.conv(x[:, 1].unsqueeze(1)) + x[:, :1],
        conv=lambda: nn.Conv1d(1, 3, 3, padding=1),
    ),
    net("stack_neighbours", lambda m, x: torch.stack([x[:, :, 2:], x[:, :, 1:-1], x[:, :, :-2]]).amax(0)),
    net(
        "cat_shifted",
        lambda m, x: m.conv(torch.cat([x, torch.cat([x.new_zeros(x.size(0), 3, 2), x[:, :, :-2]], 2)], 1)),
        conv=lambda: nn.Conv1d(6, 2, 2),
    ),
    net("cat_zeros_in_front", lambda m, x: m.conv(torch.cat([torch.zeros_like(x[:, :, :2]), x], -1)), conv=conv3),
    Sample("cat_learned_start", LearnedStart, (2, 3, 10)),
    net("roll_channels", lambda m, x: m.conv(x.roll(1, 1)) + x.roll(shifts=-1, dims=1)[:, :2, 2:], conv=conv3),
    net("roll_time", lambda m, x: m.conv(x.roll(2, 2)), shape=(1, 3, 7), fields={"kind": "clip"}, conv=conv3),
    net("roll_time_from_the_past", rolled_from_the_past, conv=conv3),
    net("roll_time_from_ahead", rolled_from_ahead, conv=conv3),
    net("roll_time_cut", lambda m, x: m.conv(x[:, :, 1:] - x.roll(1, 2)[:, :, 1:]), conv=conv3),
    net(
        "split_off_the_last_frame", lambda m, x: x.split([1, x.shape[2] - 1], 2)[1] - x.split([x.shape[2] - 1, 1], 2)[0]
    ),
    net("entries_overwritten", overwritten, conv=lambda: nn.Conv1d(6, 6, 3, padding=1), shape=(2, 6, 9)),
    net("flip_channels", lambda m, x: m.conv(x.flip(1)), conv=conv3),
    net("diff", lambda m, x: m.conv(x.diff(dim=2)), conv=conv3),
    net("diff_twice", lambda m, x: torch.diff(x, n=2, dim=-1)),
    net("diff_prepend", lambda m, x: torch.diff(x, dim=2, prepend=x[:, :, :1])),
    net("unfold_time", lambda m, x: m.mix(x.unfold(2, 5, 2)).squeeze(3), mix=lambda: nn.Linear(5, 1)),
    net("unfold_maximum", lambda m, x: F.pad(x, (3, 0)).unfold(-1, 4, 1).amax(-1)),
    net("unfold_frequency", lambda m, x: x.unfold(3, 3, 2).mean(-1), shape=(1, 2, 9, 7)),
    Sample("unfold_framing", Framing, (2, 40), time_dim=1, length=61),
    Sample("shift_both_ways", TemporalShift, (1, 8, 6, 3, 3), time_dim=1),
    Sample("shift_causal", lambda: TemporalShift(both_ways=False), (1, 8, 6, 3, 3), time_dim=1),
    Sample("shift_in_place", InPlaceShift, (2, 4, 9)),
    net(
        "shift_by_padding",
        lambda m, x: m.mix(torch.cat([F.pad(x[:, :1], (1, -1)), F.pad(x[:, 1:2], (-1, 1)), x[:, 2:]], 1)),
        mix=lambda: nn.Conv1d(3, 4, 1),
    ),
    net(
        "where_by_position",
        lambda m, x: torch.where(torch.arange(x.shape[2]) < 4, x * 2, m.conv(x)),
        conv=lambda: nn.Conv1d(3, 3, 3, padding=1),
        fields={"lag": 1},  # the branch that is not chosen is waited for
    ),
]
