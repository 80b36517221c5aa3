"""Files that are broken or made to do harm: an error in a line or two, nothing executed, nothing written."""

import copy
import io
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import cofx
from cofx import checkpoints
from cofx.runtime import OnnxStep

X = np.random.default_rng(0).standard_normal((2, 3, 12)).astype("float32")


class Net(nn.Module):
    """(batch, 3, time) and an offset (batch, 3) -> (batch, 4, time / 2) and the sum, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor, offset: torch.Tensor) -> dict[str, torch.Tensor]:
        y = x + offset[:, :, None]
        return {"deep": self.conv(y)[:, :, ::2], "sum": y}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    path = tmp_path_factory.mktemp("graph") / "step.onnx"
    torch.manual_seed(0)
    with torch.no_grad():
        step = cofx.compile(Net().eval(), (torch.from_numpy(X), torch.zeros(2, 3)), time_dim=(2, None))
        step.to_onnx(path)
    return onnx.load(path)


def meta_of(graph: onnx.ModelProto) -> Any:
    return json.loads(next(p.value for p in graph.metadata_props if p.key == "cofx"))


def written(graph: onnx.ModelProto, text: str, path: Path) -> Path:
    """The graph with this text for metadata."""
    other = onnx.ModelProto()
    other.CopyFrom(graph)
    next(p for p in other.metadata_props if p.key == "cofx").value = text
    onnx.save(other, path)
    return path


def places(node: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a nest of dicts and lists."""
    if at:
        yield at
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(value, (*at, key))


def replaced(meta: Any, at: tuple[Any, ...], value: Any) -> Any:
    meta = copy.deepcopy(meta)
    node = meta
    for key in at[:-1]:
        node = node[key]
    node[at[-1]] = value
    return meta


HOSTILE = [
    None,
    True,
    -1,
    0,
    3,
    2**31,
    10**30,
    0.5,
    "x",
    "1/0",
    "9e99999999",
    "__import__('os')",
    [],
    {},
    [0],
    {"list": [0]},
]


@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_wrong_metadata(graph: onnx.ModelProto, tmp_path: Path, value: Any) -> None:
    """Each part of it in turn is something else: refused, or of no consequence."""
    meta, refused = meta_of(graph), 0
    for at in places(meta):
        path = written(graph, json.dumps(replaced(meta, at, value)), tmp_path / "step.onnx")
        try:
            step = OnnxStep(path)
            step.forward_steps(X, X[:, :, 0], pad_end=True)
            step.clean_state()
            step.set_state({})
            step.lane_layout()
            assert all(len(o) == 6 for o in step.outputs) and step.equivalence
        except cofx.CofxError as error:
            assert len(str(error)) < 500
            refused += 1
    assert refused > 60


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "7", "{}", "[" * 99999, '{"format": 2}', '{"format": 1}', "9" * 9999],
    ids=lambda t: t[:9],
)
def test_no_metadata_at_all(graph: onnx.ModelProto, tmp_path: Path, text: str) -> None:
    with pytest.raises(cofx.InputError, match="was not made by|has format"):
        OnnxStep(written(graph, text, tmp_path / "step.onnx"))


def test_sizes_beyond_memory(graph: onnx.ModelProto, tmp_path: Path) -> None:
    """The graph and its metadata agree on a state of terabytes."""
    huge, meta = onnx.ModelProto(), meta_of(graph)
    huge.CopyFrom(graph)
    state = meta["states"][-1]
    state["shape"][1] = 2**40
    for value in (*huge.graph.input, *huge.graph.output):
        if value.name in (state["name"], state["out"]):
            value.type.tensor_type.shape.dim[1].dim_value = 2**40
    path = written(huge, json.dumps(meta), tmp_path / "step.onnx")
    with pytest.raises(cofx.InputError, match="no room|cannot be run"):
        OnnxStep(path).forward_steps(X, X[:, :, 0])


# -- checkpoints and programs ------------------------------------------------------------------------------------------


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harmed"),))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder; nothing may be written to it by what is read."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not Path("harmed").exists()


def rewritten(source: Path, target: Path, **parts: bytes) -> None:
    """A copy of an archive, stored, with other content for the parts whose names end so."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            end = member.filename.rsplit("/", 1)[-1].replace(".", "_")
            new.writestr(member.filename, parts.get(end, old.read(member)))


def bomb(source: Path, target: Path, end: str) -> None:
    """A copy in which a part is 400 MB of zeros, packed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            if member.filename.endswith(end):
                with new.open(member.filename, "w", force_zip64=True) as part:
                    for _ in range(400):
                        part.write(bytes(10**6))
            else:
                new.writestr(member.filename, old.read(member))


def saved(model: nn.Module, path: Path) -> Path:
    torch.export.save(torch.export.export(model, (torch.randn(2, 3, 20),)), path)
    return path


def dumped(thing: Any) -> bytes:
    """As torch saves it."""
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def safetensors(header: bytes, size: int | None = None) -> bytes:
    return (len(header) if size is None else size).to_bytes(8, "little") + header


