"""Recurrent nets in one direction, in every layout, with and without their hidden state as output."""

import torch
import torch.nn.functional as F
from torch import nn

from .sample import Net, Sample, parameter


def recurrent(name, build, shape=(2, 9, 3), **fields):
    fields = {"time_dim": 1, "unbounded": True} | fields
    return Sample(f"recurrent_{name}", build, shape, **fields)


class Output(nn.Module):
    """Only the sequence of a recurrent module."""

    def __init__(self, memory: nn.Module) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, x):
        return self.memory(x)[0]


class LearnedState(nn.Module):
    """Starts from parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(3, 4, num_layers=2, batch_first=True)
        self.hidden, self.cell = parameter(2, 1, 4), parameter(2, 1, 4)

    def forward(self, x):
        state = tuple(s.expand(-1, x.shape[0], -1).contiguous() for s in (self.hidden, self.cell))
        return self.memory(x, state)[0]


class Stacked(nn.Module):
    """GRUs with norms and residuals between, as acoustic models have."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.GRU(4, 4, batch_first=True) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))[0]
        return self.head(x)


class ConvThenMemory(nn.Module):
    """Padded, strided convolution, GRU, upsampled again beside the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.memory = nn.Conv1d(3, 4, 4, 2, 1), nn.GRU(4, 3, batch_first=True)

    def forward(self, x):  # (B, C, T)
        y = self.memory(F.relu(self.conv(x)).transpose(1, 2))[0].transpose(1, 2)
        return x + F.interpolate(y, scale_factor=2)


class PaddedMemory(nn.Module):
    """Frames of padding go through the memory before the first frame and after the last."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.GRU(3, 4, batch_first=True)

    def forward(self, x):
        return self.memory(F.pad(x, (0, 0, 3, 2), value=0.5))[0]


class CellLoop(nn.Module):
    """A Python loop over time with two LSTM cells."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTMCell(3, 4), nn.LSTMCell(4, 2)

    def forward(self, x):
        a = (x.new_zeros(x.size(0), 4), x.new_zeros(x.size(0), 4))
        b = (x.new_zeros(x.size(0), 2), x.new_zeros(x.size(0), 2))
        outputs = []
        for frame in x.unbind(1):
            a = self.first(frame, a)
            b = self.second(a[0], b)
            outputs.append(b[0])
        return torch.stack(outputs, dim=1)


class ConvMemory(nn.Module):
    """A convolutional GRU, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.candidate = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x):  # (B, C, T, H, W)
        hidden, outputs = torch.zeros_like(x[:, :, 0]), []
        for t in range(x.shape[2]):
            update, reset = self.gates(torch.cat([x[:, :, t], hidden], 1)).sigmoid().chunk(2, 1)
            candidate = self.candidate(torch.cat([x[:, :, t], reset * hidden], 1)).tanh()
            hidden = (1 - update) * hidden + update * candidate
            outputs.append(hidden)
        return torch.stack(outputs, 2)


class Biquad(nn.Module):
    """A filter by its recurrence: two frames of the input and of the output are handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.a = nn.Parameter(torch.tensor([0.2, 0.3, 0.1])), nn.Parameter(torch.tensor([-0.4, 0.2]))

    def forward(self, x):
        outputs = []
        x1 = x2 = y1 = y2 = torch.zeros_like(x[..., 0])
        for t in range(x.shape[-1]):
            y = self.b[0] * x[..., t] + self.b[1] * x1 + self.b[2] * x2 - self.a[0] * y1 - self.a[1] * y2
            outputs.append(y)
            x1, x2, y1, y2 = x[..., t], x1, y, y1
        return torch.stack(outputs, -1)


class AssignedFromTheThird(nn.Module):
    """Two frames are given, the others follow from the two before them, where they are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.4, -0.2]))

    def forward(self, x):
        y = torch.zeros_like(x)
        y[..., 0] = x[..., 0]
        y[..., 1] = x[..., 1] + self.a[0] * y[..., 0]
        for t in range(2, x.shape[-1]):
            y[..., t] = x[..., t] + self.a[0] * y[..., t - 1] + self.a[1] * y[..., t - 2]
        return y


