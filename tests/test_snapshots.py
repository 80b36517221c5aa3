"""Snapshots in files: in a new process, between PyTorch and ONNX Runtime, and what is refused."""

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import cofx
from cofx.runtime import OnnxStep


class Net(nn.Module):
    """(batch, 3, time) -> (batch, 4, time), with a history, a recurrent state and heads folded into the batch."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv, self.act, self.memory = nn.Conv1d(3, 4, 3, padding=1), act(), nn.GRU(4, 4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.memory(self.act(self.conv(x)).mT)[0].mT
        y = torch.nn.functional.avg_pool1d(y.reshape(y.shape[0] * 2, 2, y.shape[2]), 3, 1)
        return y.reshape(x.shape[0], 4, -1)


X = torch.randn(3, 3, 40, generator=torch.Generator().manual_seed(1))


def made(act: type[nn.Module] = nn.ReLU, seed: int = 0) -> cofx.StepModule:
    torch.manual_seed(seed)
    return cofx.compile(Net(act).eval(), torch.randn(2, 3, 12))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_plain_stream(tmp_path) -> None:
    path = tmp_path / "state"
    step, other = made(), made()
    step.save_state(path)
    other.load_state(path)
    assert other.forward_step(X[:, :, 0]) is None
    for stop in (1, 2, 9):
        step.clean_state()
        step.forward_steps(X[:, :, :stop])
        step.save_state(path)
        expected = step.forward_steps(X[:, :, stop:], pad_end=True)
        other.load_state(path)
        torch.testing.assert_close(other.forward_steps(X[:, :, stop:], pad_end=True), expected, rtol=0, atol=0)
        assert os.listdir(tmp_path) == ["state"]


def test_lanes_and_onnx(tmp_path) -> None:
    """PyTorch -> ONNX Runtime -> PyTorch, lanes standing at different places; then a plain stream."""
    path, everyone = tmp_path / "state", {"ready": [True] * 3}
    step = made()
    step.to_onnx(tmp_path / "step.onnx")
    mine = OnnxStep(tmp_path / "step.onnx")
    for t in range(12):
        step.forward_step(X[:, :, t], ready=[True, t > 4, t > 8], start=[False, False, t == 10])
    step.save_state(path)
    mine.load_state(path)
    for t in range(12, 20):
        theirs, valid = step.forward_step(X[:, :, t], **everyone)
        ours, ours_valid = mine.forward_step(X[:, :, t].numpy(), **everyone)
        assert (ours_valid == valid.numpy()).all()
        np.testing.assert_allclose(ours[ours_valid], theirs[valid].numpy(), rtol=1e-5, atol=1e-6)
    mine.save_state(path)
    other = made()
    other.load_state(path)
    theirs, valid = step.forward_step(X[:, :, 20], **everyone)
    torch.testing.assert_close(
        other.forward_step(X[:, :, 20], **everyone)[0][valid], theirs[valid], rtol=1e-5, atol=1e-6
    )
    step.clean_state()
    first = step.forward_steps(X[:, :, :7])
    step.save_state(path)
    mine.load_state(path)
    rest = mine.forward_steps(X[:, :, 7:30].numpy())
    mine.save_state(path)
    step.load_state(path)
    last = step.forward_steps(X[:, :, 30:], pad_end=True)
    got = torch.cat([first, torch.from_numpy(rest), last], 2)
    torch.testing.assert_close(got, step.model(X), rtol=1e-4, atol=1e-5)


class Everything(nn.Module):
    """(batch, 3, time, 4, 5) -> the same: attention over all frames so far, at each place by itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = x.permute(0, 3, 4, 1, 2)[..., None]
        return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).squeeze(-1).permute(0, 3, 4, 1, 2)


VIDEO = {
    "all": Everything(),
    "some": nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 3, padding=(2, 1, 1))),
}


@pytest.mark.parametrize("name", VIDEO)
def test_video_in_states_of_four_dimensions(name: str, tmp_path) -> None:
    """Between PyTorch and ONNX Runtime, which have room for another number of frames each."""
    path, model = tmp_path / "state", VIDEO[name].eval()
    x = torch.randn(2, 3, 60, 4, 5, generator=torch.Generator().manual_seed(0))
    step = cofx.compile(model, x[:1, :, :8])
    step.to_onnx(tmp_path / "step.onnx", longest=60)
    mine = OnnxStep(tmp_path / "step.onnx")
    assert all(len(s["shape"]) <= 4 for s in mine.meta["states"])
    parts, now = [], 0
    for stop in (5, 7, 20, 41, 57, 60):
        if now % 2:
            part = torch.from_numpy(mine.forward_steps(x[:, :, now:stop].numpy()))
            mine.save_state(path), step.load_state(path)
        else:
            part = step.forward_steps(x[:, :, now:stop])
            step.save_state(path), mine.load_state(path)
        parts, now = [*parts, part], stop
    if (tail := mine.flush()) is not None:
        parts.append(torch.from_numpy(tail))
    torch.testing.assert_close(torch.cat(parts, 2), model(x), rtol=1e-4, atol=1e-5)
    if name == "all":
        step.to_onnx(tmp_path / "short.onnx", longest=30)
        with pytest.raises(cofx.StateError, match="too long for this file"):
            OnnxStep(tmp_path / "short.onnx").load_state(path)


