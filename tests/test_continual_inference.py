"""Networks built from the modules of continual-inference compile as they are, since their forward is plain PyTorch.

The step model gives the same frames at the same steps with the same attributes as the network's own ``forward_step``,
wherever that is right; where it is not, the offline forward decides.
"""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cofx
from contract import CHECKS, compile_case, run_check
from models import Sample
from streaming import same

co = pytest.importorskip("continual")
torch.set_num_threads(1)


def cnn() -> nn.Module:
    return co.Sequential(
        co.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), co.Conv1d(4, 4, 5, stride=2, padding=2),
        nn.GELU(), co.AvgPool1d(2, stride=1), co.Conv1d(4, 2, 1),
    )  # fmt: skip


def cnn_3d() -> nn.Module:
    return co.Sequential(
        co.Conv3d(2, 4, 3, padding=1, stride=(1, 2, 2)), nn.BatchNorm3d(4), nn.ReLU(),
        co.MaxPool3d((1, 2, 2)), co.Conv3d(4, 3, (3, 1, 1), stride=(2, 1, 1)),
    )  # fmt: skip


def replicated() -> nn.Module:
    return co.Sequential(co.Conv1d.build_from(nn.Conv1d(3, 4, 5, padding=2, padding_mode="replicate")), nn.ReLU())


def converted() -> nn.Module:
    return co.continual(
        nn.Sequential(
            nn.Conv2d(3, 4, (3, 1), padding=(1, 0)), nn.BatchNorm2d(4), nn.SiLU(), nn.AvgPool2d((2, 1)), nn.Dropout2d()
        )
    )


def residuals() -> nn.Module:
    return co.Sequential(
        co.Residual(co.Sequential(co.Conv1d(3, 3, 3, padding=1), nn.BatchNorm1d(3), nn.ReLU())),
        co.Residual(co.Conv1d(3, 3, 5, padding=2)),
        co.Residual(co.Conv1d(3, 3, 3), residual_shrink=True),
    )


def mobile() -> nn.Module:
    inner = co.Sequential(
        co.Conv3d(4, 8, 1), nn.BatchNorm3d(8), nn.ReLU6(), co.Conv3d(8, 8, 3, padding=1, groups=8), nn.ReLU6(),
        co.Conv3d(8, 4, 1), nn.BatchNorm3d(4),
    )  # fmt: skip
    return co.Residual(inner)


def inception() -> nn.Module:
    def part(*layers: nn.Module) -> nn.Module:
        return co.Sequential(*layers, nn.BatchNorm3d(2), nn.ReLU())

    return co.BroadcastReduce(
        part(co.Conv3d(3, 2, 1)),
        part(co.Conv3d(3, 2, 1), co.Conv3d(2, 2, 3, padding=1)),
        part(co.Conv3d(3, 2, 1), co.Conv3d(2, 2, 5, padding=2)),
        part(co.MaxPool3d((1, 3, 3), padding=(0, 1, 1), stride=1), co.Conv3d(3, 2, 1)),
        reduce="concat",
    )


def dispatched() -> nn.Module:
    return co.Sequential(
        co.Broadcast(2),
        co.Parallel(co.Conv1d(3, 4, 5, padding=2), co.Conv1d(3, 4, 3, padding=1)),
        co.ParallelDispatch([1, 0, 0]),
        co.Reduce("mul"),
    )


def pointwise() -> nn.Module:
    return co.Sequential(
        co.Linear(3, 5, channel_dim=1), co.Add(1.5), co.Multiply(2), co.Identity(), co.Lambda(lambda x: x.sin()),
        co.Lambda(torch.tanh, takes_time=True), co.Reshape(1, 5), co.forward_stepping(nn.Conv1d(5, 2, 1)),
    )  # fmt: skip


def pooled() -> nn.Module:
    return co.Sequential(co.Conv2d(3, 4, 1), nn.ReLU(), co.AdaptiveAvgPool2d((1, 2), kernel_size=6))


