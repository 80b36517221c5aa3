"""What is written in place, in any way, is put into new tensors by a rewrite of the graph, with the same numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.export import Dim, export

import cofx
from cofx.passes.functionalize import functionalize, needs_functionalization

X = torch.arange(48.0).reshape(2, 6, 4).sin()
WRITES: dict[str, Callable[[torch.Tensor], object]] = {}


def writes(function: Callable[[torch.Tensor], object]) -> Callable[[torch.Tensor], object]:
    WRITES[function.__name__] = function
    return function


@writes
def frames_one_by_one(x):
    out = torch.zeros_like(x)
    for t in range(3):
        out[:, t] = x[:, t] + (out[:, t - 1] if t else 0)
    return out


@writes
def view_read_after_a_write_to_the_whole(x):
    y = x.clone()
    part = y[:, 1:]
    y.mul_(2)
    return part + 1


@writes
def whole_read_after_a_write_to_a_view(x):
    y = x.clone()
    y[:, 1:].mul_(2)
    return y


@writes
def sibling_views(x):
    y = x.clone()
    left, right = y[..., :3], y[..., 1:]
    left.add_(right[..., :3])
    right.neg_()
    return left, right, y


@writes
def view_of_a_view_of_a_view(x):
    y = x.clone()
    y.transpose(1, 2).reshape(2, 2, 2, 6)[:, 0].unsqueeze(1)[..., ::2].fill_(3)
    y.permute(2, 0, 1)[1].copy_(x[..., 0])
    return y


@writes
def result_of_a_write_is_the_view(x):
    y = x.clone()
    again = y[:, 0].add_(1)
    again.mul_(3)
    return y, again


@writes
def parts_of_a_split(x):
    y = x.clone()
    a, b = y.split(2, -1)
    c, *_ = y.unbind(1)
    a.sub_(b)
    c[:] = 1
    first, second = y.chunk(2, dim=1)
    second.zero_()
    return a, b, c, first, y


@writes
def flattened_and_squeezed(x):
    y = x.clone()
    y.flatten(1)[:, 3] = 7
    y.unsqueeze(0).squeeze(0)[0, 0] = x[1, 1]
    y.view(-1)[5] = 0
    return y


@writes
def reshape_that_copies(x):
    y = x.clone().transpose(1, 2)
    flat = y.reshape(2, -1)
    y[:, 0] = 0
    return flat, y


@writes
def diagonal_and_masked(x):
    y = x[:, :4].clone()
    y.diagonal(0, 1, 2).zero_()
    y[:, 1:].masked_fill_(y[:, 1:] > 0, -1)
    return y


@writes
def read_through_an_expansion(x):
    y = x[:, :1].clone()
    wide = y.expand(-1, 6, -1)
    y[..., 0] = 5
    return wide + x


@writes
def swapped_parts(x):
    y = x.clone()
    y[..., :2], y[..., 2:] = y[..., 2:].clone(), y[..., :2].clone()
    return y


class Writes(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x):
        return WRITES[self.name](x)


@pytest.mark.filterwarnings("ignore:Raw SymInt")  # which `quiet` silences where models are traced
@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("open_sizes", [False, True], ids=["fixed", "open"])
def test_same_numbers(name: str, open_sizes: bool) -> None:
    model = Writes(name).eval()
    dims = {0: Dim.AUTO} if open_sizes else None
    program = export(model, (X,), dynamic_shapes=(dims,), strict=False)
    assert needs_functionalization(program.graph)
    assert functionalize(program.graph)
    program.graph.lint()
    ops = [n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert [op for op in ops if op._schema.is_mutable] in ([], [torch.ops.aten.detach_.default])
    if not open_sizes:
        specs = program.graph_signature.input_specs
        given = [X if s.kind.name == "USER_INPUT" else program.constants[s.target] for s in specs]
        found = torch.fx.Interpreter(program.graph_module, graph=program.graph).run(*given)
        wanted = torch.utils._pytree.tree_leaves(model(X))
        for mine, other in zip(torch.utils._pytree.tree_leaves(found), wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=0)
    step = cofx.compile(model, X, time_dim=1)
    assert step.verify(X).exact


def by_stride(x):
    y = x.clone()
    y.as_strided((2, 3), (24, 1), 1).zero_()
    return y


def by_a_split_of_another_kind(x):
    y = x.clone()
    y.tensor_split(2, -1)[0].zero_()
    return y


@pytest.mark.parametrize("forward", [by_stride, by_a_split_of_another_kind], ids=lambda f: f.__name__)
def test_what_is_not_known_is_left_to_torch(forward, monkeypatch) -> None:
    monkeypatch.setitem(WRITES, forward.__name__, forward)
    program = export(Writes(forward.__name__), (X,), strict=False)
    before = str(program.graph)
    assert not functionalize(program.graph) and str(program.graph) == before
