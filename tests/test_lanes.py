"""Lanes: streams that begin, pause and end each by itself, in one batch."""

import copy
import warnings

import pytest
import torch

import cofx
from cofx.passes.codegen import lanes as lane_programs
from cofx.runtime import OnnxStep
from lane_streams import Batch, step_call
from models import SAMPLES, Sample, batched
from shaken import FailsAt

BATCHED = batched(40)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("sample", BATCHED)
def test_each_lane_is_its_stream_run_alone(sample) -> None:
    batch = Batch(sample, lanes=4, seed=0)
    step = copy.deepcopy(batch.alone)
    step.clean_state()
    batch.run(step_call(step, sample, batch.period), calls=40)
    assert batch.compared > 10


class Net(torch.nn.Module):
    """(batch, 3, time) -> (batch, 4, time)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Conv1d(3, 4, 3, padding=1), torch.nn.Conv1d(4, 4, 3, padding=2, dilation=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


class Memory(Net):
    """The same with a recurrent layer, whose state has its batch in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = torch.nn.GRU(4, 4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.memory(super().forward(x).mT)[0].mT


class Heads(Net):
    """Batch and heads share a dimension, in what is kept too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        y = y.reshape(y.shape[0] * 2, 2, y.shape[2])
        y = torch.nn.functional.avg_pool1d(y, 3, 1)
        return y.reshape(x.shape[0], 4, -1)


class Positioned(Net):
    """Positions meet the batch where it shares a dimension with heads: lanes are put in front of everything."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        y = y.reshape(y.shape[0] * 2, 2, y.shape[2]) + torch.arange(y.shape[2])
        return y.reshape(x.shape[0], 4, -1)


class Fixed(Net):
    """Traced for one batch size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.reshape(int(x.shape[0]), 3, -1)) * torch.ones(int(x.shape[0]), 1, 1)


class Batchwise(Net):
    """Has no lanes of its own where it averages over the batch: each is then its own batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(0, keepdim=True) * 0.5)


NETS = [Net, Memory, Heads, Positioned, Fixed, Batchwise]


@pytest.mark.parametrize("net", NETS)
def test_where_lanes_lie(net) -> None:
    """However the model folds its batch, each lane is its stream run alone."""
    sample = Sample(net.__name__.lower(), net, (2, 3, 9))
    batch = Batch(sample, lanes=3, seed=1)
    step = cofx.compile(sample.model(), *sample.inputs(9, seed=9))
    batch.run(step_call(step, sample, 1), calls=60)
    assert batch.compared > 50


