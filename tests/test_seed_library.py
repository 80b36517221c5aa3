"""Every name of continual-inference has a construct of plain PyTorch in the collection, which meets the contract there.

Here: that no name is left out, the layers that it takes as they are, and what concerns the calls around a net.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import cofx
from contract import check_contract
from models import SAMPLES
from models.seed_library import LAYER_SAMPLES, LAYERS, ROWS
from streaming import same

NAMES = {sample.name for sample in SAMPLES}
PAGE = Path(__file__).parent.parent / "docs" / "from-continual-inference.md"


@pytest.mark.parametrize("name", ROWS)
def test_row_has_its_nets(name: str) -> None:
    missing = [net for net in ROWS[name] if net not in NAMES]
    assert ROWS[name] and not missing, f"no such net in the collection: {missing}"


def test_no_name_is_left_out() -> None:
    """The published package has no module that is not in the table, nor converts a layer that is not."""
    co = pytest.importorskip("continual")
    public = {
        name for name, thing in vars(co).items()
        if not name.startswith("_") and (isinstance(thing, type) or callable(thing)) and "continual" in thing.__module__
    }  # fmt: skip
    about_calls = {"CoModule", "PaddingMode", "call_mode", "flat_state_dict", "load_state_dict", "state_dict"}
    assert public - about_calls == set(ROWS)
    layers = {m.__name__ for m in (*co.convert.NAIVE_MAPPING, *co.convert.CONDITIONAL_MAPPING)}
    assert layers <= set(LAYERS)
    assert len(LAYERS) == 27 + 8 + 6


@pytest.mark.parametrize("sample", LAYER_SAMPLES, ids=lambda sample: sample.name)
def test_layer(sample) -> None:
    check_contract(sample)


def test_retroactive_attention_gives_all_rows() -> None:
    """``window_output="all"``: at every step what the layer gives for each frame of the clip that ends there."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True).eval()
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    x = torch.randn(2, 14, 8)
    for model in (layer, Attend().eval()):
        step = cofx.compile(model, x[:, :5], time_dim=1, window_output="all")
        with torch.no_grad():
            got = [step.forward_step(frame) for frame in x.unbind(1)]
            assert [y is None for y in got] == [t < 4 for t in range(14)]
            for t in range(4, 14):
                assert same(got[t], model(x[:, t - 4 : t + 1])), f"step {t}"


def test_call_mode_of_a_net_and_of_a_block() -> None:
    """As co's: for good, or within ``with``; it nests, and an inner block does not end the outer one."""
    step = cofx.compile(nn.Conv1d(3, 4, 3).eval(), torch.randn(1, 3, 9))
    x = torch.randn(1, 3, 9)
    with torch.no_grad():
        assert step(x).shape == (1, 4, 7)
        with cofx.call_mode("forward_step"):
            assert step(x[:, :, 0]) is None
            with cofx.call_mode("forward_steps"):
                assert step(x[:, :, 1:]).shape == (1, 4, 7)
            assert step(x[:, :, 0]).shape == (1, 4)
        assert step(x).shape == (1, 4, 7)
        step.call_mode = "forward_step"
        assert step(x[:, :, 0]).shape == (1, 4)


def test_page_names_every_module() -> None:
    rows = set(re.findall(r"`co\.(\w+)", PAGE.read_text()))
    assert set(ROWS) | {"call_mode"} <= rows, sorted(set(ROWS) - rows)


def test_page_runs() -> None:
    """The page's Python blocks, one after the other; what it says is printed is printed."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    space: dict[str, object] = {}
    assert blocks
    for block in blocks:
        if "import continual" in block:
            pytest.importorskip("continual")
        exec(compile(block, str(PAGE), "exec"), space)


def test_published_ratios_are_those_of_the_benchmark() -> None:
    """What the pages say of multiply-adds is what `benchmarks/flops.py` found: no less than co's own."""
    root = PAGE.parent.parent
    found = {r["model"]: r for r in json.loads((root / "benchmarks" / "results" / "flops.json").read_text())}
    rows = re.findall(r"\| ([\w-]+) \| \d+ \| ([\d.]+)x \| ([\d.]+)x \|", PAGE.read_text())
    assert {name for name, *_ in rows} == {name for name, r in found.items() if r["published"]}
    for name, ours, theirs in rows:
        assert (found[name]["ratio"], found[name]["published"]) == (float(ours), float(theirs))
        assert float(ours) >= float(theirs)
    subprocess.run([sys.executable, root / "benchmarks" / "readme.py", "--check"], check=True)
