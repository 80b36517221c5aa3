"""What is left away in programs of mid-stream: moves of dimensions of size 1, numbers that no frame decides."""

import pytest
import torch
from torch import nn

import cofx
from cofx.passes.codegen.key import Key


def targets(step):
    """The ops that run for a step in mid-stream."""
    step.compiled.program(Key(0, 1, frames=True, apart=True, kernels=False))
    graph = step.compiled.program(Key(0, 1, frames=True, apart=True, kernels=False)).graph
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


def check(model, clip, **options):
    """Steps far into a stream, against the reference over all of it."""
    step = cofx.compile(model.eval(), clip, **options)
    long = torch.randn(*clip.shape[:2], 4 * clip.shape[2], *clip.shape[3:])
    with torch.no_grad():
        got = [y for x in long.unbind(2) if (y := step.forward_step(x)) is not None]
        want = step.reference_module(long)
    torch.testing.assert_close(torch.stack(got, 2), want[:, :, : len(got)], rtol=1e-4, atol=1e-5)
    return step


class Squeezed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.down, self.up = nn.Conv3d(3, 8, 3, padding=1), nn.Conv3d(8, 2, 1), nn.Conv3d(2, 8, 1)

    def forward(self, x):
        x = self.conv(x)
        return x * torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3, 4), keepdim=True)))))


@pytest.mark.parametrize("batch", [1, 3])
def test_squeeze_excitation_of_the_frames_so_far(batch):
    step = check(Squeezed(), torch.randn(batch, 3, 6, 8, 8), nonlocal_ops="continual")
    ops = targets(step)
    assert not [t for t in ops if "permute" in t or "eq." in t or "ne." in t or "logical_or" in t]


class Moves(nn.Module):
    """Dimensions of size 1 that come, go, and change places, between ops that do not care and ops that do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3)
        self.scale = nn.Parameter(torch.randn(6, 1, 1))

    def forward(self, x):
        y = self.conv(x)[:, :, :, None]
        y = torch.tanh(y.permute(2, 0, 3, 1)) * 2
        y = y.permute(1, 3, 0, 2) * self.scale
        total = y.sum(1, keepdim=True).unsqueeze(0).squeeze(0)
        y = torch.relu(y.unsqueeze(2) + total.unsqueeze(2) - y.mean(3, keepdim=True).unsqueeze(2))
        return y.flatten(1, 2).squeeze(-1) + torch.softmax(y[:, :, 0, :, 0], 1)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_moves_of_dimensions(batch):
    check(Moves(), torch.randn(batch, 4, 12))


def test_other_batch_sizes_than_the_traced():
    model = Moves().eval()
    step = cofx.compile(model, torch.randn(2, 4, 12))
    for batch in (1, 2, 7):
        step.clean_state()
        clip = torch.randn(batch, 4, 30)
        with torch.no_grad():
            got = [y for x in clip.unbind(2) if (y := step.forward_step(x)) is not None]
            torch.testing.assert_close(torch.stack(got, 2), model(clip)[:, :, : len(got)], rtol=1e-4, atol=1e-5)


class Doubled(nn.Module):
    """A number that is the same for all frames, in a type of its own."""

    def forward(self, x):
        here = torch.logical_or(x == x, x != x)
        return x * nn.functional.avg_pool1d(here.to(torch.float64), 3, stride=1, padding=1, count_include_pad=True)


def test_numbers_promote_types():
    step = check(Doubled(), torch.randn(1, 2, 9))
    assert step.forward_step(torch.randn(1, 2)).dtype == torch.float64


EINSUMS = {
    "btc,cd->btd": (4, 5), "cd,btc->bdt": (4, 5), "bthc,hcd->bthd": (3, 4, 2), "bthc,bthd->btcd": None,
    "bthc,chd->bdt": (4, 3, 2), "bthc,hc->bt": (3, 4), "bthc,btgc->bthg": None,
}  # fmt: skip


@pytest.mark.parametrize("equation", EINSUMS)
@torch.no_grad()
def test_einstein_sums_are_products_of_matrices(equation):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            shape = EINSUMS[equation]
            self.weight = None if shape is None else nn.Parameter(torch.randn(shape))

        def forward(self, x):
            other = x.flip(-1) if self.weight is None else self.weight
            first, second = (other, x) if equation.startswith("cd") else (x, other)
            return torch.einsum(equation, first, second)

    x = torch.randn(2, 9, 4) if "h" not in equation else torch.randn(2, 9, 3, 4)
    model = Net().eval()
    step, want = cofx.compile(model, x, time_dim=1), model(x)
    axis = equation.split("->")[1].index("t")
    got = [step.forward_step(frame) for frame in x.unbind(1)]
    torch.testing.assert_close(torch.stack(got, axis), want)
    ops = {n.target for n in step.compiled.program(Key(0, 1, frames=True, apart=True, kernels=False)).graph.nodes}
    assert torch.ops.aten.einsum.default not in ops
    assert ops & {torch.ops.aten.mm.default, torch.ops.aten.bmm.default}


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_gradients_of_frames_through_frozen_weights(backend):
    """Torch's own kernels have no gradients, nor has another backend: a step that is asked for them does without."""
    torch.manual_seed(0)
    layers = nn.Conv3d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv3d(16, 8, 3, padding=(0, 1, 1))
    model = nn.Sequential(*layers).eval().requires_grad_(False)
    clip = torch.randn(1, 3, 9, 20, 20, requires_grad=True)
    step = cofx.compile(model, clip.detach(), backend=backend)
    with torch.no_grad():
        for x in clip[:, :, :4].unbind(2):
            step.forward_step(x)
    step.clean_state()
    got = [step.forward_step(x) for x in clip.unbind(2)]
    want = model(clip)
    for i, y in enumerate(got[step.delay :]):
        found, expected = (torch.autograd.grad(z.sum(), clip, retain_graph=True)[0] for z in (y, want[:, :, i]))
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert not step.forward_step(clip[:, :, 0]).requires_grad
    step.clean_state()
    for x in clip.detach().unbind(2):  # nobody asks for gradients of these: state stays where the backend has it
        step.forward_step(x)
    assert step._state._tensors is None
