"""Streams that go on and on: memory stays flat, numbers stay right, counters pass every power of two."""

import ctypes
import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cofx
from cofx.runtime import OnnxStep
from shaken import numpy, tensors


class Net(nn.Module):
    """(batch, 2, time) -> (batch, 4, time / 2); looks back 16 frames, and knows its frames' numbers modulo 7."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=4, dilation=4)
        self.down = nn.Conv1d(4, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        y = self.second(y) + y
        return self.down(y + (torch.arange(x.shape[2], device=x.device) % 7).to(x.dtype))


def frames(start: int, stop: int, batch: int = 1) -> Tensor:
    """The frames of an endless stream, which repeats itself after 35."""
    t = torch.arange(start, stop) % 35
    return torch.stack([torch.sin(t * 1.1), torch.cos(t * 0.7 + 1)]).expand(batch, 2, stop - start).contiguous()


def resident() -> int:
    """Bytes of this process in memory that are in use, as far as the C library can be made to return the others."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[cofx.StepModule, Path]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("soak") / "step.onnx"
    with torch.no_grad():
        step = cofx.compile(Net().eval(), frames(0, 24))
        step.to_onnx(path)
    return step, path


def soak(take: Any, model: nn.Module, steps: int, at_once: int) -> None:
    """Calls of a step or two; now and then, and at the end, the last frames against those of the offline model."""
    cycle = [frames(t, t + at_once)[:, :, 0] if at_once == 1 else frames(t, t + at_once) for t in range(0, 70, at_once)]
    expected = model(frames(0, 210))
    last: list[Tensor] = []
    memory: list[int] = []
    for n in range(0, steps, at_once):
        y = take(cycle[n % 70 // at_once])
        if y is not None:
            last.append(y.unsqueeze(2) if y.dim() == 2 else y)
            del last[:-35]
        if n and n % (steps // 5) == 0:
            memory.append(resident())
    count = steps // 2 - 3  # of output frames: those that are due, which repeat themselves after 35
    got = torch.cat(last, 2)
    place = [35 + (i - 35) % 35 if i >= 35 else i for i in range(count - got.shape[2], count)]
    torch.testing.assert_close(got, expected[:, :, place].expand_as(got), rtol=1e-4, atol=1e-5)
    memory.append(resident())
    grown = [after - before for before, after in itertools.pairwise(memory)]  # what leaks grows in each fifth
    assert min(grown) < 500_000, f"memory has grown by {[f'{n / 1e6:.1f} MB' for n in grown]}"


STEPS = [500, pytest.param(1_000_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("steps", STEPS)
def test_step_by_step(made, steps: int) -> None:
    step, _ = made
    step.clean_state()
    soak(step.forward_step, step.model, steps, 1)


@pytest.mark.parametrize("steps", STEPS)
def test_lanes(made, steps: int) -> None:
    step, _ = made
    step.clean_state()

    def take(x: Tensor) -> Tensor | None:
        y, valid = step.forward_steps(x, ready=[True])
        return y[:, :, valid[0]] if valid.any() else None

    soak(take, step.model, steps, 2)


@pytest.mark.parametrize("steps", STEPS)
def test_onnx(made, steps: int) -> None:
    step, path = made
    mine = OnnxStep(path)
    soak(lambda x: tensors(mine.forward_steps(numpy(x))), step.model, steps, 2)


FAR = [2**31, 2**32, 2**39]


@pytest.mark.parametrize("far", FAR)
@pytest.mark.parametrize("form", ["steps", "chunks", "lanes", "onnx"])
def test_counters(made, far: int, form: str) -> None:
    """A stream that is set to just before a power of two goes on as if it had come there."""
    step, path = made
    step.clean_state()
    begin = far - far % 70 - 70  # the same place in the stream's cycle, and in that of its frames' numbers
    step.forward_steps(frames(0, 70, 2), **({"ready": [True] * 2} if form in ("lanes", "onnx") else {}))
    state = step.get_state()
    if form in ("steps", "chunks"):
        state["count"] += begin
    else:
        state["position"][:, 0] += begin
    step.set_state(state)
    wanted = step.model(frames(0, 280, 2))[:, :, 32:]
    parts = []
    mine = OnnxStep(path)
    if form == "onnx":
        mine.set_state(numpy(state))
    for t in range(70, 210, 2):
        x = frames(t, t + 2, 2)
        if form == "steps":
            parts += [y.unsqueeze(2) for i in range(2) if (y := step.forward_step(x[:, :, i])) is not None]
        elif form == "chunks":
            parts.append(step.forward_steps(x))
        elif form == "lanes":
            y, valid = step.forward_steps(x, ready=[True] * 2)
            assert valid.all()
            parts.append(y)
        else:
            parts.append(torch.from_numpy(mine.forward_steps(x.numpy())))
    got = torch.cat(parts, 2)
    torch.testing.assert_close(got, wanted[:, :, : got.shape[2]], rtol=1e-4, atol=1e-5)
    tail = step.flush() if form in ("steps", "chunks") else None
    assert tail is None or tail.shape[2] == 3
