"""Permutations that are no copies: the same numbers from any program, and none left where none is needed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import cofx
from cofx.passes.codegen.key import Key
from cofx.passes.codegen.lower import shapes_of
from cofx.passes.codegen.orders import Orders
from cofx.passes.codegen.session import as_module

aten = torch.ops.aten
SIZES = (1, 2, 3, 4)


class Maker:
    """A random program on tensors of up to four dimensions, drawn op by op."""

    def __init__(self, draw):
        self.draw, self.graph, self.tensors, self.values = draw, fx.Graph(), {}, {}

    def one_of(self, options):
        return self.draw(st.sampled_from(list(options)))

    def call(self, target, *args, **kwargs):
        node = self.graph.call_function(target, args, kwargs)
        value = fx.node.map_arg((args, kwargs), self.values.__getitem__)
        self.values[node] = target(*value[0], **value[1])
        return node

    def held(self, shape):
        name = f"held_{len(self.tensors)}"
        self.tensors[name] = torch.randn(shape)
        node = self.graph.get_attr(name, type_expr=None)
        self.values[node] = self.tensors[name]
        return node

    def argument(self, i):
        shape = [self.one_of(SIZES) for _ in range(self.one_of((2, 3, 4)))]
        node = self.graph.placeholder(f"x{i}")
        self.values[node] = torch.randn(shape)

    def node(self):
        return self.one_of(n for n in self.values if n.op != "get_attr")

    def permutation(self, rank):
        return list(self.draw(st.permutations(range(rank))))

    def step(self):
        x = self.node()
        size = list(self.values[x].shape)
        rank = len(size)
        dim = self.one_of(range(rank)) if rank else 0
        kind = self.one_of(
            ("permute", "permute", "reshape", "add", "held", "cat", "slice", "select", "mean", "linear", "left", "relu")
        )
        if not rank:
            return
        if kind == "permute":
            self.call(aten.permute.default, x, self.permutation(rank))
        elif kind == "reshape":
            self.call(aten.reshape.default, x, self.reshaped(size))
        elif kind == "add":
            same = [n for n in self.values if broadcasts(self.values[n].shape, size)]
            self.call(aten.add.Tensor, x, self.one_of(same))
        elif kind == "held":
            shape = [self.one_of((1, n)) for n in size][self.one_of(range(rank)) :]
            self.call(aten.mul.Tensor, x, self.held(shape))
        elif kind == "cat":
            same = [n for n in self.values if list(self.values[n].shape) == size]
            self.call(aten.cat.default, [x, self.one_of(same)], dim)
        elif kind == "slice":
            self.call(aten.slice.Tensor, x, dim, 0, max(1, size[dim] - 1))
        elif kind == "select" and rank > 1:
            self.call(aten.select.int, x, dim, -1)
        elif kind == "mean":
            self.call(aten.mean.dim, x, [dim - rank], self.one_of((True, False)))
        elif kind == "linear":
            self.call(aten.linear.default, x, self.held([3, size[-1]]), self.held([3]))
        elif kind == "left" and rank == 3:
            self.call(aten.matmul.default, self.held([3, size[1]]), x)
        elif kind == "relu":
            self.call(aten.relu.default, x)

    def reshaped(self, size):
        """Some dimensions joined, split, or of size 1."""
        i = self.one_of(range(len(size)))
        how = self.one_of(("join", "split", "unit", "flat"))
        if how == "join" and i:
            return [*size[: i - 1], size[i - 1] * size[i], *size[i + 1 :]]
        if how == "split" and size[i] % 2 == 0:
            return [*size[:i], 2, size[i] // 2, *size[i + 1 :]]
        if how == "unit":
            return [*size[:i], 1, *size[i:]]
        return [math.prod(size)] if how == "flat" else size


def broadcasts(size, to):
    return len(size) <= len(to) and all(n in (1, m) for n, m in zip(reversed(size), reversed(to), strict=False))


@settings(max_examples=150, deadline=None)
@given(st.data())
@torch.no_grad()
def test_random_programs(data):
    torch.manual_seed(0)
    maker = Maker(data.draw)
    for i in range(2):
        maker.argument(i)
    for _ in range(data.draw(st.integers(1, 12))):
        maker.step()
    results = tuple(n for n in maker.values if n.op == "call_function")[-3:]
    maker.graph.output(results)
    arguments = [n for n in maker.graph.nodes if n.op == "placeholder"]
    shapes = [(tuple(maker.values[n].shape), torch.float32) for n in arguments]
    sizes = shapes_of(maker.graph, maker.tensors, shapes)
    given = {n: tuple(maker.permutation(len(sizes[n]))) for n in arguments}
    wanted = [data.draw(st.one_of(st.none(), st.just(tuple(maker.permutation(len(sizes[n])))))) for n in results]
    turned = Orders(maker.graph, sizes, maker.tensors, given, wanted)
    found = as_module(turned.graph, turned.tensors)(
        *(maker.values[n].permute(given[n]).contiguous() for n in arguments)
    )
    for node, order, got in zip(results, wanted, found, strict=True):
        want = maker.values[node]
        torch.testing.assert_close(got, want if order is None else want.permute(order))


class Skeleton(nn.Module):
    """(batch, 64, time, 25) -> the same: graph convolutions and convolutions over time, as ST-GCN has them."""

    def __init__(self):
        super().__init__()
        self.mix = nn.ModuleList(nn.Conv2d(64, 192, 1) for _ in range(2))
        self.over_time = nn.ModuleList(nn.Conv2d(64, 64, (5, 1), padding=(2, 0)) for _ in range(2))
        self.norm = nn.ModuleList(nn.BatchNorm2d(64) for _ in range(2))
        self.register_buffer("joints", torch.randn(3, 25, 25))

    def forward(self, x):
        for mix, norm, over_time in zip(self.mix, self.norm, self.over_time, strict=True):
            y = mix(x).unflatten(1, (3, 64))
            y = norm(torch.einsum("nkctv,kvw->nctw", y, self.joints)).relu()
            x = (over_time(y) + x).relu()
        return x


@torch.no_grad()
def test_graph_convolutions_need_no_copies():
    """But for the joints that come in and go out, everything has its channels last."""
    torch.manual_seed(0)
    clip = torch.randn(2, 64, 12, 25)
    step = cofx.compile(Skeleton().eval(), clip)
    program = step.compiled.program(Key(0, 1, frames=True, apart=True, kernels=False))
    arguments = [n for n in program.graph.nodes if n.op == "placeholder"]
    shapes = [((2, 64, 25), torch.float32)] * len(arguments)
    sizes = shapes_of(program.graph, program.tensors, shapes)
    graph = fx.Graph()
    results, after = graph.graph_copy(program.graph, copied := {})
    graph.output((*results, *after))
    sizes = {copied[n]: size for n, size in sizes.items()}
    last = (0, 2, 1)
    given = {copied[n]: last for n in arguments[1:]}
    turned = Orders(graph, sizes, program.tensors, given, [None, *[last] * len(after)])
    assert sum(n.target is aten.permute.default for n in graph.nodes) == 20
    assert sum(n.target is aten.permute.default for n in turned.graph.nodes) == 2


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_state_that_is_kept_channels_last_is_a_state_as_any(backend):
    torch.manual_seed(0)
    model, clip = Skeleton().eval(), torch.randn(2, 64, 30, 25)
    step, plain = cofx.compile(model, clip[:, :, :12], backend=backend), cofx.compile(model, clip[:, :, :12])
    with torch.no_grad():
        for x in clip[:, :, :20].unbind(2):
            got, want = step.forward_step(x), plain.forward_step(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        for mine, other in zip(step.get_state().values(), plain.get_state().values(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
        plain.set_state(step.get_state())
        torch.testing.assert_close(step.forward_steps(clip[:, :, 20:]), plain.forward_steps(clip[:, :, 20:]))
