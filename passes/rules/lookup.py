"""Tables read at indices that are made of frames, and entries of other dimensions than time read at fixed indices."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..layout import Dim, Layout, dim
from ..registry import Call, Fact, Sample, Static, lower_call, overloads, rule
from ..stream_graph import Op, Value, Window, read
from .frames_at import frames_at

aten = torch.ops.aten


@rule(aten.embedding.default)
def embedding(call: Call) -> Fact:
    """Each index becomes a vector: one more dimension at the end."""
    x = call.stream("indices")
    weight, node = call.samples[0]["weight"], call.samples[0]["indices"]
    call.require(isinstance(call.fact(weight), Static), "its table depends on time")
    return call.emit(
        Layout((*x.layout.dims, call.static_layout(weight)[1])), [read(x)], length_of=[x],
        lower=_within(weight, {node: 0}), masked_until=int(x.indexed),
    )  # fmt: skip


def index_table(call: Call) -> Fact:
    """``table.index_select(dim, indices)``: the same along any dimension."""
    table, node = call.samples[0]["self"], call.samples[0]["index"]
    at = call.stream("index")
    layout = call.static_layout(table)
    axis = call.arg("dim") % len(layout)
    return call.emit(
        layout.replace(axis, at.layout[0]), [read(at)], length_of=[at],
        lower=_within(table, {node: axis}), masked_until=int(at.indexed),
    )  # fmt: skip


@rule(aten.index.Tensor)
def index(call: Call) -> Fact:
    """``x[:, indices]``: a table at indices that are frames, or fixed entries of a dimension that is not time."""
    node = call.samples[0]["self"]
    indices = list(call.samples[0]["indices"])
    at = [i for i, n in enumerate(indices) if n is not None]
    call.require(at == list(range(at[0], at[-1] + 1)), "indices of dimensions that are not neighbours")
    call.require(all(n.meta["val"].dtype != torch.bool for n in indices if n is not None), "indices by a mask")
    given = [indices[i] for i in at]
    if isinstance(call.fact(node), Static):
        streams, inner = _side_by_side(call, given)
        layout = call.static_layout(node)
        result = Layout((*layout.dims[: at[0]], *inner, *layout.dims[at[-1] + 1 :]))
        return call.emit(
            result, [read(v) for v in streams.values()], length_of=[next(iter(streams.values()))],
            nodes=list(streams), lower=_within(node, dict(zip(given, at, strict=True)), negative=True),
            masked_until=int(any(v.indexed for v in streams.values())),
        )  # fmt: skip
    x = call.stream("self")
    if at == [x.layout.time] and isinstance(call.fact(given[0]), Value):
        return frames_at(call, x, call.facts[given[0]])
    call.require(all(isinstance(call.fact(n), Static) for n in given), "indices that depend on time")
    call.require(x.layout.time not in at, "chosen frames of the clip are read")
    inner = _broadcast([call.static_layout(n) for n in given], call)
    return call.framewise(Layout((*x.layout.dims[: at[0]], *inner, *x.layout.dims[at[-1] + 1 :])), [x])


def _side_by_side(call: Call, given: list[fx.Node]) -> tuple[dict[fx.Node, Value], list[Dim]]:
    """The indices that are streams, and the dimensions of all of them broadcast."""
    streams = {n: f for n in given if isinstance(f := call.facts[n], Value)}
    if len(streams) > 1:
        streams = {n: call.ungroup(v) for n, v in streams.items()}
    values = list(streams.values())
    call.require(len({(v.rate, v.lengths) for v in values}) == 1, "its indices have different lengths in time")
    call.require(len({len(v.layout) - v.layout.time for v in values}) == 1, "time lies in different dimensions")
    layouts = [streams[n].layout if n in streams else call.static_layout(n) for n in given]
    from_end = len(values[0].layout) - values[0].layout.time
    lying = (
        n not in streams and len(lay) >= from_end and lay[len(lay) - from_end]
        for n, lay in zip(given, layouts, strict=True)
    )
    call.require(not any(lying), "an index without time lies along the time axis")
    return streams, _broadcast(layouts, call)


def _broadcast(layouts: list[Layout], call: Call) -> list[Dim]:
    rank = max(len(lay) for lay in layouts)
    dims: list[Dim] = []
    for i in range(rank):
        present = {d for lay in layouts if (k := i - rank + len(lay)) >= 0 and (d := lay[k])}
        call.require(len(present) <= 1, "indices of different shapes")
        dims.append(next(iter(present), ()))
    return dims


def _within(table: fx.Node, dims: dict[fx.Node, int], negative: bool = False) -> Any:
    """Runs the op; before the first frame and after the last, where indices may be anything, they are made to fit.

    Args:
        table: what is read.
        dims: the dimension of it that each index reads.
        negative: indices may count from the end.
    """

    def lower(b: Any, op: Op, windows: list[Window], span: range, carries: Any) -> Any:
        if not b.masked:
            return lower_call(b, op, windows, span, carries)
        fitting = []
        for n, w in zip(op.stream_nodes, windows, strict=True):
            size = table.meta["sizes"][0][dims[n]]
            at = b.aten("clamp.default", w.node, -size if negative else 0, size - 1)
            fitting.append(Window(at, w.start, w.stop))
        return lower_call(b, op, fitting, span, carries)

    return lower


@rule(aten.gather.default)
def gather(call: Call) -> Fact:
    """``out[i, j] = x[i, index[i, j]]``: within frames, or from a table."""
    x, at = call.maybe("self"), call.stream("index")
    axis = call.arg("dim") % len(at.layout)
    if x is None:
        call.require(axis == at.layout.time, "a table lies along the time axis")
        return call.framewise(at.layout, [at], _within(call.samples[0]["self"], {call.samples[0]["index"]: axis}))
    call.require(axis != x.layout.time, "frames are read at indices that depend on the data")
    if x.layout[x.layout.time] != at.layout[at.layout.time]:
        x, at = call.ungroup(x), call.ungroup(at)
    call.require(x.layout.time == at.layout.time, "time lies in different dimensions of its arguments")
    return call.framewise(at.layout, [x, at])


@rule(*overloads("scatter.value scatter.src scatter_add.default scatter_reduce.two"))
def scatter(call: Call) -> Fact:
    """``out[i, index[i, j]] = src[i, j]``: within frames."""
    x, at, src = call.stream("self"), call.stream("index"), call.samples[0].get("src")
    call.require(src is None or isinstance(call.facts[src], Value), "its source does not depend on time but others do")
    nodes = [n for n in (call.samples[0]["self"], call.samples[0]["index"], src) if n is not None]
    values = [call.facts[n] for n in nodes]
    if len({v.layout[v.layout.time] for v in values}) > 1:
        values = [call.ungroup(v) for v in values]
    x, at = values[:2]
    call.require(len({v.layout.time for v in values}) == 1, "time lies in different dimensions of its arguments")
    axis = call.arg("dim") % len(x.layout)
    call.require(axis != x.layout.time, "frames are written at indices that depend on the data")
    size = call.out_sizes[axis][0]
    call.require(len({(v.rate, v.lengths) for v in values}) == 1, "its arguments have different lengths in time")

    def lower(b: Any, op: Op, windows: list[Window], span: range, carries: Any) -> Any:
        if b.masked:  # of frames that do not exist indices may be anything
            fitting = b.aten("clamp.default", windows[1].node, 0, size - 1)
            windows = [windows[0], Window(fitting, windows[1].start, windows[1].stop), *windows[2:]]
        return lower_call(b, op, windows, span, carries)

    return call.emit(x.layout, [read(v) for v in values], length_of=[x], lower=lower, nodes=nodes)


@rule(*overloads("index_put.default _unsafe_index_put.default"))
def index_put(call: Call) -> Fact:
    """``x[x < 0] = 0``, or ``x[:, channels] = ...``: entries of frames overwritten."""
    args = call.samples[0]
    x, indices, written = call.maybe("self"), list(args["indices"]), args["values"]
    mask = indices[0]
    if len(indices) == 1 and mask is not None and mask.meta["val"].dtype == torch.bool:
        call.require(written.meta["val"].numel() == 1 and not call.arg("accumulate", False), "a number for each entry")
        call.require(isinstance(call.fact(written), Static), "what is written depends on time")
        return _where(call, mask, written)
    at = [i for i, n in enumerate(indices) if n is not None]
    given = [indices[i] for i in at]
    call.require(x is not None and at == list(range(at[0], at[-1] + 1)), "frames of something without time are written")
    assert x is not None
    fixed = all(isinstance(call.fact(n), Static) and n.meta["val"].dtype != torch.bool for n in given)
    call.require(fixed, "indices that depend on time")
    call.require(x.layout.time not in at, "chosen frames of the clip are overwritten")
    into = Layout(
        (
            *x.layout.dims[: at[0]],
            *_broadcast([call.static_layout(n) for n in given], call),
            *x.layout.dims[at[-1] + 1 :],
        )
    )
    new = call.fact(written)
    if isinstance(new, Value):
        call.require(new.layout == into, "what is written has another shape")
        return call.framewise(x.layout, [x, new])
    lying = len(written.meta["val"].shape) - (len(into) - into.time)
    call.require(lying < 0 or written.meta["val"].shape[lying] == 1, "what is written lies along the time axis")
    return call.framewise(x.layout, [x])


def _where(call: Call, mask: Any, written: Any) -> Fact:
    """``x[mask] = number`` as a choice."""
    node = call.samples[0]["self"]
    facts = {n: call.ungroup(f) for n in (node, mask) if isinstance(f := call.facts[n], Value)}
    more = node.meta["val"].dim() - mask.meta["val"].dim()
    call.require(
        len({v.layout.time for v in facts.values()}) == 1, "time lies in different dimensions of its arguments"
    )
    time = next(iter(facts.values())).layout.time
    for n in (node, mask):
        lying = n not in facts and time < n.meta["val"].dim() and n.meta["val"].shape[time] != 1
        call.require(not lying, "something without time lies along the time axis")
    whole = facts.get(node)
    call.require(whole is not None, "frames of something without time are written")
    assert whole is not None

    def lower(b: Any, op: Op, windows: list[Window], span: range, _: Any) -> Any:
        given = dict(zip(facts, windows, strict=True))
        where = given[mask].node if mask in given else b.static(mask)
        for _i in range(more):
            where = b.aten("unsqueeze.default", where, -1)
        return b.aten("where.self", where, b.static(written), given[node].node)

    return call.framewise(whole.layout, list(facts.values()), lower)


@rule(*overloads("index_fill.int_Scalar index_fill.int_Tensor index_copy.default index_add.default"))
def index_fill(call: Call) -> Fact:
    """Chosen entries of a dimension overwritten or added to."""
    x = call.stream("self")
    axis = call.arg("dim") % len(x.layout)
    call.require(axis != x.layout.time, "chosen frames of the clip are overwritten")
    call.require(isinstance(call.fact(call.samples[0]["index"]), Static), "indices that depend on time")
    others = [v for v in call.streams if v is not x]
    call.require(
        all(v.layout.time == x.layout.time for v in others), "time lies in different dimensions of its arguments"
    )
    source = call.samples[0].get("source")
    fixed = source is not None and not isinstance(call.fact(source), Value)
    call.require(not fixed, "its source does not depend on time but others do")
    return call.framewise(x.layout)


@rule(*overloads("bucketize.Tensor searchsorted.Tensor"))
def bucketize(call: Call) -> Fact:
    """Between which boundaries each entry lies."""
    limits: Any = call.samples[0].get("boundaries", call.samples[0].get("sorted_sequence"))
    one = isinstance(call.fact(limits), Static) and limits.meta["val"].dim() == 1
    call.require(one and call.samples[0].get("sorter") is None, "boundaries for each frame")
    return call.framewise(call.stream("input" if "input" in call.samples[0] else "self").layout)


@rule(*overloads("grid_sampler.default grid_sampler_2d.default grid_sampler_3d.default"))
def grid_sample(call: Call) -> Fact:
    """Pictures read at places: each picture of a batch that holds the frames by itself."""
    call.require(all(v.layout.time == 0 for v in call.streams), "frames are read at places that depend on the data")
    call.require(len(call.streams) == 2, "the same pictures, or the same places, for all frames")
    call.require(len({v.layout[0] for v in call.streams}) == 1, "time is folded differently in its arguments")
    return call.framewise(Layout((call.streams[0].layout[0], *(dim(s[0]) for s in call.out_sizes[1:]))))


@rule(*overloads("affine_grid_generator.default"))
def affine_grid(call: Call) -> Fact:
    """The places of an affine map of a picture, for each of a batch that holds the frames."""
    x = call.stream("theta")
    call.require(x.layout.time == 0, "time lies in the maps")
    layout = Layout((x.layout[0], *(dim(s[0]) for s in call.out_sizes[1:])))
    size = list(call.samples[0]["size"])[1:]

    def lower(b: Any, op: Op, windows: list[Window], span: range, _: Any) -> Any:
        return b.call(op, windows, size=[b.sizes(layout, len(span))[0], *size])

    return call.framewise(layout, [x], lower)


SAMPLES = [
    Sample("written", lambda: _Written(), (2, 4, 9)),
    Sample("warped", lambda: _Warped(), (2, 9, 3, 4, 4), 1),
    Sample("table", lambda: _Table(), (2, 9, 3), 1),
    Sample("chosen_channels", lambda: _Chosen(), (2, 4, 9)),
]


class _Table(nn.Module):
    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.randn(2, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, 3): entries of tables at indices that are made of frames, two frames late."""
        at = ((x[..., 0] > 0).long() + (x[..., 1] > 0).long())[:, :-2] * 2
        kept = torch.gather(x[:, 2:], 2, at[..., None].clamp(max=2))
        row = torch.gather(self.scale[:1].expand(x.shape[0], -1), 1, at)
        return self.scale[1][at] + self.scale[at // 4, at] + kept[..., 0] + row


class _Chosen(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 4, time): some channels, in another order."""
        return x[:, [2, 0, 3]] + x[:, torch.tensor([1, 1, 2])]


class _Written(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 4, time): the two largest channels kept, added up by levels, and a class for the largest."""
        best, at = x.topk(2, dim=1)
        kept = torch.zeros_like(x).scatter(1, at, best) + x.scatter(1, at, 0.5)
        levels = torch.bucketize(x.contiguous(), torch.tensor([-0.5, 0.0, 0.5]))
        added = torch.zeros_like(x).scatter_add(1, levels, x)
        return kept + added + F.one_hot(x.argmax(1), 4).transpose(1, 2)


class _Warped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, 3, height, width): each picture turned by its own means."""
        flat = x.flatten(0, 1)
        turn = flat.mean((2, 3)).repeat(1, 2).view(-1, 2, 3) + torch.eye(2, 3)
        grid = F.affine_grid(turn, list(flat.shape), align_corners=False)
        return F.grid_sample(flat, grid, align_corners=False).view_as(x)
