"""Calls that fail in their middle: the stream stays where it was, and the next call is right.

What fails is every op of a call in turn, and a signal at every moment at which Python takes one.
"""

import functools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cofx
from cofx.runtime import LanePool, OnnxStep
from shaken import FailsAt, equal, numpy, tensors

X = torch.randn(3, 3, 80, generator=torch.Generator().manual_seed(1))
OFFSET = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
ALL = {"ready": [True, False, True], "start": [False, True, False], "length": [-1, -1, 40]}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class Net(nn.Module):
    """(batch, 3, time) and an offset (batch, 3) -> (batch, 4, time), (batch, 3, time)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.memory = nn.Conv1d(3, 4, 3, padding=1), nn.GRU(4, 4, 2, batch_first=True)

    def forward(self, x: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x + offset[:, :, None])
        return self.memory(y.mT)[0].mT + y, x.tanh()


class Attention(nn.Module):
    """The same inputs; all frames so far are kept."""

    def forward(self, x: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        y = (x * offset[:, :, None]).mT
        return nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True).mT, x.tanh()


class Strided(Net):
    """Two frames at a time."""

    def forward(self, x: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        y, z = super().forward(x, offset)
        return y[:, :, ::2], z


def made(net: type[nn.Module], **options: Any) -> cofx.StepModule:
    torch.manual_seed(0)
    return cofx.compile(net().eval(), (X[:, :, :12], OFFSET), time_dim=(2, None), **options)


made_once = functools.cache(made)  # for tests that begin with a new stream


class Interrupts:
    """A signal's exception at one of the moments at which Python takes one: after and before calls."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __enter__(self) -> None:
        sys.setprofile(self.event)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def event(self, frame: Any, event: str, arg: Any) -> None:
        if event == "return" or frame.f_code in (Interrupts.__exit__.__code__, Interrupts.__enter__.__code__):
            return
        self.left -= 1
        if self.left < 0:
            sys.setprofile(None)
            raise KeyboardInterrupt


class RunFails:
    """Every run of an ONNX graph from a number on raises, after it has written its outputs and states."""

    def __init__(self, step: OnnxStep, number: int, error: BaseException) -> None:
        self.session, self.left, self.error = step.session, number, error

    def __enter__(self) -> None:
        self.run = self.session.run_with_iobinding
        self.session.run_with_iobinding = self.fail

    def __exit__(self, *_: object) -> None:
        self.session.run_with_iobinding = self.run

    def fail(self, *arguments: Any) -> None:
        self.run(*arguments)
        self.left -= 1
        if self.left < 0:
            raise self.error


def fault(step: Any, kind: str, number: int, error: BaseException) -> Any:
    """The n-th op of a call raises (in ONNX Runtime: the n-th run), or a signal comes at the n-th moment."""
    if kind == "signals":
        return Interrupts(number)
    return RunFails(step, number, error) if isinstance(step, OnnxStep) else FailsAt(number, error)


def survives(step: Any, call: Callable[[], Any], kind: str, error: BaseException, every: int = 1) -> int:
    """The call fails in every place, and leaves the stream where it was; then it gives what it would have given.

    Returns how often it failed.
    """
    before = step.get_state()
    expected, after = call(), step.get_state()
    failures, number = 0, 0
    while True:
        step.set_state(before)
        fails, result = fault(step, kind, number, error), None
        try:
            with fails:
                result = call()
        except type(error):
            if result is None:
                failures += 1
                assert equal(step.get_state(), before), f"the stream has moved ({number})"
        if fails.left >= 0:  # the call was over before
            break
        number += every
    step.set_state(before)
    assert equal(call(), expected) and equal(step.get_state(), after)
    return failures


def at_once(step: Any) -> int:
    """Frames of a call with lanes."""
    return int(getattr(step, "frames_per_step", 2))


