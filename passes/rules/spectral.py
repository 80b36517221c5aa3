"""Short-time Fourier transforms, and complex numbers as pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layout import TIME, Layout, dim
from ..registry import Call, Fact, Sample, Static, rule
from ..schedule import Taps
from ..stream_graph import Constant, Mirror, read

aten = torch.ops.aten


@rule(aten.stft.default, aten.stft.center)
def stft(call: Call) -> Fact:
    """Spectra of windows that begin every hop frames (PyTorch, torch.stft); centred ones are of the padded signal."""
    x = call.stream("self", clean=True)
    call.require(isinstance(call.fact(call.samples[0].get("window")), Static), "its window depends on time")
    size = call.arg("n_fft")
    hop = call.arg("hop_length") or size // 4
    centred = bool(call.arg("center", False))
    value = x
    if centred:
        mode = call.arg("pad_mode", "reflect")
        fill = Constant(0.0) if mode == "constant" else Mirror(mode, size // 2)
        value = call.view(x, -(size // 2), lambda frames: frames + 2 * (size // 2), fill)
    real = (dim(2),) if not call.node.meta["val"].is_complex() else ()
    layout = Layout((*x.layout.dims[:-1], dim(call.out_sizes[-2 - len(real)][0]), (TIME,), *real))

    def lower(b: Any, op: Any, windows: Any, span: range, _: Any) -> Any:
        return b.call(op, windows, **({"center": False} if centred else {}))

    return call.emit(
        layout,
        [read(value, Taps(hop, 1, 0, size - 1))],
        rate=x.rate / hop,
        length=lambda frames: (frames - size) // hop + 1,
        length_of=[value],
        lower=lower,
        nodes=call.stream_nodes,
    )


@rule(aten.view_as_real.default)
def view_as_real(call: Call) -> Fact:
    """A complex number as a last dimension of two."""
    x = call.stream("self")
    return call.framewise(x.layout.insert(-1, dim(2)))


@rule(aten.view_as_complex.default)
def view_as_complex(call: Call) -> Fact:
    """A last dimension of two as a complex number."""
    x = call.stream("self")
    last = len(x.layout) - 1
    call.require(x.layout.time != last, "real and imaginary parts lie along time")
    return call.framewise(x.layout.replace(last))


SAMPLES = [
    Sample("stft", lambda: _Spectrogram(False), (2, 40), 1, output_time_dim=2),
    Sample("stft_centred", lambda: _Spectrogram(True), (2, 40), 1, output_time_dim=2, lag=8),
    Sample("complex", lambda: _Complex(), (2, 9, 3, 2), 1),
]


class _Spectrogram(nn.Module):
    window: torch.Tensor

    def __init__(self, centred: bool) -> None:
        super().__init__()
        self.centred = centred
        self.register_buffer("window", torch.hann_window(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, samples) -> (batch, frequencies, frames)"""
        return torch.stft(x, 8, 4, window=self.window, center=self.centred, return_complex=True).abs()


class _Complex(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, channels, 2): squared as complex numbers, from memory that is not contiguous."""
        z = torch.view_as_complex(x.transpose(2, 3).contiguous().transpose(2, 3).contiguous())
        return torch.view_as_real(z * z)
