"""A step model that is given to `torch.compile`: no graph breaks, few graphs, the same numbers."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

import cofx
from cofx.runtime.errors import InputError


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class Halved(nn.Module):
    """Two phases, a residual and a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv1d(3, 4, 3, padding=1), nn.Conv1d(4, 4, 2, stride=2)
        self.memory = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        return self.memory(self.down(y.relu() + y).mT)[0].mT


class Both(nn.Module):
    """A history and a memory, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.memory = nn.Conv1d(3, 4, 3, padding=1), nn.GRU(4, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"same": x, "deep": self.memory(self.first(x).relu().mT)[0].mT}


class Pyramid(nn.Module):
    """Outputs at three rates, one that does not depend on time, and one that has frames before the first."""

    def __init__(self) -> None:
        super().__init__()
        self.downs = nn.ModuleList(nn.Conv1d(3, 3, 3, stride=2, padding=1) for _ in range(2))
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> tuple[Any, ...]:
        levels = [nn.functional.pad(x, (2, 0))]
        for down in self.downs:
            levels.append(down(levels[-1]).relu())
        return (*levels, self.scale * 2, nn.functional.interpolate(levels[-1], scale_factor=2))


class Attention(nn.Module):
    """Attention to all frames so far, which are kept, by learned positions, of which there are 48."""

    def __init__(self) -> None:
        super().__init__()
        self.place, self.mix = nn.Parameter(torch.randn(48, 4)), nn.Linear(4, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mT + self.place[: x.shape[2]]
        q, k, v = self.mix(x).unsqueeze(1).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1).mT


class Windowed(nn.Module):
    """A clip's last frame, looked back on: recomputed from a window."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.GRU(3, 4, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.memory(x.mT)[0][:, -1]


class OneBatch(nn.Module):
    """A batch size that is counted in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(3, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.mix(x[i : i + 1]) for i in range(x.shape[0])])


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "halved": (Halved, 3), "both": (Both, 3), "pyramid": (Pyramid, 3), "attention": (Attention, 4),
    "windowed": (Windowed, 3), "one batch": (OneBatch, 3), "identity": (nn.Identity, 3),
    "sixteen phases": (lambda: nn.Sequential(*(nn.Conv1d(3, 3, 3, stride=2, padding=1) for _ in range(4))), 3),
}  # fmt: skip


SOME = [n if n in ("both", "windowed", "sixteen phases") else pytest.param(n, marks=pytest.mark.slow) for n in NETS]


def same(got: Any, wanted: Any) -> None:
    leaves, spec = pytree.tree_flatten(got)
    others, other = pytree.tree_flatten(wanted)
    assert spec == other
    for a, b in zip(leaves, others, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


def twins(name: str) -> tuple[cofx.StepModule, cofx.StepModule, torch.Tensor]:
    """A net compiled twice, and a stream."""
    net, channels = NETS[name]
    x = torch.randn(2, channels, 40)
    step = cofx.compile(net().eval(), x[:, :, :16])
    return step, copy.deepcopy(step), x


def whole(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call whose graph must not break; the graphs run as they are."""
    return torch.compile(call, fullgraph=True, backend="eager")


@pytest.mark.parametrize("name", NETS)
def test_every_step_is_in_a_graph(name: str) -> None:
    """From the first frame on, in no more graphs than torch makes of a function."""
    step, plain, x = twins(name)
    fast = whole(step.forward_step)
    for frame in x.unbind(2):
        same(fast(frame.contiguous()), plain.forward_step(frame.contiguous()))
    assert counters["stats"]["unique_graphs"] <= 8 and not counters["graph_break"]
    same(step.get_state(), plain.get_state())


@pytest.mark.parametrize("name", SOME)
def test_every_chunk_and_the_end_are_in_a_graph(name: str) -> None:
    step, plain, x = twins(name)
    take, flush = whole(step.forward_steps), whole(step.flush)
    same(flush(), None)
    with torch._dynamo.config.patch(recompile_limit=16):
        for t in range(0, 36, 4):
            chunk = x[:, :, t : t + 4]
            same(take(chunk), plain.forward_steps(chunk))
        same(flush(), plain.flush())
        same(take(x[:, :, 36:], pad_end=True), plain.forward_steps(x[:, :, 36:], pad_end=True))
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", SOME)
def test_every_call_with_lanes_is_in_a_graph(name: str) -> None:
    """From the first on, lengths included."""
    step, plain, x = twins(name)
    period = math.lcm(*(int(o.stride) for o in step.outputs if o.stride))
    fast = whole(step.forward_steps)
    for t in range(0, 40 - period + 1, period):
        chunk = x[:, :, t : t + period]
        given: dict[str, Any] = {"ready": torch.rand(2) > 0.2, "start": torch.rand(2) > 0.9}
        if t > 16:
            given["length"] = torch.tensor([-1, t + period])
        (y, valid), (wanted, exist) = fast(chunk, **given), plain.forward_steps(chunk, **given)
        same(valid, exist)
        if all(v.all() for v in pytree.tree_leaves(exist)):
            same(y, wanted)
    assert counters["stats"]["unique_graphs"] <= 6 and not counters["graph_break"]
    same(step.get_state(), plain.get_state())


