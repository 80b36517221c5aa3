"""Programs whose histories come and go frame by frame: the collection, as if all of its frames were large."""

import pytest
import torch
from torch import nn

import cofx
from cofx.passes.codegen import states
from contract import compile_case, run_check
from models import spread


@pytest.fixture
def all_large(monkeypatch):
    monkeypatch.setattr(states, "_large", lambda value: True)


@pytest.mark.parametrize("sample", spread(24))
def test_collection(sample, all_large):
    case = compile_case(sample)
    for check in ("steps", "purity", "snapshot", "aliasing"):
        with torch.no_grad():
            run_check(case, check)


class Video(nn.Module):
    """Each kind of convolution of pictures, with sums and activations after it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(3, 16, (3, 5, 5), (1, 2, 2), (1, 2, 2)), nn.BatchNorm3d(16), nn.ReLU())
        self.wide = nn.Conv3d(16, 32, (3, 1, 1), padding=(1, 0, 0))
        self.depthwise = nn.Conv3d(32, 32, 3, padding=1, groups=32)
        self.norm = nn.BatchNorm3d(32)
        self.narrow = nn.Conv3d(32, 16, 1)
        self.down = nn.Conv3d(16, 24, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.short = nn.Conv3d(16, 24, 1, (1, 2, 2), bias=False)
        self.pool = nn.AvgPool3d((1, 2, 2))

    def forward(self, x):
        x = self.stem(x)
        y = torch.relu(self.wide(x))
        y = self.norm(self.depthwise(y))
        y = y * torch.sigmoid(y)
        x = torch.relu(x + self.narrow(y))
        return self.pool(self.down(x) + self.short(x)).mean((3, 4))


def video(clip):
    """A video net past its warm-up, in the numbers that a trained one has."""
    torch.manual_seed(0)
    model = Video().eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm3d):
            m.running_mean.uniform_(-0.5, 0.5)
            m.running_var.uniform_(0.5, 2)
            m.weight.data.uniform_(0.5, 2)
    return model, cofx.compile(model, clip)


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_pictures(batch):
    clip = torch.randn(batch, 3, 12, 40, 36)
    model, step = video(clip)
    want = model(clip)
    got = [y for x in clip.unbind(2) if (y := step.forward_step(x)) is not None]
    torch.testing.assert_close(torch.stack(got, 2), want[:, :, : len(got)], rtol=1e-4, atol=1e-5)
    assert step._state.apart is not None, "the short way was not taken"
    torch.testing.assert_close(step.flush(), want[:, :, len(got) :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_chunks_of_pictures(batch):
    """Of several lanes they are steps; either way the stream goes on, by frame or by chunk."""
    clip = torch.randn(batch, 3, 20, 40, 36)
    model, step = video(clip)
    want = model(clip)
    sizes = [1] * 7 + [4, 1, 5, 3]
    got = [step.forward_steps(part) if n > 1 else step.forward_step(part[:, :, 0])
           for n, part in zip(sizes, clip.split(sizes, 2), strict=True)]  # fmt: skip
    frames = torch.cat([y if n > 1 else y[:, :, None] for n, y in zip(sizes, got, strict=True) if y is not None], 2)
    torch.testing.assert_close(torch.cat([frames, step.flush()], 2), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_changes_of_form():
    """Steps, chunks and snapshots in turn."""
    clip = torch.randn(1, 3, 24, 40, 36)
    model, step = video(clip)
    parts, at = [], 0
    for size in [0, 0, 0, 0, 0, 0, 3, 0, 0, 2, 0, 0, 0]:
        if size:
            y = step.forward_steps(clip[:, :, at : at + size])
        else:
            y = step.forward_step(clip[:, :, at])
            y = None if y is None else y.unsqueeze(2)
        at += max(size, 1)
        if y is not None:
            parts.append(y)
        step.set_state(step.get_state())
    parts.append(step.flush())
    torch.testing.assert_close(torch.cat(parts, 2), model(clip[:, :, :at]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_frames_are_not_shared():
    """Neither the caller's frames nor the outputs share memory with what is kept."""

    class Delayed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(8, 8, (3, 1, 1))

        def forward(self, x):
            y = torch.relu(x)
            return x[:, :, 2:], y[:, :, 2:], y[:, :, :-2], self.conv(x) + self.conv(y)

    clip = torch.randn(1, 8, 12, 40, 40)
    model = Delayed()
    step = cofx.compile(model, clip)
    want = model(clip)
    for t, frame in enumerate(clip.unbind(2)):
        given = frame.clone()
        out = step.forward_step(given)
        if out is None or any(y is None for y in out):
            continue
        for y, whole in zip(out, want, strict=True):
            torch.testing.assert_close(y, whole[:, :, t - 2], rtol=1e-4, atol=1e-5)
        for tensor in (given, *out):
            tensor.fill_(torch.nan)


def test_operations_are_counted():
    """A counter of operations sees those of ATen, whatever kernels run otherwise."""
    from torch.utils.flop_counter import FlopCounterMode

    clip = torch.randn(1, 3, 12, 40, 36)
    _, step = video(clip)
    with torch.no_grad():
        for x in clip.unbind(2):
            step.forward_step(x)
        with FlopCounterMode(display=False) as counter:
            step.forward_step(clip[:, :, 0])
    assert counter.get_total_flops() == 2 * int(step.report().macs_per_step)
