"""Constructs that kept a published model from streaming, each in a few lines of plain PyTorch: now they stream."""

import pytest
import torch
from torch import Tensor, nn

import cofx
from contract import CHECKS, check_contract


class PackedMask(nn.Module):
    """A causal mask as transformers makes it: where positions do not follow each other a new sequence begins."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.qkv, self.window = nn.Linear(4, 12), window

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, 4)"""
        batch, time, _ = x.shape
        positions = torch.arange(time)[None] + 0
        packed = positions.expand(batch, -1)
        sequence = (torch.diff(packed, prepend=packed[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        rows, at = torch.arange(batch)[:, None, None, None], torch.arange(time) + 0
        queries, keys = at[None, None, :, None], at[None, None, None, :]
        mask = torch.ones((), dtype=torch.bool) & (sequence[rows, queries] == sequence[rows, keys])
        mask = mask & (packed[rows, keys] <= packed[rows, queries])
        if self.window is not None:
            mask = mask & (packed[rows, keys] > packed[rows, queries] - self.window)
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        y: Tensor = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0]
        return y


class OffsetMask(nn.Module):
    """A causal mask from positions that begin at an offset for each stream of the batch, which is zero (moshi)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, 4)"""
        offset, at = torch.zeros(x.shape[0], dtype=torch.long), torch.arange(x.shape[1])
        keys = at.expand(x.shape[0], -1)[:, None]
        ahead = offset.view(-1, 1, 1) + at.view(-1, 1) - keys
        mask = (keys >= 0) & (ahead >= 0) & (ahead < 5)
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        y: Tensor = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])[:, 0]
        return y


class FirstFrameKept(nn.Module):
    """Padding by hand with what was kept of the frames before: at first that is the first frame (moshi)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, time)"""
        first = torch.ones(x.shape[0], dtype=torch.bool).view(-1, 1, 1)
        kept = torch.where(first, x[..., :1], torch.zeros(x.shape[0], 3, 3))
        y: Tensor = self.conv(torch.cat([kept, x], -1))
        return y


class CountedMask(nn.Module):
    """A causal mask and one of the tokens that count, which are all, looked up by lanes and positions (BioGpt); and a
    product with a bias for each head (RecurrentGemma)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.gate, self.bias = (
            nn.Linear(4, 12),
            nn.Parameter(torch.randn(2, 2, 2)),
            nn.Parameter(torch.randn(2, 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, 4)"""
        batch, time, _ = x.shape
        counted = torch.ones(batch, time).to(device=x.device, dtype=torch.bool)
        lanes, keys = torch.arange(batch)[:, None, None, None], torch.arange(time)[None, None, None]
        mask = (keys <= torch.arange(time)[:, None]) & counted[lanes, keys]
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        y: Tensor = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, 0]
        heads = y.reshape(batch * time, 2, 2).transpose(0, 1)
        return torch.baddbmm(self.bias[:, None], heads, self.gate).transpose(0, 1).reshape(batch, time, 4)