@pytest.mark.parametrize("end", ["data.pkl", "data/0", "byteorder"])
def test_a_zip_bomb(folder: Path, end: str) -> None:
    torch.save({"a": torch.zeros(4)}, "small.pt")
    bomb(Path("small.pt"), Path("bomb.pt"), end)
    assert Path("bomb.pt").stat().st_size < 10**6
    with pytest.raises(cofx.InputError, match="would unpack to 400,"):
        checkpoints.load_state_dict("bomb.pt")
    saved(nn.Conv1d(3, 2, 3), Path("small.pt2"))
    bomb(Path("small.pt2"), Path("bomb.pt2"), "weight_0")
    with pytest.raises(cofx.InputError, match="would unpack to 400,"):
        checkpoints.load_model("bomb.pt2", trust_pickle=True)


LOOP: dict[str, Any] = {}
LOOP["state_dict"] = LOOP
HUGE = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
CHECKPOINTS = {
    "pickle.safetensors": pickle.dumps({"a": 1}),
    "torch.safetensors": dumped({"a": torch.zeros(3)}),
    "header.safetensors": safetensors(b"{}", 2**60),
    "beyond.safetensors": safetensors(b"{}", 10**8),
    "huge.safetensors": safetensors(HUGE),
    "deep.safetensors": safetensors(b"[" * 200_000),
    "types.safetensors": safetensors(b'{"a": {"dtype": 7, "shape": "x", "data_offsets": []}}'),
    "pickle.pt": pickle.dumps(Harmful()),
    "within.pt": dumped({"state_dict": Harmful()}),
    "array.pt": pickle.dumps(np.zeros(3)),
    "loop.ckpt": dumped(LOOP),
    "numbers.pth": dumped([1, 2]),
    "names.pt": dumped({1: torch.zeros(2)}),
    "truncated.pt": dumped({"a": torch.zeros(99)})[:-40],
    "half.pt": dumped({"a": torch.zeros(99)})[:700],
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_that_are_none(folder: Path, name: str) -> None:
    Path(name).write_bytes(CHECKPOINTS[name])
    with pytest.raises(cofx.InputError) as told:
        checkpoints.load_state_dict(name)
    assert name in str(told.value) and len(str(told.value)) < 500


def test_a_storage_that_is_shorter_than_its_tensor(folder: Path) -> None:
    Path("long.pt").write_bytes(dumped({"a": torch.zeros(1000)}))
    rewritten(Path("long.pt"), Path("short.pt"), **{"0": bytes(16)})
    with pytest.raises(cofx.InputError, match="short.pt cannot be read"):
        checkpoints.load_state_dict("short.pt")


def test_an_array_archive_is_no_checkpoint(folder: Path) -> None:
    np.savez("a.npz", np.zeros(3))
    with pytest.raises(cofx.InputError, match="a.npz"):
        checkpoints.load_state_dict("a.npz")


def test_pickles_in_an_exported_program(folder: Path) -> None:
    """Its sample inputs, its weights, its constants: none is unpickled without being asked to."""
    good, bad = saved(nn.Conv1d(3, 2, 3), Path("good.pt2")), Path("bad.pt2")
    assert isinstance(checkpoints.load_model("good.pt2"), nn.Module)
    rewritten(good, bad, model_pt=dumped(Harmful()))
    with pytest.raises(cofx.InputError, match="holds pickles .*trust-pickle"):
        checkpoints.load_model("bad.pt2")
    with zipfile.ZipFile(good) as archive:
        name = next(n for n in archive.namelist() if n.endswith("weights_config.json"))
        config = json.loads(archive.read(name))
    for entry in config["config"].values():
        entry["use_pickle"] = True
    rewritten(good, bad, model_weights_config_json=json.dumps(config).encode(), weight_0=dumped(Harmful()))
    with pytest.raises(cofx.InputError, match="holds pickles .*weight_0"):
        checkpoints.load_model("bad.pt2")
    for kind in ("custom_obj_0", "opaque_obj_0", "../x"):
        for entry in config["config"].values():
            entry["path_name"] = kind
        rewritten(good, bad, model_constants_config_json=json.dumps(config).encode())
        with pytest.raises(cofx.InputError, match="holds pickles|cannot be read"):
            checkpoints.load_model("bad.pt2")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + b"0" * 100, pickle.dumps(Harmful()), b"{}"])
def test_what_is_no_exported_program(folder: Path, content: bytes) -> None:
    Path("a.pt2").write_bytes(content)
    for trust in (False, True):
        with pytest.raises(cofx.InputError, match="a.pt2 cannot be read"):
            checkpoints.load_model("a.pt2", trust_pickle=trust)
    for size in (100, 1000, -60):
        saved(nn.Conv1d(3, 2, 3), Path("b.pt2"))
        Path("b.pt2").write_bytes(Path("b.pt2").read_bytes()[:size])
        with pytest.raises(cofx.InputError, match="b.pt2 cannot be read"):
            checkpoints.load_model("b.pt2")
