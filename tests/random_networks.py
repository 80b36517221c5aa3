"""Random nets in plain PyTorch, for hypothesis: convolutions of any geometry, pools, trims, joins, memories, attention.

A net is a list of layers. Each layer reads one or two of the values before it, chosen among those that fit; the last
value, and sometimes another, is the output. All values are (batch, channels, time), or all (batch, channels, time,
space).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

from models.sample import Sample

WIDTH, SPACE = 3, 5


@dataclass(frozen=True)
class Layer:
    """One layer: its kind, the values it reads and its numbers."""

    kind: str
    sources: tuple[int, ...]
    numbers: tuple[int, ...] = ()
    mode: str = "zeros"
    space: tuple[int, ...] = ()
    """The same numbers for the dimension of space, of convolutions and pools; without one: none."""

    def spans(self, count: int) -> list[int | tuple[int, ...]]:
        """The first so many numbers, each for all dimensions that windows have."""
        return list(zip(self.numbers[:count], self.space, strict=False)) if self.space else list(self.numbers[:count])

    def module(self) -> nn.Module:
        """Its parameters, if it has any."""
        if self.kind == "conv":
            conv = nn.Conv2d if self.space else nn.Conv1d
            return conv(WIDTH, WIDTH, *self.spans(4), self.numbers[4], padding_mode=self.mode)
        if self.kind == "transposed":
            conv = nn.ConvTranspose2d if self.space else nn.ConvTranspose1d
            kernel, stride, padding, output_padding, dilation = self.spans(5)
            return conv(WIDTH, WIDTH, kernel, stride, padding, output_padding, dilation=dilation)
        if self.kind in ("gru", "lstm"):
            return {"gru": nn.GRU, "lstm": nn.LSTM}[self.kind](WIDTH, WIDTH, batch_first=True)
        if self.kind == "norm":
            return nn.LayerNorm(WIDTH)
        if self.kind == "cat":
            return (nn.Conv2d if self.space else nn.Conv1d)(2 * WIDTH, WIDTH, 1)
        return nn.Identity()

    def __call__(self, module: nn.Module, *values: Tensor) -> Tensor:
        x, n = values[0], self.numbers
        if self.kind in ("conv", "transposed"):
            return module(x)
        if self.kind == "pad":
            return F.pad(x, (0, 0, *n) if x.dim() == 4 else n, mode="constant" if self.mode == "zeros" else self.mode)
        if self.kind == "max_pool":
            return (F.max_pool2d if self.space else F.max_pool1d)(x, *self.spans(4), ceil_mode=bool(n[4]))
        if self.kind == "avg_pool":
            pool = F.avg_pool2d if self.space else F.avg_pool1d
            return pool(x, *self.spans(3), ceil_mode=bool(n[3]), count_include_pad=bool(n[4]))
        if self.kind == "slice":
            start, end, step = n
            return x[:, :, start : x.shape[2] - end : step]
        if self.kind in ("gru", "lstm"):
            return in_rows(x, lambda rows: module(rows)[0])
        if self.kind == "band":
            return in_rows(x, partial(attend_to_band, n[0], n[1]))
        if self.kind == "unfold":
            return x.unfold(2, n[0], n[1]).prod(-1)
        if self.kind == "norm":
            return module(x.transpose(1, -1)).transpose(1, -1)
        if self.kind == "cat":
            return module(torch.cat(values, 1))
        return POINTWISE[self.kind](*values)


def in_rows(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of (batch, time, channels), for each place in space by itself."""
    if x.dim() == 3:
        return function(x.transpose(1, 2)).transpose(1, 2)
    rows = x.permute(0, 3, 2, 1)
    return function(rows.flatten(0, 1)).unflatten(0, rows.shape[:2]).permute(0, 3, 2, 1)


def attend_to_band(back: int, ahead: int, x: Tensor) -> Tensor:
    """Attention to so many frames back and ahead."""
    at = torch.arange(x.shape[1])
    distance = at[:, None] - at[None]
    return F.scaled_dot_product_attention(x, x, x, attn_mask=(distance <= back) & (distance >= -ahead))


def place(x: Tensor) -> Tensor:
    """A number for each frame, by where it is."""
    at = torch.arange(x.shape[2]) * 0.7
    return x + at.sin().view(-1, *[1] * (x.dim() - 3))


POINTWISE = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "cosine": torch.cos,  # not zero at zero: padding behind it shows
    "cumsum": lambda x: x.cumsum(2) / 8,
    "nearest": lambda x: F.interpolate(x, scale_factor=(2, 1)[: x.dim() - 2]),
    "linear": lambda x: F.interpolate(x, scale_factor=(2, 1)[: x.dim() - 2], mode=("linear", "bilinear")[x.dim() - 3]),
    "place": place,
    "add": torch.add,
    "gate": lambda x, y: x * torch.sigmoid(y),
}