X = torch.randn(3, 3, 40, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def step() -> cofx.StepModule:
    torch.manual_seed(0)
    return cofx.compile(Memory().eval(), torch.randn(2, 3, 12))


def fed(step: cofx.StepModule, x: torch.Tensor, **lanes) -> torch.Tensor:
    """Frames of all lanes, NaN where not valid: (batch, channels, time)."""
    out = []
    for frame in x.unbind(2):
        y, valid = step.forward_step(frame, **{"ready": [True] * len(x), **lanes})
        out.append(torch.where(valid[:, None], y, torch.nan))
        lanes.pop("start", None)
    return torch.stack(out, 2)


def test_snapshots_of_lanes(step: cofx.StepModule) -> None:
    whole = fed(step, X)
    step.clean_state()
    fed(step, X[:, :, :20])
    one, both = step.get_state([1]), step.get_state(torch.tensor([True, False, True]))
    assert [t.shape[0] for t in one.values()] == [1] * len(one)
    kept = {k: t.clone() for k, t in both.items()}
    fed(step, X[:, :, 20:])
    step.clean_state([0, 2])
    step.set_state(one, [2])
    step.set_state({k: t.flip(0) for k, t in both.items()}, [1, 0])
    assert all(torch.equal(both[k], kept[k]) for k in kept)
    torch.testing.assert_close(fed(step, X[[0, 2, 1], :, 20:]), whole[[0, 2, 1], :, 20:], equal_nan=True)
    all_ = step.get_state()
    step.clean_state()
    step.set_state(all_)
    assert all(torch.equal(t, all_[k]) for k, t in step.get_state().items())
    step.clean_state([1])
    got = fed(step, X)
    torch.testing.assert_close(got[1:2], whole[1:2], equal_nan=True)


def test_a_plain_stream_goes_on_in_lanes(step: cofx.StepModule) -> None:
    whole = fed(step, X)
    for at in (0, 1, 3, 17):
        step.clean_state()
        for frame in X[:, :, :at].unbind(2):
            step.forward_step(frame)
        alone = step.get_state()
        torch.testing.assert_close(fed(step, X[:, :, at:]), whole[:, :, at:], equal_nan=True)
        if at:
            step.set_state(alone, [0, 1, 2])
            torch.testing.assert_close(fed(step, X[:, :, at:]), whole[:, :, at:], equal_nan=True)


def test_no_trace_is_left(step: cofx.StepModule) -> None:
    whole = fed(step, X)
    step.clean_state()
    fed(step, X[:, :, :9])
    y, valid = step.forward_step(X[:, :, 9], ready=[True] * 3, update_state=False)
    assert valid.all() and torch.equal(y, whole[:, :, 9])
    with pytest.raises(RuntimeError, match="boom"), FailsAt(9, RuntimeError("boom")):
        step.forward_step(X[:, :, 9], ready=[True] * 3)
    torch.testing.assert_close(fed(step, X[:, :, 9:]), whole[:, :, 9:], equal_nan=True)


def test_a_length_that_comes_too_late(step: cofx.StepModule) -> None:
    """A stream ends with what it has taken, and a length once told stays."""
    expected = step.model(X[:, :, :7])
    got = fed(step, X[:, :, :7])
    y = fed(step, X[:, :, 7:20], length=[2, 7, 5])
    got = torch.cat([got, y], 2)[:, :, int(step.delay) :][:, :, :9]
    torch.testing.assert_close(got[:, :, :7], expected)
    assert got[:, :, 7:].isnan().all()
    assert fed(step, X[:, :, :5], length=[40] * 3).isnan().all()


@pytest.mark.parametrize(
    ("lanes", "words"),
    [
        ({"ready": [True]}, "ready has one bool for each of the 3 lanes"),
        ({"start": [1, 0, 1]}, "start has one bool"),
        ({"length": [0.5, 1, 2]}, "length has one whole number"),
        ({"length": torch.zeros(3, 2, dtype=torch.int64)}, "length has one"),
    ],
)
def test_bad_arguments(step: cofx.StepModule, lanes, words: str) -> None:
    fed(step, X[:, :, :5])
    before = step.get_state()
    with pytest.raises(cofx.InputError, match=words):
        step.forward_step(X[:, :, 5], **lanes)
    assert all(torch.equal(t, before[k]) for k, t in step.get_state().items())


def test_refusals(step: cofx.StepModule) -> None:
    with pytest.raises(cofx.InputError, match="before the first call"):
        step.get_state([0])
    with pytest.raises(cofx.InputError, match="pad_end"):
        step.forward_steps(X, pad_end=True, ready=[True] * 3)
    fed(step, X[:, :, :5])
    for call in (lambda: step.forward_step(X[:, :, 5]), lambda: step.forward_steps(X), step.flush):
        with pytest.raises(cofx.InputError, match="each by itself"):
            call()
    with pytest.raises(cofx.InputError, match="expected \\(3, 3\\)"):
        step.forward_step(X[:2, :, 5], ready=[True] * 2)
    for lanes in ([3], [-1], [0, 0], [[0]], [0.5], [True, False]):
        with pytest.raises(cofx.InputError):
            step.clean_state(lanes)
    with pytest.raises(cofx.InputError, match="1 lanes for 2"):
        step.set_state(step.get_state([0]), [0, 1])
    state = step.get_state()
    for name, bad in [
        ("position", state["position"] - 9),
        ("position", state["position"][:2]),
        ("state_x", state["state_x"].double()),
        ("other", state["state_x"]),
    ]:
        with pytest.raises(cofx.StateError):
            step.set_state({**state, name: bad})


def test_strides_take_whole_periods() -> None:
    step = cofx.compile(torch.nn.Conv1d(3, 2, 4, stride=4), X)
    with pytest.raises(cofx.InputError, match="multiple of 4 frames"):
        step.forward_step(X[:, :, 0], ready=[True] * 3)
    step.forward_steps(X[:, :, :2])
    with pytest.raises(cofx.InputError, match="multiple of 4 frames, not after 2"):
        step.forward_steps(X[:, :, 2:6], ready=[True] * 3)
    step.clean_state()
    y, valid = step.forward_steps(X[:, :, :8], ready=[True] * 3)
    assert valid.shape == (3, 2) and valid.all()
    torch.testing.assert_close(y, step.model(X[:, :, :8]))


def test_a_table_that_runs_out() -> None:
    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(3, 40))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.table[:, : x.shape[2]]

    step = cofx.compile(Table(), X[:, :, :12])
    fed(step, X)
    step.clean_state([0])
    before = step.get_state()
    with pytest.raises(cofx.InputError, match="lane 1: .*40 entries"):
        step.forward_step(X[:, :, 0], ready=[True, True, False])
    assert all(torch.equal(t, before[k]) for k, t in step.get_state().items())
    _, valid = step.forward_step(X[:, :, 0], ready=[True, True, False], length=[-1, 40, -1])
    assert valid.tolist() == [True, False, False]
    step.forward_step(X[:, :, 0], ready=[True] * 3, start=[False, True, True])


