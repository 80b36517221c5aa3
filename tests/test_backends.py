"""Steps in mid-stream by other backends than torch's own kernels."""

import copy
import importlib
import json

import pytest
import torch
from torch import nn

import cofx
from cofx import backends
from cofx.runtime.errors import InputError
from contract import compile_case, run_check
from models import spread

ort = pytest.importorskip("onnxruntime")
NO_KERNEL = ("float64_pools", "bfloat16_memory")  # an average pool in float64, a GRU in bfloat16
STEPS = ("steps", "purity", "snapshot", "aliasing", "clean")
RESIDENT = {"onnxruntime": "resident_session.SessionResidence", "c": "native.NativeResidence"}
resident = pytest.mark.parametrize("backend", RESIDENT)  # those that keep the state in buffers of their own


def chosen(step):
    return set(step.compiled.mid_stream._chosen.values())


@pytest.mark.filterwarnings("ignore:steps run eagerly")
@pytest.mark.parametrize("sample", spread(27))
def test_collection_in_onnx_runtime(sample):
    if sample.name in NO_KERNEL:
        with pytest.raises(InputError, match="ONNX Runtime cannot run"):
            compile_case(sample, backend="onnxruntime")
        return
    case = compile_case(sample, backend="onnxruntime")
    for check in STEPS:
        run_check(case, check)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 4, 5, stride=2)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def net():
    torch.manual_seed(0)
    return Net().eval()


CLIP = torch.randn(1, 3, 40)


def steps(step, frames):
    return [step.forward_step(x) for x in frames.unbind(2)]


def same(got, want):
    assert [y is None for y in got] == [y is None for y in want]
    for a, b in zip(got, want, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["onnxruntime", "c", pytest.param("inductor", marks=pytest.mark.slow)])
@torch.no_grad()
def test_steps_chunks_and_snapshots_in_turn(backend):
    model = net()
    step, plain = cofx.compile(model, CLIP, backend=backend), cofx.compile(model, CLIP)
    clip = torch.randn(1, 3, 60)
    same(steps(step, clip[:, :, :21]), steps(plain, clip[:, :, :21]))
    snap = step.get_state()
    chunk = clip[:, :, 21:30]
    torch.testing.assert_close(step.forward_steps(chunk), plain.forward_steps(chunk), rtol=1e-4, atol=1e-5)
    same(steps(step, clip[:, :, 30:45]), steps(plain, clip[:, :, 30:45]))
    step.set_state(snap)
    plain.set_state(snap)
    same(steps(step, clip[:, :, 21:]), steps(plain, clip[:, :, 21:]))
    same([step.flush()], [plain.flush()])
    assert chosen(step) == {backend}


@resident
@torch.no_grad()
def test_a_step_that_is_not_taken_leaves_the_state(backend):
    step = cofx.compile(net(), CLIP, backend=backend)
    steps(step, torch.randn(1, 3, 20))
    before, x = step.get_state(), torch.randn(1, 3)
    for _ in range(3):
        step.forward_step(torch.randn(1, 3), update_state=False)
    after = step.get_state()
    assert all(torch.equal(before[k], after[k]) for k in before)
    with pytest.raises(InputError):
        step.forward_step(torch.randn(1, 4))
    want = cofx.compile(step.model, CLIP)
    want.set_state(before)
    same([step.forward_step(x)], [want.forward_step(x)])


@resident
@torch.no_grad()
def test_a_failed_run_leaves_the_state(backend, monkeypatch):
    module, name = RESIDENT[backend].split(".")
    home = getattr(importlib.import_module(f"cofx.runtime.{module}"), name)
    step = cofx.compile(net(), CLIP, backend=backend)
    steps(step, torch.randn(1, 3, 20))
    before, x = step.get_state(), torch.randn(1, 3)
    real = home.step

    def fails(self, *args):
        real(self, *args)
        raise MemoryError

    monkeypatch.setattr(home, "step", fails)
    with pytest.raises(MemoryError):
        step.forward_step(x)
    monkeypatch.undo()
    after = step.get_state()
    assert all(torch.equal(before[k], after[k]) for k in before)


@resident
@torch.no_grad()
def test_outputs_are_the_callers(backend):
    step = cofx.compile(net(), CLIP, backend=backend)
    got = [y for y in steps(step, torch.randn(1, 3, 30)) if y is not None]
    kept = [y.clone() for y in got]
    steps(step, torch.randn(1, 3, 30))
    assert all(torch.equal(a, b) for a, b in zip(got, kept, strict=True))


@resident
@torch.no_grad()
def test_another_batch_size_and_new_parameters(backend):
    model = net()
    step = cofx.compile(model, CLIP, backend=backend)
    steps(step, torch.randn(1, 3, 20))
    step.clean_state()
    clip = torch.randn(3, 3, 30)
    same(steps(step, clip), steps(cofx.compile(model, CLIP), clip))
    model.a.weight.mul_(2)
    step.clean_state()
    same(steps(step, clip), steps(cofx.compile(model, CLIP), clip))


