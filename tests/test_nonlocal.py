"""Ops over the whole clip: recomputed, looking on the frames so far, or refused; attention with a bounded context."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cofx


class Excitation(nn.Module):
    """Squeeze and excitation between convolutions, the squeeze reshaped to features; a pooled head."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv3d(2, 4, 3, padding=1), nn.Conv3d(4, 3, (3, 1, 1))
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.gate = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4), nn.Sigmoid())

    def forward(self, x):
        x = self.before(x)
        b, c = x.shape[:2]
        return self.after(x * self.gate(self.pool(x).view(b, c)).view(b, c, 1, 1, 1))


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.group, self.instance = nn.Conv1d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4)

    def forward(self, x):
        return self.conv(F.pad(x, (2, 0))[:, :, 2:]) * 0 + self.instance(F.relu(self.group(self.conv(x))))


class Standardised(nn.Module):
    """Less the mean, over the deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3)

    def forward(self, x):
        return self.conv((x - x.mean(2, keepdim=True)) / (x.std(2, keepdim=True) + 0.1))


class Range(nn.Module):
    def forward(self, x):
        return (x - x.amin((1, 2), keepdim=True)) / (x.amax((1, 2), keepdim=True) + 4) + x.sum(2, keepdim=True)


class AdaptiveGraph(nn.Module):
    """A graph over joints made from the whole clip, as A-GCN has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mix = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 1)
        self.base, self.time = nn.Parameter(torch.rand(5, 5)), nn.Conv2d(4, 4, (3, 1), padding=(1, 0))

    def forward(self, x):
        n, c, t, v = x.shape
        left = self.a(x).permute(0, 3, 1, 2).contiguous().view(n, v, 2 * t)
        right = self.b(x).view(n, 2 * t, v)
        graph = torch.softmax(torch.matmul(left, right) / left.size(-1), -2) + self.base
        return self.time(F.relu(self.mix(torch.matmul(x.view(n, c * t, v), graph).view(n, c, t, v))))


