"""Compiled models in files: what is loaded does what was saved."""

import copy
import json
import struct

import pytest
import torch
from safetensors import safe_open
from torch import nn

import cofx
from cofx.passes.saved_plan import SavedPlanError
from contract import compile_case, run_check
from models import spread

CHECKS = ("steps", "chunks", "flush", "clean", "snapshot", "aliasing", "attributes", "latency")


@pytest.mark.parametrize("sample", spread(24))
def test_collection(sample, tmp_path):
    case = compile_case(sample)
    case.step.save(tmp_path / "step")
    loaded = compile_case(sample, model=case.model, step=cofx.load(tmp_path / "step"))
    for check in CHECKS:
        run_check(loaded, check)
    assert str(loaded.step.report()) == str(case.step.report())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 4, 5, stride=2)
        self.tied = self.b
        self.rnn = nn.GRU(4, 4, batch_first=True)

    def forward(self, x):
        y = self.b(torch.relu(self.a(x)))
        return {"y": y, "z": (self.rnn(y.transpose(1, 2))[0], -y)}


CLIP = torch.randn(1, 3, 40)


@pytest.fixture
def step():
    torch.manual_seed(0)
    return cofx.compile(Net().eval(), CLIP)


@pytest.fixture
def file(step, tmp_path):
    step.save(tmp_path / "step.safetensors")
    return tmp_path / "step.safetensors"


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_lanes_snapshots_and_structure(step, file, tmp_path):
    loaded, clip = cofx.load(file), torch.randn(3, 3, 24)
    ready = torch.tensor([True, False, True])
    for _ in range(3):
        close(loaded.forward_steps(clip, ready=ready), step.forward_steps(clip, ready=ready))
    step.save_state(tmp_path / "state")
    loaded.load_state(tmp_path / "state")  # the same model, so the same fingerprint
    close(loaded.forward_steps(clip, ready=ready), step.forward_steps(clip, ready=ready))
    assert loaded.outputs == step.outputs
    assert isinstance(loaded.forward_steps(clip, ready=ready)[0]["z"], tuple)


def test_parameters_are_the_models(step, file):
    loaded = cofx.load(file)
    want = step.state_dict()
    assert want.keys() == loaded.state_dict().keys()
    assert all(torch.equal(v, want[k]) for k, v in loaded.state_dict().items())
    assert loaded.model.tied.weight is loaded.model.b.weight
    clip = torch.randn(1, 3, 20, requires_grad=True)
    loaded.forward_steps(clip)["y"].sum().backward()
    step.forward_steps(clip.detach())["y"].sum().backward()
    close(loaded.model.a.weight.grad, step.model.a.weight.grad)


@torch.no_grad()
def test_copies_saves_and_exports(step, file, tmp_path):
    loaded, clip = cofx.load(file), torch.randn(1, 3, 24)
    loaded.save(tmp_path / "again")
    again = cofx.load(tmp_path / "again", backend="onnxruntime")
    want = [step.forward_step(x) for x in clip.unbind(2)]
    for other in (loaded, again, copy.deepcopy(cofx.load(file))):
        close([other.forward_step(x) for x in clip.unbind(2)], want)
    loaded.to_onnx(tmp_path / "step.onnx")


def test_no_offline_model(file):
    loaded = cofx.load(file)
    with pytest.raises(SavedPlanError, match="no offline model"):
        loaded(CLIP)
    with pytest.raises(SavedPlanError, match="no offline model"):
        loaded.verify(CLIP)


class Fixed(nn.Module):
    def forward(self, x):
        return x.reshape(2, 3, -1).flip(0)


def test_another_batch_size_than_the_traced(tmp_path):
    cofx.compile(Fixed().eval(), torch.randn(2, 3, 8)).save(tmp_path / "step")
    loaded = cofx.load(tmp_path / "step")
    assert loaded.forward_steps(torch.randn(2, 3, 8)).shape == (2, 3, 8)
    loaded.clean_state()
    with pytest.raises(SavedPlanError, match="saved for a batch of 2, not 1"):
        loaded.forward_steps(torch.randn(1, 3, 8))


def test_continual(tmp_path):
    class Squeezed(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x.mean((2, 3, 4), keepdim=True))

    step = cofx.compile(Squeezed().eval(), torch.randn(1, 3, 6, 4, 4), nonlocal_ops="continual")
    step.save(tmp_path / "step")
    loaded, clip = cofx.load(tmp_path / "step"), torch.randn(1, 3, 20, 4, 4)
    close(loaded.forward_steps(clip), step.forward_steps(clip))
    assert loaded.equivalence == step.equivalence == "approximate"
    assert loaded.report().approximated == step.report().approximated


def rewrite(file, change):
    """The file with its metadata changed."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    about = json.loads(header["__metadata__"]["cofx_step"])
    change(about)
    header["__metadata__"]["cofx_step"] = json.dumps(about)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def op(about, name):
    next(n for n in about["plan"]["graph"] if n["op"] == "call_function")["target"] = name


@pytest.mark.parametrize(
    "change",
    [
        lambda a: op(a, "aten.from_file.default"),
        lambda a: op(a, "os.system"),
        lambda a: op(a, "operator.attrgetter"),
        lambda a: op(a, "aten.__class__"),
        lambda a: op(a, ["aten"]),
        lambda a: a.update(format=2),
        lambda a: a.pop("plan"),
        lambda a: a["plan"]["graph"].pop(),
        lambda a: a["plan"]["graph"][-1].update(args={"node": -1}),
        lambda a: a["plan"].update(points=[]),
        lambda a: a["plan"].update(out_spec="[]"),
        lambda a: a["plan"]["graph"][1].update(op="call_method"),
        lambda a: a.update(same={"x": "y"}),
    ],
)
def test_what_is_not_understood_is_refused(file, change):
    rewrite(file, change)
    with pytest.raises(SavedPlanError):
        cofx.load(file)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x04.", b"\xff" * 64])
def test_other_files_are_refused(tmp_path, data):
    (tmp_path / "step").write_bytes(data)
    with pytest.raises(SavedPlanError, match="no step model"):
        cofx.load(tmp_path / "step")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        cofx.load(tmp_path / "step")


def test_a_failed_save_leaves_the_old_file(step, file, monkeypatch):
    before = file.read_bytes()
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        step.save(file)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_no_code_in_the_file(file):
    with safe_open(file, framework="pt") as opened:
        assert set(opened.metadata()) == {"cofx_step"}


def test_loading_traces_nothing(file, monkeypatch):
    monkeypatch.setattr("cofx.passes.pipeline.capture", lambda *a: pytest.fail("traced"))
    cofx.load(file)
