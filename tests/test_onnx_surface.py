"""What the ONNX file looks like, what the runtime does with good and bad arguments, and what is left when it fails."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import cofx
from cofx.passes.codegen import onnx as codegen
from cofx.runtime.onnx_step import OnnxStep


class Net(nn.Module):
    """(batch, 3, time) -> a dict of (batch, 4, time/2) and (batch, 3, time)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down = nn.Conv1d(3, 4, 3, padding=1), nn.Conv1d(4, 4, 2, stride=2)
        self.memory = nn.GRU(4, 4, batch_first=True)

    def forward(self, start: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.memory(self.down(self.conv(start).relu()).mT)[0].mT
        return {"deep": y, "start": start.sigmoid()}


X = torch.randn(3, 3, 40, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(0)
    with torch.no_grad():
        step = cofx.compile(Net().eval(), torch.randn(1, 3, 12))
        path = tmp_path_factory.mktemp("onnx") / "step.onnx"
        step.to_onnx(path)
    return step, path


def test_names_shapes_and_metadata(made) -> None:
    step, path = made
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)

    def signature(values):
        dims = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        return dims, {v.name: onnx.TensorProto.DataType.Name(v.type.tensor_type.elem_type) for v in values}

    inputs, in_types = signature(model.graph.input)
    outputs, out_types = signature(model.graph.output)
    states = [n for n in inputs if n.startswith("state_in_")]
    assert list(inputs) == ["start_", *states, "start", "ready", "length"]
    assert inputs["start_"] == ["batch", 3, 2]
    assert [inputs[n] for n in ("start", "ready", "length")] == [["batch", 1]] * 3
    assert [in_types[n] for n in ("start", "ready", "length")] == ["BOOL", "BOOL", "INT64"]
    after = [n.replace("_in_", "_out_") for n in states]
    assert list(outputs) == ["deep", "start__", "deep_valid", "start___valid", *after]
    assert outputs["deep"] == ["batch", 4, 1] and outputs["deep_valid"] == ["batch", 1]
    assert outputs["start__"] == ["batch", 3, 2] and outputs["start___valid"] == ["batch", 2]
    for name, to in zip(states, after, strict=True):
        assert inputs[name] == outputs[to] and in_types[name] == out_types[to]
        assert inputs[name][0] == "batch" and all(inputs[name]) and len(inputs[name]) <= 4
    assert sorted(states) == states and sorted(after) == after
    assert not set(inputs) & set(outputs)
    meta = json.loads({p.key: p.value for p in model.metadata_props}["cofx"])
    assert meta["frames_per_step"] == meta["period"] == 2
    assert (meta["delay"], meta["stride"], meta["equivalence"]) == (2, 2, "stream")
    assert [s["name"] for s in meta["states"]] == states and {s["key"] for s in meta["states"]} >= {"position"}
    assert [(o["name"], o["delay"]) for o in meta["outputs"]] == [("deep", 2), ("start__", 0)]
    assert all(s["holds"] for s in meta["states"])


def test_names_are_those_of_the_modules(tmp_path) -> None:
    """As Netron shows them; and nothing of the machine on which the file was made."""

    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv1, self.norm = nn.Conv1d(channels, 4, 3, padding=1), nn.GroupNorm(1, 4)
            self.memory = nn.GRU(4, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv1(x)
            return self.memory(y.mT)[0].mT + x[:, :1]

    model = nn.ModuleDict({"encoder": nn.Sequential(Block(3), Block(4)), "head": nn.Conv1d(4, 2, 1)})
    model.forward = lambda x: model.head(model.encoder(x))
    step = cofx.compile(model.eval(), X)
    step.to_onnx(tmp_path / "step.onnx")
    file = onnx.load(tmp_path / "step.onnx")
    names = [n.name for n in file.graph.node]
    made = [o for n in file.graph.node for o in n.output if o]
    assert len(set(names)) == len(names) and len(set(made)) == len(made)
    wanted = {"encoder.0.conv1/Conv", "encoder.1.conv1/Conv", "encoder.0.memory/GRU", "encoder.1/Add", "head/Conv"}
    assert wanted <= set(names)
    assert {"encoder.0.conv1/Conv", "encoder.1/Add"} <= set(made)
    weights = {t.name for t in file.graph.initializer}
    assert {"encoder.0.conv1.weight", "encoder.1.conv1.bias", "head.weight"} <= weights
    assert all(n.startswith(("encoder.", "head/", "lanes/")) or "/" not in n for n in names)
    holds = [s["holds"] for s in OnnxStep(tmp_path / "step.onnx").meta["states"]]
    assert any("in encoder.1.memory" in h for h in holds) and any("frames of" in h and "encoder.0" in h for h in holds)
    raw = (tmp_path / "step.onnx").read_bytes()
    assert str(Path(cofx.__file__).parent).encode() not in raw and __file__.encode() not in raw


def test_raw_graph_from_zeros(made) -> None:
    """Any runtime: states of zeros, and the file's own words for the rest."""
    step, path = made
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    meta = json.loads(session.get_modelmeta().custom_metadata_map["cofx"])
    states = {s["name"]: np.zeros([3 if d == "batch" else d for d in s["shape"]], s["dtype"]) for s in meta["states"]}
    names = [o.name for o in session.get_outputs()]
    frames, tail = [], meta["flush_calls"]
    for t in range(0, 14 + 2 * tail, 2):
        feed = {
            "start_": X[:, :, t : t + 2].numpy(),
            "start": np.zeros((3, 1), bool),
            "ready": np.ones((3, 1), bool),
            "length": np.full((3, 1), 13 if t >= 12 else -1),
            **states,
        }
        out = dict(zip(names, session.run(None, feed), strict=True))
        states = {s["name"]: out[s["out"]] for s in meta["states"]}
        for j in range(out["deep"].shape[2]):
            assert out["deep_valid"][:, j].all() == out["deep_valid"][:, j].any()
            frames += [out["deep"][:, :, j]] if out["deep_valid"][0, j] else []
    expected = step.model(X[:, :, :13])["deep"]
    np.testing.assert_allclose(np.stack(frames, 2), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_surface_is_that_of_the_step_model(made) -> None:
    step, path = made
    mine = OnnxStep(path)
    x = X.numpy()
    assert (mine.delay, mine.stride, mine.receptive_field) == (step.delay, step.stride, step.receptive_field)
    expected = step.model(X[:, :, :39])["deep"].numpy()
    got = mine.forward_steps(x[:, :, :39], pad_end=True)
    assert list(got) == ["deep", "start"]
    np.testing.assert_allclose(got["deep"], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(cofx.InputError, match="has ended"):
        mine.forward_steps(x[:, :, :2])
    mine.clean_state()
    parts = [mine.forward_steps(x[:, :, :2])["deep"], mine.forward_steps(x[:, :, 2:20])["deep"]]
    assert parts[0] is None
    before = mine.get_state()
    for _ in range(2):
        tail = mine.flush()["deep"]
        np.testing.assert_allclose(
            np.concatenate([parts[1], tail], 2), step.model(X[:, :, :20])["deep"], rtol=1e-5, atol=1e-6
        )
    peek = mine.forward_steps(x[:, :, 20:40], update_state=False, pad_end=True)["deep"]
    assert all((before[k] == v).all() for k, v in mine.get_state().items())
    rest = mine.forward_steps(x[:, :, 20:40], pad_end=True)["deep"]
    np.testing.assert_array_equal(peek, rest)
    np.testing.assert_allclose(np.concatenate([parts[1], rest], 2), step.model(X)["deep"].numpy(), rtol=1e-5, atol=1e-6)
    mine.set_state(before)
    np.testing.assert_array_equal(mine.forward_steps(x[:, :, 20:40], pad_end=True)["deep"], rest)
    mine.clean_state()
    np.testing.assert_allclose(
        mine.forward_steps(x[:1, :, :39], pad_end=True)["deep"], expected[:1], rtol=1e-5, atol=1e-6
    )


def test_states_move_between_pytorch_and_onnx(made) -> None:
    step, path = made
    mine = OnnxStep(path)
    step.clean_state()
    everyone = {"ready": [True] * 3}
    for t in range(0, 10, 2):
        theirs = step.forward_steps(X[:, :, t : t + 2], **everyone)
        ours = mine.forward_steps(X[:, :, t : t + 2].numpy(), **everyone)
    for k, v in step.get_state().items():
        np.testing.assert_allclose(mine.get_state()[k], v.numpy(), rtol=1e-5, atol=1e-6)
    mine.clean_state()
    mine.set_state({k: v.numpy() for k, v in step.get_state().items()})
    moved = {k: torch.from_numpy(v) for k, v in mine.get_state([1]).items()}
    theirs, valid = step.forward_steps(X[:, :, 10:12], **everyone)
    ours, _ = mine.forward_steps(X[:, :, 10:12].numpy(), **everyone)
    np.testing.assert_allclose(ours["deep"], theirs["deep"].numpy(), rtol=1e-5, atol=1e-6)
    assert valid["deep"].all()
    step.clean_state()
    step.set_state(moved)
    alone, _ = step.forward_steps(X[1:2, :, 10:12], ready=[True])
    torch.testing.assert_close(alone["deep"], theirs["deep"][1:2])


def test_bad_arguments_leave_the_state(made) -> None:
    step, path = made
    mine = OnnxStep(path)
    with pytest.raises(cofx.InputError, match="before the first call"):
        mine.get_state([0])
    assert mine.flush() is None and mine.get_state() == {}
    x = X.numpy()
    mine.forward_steps(x[:, :, :8])
    before = mine.get_state()
    everyone = {"ready": [True] * 3}
    for words, call in [
        ("2 frames at a time, not 1", lambda: mine.forward_step(x[:, :, 0])),
        ("2 frames at a time, not 3", lambda: mine.forward_steps(x[:, :, :3])),
        ("2 frames at a time, not 4", lambda: mine.forward_steps(x[:, :, :4], **everyone)),
        ("float64", lambda: mine.forward_steps(x[:, :, :2].astype(float))),
        ("expected \\(3, 3, 2\\)", lambda: mine.forward_steps(x[:2, :, :2])),
        ("not an array", lambda: mine.forward_steps(X[:, :, :2])),
        ("1 inputs are needed", lambda: mine.forward_steps(x, x)),
        ("start has one bool", lambda: mine.forward_steps(x[:, :, :2], start=[0, 1, 0])),
        ("length has one whole number", lambda: mine.forward_steps(x[:, :, :2], length=[0.5] * 3)),
        ("pad_end", lambda: mine.forward_steps(x[:, :, :2], pad_end=True, **everyone)),
        ("lanes 0 to 2", lambda: mine.clean_state([3])),
        ("another model", lambda: mine.set_state({"x": x})),
        ("not a NoneType", lambda: mine.set_state(None)),
        ("does not fit", lambda: mine.set_state({**before, list(before)[-1]: x})),
        ("multiple of 2", lambda: mine.set_state({**before, "position": before["position"] + 1})),
    ]:
        with pytest.raises((cofx.InputError, cofx.StateError), match=words):
            call()
        assert all((before[k] == v).all() for k, v in mine.get_state().items())
    mine.forward_steps(x[:, :, :2], ready=[True, False, True])
    for call in (lambda: mine.forward_steps(x[:, :, :2]), mine.flush):
        with pytest.raises(cofx.InputError, match="each by itself"):
            call()
    mine.clean_state([0, 1, 2])
    mine.forward_steps(x[:, :, :2])


def test_options(made, tmp_path) -> None:
    step, _ = made
    wrong = [{"frames_per_step": 3}, {"frames_per_step": 0}, {"frames_per_step": 2.0}, {"opset": 17}, {"opset": "20"}]
    for bad in (*wrong, {"longest": 0}):
        with pytest.raises(cofx.InputError):
            step.to_onnx(tmp_path / "bad.onnx", **bad)
    with pytest.raises(cofx.CompileError, match="no opset 99"):  # the exporter writes another without a word
        step.to_onnx(tmp_path / "bad.onnx", opset=99)
    with pytest.raises(FileNotFoundError, match="no such folder to write to"):
        step.to_onnx(tmp_path / "nowhere" / "bad.onnx")
    assert os.listdir(tmp_path) == []
    x = X.numpy()
    whole = step.model(X)["deep"].numpy()
    step.to_onnx(tmp_path / "six.onnx", frames_per_step=6, opset=20)
    six = OnnxStep(tmp_path / "six.onnx")
    np.testing.assert_allclose(six.forward_steps(x, pad_end=True)["deep"], whole, rtol=1e-5, atol=1e-6)
    assert onnx.load(tmp_path / "six.onnx").opset_import[0].version == 20
    step.to_onnx(tmp_path / "one.onnx", dynamic_batch=False)
    one = OnnxStep(tmp_path / "one.onnx")
    np.testing.assert_allclose(one.forward_steps(x[:1], pad_end=True)["deep"], whole[:1], rtol=1e-5, atol=1e-6)
    with pytest.raises(cofx.InputError, match="batch of 1"):
        OnnxStep(tmp_path / "one.onnx").forward_steps(x)
    step.to_onnx(tmp_path / "bare.onnx", controls=False)
    bare = OnnxStep(tmp_path / "bare.onnx")
    names = [i.name for i in bare.session.get_inputs()]
    assert not set(names) & {"start", "ready", "length"}
    got = bare.forward_steps(x)["deep"]
    np.testing.assert_allclose(got, whole[:, :, : got.shape[2]], rtol=1e-5, atol=1e-6)
    for call in (bare.flush, lambda: bare.forward_steps(x[:, :, :2], ready=[True] * 3)):
        with pytest.raises(cofx.InputError, match="without controls"):
            call()


def test_external_data(tmp_path, monkeypatch) -> None:
    step = cofx.compile(nn.Conv1d(3, 64, 9, padding=4), X)
    monkeypatch.setattr(codegen, "LARGEST", 100)
    step.to_onnx(tmp_path / "step.onnx")
    assert sorted(os.listdir(tmp_path)) == ["step.onnx", "step.onnx.data"]
    got = OnnxStep(tmp_path / "step.onnx").forward_steps(X.numpy(), pad_end=True)
    np.testing.assert_allclose(got, step.model(X).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_more_than_a_single_file_holds(tmp_path) -> None:
    """2.1 GB of weights: they go to a file beside the graph."""
    width = 16400

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Conv1d(3, width, 2), *(nn.Linear(width, width) for _ in "ab")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(self.first(x).mT).relu())[..., :8]

    model = Wide().eval()
    cofx.compile(model, X[:1, :, :6]).to_onnx(tmp_path / "step.onnx")
    assert (tmp_path / "step.onnx.data").stat().st_size > 2**31 > 10_000 * (tmp_path / "step.onnx").stat().st_size
    got = OnnxStep(tmp_path / "step.onnx").forward_steps(X[:1, :, :6].numpy())
    np.testing.assert_allclose(got, model(X[:1, :, :6]).numpy(), rtol=1e-5, atol=1e-5)


def test_a_failed_export_leaves_the_old_file(made, tmp_path, monkeypatch) -> None:
    step, _ = made
    path = tmp_path / "step.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(onnx.checker, "check_model", lambda *a, **k: (_ for _ in ()).throw(ValueError("boom")))
    with pytest.raises(ValueError, match="boom"):
        step.to_onnx(path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["step.onnx"]


def test_an_op_without_onnx_form_is_named(tmp_path) -> None:
    class Gamma(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.gammaincc(x.abs(), x.abs() + 1)

    step = cofx.compile(Gamma(), X)
    with pytest.raises(cofx.CompileError, match="(?s)igammac.*at .*test_onnx_surface.py.*gammaincc"):
        step.to_onnx(tmp_path / "step.onnx")
    assert os.listdir(tmp_path) == []


def test_an_op_is_blamed_for_what_it_is_made_of(tmp_path) -> None:
    class Quantile(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.sigmoid()
            return torch.special.ndtri(y)

    with pytest.raises(cofx.CompileError, match="(?s)prims.ndtri.*at .*test_onnx_surface.py.*special.ndtri"):
        cofx.compile(Quantile(), X).to_onnx(tmp_path / "step.onnx")


SPECIAL = {
    "copysign": lambda x: torch.copysign(x + 3, torch.where(x > 0, x, -0.0)),
    "copysign_number": lambda x: torch.copysign(x, -0.0),
    "digamma": torch.digamma,
    "erfc": torch.erfc,
    "erfcx": torch.special.erfcx,
    "erfinv": lambda x: torch.erfinv((x / 3).clamp(-1, 1)),
    "fmax": lambda x: torch.fmax(x, torch.where(x > 1, torch.nan, -x)),
    "fmin": lambda x: torch.fmin(torch.where(x > 1, torch.nan, -x), x),
    "frexp": lambda x: torch.frexp(x * 1e30).mantissa + torch.frexp(x).exponent,
    "i0": torch.i0,
    "i0e": torch.special.i0e,
    "i1": torch.special.i1,
    "i1e": torch.special.i1e,
    "lgamma": torch.lgamma,
    "log_ndtr": torch.special.log_ndtr,
    "signbit": lambda x: torch.signbit(torch.where(x > 0, x, -0.0)).float(),
}


class Special(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([f(x) for f in SPECIAL.values()], 1)


def test_special_functions(tmp_path) -> None:
    """From -9 to 9, their poles left out; each within 1e-5 of its own scale."""
    x = torch.linspace(-9, 9, 1201)[:1200].reshape(1, 60, 20)
    step = cofx.compile(Special(), x)
    step.to_onnx(tmp_path / "step.onnx")
    got = torch.from_numpy(OnnxStep(tmp_path / "step.onnx").forward_steps(x.numpy()))
    for name, mine, theirs in zip(SPECIAL, got[0].split(60), Special()(x)[0].split(60), strict=True):
        near = theirs.isfinite() & (theirs.abs() < 1e3 if name == "digamma" else True)
        assert torch.equal(mine.isnan(), theirs.isnan()), name
        scale = theirs[near].abs().clamp(min=1)
        assert ((mine - theirs)[near].abs() <= 1e-5 * scale).all(), name


def test_what_is_no_step_model(tmp_path) -> None:
    path = tmp_path / "x.onnx"
    with pytest.raises(cofx.InputError):
        OnnxStep(path)
    with pytest.raises(cofx.InputError, match="threads"):
        OnnxStep(path, threads="all")
    with pytest.raises(cofx.InputError, match="no NoSuch here, but .*CPUExecutionProvider"):
        OnnxStep(path, providers=["NoSuch"])
    path.write_bytes(b"\x80\x04garbage")
    with pytest.raises(cofx.InputError, match="cannot be run"):
        OnnxStep(path)
    value = onnx.helper.make_tensor_value_info("x", 1, [1])
    out = onnx.helper.make_tensor_value_info("y", 1, [1])
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value], [out])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    with pytest.raises(cofx.InputError, match="not made by"):
        OnnxStep(path)


def test_identity_and_batchless(tmp_path) -> None:
    """A frame that passes through, and a model without batch dimension: the file has lanes all the same."""
    step = cofx.compile(nn.Identity(), X)
    step.to_onnx(tmp_path / "same.onnx")
    np.testing.assert_array_equal(OnnxStep(tmp_path / "same.onnx").forward_step(X[:, :, 0].numpy()), X[:, :, 0])
    conv = nn.Conv1d(3, 2, 3, padding=1)
    step = cofx.compile(conv, X[0], time_dim=1, batch_dim=None)
    step.to_onnx(tmp_path / "conv.onnx")
    mine = OnnxStep(tmp_path / "conv.onnx")
    np.testing.assert_allclose(mine.forward_steps(X[0].numpy(), pad_end=True), conv(X[0]).numpy(), rtol=1e-5, atol=1e-6)
    assert onnx.load(tmp_path / "conv.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_runs_without_torch_and_onnx(made) -> None:
    """In a new process, with neither to be imported."""
    _, path = made
    code = f"""
import sys
for name in ("torch", "onnx", "onnxscript"):
    sys.modules[name] = None
import numpy as np
from cofx.runtime import OnnxStep
step = OnnxStep({str(path)!r})
print(step.forward_steps(np.ones((2, 3, 8), np.float32), pad_end=True)["deep"].shape)
"""
    root = Path(cofx.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 4, 4)"


@pytest.mark.parametrize("kind", [nn.GRU, *(pytest.param(k, marks=pytest.mark.slow) for k in (nn.LSTM, nn.RNN))])
def test_int8_weights_of_recurrent_layers(kind: type[nn.RNNBase], tmp_path, capsys) -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = kind(32, 96, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.memory(x.mT)[0].mT

    torch.manual_seed(0)
    model, x = Memory().eval(), torch.randn(1, 32, 20)
    step = cofx.compile(model, x)
    step.to_onnx(tmp_path / "full.onnx")
    step.to_onnx(tmp_path / "int8.onnx", quantize="int8")
    assert "int8: differs" in capsys.readouterr().out
    ops = [n.op_type for n in onnx.load(tmp_path / "int8.onnx").graph.node]
    assert ops.count("MatMulInteger") == 4 and kind.__name__ not in ops
    got = torch.from_numpy(OnnxStep(tmp_path / "int8.onnx").forward_steps(x.numpy(), pad_end=True))
    difference = (got - model(x)).abs().max()
    assert 0 < difference < 0.05


def test_int8_weights(tmp_path, capsys) -> None:
    """For one stream, with float states; the error is told."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 64, 5, padding=2), nn.ReLU(), nn.Conv1d(64, 128, 3), nn.Conv1d(128, 4, 1)).eval()
    step = cofx.compile(model, X)
    step.to_onnx(tmp_path / "full.onnx", dynamic_batch=False)
    step.to_onnx(tmp_path / "small.onnx", quantize="int8")
    assert sorted(os.listdir(tmp_path)) == ["full.onnx", "small.onnx"]
    full, small = (os.path.getsize(tmp_path / f"{name}.onnx") for name in ("full", "small"))
    assert full - small > 0.7 * 4 * sum(p.numel() for p in model.parameters())  # 8 of 32 bits save 0.75
    mine = OnnxStep(tmp_path / "small.onnx")
    told = mine.meta["quantized"]
    assert 0 < told["difference"] < 0.05 * told["largest"]
    assert f"{told['difference']:.3g}" in capsys.readouterr().out
    got, wanted = mine.forward_steps(X[:1].numpy(), pad_end=True), model(X[:1]).numpy()
    assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()
    assert {v.dtype for k, v in mine.get_state().items() if k != "position"} == {np.dtype("float32")}
    with pytest.raises(cofx.InputError, match="batch of 1"):
        OnnxStep(tmp_path / "small.onnx").forward_steps(X.numpy())
    with pytest.raises(cofx.InputError, match="quantize is one of"):
        step.to_onnx(tmp_path / "other.onnx", quantize="int4")


OTHERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "hypot": lambda x: torch.hypot(x, 2 * x - 1),
    "median": lambda x: x.median(1).values,
    "kthvalue": lambda x: x.kthvalue(3, 1, keepdim=True).values,
    "logcumsumexp": lambda x: torch.logcumsumexp(x, 2),
    "searchsorted": lambda x: (
        torch.searchsorted(torch.tensor([-1.0, 0.0, 0.5]), x.masked_fill(x > 1, torch.nan).contiguous()) * x
    ),
    "to the right": lambda x: (
        torch.searchsorted(torch.tensor([-2, 0, 0, 1]), x.mul(2).long().contiguous(), right=True) * x
    ),
    "gcd": lambda x: torch.gcd((x * 60).long(), (x.roll(1, 1) * 1e6).long()) * x,
}
SLOW = [pytest.param(["gcd"], marks=pytest.mark.slow)]  # in as many rounds as a number has bits


@pytest.mark.parametrize("names", [[n for n in OTHERS if n != "gcd"], *SLOW], ids=["most", "gcd"])
def test_ops_written_in_others(names: list[str], tmp_path) -> None:
    class Ops(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(OTHERS[n](x) for n in names)

    step = cofx.compile(Ops(), X, equivalence="stream", time_dim=2)
    step.to_onnx(tmp_path / "step.onnx")
    mine = OnnxStep(tmp_path / "step.onnx")
    for t in range(20):
        for got, wanted in zip(mine.forward_step(X[:, :, t].numpy()), step.forward_step(X[:, :, t]), strict=True):
            np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-6)