CALLS: dict[str, Callable[[Any, int, Any, Any], Any]] = {
    "forward_step": lambda s, t, x, o: s.forward_step(x[:, :, t], o),
    "forward_steps": lambda s, t, x, o: s.forward_steps(x[:, :, t : t + 4], o),
    "pad_end": lambda s, t, x, o: s.forward_steps(x[:, :, t : t + 4], o, pad_end=True),
    "flush": lambda s, t, x, o: (s.flush(),),
    "lanes": lambda s, t, x, o: s.forward_steps(x[:, :, t : t + at_once(s)], o, **ALL),
    "lane step": lambda s, t, x, o: s.forward_step(x[:, :, t], o, **ALL),
    "clean lanes": lambda s, t, x, o: (s.clean_state([1]),),
}
ERRORS = {"ops": (RuntimeError("boom"), MemoryError(), KeyboardInterrupt()), "signals": (KeyboardInterrupt(),)}
quietly = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # dropped within a destructor


def walked(step: Any, call: str, steps: int) -> None:
    """So many frames, by lanes if the call has lanes."""
    step.clean_state()
    lanes = {"ready": [True] * 3} if "lane" in call else {}
    for t in range(0, steps, at_once(step)):
        step.forward_steps(X[:, :, t : t + at_once(step)], OFFSET, **lanes)


def everywhere(step: Any, call: str, kind: str) -> None:
    """In its first frames and in mid-stream; kinds of errors in turn, one of them in every place."""
    for at in (2, 30):
        walked(step, call, at)
        for i, error in enumerate(ERRORS[kind]):
            assert (
                survives(step, lambda at=at: CALLS[call](step, at, X, OFFSET), kind, error, 1 if i == 0 else 7)
                or "f" in call
            )


@quietly
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("net", [Net, Attention, Strided])
def test_step_model(net: type[nn.Module], call: str, kind: str) -> None:
    if net is not Strided or call != "lane step":
        everywhere(made_once(net), call, kind)


class AsTensors:
    """An `OnnxStep` on tensors."""

    def __init__(self, step: OnnxStep) -> None:
        self.step = step

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.step, name)
        return (lambda *a, **k: tensors(found(*numpy(a), **numpy(k)))) if callable(found) else found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults") / "step.onnx"
    with torch.no_grad():
        made(Net).to_onnx(path)
    return path


@quietly
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("call", CALLS)
def test_onnx(file: Path, call: str, kind: str) -> None:
    step = OnnxStep(file)
    for at in (2, 30):
        walked(AsTensors(step), call, at)
        for error in ERRORS[kind]:
            run = lambda at=at: CALLS[call](step, at, X.numpy(), OFFSET.numpy())  # noqa: E731
            assert survives(step, run, kind, error) or call == "clean lanes"


@quietly
@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_pool(file: Path, runtime: str) -> None:
    """Runs, feeds, openings and closings are interrupted everywhere: every stream still gets what it would have got."""
    step = made(Net)
    wrong: Any = step if runtime == "torch" else OnnxStep(file)
    pool = LanePool(wrong, 4)
    convert = (lambda x: x) if runtime == "torch" else numpy
    got: dict[Any, list[list[Tensor]]] = {}
    number = interrupted = 0

    def surely(call: Callable[[], Any]) -> Any:
        """Interrupted once, and done again if that came to nothing."""
        nonlocal number, interrupted
        number += 1
        result, kind = None, "ops" if number % 3 == 0 else "signals"
        try:
            with fault(wrong, kind, number * 5 % (20 if kind == "ops" else 500), KeyboardInterrupt()):
                result = call()
        except KeyboardInterrupt:
            interrupted += 1
        return call() if result is None else result

    def run() -> list[Any]:
        out = surely(pool.run)
        for stream, (y, z) in out:
            for part, frames in zip(got[stream], (y, z), strict=True):
                part += [] if frames is None else [torch.as_tensor(frames)]
        return out

    for _ in range(30):
        streams = [pool.open() for _ in range(3)]
        got.update({s: [[], []] for s in streams})
        for t in range(0, 12, 4):
            for lane, stream in enumerate(streams):
                stream.feed(*convert((X[lane, :, t : t + 4], OFFSET[lane])))
            run()
        for stream in streams:
            surely(lambda stream=stream: (stream.close(), 1))
        while len(pool):
            run()
        for lane, stream in enumerate(streams):
            wanted = step.model(X[lane : lane + 1, :, :12], OFFSET[lane : lane + 1])
            for part, want in zip(got.pop(stream), wanted, strict=True):
                torch.testing.assert_close(torch.cat(part, 1), want[0], rtol=1e-4, atol=1e-5)
    assert interrupted > 50 and sorted(pool._free) == list(range(4))


