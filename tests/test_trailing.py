"""Ops on each frame by itself, all frames at once: what stands between a trailing form and the stream again."""

import pytest
import torch

from cofx.passes.trailing import per_frame

aten = torch.ops.aten
F = torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(0))  # 5 frames of (2, 3, 4)
FLAT, ONE = F.flatten(2), torch.randn(4, 6)
CALLS = {
    "softmax": (aten.softmax.int, (F, 1), {}),
    "softmax from the end": (aten.softmax.int, (F, -2), {}),
    "over two dimensions": (aten.sum.dim_IntList, (F, [0, -1]), {}),
    "over all": (aten.sum.default, (F,), {}),
    "over all, by no dimensions": (aten.amax.default, (F,), {}),
    "permuted": (aten.permute.default, (F, [2, 0, -2]), {}),
    "turned": (aten.transpose.int, (F, 0, 2), {}),
    "in another shape": (aten.reshape.default, (F, [3, -1]), {}),
    "flat": (aten.flatten.using_ints, (F, 1), {}),
    "flat from the first dimension on": (aten.flatten.using_ints, (F,), {}),
    "wider": (aten.unsqueeze.default, (F, 0), {}),
    "joined": (aten.cat.default, ([F, F.exp()], 1), {}),
    "product": (aten.matmul.default, (F, F.mT), {}),
    "product with a constant": (aten.matmul.default, (F, ONE), {}),
    "product of a constant": (aten.matmul.default, (ONE.mT, F.mT), {}),
    "product of other ranks": (aten.matmul.default, (F, FLAT[:, :1, :4].mT), {}),
    "product with a vector": (aten.matmul.default, (F, ONE[:, 0]), {}),
    "product of matrices": (aten.mm.default, (FLAT, torch.randn(12, 3)), {}),
    "batched product": (aten.bmm.default, (F, F.mT), {}),
    "linear": (aten.linear.default, (FLAT, torch.randn(7, 12)), {}),
    "entries": (aten.add.Tensor, (F, torch.randn(4)), {"alpha": 2}),
    "gathered at one place": (aten.index_select.default, (F, 1, torch.tensor([2, 0])), {}),
    "maximum and where": (aten.max.dim, (F, 1), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_each_frame_is_as_if_alone(name: str) -> None:
    op, args, kwargs = CALLS[name]
    leaves, spec = torch.utils._pytree.tree_flatten((args, kwargs))
    framed = [isinstance(x, torch.Tensor) and x.dim() > 1 and x.shape[0] == 5 for x in leaves]

    def of_frame(t: int):
        a, k = torch.utils._pytree.tree_unflatten([x[t] if f else x for x, f in zip(leaves, framed, strict=True)], spec)
        return op(*a, **k)

    got = torch.utils._pytree.tree_leaves(per_frame(op, framed, args, kwargs))
    wanted = zip(*(torch.utils._pytree.tree_leaves(of_frame(t)) for t in range(5)), strict=True)
    for all_frames, each in zip(got, wanted, strict=True):
        torch.testing.assert_close(all_frames, torch.stack(each))


def test_the_usual_ops_need_no_vmap(monkeypatch) -> None:
    """Which would have the whole graph traced a second time."""
    monkeypatch.setattr(torch, "vmap", None)
    for name in ("softmax", "over two dimensions", "permuted", "in another shape", "flat", "joined", "product"):
        test_each_frame_is_as_if_alone(name)