def test_a_loop_over_frames_is_one_graph() -> None:
    """Where a step has moved the stream, the next one within the same function goes on from there."""
    step, plain, x = twins("halved")

    def loop(x: torch.Tensor) -> list[torch.Tensor]:
        return [y for frame in x.unbind(2) if (y := step.forward_step(frame)) is not None]

    for part in (x[:, :, :12], x[:, :, 12:24]):
        same(whole(loop)(part), [y for f in part.unbind(2) if (y := plain.forward_step(f)) is not None])
    assert int(step.get_state()["count"]) == 24


@pytest.mark.parametrize("call", ["module", "method"])
def test_steps_compiled_by_inductor(call: str) -> None:
    """One graph for each phase and three in the first frames, and no more over 1000 steps."""
    x = torch.randn(2, 3, 1024)
    step = cofx.compile(Halved().eval(), x[:, :, :16])
    frames = [f.contiguous() for f in x.unbind(2)]
    step.call_mode = "forward_step"
    fast = torch.compile(step if call == "module" else step.forward_step, fullgraph=True)
    parts = [fast(f) for f in frames[:10]]
    assert counters["stats"]["unique_graphs"] <= 5
    with torch._dynamo.config.patch(error_on_recompile=True):
        parts += [fast(f) for f in frames[10:]]
    got = torch.stack([y for y in parts if y is not None], 2)
    wanted = step.model(x)
    torch.testing.assert_close(got, wanted[:, :, : got.shape[2]], rtol=1e-4, atol=1e-5)
    step.call_mode = None
    assert int(step.get_state()["count"]) == 1024
    torch.testing.assert_close(step.flush(), wanted[:, :, got.shape[2] :], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_lanes_compiled_by_inductor() -> None:
    """A graph to begin with and one for what follows, whatever the masks hold; masks that are no tensors run as they
    are."""
    x, n = torch.randn(3, 3, 1024), 1000
    step, plain = (cofx.compile(Both().eval(), x[:, :, :16]) for _ in range(2))
    plain.model.load_state_dict(step.model.state_dict())
    frames = [f.contiguous() for f in x.unbind(2)]
    fast = torch.compile(step.forward_step, fullgraph=True)
    masks = [dict(zip(("ready", "start"), m, strict=True)) for m in
             zip((torch.rand(n, 3) > 0.2).unbind(0), (torch.rand(n, 3) > 0.97).unbind(0), strict=True)]  # fmt: skip
    for t in range(n):
        wanted, exist = plain.forward_step(frames[t], **masks[t])
        with torch._dynamo.config.patch(error_on_recompile=t > 3):
            got, valid = fast(frames[t], **masks[t])
        for name in wanted:
            assert torch.equal(valid[name], exist[name])
            torch.testing.assert_close(got[name][valid[name]], wanted[name][exist[name]], rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= 3 and not counters["graph_break"]
    broken = torch.compile(step.forward_step)
    for given in ({"ready": [True] * 3}, {"length": torch.full((3,), 4)}):
        (got, valid), (wanted, _) = broken(frames[n], **given), plain.forward_step(frames[n], **given)
        torch.testing.assert_close(got["deep"], wanted["deep"], rtol=1e-4, atol=1e-5, equal_nan=True)
        assert valid["deep"].shape == (3,)


def test_what_raises_within_torch_compile_leaves_the_stream() -> None:
    """Bad frames, a table that runs out, and calls that lanes do not allow."""
    step, plain, x = twins("attention")
    fast = torch.compile(step.forward_steps, backend="eager")
    same(fast(x), plain.forward_steps(x))
    with pytest.raises(InputError, match="longer than a table"):
        fast(x)
    with pytest.raises(InputError, match="expected"):
        fast(x[:, :2])
    same(fast(x[:, :, :4]), plain.forward_steps(x[:, :, :4]))
    step.clean_state()
    fast(x[:, :, :4], ready=torch.ones(2, dtype=torch.bool))
    with pytest.raises(InputError, match="each by itself"):
        fast(x[:, :, :4])
    with pytest.raises(InputError, match="one bool for each"):
        fast(x[:, :, :4], ready=torch.ones(3, dtype=torch.bool))
    with pytest.raises(InputError, match="longer than a table"):
        for _ in range(12):
            fast(x[:, :, :4], ready=torch.ones(2, dtype=torch.bool))


def test_gradients_through_steps_within_torch_compile() -> None:
    """They are those of the steps as they are, after a graph break."""
    step, _, x = twins("halved")
    with torch.enable_grad():
        fast = torch.compile(step.forward_step, backend="eager")
        parts = [y for f in x.unbind(2) if (y := fast(f)) is not None]
        torch.stack(parts, 2).square().sum().backward()
        got = step.model.first.weight.grad
        step.model.zero_grad()
        step.model(x)[:, :, : len(parts)].square().sum().backward()
    torch.testing.assert_close(got, step.model.first.weight.grad, rtol=1e-4, atol=1e-5)
    step.clean_state()
    torch._dynamo.reset()
    with torch.enable_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match="without gradients"):
        torch.compile(step.forward_step, fullgraph=True, backend="eager")(x[:, :, 0])
