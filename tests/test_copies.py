"""copy.deepcopy and pickle of a step model: what an nn.Module does, and the stream goes on where it was."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import cofx

X = torch.randn(2, 3, 30, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def saved_and_loaded(step: cofx.StepModule) -> cofx.StepModule:
    file = io.BytesIO()
    torch.save(step, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def model() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 2, 3, stride=2)).eval()


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda s: pickle.loads(pickle.dumps(s)), "torch.save": saved_and_loaded}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_goes_on_where_the_stream_was_and_by_itself(duplicate) -> None:
    step = cofx.compile(model(), X[:, :, :12])
    step.call_mode = "forward_steps"
    step.forward_steps(X[:, :, :7])
    other = duplicate(step)
    expected = step.forward_steps(X[:, :, 7:], update_state=False)
    torch.testing.assert_close(other(X[:, :, 7:]), expected)
    torch.testing.assert_close(step.forward_steps(X[:, :, 7:]), expected, msg="the streams are two")
    assert (other.delay, other.stride, other.equivalence) == (step.delay, step.stride, step.equivalence)
    for p in other.model.parameters():
        p.zero_()
    other.clean_state()
    assert not other.forward_steps(X).any() and step.verify(X).exact, "the parameters are two"
    assert list(other.state_dict()) == list(step.state_dict())


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_before_anything_was_traced(duplicate) -> None:
    other = duplicate(cofx.compile(model(), time_dim=-1))
    assert other.forward_steps(X) is not None and other.verify(X).exact


def test_a_step_model_within_a_module_is_copied_with_it() -> None:
    class Service(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = cofx.compile(model(), X)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.step.forward_steps(x)

    service = Service()
    service(X[:, :, :9])
    torch.testing.assert_close(copy.deepcopy(service)(X[:, :, 9:]), service(X[:, :, 9:]))


def test_inputs_without_time_and_at_another_batch_size_are_kept() -> None:
    class Conditioned(nn.Module):
        def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool1d(x, 3, 1, 1) + c[:, :, None]

    step = cofx.compile(Conditioned(), (X[:, :, :9], X[:, :, 0]), time_dim=(2, None))
    one = X[:1]
    step.forward_steps(one, one[:, :, 0])
    torch.testing.assert_close(copy.deepcopy(step).flush(),
                               step.flush())  # fmt: skip


def test_lanes_are_copied() -> None:
    step = cofx.compile(model(), X[:, :, :12])
    ready = torch.tensor([True, False])
    step.forward_steps(X[:, :, :8], ready=ready)
    other = copy.deepcopy(step)
    every = torch.tensor([True, True])
    for a, b in zip(
        step.forward_steps(X[:, :, 8:16], ready=every), other.forward_steps(X[:, :, 8:16], ready=every), strict=True
    ):
        torch.testing.assert_close(a, b, equal_nan=True)