class ChunkMask(nn.Module):
    """A query reads the chunk that it lies in and so many before it (streaming Conformers)."""

    def __init__(self, chunk: int, before: int, causal: bool = False) -> None:
        super().__init__()
        self.attention, self.chunk, self.before, self.causal = (
            nn.MultiheadAttention(4, 2, batch_first=True), chunk, before, causal,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, 4)"""
        at = torch.arange(x.shape[1])
        chunk = at // self.chunk
        mask = (chunk[None] > chunk[:, None]) | (chunk[None] < chunk[:, None] - self.before)
        if self.causal:
            mask = mask | (at[None] > at[:, None])
        y: Tensor = self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        return y


class EveryOther(nn.Module):
    """Frames at indices that are positions: a slice."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, time)"""
        at = torch.arange(0, x.shape[2] // 2) * 2 + 1
        return x[:, :, at] + x.index_select(2, at)


class Decayed(nn.Module):
    """A loop that prepares its next iteration: of the last one, and of the one before, nobody reads all (RWKV)."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, 3)"""
        out, total = torch.zeros_like(x), torch.zeros_like(x[:, 0])
        most = torch.zeros_like(x[:, 0]) - 1e38
        for t in range(x.shape[1]):
            now = x[:, t]
            largest = torch.maximum(most, now)
            out[:, t] = torch.exp(most - largest) * total + torch.exp(now - largest)
            after = torch.maximum(most - self.decay, now)
            total = torch.exp(most - self.decay - after) * total + torch.exp(now - after)
            most = after
        return out


class FilterBank(nn.Module):
    """Filters applied by Fourier transforms (torchaudio.functional.fftconvolve): for each channel, and one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.one = nn.Parameter(torch.randn(1, 3, 5)), nn.Parameter(torch.randn(4))

    def filtered(self, x: Tensor, h: Tensor) -> Tensor:
        """All of the convolution, ``x.shape[-1] + h.shape[-1] - 1`` frames."""
        n = x.shape[-1] + h.shape[-1] - 1
        y: Tensor = torch.fft.irfft(torch.fft.rfft(x, n=n) * torch.fft.rfft(h, n=n), n=n)
        return y

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, time)"""
        return self.filtered(x, self.each)[..., 2:-2] + self.filtered(x, self.one[None, None])[..., : x.shape[-1]]


class Asserted(nn.Module):
    """Conditions on the data that do nothing but raise: tracing takes them for granted (demucs)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, time)"""
        padded = nn.functional.pad(x, (2, 2))
        assert (padded[..., 2:-2] == x).all(), f"{x.shape} was padded wrongly"
        if torch.isnan(x).any() or not x.abs().max() < 1e9:
            raise ValueError("not a number")
        y: Tensor = self.conv(padded)
        return y


class Alibi(nn.Module):
    """A bias that grows with the distance, given for each key alone, repeated for the batch and added by the product of
    queries and keys (Bloom)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.slopes = nn.Linear(4, 12), nn.Buffer(torch.tensor([0.5, 0.25]))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, 4)"""
        batch, time, _ = x.shape
        at = torch.ones(1, time, dtype=torch.long).cumsum(-1) - 1
        bias = (self.slopes[None, :, None] * at[:, None]).repeat(batch, 1, 1).reshape(2 * batch, 1, time)
        q, k, v = self.qkv(x).view(batch, time, 2, 6).transpose(1, 2).reshape(2 * batch, time, 6).chunk(3, -1)
        scores = bias.baddbmm(q, k.transpose(1, 2), beta=1.0, alpha=0.7)
        scores = scores.masked_fill(torch.ones(time, time, dtype=torch.bool).triu(1), -torch.inf)
        return (scores.softmax(-1) @ v).view(batch, 2, time, 2).transpose(1, 2).reshape(batch, time, 4)


class Packed(nn.Module):
    """Ops that do nothing: one tensor joined, no padding, nothing repeated (einops.pack, local-attention)."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, time)"""
        y = torch.cat([x.reshape(-1, x.shape[-1])], 0).view(x.shape)
        z: Tensor = nn.functional.pad(y, (0, 0)).repeat(1, 1, 1)
        return z + x


class PositionTable(nn.Module):
    """A table at positions that were counted, all streams of the batch in one dimension (Speech2Text); and what is made
    of positions, of the same type as a tensor of another length (rotary embeddings)."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Buffer(torch.rand(3))
        self.table = nn.Buffer(torch.randn(1000, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, 3)"""
        there = x[..., 0].isnan().logical_not().int()
        at = (torch.cumsum(there, 1).type_as(there) * there).long()
        turned = torch.einsum("i,j->ij", torch.arange(x.shape[1]).type_as(self.rates), self.rates).sin()
        return x * turned + self.table.index_select(0, at.view(-1)).view(x.shape[0], x.shape[1], -1)


class NearestCode(nn.Module):
    """The nearest of several codes for each frame, batch and time in one dimension (Mimi, Encodec)."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Buffer(torch.randn(7, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, 3)"""
        far = torch.cdist(x.reshape(1, -1, 3), self.codes[None], p=2)[0]
        return self.codes[far.argmin(-1)].view(x.shape) + torch.cdist(x, self.codes)[..., :3]


class FramesTakenTwice(nn.Module):
    """A loop that reads each frame of its gate twice (QRNN)."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 4, time)"""
        z, f = x.chunk(2, 1)
        h, states = torch.zeros_like(z[..., 0]), []
        for t in range(x.shape[-1]):
            h = f[..., t].sigmoid() * h + (1 - f[..., t].sigmoid()) * z[..., t]
            states.append(h)
        return torch.stack(states, -1)


class AlongBands(nn.Module):
    """A recurrent layer that runs along bands, both ways, with every frame in its batch (BandSplitRNN, dual-path)."""

    def __init__(self) -> None:
        super().__init__()
        self.bands, self.joined = nn.LSTM(2, 3, batch_first=True, bidirectional=True), nn.GRU(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, bands, time, 2)"""
        batch, bands, time, width = x.shape
        y, _ = self.bands(x.transpose(1, 2).reshape(batch * time, bands, width))
        y, last = self.joined(y.transpose(0, 1))
        return (y + last).transpose(0, 1).reshape(batch, time, bands, width).transpose(1, 2)


class MadeInForward(nn.Module):
    """Activations that are modules made anew in each call, in a loop over frames (Mamba)."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.rand(3))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, 3)"""
        frames, total = [], torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            total = self.decay * total + x[:, t]
            frames.append(total)
        y: Tensor = nn.SiLU()(torch.stack(frames, 1))
        return y


class Waves(nn.Module):
    """A table of sines made in forward; at 12 frames its length is also twice and three times a smaller one."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, 4)"""
        at = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1])
        table = torch.zeros(x.shape[1], 4)
        table[:, 0::2], table[:, 1::2] = at.sin(), at.cos()
        return x + table


