"""``torch.cond`` in a model: its branches are pure, so that a choice between what they give is the same."""

import pytest
import torch
from torch import nn

import cofx
from contract import check_contract


class OfFrames(nn.Module):
    """Frame by frame: loud frames are squashed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        frames = [torch.cond(f.square().sum() > 1.5, torch.tanh, lambda f: 2 * f, (f,)) for f in y.unbind(1)]
        return torch.stack(frames, 1)


class OfClip(nn.Module):
    """By a number of the whole clip."""

    def forward(self, x):
        return torch.cond(x.mean() > 0, lambda x: x.relu() + 1, lambda x: 2 * x - 1, (x,))


class OfBuffer(nn.Module):
    """By a flag of the module, its branches of different reach."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv1d(2, 3, 7, padding=3), nn.Conv1d(2, 3, 1)
        self.flag = nn.Buffer(torch.tensor(False))

    def forward(self, x):
        return torch.cond(self.flag, self.fine, self.coarse, (x,))


@pytest.mark.parametrize(("net", "kind"), [(OfFrames, "stream"), (OfClip, "clip")])
def test_by_the_data(net, kind):
    torch.manual_seed(0)
    options = {"time_dim": 1, "batch_dim": None, "options": {"batch_dim": None}, "kind": kind}
    check_contract(net().eval(), torch.randn(3, 8), checks=("offline", "steps", "chunks"), **options)


def test_by_a_flag():
    """Its branch alone is there; once the flag has changed the model is to be compiled again."""
    model = OfBuffer().eval()
    step = cofx.compile(model, torch.randn(1, 2, 9))
    assert step.delay == 0 and step.report().macs_per_step == 6
    x = torch.randn(1, 2, 12)
    with torch.no_grad():
        torch.testing.assert_close(step.forward_steps(x), model.coarse(x))
        model.flag.fill_(True)
        with pytest.raises(cofx.CompileError, match="compile"):
            step.clean_state()