def test_a_place_where_no_lane_can_stand(tmp_path) -> None:
    torch.manual_seed(0)
    step = cofx.compile(nn.Conv1d(3, 2, 4, stride=4), X)
    step.to_onnx(tmp_path / "step.onnx")
    step.forward_steps(X[:, :, :6])
    step.save_state(tmp_path / "state")
    expected = step.forward_steps(X[:, :, 6:])
    step.clean_state()
    step.load_state(tmp_path / "state")
    torch.testing.assert_close(step.forward_steps(X[:, :, 6:]), expected)
    with pytest.raises(cofx.StateError, match="multiple of 4"):
        OnnxStep(tmp_path / "step.onnx").load_state(tmp_path / "state")


def test_lanes_whose_first_output_comes_later_than_without_lanes_stay_lanes(tmp_path) -> None:
    """A pool that begins in padding gives its first frame before a lane does: the two keep their state differently."""
    step = cofx.compile(nn.Sequential(nn.ConstantPad1d((4, 0), 0.0), nn.AvgPool1d(2, 1)), X)
    assert step.compiled.early
    step.to_onnx(tmp_path / "step.onnx")
    file, twin, x = OnnxStep(tmp_path / "step.onnx"), copy.deepcopy(step), X[:2]
    twin.forward_steps(x[:, :, :3], ready=[True, True])
    file.forward_steps(x[:, :, :3].numpy())
    file.save_state(tmp_path / "state")
    step.load_state(tmp_path / "state")
    for t in range(3, 8):
        (y, valid), (wanted, there) = (s.forward_step(x[:, :, t], ready=[True, t % 2 == 0]) for s in (step, twin))
        assert torch.equal(valid, there) and valid.any()
        torch.testing.assert_close(y.mT[valid], wanted.mT[there])


def test_inputs_without_time_are_kept_for_the_flush(tmp_path) -> None:
    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.conv(x) * y[:, :, None]

    torch.manual_seed(0)
    model = Offset().eval()
    step, other = (cofx.compile(model, (X, X[:, :, 0]), time_dim=(2, None)) for _ in range(2))
    step.forward_steps(X, X[:, :, 3])
    step.save_state(tmp_path / "state")
    other.load_state(tmp_path / "state")
    torch.testing.assert_close(other.flush(), step.flush())


def test_what_is_refused(tmp_path) -> None:
    step, path = made(), tmp_path / "state"
    step.forward_steps(X[:, :, :9])
    step.save_state(path)
    good = path.read_bytes()
    before = step.get_state()
    for other in (made(seed=1), made(nn.Tanh), cofx.compile(nn.Conv1d(3, 4, 3), X)):
        with pytest.raises(cofx.StateError, match="another model"):
            other.load_state(path)

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    about = {"format": 1, "fingerprint": step._programs().fingerprint, "form": "lanes", "together": True}
    shapes = {k: v.shape for k, v in safetensors.torch.load(good).items()}
    bad = {
        "truncated": good[: len(good) // 2],
        "empty": b"",
        "pickle": pickle.dumps(Bomb()),
        "header": (1 << 62).to_bytes(8, "little") + b"{}",
        "no metadata": safetensors.torch.save({"x": X}),
        "other metadata": safetensors.torch.save({"x": X}, {"cofx": "["}),
        "a list": safetensors.torch.save({"x": X}, {"cofx": "[]"}),
        "later format": safetensors.torch.save({"x": X}, {"cofx": json.dumps({**about, "format": 2})}),
        "no tensors": safetensors.torch.save({"x": X}, {"cofx": json.dumps(about)}),
        "wrong shapes": safetensors.torch.save({k: torch.zeros(2) for k in shapes}, {"cofx": json.dumps(about)}),
    }
    for content in bad.values():
        path.write_bytes(content)
        with pytest.raises(cofx.StateError):
            step.load_state(path)
    with pytest.raises(FileNotFoundError):
        step.load_state(tmp_path / "none")
    assert not (tmp_path / "executed").exists()
    assert all(torch.equal(v, before[k]) for k, v in step.get_state().items())


def test_killed_while_writing(tmp_path) -> None:
    """A kill at any moment leaves the old snapshot or the new one."""
    step, path = made(), tmp_path / "state"
    fingerprint = step._programs().fingerprint
    code = f"""
import sys, torch
from cofx.runtime.state_file import write_state
n = 0
while True:
    write_state({str(path)!r}, {{"x": torch.full((200_000,), float(n))}}, {{"fingerprint": {fingerprint!r}}}, "torch")
    n += 1
    if n == 1:
        print("go", flush=True)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(cofx.__file__).parent.parent)}
    from cofx.runtime.state_file import read_state

    for i in range(4):
        child = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, env=env)
        assert child.stdout.readline()
        time.sleep(0.05 + 0.037 * i)
        child.send_signal(signal.SIGKILL)
        child.wait()
        tensors, _ = read_state(path, fingerprint, "torch")
        assert len(tensors["x"]) == 200_000 and (tensors["x"] == tensors["x"][0]).all()
        child.stdout.close()
