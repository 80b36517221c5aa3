"""Python loops over frames, rolled up: their body runs once for each frame and hands on what it carries."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from ..layout import TIME, Layout, dim, from_sizes
from ..loops import Loop
from ..registry import Call, Fact, Sample, Static, Tail, rule_of_kind
from ..schedule import Taps
from ..stream_graph import Carry, Op, Value, Window, read

aten = torch.ops.aten


def _lower(
    target: Loop,
    statics: list[fx.Node],
    before: int,
    b: Any,
    op: Op,
    windows: list[Window],
    span: range,
    state: list[fx.Node],
) -> Any:
    """Some frames of a loop, one after the other; each window begins `before` frames earlier."""
    collected: list[list[fx.Node]] = [[] for _ in target.results]
    given = [b.static(n) for n in statics]

    def frames_at(i: int) -> list[fx.Node]:
        parts = zip(windows, target.dims, target.widths, strict=True)
        frames = [b.narrow(w.node, d, i * wide, wide) for w, d, wide in parts]
        return [
            b.aten("squeeze.dim", f, d) if s else f
            for f, d, s in zip(frames, target.dims, target.squeezed, strict=True)
        ]

    for i, j in enumerate(span, before):
        index = b.index_range(op.outputs[0], range(j, j + 1)) if target.ramps or (target.starts and b.masked) else None
        ramps = [_ramp(b, index, *r) for r in zip(target.ramps, target.ramp_dtypes(), strict=True)]
        after = b.inline(target.body, [*frames_at(i), *ramps, *state, *given])
        for k, start in enumerate(target.starts if b.masked else ()):
            seen = [f for back in range(k, -1, -1) for f in frames_at(i - back)]
            out = b.inline(start, [*seen, *given])
            here = b.aten("eq.Scalar", index, k)
            first = list(enumerate(out[: len(state)])) if k == len(target.starts) - 1 else []
            for n, value in [*first, *((len(state) + n, v) for n, v in target.of_start(k, out))]:
                after[n] = b.aten("where.self", here, value, after[n])
        state = b.hold(op, j, after[: len(state)], state)
        for part, result, node in zip(collected, target.results, after[len(state) :], strict=True):
            part.append(node if result.how == "cat" else b.aten("unsqueeze.default", node, result.dim))
    joined = [b.cat(part, r.dim) for part, r in zip(collected, target.results, strict=True)]
    return (tuple(joined), state) if op.carries else tuple(joined)


@rule_of_kind(Loop)
def loop(call: Call) -> Fact:
    """One stream for each result; of a last one the last frame."""
    target = call.node.target
    assert isinstance(target, Loop)
    args: list[fx.Node] = list(call.node.args)  # type: ignore[arg-type]
    sources = args[: len(target.dims)]
    begin = [] if target.starts else args[len(sources) : len(sources) + len(target.carried)]
    statics = args[len(sources) + len(begin) :]
    streams = [call.facts[n] for n in sources]
    call.require(all(isinstance(f, Value) and f.layout.clean for f in streams), "a loop over frames of the clip")
    streams = [call.group(f, w) if w > 1 else f for f, w in zip(streams, target.widths, strict=True)]
    same = {(f.rate, f.lengths) for f in streams}
    call.require(len(same) == 1, "a loop over streams of different lengths")
    call.require(all(isinstance(call.fact(n), Static) for n in (*begin, *statics)), "a loop that begins with frames")
    carries = [
        Carry(f"carried_{i}", _layout(call, meta), meta["val"].dtype, begin[i] if begin else 0.0)
        for i, meta in enumerate(target.carried)
    ]
    before = max(len(target.starts) - 1, 0)  # frames that the first ones look back at

    layouts = []
    results: list[fx.Node] = list(target.body.output_node().args[0])[len(carries) :]  # type: ignore[arg-type]
    for result, node in zip(target.results, results, strict=True):
        frame = _layout(call, node.meta)
        if result.how == "cat":
            layouts.append(frame.replace(result.dim, dim(TIME, *frame[result.dim])))
        else:
            layouts.append(frame.insert(result.dim, (TIME,)))
    values = call.emit_several(
        layouts,
        [read(f, Taps(1, 1, -before, 0), fill=0.0) if before else read(f) for f in streams],
        length_of=[streams[0]],
        lower=functools.partial(_lower, target, statics, before),
        carries=carries,
        indexed=bool(target.starts or target.ramps),
        sequential=bool(carries),
        masked_until=max(len(target.starts), 1 if carries else 0),
        nodes=sources,
        dtypes=[v.dtype for v in call.node.meta["val"]],
    )
    op = values[0].producer
    assert isinstance(op, Op)
    op.unrolled = True
    reason = "the last state of a loop over frames is read"
    return tuple(
        Tail(reason, of=v, first=1, count=1, squeeze=True) if r.how == "last" else _without_first(call, v, r.skipped)
        for v, r in zip(values, target.results, strict=True)
    )


def _without_first(call: Call, value: Value, frames: int) -> Value:
    return call.view(value, frames, lambda n: n - frames) if frames else value


def _layout(call: Call, meta: Mapping[str, Any]) -> Layout:
    """The layout of a value of the body, which is alike at any length."""
    sizes = [*meta["sizes"], *meta["sizes"][:1] * (len(call.graph.batch) - len(meta["sizes"]))]
    return from_sizes(list(zip(*sizes, strict=True)), call.graph.batch)


def _ramp(b: Any, index: Any, ramp: tuple[float, float], dtype: torch.dtype) -> Any:
    """A number that grows with the frame's index."""
    at, step = ramp
    number = b.aten("add.Scalar", b.aten("mul.Scalar", b.cast(index, torch.float64), step), at)
    return b.aten("_to_copy.default", number, dtype=dtype)


class _Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, 3): a cell, frame by frame."""
        h, out = x.new_zeros(x.shape[0], 4), []
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            out.append(h)
        return torch.stack(out, 1)


class _Average(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time): an exponential average that begins with the first frame."""
        out = [x[:, :, 0]]
        for t in range(1, x.shape[2]):
            out.append(0.75 * out[-1] + 0.25 * x[:, :, t])
        return torch.stack(out, 2)


class _EachFrame(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time): nothing is handed on from frame to frame."""
        return torch.stack([torch.tanh(self.linear(x[:, :, t])) for t in range(x.shape[2])], 2)


SAMPLES = [
    Sample("loop_without_memory", _EachFrame, (2, 3, 9)),
    Sample("cell_loop", _Cell, (2, 9, 3), 1, unbounded=True),
    Sample("average_loop", _Average, (2, 3, 9), unbounded=True),
]