def recurrent(kind: str) -> Callable[[], nn.Module]:
    return lambda: co.Sequential(co.Conv1d(3, 4, 3), getattr(co, kind)(4, 4))


def encoder(layers: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        factory = co.TransformerEncoderLayerFactory(8, 2, 16, dropout=0.0, sequence_len=6)
        return co.TransformerEncoder(factory, num_layers=layers)

    return build


def lone(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: getattr(co, name)(3, 3, **options)


SERIES, FEATURES = (1, 3, 16), (1, 8, 6)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "cnn": (cnn, SERIES, "stream"),
    "cnn_3d": (cnn_3d, (1, 2, 9, 8, 8), "stream"),
    "replicated": (replicated, SERIES, "stream"),
    "converted": (converted, (1, 3, 10, 2), "stream"),
    "residuals": (residuals, SERIES, "stream"),
    "residual_lagging": (lambda: co.Residual(co.Conv1d(3, 3, 3), residual_shrink="lagging"), SERIES, "stream"),
    "residual_leading": (lambda: co.Residual(co.Conv1d(3, 3, 3), residual_shrink="leading"), SERIES, "stream"),
    "mobile": (mobile, (1, 4, 8, 5, 5), "stream"),
    "inception": (inception, (1, 3, 7, 4, 4), "stream"),
    "dispatched": (dispatched, SERIES, "stream"),
    "pointwise": (pointwise, SERIES, "stream"),
    "conv_stride_3": (lone("Conv1d", kernel_size=5, stride=3, padding=2), SERIES, "stream"),
    "pooled": (pooled, (1, 3, 6, 4), "clip"),
    "encoder": (encoder(1), FEATURES, "clip"),
}


def build(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return make().eval()


def streams(net: nn.Module, step: cofx.StepModule, x: Tensor) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """What the network's own steps give and what the step model's give, frame by frame."""
    net.clean_state()
    step.clean_state()
    with torch.no_grad():
        theirs = [net.forward_step(frame) for frame in x.unbind(2)]
        ours = [step.forward_step(frame) for frame in x.unbind(2)]
    return [y if isinstance(y, Tensor) else None for y in theirs], [y[0] if isinstance(y, tuple) else y for y in ours]


def compiled(net: nn.Module, shape: tuple[int, ...]) -> cofx.StepModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cofx.compile(net, torch.randn(shape), time_dim=2)


def sequence(shape: tuple[int, ...], frames: int = 23) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((shape[0], shape[1], frames, *shape[3:]), generator=generator)


@pytest.mark.parametrize("name", NETS)
def test_same_frames_and_attributes(name: str) -> None:
    make, shape, kind = NETS[name]
    net = build(make)
    step = compiled(net, shape)
    assert step.equivalence == kind
    theirs, ours = streams(net, step, sequence(shape))
    assert [y is None for y in ours] == [y is None for y in theirs]
    for t, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a is not None:
            b = b.squeeze(2) if b.dim() == a.dim() + 1 else b
            a = a.squeeze(2) if a.dim() == b.dim() + 1 else a
            assert same(a, b), f"step {t}"
    assert (step.delay, step.stride) == (net.delay, net.stride[0])
    assert (step.receptive_field, step.padding) == (net.receptive_field, net.padding[0])


@pytest.mark.parametrize("name", ["cnn", "residuals", "inception", "encoder"])
def test_meets_the_contract(name: str) -> None:
    make, shape, kind = NETS[name]
    sample = Sample(name, lambda: build(make), shape, kind=kind, output_time_dim=2)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = compile_case(sample, build(make))
    for check in CHECKS:
        run_check(case, check)


# -- where the network itself is wrong, the offline forward decides ----------------------------------------------------


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_recurrent(kind: str) -> None:
    """The same frames at the same steps; they depend on all frames before, where co declares a receptive field of 3."""
    net = build(recurrent(kind))
    step = compiled(net, SERIES)
    assert (step.delay, step.stride, step.receptive_field) == (net.delay, net.stride[0], float("inf"))
    theirs, ours = streams(net, step, sequence(SERIES))
    assert [y is None for y in ours] == [y is None for y in theirs]
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None)


def test_transformer_of_two_layers() -> None:
    """co's own steps go wrong from the N-th output on; the step model is the encoder on the last N frames."""
    net = build(encoder(2))
    step = compiled(net, FEATURES)
    assert (step.delay, step.stride, step.receptive_field) == (net.delay, net.stride[0], net.receptive_field)
    x = sequence(FEATURES)
    theirs, ours = streams(net, step, x)
    assert [y is None for y in ours] == [y is None for y in theirs]
    for t in range(5, 23):
        with torch.no_grad():
            wanted = net(x[:, :, t - 5 : t + 1])
        assert same(ours[t].reshape(wanted.shape), wanted), f"step {t}"
        assert same(theirs[t].reshape(wanted.shape), wanted) == (t < 10), f"co at step {t}"


def test_dilated_pool() -> None:
    """co's ring is one frame too long for each of the dilation: other values, and a delay that is not the least."""
    net = build(lambda: co.MaxPool1d(3, stride=1, dilation=2))
    step = compiled(net, SERIES)
    assert step.delay == 4 and step.receptive_field == 5 and net.delay > 4
    _, ours = streams(net, step, x := sequence(SERIES))
    assert same(torch.stack([y for y in ours if y is not None], 2), net(x))


def test_strided_branches() -> None:
    """co delays the shorter branch by output frames, not input frames, and never gives anything."""
    short, long = co.Conv1d(3, 4, 3, stride=2, padding=1), co.Conv1d(3, 4, 5, stride=2, padding=2)
    net = build(lambda: co.BroadcastReduce(short, long))
    step = compiled(net, SERIES)
    theirs, ours = streams(net, step, x := sequence(SERIES))
    assert all(y is None for y in theirs)
    got = torch.stack([y for y in ours if y is not None] + list(step.flush().unbind(2)), 2)
    assert same(got, net(x))


def test_squeeze_and_excitation() -> None:
    """Offline the gate of a clip is applied to all of its frames; co's step applies it to the oldest of them."""
    gate = co.Sequential(co.AdaptiveAvgPool3d((1, 1, 1), kernel_size=5), co.Conv3d(4, 4, 1), nn.Sigmoid())
    net = build(lambda: co.Residual(gate, reduce="mul"))
    shape = (1, 4, 5, 3, 3)
    step = compiled(net, shape)
    x = sequence(shape)
    _, ours = streams(net, step, x)
    for t in range(4, 23):
        with torch.no_grad():
            wanted = net(x[:, :, t - 4 : t + 1])[:, :, -1]
        assert same(ours[t], wanted), f"step {t}"


def test_conditional() -> None:
    """The branch that is taken when compiling; a delay that belongs to it alone."""
    net = build(lambda: co.Conditional(lambda m, x: not m.training, co.Conv1d(3, 3, 3), co.Conv1d(3, 3, 5)))
    step = compiled(net, SERIES)
    assert (step.delay, net.delay) == (2, 4)
    _, ours = streams(net, step, x := sequence(SERIES))
    assert same(torch.stack([y for y in ours if y is not None], 2), net(x))


def test_delay_and_skip() -> None:
    """Offline a Delay does nothing, so nothing is delayed; a Skip drops frames."""
    x = sequence(SERIES)
    for make, delay in ((lambda: co.Delay(2), 0), (lambda: co.Skip(2), 2)):
        net = build(make)
        step = compiled(net, SERIES)
        assert step.delay == delay
        assert same(torch.stack([y for y in streams(net, step, x)[1] if y is not None], 2), net(x))


def test_compiling_leaves_the_network_alone() -> None:
    net = build(cnn)
    x = sequence(SERIES)
    before = [net.forward_step(frame) for frame in x.unbind(2)]
    net.clean_state()
    compiled(net, SERIES)
    after = [net.forward_step(frame) for frame in x.unbind(2)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True) if isinstance(a, Tensor))
