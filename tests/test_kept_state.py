"""Models that keep something from one call for the next: they stream all the same, and come out as they went in."""

import functools
import sys
from typing import Any

import pytest
import torch
from torch import nn

import cofx
from cofx.passes.codegen.constants import Constants
from contract import compile_case, run_check
from models import Sample

TRIANGLES: dict[int, torch.Tensor] = {}


@functools.cache
def remembered(frames: int) -> torch.Tensor:
    return torch.ones(frames, frames).tril()


class Attention(nn.Module):
    """Attention to the frames so far, by a triangle that is as large as the clip."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.mix(x.mT).chunk(3, -1)
        scores = (q @ k.mT / 2).masked_fill(self.triangle(x.shape[2]) == 0, -1e9)
        return (scores.softmax(-1) @ v).mT

    def triangle(self, frames: int) -> torch.Tensor:
        raise NotImplementedError


class ByFunction(Attention):
    def triangle(self, frames: int) -> torch.Tensor:
        return remembered(frames)


class ByMethod(Attention):
    @staticmethod
    @functools.cache
    def triangle(frames: int) -> torch.Tensor:
        return torch.ones(frames, frames).tril()


class InFile(Attention):
    def triangle(self, frames: int) -> torch.Tensor:
        if frames not in TRIANGLES:
            TRIANGLES[frames] = torch.ones(frames, frames).tril()
        return TRIANGLES[frames]


class InClass(Attention):
    triangles: dict[int, torch.Tensor] = {}

    def triangle(self, frames: int) -> torch.Tensor:
        if frames not in self.triangles:
            self.triangles[frames] = torch.ones(frames, frames).tril()
        return self.triangles[frames]


class InModule(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.triangles: dict[int, torch.Tensor] = {}

    def triangle(self, frames: int) -> torch.Tensor:
        if frames not in self.triangles:
            self.triangles[frames] = torch.ones(frames, frames).tril()
        return self.triangles[frames]


class Table:
    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None

    def __call__(self, frames: int) -> torch.Tensor:
        if self.rows is None or len(self.rows) < frames:
            self.rows = torch.ones(frames, frames).tril()
        return self.rows[:frames, :frames]


class InObject(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.table = Table()

    def triangle(self, frames: int) -> torch.Tensor:
        return self.table(frames)


class InBuffer(Attention):
    """A buffer without entries to begin with: torch.export takes no buffer that changes its size."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.empty(0, 0), persistent=False)

    def triangle(self, frames: int) -> torch.Tensor:
        if self.rows.shape[0] < frames:
            self.rows = torch.ones(frames, frames).tril()
        return self.rows[:frames, :frames]


class Property(Attention):
    @functools.cached_property
    def rows(self) -> torch.Tensor:
        return torch.ones(64, 64).tril()

    def triangle(self, frames: int) -> torch.Tensor:
        return self.rows[:frames, :frames]


SLOW = [pytest.param(net, marks=pytest.mark.slow) for net in (ByMethod, InClass, InModule, Property)]
NETS = [ByFunction, InFile, InObject, InBuffer, *SLOW]


def everything_kept(model: nn.Module) -> dict[str, Any]:
    """What the nets of this file keep, by name."""
    kept: dict[str, Any] = {"file": dict(TRIANGLES), "class": dict(InClass.triangles)}
    kept |= {
        f"of {name}": dict(vars(m)) for name, m in [("module", model), ("table", getattr(model, "table", Table()))]
    }
    kept |= {"buffers": dict(model._buffers), "triangles": dict(getattr(model, "triangles", {}))}
    return kept


@pytest.mark.parametrize("called", [False, True], ids=["new", "called before"])
@pytest.mark.parametrize("net", NETS)
def test_a_model_that_keeps_its_masks(net: type[Attention], called: bool) -> None:
    """It streams, whether it has been called before or not, and keeps nothing that a trace made."""
    TRIANGLES.clear()
    InClass.triangles.clear()
    torch.manual_seed(0)
    model, clip = net().eval(), torch.randn(2, 4, 12)
    if called:
        with torch.no_grad():
            model(clip)
    before = everything_kept(model)
    step = cofx.compile(model, clip)
    assert step.equivalence == "stream"
    assert step.verify(torch.randn(2, 4, 60))
    after = everything_kept(model)
    for where, content in before.items():
        assert content.keys() == after[where].keys()
        assert all(after[where][name] is value for name, value in content.items())
    with torch.no_grad():
        assert type(model(torch.randn(2, 4, 17))) is torch.Tensor
    assert type(remembered(17)) is torch.Tensor and remembered(17) is remembered(17)
    assert sys.modules[__name__].remembered is remembered


def test_a_list_of_what_was_seen() -> None:
    """A model that takes down its features and counts its calls."""

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.seen, self.calls = nn.Conv1d(4, 4, 3), [], 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.seen.append(self.conv(x))
            return self.seen[-1]

    case = compile_case(Sample("watched", Watched, [(2, 4, 12)]))
    for check in ("offline", "chunks"):
        run_check(case, check)
    model = Watched().eval()
    cofx.compile(model, torch.randn(2, 4, 12))
    assert model.seen == [] and model.calls == 0


def test_a_constant_that_is_made_in_thousands_of_steps() -> None:
    """A mask that is filled entry by entry, say: it is followed without recursion."""
    graph = torch.fx.Graph()
    node = graph.get_attr("one")
    for _ in range(3000):
        node = graph.call_function(torch.ops.aten.add.Tensor, (node, 1))
    assert Constants({"one": torch.ones(())}, set()).value(node) == 3001