def test_without_a_batch_dimension() -> None:
    """One lane."""
    step = cofx.compile(torch.nn.Conv1d(3, 2, 3, padding=1), X[0], time_dim=1, batch_dim=None)
    out = []
    for t in range(12):
        y, valid = step.forward_step(X[0, :, t], start=[t == 0], length=[10])
        assert y.shape == (2,) and valid.shape == (1,)
        out += [y] if valid.all() else []
    torch.testing.assert_close(torch.stack(out, 1), step.model(X[0, :, :10]))


@pytest.mark.parametrize("equivalence", [None, "clip"])
def test_a_model_that_takes_one_batch_size_and_length(equivalence, tmp_path) -> None:
    """It is recomputed over clips, asked or not; each lane is that batch of one, in PyTorch as in a file."""
    model = torch.export.export(Net().eval(), (X[:1],)).module()
    step = cofx.compile(model, X[:1], equivalence=equivalence)
    y, valid = step.forward_steps(X, ready=[True] * 3, length=[X.shape[2]] * 3)
    step.to_onnx(tmp_path / "step.onnx")
    file = OnnxStep(tmp_path / "step.onnx")
    called = [file.forward_step(f.numpy(), ready=[True] * 3, length=[X.shape[2]] * 3) for f in X.unbind(2)]
    there, exist = (torch.stack([torch.from_numpy(c[i]) for c in called], 2 - i) for i in (0, 1))
    wanted = torch.cat([model(x[None]) for x in X])
    for lane in range(3):
        got = y[lane][:, valid[lane]], there[lane][:, exist[lane]]
        count = got[0].shape[1]
        assert count > 0
        want = wanted[lane, :, -1:]
        torch.testing.assert_close(got, (want, want), rtol=1e-4, atol=1e-5)


def test_an_op_that_cannot_run_for_all_lanes_is_named(monkeypatch) -> None:
    """A layer among joints, as if nothing were known of it."""
    sample = next(s for s in SAMPLES if s.name == "recurrent_of_each_joint")
    monkeypatch.setattr(lane_programs, "LAYERS", ())
    clip = sample.inputs(8)[0]
    step = cofx.compile(sample.model(), clip)
    with pytest.raises(cofx.InputError, match=r"aten.lstm.input mixes(.|\n)*recurrent.py:\d+ in forward:  rows = self"):
        step.forward_step(clip[:, :, 0], start=[True, True])
    assert step.forward_step(clip[:, :, 0]) is not None


def test_gradients_stay_in_their_lane() -> None:
    step = cofx.compile(Memory().eval(), X)
    with torch.enable_grad():
        x = X.clone().requires_grad_()
        total = torch.zeros(())
        for t in range(12):
            y, valid = step.forward_step(x[:, :, t], length=[6, 12, -1], ready=[True, True, t != 4])
            total = total + torch.where(valid[:, None], y, 0)[0].sum()
        total.backward()
    assert x.grad[0, :, :6].abs().min() > 0
    assert x.grad[0, :, 6:].abs().max() == x.grad[1:].abs().max() == 0


def test_no_loop_over_lanes() -> None:
    """The program for many lanes is the one for few."""
    step = cofx.compile(Positioned().eval(), X)
    step.forward_step(X[:, :, 0], ready=[True] * 3)
    program = step._programs().program(1, True).module
    step.clean_state()
    step.forward_step(torch.randn(64, 3), ready=[True] * 64)
    assert step._programs().program(1, True).module is program