class Emphasis(nn.Module):
    """The difference to the sample before, the first sample as it is, as speech recognisers begin."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time)"""
        return torch.cat([x[:, :1], x[:, 1:] - 0.97 * x[:, :-1]], 1)


class StateSpace(nn.Module):
    """A state space as a convolution with a kernel as long as the clip, applied as a product of spectra (S4D)."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.out = nn.Parameter(torch.rand(3) * 0.1), nn.Parameter(torch.randn(3, 2, 2))
        self.rate, self.wave = nn.Parameter(torch.rand(3, 2)), nn.Parameter(torch.rand(3, 2) * 3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, time)"""
        length = x.shape[-1]
        poles = (-self.rate.exp() + 1j * self.wave) * self.step[:, None]
        powers = torch.exp(poles[..., None] * torch.arange(length))
        kernel = 2 * torch.einsum("hn, hnl -> hl", torch.view_as_complex(self.out), powers).real
        spectrum = torch.fft.rfft(x, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        y: Tensor = torch.fft.irfft(spectrum, n=2 * length)[..., :length]
        return y + x


class SubBands(nn.Module):
    """Each band with its neighbours, taken by patches that are as long as the clip, in an LSTM (FullSubNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, bands, time)"""
        batch, _, bands, time = x.shape
        around = nn.functional.pad(x, [0, 0, 1, 1], mode="reflect")
        patches = nn.functional.unfold(around, (3, time)).view(batch, 3, time, bands).permute(0, 3, 1, 2)
        y, _ = self.memory(patches.reshape(batch * bands, 3, time).transpose(1, 2))
        return y.reshape(batch, bands, time, 4)[..., 0]


CASES = {
    "mask_of_all_that_counts": (CountedMask, (2, 9, 4), 1, {"unbounded": True}),
    "frames_taken_twice": (FramesTakenTwice, (2, 4, 9), 2, {"unbounded": True}),
    "recurrent_along_bands": (AlongBands, (2, 3, 9, 2), 2, {}),
    "chunk_mask": (lambda: ChunkMask(4, 2), (2, 9, 4), 1, {"lag": 3}),
    "chunk_mask_of_the_past": (lambda: ChunkMask(100, 0, causal=True), (2, 9, 4), 1, {"length": 240}),
    "assertions_on_data": (Asserted, (2, 3, 9), 2, {}),
    "bias_in_a_product": (Alibi, (2, 9, 4), 1, {"unbounded": True}),
    "ops_that_do_nothing": (Packed, (2, 3, 9), 2, {}),
    "table_at_counted_positions": (PositionTable, (2, 9, 3), 1, {"unbounded": True}),
    "nearest_code": (NearestCode, (2, 9, 3), 1, {}),
    "modules_made_in_forward": (MadeInForward, (2, 9, 3), 1, {"unbounded": True}),
    "packed_mask": (PackedMask, (2, 9, 4), 1, {"unbounded": True}),
    "packed_mask_in_a_window": (lambda: PackedMask(4), (2, 9, 4), 1, {}),
    "mask_from_an_offset": (OffsetMask, (2, 9, 4), 1, {}),
    "first_frame_kept": (FirstFrameKept, (2, 3, 9), 2, {}),
    "loop_that_looks_ahead": (Decayed, (2, 9, 3), 1, {"unbounded": True}),
    # (a Fourier transform's rounding touches every frame, so that what an output depends on cannot be measured)
    "filters_by_fourier_transform": (FilterBank, (2, 3, 12), 2, {"checks": [*set(CHECKS) - {"receptive_field"}]}),
    "waves_at_twelve_frames": (Waves, (2, 12, 4), 1, {}),
    "emphasis": (Emphasis, (2, 9), 1, {}),
    "state_space_by_fourier_transform": (
        StateSpace,
        (2, 3, 9),
        2,
        {"unbounded": True, "checks": [*set(CHECKS) - {"receptive_field"}]},
    ),
    "sub_bands": (SubBands, (2, 1, 5, 9), 3, {"unbounded": True, "output_time_dim": 2}),
    "every_other_frame": (EveryOther, (2, 3, 10), 2, {"multiple": 2, "length": 24}),
}


SLOW = ("chunk_mask_of_the_past", "loop_that_looks_ahead")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES])
def test_streams(name: str) -> None:
    torch.manual_seed(0)
    build, shape, time_dim, fields = CASES[name]
    model, x = build().eval(), torch.randn(shape)
    step = cofx.compile(model, x, time_dim=time_dim)
    assert step.equivalence == "stream"
    check_contract(model, x, step=step, name=name, time_dim=time_dim, exact=False, **fields)


