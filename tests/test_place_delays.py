"""Delays lie where they take the fewest bytes, and no output comes later for it."""

import itertools
import random

import pytest
import torch
from torch import nn

import cofx
from cofx.passes import place_delays
from cofx.passes.schedule_delays import schedule_delays
from contract import compile_case, run_check
from models import Sample


class Skip(nn.Module):
    """A wide shortcut beside a long branch: its input is kept anyway."""

    def __init__(self):
        super().__init__()
        self.long, self.short, self.norm = nn.Conv1d(4, 16, 9), nn.Conv1d(4, 16, 1), nn.BatchNorm1d(16)

    def forward(self, x):
        return self.long(x) + self.norm(self.short(x))[:, :, 4:-4].relu()


class Inception(nn.Module):
    """Branches of different lengths and widths, then a stride."""

    def __init__(self):
        super().__init__()
        self.root, self.short = nn.Conv1d(8, 8, 1), nn.Conv1d(8, 16, 1)
        self.long = nn.Conv1d(8, 4, 9, padding=4)
        self.middle = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 32, 3, padding=1))
        self.down = nn.Conv1d(52, 8, 3, stride=2)

    def forward(self, x):
        x = self.root(x)
        return self.down(torch.cat([self.long(x), self.short(x).relu(), self.middle(x)], 1))


class Squeezed(nn.Module):
    """The short branch is narrow: it is the one to be kept, not its input."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Conv1d(3, 24, 1), nn.Conv1d(24, 2, 1)
        self.long = nn.Sequential(nn.Conv1d(24, 2, 3), nn.ReLU(), nn.Conv1d(2, 2, 7))

    def forward(self, x):
        x = self.wide(x)
        return self.long(x) * self.narrow(x)[:, :, 8:].sigmoid()


class Random(nn.Module):
    """Branches that part and meet at random."""

    def __init__(self, seed):
        super().__init__()
        rng = random.Random(seed)
        widths, self.plan, self.layers = [2], [], nn.ModuleList()
        for _ in range(5):
            given, out, kernel = rng.randrange(len(widths)), rng.choice([1, 3, 8]), rng.choice([1, 1, 3, 5])
            self.layers.append(nn.Conv1d(widths[given], out, kernel, padding=kernel // 2))
            self.plan.append(given)
            widths.append(out)
        self.join = nn.Conv1d(sum(widths), 1, 1)

    def forward(self, x):
        values = [x]
        for given, layer in zip(self.plan, self.layers, strict=True):
            values.append(layer(values[given]))
        return self.join(torch.cat(values, 1))


NETS = {"skip": (Skip, 4), "inception": (Inception, 8), "squeezed": (Squeezed, 3)}
NETS |= {f"random {seed}": (lambda seed=seed: Random(seed), 2) for seed in range(4)}


def kept(schedule):
    return sum(
        frames * torch.Size(value.layout.sizes(1, 1)).numel() * value.dtype.itemsize
        for value, frames in schedule.history.items()
    )


@pytest.mark.parametrize("name", NETS)
def test_no_other_waiting_times_keep_less(name):
    build, channels = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        step = cofx.compile(build().eval(), torch.randn(1, channels, 33))
    schedule = step.compiled.plan.schedule
    least, delay = kept(schedule), schedule.counts(40)
    movable = sorted(place_delays._movable(schedule), key=schedule.graph.ops.index)[:4]
    found = [op.late for op in movable]
    longest = max([4, *found])
    choices = [sorted({0, late, longest // 2, longest}) for late in found]
    for late in itertools.product(*choices):
        for op, n in zip(movable, late, strict=True):
            op.late = n
        other = schedule_delays(schedule.graph, schedule.outputs)
        in_time = all(
            r.ready_taps.ready(other.count(r.source, n)) >= other.count(op.outputs[0], n)
            for op in schedule.graph.ops
            for r in op.reads
            for n in range(40, 40 + schedule.period)
        )
        same = all(other.count(v, 40) == delay[v] for v in schedule.outputs)
        assert not (in_time and same) or kept(other) >= least


def test_a_wide_shortcut_waits_where_it_is_narrow():
    step = cofx.compile(Skip().eval(), torch.randn(1, 4, 33))
    assert step.report().state_bytes == 8 * 4 * 4  # the input's frames alone
    assert step.delay == 8


@pytest.mark.parametrize("name", NETS)
def test_contract(name):
    build, channels = NETS[name]
    case = compile_case(Sample(name, build, (1, channels, 33)))
    for check in ("offline", "steps", "chunks", "flush", "latency", "snapshot", "aliasing", "clean"):
        with torch.no_grad():
            run_check(case, check)
