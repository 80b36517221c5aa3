"""``torch.compile(model, backend="cofx")``: the same numbers from sliding windows, for less work."""

import os
import subprocess
import sys
import threading
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cofx.runtime.errors import InputError
from cofx.torch_compile import backend

ROOT = Path(__file__).resolve().parent.parent
T = 24
X = torch.randn(2, 3, 80, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def convs() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 8, 5), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3, dilation=2)).eval()


class Pooled(nn.Module):
    """Convolutions without padding, then a head over the clip: a dict."""

    def __init__(self, padding: int = 0) -> None:
        super().__init__()
        self.features, self.head = nn.Conv1d(3, 8, 5, padding=padding), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.features(x).relu()
        return {"class": self.head(y.mean(2)), "features": y}


def slide(model, x: torch.Tensor = X, by: int = 1) -> list:
    return [model(x[:, :, t : t + T]) for t in range(0, x.shape[2] - T + 1, by)]


class Counted:
    """The backend, and the multiply-adds of all that it runs (dynamo compiles nothing within a FlopCounterMode)."""

    def __init__(self) -> None:
        self.flops = 0

    def __call__(self, graph, example, **options):
        run = backend(graph, example, **options)

        def counted(*given):
            with FlopCounterMode(display=False) as counter:
                out = run(*given)
            self.flops += counter.get_total_flops()
            return out

        return torch.compiler.disable(counted)


def saved(model: nn.Module, by: int = 1) -> float:
    """How many times fewer multiply-adds a sliding loop takes."""
    count = Counted()
    fast = torch.compile(model, backend=count)
    slide(fast, by=by)  # compiles
    count.flops = 0
    torch.testing.assert_close(slide(fast, by=by), slide(model, by=by))
    with FlopCounterMode(display=False) as counter:
        slide(model, by=by)
    return counter.get_total_flops() / count.flops


@pytest.mark.parametrize("by", [1, 2, 5, T, 50])
@pytest.mark.parametrize("make", [convs, Pooled], ids=["stream", "clip"])
def test_windows_that_move_on(make, by: int) -> None:
    model = make().eval()
    fast = torch.compile(model, backend=backend)
    torch.testing.assert_close(slide(fast, by=by), slide(model, by=by))


def test_work_is_saved() -> None:
    assert saved(convs()) > 8
    assert saved(Pooled().eval()) > 8


def test_strides_are_kept_in_step() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 4, stride=2), nn.Conv1d(8, 4, 3)).eval()
    fast = torch.compile(model, backend=backend)
    for by in (1, 2, 3, 4):
        torch.testing.assert_close(slide(fast, by=by), slide(model, by=by))
    assert saved(model, by=2) > 4


def test_jumps_other_batches_and_the_same_window_again() -> None:
    model = convs()
    fast = torch.compile(model, backend=backend)
    y = torch.randn(3, 3, 80)
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        t, which, lanes = (int(torch.randint(n, (), generator=generator)) for n in (56, 2, 2))
        for step in range(3):
            window = (X[: lanes + 1] if which else y)[:, :, t : t + T] if step else (y if which else X)[:, :, :T]
            torch.testing.assert_close(fast(window), model(window))
            torch.testing.assert_close(fast(window), model(window))


def test_two_streams_in_turn_and_outputs_that_are_written_to() -> None:
    model, y = convs(), torch.randn(2, 3, 80)
    fast = torch.compile(model, backend=backend)
    for t in range(10):
        for x in (X, X, y):
            window = x[:, :, t : t + T].clone()
            out = fast(window)
            torch.testing.assert_close(out, model(window))
            out.zero_(), window.zero_()


def test_several_threads() -> None:
    """Each gets what the model returns, whoever calls at the same time."""
    model = convs()
    fast = torch.compile(model, backend=backend)
    fast(X[:, :, :T])
    wrong: list[BaseException] = []

    def worker(seed: int) -> None:
        x = torch.randn(X.shape, generator=torch.Generator().manual_seed(seed))
        try:
            with torch.no_grad():
                for got, wanted in zip(slide(fast, x), slide(model, x), strict=True):
                    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=worker, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not wrong and not any(t.is_alive() for t in threads)


@pytest.mark.parametrize("past_the_counter", [False, True])
def test_changed_parameters_are_taken_up(past_the_counter: bool) -> None:
    model = convs()
    fast = torch.compile(model, backend=backend)
    for t in range(6):
        torch.testing.assert_close(fast(X[:, :, t : t + T]), model(X[:, :, t : t + T]))
        weight, mean = model[0].weight, model[1].running_mean
        if past_the_counter:
            weight, mean = weight.data, mean.numpy()
        weight *= 1.5
        mean += 0.1
        torch.testing.assert_close(fast(X[:, :, t : t + T]), model(X[:, :, t : t + T]))
    if past_the_counter:
        model.half().float()
        torch.testing.assert_close(fast(X[:, :, t : t + T]), model(X[:, :, t : t + T]))