class Counting(nn.Module):
    """Welford's running mean and variance: a number in the loop is that of the frame."""

    def forward(self, x):
        mean = torch.zeros_like(x[:, 0])
        squares, outputs = torch.zeros_like(mean), []
        for t in range(x.shape[1]):
            difference = x[:, t] - mean
            mean = mean + difference / (t + 1)
            squares = squares + difference * (x[:, t] - mean)
            outputs.append((x[:, t] - mean) / torch.sqrt(squares / (t + 1) + 1e-3))
        return torch.stack(outputs, 1)


class KnownGain(nn.Module):
    """A Kalman filter: its gain goes from frame to frame and depends on none."""

    def __init__(self) -> None:
        super().__init__()
        self.process, self.noise = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        state = x[:, 0]
        variance, outputs = torch.ones_like(state), [state]
        for t in range(1, x.size(1)):
            variance = variance + self.process.abs()
            gain = variance / (variance + self.noise.abs())
            state = state + gain * (x[:, t] - state)
            variance = (1 - gain) * variance
            outputs.append(state)
        return torch.stack(outputs, 1)


class AlongTheBatch(nn.Module):
    """What a loop gives is put together along the batch, and parted again."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        b, outputs = x.size(0), []
        hidden, cell = torch.zeros(b, 4), torch.zeros(b, 4)
        for frame in x.split(1, dim=1):
            hidden, cell = self.cell(frame.squeeze(1), (hidden, cell))
            outputs += [self.head(hidden)]
        return torch.cat(outputs, dim=0).view(-1, b, 2).permute(1, 0, 2)


class Parts(nn.Module):
    """A loop over parts of three frames."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 4)

    def forward(self, x):
        parts = [
            torch.tanh(self.mix(x[:, i : i + 3]) + x[:, i : i + 3].mean((1, 2), True)) for i in range(0, x.shape[1], 3)
        ]
        return torch.cat(parts, 1)


class Differences(nn.Module):
    """A loop that begins with the second frame, so that it gives one less."""

    def forward(self, x):
        return torch.stack([x[:, t] - 0.5 * x[:, t - 1] for t in range(1, x.shape[1])], 1)


class TwoCells(nn.Module):
    """A loop over unbound frames, two cells and a layer in its body."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper, self.head = nn.LSTMCell(3, 4), nn.GRUCell(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = c = g = x.new_zeros(x.shape[0], 4)
        out = []
        for frame in x.unbind(1):
            h, c = self.lower(frame, (h, c))
            g = self.upper(h, g)
            out.append(self.head(g))
        return torch.stack(out, 1)


class LoopAfterLoop(nn.Module):
    """One list of frames after the other, layer by layer, without a stack between."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList(nn.GRUCell(3, 3) for _ in range(2))

    def forward(self, x):
        frames = [x[:, t] for t in range(x.shape[1])]
        for cell in self.cells:
            h, out = torch.zeros(x.shape[0], 3), []
            for frame in frames:
                h = cell(frame, h)
                out.append(h)
            frames = out
        return torch.stack(frames, 1)


class StackedLoops(nn.Module):
    """A loop over what another loop has stacked, a convolution between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.conv = nn.GRUCell(3, 3), nn.RNNCell(3, 3), nn.Conv1d(3, 3, 3, padding=1)

    def run(self, cell, x):
        h, out = torch.zeros(x.shape[0], 3), []
        for t in range(x.shape[1]):
            h = cell(x[:, t], h)
            out.append(h)
        return torch.stack(out, 1)

    def forward(self, x):
        return self.run(self.b, self.conv(self.run(self.a, x).transpose(1, 2)).transpose(1, 2))


class MovingAverage(nn.Module):
    """Begins with the first frame itself."""

    def forward(self, x):
        out = [x[:, 0]]
        for t in range(1, x.shape[1]):
            out.append(0.75 * out[-1] + 0.25 * x[:, t])
        return torch.stack(out, 1)


class Assigned(nn.Module):
    """Results written into a tensor, frame by frame."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(3, 4)

    def forward(self, x):
        out, h = torch.zeros(x.shape[0], x.shape[1], 4), torch.zeros(x.shape[0], 4)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
            out[:, t] = h
        return out