class RandomNet(nn.Module):
    """The layers in a row, each reading values by number (0: the input); `space`: the size of that dimension."""

    def __init__(self, layers: tuple[Layer, ...], outputs: tuple[int, ...], space: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.layers, self.outputs, self.space = layers, outputs, space
        self.parts = nn.ModuleList(layer.module() for layer in layers)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        values = [x]
        for layer, part in zip(self.layers, self.parts, strict=True):
            values.append(layer(part, *(values[i] for i in layer.sources)))
        results = tuple(values[i] for i in self.outputs)
        return results if len(results) > 1 else results[0]


@st.composite
def layers(draw: st.DrawFn, sources: int, space: bool = False) -> Layer:
    """One layer that reads among so many values."""
    kind = draw(st.sampled_from(["conv"] * 5 + ["transposed", "max_pool", "avg_pool", "pad", "pad", "slice", "slice",
                                 "gru", "lstm", "band", "unfold", "norm", "add", "add", "gate", "cat",
                                 *POINTWISE]))  # fmt: skip
    two = kind in ("add", "gate", "cat")
    read = tuple(draw(small(max(0, sources - 3), sources - 1)) for _ in range(1 + two))
    mode = draw(st.sampled_from(["zeros", "zeros", "zeros", "replicate", "reflect"]))
    if kind == "conv":
        kernel, dilation = draw(small(1, 4)), draw(small(1, 2))
        padding = draw(small(0, dilation * (kernel - 1))) + draw(st.sampled_from([0, 0, 0, 2, 3]))
        stride, groups = draw(st.sampled_from([1, 1, 1, 2, 3])), draw(st.sampled_from([1, WIDTH]))
        beside = (wide := draw(small(1, 3)), draw(small(1, 2)), wide // 2, 1) if space else ()
        return Layer(kind, read, (kernel, stride, padding, dilation, groups), mode, beside)
    if kind == "transposed":
        kernel, stride, dilation = draw(small(1, 4)), draw(small(1, 3)), draw(small(1, 2))
        padding = draw(small(0, dilation * (kernel - 1)))
        beside = (wide := draw(small(1, 3)), 1, wide // 2, 0, 1) if space else ()
        return Layer(kind, read, (kernel, stride, padding, draw(small(0, stride - 1)), dilation), space=beside)
    if kind == "max_pool":
        kernel = draw(small(2, 3))
        numbers = kernel, draw(small(1, 2)), draw(small(0, kernel // 2)), draw(small(1, 2)), draw(small(0, 1))
        beside = (wide := draw(small(1, 3)), draw(small(1, 2)), wide // 2, 1) if space else ()
        return Layer(kind, read, numbers, space=beside)
    if kind == "avg_pool":
        kernel = draw(small(2, 4))
        numbers = kernel, draw(small(1, 2)), draw(small(0, kernel // 2)), draw(small(0, 1)), draw(small(0, 1))
        beside = (wide := draw(small(1, 3)), draw(small(1, 2)), wide // 2) if space else ()
        return Layer(kind, read, numbers, space=beside)
    if kind == "pad":
        low = 0 if mode != "zeros" else -2
        return Layer(kind, read, (draw(small(low, 4)), draw(small(low, 4))), mode)
    if kind == "slice":
        return Layer(kind, read, (draw(small(0, 3)), draw(small(0, 3)), draw(st.sampled_from([1, 1, 1, 2]))))
    if kind == "band":
        return Layer(kind, read, (draw(small(0, 4)), draw(small(0, 2))))
    if kind == "unfold":
        return Layer(kind, read, (draw(small(1, 3)), draw(small(1, 3))))
    return Layer(kind, read, space=(1,) if space else ())


def small(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


def lengths(net: RandomNet, steps: int) -> list[int]:
    """The length of every value for a clip of so many steps."""
    values, x = [steps], torch.zeros(1, WIDTH, steps, *net.space)
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
    space = draw(st.sampled_from([(), (), (SPACE,)]))
    for _ in range(draw(small(2, most))):
        layer = draw(layers(len(chosen) + 1, bool(space)))
        if fits((*chosen, layer), space):
            chosen.append(layer)
    assume(chosen)
    outputs = (len(chosen),)
    if draw(st.integers(0, 3)) == 0:
        outputs += (draw(small(1, len(chosen))),)
    clip_length = shortest_clip(RandomNet(tuple(chosen), outputs, space)) + 4
    return Sample(
        name=f"random {'+'.join(layer.kind for layer in chosen)}",
        build=partial(RandomNet, tuple(chosen), outputs, space),  # so that a failure prints what makes it again
        shapes=(1, WIDTH, clip_length, *space),
        length=clip_length + draw(small(9, 20)),
        unbounded=tuple(remembers(tuple(chosen), i) for i in outputs),
        exact=False,
        lag=0
        if all(layer.mode == "zeros" and layer.kind != "linear" for layer in chosen)
        else 99,  # mirrored frames are waited for
    )


def remembers(chosen: tuple[Layer, ...], i: int) -> bool:
    """Value i depends on all frames so far."""
    layer = chosen[i - 1]
    return i > 0 and (
        layer.kind in ("gru", "lstm", "cumsum") or any(remembers(chosen, source) for source in layer.sources)
    )


def fits(chosen: tuple[Layer, ...], space: tuple[int, ...]) -> bool:
    """The net so far runs at all lengths in a range, and keeps its rate within bounds."""
    net = RandomNet(chosen, (len(chosen),), space)
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
