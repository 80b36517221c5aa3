"""A branch in Python on the clip's length is never taken for granted."""

import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cofx
from cofx.runtime import OnnxStep
from models.sample import Net

X = torch.randn(1, 3, 400, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def threshold(n: int) -> nn.Module:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        if x.shape[2] > n:
            y = y.tanh()
        return y

    return Net(forward, conv=nn.Conv1d(3, 3, 3, padding=1))


def test_a_stream_that_ends_short_of_a_branch_is_refused_with_the_line() -> None:
    model = threshold(20)
    step = cofx.compile(model, X[:, :, :30])
    step.forward_steps(X[:, :, :20])
    with pytest.raises(cofx.InputError) as error:
        step.flush()
    assert "y = y.tanh()" in str(error.value) and "test_length_branches.py" in str(error.value)
    rest = step.forward_steps(X[:, :, 20:21], pad_end=True)
    torch.testing.assert_close(rest, model(X[:, :, :21])[:, :, -rest.shape[2] :])
    assert step.verify(X).exact


def test_a_stream_that_runs_past_a_branch_is_stopped_there_with_the_line() -> None:
    model = threshold(100)
    step = cofx.compile(model, X[:, :, :30])
    frames = [step.forward_steps(X[:, :, :99]), step.forward_step(X[:, :, 99]).unsqueeze(2)]
    with pytest.raises(cofx.InputError, match="more than 100 frames") as error:
        step.forward_step(X[:, :, 100])
    assert "y = y.tanh()" in str(error.value)
    torch.testing.assert_close(torch.cat([*frames, step.flush()], 2), model(X[:, :, :100]))


def test_a_branch_on_parity() -> None:
    model = Net(lambda m, x: x * 2 if x.shape[2] % 2 else x * 3)
    step = cofx.compile(model, X[:, :, :30])
    step.forward_steps(X[:, :, :31])
    with pytest.raises(cofx.InputError, match="cannot end here"):
        step.forward_steps(X[:, :, 31:33], pad_end=True)
    assert step.forward_steps(X[:, :, 31:32], pad_end=True) is not None


def test_a_number_that_changes_within_one_line() -> None:
    model = Net(lambda m, x: x * (2.0 if x.shape[2] > 50 else 3.0))
    with pytest.raises(cofx.InputError, match="more than 50 frames"):
        cofx.compile(model, X[:, :, :15]).forward_steps(X[:, :, :51])


def test_a_branch_just_beyond_the_clip_makes_clips() -> None:
    step = cofx.compile(threshold(20), X[:, :, :15])
    assert step.equivalence == "clip" and step.verify(X[:, :, :40]).exact
    assert "y = y.tanh()" in str(step.report())


def test_a_branch_where_the_trace_fixes_the_length() -> None:
    """max_pool1d fixes it: the two lengths that were compared have the same form, others do not."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = F.max_pool1d(x, 2)
        return y.tanh() if x.shape[2] > 50 or x.shape[2] < 10 else y

    step = cofx.compile(Net(forward), X[:, :, :20])
    assert step.equivalence == "stream" and step.verify(X[:, :, :48]).exact
    with pytest.raises(cofx.InputError, match="more than 50 frames"):
        step.forward_steps(X[:, :, :52])
    step.forward_steps(X[:, :, :8])
    with pytest.raises(cofx.InputError, match="cannot end here"):
        step.flush()


def test_a_form_that_differs_at_another_length_is_recomputed_over_clips() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = F.max_pool1d(x, 2)
        for _ in range(x.shape[2] // 16):
            y = m.conv(y)
        return y

    model = Net(forward, conv=nn.Conv1d(3, 3, 3, padding=1))
    step = cofx.compile(model, X[:, :, :32])
    assert step.equivalence == "clip" and step.verify(X[:, :, :80]).exact
    assert "m.conv(y)" in str(step.report())
    with pytest.raises(cofx.RefusedError, match="depends on the clip's length"):
        cofx.compile(model, X[:, :, :32], equivalence="stream")


def test_a_prefix_goes_through_every_length() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        last = m.memory(x.mT)[1][-1]
        return last * 2 if x.shape[2] > 5 else last

    model = Net(forward, memory=nn.GRU(3, 4, batch_first=True))
    step = cofx.compile(model, X[:, :, :12])
    assert step.equivalence == "clip" and step.verify(X[:, :, :30]).exact


def test_a_model_without_branches_is_not_asked_again() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 3, stride=2, padding=1), nn.ConvTranspose1d(8, 3, 4, stride=2, padding=1))
    step = cofx.compile(model, X[:, :, :32])
    step.forward_steps(X[:, :, :101])
    step.flush()
    assert not step.compiled.plan.runs.seen
    before = time.perf_counter()
    for n in range(101, 151):
        step.forward_steps(X[:, :, n : n + 1], pad_end=True)
    assert time.perf_counter() - before < 10


@pytest.mark.parametrize(("entries", "example"), [(14, 12), (12, 12), (13, 12), (14, 7), (40, 12), (400, 12)])
def test_a_table_is_read_to_its_end(entries: int, example: int, tmp_path) -> None:
    """However few entries there are beyond the example: step by step, in lanes and in a file."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(1, 3, entries))
            self.conv = nn.Conv1d(3, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return y + self.table[:, :, : y.shape[2]]

    model, x = Table().eval(), torch.randn(2, 3, entries + 1)
    step = cofx.compile(model, x[:, :, :example])
    assert step.equivalence == "stream"
    with torch.no_grad():
        whole = model(x[:, :, :entries])
        torch.testing.assert_close(step.forward_steps(x[:, :, :entries], pad_end=True), whole)
        with pytest.raises(cofx.InputError, match="longer than a table"):
            step.forward_steps(x[:, :, entries:])
        step.clean_state()
        step.to_onnx(tmp_path / "step.onnx")
        mine = OnnxStep(tmp_path / "step.onnx")
        got = mine.forward_steps(x[:, :, :entries].numpy(), pad_end=True)
        torch.testing.assert_close(torch.from_numpy(got), whole, rtol=1e-4, atol=1e-5)
        for t in range(entries):
            step.forward_step(x[:, :, t], ready=[True, True])
        with pytest.raises(cofx.InputError, match="longer than a table"):
            step.forward_step(x[:, :, entries], ready=[True, True])