class SlicedFrames(nn.Module):
    """Frames kept as clips of length one, after a convolution with look-ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv1d(3, 3, 3, padding=1), nn.Linear(6, 3)

    def forward(self, x):
        y = self.conv(x.transpose(1, 2)).transpose(1, 2)
        h, out = torch.zeros(x.shape[0], 1, 3), []
        for t in range(y.shape[1]):
            h = torch.tanh(self.mix(torch.cat([y[:, t : t + 1], h], -1)))
            out.append(h)
        return torch.cat(out, 1)


class LastOfLoop(nn.Module):
    """Only the state after the last frame is read."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.zeros(x.shape[0], 4)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


class ConvLstm(nn.Module):
    """A cell of convolutions over space."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x):
        h = c = x.new_zeros(x.shape[0], 2, *x.shape[3:])
        out = []
        for t in range(x.shape[2]):
            i, f, g, o = self.gates(torch.cat([x[:, :, t], h], 1)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            out.append(h)
        return torch.stack(out, 2)


class Delta(nn.Module):
    """A state-space scan written out: the state decays by what the frame says."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 4) for _ in range(3))

    def forward(self, x):
        decay, drive, read = torch.exp(-F.softplus(self.a(x))), self.b(x), self.c(x)
        state, out = torch.zeros(x.shape[0], 4), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + drive[:, t]
            out.append((state * read[:, t]).sum(-1))
        return torch.stack(out, 1)


class OfEachJoint(nn.Module):
    """A memory for each joint of a skeleton: batch and joints share a dimension there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(3, 4, batch_first=True), nn.GRU(4, 2)

    def forward(self, x):  # (B, C, T, V)
        joints = x.permute(0, 3, 2, 1)
        rows = self.first(joints.flatten(0, 1))[0]
        return self.second(rows.transpose(0, 1))[0].transpose(0, 1).unflatten(0, joints.shape[:2]).permute(0, 3, 2, 1)


class WrittenBeside(nn.Module):
    """A layer's frames, made contiguous, beside a tensor that is written to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x):
        y = torch.zeros(*x.shape[:2], 4)
        y[..., :2] = x[..., 1:]
        found = self.memory(x)[0].contiguous().view(-1, 4) * 2
        return found.view(y.shape) + y


class FilterInPlace(nn.Module):
    """torchaudio's ``lfilter``: windows of what was put out so far, read and written in place."""

    def forward(self, x):
        driven = F.conv1d(F.pad(x, (2, 0)), torch.tensor([[[0.3, 0.2, 0.5]]]))
        back, out = torch.tensor([[0.2], [-0.5], [1.0]]), torch.zeros(x.shape[0], 1, x.shape[-1] + 2)
        for t, new in enumerate(driven.permute(2, 0, 1)):
            new -= (out[:, :, t : t + 3] @ back)[..., 0]
            out[:, :, t + 2] = new
        return out[:, :, 2:]


