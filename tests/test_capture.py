"""How models are traced that torch.export does not take, and what is said of those that nothing takes."""

import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import cofx
from models.sample import Net

X = torch.randn(2, 3, 30, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def layers() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=1),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.Conv1d(4, 2, 4, stride=2),
        nn.ConvTranspose1d(2, 2, 2),
    )


@pytest.mark.parametrize("script", [torch.jit.script, lambda m: torch.jit.trace(m, X)], ids=["script", "trace"])
def test_a_torchscript_module_is_recorded(script) -> None:
    with pytest.raises(ValueError, match="ScriptModule"):
        torch.export.export(script(layers().eval()), (X,), strict=False)
    model = script(layers().eval())
    step = cofx.compile(model, X[:, :, :10])
    assert step.equivalence == "stream" and step.stride == 2
    assert step.verify(X).exact
    assert step.verify(X[:1]).exact, "the batch is open, though only two were recorded"
    assert list(step.state_dict()) == list(model.state_dict())
    twice = {n: t * 2 for n, t in model.state_dict().items()}
    step.load_state_dict(twice)
    step.clean_state()
    assert step.verify(X).exact, "parameters are the model's own"


def test_numbers_that_follow_the_length_are_not_taken_for_constants() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x[:, :, : x.shape[2] - 2])

    step = cofx.compile(torch.jit.script(Fixed()), X[:, :, :10])
    assert step.equivalence == "stream" and step.verify(X).exact


def test_what_leaves_torch_is_refused() -> None:
    with pytest.raises(cofx.CaptureError) as error:
        cofx.compile(Net(lambda m, x: m.conv(torch.from_numpy(x.numpy() * 2)), conv=nn.Conv1d(3, 3, 3)), X)
    assert "leaves torch" in str(error.value)


def test_data_of_a_tensor_is_the_tensor() -> None:
    step = cofx.compile(Net(lambda m, x: m.conv(x.data) + x[:, :, 2:].data, conv=nn.Conv1d(3, 3, 3)), X)
    assert step.equivalence == "stream" and step.verify(X).exact


def test_a_model_that_is_recorded_is_left_as_it_was() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            self.last = x
            return x.data

    model, state = Counts(), torch.get_rng_state()
    with pytest.raises(cofx.CaptureError, match="buffers"):
        cofx.compile(model, X)
    assert model.seen == 0 and not hasattr(model, "last")
    assert torch.equal(state, torch.get_rng_state())


def test_what_forward_leaves_on_the_module_is_taken_off_again() -> None:
    class Keeps(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = x.relu()
            return self.last

    model = Keeps()
    cofx.compile(model, X)
    assert not hasattr(model, "last")


def test_one_cause_is_told_once_with_the_line_and_nothing_is_printed() -> None:
    program = """
        import torch, cofx
        from torch import nn
        class Branches(nn.Module):
            def forward(self, x):
                return x if x.sum().item() > 0 else -x
        try:
            cofx.compile(Branches(), torch.randn(1, 3, 30))
        except cofx.CaptureError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stdout
    assert "depends on the data" in lines[0] and "line" not in lines[0]
    assert lines[1].split()[0] == "at" and "in forward" in lines[1]
    assert lines[2].split()[0] == "try" and "torch.where" in lines[2]


@pytest.mark.parametrize("given", [True, False])
def test_packed_sequences_are_refused_by_name(given) -> None:
    class Packs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.GRU(4, 8, batch_first=True)

        def forward(self, x):
            lengths = torch.full((x.shape[0],), x.shape[1]) if given else (x[:, :, 0] > -9).sum(1)
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            return nn.utils.rnn.pad_packed_sequence(self.cells(packed)[0], batch_first=True)[0]

    with pytest.raises(cofx.CaptureError, match="it packs sequences") as told:
        cofx.compile(Packs().eval(), torch.randn(1, 12, 4), time_dim=1)
    assert "in forward" in str(told.value)


@dataclass
class Result:
    features: torch.Tensor
    raw: dict[str, torch.Tensor] | None = None


class ReturnsDataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> list[Result]:
        return [Result(self.conv(x), {"x": x}), Result(x)]


def test_a_dataclass_that_torch_does_not_know(tmp_path: Path) -> None:
    """It is taken apart and put together again; a saved model asks for it where it is not known."""
    clip = torch.randn(2, 3, 12)
    step = cofx.compile(ReturnsDataclass().eval(), clip)
    assert step.verify(torch.randn(2, 3, 30))
    first = step.forward_step(clip[:, :, 0])
    assert isinstance(first[0], Result) and first[0].features is None and first[0].raw is not None
    step.save(tmp_path / "step.cofx")
    assert isinstance(cofx.load(tmp_path / "step.cofx").forward_steps(clip)[1], Result)
    told = subprocess.run(
        [sys.executable, "-c", f"import cofx; cofx.load({str(tmp_path / 'step.cofx')!r})"],
        capture_output=True, text=True, check=False,
    ).stderr  # fmt: skip
    assert "register_dataclass" in told and "Result" in told


def test_an_output_that_nobody_can_take_apart() -> None:
    class Own:
        def __init__(self, x: torch.Tensor) -> None:
            self.x = x

    class ReturnsOwn(nn.Module):
        def forward(self, x: torch.Tensor) -> Own:
            return Own(x * 2)

    with pytest.raises(cofx.CaptureError, match=r"returns a .*Own"):
        cofx.compile(ReturnsOwn(), torch.randn(1, 3, 8))


def test_numbers_of_parameters() -> None:
    """A parameter of one number may be read as one; where that has changed, the model is to be compiled again."""

    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.temperature = nn.Conv1d(3, 4, 3), nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x) * self.temperature.item()
            return y.relu() if self.temperature > 1 else y

    model = Tempered().eval()
    step = cofx.compile(model, torch.randn(2, 3, 12))
    assert step.equivalence == "stream" and step.verify(torch.randn(2, 3, 30))
    with torch.no_grad():
        model.temperature.fill_(3)
    with pytest.raises(cofx.CompileError, match="'temperature' has changed"):
        step.clean_state()
