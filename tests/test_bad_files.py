"""Files that are broken or made to do harm: an error in a line or two, nothing executed, nothing written."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import cofx
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
