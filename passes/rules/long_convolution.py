"""Causal convolutions with kernels as long as the clip, applied as products of spectra (S4D, Hyena).

Frame t of ``irfft(rfft(x, n) * rfft(k, n), n)[:L]`` with ``n >= 2L - 1`` is the sum of ``k[t - s] * x[s]`` over all
frames s so far (the convolution theorem). If the kernel is made of nothing but positions, that is a pair of frames that
depends on their distance alone, summed over its keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from ..codegen.pairs import Reach, Scope, evaluate, frames, tables_of
from ..layout import BATCH, KEY, TIME, Layout
from ..registry import Call, Fact, Sample, note
from ..stream_graph import Op, Value, positional
from .pairs import make, summed_up
from .slicing import bound

aten = torch.ops.aten
# what each norm leaves of the factor 1/n of the whole, going there and coming back
_THERE = {None: 0.0, "backward": 0.0, "ortho": 0.5, "forward": 1.0}
_BACK = {None: 1.0, "backward": 1.0, "ortho": 0.5, "forward": 0.0}


def first_frames(call: Call) -> Fact:
    """The first frames of what comes back of a product of spectra: as many as went in."""
    back = call.samples[0]["self"]
    call.require(back.target is aten.fft_irfft.default, "frequencies are read")
    product = back.meta["samples"][0]["self"]
    call.require(product.target is aten.mul.Tensor, "spectra over time are not multiplied")
    spectra = [product.meta["samples"][0][name] for name in ("self", "other")]
    call.require(all(isinstance(s, fx.Node) for s in spectra), "a spectrum over time is scaled")
    lengths, axis, factor = _transform(call, back, _BACK)
    sources = []
    for spectrum in spectra:
        source, power = _source(call, spectrum, lengths, axis)
        sources.append(source)
        factor += power
    call.require(factor == 1.0, "a product of spectra is scaled")
    values = [call.facts[n] for n in sources]
    call.require(all(isinstance(v, Value) for v in values), "a Fourier transform over the time axis")
    fixed = [positional(v) for v in values]
    call.require(any(fixed) and not all(fixed), "two streams are convolved with each other")
    x, kernel = (call.ungroup(values[fixed.index(f)]) for f in (False, True))
    for v in (x, kernel):
        call.require(v.layout.time - len(v.layout) == axis, "a Fourier transform over the time axis")
    call.require(x.rate == kernel.rate and x.lengths == kernel.lengths, "a kernel that is not as long as the clip")
    call.require(len(kernel.layout) <= len(x.layout), "a kernel for each of several outputs")
    call.require(all(n >= 2 * m - 1 for n, m in zip(lengths, x.lengths, strict=True)), "the clip's end meets its start")
    here = call.arg("dim", 0) % len(x.layout) - len(x.layout) == axis and call.arg("step", 1) == 1
    starts = bound(call.sampled("start"), lengths, (0,) * len(lengths))
    whole = bound(call.sampled("end"), lengths, lengths) == x.lengths
    call.require(here and set(starts) == {0} and whole, "part of a convolution with the whole clip is read")
    return convolution(call, x, kernel, axis, sources[fixed.index(True)])


def _transform(call: Call, node: fx.Node, powers: dict[Any, float]) -> tuple[tuple[int, ...], int, float]:
    """The lengths of a transform at the sample points, its dimension (from the end), and its power of 1/n."""
    samples = node.meta["samples"]
    rank = len(node.meta["sizes"][0])
    call.require(all(s.get("n") is not None for s in samples), "a spectrum as long as the clip")
    call.require(len({s.get("dim", -1) for s in samples}) == 1, "a transform over another dimension")
    return tuple(s["n"] for s in samples), samples[0].get("dim", -1) % rank - rank, powers[samples[0].get("norm")]


def _source(call: Call, node: fx.Node, lengths: tuple[int, ...], axis: int) -> tuple[fx.Node, float]:
    """What a spectrum of so many entries over this dimension is of, and its power of 1/n."""
    power = 0.0
    while node.target in (aten.unsqueeze.default, aten.div.Tensor, aten.div.Scalar):
        args = node.meta["samples"]
        if node.target is aten.unsqueeze.default:
            call.require(args[0]["dim"] == 0, "a spectrum over time is moved")
        else:
            call.require(tuple(a["other"] for a in args) == lengths, "a spectrum over time is scaled")
            power += 1.0
        node = args[0]["self"]
    call.require(node.target is aten.fft_rfft.default, "a spectrum over time is changed")
    found, over, own = _transform(call, node, _THERE)
    call.require((found, over) == (lengths, axis), "spectra of different lengths")
    source: fx.Node = node.meta["samples"][0]["self"]
    return source, power + own


def convolution(call: Call, x: Value, kernel: Value, axis: int, node: fx.Node) -> Value:
    """Frame t is the sum of ``kernel[t - s] * x[s]`` over all s up to t; time is dimension `axis` of both, negative."""

    def toeplitz(b: Any, op: Op, windows: Any, span: range, _: Any) -> Any:
        scope = b.scope
        back = max(1, scope.rows.stop - scope.columns.start)
        found = frames(b, kernel, range(back))
        found = b.aten("movedim.int", found, axis, -1) if axis != -1 else found
        ahead = b.distance(scope)
        at = b.aten("reshape.default", b.aten("clamp.default", b.aten("neg.default", ahead), 0), [-1])
        entries = b.aten(
            "reshape.default",
            b.aten("index_select.default", found, -1, at),
            [*sizes, len(scope.rows), len(scope.columns)],
        )
        return b.aten("where.self", b.aten("le.Scalar", ahead, 0), entries, b.like(0, entries))

    rest = [d for d in kernel.layout if d != (TIME,)]
    sizes = Layout(tuple(rest)).sizes(call.graph.batch[0], 0)
    call.require(not any(BATCH in d for d in rest), "a kernel for each stream of the batch")
    pairs = Layout((*rest, (TIME,), (KEY,)))
    weights = make(call, pairs, [kernel], lower=toeplitz, nodes=[node], rows=x).value
    limit = min((op.limit for op in tables_of(weights) if op.limit is not None), default=None)
    reach = Reach(None, 0, frozenset({weights}), limit)

    def lower(b: Any, op: Op, scope: Scope) -> Any:
        entries = b.where_exists(evaluate(b, weights, scope), pairs, 0, scope)
        column = b.aten("unsqueeze.default", b.aten("transpose.int", scope.frames[x, True], axis, -1), -1)
        summed = b.aten("squeeze.dim", b.aten("matmul.default", entries, column), -1)
        return b.aten("transpose.int", summed, axis, -1)

    return summed_up(call, x.layout, weights, [(x, True)], lower, reach)


note(aten.slice.Tensor, spectral_rule=first_frames)


class _Long(nn.Module):
    def __init__(self, axis: int, forward_norm: bool = False) -> None:
        super().__init__()
        self.axis, self.scaled = axis, forward_norm
        self.decay = nn.Parameter(torch.rand(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 3, time), or (batch, time, 3): each channel convolved with a decaying wave of its own."""
        length, axis = x.shape[self.axis], self.axis
        at = torch.arange(length)
        kernel = (-self.decay[:, None] * at).exp() * (at * 0.3).cos()
        kernel = kernel if axis == -1 else kernel.T
        n, norm = 2 * length, "forward" if self.scaled else None
        spectrum = torch.fft.rfft(kernel, n=n, dim=axis)
        spectrum = (spectrum / n)[None] if self.scaled else spectrum
        y = torch.fft.irfft(torch.fft.rfft(x, n=n, dim=axis) * spectrum, n=n, dim=axis, norm=norm)
        cut: torch.Tensor = y[..., :length] if axis == -1 else y[:, :length]
        return cut


SAMPLES = [
    Sample("long_convolution", lambda: _Long(-1), (2, 3, 9), unbounded=True),
    Sample("long_convolution_scaled", lambda: _Long(-2, True), (2, 9, 3), 1, unbounded=True),
]
