"""Models whose forward writes to their own parameters or buffers: taken where that does not change what they give."""

import warnings

import pytest
import torch
from torch import nn

import cofx
from contract import compile_case, run_check
from models import Sample

CLIP = torch.randn(2, 4, 20, generator=torch.Generator().manual_seed(0))


class Bounded(nn.Conv1d):
    """Weights of a bounded norm, as nets for EEG have them (EEGNet)."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3)
        nn.init.uniform_(self.weight, -3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=1)
        return super().forward(x)


class Clamped(Bounded):
    """In place, and only part of the weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.weight[:, :2].clamp_(-0.5, 0.5)
        return nn.Conv1d.forward(self, x)


class Counting(nn.Conv1d):
    """What is counted is not used."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


class Scratch(nn.Conv1d):
    """A buffer is written before it is read, by way of a view."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3)
        self.register_buffer("room", torch.randn(2, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        row = self.room[0]
        row.copy_(self.bias * 2)
        return super().forward(x) + self.room[0][:, None]


class BoundedMemory(nn.Module):
    """Weights that a recurrent layer also keeps in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.memory.weight_hh_l0.data.clamp_(-0.2, 0.2)
        return self.memory(x.mT)[0].mT


class Growing(Counting):
    """What is counted is used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.calls


class ClampedLater(Bounded):
    """What is written is read in the next call (SyncNet)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.Conv1d.forward(self, x)
        self.weight.data.clamp_(min=0)
        return y


def content(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", [Bounded, Clamped, Counting, Scratch, BoundedMemory])
def test_a_model_that_gives_the_same_at_each_call(kind) -> None:
    case = compile_case(Sample(kind.__name__, kind, [(2, 4, 20)]))
    for check in ("offline", "steps", "chunks"):
        run_check(case, check)


@pytest.mark.parametrize("kind", [Bounded, Clamped, Counting, Scratch, BoundedMemory])
@torch.no_grad()
def test_it_is_left_alone(kind) -> None:
    model = kind().eval()
    before = content(model)
    versions = [x._version for x in model.state_dict().values()]
    step = cofx.compile(model, CLIP)
    assert step.verify(CLIP).exact
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert versions == [x._version for x in model.state_dict().values()]


@torch.no_grad()
def test_a_call_of_the_model_in_mid_stream() -> None:
    """It writes to the weights what they are, which is no reason to warn."""
    model = Clamped().eval()
    model(CLIP)
    step = cofx.compile(model, CLIP)
    before = [step.forward_step(x) for x in CLIP[:, :, :10].unbind(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = step(CLIP)
        after = [step.forward_step(x) for x in CLIP[:, :, 10:].unbind(2)]
        step.clean_state()
    got = torch.stack([y for y in before + after if y is not None], 2)
    torch.testing.assert_close(got, whole)
    torch.testing.assert_close(step.forward_steps(CLIP), whole)
    with pytest.warns(UserWarning, match="parameters have changed"):
        model.weight.mul_(0.5)
        step.forward_step(CLIP[:, :, 0])


@torch.no_grad()
def test_what_depends_on_the_calls_before_is_refused() -> None:
    model = Growing().eval()
    with pytest.raises(cofx.CaptureError, match="forward changes calls, .* something else at each call"):
        cofx.compile(model, CLIP)
    assert model.calls == 0


@torch.no_grad()
def test_what_settles_at_the_first_call() -> None:
    model = ClampedLater().eval()
    before = content(model)
    with pytest.raises(cofx.CaptureError, match="forward changes weight, .*from its second call on\n.*call the model"):
        cofx.compile(model, CLIP)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model(CLIP)
    assert cofx.compile(model, CLIP).verify(CLIP).exact