class OneLength(nn.Module):
    """Filters by Fourier transforms in a model that takes clips of one length alone (braindecode's filter banks)."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.head = nn.Parameter(torch.randn(5)), nn.Linear(3 * 12, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 12)"""
        n = x.shape[-1] + 4
        spectrum = torch.fft.rfft(x, n=n) * torch.fft.rfft(self.filter[None, None], n=n)
        y: Tensor = self.head(torch.fft.irfft(spectrum, n=n)[..., 2:-2].flatten(1))
        return y


def test_filters_of_a_model_that_takes_one_length_stream_up_to_what_needs_the_clip() -> None:
    torch.manual_seed(0)
    model, x = OneLength().eval(), torch.randn(2, 3, 12)
    step = cofx.compile(model, x)
    assert step.equivalence == "first-clip"
    assert not any("Fourier" in line for line in step.report().recomputed)
    assert step.verify(x).exact


class Steps(nn.Module):
    """Frames from the end, as many as there are whole groups of four: a length that goes in steps (LSTNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, 3)"""
        last: Tensor = self.gru(x[:, -(x.shape[1] // 4 * 4) :])[1][0]
        return last


def test_a_length_that_goes_in_steps_is_no_prefix() -> None:
    torch.manual_seed(0)
    model, x = Steps().eval(), torch.randn(2, 16, 3)
    step = cofx.compile(model, x, time_dim=1)
    assert step.equivalence == "clip"
    assert step.verify(torch.randn(2, 19, 3)).exact


class KeepsItsBias(nn.Module):
    """A bias by distance that is kept from the longest clip so far (x-transformers' ALiBi)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.slope = nn.Linear(4, 12), nn.Buffer(torch.tensor(0.3))
        self.register_buffer("bias", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, 4)"""
        n = x.shape[1]
        if self.bias is None or self.bias.shape[0] < n:
            at = torch.arange(n)
            self.register_buffer("bias", -(at[None] - at[:, None]).abs() * self.slope, persistent=False)
        assert self.bias is not None
        mask = torch.ones(n, n, dtype=torch.bool).triu(1)
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = (q @ k.transpose(1, 2) + self.bias[-n:, -n:]).masked_fill(mask, -torch.inf)
        y: Tensor = scores.softmax(-1) @ v
        return y


def test_what_a_model_keeps_from_earlier_calls_is_no_branch() -> None:
    torch.manual_seed(0)
    model, x = KeepsItsBias().eval(), torch.randn(2, 9, 4)
    with torch.no_grad():
        model(x)
    kept = model.bias
    step = cofx.compile(model, x, time_dim=1)
    assert step.equivalence == "stream"
    assert model.bias is kept
    assert step.verify(torch.randn(2, 40, 4)).exact
    assert step.verify(x).exact


class FilterMadeInForward(nn.Module):
    """A filter from `torch.tensor` in forward, and as many frames as came in (Asteroid's LSTMTasNet).

    `torch.tensor` detaches its constant in place. That writes no number: it is no reason to trace the graph once more,
    which took its length for a constant.
    """

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv1d(1, 4, 8, 4), nn.ConvTranspose1d(4, 1, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, time)"""
        y: Tensor = self.up(self.down(x) * torch.tensor([0.5]))
        return nn.functional.pad(y, [0, x.shape[-1] - y.shape[-1]])


def test_a_constant_made_in_forward_does_not_fix_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def again(*_: object) -> None:
        raise AssertionError("the graph was traced twice")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", again)
    x = torch.randn(1, 1, 40)
    step = cofx.compile(FilterMadeInForward().eval(), x)
    assert step.equivalence == "stream"
    assert step.verify(torch.randn(1, 1, 80)).exact


class SqueezeExcitation(nn.Module):
    """A gate from the mean over the clip, as X3D's blocks have."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv1d(4, 2, 1), nn.Conv1d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 4, time)"""
        y: Tensor = x * self.up(self.down(x.mean(2, keepdim=True)).relu()).sigmoid()
        return y


def test_what_follows_a_clips_mean_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "vmap", None)
    torch.manual_seed(0)
    x = torch.randn(2, 4, 12)
    model = SqueezeExcitation().eval()
    step = cofx.compile(model, x, nonlocal_ops="continual")
    assert step.verify(torch.randn(2, 4, 30)).exact
    torch.testing.assert_close(step.reference_module(x)[..., -1], model(x)[..., -1])


class FramesAsTheyAre(nn.Module):
    """A loop over frames that does nothing to them before they are stacked again (PyxLSTM with one layer)."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, 4)"""
        return torch.stack([x[:, t] for t in range(x.shape[1])], 1).tanh()


def test_a_loop_that_collects_frames_as_they_are_streams() -> None:
    step = cofx.compile(FramesAsTheyAre(), torch.randn(2, 6, 4), time_dim=1)
    assert step.equivalence == "stream"
    assert step.verify(torch.randn(2, 19, 4)).exact


class ProjectedFrames(nn.Module):
    """Keys projected from all frames onto a few by an einsum with a parameter as long as the clip (Linformer)."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.randn(9, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, 4)"""
        few = torch.einsum("bnd,nk->bkd", x, self.projection[: x.shape[1]])
        return torch.einsum("bnd,bkd->bnk", x, few).softmax(-1)


def test_a_projection_of_all_frames_is_a_clip() -> None:
    x = torch.randn(2, 9, 4)
    step = cofx.compile(ProjectedFrames().eval(), x, time_dim=1)
    assert step.equivalence == "clip"
    assert step.verify(torch.randn(2, 14, 4)).exact