@resident
def test_gradients_are_torchs(backend):
    step = cofx.compile(net(), CLIP, backend=backend)
    clip = torch.randn(1, 3, 20, requires_grad=True)
    sum(y.sum() for y in steps(step, clip) if y is not None).backward()
    assert clip.grad is not None and step.model.a.weight.grad is not None


@resident
@torch.no_grad()
def test_copies_go_on_by_themselves(backend):
    step = cofx.compile(net(), CLIP, backend=backend)
    steps(step, torch.randn(1, 3, 20))
    other, clip = copy.deepcopy(step), torch.randn(1, 3, 9)
    same(steps(other, clip), steps(step, clip))


@torch.no_grad()
def test_auto_measures_once(tmp_path, monkeypatch):
    monkeypatch.setenv("COFX_CACHE", str(tmp_path))
    monkeypatch.setattr(backends, "_compiler", lambda: False)
    monkeypatch.setattr(backends, "c_compiler", lambda: None)
    step = cofx.compile(net(), CLIP, backend="auto")
    (answer,) = json.loads((tmp_path / "backends.json").read_text()).values()
    assert chosen(step) == {answer}
    monkeypatch.setattr("cofx.mid_stream.fastest", lambda ways: pytest.fail("measured again"))
    again = cofx.compile(net(), CLIP, backend="auto")
    assert chosen(again) == {answer}
    clip = torch.randn(1, 3, 30)
    same(steps(again, clip), steps(cofx.compile(net(), CLIP), clip))


@torch.no_grad()
def test_auto_without_measuring(monkeypatch):
    monkeypatch.setenv("COFX_MEASURE", "0")
    assert chosen(cofx.compile(net(), CLIP, backend="auto")) == {"onnxruntime"}


