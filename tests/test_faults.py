"""Calls that fail in their middle: the stream stays where it was, and the next call is right.

What fails is every op of a call in turn, and a signal at every moment at which Python takes one.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cofx
from shaken import FailsAt, equal

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


class Faults:
    """The n-th op of a call raises, or a signal comes at the n-th moment."""

    def __init__(self, kind: str, error: BaseException, number: int) -> None:
        self.error = error
        self.fault: Any = FailsAt(number, error) if kind == "ops" else Interrupts(number)

    @property
    def struck(self) -> bool:
        """It came to that."""
        return self.fault.left < 0


def survives(step: Any, call: Callable[[], Any], kind: str, error: BaseException, every: int = 1) -> int:
    """The call fails in every place, and leaves the stream where it was; then it gives what it would have given.

    Returns how often it failed.
    """
    before = step.get_state()
    expected, after = call(), step.get_state()
    failures, number = 0, 0
    while True:
        step.set_state(before)
        faults, result = Faults(kind, error, number), None
        try:
            with faults.fault:
                result = call()
        except type(error):
            if result is None:
                failures += 1
                assert equal(step.get_state(), before), f"the stream has moved ({number})"
        if not faults.struck:
            break
        number += every
    step.set_state(before)
    assert equal(call(), expected) and equal(step.get_state(), after)
    return failures


CALLS: dict[str, Callable[[Any, int], Any]] = {
    "forward_step": lambda s, t: s.forward_step(X[:, :, t], OFFSET),
    "forward_steps": lambda s, t: s.forward_steps(X[:, :, t : t + 4], OFFSET),
    "pad_end": lambda s, t: s.forward_steps(X[:, :, t : t + 4], OFFSET, pad_end=True),
    "flush": lambda s, t: (s.flush(),),
    "lanes": lambda s, t: s.forward_steps(X[:, :, t : t + 2], OFFSET, **ALL),
    "lane step": lambda s, t: s.forward_step(X[:, :, t], OFFSET, **ALL),
    "clean lanes": lambda s, t: (s.clean_state([1]),),
}
ERRORS = {"ops": (RuntimeError("boom"), MemoryError(), KeyboardInterrupt()), "signals": (KeyboardInterrupt(),)}


def walked(step: Any, call: str, steps: int) -> None:
    """So many frames, by lanes if the call has lanes."""
    step.clean_state()
    lanes = {"ready": [True] * 3} if "lane" in call else {}
    for t in range(0, steps, 2):
        step.forward_steps(X[:, :, t : t + 2], OFFSET, **lanes)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python drops it within a destructor
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("net", [Net, Attention, Strided])
def test_step_model(net: type[nn.Module], call: str, kind: str) -> None:
    """In its first frames and in mid-stream."""
    if net is Strided and call == "lane step":
        return
    step = made(net)
    for at in (2, 30):
        walked(step, call, at)
        for error in ERRORS[kind]:
            assert survives(step, lambda at=at: CALLS[call](step, at), kind, error) or call == "flush"
