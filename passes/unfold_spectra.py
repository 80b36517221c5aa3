"""Pass 2c: a filter that is applied as a product of spectra over time is the convolution that it stands for.

``irfft(rfft(x, n) * rfft(h, n), n)`` with ``n >= len(x) + len(h) - 1`` is ``x`` convolved with ``h``, followed by zeros
(the convolution theorem; torchaudio.functional.fftconvolve). Written so it streams; a spectrum needs the whole clip.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from .graph_edits import call_at, sizes_of, take_place

aten = torch.ops.aten


def unfold_spectra(graph: fx.Graph) -> None:
    """Rewrite a canonical graph so."""
    fed: set[fx.Node] = set()  # what depends on the inputs
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in fed for n in node.all_input_nodes):
            fed.add(node)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is aten.fft_irfft.default:
            new = _convolution(graph, node, fed)
            if new is not None:
                take_place(node, new)
    graph.eliminate_dead_code()


def _convolution(graph: fx.Graph, node: fx.Node, fed: set[fx.Node]) -> fx.Node | None:
    product = node.args[0]
    if not isinstance(product, fx.Node) or product.target is not aten.mul.Tensor:
        return None
    spectra = [product.meta["samples"][0][name] for name in ("self", "other")]
    lengths = _lengths(node)
    if lengths is None or not all(isinstance(s, fx.Node) and s.target is aten.fft_rfft.default for s in spectra):
        return None
    if any(_lengths(s) != lengths for s in spectra):
        return None
    signal, kernel = (s.meta["samples"][0]["self"] for s in spectra)
    if not _grows(signal) and (_grows(kernel) or signal not in fed):
        signal, kernel = kernel, signal
    if not _grows(signal) and (signal not in fed or kernel in fed):  # of a model that takes one length, all alike
        return None
    before, taps = sizes_of(signal), sizes_of(kernel)
    size = taps[-1][0]
    left_over = {n - length - size + 1 for n, length in zip(lengths, before[-1], strict=True)}
    if set(taps[-1]) != {size} or len(left_over) > 1:
        return None
    rest = left_over.pop()
    filters = math.prod(t[0] for t in taps[:-1])
    alike = all(set(t) == {1} for t in taps[:-1])  # one filter for all
    each = len(before) == 3 and len(taps) >= 2 and set(before[1]) == set(taps[-2]) == {filters}  # one for each channel
    if rest < 0 or len(taps) > len(before) or not (alike or each):
        return None
    groups = 1 if alike else filters
    shapes = [tuple(s) for s in signal.meta["sizes"]]
    rows = [(math.prod(s[:-1]) // groups, groups) for s in shapes]

    def make(target: Any, calls: list[Any], sizes: list[Any], like: fx.Node) -> fx.Node:
        value = node.meta["val"]
        with value.fake_mode:
            made = torch.empty(sizes[0], dtype=like.meta["val"].dtype, device=value.device)
        return call_at(graph, node, target, calls, sizes, made)

    points, form = len(shapes), (groups, 1, size)
    turned = make(aten.flip.default, [((kernel, [-1]), {})] * points, kernel.meta["sizes"], kernel)
    weight = make(aten.reshape.default, [((turned, list(form)), {})] * points, [form] * points, kernel)
    flat = [(*r, s[-1]) for r, s in zip(rows, shapes, strict=True)]
    x = signal if flat == shapes else make(aten.reshape.default, [((signal, list(s)), {}) for s in flat], flat, signal)
    longer = [(*r, s[-1] + size - 1) for r, s in zip(rows, shapes, strict=True)]
    full: list[Any] = [((x, weight, None, [1], [size - 1], [1], groups), {})] * points
    y = make(aten.conv1d.default, full, longer, signal)
    if rest:
        longer = [(*s[:-1], s[-1] + rest) for s in longer]
        y = make(aten.constant_pad_nd.default, [((y, [0, rest], 0.0), {})] * points, longer, signal)
    result = [(*s[:-1], n) for s, n in zip(shapes, lengths, strict=True)]
    if result != [tuple(s) for s in node.meta["sizes"]]:
        return None
    return y if longer == result else make(aten.reshape.default, [((y, list(s)), {}) for s in result], result, signal)


def _grows(node: fx.Node) -> bool:
    """Whether the last dimension follows the clip's length."""
    return len(set(sizes_of(node)[-1])) > 1


def _lengths(node: fx.Node) -> tuple[int, ...] | None:
    """The lengths at the sample points of a transform of real numbers over the last dimension, without a factor."""
    samples, source = node.meta["samples"], node.meta["samples"][0]["self"]
    last = len(source.meta["sizes"][0]) - 1
    if any(s.get("dim", -1) not in (-1, last) or s.get("norm") not in (None, "backward") for s in samples):
        return None
    lengths = tuple(s.get("n") for s in samples)
    return None if any(n is None for n in lengths) else lengths
