"""Recurrent layers: their hidden state goes from frame to frame.

The final hidden state, where the model reads it, is the last frame of a stream of hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from ..layout import TIME, Layout, dim
from ..registry import Call, Fact, Sample, Static, Tail, rule
from ..stream_graph import Carry, Value, Window, read

aten = torch.ops.aten


@rule(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input, draws_in_training=True)
def recurrent(call: Call) -> Fact:
    """RNN, LSTM, GRU; stacked, projected, time first or second."""
    args = call.samples[0]
    if (beside := _beside_frames(call)) is not None:
        return beside
    call.require(not args["bidirectional"], "a bidirectional layer reads the clip from its end")
    x = call.stream("input", clean=True)
    lstm = call.node.target is aten.lstm.input
    initial = list(args["hx"]) if lstm else [args["hx"]]
    call.require(
        all(isinstance(call.fact(n), Static) for n in (*initial, *args["params"])), "its initial state depends on time"
    )
    time = 1 if args["batch_first"] else 0
    if len(x.layout) == 2:
        time = 0
    call.require(x.layout.time == time, "time is the batch of a recurrent layer")
    layout = x.layout.replace(-1, dim(call.node.meta["val"][0].shape[-1]))
    hidden_layouts = [call.static_layout(n) for n in initial]
    carries = [
        Carry(name, lay, n.meta["val"].dtype, n)
        for name, lay, n in zip(("hidden", "cell"), hidden_layouts, initial, strict=False)
    ]
    needs_hidden = any(u.args[1] != 0 for u in call.node.users)

    def run(b: Any, op: Any, window: Window, state: list[fx.Node]) -> tuple[fx.Node, list[fx.Node]]:
        got = b.call(op, [window], hx=state if lstm else state[0])
        return b.getitem(got, 0), [b.getitem(got, 1 + i) for i in range(len(state))]

    def lower(b: Any, op: Any, windows: Any, span: range, carries: list[fx.Node]) -> tuple[Any, list[fx.Node]]:
        window, state = windows[0], carries
        if not needs_hidden and not b.holding:
            y, state = run(b, op, window, state)
            return (y, *[None] * len(state)), state
        outputs: list[fx.Node] = []
        hidden: list[list[fx.Node]] = []
        for i, j in enumerate(span):
            y, after = run(b, op, Window(b.narrow(window.node, time, i, 1), j, j + 1), state)
            state = b.hold(op, j, after, state)
            outputs.append(y)
            hidden.append([b.aten("unsqueeze.default", s, 0) for s in state])
        stacked = [b.cat([h[i] for h in hidden], 0) if needs_hidden else None for i in range(len(state))]
        return (b.cat(outputs, time), *stacked), state

    values = call.emit_several(
        [layout, *(Layout(((TIME,), *lay.dims)) for lay in hidden_layouts)],
        [read(x)],
        length_of=[x],
        lower=lower,
        carries=carries,
        sequential=True,
        nodes=[args["input"]],
        dtypes=[call.dtype(0)] * (1 + len(initial)),
    )
    reason = "the final state of a recurrent layer is read"
    return (values[0], *(Tail(reason, of=v, first=1, count=1, squeeze=True) for v in values[1:]))


def _beside_frames(call: Call) -> Fact | None:
    """The layer run along something else than time, for each frame by itself: time lies in its batch."""
    args = call.samples[0]
    x, batch = call.stream("input"), 0 if args["batch_first"] else 1
    if len(x.layout) != 3 or x.layout.time != batch:
        return None
    initial = list(args["hx"]) if call.node.target is aten.lstm.input else [args["hx"]]
    call.require(all(isinstance(call.fact(n), Static) for n in args["params"]), "its weights depend on time")
    states = [call.facts[n] for n in initial]
    folded = [isinstance(s, Value) and s.layout[1] == x.layout[batch] for s in states]
    call.require(all(folded), "its initial state does not lie along time as its input does")
    outputs = x.layout.replace(-1, dim(call.node.meta["val"][0].shape[-1]))
    return call.framewise([outputs, *(s.layout for s in states)])


@rule(aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default)
def cell(call: Call) -> Fact:
    """One step of a recurrent layer for each row of a batch: time may lie there, as something else is gone along."""
    args = call.samples[0]
    hidden = list(args["hx"]) if call.node.target is aten.lstm_cell.default else [args["hx"]]
    given = [call.facts[n] for n in (args["input"], *hidden)]
    params = [args[n] for n in ("w_ih", "w_hh", "b_ih", "b_hh")]
    call.require(all(isinstance(call.fact(n), Static) for n in params), "its weights depend on time")
    rows = {v.layout[0] if isinstance(v, Value) and v.layout.time == 0 else None for v in given}
    call.require(len(rows) == 1 and None not in rows, "its state does not lie along time as its input does")
    layouts = [v.layout for v in given[1:]]
    return call.framewise(layouts if len(layouts) > 1 else layouts[0])


class _Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, 2, batch_first=True, proj_size=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, channels)."""
        y: torch.Tensor = self.rnn(x)[0]
        return y


class _Joints(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(3, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, joints, 3): cells go along the joints of each frame."""
        frames = x.flatten(0, 1)
        h = c = g = frames[:, 0].new_zeros(frames.shape[0], 4)
        for joint in frames.unbind(1):
            h, c = self.lstm(joint, (h, c))
            g = self.gru(h, g)
        y: torch.Tensor = self.rnn(g, h[:, :2])
        return y.reshape(x.shape[0], x.shape[1], 2)


SAMPLES = [
    Sample("lstm", _Lstm, (2, 9, 3), 1, unbounded=True),
    Sample("cells_beside_frames", _Joints, (2, 9, 3, 3), 1),
]