SAMPLES = [
    recurrent(
        "unbatched_lstm", lambda: Output(nn.LSTM(3, 4)), (8, 3), time_dim=0, batch_dim=None, options={"batch_dim": None}
    ),
    recurrent("rnn_tanh", lambda: Output(nn.RNN(3, 4, 2, batch_first=True))),
    recurrent("rnn_relu", lambda: Output(nn.RNN(3, 4, nonlinearity="relu", bias=False, batch_first=True))),
    recurrent("gru", lambda: Output(nn.GRU(3, 4, batch_first=True))),
    recurrent("filter_in_place", FilterInPlace, (2, 1, 9), time_dim=2),
    recurrent("written_beside", WrittenBeside),
    recurrent("of_each_joint", OfEachJoint, (2, 3, 8, 5), time_dim=2),
    recurrent("gru_stacked_time_first", lambda: Output(nn.GRU(3, 4, 3)), (9, 2, 3), time_dim=0, batch_dim=1),
    recurrent("lstm", lambda: Output(nn.LSTM(3, 4, batch_first=True))),
    recurrent("lstm_stacked", lambda: Output(nn.LSTM(3, 4, 3, batch_first=True, dropout=0.2))),
    recurrent("lstm_projected", lambda: Output(nn.LSTM(3, 5, 2, batch_first=True, proj_size=2))),
    recurrent("lstm_time_first", lambda: Output(nn.LSTM(3, 4)), (8, 2, 3), time_dim=0, batch_dim=1),
    recurrent(
        "channels_first",
        lambda: Net(lambda m, x: m.memory(x.transpose(1, 2))[0].mT, memory=nn.GRU(3, 4, batch_first=True)),
        (2, 3, 9),
        time_dim=2,
    ),
    recurrent("learned_state", LearnedState),
    recurrent("stacked_norms", Stacked, (2, 9, 4)),
    recurrent("conv_and_upsample", ConvThenMemory, (1, 3, 12), time_dim=2, multiple=2),
    recurrent(
        "beside_conv",
        lambda: Net(
            lambda m, x: m.conv(x) + m.memory(x.mT)[0].mT,
            conv=nn.Conv1d(3, 4, 5, padding=2),
            memory=nn.LSTM(3, 4, batch_first=True),
        ),
        (2, 3, 9),
        time_dim=2,
    ),
    recurrent("padded", PaddedMemory),
    recurrent("trimmed", lambda: Net(lambda m, x: m.memory(x)[0][:, 2:-1], memory=nn.GRU(3, 4, batch_first=True))),
    recurrent("cell_loop", CellLoop, (2, 6, 3)),
    recurrent("conv_memory_loop", ConvMemory, (1, 2, 5, 3, 3), time_dim=2),
    recurrent(
        "gru_with_hidden",
        lambda: nn.GRU(3, 4, 2, batch_first=True),
        kind=("stream", "prefix"),
        output_time_dim=(1, None),
    ),
    recurrent(
        "lstm_with_state",
        lambda: nn.LSTM(3, 4, batch_first=True),
        kind=("stream", "prefix", "prefix"),
        output_time_dim=(1, None, None),
    ),
    recurrent(
        "last_hidden",
        lambda: Net(
            lambda m, x: m.head(m.memory(x)[1][-1]), memory=nn.GRU(3, 4, 2, batch_first=True), head=nn.Linear(4, 2)
        ),
        kind="prefix",
        output_time_dim=None,
    ),
    recurrent(
        "last_cell",
        lambda: Net(lambda m, x: torch.cat(m.memory(x)[1], -1)[0], memory=nn.LSTM(3, 4)),
        (8, 2, 3),
        time_dim=0,
        batch_dim=1,
        kind="prefix",
        output_time_dim=None,
    ),
    recurrent(
        "last_output",
        lambda: Net(
            lambda m, x: m.memory(m.conv(F.pad(x, (2, 0))).mT)[0][:, -1],
            conv=nn.Conv1d(3, 4, 3),
            memory=nn.GRU(4, 3, batch_first=True),
        ),
        (2, 3, 8),
        time_dim=2,
        kind="prefix",
        output_time_dim=None,
    ),
    recurrent("two_cells_in_a_loop", TwoCells),
    recurrent("loop_after_loop", LoopAfterLoop),
    recurrent("loops_with_conv_between", StackedLoops),
    recurrent("moving_average_loop", MovingAverage),
    recurrent("assigned_in_a_loop", Assigned),
    recurrent("sliced_frames_in_a_loop", SlicedFrames),
    recurrent("conv_lstm_loop", ConvLstm, (1, 2, 6, 4, 4), time_dim=2),
    recurrent("scan_loop", Delta),
    recurrent("biquad_loop", Biquad, (2, 3, 8), time_dim=2),
    recurrent("loop_from_the_third_frame_on", AssignedFromTheThird, (2, 3, 8), time_dim=2),
    recurrent("loop_that_counts", Counting, (2, 7, 3)),
    recurrent("loop_with_a_gain_known_beforehand", KnownGain, (2, 7, 3)),
    recurrent("loop_put_together_along_the_batch", AlongTheBatch, (2, 6, 3)),
    recurrent("loop_over_parts", Parts, (2, 12, 3), multiple=3, unbounded=False, lag=2),
    recurrent("loop_that_looks_one_back", Differences, (2, 7, 3)),
    recurrent("last_of_a_loop", LastOfLoop, kind="prefix", output_time_dim=None),
]
