"""The command line, run in this process by typer's runner; the commands once as a program."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from cofx import checkpoints, convert
from cofx.cli import app
from cofx.runtime.errors import InputError

MODELS = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, width=8):
            super().__init__()
            self.first, self.second = nn.Conv1d(3, width, 3, padding=1), nn.Conv1d(width, 2, 3, stride=2)

        def forward(self, x):
            return self.second(self.first(x).relu())

    class Pooled(Net):
        def forward(self, x):
            return self.first(x).mean(2)

    def fails():
        raise RuntimeError("in the factory")

    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    class Video(nn.Module):
        def forward(self, x):
            y = x.mean((1, 3, 4))[:, None]
            return (y[:, :, 1:] + y[:, :, :-1]) / 2

    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.big = nn.Linear(3, 3)

        def forward(self, x):
            return x + torch.randn_like(x)
"""
SHAPE = ["--input", "1x3x20"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cli_models.py").write_text(textwrap.dedent(MODELS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("cli_models", None)
    return tmp_path


def cofx(*arguments: str, code: int = 0):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def as_json(*arguments: str, code: int = 0) -> dict:
    return json.loads(cofx(*arguments, "--json", code=code).stdout)


def net(**kwargs) -> nn.Module:
    import cli_models

    torch.manual_seed(3)
    return cli_models.Net(**kwargs).eval()


def test_inspect() -> None:
    found = as_json("inspect", "cli_models:Net", *SHAPE, "--nodes")
    assert found["outputs"] == [{"equivalence": "stream", "delay": 3, "receptive_field": 5, "stride": 2, "padding": 1}]
    assert {s["name"] for s in found["state"]} == {"state_x", "state_relu"} and found["streamed"] == 1
    assert any("Stream(" in n["fact"] for n in found["nodes"])
    assert "share streamed" in cofx("inspect", "cli_models:Net", *SHAPE).stdout


def test_inspect_tells_a_refusal_and_does_not_fail() -> None:
    assert "depends on the data" in " ".join(as_json("inspect", "cli_models:Branches", *SHAPE)["refused"])
    assert "random numbers" in cofx("inspect", "cli_models:Stateful", *SHAPE).stdout
    refused = as_json("inspect", "cli_models:Pooled", *SHAPE, "--equivalence", "stream")["refused"]
    assert "a reduction over the time axis" in refused[0] or "mean" in " ".join(refused)


def test_verify_and_its_exit_codes(folder: Path) -> None:
    assert as_json("verify", "cli_models:Net", *SHAPE)["exact"]
    np.save("clip.npy", np.random.randn(2, 3, 50).astype("float32"))
    assert as_json("verify", "cli_models:Net", *SHAPE, "--data", "clip.npy")["compared"] == 24
    assert as_json("verify", "cli_models:Branches", *SHAPE, code=3)["kind"] == "refused"
    assert as_json("verify", "cli_models:Missing", *SHAPE, code=2)["kind"] == "wrong"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense", *SHAPE],
        ["no.such:thing", *SHAPE],
        ["cli_models:Net", "--input", "1x3x"],
        ["cli_models:Net", *SHAPE, "--kwargs", "{width: 8}"],
        ["cli_models:Net", *SHAPE, "--kwargs", '{"depth": 8}'],
        ["cli_models:Net", *SHAPE, "--time-dim", "second"],
        ["cli_models:Net", *SHAPE, "--checkpoint", "nowhere.pt"],
        ["cli_models:Net"],
        ["cli_models:fails", *SHAPE],
        ["..:x", *SHAPE],
        ["a:b:c", *SHAPE],
        ["os:getcwd", *SHAPE],
        ["/etc/passwd:x", *SHAPE],
        ["\0:x", *SHAPE],
        ["../../none.pt2", *SHAPE],
        ["cli_models:Net", *SHAPE, "--kwargs", "[" * 9999],
        ["cli_models:Net", *SHAPE, "--length", "-3"],
        ["cli_models:Net", "--input", "99999999999x3x999999"],
        ["nothing.pt2", *SHAPE],
    ],
    ids=str,
)
def test_wrong_arguments(folder: Path, arguments: list[str]) -> None:
    """Said in a line or two; nothing is written."""
    before = sorted(folder.rglob("*.py"))
    told = cofx("verify", *arguments, code=2)
    assert told.stdout == "" and told.stderr and "Traceback" not in told.stderr
    assert sorted(f for f in folder.rglob("*") if f.is_file() and "__pycache__" not in f.parts) == before