class SlowerGraph(nn.Module):
    """The same at half the rate, its scale by the clip's length there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, (3, 1), (2, 1), (1, 0)), AdaptiveGraph()
        self.second.time = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.second(self.first(x))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(x)


NETS = [
    pytest.param(Excitation, (2, 2, 6, 4, 4), 2, id="excitation"),
    pytest.param(Norms, (2, 3, 8), 2, id="norms"),
    pytest.param(Standardised, (2, 2, 8), 2, id="standardised"),
    pytest.param(Range, (2, 2, 7), 2, id="range"),
    pytest.param(AdaptiveGraph, (2, 3, 6, 5), 2, id="adaptive_graph"),
    pytest.param(SlowerGraph, (2, 3, 6, 5), 2, id="slower_graph"),
    pytest.param(Encoder, (2, 7, 4), 1, id="encoder"),
]


def stretched(shape: tuple[int, ...], axis: int, frames: int) -> torch.Tensor:
    torch.manual_seed(7)
    return torch.randn([frames if i == axis else n for i, n in enumerate(shape)])


@pytest.mark.parametrize(("build", "shape", "axis"), NETS)
def test_continual_streams_in_full_and_equals_its_reference(build, shape, axis):
    torch.manual_seed(0)
    model = build().eval()
    step = cofx.compile(model, torch.randn(shape), time_dim=axis, nonlocal_ops="continual")
    assert step.equivalence == "approximate"
    report = step.report()
    assert report.streamed == 1.0 and report.approximated and not report.recomputed
    reference = step.reference_module
    assert {id(p) for p in reference.parameters()} <= {id(p) for p in model.parameters()}
    x = stretched(shape, axis, 19)
    wanted = reference(x)
    got = [y for t in range(19) if (y := step.forward_step(x.select(axis, t))) is not None]
    parts = [torch.stack(got, axis)] + ([tail] if (tail := step.flush()) is not None else [])
    torch.testing.assert_close(torch.cat(parts, axis), wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_the_trailing_form_is_the_op_on_the_frames_so_far():
    model = Standardised().eval()
    step = cofx.compile(model, torch.randn(1, 2, 6), nonlocal_ops="continual")
    x = torch.randn(1, 2, 10)

    def slowly(x):
        frames = []
        for t in range(x.shape[2]):
            clip = x[:, :, max(0, t - 5) : t + 1]
            spread = clip.std(2, keepdim=True) if clip.shape[2] > 1 else torch.full((1, 2, 1), torch.nan)
            frames.append((x[:, :, t : t + 1] - clip.mean(2, keepdim=True)) / (spread + 0.1))
        return model.conv(torch.cat(frames, 2))

    torch.testing.assert_close(step.reference_module(x), slowly(x), rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_slower_stream_looks_back_as_long_as_a_clip():
    """Frame j at half the rate is the last frame of the model on the frames of that stream which a clip holds."""
    torch.manual_seed(0)
    model = SlowerGraph().eval()
    step = cofx.compile(model, torch.randn(1, 3, 8, 5), nonlocal_ops="continual")
    x = torch.randn(1, 3, 17, 5)
    got, slow = step.reference_module(x), model.first(x)
    assert got.shape[2] == slow.shape[2] == 9
    for j in range(9):
        wanted = model.second(slow[:, :, max(0, j - 3) : j + 1].contiguous())[:, :, -1]
        torch.testing.assert_close(got[:, :, j], wanted, rtol=1e-4, atol=1e-5)


def test_the_reference_can_be_tuned():
    torch.manual_seed(0)
    model = Excitation().eval()
    step = cofx.compile(model, torch.randn(1, 2, 6, 4, 4), nonlocal_ops="continual")
    step.reference_module(torch.randn(1, 2, 9, 4, 4)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    with torch.no_grad():
        model.gate[0].weight.mul_(1.5)
    step.clean_state()
    assert step.verify(torch.randn(1, 2, 12, 4, 4)).exact


def test_a_choice_for_each_module():
    model = nn.Sequential()
    model.add_module("first", Range())
    model.add_module("second", Standardised())
    x = torch.randn(1, 2, 8)
    step = cofx.compile(model, x, nonlocal_ops={"first": "continual"}, equivalence="first-clip")
    assert step.equivalence == "approximate" and 0 <= step.report().streamed < 1
    assert [r.module for r in step.reference_module.replaced] == ["first"] * 3
    with pytest.raises(cofx.RefusedError, match=r"mean[\s\S]*second[\s\S]*std"):
        cofx.compile(model, x, nonlocal_ops={"first": "continual", "second": "refuse"})


def test_refuse_names_each_op_and_its_line():
    with pytest.raises(cofx.RefusedError, match="adaptive_avg_pool3d"):
        cofx.compile(Excitation().eval(), torch.randn(1, 2, 6, 4, 4), nonlocal_ops="refuse")
    step = cofx.compile(nn.Conv1d(2, 2, 3), torch.randn(1, 2, 8), nonlocal_ops="refuse")
    assert step.equivalence == "stream"


def test_without_clip_wide_ops_continual_is_exact():
    step = cofx.compile(nn.Conv1d(2, 2, 3), torch.randn(1, 2, 8), nonlocal_ops="continual")
    assert step.equivalence == "stream" and step.reference_module is step.model


def test_bad_arguments():
    with pytest.raises(cofx.InputError, match="nonlocal_ops"):
        cofx.compile(nn.Conv1d(2, 2, 3), nonlocal_ops="continue")
    with pytest.raises(cofx.InputError, match="context"):
        cofx.compile(nn.Conv1d(2, 2, 3), context=0)


class Causal(nn.Module):
    def __init__(self, band: int | None = None) -> None:
        super().__init__()
        self.qkv, self.band = nn.Linear(4, 12), band

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.band is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        i = torch.arange(x.shape[1])
        back = i[:, None] - i[None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(back >= 0) & (back < self.band))


def test_context_bounds_attention_exactly_to_the_band():
    model, banded = Causal().eval(), Causal(band=4).eval()
    banded.load_state_dict(model.state_dict())
    step = cofx.compile(model, torch.randn(2, 9, 4), time_dim=1, context=4)
    assert step.equivalence == "approximate" and step.receptive_field == 4
    assert "bounded context" in str(step.report())
    x = torch.randn(2, 30, 4)
    with torch.no_grad():
        torch.testing.assert_close(step.forward_steps(x), banded(x), rtol=1e-4, atol=1e-5)
        step.clean_state()
        ys = torch.stack([step.forward_step(f) for f in x.unbind(1)], 1)
        torch.testing.assert_close(ys, banded(x), rtol=1e-4, atol=1e-5)


class Folded(nn.Module):
    """Weights that are computed from parameters before they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 2, 3))

    def forward(self, x):
        return self.conv(x)


