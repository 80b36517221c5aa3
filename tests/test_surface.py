"""What a user can call, what the calls leave alone, and what bad input does."""

import copy
import math
import threading
import warnings

import pytest
import torch
from torch import nn

import cofx
from cofx.verification import _compare


class Net(nn.Module):
    """(batch, 3, time) -> (batch, 2, time)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.second = nn.Conv1d(4, 2, 3, dilation=2, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


class Pooled(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)).mean(2)


class Pair(nn.Module):
    """A slow and a fast input, (batch, 2, T) and (batch, 2, 4T), into a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.fast = nn.Conv1d(2, 2, 5, stride=4, padding=2)

    def forward(self, slow: torch.Tensor, fast: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": slow + self.fast(fast), "fast": fast.relu()}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def step() -> cofx.StepModule:
    torch.manual_seed(0)
    return cofx.compile(Net().eval(), torch.randn(2, 3, 12))


X = torch.randn(2, 3, 30, generator=torch.Generator().manual_seed(1))


def streamed(step: cofx.StepModule, x: torch.Tensor) -> torch.Tensor:
    frames = [step.forward_step(f) for f in x.unbind(2)]
    tail = step.flush()
    kept = [f.unsqueeze(2) for f in frames if f is not None] + ([tail] if tail is not None else [])
    return torch.cat(kept, 2)


def test_attributes(step: cofx.StepModule) -> None:
    assert (step.delay, step.receptive_field, step.stride, step.padding) == (3, 7, 1, 3)
    assert (step.equivalence, step.clip_length) == ("stream", None)
    assert step.outputs[0].delay == 3


def test_memory_has_an_infinite_receptive_field() -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.cumsum(2)

    assert cofx.compile(Sum(), X).receptive_field == math.inf


@pytest.mark.parametrize("first", ["clip", "chunk", "frame"])
def test_tracing_at_the_first_call(first: str) -> None:
    model = Net().eval()
    step = cofx.compile(model)
    with pytest.raises(cofx.InputError, match="nothing has been traced"):
        _ = step.delay
    if first == "clip":
        torch.testing.assert_close(step(X), model(X))
    elif first == "chunk":
        step.forward_steps(X[:, :, :5])
    else:
        step.forward_step(X[:, :, 0])
    step.clean_state()
    torch.testing.assert_close(streamed(step, X), model(X))


def test_a_frame_does_not_tell_the_length_of_a_clip() -> None:
    with pytest.raises(cofx.InputError, match="clip_length"):
        cofx.compile(Pooled().eval()).forward_step(X[:, :, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = cofx.compile(Pooled().eval(), clip_length=12)
        step.forward_step(X[:, :, 0])
    assert step.clip_length == 12


def test_the_module_is_left_as_it_was() -> None:
    model = Net().train()
    model.first.eval()
    modes = [m.training for m in model.modules()]
    before = list(model.__dict__), {k: v.clone() for k, v in model.state_dict().items()}
    step = cofx.compile(model, X)
    step.forward_steps(X, pad_end=True)
    assert [m.training for m in model.modules()] == modes
    assert list(model.__dict__) == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(streamed(cofx.compile(model, X), X), copy.deepcopy(model).eval()(X))


def test_parameters_are_shared_and_changes_are_taken_up(step: cofx.StepModule) -> None:
    other = Net().eval()
    step.load_state_dict(other.state_dict())
    assert list(step.state_dict()) == list(other.state_dict())
    step.clean_state()
    torch.testing.assert_close(streamed(step, X), other(X))
    shared = {p.data_ptr() for p in step.graph_module.parameters()}
    assert {p.data_ptr() for p in step.model.first.parameters()} <= shared


def test_call_modes_nest(step: cofx.StepModule) -> None:
    offline = step(X)
    with cofx.call_mode("forward_step"):
        assert step(X[:, :, 0]) is None
        with cofx.call_mode("forward_steps"):
            assert step(X[:, :, 1:4]) is not None
        assert step(X[:, :, 4]) is not None
    torch.testing.assert_close(step(X), offline)
    step.call_mode = "forward_steps"
    assert step(X[:, :, 5:9]).shape[2] == 4
    with pytest.raises(cofx.InputError):
        step.call_mode = "backwards"


BAD_FRAMES = {
    "rank": (X,),
    "channels": (torch.zeros(2, 4),),
    "batch": (torch.zeros(3, 3),),
    "dtype": (torch.zeros(2, 3, dtype=torch.float64),),
    "number": (torch.zeros(2, 3), torch.zeros(2, 3)),
    "none": (),
    "type": ([1.0],),
    "meta": (torch.zeros(2, 3, device="meta"),),
}


@pytest.mark.parametrize("bad", BAD_FRAMES.values(), ids=BAD_FRAMES)
def test_bad_frames_change_nothing(step: cofx.StepModule, bad: tuple) -> None:
    for f in X[:, :, :9].unbind(2):
        step.forward_step(f)
    before = step.get_state()
    with pytest.raises(cofx.InputError):
        step.forward_step(*bad)
    with pytest.raises(cofx.InputError):
        step.forward_steps(*(b.unsqueeze(-1) if isinstance(b, torch.Tensor) else b for b in bad))
    assert all(torch.equal(before[k], v) for k, v in step.get_state().items())
    rest = torch.cat([step.forward_steps(X[:, :, 9:]), step.flush()], 2)
    torch.testing.assert_close(rest, step(X)[:, :, -rest.shape[2] :])


def test_a_wrong_shape_is_told_without_none() -> None:
    step = cofx.compile(Net().eval(), X)
    with pytest.raises(cofx.InputError, match=r"has shape \(3,\), expected \(batch, 3\) for one frame"):
        step.forward_step(torch.zeros(3))
    with pytest.raises(cofx.InputError, match=r"has shape \(2, 3\), expected \(batch, 3, 1\) for 1 frames"):
        step.forward_steps(torch.zeros(2, 3))


def test_what_is_refused_as_a_stream_is_offered_as_a_clip() -> None:
    with pytest.raises(cofx.NonLocalError, match="equivalence='clip'"):
        cofx.compile(Pooled().eval(), X, equivalence="stream")
    with pytest.warns(UserWarning, match="after the first 30 frames and a flush") as told:
        cofx.compile(Pooled().eval(), X)
    assert "equivalence='clip'" in str(told[0].message)


def test_bad_chunks_and_states(step: cofx.StepModule) -> None:
    step.forward_steps(X[:, :, :9])
    with pytest.raises(cofx.InputError, match="no frames"):
        step.forward_steps(X[:, :, :0])
    other = cofx.compile(nn.Conv1d(3, 3, 5), X)
    other.forward_steps(X)
    state = step.get_state()
    torn = dict(state)
    torn.pop(next(k for k in torn if k.startswith("state_")))
    wrong = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    for bad in (other.get_state(), {}, torn, wrong, {"count": torch.tensor(-3)}):
        with pytest.raises(cofx.StateError):
            step.set_state(bad)
    rest = torch.cat([step.forward_steps(X[:, :, 9:]), step.flush()], 2)
    torch.testing.assert_close(rest, step(X)[:, :, -rest.shape[2] :])


@pytest.mark.parametrize(
    "options",
    [
        {"time_dim": 7},
        {"time_dim": (2, 2)},
        {"time_dim": None},
        {"batch_dim": 5},
        {"window_output": "first"},
        {"equivalence": "exactly"},
    ],
    ids=str,
)
def test_bad_options(options: dict) -> None:
    with pytest.raises(cofx.InputError):
        cofx.compile(Net().eval(), X, **options)


def test_compile_takes_a_module() -> None:
    with pytest.raises(cofx.InputError, match="Module"):
        cofx.compile(torch.relu, X)


def test_refusals_name_the_op_the_line_and_what_to_do() -> None:
    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x - x.mean(2, keepdim=True)
            return y + x.flip(2)

    with pytest.raises(cofx.NonLocalError) as error:
        cofx.compile(Wrong(), X, equivalence="stream")
    text = str(error.value)
    assert len(error.value.refusals) == 2
    assert "x.mean(2, keepdim=True)" in text and "x.flip(2)" in text and "test_surface.py" in text
    assert [line.split()[0] for line in text.splitlines()[1:5]] == ["node", "module", "at", "try"]


def test_random_numbers_are_refused() -> None:
    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.randn_like(x)

    with pytest.raises(cofx.RefusedError, match="random numbers"):
        cofx.compile(Noisy(), X)


def test_a_model_that_cannot_be_traced() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(cofx.CaptureError):
        cofx.compile(Branches(), X)


@pytest.mark.parametrize(
    ("shape", "dtype", "told"),
    [((1, 4, 20), torch.float32, "to have 3 channels"), ((1, 3, 20), torch.float64, "of float64")],
)
def test_an_example_that_the_model_itself_does_not_take(shape, dtype, told) -> None:
    """It is the example that is told of, not the tracing; the model is left as it was."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 2, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.conv(x)

    model = Counts()
    with pytest.raises(cofx.InputError, match=f"(?s)the model itself fails on .*{told}.*at .*test_surface.py.*try"):
        cofx.compile(model, torch.randn(shape, dtype=dtype))
    assert model.calls == 0 and model.training


@pytest.mark.parametrize("other", [None, "name", 3])
def test_an_output_that_is_no_tensor(other) -> None:
    class Returns(nn.Module):
        def forward(self, x: torch.Tensor):
            return {"y": x, "other": x.shape[2] if other == 3 else other}

    if other == 3:
        with pytest.raises(cofx.CompileError):
            cofx.compile(Returns(), X)
        return
    step = cofx.compile(Returns(), X)
    for t in range(3):
        given = step.forward_step(X[:, :, t])
        assert torch.equal(given["y"], X[:, :, t]) and given["other"] == other


def test_bad_arguments_of_compile() -> None:
    model = nn.Conv1d(3, 2, 3)
    for words, options in [
        ("time_dim is the number", {"time_dim": "2"}),
        ("time_dim is the number", {"time_dim": True}),
        ("clip_length is a number", {"clip_length": 0}),
        ("clip_length is a number", {"clip_length": 2.0}),
        ("context is a number", {"context": True}),
    ]:
        with pytest.raises(cofx.InputError, match=words):
            cofx.compile(model, X, **options)
    with pytest.raises(cofx.InputError, match="to_dense"):
        cofx.compile(model, X.to_sparse())
    with pytest.warns(UserWarning, match="no op over the whole clip is in, or is, 'nowhere'"):
        cofx.compile(model, X, nonlocal_ops={"nowhere": "refuse"})


def test_inputs_at_different_rates_and_dict_outputs() -> None:
    torch.manual_seed(0)
    model, slow, fast = Pair().eval(), torch.randn(1, 2, 9), torch.randn(1, 2, 36)
    step = cofx.compile(model, (slow[:, :, :6], fast[:, :, :24]))
    expected = model(slow, fast)
    first = step.forward_step(slow[:, :, 0], fast[:, :, :4])
    assert first["fast"].shape == (1, 2, 4)
    rest = step.forward_steps(slow[:, :, 1:], fast[:, :, 4:], pad_end=True)
    head = [] if first["sum"] is None else [first["sum"].unsqueeze(2)]
    torch.testing.assert_close(torch.cat([*head, rest["sum"]], 2), expected["sum"])
    torch.testing.assert_close(torch.cat([first["fast"], rest["fast"]], 2), expected["fast"])
    with pytest.raises(cofx.InputError):
        step.forward_step(slow[:, :, 0], fast[:, :, :3])


def test_unbatched_and_negative_time() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 2, 2)).eval()
    step = cofx.compile(model, X[0], time_dim=-1, batch_dim=None)
    frames = [step.forward_step(f) for f in X[0].unbind(1)]
    got = torch.cat([torch.stack([f for f in frames if f is not None], 1), step.flush()], 1)
    assert got.shape == model(X[0]).shape
    torch.testing.assert_close(got, model(X[0]))


def test_window_output_all() -> None:
    class Flip(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flip(2)

    newest = cofx.compile(Flip(), X[:, :, :6])
    whole = cofx.compile(Flip(), X[:, :, :6], window_output="all")
    newest.forward_steps(X[:, :, :7])
    whole.forward_steps(X[:, :, :7])
    torch.testing.assert_close(newest.forward_step(X[:, :, 7]), X[:, :, 2])
    torch.testing.assert_close(whole.forward_step(X[:, :, 7]), X[:, :, 2:8].flip(2))


def test_graph_module_shows_state_and_runs_by_itself(step: cofx.StepModule) -> None:
    graph_module = step.graph_module
    names = [n.name for n in graph_module.graph.nodes]
    assert any(n.startswith("state_") for n in names) and any(n.startswith("delay_") for n in names)
    assert all(n.meta["cofx"] is not None for n in graph_module.graph.nodes if n.op != "output")
    step.forward_steps(X[:, :, :20])
    state = [v for k, v in step.get_state().items() if k.startswith("state_")]
    again = torch.fx.symbolic_trace(graph_module)
    for module in (graph_module, again):
        (y,), after = module(X[:, :, 20], *state)
        torch.testing.assert_close(y, step.forward_step(X[:, :, 20], update_state=False))
        assert [a.shape for a in after] == [s.shape for s in state]


def test_verify(step: cofx.StepModule) -> None:
    step.forward_steps(X[:, :, :5])
    before = step.get_state()
    found = step.verify(X)
    assert found.exact and found.compared == 30 and found.difference < 1e-5
    assert all(torch.equal(before[k], v) for k, v in step.get_state().items())
    broken = cofx.compile(step.model, X)
    broken.compiled.programs.clear()
    step.model.first.weight.mul_(2)
    broken.model = Net().eval()
    assert not broken.verify(X).exact


def test_verify_windows_and_prefixes() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(x.transpose(1, 2))[1][-1]

    for model, word in ((Last(), "prefix"), (nn.AdaptiveAvgPool1d(1), "clip")):
        found = cofx.compile(model.eval(), X[:, :, :9]).verify(X)
        assert found.exact and found.equivalences == (word,)
        assert found.compared == (30 if word == "prefix" else 22)


def test_two_step_models_of_one_module_in_two_threads() -> None:
    model = Net().eval()
    expected, results = model(X), [None, None]

    def work(i: int) -> None:
        with torch.no_grad():
            results[i] = streamed(cofx.compile(model, X), X)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for r in results:
        torch.testing.assert_close(r, expected)


def test_parameters_written_past_their_counter_are_taken_up() -> None:
    """As `.data`, NumPy and `Module.to` do, which torch does not count."""
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Conv1d(3, 2, 3)).eval()
    x = torch.randn(1, 2, 20)
    step = cofx.compile(model, x[:, :, :9])
    for change in (
        lambda: model[0].weight.data.mul_(-1),
        lambda: model[1].running_mean.numpy().__iadd__(1),
        lambda: setattr(model[0].weight, "data", torch.randn_like(model[0].weight)),
        lambda: model.half().float(),
    ):
        before = step.forward_steps(x, pad_end=True)
        with torch.no_grad():
            change()
            assert not torch.equal(model(x), before)
            step.clean_state()
            torch.testing.assert_close(step.forward_steps(x, pad_end=True), model(x), rtol=1e-4, atol=1e-5)
        step.clean_state()


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model, x = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3)).eval(), torch.randn(1, 2, 20)
        step = cofx.compile(model, x[:, :, :9])
        assert step.verify(x).exact
        step.clean_state()
        torch.testing.assert_close(torch.stack([step.forward_step(f) for f in x.unbind(2)][2:], 2), model(x))


def test_verify_within_autocast_and_of_complex_numbers() -> None:
    """The tolerance is that of the coarsest numbers on the way; both parts of complex ones are compared."""

    class Coarse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(3, 4, 3), nn.Conv1d(4, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.first(x)
            return self.second(y.float())

    class Turned(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.complex(x[:, :, 1:], x[:, :, :-1]).conj()

    for model in (Coarse().eval(), Turned()):
        step = cofx.compile(model, torch.randn(2, 3, 16))
        assert step.verify(torch.randn(2, 3, 40))
    x = torch.complex(torch.ones(2), torch.ones(2))
    assert not _compare(x, x.conj(), x.dtype)[1] and _compare(x, x.clone(), x.dtype)[1]