def test_bench() -> None:
    found = as_json("bench", "cli_models:Net", *SHAPE, "--steps", "3")
    assert found["step_ms"] > 0 and found["window_frames"] == 20


def test_convert_writes_all_and_run_streams_a_recording(folder: Path) -> None:
    model = net(width=4)
    torch.save(model.state_dict(), "weights.pt")
    done = as_json("convert", "cli_models:Net", "--kwargs", '{"width": 4}', "--checkpoint", "weights.pt", *SHAPE,
                   "-o", "out")  # fmt: skip
    assert done["files"] == ["README.md", "step.json", "step.onnx", "step.pt2"] and done["difference"] < 1e-5
    assert sorted(f.name for f in (folder / "out").iterdir()) == done["files"]
    assert json.loads((folder / "out/step.json").read_text())["frames_per_step"] == 2
    recording = np.random.default_rng(0).standard_normal((3, 51)).astype("float32")
    np.save("x.npy", recording)
    with torch.no_grad():
        expected = model(torch.from_numpy(recording)[None]).numpy()
    for file in ("y.npy", "y.csv"):
        assert as_json("run", "out/step.onnx", "--input", "x.npy", "-o", file)["frames"] == expected.shape[2]
    np.testing.assert_allclose(np.load("y.npy"), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.loadtxt("y.csv", delimiter=","), expected[0].T, rtol=1e-4, atol=1e-5)
    program = torch.export.load("out/step.pt2")
    assert len(program.graph_signature.user_inputs) >= 5
    verified = as_json("verify", "cli_models:Net", "--kwargs", '{"width": 4}', "--checkpoint", "weights.pt", *SHAPE,
                       "--onnx", "out/step.onnx")  # fmt: skip
    assert verified["onnx"]["exact"]
    assert not as_json("verify", "cli_models:Net", "--kwargs", '{"width": 4}', *SHAPE, "--onnx", "out/step.onnx",
                       code=1)["onnx"]["exact"]  # fmt: skip


def test_convert_to_int8(folder: Path) -> None:
    done = as_json("convert", "cli_models:Net", "--kwargs", '{"width": 64}', *SHAPE, "-o", "out", "--quantize", "int8")
    assert 0 < done["onnx"]["difference"] < 0.1
    assert json.loads((folder / "out/step.json").read_text())["quantized"]["kind"] == "int8"
    cofx("convert", "cli_models:Net", *SHAPE, "-o", "other", "--quantize", "int3", code=2)
    assert not (folder / "other").exists()


@pytest.mark.parametrize("failure", [RuntimeError("out of disk"), KeyboardInterrupt()], ids=str)
def test_a_conversion_that_fails_leaves_what_was_there(folder: Path, monkeypatch, failure: BaseException) -> None:
    (folder / "out").mkdir()
    (folder / "out/step.onnx").write_text("older")

    def fail(*_):
        raise failure

    monkeypatch.setattr(convert, "_write_program", fail)
    assert CliRunner().invoke(app, ["convert", "cli_models:Net", *SHAPE, "-o", "out"]).exit_code != 0
    assert [f.name for f in (folder / "out").iterdir()] == ["step.onnx"]
    assert (folder / "out/step.onnx").read_text() == "older"
    assert not [f for f in folder.iterdir() if f.name.startswith(".out")]


def test_run_tells_bad_files(folder: Path) -> None:
    (folder / "bad.onnx").write_bytes(b"not a graph")
    np.save("x.npy", np.zeros((3, 9), "float32"))
    cofx("run", "bad.onnx", "--input", "x.npy", code=2)
    cofx("run", "missing.onnx", "--input", "x.npy", code=2)
    assert not (folder / "output.npy").exists()


def test_run_on_sound(folder: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (4001, 3)).astype("float32")
    soundfile.write("x.wav", sound, 8000, subtype="FLOAT")
    as_json("convert", "cli_models:Net", *SHAPE, "-o", "out")
    assert as_json("run", "out/step.onnx", "--input", "x.wav", "-o", "y.npy")["shape"] == [1, 2, 2000]
    np.save("x.npy", sound.T)
    as_json("run", "out/step.onnx", "--input", "x.npy", "-o", "z.npy")
    np.testing.assert_array_equal(np.load("y.npy"), np.load("z.npy"))
    Path("bad.wav").write_bytes(b"RIFF0000")
    assert "bad.wav cannot be read" in cofx("run", "out/step.onnx", "--input", "bad.wav", code=2).stderr
    soundfile.write("mono.wav", sound[:, 0], 8000)
    assert "expected" in cofx("run", "out/step.onnx", "--input", "mono.wav", "-o", "none.npy", code=2).stderr
    assert not Path("none.npy").exists()