class Depthwise(nn.Module):
    """Channels that are no multiple of four, made, kept, joined, reduced and read in all the ways there are."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide = nn.Conv3d(3, 16, (1, 3, 3)), nn.Conv3d(16, 54, 1, bias=False)
        self.time = nn.Conv3d(54, 54, 3, padding=(1, 1, 1), groups=54)
        self.gate, self.down = nn.Conv3d(54, 54, 1), nn.Conv3d(54, 16, 1)
        self.grouped = nn.Conv3d(54, 6, (1, 3, 3), groups=6)

    def forward(self, x):
        x = torch.relu(self.wide(self.stem(x)))
        y = self.time(x)
        y = y * torch.sigmoid(self.gate(y.mean((3, 4), keepdim=True))) + x
        return self.down(y), self.grouped(y), y.amax(1), torch.softmax(y, 1)


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_channels_that_are_no_multiple_of_four(batch):
    model = Depthwise().eval()
    clip = torch.randn(batch, 3, 9, 14, 14)
    step, plain = cofx.compile(model, clip, backend="onnxruntime"), cofx.compile(model, clip)
    for x in torch.randn(batch, 3, 14, 14, 14).unbind(2):
        got, want = step.forward_step(x), plain.forward_step(x)
        assert (got is None) == (want is None)
        if want is not None:
            same(got, want)
    a, b = step.get_state(), plain.get_state()
    assert all(a[k].shape == b[k].shape for k in b)
    (home,) = step.compiled.mid_stream._homes.values()
    shapes = [value.shape() for value in home.values]
    assert any(len(shape) == 4 and shape[1] > 54 and shape[1] % 4 == 0 for shape in shapes), "nothing was padded"


def test_unknown_backend():
    with pytest.raises(InputError, match="backend is one of"):
        cofx.compile(net(), CLIP, backend="cuda")


class Growing(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


@resident
def test_what_only_runs_eagerly_says_so(backend):
    with pytest.warns(UserWarning, match=f"steps run eagerly, not by {backend}: what is kept grows"):
        step = cofx.compile(Growing().eval(), torch.randn(1, 8, 4), time_dim=1, backend=backend)
    assert chosen(step) == {"eager"}


class NoForm(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


@pytest.mark.parametrize(("backend", "why"), [("onnxruntime", "no ONNX form"), ("c", "no form in C")])
def test_an_op_without_a_form(backend, why):
    with pytest.raises(cofx.CompileError, match=f"{why}: .*bessel_j0") as raised, torch.no_grad():
        cofx.compile(NoForm().eval(), CLIP, backend=backend)
    assert "return torch.special.bessel_j0(x)" in str(raised.value)


@torch.no_grad()
def test_inductor_keeps_pictures_as_it_makes_them():
    """Depthwise, pointwise and dense convolutions of pictures; from then on no state changes its layout."""
    model = nn.Sequential(
        nn.Conv3d(3, 24, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
        nn.Conv3d(24, 24, (5, 1, 1), padding=(2, 0, 0), groups=24, bias=False),
        nn.BatchNorm3d(24), nn.ReLU(), nn.Conv3d(24, 54, 1),
        nn.Conv3d(54, 54, 3, (1, 2, 2), padding=1, groups=54), nn.SiLU(),
        nn.Conv3d(54, 20, 1, bias=False), nn.Conv3d(20, 20, (3, 1, 1), padding=(1, 0, 0)),
    ).eval()  # fmt: skip
    clip = torch.randn(1, 3, 12, 32, 32)
    step, plain = cofx.compile(model, clip, backend="inductor"), cofx.compile(model, clip)
    got, want = steps(step, clip), steps(plain, clip)
    laid = [x.stride() for x in step._state.apart]
    same(got + steps(step, clip), want + steps(plain, clip))
    assert [x.stride() for x in step._state.apart] == laid
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in step._state.apart if x.dim() == 4)


@pytest.mark.parametrize("backend", ["onnxruntime", "c", "inductor"])
@torch.no_grad()
def test_parameters_that_change_in_mid_stream_are_told(backend):
    """Those that eager programs read as they are, a session has as constants."""
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4)).eval()
    clip = torch.randn(1, 12, 8)
    step = cofx.compile(model, clip, time_dim=1, backend=backend)
    for x in clip.unbind(1):
        step.forward_step(x)
    model[1].weight.mul_(2)
    with pytest.warns(UserWarning, match="parameters have changed"):
        step.forward_step(clip[:, 0])
    step.refresh()
    torch.testing.assert_close(step.forward_step(clip[:, 0]), model(clip)[:, 0])


class Pictures(nn.Module):
    """A stack of convolutions of video, strided in time, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(3, 8, 3, padding=1)
        self.down = nn.Conv3d(8, 8, (2, 3, 3), stride=(2, 1, 1), padding=(0, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 3, time, height, width) -> (batch, 8, time // 2, height, width)"""
        y = self.first(x).relu()
        z: torch.Tensor = self.down(y + y.sigmoid())
        return z


def fails_after(calls: int, run):
    """A function that does as another for so many calls, then raises."""
    left = iter(range(calls))
    return lambda *given: run(*given) if next(left, None) is not None else 1 / 0


@pytest.mark.parametrize("backend", sorted(RESIDENT))
@torch.no_grad()
def test_chunks_of_pictures_are_steps_of_the_backend(backend, monkeypatch) -> None:
    torch.manual_seed(0)
    model, clip = Pictures().eval(), torch.randn(2, 3, 31, 16, 16)
    step = cofx.compile(model, clip, backend=backend)
    expected = model(clip)
    eager = step.compiled.advance
    got = [step.forward_steps(clip[:, :, :9])]
    monkeypatch.setattr(step.compiled, "advance", lambda *a, **k: pytest.fail("an eager chunk"))
    place = 9
    for size in (2, 5, 3, 4):
        chunk = clip[:, :, place : place + size]
        peeked = step.forward_steps(chunk, update_state=False)
        before = step.get_state()
        home = step.compiled.mid_stream._homes[backend, (clip[:, :, 0].shape,)]
        with monkeypatch.context() as patch:
            patch.setattr(home, "step", fails_after(size - 1, home.step))
            with pytest.raises(ZeroDivisionError):
                step.forward_steps(chunk)
        assert all(torch.equal(before[k], v) for k, v in step.get_state().items())
        got.append(step.forward_steps(chunk))
        assert torch.equal(got[-1], peeked)
        place += size
    monkeypatch.setattr(step.compiled, "advance", eager)
    got.append(step.forward_steps(clip[:, :, place:], pad_end=True))
    torch.testing.assert_close(torch.cat(got, 2), expected, rtol=1e-4, atol=1e-5)


class Tokens(nn.Module):
    """Frames that are numbers of rows of a table, and rows picked by each frame."""

    def __init__(self, pick: str) -> None:
        super().__init__()
        self.table, self.conv, self.pick = nn.Embedding(10, 8), nn.Conv1d(8, 4, 3), pick

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time) of integers -> (batch, 4, time - 2)"""
        rows = self.table(x) if self.pick == "embedding" else self.table.weight[x]
        if self.pick == "gather":
            rows = self.table.weight.expand(len(x), -1, -1).gather(1, x[:, :, None].expand(-1, -1, 8))
        y: torch.Tensor = self.conv(rows.transpose(1, 2))
        return y


@pytest.mark.parametrize("pick", ["embedding", "index", "gather"])
@torch.no_grad()
def test_an_index_outside_is_told_and_leaves_the_stream(pick) -> None:
    torch.manual_seed(0)
    model, clip = Tokens(pick).eval(), torch.randint(0, 10, (1, 20))
    step = cofx.compile(model, clip, time_dim=1, backend="c")
    expected = model(clip)
    for i in range(6):
        step.forward_step(clip[:, i])
    for outside in (10, 1 << 40, -1 if pick != "index" else -11):
        with pytest.raises(IndexError, match="outside"):
            step.forward_step(torch.tensor([outside]))
    torch.testing.assert_close(step.forward_step(clip[:, 6]), expected[:, :, 4])
    if pick == "index":  # counts from the end
        last = step.forward_step(clip[:, 7] - 10, update_state=False)
        torch.testing.assert_close(last, expected[:, :, 5])
