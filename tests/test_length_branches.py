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


def test_another_form_may_have_other_constants() -> None:
    """Of transformers' Wav2Vec2Conformer one form had a constant where the other had a buffer."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = torch.stack([frame * torch.tensor([0.5]) for frame in x.unbind(2)], 2)
        return y + m.late.running_mean.unsqueeze(1) if x.shape[2] > 12 else y

    step = cofx.compile(Net(forward, late=nn.BatchNorm1d(3)), X[:, :, :12])
    assert step.equivalence == "clip" and step.verify(X[:, :, :12]).exact


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


MORE = [(13, 12), (14, 7), (40, 12), (400, 12)]
SIZES = [(14, 12), (12, 12), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in MORE)]


@pytest.mark.parametrize(("entries", "example"), SIZES)
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


class Steps(nn.Module):
    """Nearest interpolation back to the input's length repeats whole frames only where it is a multiple of n."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 2 * n - 1, n, n - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(self.conv(x), size=x.shape[2])


FILES = {
    "even": (Steps(2), 20, range(1, 90)),
    "short": (threshold(20), 30, range(1, 90)),
    "parity": (Net(lambda m, x: x * 2 if x.shape[2] % 2 else x * 3), 30, range(1, 130)),
    "fixed": (Net(lambda m, x: F.interpolate(F.max_pool1d(x, 2), size=x.shape[2])), 20, range(20, 60)),
    "none": (nn.Conv1d(3, 3, 3, stride=2), 20, range(1, 150)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_refuses_the_ends_that_the_step_model_refuses(name: str, tmp_path) -> None:
    """Those that were looked at and those beyond, told as a length and by a flush."""
    model, example, lengths = FILES[name]
    step = cofx.compile(model.eval(), X[:, :, :example])
    step.to_onnx(tmp_path / "step.onnx")
    mine = OnnxStep(tmp_path / "step.onnx")
    size, refused = mine.frames_per_step, 0
    for n in lengths:
        try:
            step.compiled.check_end(n)
        except cofx.InputError:
            refused += 1
            with pytest.raises(cofx.InputError, match=f"stream of {n} frames cannot end"):
                mine.forward_steps(X[:, :, :n].numpy(), pad_end=True)
            with pytest.raises(cofx.InputError, match=f"lane 0: .*{n} frames cannot end"):
                mine.forward_steps(X[:, :, :size].numpy(), length=[n])
        else:
            mine.forward_steps(X[:, :, :n].numpy(), pad_end=True, update_state=False)
            mine.forward_steps(X[:, :, :size].numpy(), length=[n], update_state=False)
        assert mine.get_state() == {}
    assert (refused > 0) == (name != "none")


def test_lanes_and_files_stop_at_a_branch(tmp_path) -> None:
    model, lane = threshold(100), {"ready": [True]}
    step = cofx.compile(model, X[:, :, :30])
    step.to_onnx(tmp_path / "step.onnx")
    mine, expected = OnnxStep(tmp_path / "step.onnx"), model(X[:, :, :100])
    parts = [step.forward_step(X[:, :, t], **lane)[0] for t in range(100)]
    torch.testing.assert_close(torch.stack(parts[1:], 2), expected[:, :, :-1])
    with pytest.raises(cofx.InputError, match="lane 0: on more than 100 frames .*y = y.tanh"):
        step.forward_step(X[:, :, 100], **lane)
    last, valid = step.forward_step(X[:, :, 100], **lane, length=[100])
    assert valid.all()
    torch.testing.assert_close(last, expected[:, :, 99])
    got = torch.from_numpy(mine.forward_steps(X[:, :, :100].numpy()))
    torch.testing.assert_close(got, expected[:, :, :-1])
    with pytest.raises(cofx.InputError, match="longer than the 100 frames"):
        mine.forward_steps(X[:, :, 100:101].numpy())
    torch.testing.assert_close(torch.from_numpy(mine.flush()), expected[:, :, 99:])


@pytest.mark.parametrize(
    "where_odd",
    [
        lambda y: y * 2,
        lambda y: y * 3 if y.dim() == 3 else y,
        lambda y: y * torch.tensor([[2.0], [3.0], [4.0]]),
        lambda y: F.pad(y, (1, 0)),
        lambda y: y.flip(1),
    ],
)
@pytest.mark.parametrize("frames", [16, 17])
def test_what_is_no_padding_at_the_end_is_not_put_together(where_odd, frames: int) -> None:
    """Traces on both sides of a branch differ by more than what one of them leaves away: it is refused, as it was."""
    model = Net(
        lambda m, x: where_odd(m.down(x)) if x.shape[2] % 2 else m.down(x) * 1.5, down=nn.Conv1d(3, 3, 2, stride=2)
    )
    step = cofx.compile(model, X[:, :, :frames])
    got = step.forward_steps(X[:, :, : frames + 20], pad_end=True)
    torch.testing.assert_close(got, model(X[:, :, : frames + 20]))
    with pytest.raises(cofx.InputError, match="cannot end here"):
        step.clean_state()
        step.forward_steps(X[:, :, : frames + 21], pad_end=True)


def test_files_end_where_the_step_model_does(tmp_path) -> None:
    """A stream that was padded where its length is odd ends at any length, in a file and in a graph too."""
    from models.branches import UNetOdd

    model = UNetOdd().eval()
    step = cofx.compile(model, X[:, :2, :16])
    step.save(tmp_path / "step.pt2")
    step.to_onnx(tmp_path / "step.onnx")
    for n in (22, 23):
        want = model(X[:, :2, :n])
        got = cofx.load(tmp_path / "step.pt2").forward_steps(X[:, :2, :n], pad_end=True)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        graph = OnnxStep(tmp_path / "step.onnx").forward_steps(X[:, :2, :n].numpy(), pad_end=True)
        torch.testing.assert_close(torch.as_tensor(graph), want, rtol=1e-4, atol=1e-5)


def test_a_model_of_one_length_is_recomputed() -> None:
    """An exported program, or a table as long as the clip: a stream of it would end where it begins to be of use."""

    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.memory = nn.Conv1d(3, 4, 3, padding=1), nn.GRU(4, 4, batch_first=True)
            self.table = nn.Parameter(torch.randn(3, 20))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.memory(self.conv(x + self.table).mT)[0].mT

    x = torch.randn(1, 3, 20)
    for model in (Memory().eval(), torch.export.export(Memory().eval(), (x,)).module()):
        step = cofx.compile(model, x)
        assert step.equivalence == "clip" and step.verify(torch.randn(1, 3, 50)).exact
        with pytest.raises(cofx.RefusedError, match="takes clips of 20 frames, and no others"):
            cofx.compile(model, x, equivalence="stream")