def test_changed_parameters_are_noticed():
    model = Folded().eval()
    step = cofx.compile(model, torch.randn(1, 2, 8))
    x = torch.randn(1, 2, 12)
    with torch.no_grad():
        for t in range(6):
            step.forward_step(x[:, :, t])
        model.conv.parametrizations.weight.original0.mul_(2)
        with pytest.warns(UserWarning, match=r"refresh\(\)"):
            step.forward_step(x[:, :, 6])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step.forward_step(x[:, :, 7])
            step.refresh()
            y = step.forward_step(x[:, :, 8])
        torch.testing.assert_close(y, model(x[:, :, 6:9])[:, :, 0])


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.memory = nn.Conv1d(3, 3, 3, padding=1), nn.GRU(3, 4, batch_first=True)

    def forward(self, x):
        return self.memory(self.conv(x.transpose(1, 2)).transpose(1, 2))[0]


class Strided(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv1d(3, 4, 4, 2, 1), nn.ConvTranspose1d(4, 3, 4, 2, 1)

    def forward(self, x):
        x = x.transpose(1, 2)
        return (x + self.up(F.gelu(self.down(x)))).transpose(1, 2)


class ByDistance(nn.Module):
    """Causal attention with a bias for each distance, and a convolution with a wave that decays over the whole clip."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.decay = nn.Parameter(torch.randn(12)), nn.Parameter(torch.rand(3))

    def forward(self, x):
        n = x.shape[1]
        at = torch.arange(n)
        ago = at[:, None] - at
        scores = (x @ x.mT + self.bias[ago.clamp(min=0)]).masked_fill(ago < 0, float("-inf"))
        kernel = (-self.decay[:, None] * at).exp() * (at * 0.3).cos()
        wave = torch.fft.rfft(x.mT, n=2 * n) * torch.fft.rfft(kernel, n=2 * n)
        return scores.softmax(-1) @ x + torch.fft.irfft(wave, n=2 * n)[..., :n].mT


@pytest.mark.parametrize("build", [Recurrent, Strided, lambda: Causal(), lambda: Causal(3), ByDistance])
@pytest.mark.parametrize("chunks", [(12,), (1,) * 12, (5, 3, 4)])
def test_gradients_through_a_stream_are_the_offline_ones(build, chunks):
    torch.manual_seed(0)
    model = build().double().eval() if not isinstance(build, type) else build().double().eval()
    twin = copy.deepcopy(model)
    sizes = torch.randn(1, 12, 4 if isinstance(model, Causal) else 3).double()
    x, z = sizes.clone().requires_grad_(), sizes.clone().requires_grad_()
    step = cofx.compile(model, sizes, time_dim=1)
    parts, at = [], 0
    for i, n in enumerate(chunks):
        y = step.forward_steps(x[:, at : at + n], pad_end=i == len(chunks) - 1)
        parts += [] if y is None else [y]
        at += n
    weights = torch.randn(1, 12, twin(z).shape[2]).double()
    (torch.cat(parts, 1) * weights).sum().backward()
    (twin(z) * weights).sum().backward()
    torch.testing.assert_close(x.grad, z.grad)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


class Pools(nn.Module):
    """Mean, extremum, sum and deviation over the clip, of numbers far from zero."""

    def forward(self, x):
        return torch.cat([x.mean(2), x.amax(2), x.sum(2), x.std(2), (x - 1000).mean((2,))], 1)


@pytest.mark.parametrize("steps", [4_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_pools_do_not_drift(steps):
    """After so many steps a pool is what it is for a clip: every clip is summed anew from its frames."""
    torch.manual_seed(0)
    model = Pools().eval()
    step = cofx.compile(model, torch.randn(1, 2, 8))
    frames = 1000 + 100 * torch.randn(1, 2, 20)
    with torch.no_grad():
        for _ in range(steps // 20):
            got = step.forward_steps(frames)
        last = torch.cat([frames, frames], 2)
        for j in range(20):
            wanted = model(last[:, :, j + 13 : j + 21])
            torch.testing.assert_close(got[:, :, j], wanted, rtol=1e-6, atol=1e-4)


class Squeezed(nn.Module):
    """Attributes of a user's own, of the names that the reference module has."""

    input_names, replaced = ["first", "second"], ["nothing"]

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 3)

    def forward(self, clip):
        return self.conv(clip * clip.mean(2, keepdim=True).sigmoid())


def test_what_was_replaced_is_told_of_the_model_and_of_no_other():
    clip = torch.randn(1, 3, 20)
    step = cofx.compile(Squeezed().eval(), clip, nonlocal_ops="continual")
    reference = cofx.compile(step.reference_module, clip)
    plain = cofx.compile(Squeezed().eval(), clip, equivalence="clip")
    assert [s.equivalence for s in (step, reference, plain)] == ["approximate", "stream", "clip"]
    assert [len(s.report().approximated) for s in (step, reference, plain)] == [1, 0, 0]
    assert [s.compiled.plan.capture.inputs for s in (step, reference, plain)] == [["clip"]] * 3
