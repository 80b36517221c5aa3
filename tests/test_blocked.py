"""Frames kept in ONNX Runtime's blocks of channels: the same numbers, and no reordering where none is needed."""

import random

import onnx_ir as ir
import pytest
import torch
from torch import nn

import cofx
from cofx.passes.codegen import blocked, session

pytest.importorskip("onnxruntime")
CHANNELS = (6, 12, 16, 24, 32, 40)
ENTRYWISE = (
    torch.relu, torch.sigmoid, torch.tanh, nn.functional.silu, nn.functional.hardswish, nn.functional.relu6,
    nn.functional.gelu, torch.abs, lambda x: x + 1, lambda x: x * 0.5, lambda x: -x,
)  # fmt: skip


class Drawn(nn.Module):
    """A random net of pictures over time."""

    def __init__(self, seed):
        super().__init__()
        draw = self.draw = random.Random(seed)
        self.steps = []
        self.parts = nn.ModuleList()
        widths = [draw.choice((3, *CHANNELS))]
        self.channels = widths[0]
        for _ in range(draw.randint(3, 8)):
            kind = draw.choice(("conv", "depthwise", "down", "entry", "scale", "gate", "norm", "sum", "cat", "later"))
            at = draw.randrange(len(widths)) if kind in ("sum", "cat", "gate") else len(widths) - 1
            c, width = widths[at], draw.choice(CHANNELS)
            time, side = draw.choice((1, 2, 3)), draw.choice((1, 3))
            shape = {
                "kernel_size": (time, side, side),
                "padding": (draw.choice((0, time - 1)) // 2, side // 2, side // 2),
            }
            if kind == "conv":
                self.parts.append(nn.Conv3d(c, width, **shape))
            elif kind == "depthwise":
                self.parts.append(nn.Conv3d(c, c, **shape, groups=c))
            elif kind == "later":  # frames a few steps old
                self.parts.append(nn.Conv3d(c, c, (time, 1, 1), bias=False))
            elif kind == "down":
                self.parts.append(nn.AvgPool3d((draw.choice((1, 2)), 1, 1)))
            elif kind in ("scale", "gate"):
                self.parts.append(nn.Conv3d(c, widths[-1], 1))
            elif kind == "norm":
                self.parts.append(nn.BatchNorm3d(c))
            elif kind == "sum":
                self.parts.append(nn.Conv3d(c, widths[-1], (1, 1, 1)))
            else:
                self.parts.append(nn.Identity())
            self.steps.append((kind, at, draw.choice(ENTRYWISE)))
            widths.append({"conv": width, "cat": c + widths[-1]}.get(kind, widths[-1]))

    def forward(self, x):
        made = [x]
        for (kind, at, entrywise), part in zip(self.steps, self.parts, strict=True):
            last, other = made[-1], made[at]
            if kind in ("sum", "cat", "gate"):  # as much of both as they have in common
                time = min(last.shape[2], other.shape[2])
                last, other = last[:, :, :time], other[:, :, :time]
            if kind == "entry":
                y = entrywise(last)
            elif kind == "scale":
                y = last * torch.sigmoid(part(last.mean((3, 4), keepdim=True)))
            elif kind == "gate":
                y = last * torch.sigmoid(part(other.mean((3, 4), keepdim=True)))
            elif kind == "sum":
                y = torch.relu(last + part(other))
            elif kind == "cat":
                y = torch.cat([last, other], 1)
            else:
                y = part(last)
            made.append(y)
        return made[-1], made[len(made) // 2].mean((3, 4))


def compare(seed):
    torch.manual_seed(seed)
    model, batch = Drawn(seed).eval(), 1 + seed % 2
    for p in model.buffers():
        if p.dtype.is_floating_point:
            p.uniform_(0.5, 1.5)
    clip = torch.randn(batch, model.channels, 24, 8, 8)
    eager, step = (cofx.compile(model, clip, backend=b) for b in ("eager", "onnxruntime"))
    with torch.no_grad():
        for i, frame in enumerate(clip.unbind(2)):
            if i == 20:  # what is kept in blocks comes out as it went in
                state = step.get_state()
                step.clean_state()
                step.set_state(state)
            want, got = eager.forward_step(frame), step.forward_step(frame)
            assert (want is None) == (got is None)
            for a, b in zip(want or (), got or (), strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * (1 + a.abs().max().item()))
    return step


def blocks(step):
    return [room.block for home in step.compiled.mid_stream._homes.values() for room, _ in home.buffers]


@pytest.mark.parametrize("seed", range(3))
def test_random_nets(seed):
    compare(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 200))
def test_more_random_nets(seed):
    compare(seed)


class Excited(nn.Module):
    """Residual blocks as in X3D."""

    def __init__(self, width, inner):
        super().__init__()
        self.stem = nn.Conv3d(3, width, (1, 3, 3), padding=(0, 1, 1))
        self.wide, self.narrow = nn.Conv3d(width, inner, 1), nn.Conv3d(inner, width, 1)
        self.deep = nn.Conv3d(inner, inner, 3, padding=1, groups=inner)
        self.scale = nn.Conv3d(inner, inner, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.deep(torch.relu(self.wide(x)))
        y = nn.functional.silu(y * torch.sigmoid(self.scale(y.mean((3, 4), keepdim=True))))
        return torch.relu(x + self.narrow(y)).mean((3, 4))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("width", "inner"), [(32, 64), (24, 54)])
def test_nothing_is_reordered(monkeypatch, batch, width, inner):
    rewritten = []
    real = session._open
    monkeypatch.setattr(
        session, "_open", lambda m, optimize=True: (optimize or rewritten.append(m), real(m, optimize))[1]
    )
    torch.manual_seed(0)
    model, clip = Excited(width, inner).eval(), torch.randn(batch, 3, 9, 12, 12)
    step = cofx.compile(model, clip, backend="onnxruntime")
    with torch.no_grad():
        torch.testing.assert_close(step.forward(clip), model(clip), rtol=1e-4, atol=1e-5)
        got = [y for y in map(step.forward_step, clip.unbind(2)) if y is not None]
        torch.testing.assert_close(torch.stack(got, 2), model(clip)[:, :, : len(got)], rtol=1e-4, atol=1e-5)
    assert min(blocks(step)) > 1
    (graph,) = [m.graph for m in rewritten]
    ops = [n.op_type for n in graph.node]
    assert "ReorderInput" not in ops and "ReorderOutput" not in ops
    assert not {"Add", "Relu"} & set(ops)  # convolutions do that


def test_state_that_gains_nothing_stays_plain():
    model = nn.Sequential(nn.Conv3d(3, 4, (3, 1, 1)), nn.Conv3d(4, 4, 1)).eval()  # blocks would be mostly empty
    clip = torch.randn(1, 3, 9, 12, 12)
    step = cofx.compile(model, clip, backend="onnxruntime")
    with torch.no_grad():
        got = [y for y in map(step.forward_step, clip.unbind(2)) if y is not None]
        torch.testing.assert_close(torch.stack(got, 2), model(clip), rtol=1e-4, atol=1e-5)
    assert set(blocks(step)) == {1}


def test_graphs_with_branches_are_left_alone():
    """A branch reads values from outside, which are no inputs of its node."""
    convolution = ir.node("Conv", [], domain=blocked.DOMAIN)
    branch = ir.Node("", "If", [], [ir.AttrGraph("then_branch", ir.Graph([], [], nodes=[]))])
    models = [ir.Model(ir.Graph([], [], nodes=nodes), ir_version=10) for nodes in ([convolution], [branch])]
    assert blocked.finds_blocks(models[:1])
    assert not blocked.finds_blocks(models)
