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
from cofx import compile as cofx_compile
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

    class Squeezed(Net):
        def forward(self, x):
            y = self.first(x).relu()
            return self.second(y * y.mean(2, keepdim=True).sigmoid())

    class Several(Net):
        def forward(self, x):
            return {"file": super().forward(x), "same": x}

    class Keeps(nn.Module):
        def forward(self, x):
            y = x.mT
            return nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True).mT

    def fails():
        raise RuntimeError("in the factory")

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.memory = nn.Embedding(2, 4), nn.GRU(4, 3, batch_first=True)

        def forward(self, x):
            return self.memory(self.table(x))[0]

    def leaves():
        raise SystemExit(0)

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


def test_inspect(folder: Path) -> None:
    found = as_json("inspect", "cli_models:Net", *SHAPE, "--nodes", "--html", "report.html")
    assert "conv1d" in Path("report.html").read_text()
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
        ["os:system", *SHAPE, "--kwargs", '{"command": "touch harmed.py"}'],
        ["torch:os.system", *SHAPE, "--kwargs", '{"command": "touch harmed.py"}'],
        ["builtins:__import__", *SHAPE, "--kwargs", '{"name": "this"}'],
        ["cli_models:__builtins__.exec", *SHAPE],
        ["__import__('os').system('touch harmed.py'):x", *SHAPE],
        ["sub/cli_models:Net", *SHAPE],
        ["cli_models:leaves", *SHAPE],
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


def test_an_input_that_the_model_itself_does_not_take_is_no_refusal() -> None:
    for command in ("inspect", "verify"):
        told = as_json(command, "cli_models:Net", "-i", "1x4x20", code=2)
        assert (
            "the model itself fails on (1, 4, 20) of float32: RuntimeError" in told["error"]
            and "3 channels" in told["error"]
        )