def test_padding_runs_in_full_and_says_why_once() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 5, padding=2), nn.ReLU()).eval()
    fast = torch.compile(model, backend=backend)
    with pytest.warns(UserWarning, match="padding in time of") as told:
        torch.testing.assert_close(slide(fast), slide(model))
    assert len(told) == 1 and "stream" in str(told[0].message)


def test_the_end_of_a_stream_is_taken_if_asked() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv1d(8, 4, 3, padding=1)).eval()
    fast = torch.compile(model, backend=backend, options={"equivalence": "stream"})
    for t in range(20):
        torch.testing.assert_close(fast(X[:, :, t : t + T]), model(X[:, :, : t + T])[:, :, -T:])
    torch.testing.assert_close(fast(X[:, :, 50 : 50 + T]), model(X[:, :, 50 : 50 + T]))


def test_memory_runs_in_full_unless_asked() -> None:
    class Memory(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv1d(3, 6, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mix(x.cumsum(2))

    model = Memory().eval()
    with pytest.warns(UserWarning, match="memory of"):
        torch.testing.assert_close(slide(torch.compile(model, backend=backend)), slide(model))
    torch._dynamo.reset()
    asked = torch.compile(model, backend=backend, options={"equivalence": "stream"})
    for t in range(5):
        torch.testing.assert_close(asked(X[:, :, t : t + T]), model(X[:, :, : t + T])[:, :, -T:])


def test_training_and_gradients_run_plainly() -> None:
    model = nn.Sequential(nn.Conv1d(3, 8, 5), nn.BatchNorm1d(8), nn.Dropout(0.5))
    fast = torch.compile(model, backend=backend)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("error")
        before = model[1].num_batches_tracked.clone()
        fast(X[:, :, :T]).sum().backward()
        assert model[0].weight.grad is not None and model[1].num_batches_tracked == before + 1
        fast(X[:, :, 1 : T + 1])
        model.eval()
        window = X[:, :, :T].clone().requires_grad_()
        for _ in range(2):
            fast(window).sum().backward()
        assert window.grad is not None
    torch.testing.assert_close(slide(fast), slide(model))


def test_sub_graphs_after_a_break_each_by_themselves() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(3, 8, 5), nn.Conv1d(8, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            torch._dynamo.graph_break()
            return self.second(y.relu())

    assert saved(Broken().eval()) > 5


def test_what_cofx_refuses_runs_plainly_with_one_warning() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + 0 * torch.rand(1)

    model = Noisy().eval()
    with pytest.warns(UserWarning, match="random numbers") as told:
        torch.testing.assert_close(slide(torch.compile(model, backend=backend)), slide(model))
    assert len(told) == 1


def test_options() -> None:
    model = nn.Conv2d(1, 4, (3, 1)).eval()  # (batch, 1, time, joints)
    x = torch.randn(1, 1, 40, 5)
    fast = torch.compile(model, backend=backend, options={"time_dim": -2})
    for t in range(10):
        torch.testing.assert_close(fast(x[:, :, t : t + T]), model(x[:, :, t : t + T]))
    with pytest.raises(Exception, match="unknown option 'speed'"):
        torch.compile(convs(), backend=backend, options={"speed": 9})(X[:, :, :T])
    with pytest.raises(InputError):
        backend(torch.fx.symbolic_trace(nn.ReLU()), [X], options={"equivalence": "clip"})


def test_it_is_found_without_importing_cofx(tmp_path: Path) -> None:
    """As installed: through the entry point of pyproject.toml."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["torch_dynamo_backends"]
    info = tmp_path / "cofx-0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cofx-entry\nVersion: 0.0\n")
    (info / "entry_points.txt").write_text(f"[torch_dynamo_backends]\ncofx = {found['cofx']}\n")
    program = (
        "import torch, sys; from torch import nn; assert 'cofx' not in sys.modules; torch.set_grad_enabled(False);"
        "m = nn.Conv1d(3, 4, 3).eval(); f = torch.compile(m, backend='cofx'); x = torch.randn(1, 3, 30);"
        "[torch.testing.assert_close(f(x[:, :, t:t + 9]), m(x[:, :, t:t + 9])) for t in range(9)];"
        "assert 'cofx.torch_compile' in sys.modules"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
