"""Short-time Fourier transforms, and complex numbers as pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..layout import TIME, Layout, dim
from ..registry import Call, Fact, Sample, Static, overloads, rule
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


@rule(aten.istft.default)
def istft(call: Call) -> Fact:
    """Windows added where they overlap, over the sum of the squares of the window function (torch.istft).

    A sample waits for the last window that holds it. Near the ends fewer windows overlap, so what is divided by is a
    function of the sample's index.
    """
    x = call.stream("self", clean=True)
    call.require(isinstance(call.fact(call.samples[0].get("window")), Static), "its window depends on time")
    call.require(len(x.layout) == 3 and x.layout.time == 2, "time is not the last of three dimensions")
    call.require(not call.arg("return_complex", False), "its result is complex")
    size = call.arg("n_fft")
    hop, wide = call.arg("hop_length") or size // 4, call.arg("win_length") or size
    cut = size // 2 if call.arg("center", True) else 0
    onesided = call.out_sizes and x.layout[1] == dim(size // 2 + 1)
    norm = "ortho" if call.arg("normalized", False) else "backward"
    whole = tuple((n - 1) * hop + size - 2 * cut for n in x.lengths)
    less = {w - s for w, s in zip(whole, call.out_sizes[-1], strict=True)}
    call.require(len(less) == 1 and min(less) >= 0, "its length follows the clip's in a way that is not understood")
    given, short, taps = call.samples[0].get("window"), less.pop(), Taps(1, hop, cut - size + hop, cut)
    # as long as an input, where that is asked for: windows that are not whole hops apart from its end still reach there
    asked = [v for v in call.graph.inputs if call.samples[0].get("length") and v.lengths == call.out_sizes[-1]]
    like = [v for v in asked if v.rate == x.rate * hop][:1]

    def lower(b: Any, op: Any, windows: Any, span: range, _: Any) -> Any:
        spectra, low, high = windows[0].node, taps.lo(span.start), taps.hi(span.stop - 1) + 1
        inverse = "fft_irfft.default" if onesided else "fft_ifft.default"
        frames = b.aten(inverse, spectra, size, 1, norm)
        frames = frames if onesided else b.aten("select.int", b.aten("view_as_real.default", frames), -1, 0)
        window = b.full([wide], 1.0, call.dtype()) if given is None else b.static(given)
        window = b.aten("constant_pad_nd.default", window, [(size - wide) // 2, (size - wide + 1) // 2])
        window = b.aten("reshape.default", window, [1, size, 1])
        squares = b.aten("expand.default", b.aten("mul.Tensor", window, window), [1, size, high - low])
        if b.masked:
            first = b.aten("select.int", b.indices(op, span), 0, 0)
            first = b.aten("floor_divide.default", b.aten("add.Tensor", first, taps.first), hop)
            at = b.aten("add.Tensor", b.constant(list(range(high - low)), torch.int64), first)
            inside = b.aten("logical_and.default", b.aten("ge.Scalar", at, 0), b.aten("lt.Tensor", at, b.length(x)))
            squares = b.aten("mul.Tensor", squares, b.cast(inside, call.dtype()))
        added = (
            b.aten("col2im.default", y, [1, (high - low - 1) * hop + size], [1, size], [1, 1], [0, 0], [1, hop])
            for y in (b.aten("mul.Tensor", frames, window), squares)
        )
        samples = b.aten("div.Tensor", *added)
        samples = b.aten("select.int", b.aten("select.int", samples, 1, 0), 1, 0)
        return b.narrow(samples, 1, span.start + cut - low * hop, len(span))

    return call.emit(
        Layout((x.layout[0], (TIME,))),
        [read(x, taps, fill=0.0)],
        rate=x.rate * hop,
        length=lambda frames, *n: n[0] if n else (frames - 1) * hop + size - 2 * cut - short,
        length_of=[x, *like],
        lower=lower,
        nodes=call.stream_nodes,
    )


@rule(
    *overloads(
        "fft_fft.default fft_ifft.default fft_rfft.default fft_irfft.default fft_hfft.default fft_ihfft.default "
        "_fft_c2c.default _fft_c2r.default _fft_r2c.default"
    )
)
def fourier(call: Call) -> Fact:
    """A Fourier transform of each frame, over dimensions that are not time."""
    x = call.stream("self")
    over = call.arg("dim")
    dims = {d % len(x.layout) for d in (over if isinstance(over, (list, tuple)) else [over])}
    call.require(x.layout.time not in dims, "a Fourier transform over the time axis")
    layout = x.layout
    for d in dims:
        layout = layout.replace(d, call.resized(x, d))
    return call.framewise(layout)


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


@rule(*overloads("real.default imag.default _conj.default conj.default"))
def part(call: Call) -> Fact:
    """The real or imaginary part of complex numbers, or their conjugates."""
    return call.framewise(call.stream("self").layout)


SAMPLES = [
    Sample("stft", lambda: _Spectrogram(False), (2, 40), 1, output_time_dim=2),
    Sample("stft_centred", lambda: _Spectrogram(True), (2, 40), 1, output_time_dim=2, lag=8),
    Sample("istft", lambda: _Back(True), (2, 10, 6), 1),
    Sample("istft_uncentred", lambda: _Back(False), (2, 10, 6), 1),
    Sample("fourier", lambda: _Frequencies(), (2, 9, 6), 1),
    Sample("complex", lambda: _Complex(), (2, 9, 3, 2), 1),
    Sample("complex_parts", lambda: _Parts(), (2, 9, 4), 1),
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


class _Back(nn.Module):
    window: torch.Tensor

    def __init__(self, centred: bool) -> None:
        super().__init__()
        self.centred = centred
        self.register_buffer("window", torch.hann_window(8) + 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, frames, 6) -> (batch, samples): spectra of 5 frequencies, the first channel their phase."""
        spectra = torch.polar(x[:, :, 1:].exp(), x[:, :, :1].expand(-1, -1, 5)).transpose(1, 2)
        return torch.istft(spectra, 8, 2, window=self.window, center=self.centred)


class _Frequencies(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, 6): the higher half of each frame's frequencies."""
        spectra: torch.Tensor = torch.fft.rfft(x, dim=2) * (torch.arange(4) > 1)
        high: torch.Tensor = torch.fft.irfft(spectra, 6, dim=2)
        return high


class _Complex(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, channels, 2): squared as complex numbers, from memory that is not contiguous."""
        z = torch.view_as_complex(x.transpose(2, 3).contiguous().transpose(2, 3).contiguous())
        return torch.view_as_real(z * z)


class _Parts(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, 4): a spectrum turned by positions, its parts put side by side."""
        spectra = torch.fft.rfft(x, dim=2) * torch.exp(1j * torch.arange(x.shape[1]))[:, None]
        return torch.cat([spectra.real, spectra.imag, (spectra * spectra.conj()).real], 2)