def test_what_the_readme_says_is_so(folder: Path) -> None:
    """Its Python runs as it stands, and the numbers in its C++ are those of the graph."""
    as_json("convert", "cli_models:Net", *SHAPE, "-o", "out")
    text = (folder / "out/README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0].replace("step.onnx", "out/step.onnx")
    x = np.random.default_rng(0).standard_normal((1, 3, 40)).astype("float32")
    scope = {"x": x}
    exec(code, scope)
    assert scope["y"].shape == (1, 2, 19) and scope["rest"] is None
    meta = json.loads((folder / "out/step.json").read_text())
    names = [i.name for i in scope["step"].session.get_inputs()]
    assert f"inputs[{names.index('state_in_000')} + k]" in text and f"k < {len(meta['states'])};" in text
    assert [o.name for o in scope["step"].session.get_outputs()][-len(meta["states"]) :][0] == "state_out_000"
    assert "`x` float32 (batch, 3, 2)" in text and "run({x, start, ready, length, ...state})" in text


def test_inputs_of_other_dtypes() -> None:
    assert as_json("verify", "cli_models:Tokens", "-i", "1x12:int64", "--time-dim", "1")["exact"]
    assert as_json("verify", "cli_models:Tokens", "-i", "1x12:int64", "--time-dim", "1", "--length", "30")["exact"]
    for wrong in ("1x12", "1x12:load", "1x12:complex64", "1x12:", ":int64"):
        as_json("verify", "cli_models:Tokens", "-i", wrong, "--time-dim", "1", code=2)


def test_convert_to_int8(folder: Path) -> None:
    done = as_json("convert", "cli_models:Net", "--kwargs", '{"width": 64}', *SHAPE, "-o", "out", "--quantize", "int8")
    assert 0 < done["onnx"]["difference"] < 0.1
    assert json.loads((folder / "out/step.json").read_text())["quantized"]["kind"] == "int8"
    cofx("convert", "cli_models:Net", *SHAPE, "-o", "other", "--quantize", "int3", code=2)
    assert not (folder / "other").exists()


def test_what_looks_over_the_whole_clip_can_look_back(folder: Path) -> None:
    squeezed = ("cli_models:Squeezed", *SHAPE)
    assert "refused" in as_json("inspect", *squeezed, "--nonlocal-ops", "refuse")
    as_json("convert", *squeezed, "--nonlocal-ops", "continual", "--clip-length", "9", "-o", "out")
    meta = json.loads((folder / "out/step.json").read_text())
    assert meta["outputs"][0]["equivalence"] == "approximate" and meta["inputs"][0]["name"] == "x"
    assert as_json("inspect", *squeezed)["recomputed"]
    assert not as_json("inspect", *squeezed, "--nonlocal-ops", '{"aten.mean.dim": "continual"}')["recomputed"]
    for wrong in ("{mean", "forget"):
        as_json("inspect", *squeezed, "--nonlocal-ops", wrong, code=2)


def test_the_barest_graph(folder: Path) -> None:
    more = ("--no-controls", "--no-dynamic-batch", "--opset", "20")
    assert as_json("convert", "cli_models:Net", *SHAPE, "-o", "out", *more)["onnx"]["exact"]
    meta = json.loads((folder / "out/step.json").read_text())
    assert not meta["controls"]
    text = (folder / "out/README.md").read_text()
    assert "none ends" in text and "run({x, ...state})" in text and "flush" not in text


@pytest.mark.parametrize(
    ("failure", "code"), [(RuntimeError("out of disk"), 4), (OSError("disk"), 2), (KeyboardInterrupt(), 130)], ids=str
)
def test_a_conversion_that_fails_leaves_what_was_there(
    folder: Path, monkeypatch, failure: BaseException, code: int
) -> None:
    (folder / "out").mkdir()
    (folder / "out/step.onnx").write_text("older")

    def fail(*_):
        raise failure

    monkeypatch.setattr(convert, "_write_program", fail)
    cofx("convert", "cli_models:Net", *SHAPE, "-o", "out", code=code)
    assert [f.name for f in (folder / "out").iterdir()] == ["step.onnx"]
    assert (folder / "out/step.onnx").read_text() == "older"
    assert not [f for f in folder.iterdir() if f.name.startswith(".out")]


def test_run_writes_every_output(folder: Path) -> None:
    """By name, whatever that is."""
    as_json("convert", "cli_models:Several", *SHAPE, "-o", "out")
    np.save("x.npy", x := np.random.default_rng(0).standard_normal((1, 3, 200)).astype("float32"))
    done = as_json("run", "out/step.onnx", "-i", "x.npy", "-o", "y.npz")
    assert done["outputs"] == {"file": [1, 2, 99], "same": [1, 3, 200]} and done["frames"] == 99
    with np.load("y.npz") as got, torch.no_grad():
        import cli_models

        torch.manual_seed(0)
        np.testing.assert_array_equal(got["same"], x)
        assert got["file"].shape == cli_models.Several()(torch.from_numpy(x))["file"].shape
    assert "y.npz: file of shape (1, 2, 99)" in cofx("run", "out/step.onnx", "-i", "x.npy", "-o", "y.npz").stdout


def test_run_tells_bad_files(folder: Path) -> None:
    (folder / "bad.onnx").write_bytes(b"not a graph")
    np.save("x.npy", np.zeros((3, 9), "float32"))
    cofx("run", "bad.onnx", "--input", "x.npy", code=2)
    cofx("run", "missing.onnx", "--input", "x.npy", code=2)
    assert not (folder / "output.npy").exists()


def test_what_is_wrong_with_a_run_is_told_before_it_begins(folder: Path) -> None:
    as_json("convert", "cli_models:Net", *SHAPE, "-o", "out")
    np.save("x.npy", np.zeros((3, 9), "float32"))
    np.save("flat.npy", np.zeros(9, "float32"))
    np.save("other.npy", np.zeros((1, 4, 9), "float32"))
    np.save("none.npy", np.zeros((3, 0), "float32"))
    np.save("words.npy", np.array([["a"]]))
    np.savez("x.npz", np.zeros(3))
    Path("short.npy").write_bytes(Path("x.npy").read_bytes()[:90])
    Path("huge.npy").write_bytes(Path("x.npy").read_bytes().replace(b"(3, 9)", b"(3, 9" + b"0" * 20 + b")"))
    Path("text.mp4").write_text("no video")
    before = sorted(folder.rglob("*"))
    for arguments, words in [
        (["-i", "x.npy", "-o", "y.txt"], "written as"),
        (["-i", "x.npy", "-o", "nowhere/y.npy"], "nowhere is not a folder"),
        (["-i", "x.npy", "-i", "x.npy"], "1 inputs (x), 2 recordings"),
        (["-i", "flat.npy"], "takes (batch, 3, time)"),
        (["-i", "other.npy"], "takes (batch, 3, time)"),
        (["-i", "none.npy"], "no frames"),
        (["-i", "words.npy"], "no array of numbers"),
        (["-i", "x.npz"], "x.npz cannot be read"),
        (["-i", "short.npy"], "short.npy cannot be read"),
        (["-i", "huge.npy"], "huge.npy cannot be read"),
        (["-i", "text.mp4"], "text.mp4 cannot be read"),
        (["-i", "out"], "out is not a file"),
    ]:
        told = as_json("run", "out/step.onnx", *arguments, code=2)
        assert words in told["error"] and told["kind"] == "wrong" and len(told["error"]) < 500
    for arguments, words in [
        (["--data", "x.npz"], "takes .npy"),
        (["--data", "huge.npy"], "cannot be read"),
        (["--data", "words.npy"], "no array of numbers"),
        (["--data", "flat.npy"], "expected"),
        (["--onnx", "x.npy"], "cannot be run"),
        (["--onnx", "none.onnx"], "cannot be run"),
    ]:
        assert words in as_json("verify", "cli_models:Net", *SHAPE, *arguments, code=2)["error"]
    assert sorted(f for f in folder.rglob("*") if "__pycache__" not in f.parts) == [
        f for f in before if "__pycache__" not in f.parts
    ]


def test_all_that_is_kept_has_room_in_the_files(folder: Path) -> None:
    """step.pt2 is compared as step.onnx is."""
    done = as_json("convert", "cli_models:Keeps", *SHAPE, "-o", "out", "--longest", "90")
    assert done["program"]["exact"] and done["onnx"]["exact"]
    np.save("x.npy", x := np.random.default_rng(0).standard_normal((1, 3, 90)).astype("float32"))
    assert as_json("run", "out/step.onnx", "-i", "x.npy")["frames"] == 90
    np.save("x.npy", np.concatenate([x, x], 2))
    assert "90" in as_json("run", "out/step.onnx", "-i", "x.npy", code=2)["error"]


def test_a_program_that_is_wrong_is_not_shipped(folder: Path, monkeypatch) -> None:
    write = convert._write_program

    def other(step, *rest) -> None:
        import cli_models

        write(cofx_compile(cli_models.Net().eval(), torch.randn(1, 3, 20)), *rest)

    monkeypatch.setattr(convert, "_write_program", other)
    assert "step.pt2 by" in as_json("convert", "cli_models:Net", *SHAPE, "-o", "out", code=2)["error"]
    assert not (folder / "out").exists()


def test_what_was_not_foreseen_has_an_exit_code_of_its_own(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(convert, "convert", lambda *_: 1 / 0)
    told = cofx("convert", "cli_models:Net", *SHAPE, "-o", "out", "--json", code=4)
    assert json.loads(told.stdout) == {"error": "ZeroDivisionError: division by zero", "kind": "failed"}
    assert "Traceback" in told.stderr


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
    assert (
        "takes (batch, 3, time)" in cofx("run", "out/step.onnx", "--input", "mono.wav", "-o", "none.npy", code=2).stderr
    )
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
    done = subprocess.run([sys.executable, "-m", "cofx", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(c in done.stdout for c in ("inspect", "verify", "run", "bench", "convert"))
