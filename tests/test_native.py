"""Steps in mid-stream as generated C: the numbers of the eager steps, whatever the net."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

import cofx
from cofx.passes.codegen.c import NativeError, compiler
from cofx.passes.codegen.c.compiler import compile_shared, native_target
from cofx.passes.codegen.c.step import step_source
from cofx.passes.rules import FAMILIES
from cofx.runtime.errors import InputError
from cofx.runtime.native import NativeResidence
from cofx.runtime.program import Program
from contract import compile_case
from models import Sample, spread
from models.sample import Net
from test_orders import Maker

pytestmark = pytest.mark.filterwarnings("ignore")
NO_FORM = {  # what the step program holds that is not written in C
    "entries_overwritten": "index_put", "written": "topk", "overlap_add": "index_put", "warped": "grid_sampler",
    "cumulative_logsumexp": "logcumsumexp", "fold_bilinear": "trilinear",
    "top_values": "topk", "window_median_frame": "sort", "window_fourier_power": "fft", "stft": "fft",
    "stft_centred": "fft", "fourier": "fft", "istft": "complex", "istft_uncentred": "complex", "complex": "complex",
}  # fmt: skip
RULES = [
    Sample(s.name, s.build, s.shape, s.time_dim, length=s.length, multiple=s.multiple)
    for family in FAMILIES
    for s in family.SAMPLES
]


def compared(sample: Sample) -> None:
    """Three periods in mid-stream, step by step, and what is kept after them."""
    plain = compile_case(sample).step
    if plain.compiled.mid_stream._eager_only():
        return
    if sample.name in NO_FORM or sample.dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(NativeError, match=NO_FORM.get(sample.name, "float16")):
            compile_case(sample, backend="c")
        return
    step = compile_case(sample, backend="c").step
    steps = sample.whole(int(plain.compiled.steady_from) + 3 * plain.compiled.plan.schedule.period + 2)
    clips = sample.inputs(steps)
    near = {"rtol": 1e-10, "atol": 1e-10} if sample.dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for i in range(steps):
        frames = sample.frames(clips, i)
        got, want = tree_leaves(step.forward_step(*frames)), tree_leaves(plain.forward_step(*frames))
        assert [y is None for y in got] == [y is None for y in want]
        for a, b in zip(got, want, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, **near)
    assert set(step.compiled.mid_stream._chosen.values()) == {"c"}
    got, want = step.get_state(), plain.get_state()
    for name in want:
        torch.testing.assert_close(got[name], want[name], **near)


@pytest.mark.parametrize("sample", spread(24))
@torch.no_grad()
def test_collection(sample):
    compared(sample)


@pytest.mark.parametrize(
    "sample", [pytest.param(s, id=s.name, marks=[pytest.mark.slow] if i % 18 else []) for i, s in enumerate(RULES)]
)
@torch.no_grad()
def test_samples_of_rules(sample):
    compared(sample)


def run(graph, tensors, arguments):
    """The results of a graph in C."""
    outputs = graph.output_node().args[0]
    graph.output_node().args = ((outputs, ()),)
    source = step_source([Program(None, None, graph, tensors, [], ())], arguments, len(arguments), [], native_target())
    home = NativeResidence(
        compile_shared(source.text), source.results, source.rings, source.constants, source.scratch, len(arguments)
    )
    return home.step(0, arguments, home.load([]))[0]


def check_random_program(data):
    torch.manual_seed(0)
    maker = Maker(data.draw)
    for i in range(2):
        maker.argument(i)
    for _ in range(data.draw(st.integers(1, 12))):
        maker.step()
    results = tuple(n for n in maker.values if n.op == "call_function")[-3:]
    if not results:
        return
    maker.graph.output(results)
    arguments = [maker.values[n] for n in maker.graph.nodes if n.op == "placeholder"]
    for got, node in zip(run(maker.graph, maker.tensors, arguments), results, strict=True):
        torch.testing.assert_close(got, maker.values[node], rtol=1e-4, atol=1e-4)


@settings(max_examples=12, deadline=None)
@given(st.data())
@torch.no_grad()
def test_random_programs(data):
    check_random_program(data)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.data())
@torch.no_grad()
def test_many_random_programs(data):
    check_random_program(data)


PRODUCTS = [(1, 64, 192), (1, 12, 7), (3, 130, 33), (13, 70, 5), (7, 1, 9), (2, 600, 16)]  # rows, columns, depth


class Products(nn.Module):
    """Rows of all kinds times constants, and times what is computed."""

    def __init__(self):
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(k, n) for _, n, k in PRODUCTS)

    def forward(self, x):
        taken = [x[..., : m * k].unflatten(-1, (m, k)) for m, _, k in PRODUCTS]
        fixed = [layer(y).flatten(-2) for layer, y in zip(self.linear, taken, strict=True)]
        made = [(y @ y.transpose(-1, -2)).flatten(-2) for y in taken]
        more = [(y.transpose(-1, -2) @ y.softmax(-1)).flatten(-2)[..., :500] for y in taken]
        return torch.cat([*fixed, *made, *more], -1)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)])
@torch.no_grad()
def test_products_of_all_sizes(dtype):
    torch.manual_seed(0)
    model = Products().to(dtype).eval()
    clip = torch.randn(2, 3, 200, dtype=dtype)
    step = cofx.compile(model, clip, time_dim=1, backend="c")
    near = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    for x, want in zip(clip.unbind(1), model(clip).unbind(1), strict=True):
        torch.testing.assert_close(step.forward_step(x), want, **near)


class Block(nn.Module):
    """Pictures in time: what is padded, taps that are summed up, and what follows a convolution entry by entry."""

    def __init__(self, channels, inner, kernel, stride, groups):
        super().__init__()
        pad = [k // 2 for k in kernel]
        self.grow = nn.Conv3d(channels, inner, 1)
        self.taps = nn.Conv3d(inner, inner, kernel, (1, stride, stride), (0, *pad[1:]), groups=groups or inner)
        self.norm = nn.BatchNorm3d(inner)
        self.shrink = nn.Conv3d(inner, channels, 1)
        self.beside = nn.Conv3d(channels, channels, 1, (1, stride, stride))
        self.late = kernel[0] - 1

    def forward(self, x):
        y = self.norm(self.taps(self.grow(x).relu()))
        return (self.shrink(y * y.sigmoid()) + self.beside(x)[:, :, self.late :]).relu()


PICTURES = {  # channels of the pictures, blocks, height and width
    "depthwise": (5, [(5, 54, (3, 3, 3), 2, 0), (5, 19, (3, 5, 3), 1, 0)], (11, 9)),
    "grouped": (8, [(8, 12, (2, 3, 3), 1, 4), (8, 6, (3, 1, 5), 2, 3)], (6, 13)),
    "dense": (3, [(3, 40, (3, 3, 3), 2, 1), (3, 24, (1, 3, 3), 1, 1)], (9, 16)),
    "long sums": (16, [(16, 96, (9, 3, 3), 1, 1)], (14, 15)),  # in parts, whose rows are taken in blocks
    "many weights": (70, [(70, 320, (2, 1, 1), 1, 1)], (4, 5)),
}


@pytest.mark.parametrize("name", PICTURES)
@torch.no_grad()
def test_pictures(name):
    torch.manual_seed(0)
    channels, blocks, size = PICTURES[name]
    model = nn.Sequential(*(Block(*b) for b in blocks)).eval()
    clip = torch.randn(2, channels, 16, *size)
    step = cofx.compile(model, clip, backend="c")
    due = [y for x in clip.unbind(2) if (y := step.forward_step(x)) is not None]
    assert set(step.compiled.mid_stream._chosen.values()) == {"c"}
    torch.testing.assert_close(torch.stack(due, 2), model(clip), rtol=1e-4, atol=1e-5)
    other = cofx.compile(model, clip)  # goes on from there, eagerly
    other.set_state(step.get_state())
    torch.testing.assert_close(
        other.forward_step(clip[:, :, 0]), step.forward_step(clip[:, :, 0]), rtol=1e-4, atol=1e-5
    )


def test_narrow_vectors(monkeypatch):
    """What a processor runs that has none but the vectors of its oldest kin."""
    monkeypatch.setattr(compiler, "NATIVE", ((),))
    compiler._native.cache_clear()
    try:
        test_pictures("grouped")
    finally:
        compiler._native.cache_clear()


@torch.no_grad()
def test_zeros_around_pictures_stay_zeros_in_all_phases():
    torch.manual_seed(0)
    first, then = nn.Conv3d(3, 9, (2, 3, 3), (2, 1, 1), (0, 1, 1)), nn.Conv3d(9, 4, (3, 3, 5), (3, 2, 1), (0, 1, 2))
    model = nn.Sequential(first, nn.ReLU(), then, nn.AvgPool3d((1, 3, 3), 1, (0, 1, 1))).eval()
    clip = torch.randn(1, 3, 66, 20, 17)
    step = cofx.compile(model, clip, backend="c")
    due = [y for x in clip.unbind(2) if (y := step.forward_step(x)) is not None]
    torch.testing.assert_close(torch.stack(due, 2), model(clip), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_functions_are_right_and_let_nan_and_infinities_through():
    functions = (torch.exp, torch.tanh, torch.sigmoid, torch.erf, torch.relu, torch.sign, torch.round)
    model = Net(lambda m, x: torch.stack([f(x) for f in functions], -1)).eval()
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 88.7, 89.0, -87.4, -103.0, -104.5, 1e-30, -1e-30])
    x = torch.cat([torch.linspace(-12, 12, 40001), torch.linspace(-0.7, 0.7, 4001), special])[None]
    step = cofx.compile(model, x[:, None].expand(1, 3, -1), time_dim=1, backend="c")
    for _ in range(2):
        got = step.forward_step(x)
    want = model(x.double())
    finite = want.isfinite() & (want.abs() > 1e-37)
    assert got.isnan().equal(want.isnan())
    torch.testing.assert_close(got[finite], want[finite].float(), rtol=4e-7, atol=1e-7)
    torch.testing.assert_close(got, model(x), rtol=1e-5, atol=1e-6, equal_nan=True)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3, dilation=4)).eval()


@torch.no_grad()
def test_step_models_of_one_net_share_code_and_nothing_else():
    model, clips = small(), torch.randn(2, 1, 3, 40)
    steps = [cofx.compile(model, clips[0], backend="c") for _ in clips]
    got = [[s.forward_step(x[:, :, i]) for s, x in zip(steps, clips, strict=True)] for i in range(40)]
    for j, clip in enumerate(clips):
        due = [pair[j] for pair in got if pair[j] is not None]
        torch.testing.assert_close(torch.stack(due, 2), model(clip))
    homes = [next(iter(s.compiled.mid_stream._homes.values())) for s in steps]
    assert len({home.library._name for home in homes}) == 1


@torch.no_grad()
def test_frames_that_lie_in_another_way():
    model, clip = small(), torch.randn(4, 3, 40)
    step = cofx.compile(model, clip, backend="c")
    due = [y for x in clip.unbind(2) if (y := step.forward_step(x.t().contiguous().t())) is not None]
    torch.testing.assert_close(torch.stack(due, 2), model(clip))


@torch.no_grad()
def test_an_index_out_of_range_leaves_the_stream():
    model = nn.Sequential(nn.Embedding(5, 4), nn.LSTM(4, 3, batch_first=True)).eval()
    clip = torch.randint(5, (2, 12))
    step = cofx.compile(Net(lambda m, x: m.net(x)[0], net=model), clip, time_dim=1, backend="c")
    got = []
    for i, x in enumerate(clip.unbind(1)):
        if i > 5:
            with pytest.raises(IndexError):
                step.forward_step(torch.tensor([1, 5 - 11 * (i % 2)]))
        got.append(step.forward_step(x))
    torch.testing.assert_close(torch.stack(got, 1), model(clip)[0])


@torch.no_grad()
def test_small_integers_wrap_and_divisors_are_known():
    model = Net(lambda m, x: torch.where((x + x) * 3 > 100, ~(x > 3), x % 7 == 1)).eval()
    clip = torch.randint(256, (1, 9, 300), dtype=torch.uint8)
    step = cofx.compile(model, clip, time_dim=1, backend="c")
    assert all(torch.equal(step.forward_step(x), y) for x, y in zip(clip.unbind(1), model(clip).unbind(1), strict=True))
    with pytest.raises(NativeError, match="integers by what is computed"):
        cofx.compile(Net(lambda m, x: x % (x - 1)).eval(), clip.long() + 2, time_dim=1, backend="c")


@torch.no_grad()
def test_the_compiler_runs_once(tmp_path, monkeypatch):
    monkeypatch.setenv("COFX_CACHE", str(tmp_path))
    cofx.compile(small(), torch.randn(1, 3, 40), backend="c")
    assert sorted(p.suffix for p in (tmp_path / "c").iterdir()) == [".c", ".so"]
    monkeypatch.setattr(compiler, "_compile", lambda *args: pytest.fail("compiled again"))
    cofx.compile(small(), torch.randn(1, 3, 40), backend="c")


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(InputError, match="needs a C compiler"):
        cofx.compile(small(), torch.randn(1, 3, 40), backend="c")
    assert "c" not in cofx.backends.installed()
