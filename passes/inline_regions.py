"""Regions of a traced graph that only set a mode (grad, autocast) are part of the graph like any other."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg


def inline_regions(graph: fx.Graph) -> fx.Graph:
    """The graph with all such regions inlined."""
    wrappers = {
        getattr(torch.ops.higher_order, n, None) for n in ("wrap_with_set_grad_enabled", "wrap_with_autocast")
    }
    if not any(n.target in wrappers for n in graph.nodes):
        return graph
    owner = graph.owning_module
    flat = fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.target not in wrappers:
            if node.op == "get_attr" and isinstance(getattr(owner, str(node.target), None), fx.GraphModule):
                continue
            if node.target is operator.getitem and isinstance(env.get(node.args[0]), (list, tuple)):
                env[node] = env[node.args[0]][node.args[1]]
            elif node.op == "output":
                flat.output(map_arg(node.args[0], lambda n: env[n]))
            else:
                env[node] = flat.node_copy(node, lambda n: env[n])
            continue
        at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
        inner = getattr(owner, str(node.args[at].target))
        operands = node.args[at + 1 :]
        names = [n for n in inner.graph.nodes if n.op == "placeholder"]
        inner_env = dict(zip(names, (env[a] if isinstance(a, fx.Node) else a for a in operands), strict=True))
        for n in inner_region(inner):
            if n.op == "output":
                env[node] = map_arg(n.args[0], lambda m: inner_env[m])
            elif n.op != "placeholder":
                inner_env[n] = flat.node_copy(n, lambda m: inner_env[m])
    return flat


def inner_region(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes of a region, with the regions inside it inlined."""
    return list(inline_regions(module.graph).nodes)