def test_run_on_video(folder: Path) -> None:
    av = pytest.importorskip("av")
    with av.open("x.mp4", "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for t in range(9):
            image = np.full((16, 32, 3), 20 * t, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())
    as_json("convert", "cli_models:Video", "--input", "1x3x6x16x32", "-o", "out")
    assert as_json("run", "out/step.onnx", "--input", "x.mp4", "-o", "y.npy")["shape"] == [1, 1, 8]
    brightness = np.load("y.npy")[0, 0]
    np.testing.assert_allclose(brightness, (np.arange(8) + 0.5) * 20 / 255, atol=0.02)
    Path("bad.mp4").write_bytes(Path("x.mp4").read_bytes()[:100])
    assert "bad.mp4 cannot be read" in cofx("run", "out/step.onnx", "--input", "bad.mp4", code=2).stderr


# -- checkpoints ---------------------------------------------------------------------------------------------------


def save_lightning(model: nn.Module, path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {f"model.{n}": t for n, t in model.state_dict().items()}}, path)


def save_parallel(model: nn.Module, path: Path) -> None:
    torch.save({f"module._orig_mod.{n}": t for n, t in model.state_dict().items()}, path)


def save_safetensors(model: nn.Module, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(model.state_dict(), path)


@pytest.mark.parametrize(
    ("save", "name"),
    [(save_lightning, "a.ckpt"), (save_parallel, "a.pth"), (save_safetensors, "a.safetensors")],
    ids=["lightning", "parallel", "safetensors"],
)
def test_checkpoints_of_all_kinds(folder: Path, save, name: str) -> None:
    model, other = net(), net()
    torch.nn.init.zeros_(other.first.weight)
    save(model, folder / name)
    fit = checkpoints.apply_checkpoint(other, checkpoints.load_state_dict(folder / name))
    assert not fit.missing and not fit.unexpected
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_what_does_not_fit_is_listed(folder: Path) -> None:
    state = net().state_dict()
    del state["first.bias"]
    state["loss.weight"] = torch.zeros(2)
    torch.save(state, "odd.pt")
    told = cofx("verify", "cli_models:Net", *SHAPE, "--checkpoint", "odd.pt", code=2).stderr
    assert "missing     first.bias" in told and "unexpected  loss.weight" in told
    cofx("verify", "cli_models:Net", *SHAPE, "--checkpoint", "odd.pt", "--no-strict")
    torch.save(net(width=4).state_dict(), "narrow.pt")
    assert "other shapes" in cofx("verify", "cli_models:Net", *SHAPE, "--checkpoint", "narrow.pt", "--no-strict",
                                  code=2).stderr  # fmt: skip


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harmed"),))


def test_a_pickle_is_refused_and_nothing_of_it_is_run(folder: Path) -> None:
    torch.save({"state_dict": Harmful()}, "bad.pt")
    assert "--trust-pickle" in cofx("verify", "cli_models:Net", *SHAPE, "--checkpoint", "bad.pt", code=2).stderr
    assert not (folder / "harmed").exists()
    torch.save(net(), "module.pt")
    cofx("verify", "cli_models:Net", *SHAPE, "--checkpoint", "module.pt", code=2)
    cofx("verify", "cli_models:Net", *SHAPE, "--checkpoint", "module.pt", "--trust-pickle")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"PK\x03\x04" + b"0" * 100], ids=["empty", "ones", "zip"])
def test_broken_files(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(InputError):
        checkpoints.load_state_dict(folder / name)


def test_an_exported_program_is_a_model(folder: Path) -> None:
    dims = ({0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO},)
    torch.export.save(torch.export.export(net(), (torch.randn(2, 3, 20),), dynamic_shapes=dims), "net.pt2")
    assert as_json("verify", "net.pt2", *SHAPE)["exact"]


def test_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "cofx.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(c in done.stdout for c in ("inspect", "verify", "run", "bench", "convert"))
