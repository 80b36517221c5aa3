"""Random nets in plain PyTorch, for hypothesis: convolutions of every geometry, pools, trims, joins, memories.

A net is a list of layers. Each layer reads one or two of the values before it, chosen among those that fit; the last
value, and sometimes another, is the output. All values are (batch, channels, time).
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

from models.sample import Sample

WIDTH = 3


@dataclass(frozen=True)
class Layer:
    """One layer: its kind, the values it reads and its numbers."""

    kind: str
    sources: tuple[int, ...]
    numbers: tuple[int, ...] = ()
    mode: str = "zeros"

    def module(self) -> nn.Module:
        """Its parameters, if it has any."""
        if self.kind == "conv":
            kernel, stride, padding, dilation, groups = self.numbers
            return nn.Conv1d(WIDTH, WIDTH, kernel, stride, padding, dilation, groups, padding_mode=self.mode)
        if self.kind == "transposed":
            kernel, stride, padding, output_padding, dilation = self.numbers
            return nn.ConvTranspose1d(WIDTH, WIDTH, kernel, stride, padding, output_padding, dilation=dilation)
        if self.kind == "gru":
            return nn.GRU(WIDTH, WIDTH, batch_first=True)
        return nn.Conv1d(2 * WIDTH, WIDTH, 1) if self.kind == "cat" else nn.Identity()

    def __call__(self, module: nn.Module, *values: Tensor) -> Tensor:
        x, n = values[0], self.numbers
        if self.kind in ("conv", "transposed"):
            return module(x)
        if self.kind == "pad":
            return F.pad(x, n, mode="constant" if self.mode == "zeros" else self.mode)
        if self.kind == "max_pool":
            return F.max_pool1d(x, *n[:4], ceil_mode=bool(n[4]))
        if self.kind == "avg_pool":
            return F.avg_pool1d(x, *n[:3], ceil_mode=bool(n[3]), count_include_pad=bool(n[4]))
        if self.kind == "slice":
            start, end, step = n
            return x[:, :, start : x.shape[2] - end : step]
        if self.kind == "gru":
            return module(x.transpose(1, 2))[0].transpose(1, 2)
        if self.kind == "cat":
            return module(torch.cat(values, 1))
        return POINTWISE[self.kind](*values)


POINTWISE = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "cosine": torch.cos,  # not zero at zero: padding behind it shows
    "cumsum": lambda x: x.cumsum(2) / 8,
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "add": torch.add,
    "gate": lambda x, y: x * torch.sigmoid(y),
}


class RandomNet(nn.Module):
    """The layers in a row, each reading values by number (0: the input)."""

    def __init__(self, layers: tuple[Layer, ...], outputs: tuple[int, ...]) -> None:
        super().__init__()
        self.layers, self.outputs = layers, outputs
        self.parts = nn.ModuleList(layer.module() for layer in layers)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        values = [x]
        for layer, part in zip(self.layers, self.parts, strict=True):
            values.append(layer(part, *(values[i] for i in layer.sources)))
        results = tuple(values[i] for i in self.outputs)
        return results if len(results) > 1 else results[0]


def small(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


@st.composite
def layers(draw: st.DrawFn, sources: int) -> Layer:
    """One layer that reads among so many values."""
    kind = draw(st.sampled_from(["conv"] * 5 + ["transposed", "max_pool", "avg_pool", "pad", "pad", "slice", "slice",
                                 "gru", "add", "add", "gate", "cat", *POINTWISE]))  # fmt: skip
    two = kind in ("add", "gate", "cat")
    read = tuple(draw(small(max(0, sources - 3), sources - 1)) for _ in range(1 + two))
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "replicate", "reflect"]))
    if kind == "conv":
        kernel, dilation = draw(small(1, 4)), draw(small(1, 2))
        padding = draw(small(0, dilation * (kernel - 1))) + draw(st.sampled_from([0, 0, 0, 2, 3]))
        return Layer(kind, read, (kernel, draw(st.sampled_from([1, 1, 1, 2, 3])), padding, dilation,
                                  draw(st.sampled_from([1, WIDTH]))), mode)  # fmt: skip
    if kind == "transposed":
        kernel, stride, dilation = draw(small(1, 4)), draw(small(1, 3)), draw(small(1, 2))
        padding = draw(small(0, dilation * (kernel - 1)))
        return Layer(kind, read, (kernel, stride, padding, draw(small(0, stride - 1)), dilation))
    if kind == "max_pool":
        kernel = draw(small(2, 3))
        return Layer(
            kind, read, (kernel, draw(small(1, 2)), draw(small(0, kernel // 2)), draw(small(1, 2)), draw(small(0, 1)))
        )
    if kind == "avg_pool":
        kernel = draw(small(2, 4))
        return Layer(
            kind, read, (kernel, draw(small(1, 2)), draw(small(0, kernel // 2)), draw(small(0, 1)), draw(small(0, 1)))
        )
    if kind == "pad":
        low = 0 if mode != "zeros" else -2
        return Layer(kind, read, (draw(small(low, 4)), draw(small(low, 4))), mode)
    if kind == "slice":
        return Layer(kind, read, (draw(small(0, 3)), draw(small(0, 3)), draw(st.sampled_from([1, 1, 1, 2]))))
    return Layer(kind, read)


def lengths(net: RandomNet, steps: int) -> list[int]:
    """The length of every value for a clip of so many steps."""
    values, x = [steps], torch.zeros(1, WIDTH, steps)
    everything = RandomNet.forward.__get__(net)
    chosen, net.outputs = net.outputs, tuple(range(len(net.layers) + 1))
    try:
        values = [value.shape[2] for value in everything(x)]
    finally:
        net.outputs = chosen
    return values


def runs_at(net: RandomNet, steps: int) -> bool:
    try:
        return min(lengths(net, steps)) > 0
    except RuntimeError:
        return False


@st.composite
def networks(draw: st.DrawFn, most: int = 7) -> Sample:
    """A sample whose net runs at every length from the example's on (joins fit, whatever the length)."""
    chosen: list[Layer] = []
    for _ in range(draw(small(2, most))):
        layer = draw(layers(len(chosen) + 1))
        if fits((*chosen, layer)):
            chosen.append(layer)
    assume(chosen)
    outputs = (len(chosen),)
    if draw(st.integers(0, 3)) == 0:
        outputs += (draw(small(1, len(chosen))),)
    clip_length = shortest_clip(RandomNet(tuple(chosen), outputs)) + 4
    return Sample(
        name=f"random {'+'.join(layer.kind for layer in chosen)}",
        build=partial(RandomNet, tuple(chosen), outputs),  # so that a failure prints what makes it again
        shapes=(1, WIDTH, clip_length),
        length=clip_length + draw(small(9, 20)),
        unbounded=tuple(remembers(tuple(chosen), i) for i in outputs),
        exact=False,
        lag=0 if all(layer.mode == "zeros" for layer in chosen) else 99,  # mirrored frames are waited for
    )


def remembers(chosen: tuple[Layer, ...], i: int) -> bool:
    """Value i depends on all frames so far."""
    layer = chosen[i - 1]
    return i > 0 and (layer.kind in ("gru", "cumsum") or any(remembers(chosen, source) for source in layer.sources))


def fits(chosen: tuple[Layer, ...]) -> bool:
    """The net so far runs at all lengths in a range, and keeps its rate within bounds."""
    net = RandomNet(chosen, (len(chosen),))
    start = shortest_clip(net)
    if start > 24 or not all(runs_at(net, n) for n in range(start, start + 14)):
        return False
    rates = [Fraction(b - a, 36) for a, b in zip(lengths(net, start), lengths(net, start + 36), strict=True)]
    return all(rate <= 4 and rate.denominator <= 12 for rate in rates)


def shortest_clip(net: RandomNet) -> int:
    """The least length at which every value has a frame."""
    return next((n for n in range(1, 26) if runs_at(net, n)), 25)


def period(sample: Sample) -> int:
    """Steps after which the net does the same work again."""
    net = sample.build()
    longer = zip(lengths(net, sample.length), lengths(net, sample.length + 144), strict=True)
    return math.lcm(*(Fraction(b - a, 144).denominator for a, b in longer))