# -- threads -----------------------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """The first op waits."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go_on = threading.Event(), threading.Event()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.entered.set()
        assert self.go_on.wait(60)
        return func(*args, **(kwargs or {}))


def test_one_model_in_two_threads_is_refused() -> None:
    step = made(Net)
    walked(step, "forward_step", 8)
    before, waits, results, frame = step.get_state(), Waits(), [], X[:, :, 8]

    def first() -> None:
        with torch.no_grad(), waits:
            results.append(step.forward_step(frame, OFFSET))

    thread = threading.Thread(target=first)
    thread.start()
    assert waits.entered.wait(60)
    for call in CALLS.values():
        with pytest.raises(cofx.InputError, match="in the middle of a call"):
            call(step, 8, X, OFFSET)
    with pytest.raises(cofx.InputError, match="in the middle of a call"):
        step.set_state(before)
    waits.go_on.set()
    thread.join(60)
    step.set_state(before)
    assert equal(step.forward_step(X[:, :, 8], OFFSET), results[0])


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_two_threads_that_try(file: Path, runtime: str) -> None:
    """Each call is taken as a whole or refused: the outputs are those of the frames that were taken, in their order."""
    step: Any = made(Net) if runtime == "torch" else AsTensors(OnnxStep(file))
    one = X[:1, :, :1].expand(1, 3, 1).contiguous()
    offset, taken, refused, lock = OFFSET[:1], [], [], threading.Lock()
    step.forward_steps(one, offset)

    def worker() -> None:
        with torch.no_grad():
            for _ in range(200):
                try:
                    step.forward_steps(one, offset)
                except cofx.InputError:
                    refused.append(1)
                else:
                    with lock:
                        taken.append(1)

    threads = [threading.Thread(target=worker) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    state = step.get_state()
    count = int(state["count"]) if runtime == "torch" else int(state["position"][0, 0])
    assert count == 1 + len(taken) and len(taken) + len(refused) == 600
    rest = step.forward_steps(one, offset, pad_end=True)
    whole = made(Net).model(one.expand(1, 3, count + 1), offset)
    torch.testing.assert_close(rest[0], whole[0][:, :, -rest[0].shape[2] :], rtol=1e-4, atol=1e-5)


def test_two_step_models_of_one_module_in_two_threads() -> None:
    model = Net().eval()
    results: dict[int, Any] = {}

    def worker(seed: int) -> None:
        with torch.no_grad():
            x = torch.randn(2, 3, 60, generator=torch.Generator().manual_seed(seed))
            step = cofx.compile(model, (x[:, :, :12], OFFSET[:2]), time_dim=(2, None))
            parts = [step.forward_step(x[:, :, t], OFFSET[:2]) for t in range(60)]
            y = [p[0] for p in parts if p is not None and p[0] is not None]
            got = torch.cat([torch.stack(y, 2), step.flush()[0]], 2)
            results[seed] = (got, x)

    threads = [threading.Thread(target=worker, args=(seed,)) for seed in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert len(results) == 2
    for got, x in results.values():  # the module may not run while it is being compiled
        torch.testing.assert_close(got, model(x, OFFSET[:2])[0], rtol=1e-4, atol=1e-5)
