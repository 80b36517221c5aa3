"""How passes edit a canonical graph: nodes that know their arguments and their shape at every sample point."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from .canonicalize import bind
from .layout import Sizes


def sizes_of(node: fx.Node) -> list[Sizes]:
    """A shape: for each dimension its sizes at the sample points."""
    return list(zip(*node.meta["sizes"], strict=True))


def moves(node: fx.Node) -> bool:
    """Whether the shape is not the same at all sample points."""
    return len(set(node.meta["sizes"])) > 1


def order_of(node: fx.Node) -> list[int] | None:
    """For each dimension of a permutation the one that it is of what is permuted; None if it is no permutation."""
    args, rank = node.meta["samples"][0], len(node.meta["sizes"][0])
    if node.target is torch.ops.aten.permute.default:
        return [d % rank for d in args["dims"]]
    if node.target not in _SWAPS:
        return None
    order = list(range(rank))
    one, two = args.get("dim0", -1) % rank, args.get("dim1", -2) % rank
    order[one], order[two] = two, one
    return order


_SWAPS = (torch.ops.aten.transpose.int, torch.ops.aten.mT.default, torch.ops.aten.t.default)


def take_place(old: fx.Node, new: fx.Node) -> None:
    """Let all that read one node read another."""
    users = list(old.users)
    old.replace_all_uses_with(new, propagate_meta=False)
    for user in users:
        user.meta["samples"] = [map_arg(s, lambda n: new if n is old else n) for s in user.meta.get("samples", [])]


def call_at(graph: fx.Graph, like: fx.Node, target: Any, calls: list[Any], sizes: list[Any], value: Any) -> fx.Node:
    """A call with its arguments and its result's shape at each sample point, before the node `like`."""
    with graph.inserting_before(like):
        node = graph.call_function(target, *calls[0])
    node.meta = {k: like.meta[k] for k in ("stack_trace", "nn_module_stack", "traced") if k in like.meta}
    node.meta |= {"val": value, "samples": [bind(target, *c) for c in calls], "sizes": list(sizes)}
    return node
