"""Products with matrices: linear layers, matmul, einsum."""

from __future__ import annotations

import torch
from torch import nn

from ..layout import TIME, Dim, Layout, dim
from ..registry import Call, Fact, Sample, Static, lower_call, overloads, rule
from ..split_einsums import spelled_out
from ..stream_graph import Value, read

aten = torch.ops.aten


@rule(aten.linear.default)
def linear(call: Call) -> Fact:
    """``x @ weight.T + bias`` over the last dimension."""
    call.require(
        all(isinstance(call.fact(call.samples[0].get(n)), Static) for n in ("weight", "bias")),
        "its weights depend on time",
    )
    x = call.stream("input")
    last = len(x.layout) - 1
    call.require(x.layout.time != last, "a linear layer over the time axis")
    weight = call.samples[0]["weight"].meta["val"].shape
    return call.framewise(x.layout.replace(last, *([dim(weight[0])] if len(weight) == 2 else [])))


@rule(*overloads("matmul.default bmm.default mm.default mv.default"))
def matmul(call: Call) -> Fact:
    """A product of matrices, perhaps batched: time may lie in the batch or in the rows (or columns) that stay."""
    names = (
        ("self", "other")
        if "other" in call.samples[0]
        else ("self", "mat2")
        if "mat2" in call.samples[0]
        else ("self", "vec")
    )
    return product(call, names[0], names[1])


@rule(*overloads("addmm.default baddbmm.default"))
def addmm(call: Call) -> Fact:
    """A product of matrices plus something that does not depend on time."""
    names = ("mat1", "mat2") if "mat1" in call.samples[0] else ("batch1", "batch2")
    bias = call.samples[0]["self"]
    call.require(isinstance(call.fact(bias), Static), "what is added depends on time")
    result: Value = product(call, *names)
    at = result.layout.time - len(result.layout) + bias.meta["val"].dim()
    call.require(at < 0 or bias.meta["val"].shape[at] == 1, "what is added lies along time")
    return result


def product(call: Call, left: str, right: str) -> Fact:
    """The rule of ``left @ right``."""
    sides = [call.samples[0][left], call.samples[0][right]]
    values = [call.facts[s] if isinstance(call.facts[s], Value) else None for s in sides]
    layouts = [v.layout if v else call.static_layout(s) for v, s in zip(values, sides, strict=True)]
    a, b = layouts
    streams = [v for v in values if v]
    for v, lay, contracted in zip(values, layouts, (len(a) - 1, max(len(b) - 2, 0)), strict=True):
        call.require(v is None or lay.time != contracted, "a product that sums over the time axis")
    rows = [a[len(a) - 2]] if len(a) > 1 else []
    columns = [b[len(b) - 1]] if len(b) > 1 else []
    batch_a, batch_b = a.dims[: max(len(a) - 2, 0)], b.dims[: max(len(b) - 2, 0)]
    rank = max(len(batch_a), len(batch_b))
    wide_a = ((),) * (rank - len(batch_a)) + batch_a
    wide_b = ((),) * (rank - len(batch_b)) + batch_b
    dims = [x or y for x, y in zip(wide_a, wide_b, strict=True)]
    layout = Layout((*dims, *rows, *columns))
    call.require(len(layout.time_dims) == 1, "a product of every frame with every frame")
    for x, y in zip(wide_a, wide_b, strict=True):
        call.require(not (x and y and x != y), "time is folded differently in its arguments")
    call.require(len({v.lengths for v in streams}) == 1, "its arguments have different lengths in time")
    return call.framewise(layout)


@rule(*overloads("_euclidean_dist.default cdist.default _cdist_forward.default"))
def distances(call: Call) -> Fact:
    """The distance of every row of one matrix to every row of another, perhaps batched."""
    sides = [call.samples[0]["x1"], call.samples[0]["x2"]]
    values = [call.facts[s] if isinstance(call.facts[s], Value) else None for s in sides]
    a, b = (v.layout if v else call.static_layout(s) for v, s in zip(values, sides, strict=True))
    for v in values:
        call.require(v is None or v.layout.time != len(v.layout) - 1, "distances that sum over the time axis")
    rank = max(len(a), len(b)) - 2
    wide = [((),) * (rank + 2 - len(lay)) + lay.dims[:-2] for lay in (a, b)]
    layout = Layout((*(x or y for x, y in zip(*wide, strict=True)), a[len(a) - 2], b[len(b) - 2]))
    call.require(len(layout.time_dims) == 1, "a distance of every frame to every frame")
    call.require(all(not (x and y and x != y) for x, y in zip(*wide, strict=True)), "time is folded differently")
    return call.framewise(layout)


@rule(aten.einsum.default)
def einsum(call: Call) -> Fact:
    """A sum of products by letters: the letter of time must be in the result."""
    tensors = call.samples[0]["tensors"]
    letters, result = spelled_out(call.arg("equation"), [len(n.meta["sizes"][0]) for n in tensors])
    dims: dict[str, Dim] = {}
    times = set()
    for term, node in zip(letters, tensors, strict=True):
        fact = call.facts[node]
        layout = fact.layout if isinstance(fact, Value) else call.static_layout(node)
        for letter, d in zip(term, layout, strict=True):
            known = dims.get(letter)
            call.require(
                not known or not d or known == d or not isinstance(fact, Value),
                "time is folded differently in its arguments",
            )
            dims[letter] = d if not known or TIME in d else known
            if TIME in d:
                times.add(letter)
    call.require(len(times) == 1, "a product of every frame with every frame")
    time = times.pop()
    call.require(time in result, "an einsum that sums over the time axis")
    for term, node in zip(letters, tensors, strict=True):
        call.require(isinstance(call.facts[node], Value) or time not in term, "a matrix along time in an einsum")
    return call.framewise(Layout(tuple(dims[x] for x in result)))


@rule(*overloads("outer.default ger.default"))
def outer(call: Call) -> Fact:
    """Every entry of one vector times every entry of another: positions times frequencies."""
    sides = [call.samples[0]["self"], call.samples[0]["vec2"]]
    values = [call.facts[s] if isinstance(call.facts[s], Value) else None for s in sides]
    dims = [v.layout[0] if v else call.static_layout(s)[0] for v, s in zip(values, sides, strict=True)]
    call.require(sum(v is not None for v in values) == 1, "a product of every frame with every frame")
    return call.framewise(Layout(tuple(dims)))


@rule(*overloads("dot.default inner.default bilinear.default"))
def bilinear(call: Call) -> Fact:
    """Bilinear layers: framewise if time is not the last dimension."""
    call.require("input1" in call.samples[0], "a product over the time axis")
    x, y = call.stream("input1"), call.stream("input2")
    last = len(x.layout) - 1
    call.require(x.layout.time != last and x.layout.dims[:-1] == y.layout.dims[:-1], "a product over the time axis")
    return call.emit(x.layout.replace(last, call.resized(x, last)), [read(x), read(y)], length_of=[x], lower=lower_call)


SAMPLES = [
    Sample("linear", lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (2, 9, 3), 1),
    Sample("einsum", lambda: _Graph(), (2, 3, 9, 5)),
    Sample("einsum_with_ellipsis", lambda: _Ellipsis(), (2, 3, 9, 5)),
]


class _Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time, joints), mixed over the joints in two ways."""
        return torch.einsum("...v,vw", x, self.a) + x @ self.a


class _Ellipsis(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, time, joints): the joints mixed, the channels weighted, without a result being named."""
        y = torch.einsum("...v,vw", x, self.a)
        return torch.einsum("bc...,c->b...", y, self.b).unsqueeze(1)
