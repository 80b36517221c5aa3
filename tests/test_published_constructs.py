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


CASES = {
    "packed_mask": (PackedMask, (2, 9, 4), 1, {"unbounded": True}),
    "packed_mask_in_a_window": (lambda: PackedMask(4), (2, 9, 4), 1, {}),
    "mask_from_an_offset": (OffsetMask, (2, 9, 4), 1, {}),
    "first_frame_kept": (FirstFrameKept, (2, 3, 9), 2, {}),
    "loop_that_looks_ahead": (Decayed, (2, 9, 3), 1, {"unbounded": True}),
    # (a Fourier transform's rounding touches every frame, so that what an output depends on cannot be measured)
    "filters_by_fourier_transform": (FilterBank, (2, 3, 12), 2, {"checks": [*set(CHECKS) - {"receptive_field"}]}),
    "every_other_frame": (EveryOther, (2, 3, 10), 2, {"multiple": 2, "length": 24}),
}


@pytest.mark.parametrize("name", CASES)
def test_streams(name: str) -> None:
    torch.manual_seed(0)
    build, shape, time_dim, fields = CASES[name]
    model, x = build().eval(), torch.randn(shape)
    step = cofx.compile(model, x, time_dim=time_dim)
    assert step.equivalence == "stream"
    check_contract(model, x, step=step, name=name, time_dim=time_dim, exact=False, **fields)
