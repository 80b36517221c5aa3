"""Python loops over frames, rolled up: their body runs once for each frame and hands on what it carries."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from ..layout import TIME, Layout, from_sizes
from ..loops import Loop
from ..registry import Call, Fact, Sample, Static, Tail, rule_of_kind
from ..stream_graph import Carry, Op, Value, Window, read

aten = torch.ops.aten


@rule_of_kind(Loop)
def loop(call: Call) -> Fact:
    """One stream for each result; of a last one the last frame."""
    target = call.node.target
    assert isinstance(target, Loop)
    args: list[fx.Node] = list(call.node.args)  # type: ignore[arg-type]
    sources = args[: len(target.dims)]
    begin = [] if target.start else args[len(sources) : len(sources) + len(target.carried)]
    statics = args[len(sources) + len(begin) :]
    streams = [call.facts[n] for n in sources]
    call.require(all(isinstance(f, Value) and f.layout.clean for f in streams), "a loop over frames of the clip")
    same = {(f.rate, f.lengths) for f in streams}
    call.require(len(same) == 1, "a loop over streams of different lengths")
    call.require(all(isinstance(call.fact(n), Static) for n in (*begin, *statics)), "a loop that begins with frames")
    carries = []
    for i, meta in enumerate(target.carried):
        sizes = [
            *meta["sizes"],
            *meta["sizes"][:1] * (len(call.graph.batch) - len(meta["sizes"])),
        ]  # at any length alike
        layout = from_sizes(list(zip(*sizes, strict=True)), call.graph.batch)
        carries.append(Carry(f"carried_{i}", layout, meta["val"].dtype, begin[i] if begin else 0.0))

    def lower(b: Any, op: Op, windows: list[Window], span: range, state: list[fx.Node]) -> Any:
        collected: list[list[fx.Node]] = [[] for _ in target.results]
        given = [b.static(n) for n in statics]
        for i, j in enumerate(span):
            frames = [b.narrow(w.node, d, i, 1) for w, d in zip(windows, target.dims, strict=True)]
            frames = [
                b.aten("squeeze.dim", f, d) if s else f
                for f, d, s in zip(frames, target.dims, target.squeezed, strict=True)
            ]
            after = b.inline(target.body, [*frames, *state, *given])
            if target.start is not None and b.masked:
                index = b.index_range(op.outputs[0], range(j, j + 1))
                begun = b.aten("gt.Scalar", index, 0)
                first = b.inline(target.start, [*frames, *given])
                after = [b.aten("where.self", begun, a, f) for a, f in zip(after, first, strict=True)]
            state = b.hold(op, j, after[: len(state)], state)
            for part, result, node in zip(collected, target.results, after[len(state) :], strict=True):
                part.append(node if result.how == "cat" else b.aten("unsqueeze.default", node, result.dim))
        joined = [b.cat(part, r.dim) for part, r in zip(collected, target.results, strict=True)]
        return (tuple(joined), state) if op.carries else tuple(joined)

    layouts = []
    for i, result in enumerate(target.results):
        sizes = list(zip(*(s[i] for s in call.sizes), strict=True))
        if result.how == "last":
            layouts.append(Layout(((TIME,), *from_sizes(sizes, call.graph.batch))))
        else:
            at = result.dim
            frame = from_sizes([s for d, s in enumerate(sizes) if d != at], call.graph.batch)
            layouts.append(frame.insert(at, (TIME,)))
    values = call.emit_several(
        layouts,
        [read(f) for f in streams],
        length_of=[streams[0]],
        lower=lower,
        carries=carries,
        indexed=target.start is not None,
        sequential=bool(carries),
        masked_until=1 if carries or target.start is not None else 0,
        nodes=sources,
        dtypes=[v.dtype for v in call.node.meta["val"]],
    )
    op = values[0].producer
    assert isinstance(op, Op)
    op.unrolled = True
    reason = "the last state of a loop over frames is read"
    return tuple(
        Tail(reason, of=v, first=1, count=1, squeeze=True) if r.how == "last" else v
        for v, r in zip(values, target.results, strict=True)
    )


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
