"""Regions of a traced graph that only set a mode (grad, autocast) are part of the graph like any other."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg


def inline_regions(graph: fx.Graph) -> fx.Graph:
    """The graph with all such regions inlined."""
    wrappers = {getattr(torch.ops.higher_order, n, None) for n in ("wrap_with_set_grad_enabled", "wrap_with_autocast")}
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
        env[node] = _inlined(flat, node, owner, env)
    return flat


def _inlined(flat: fx.Graph, node: fx.Node, owner: Any, env: dict[fx.Node, Any]) -> Any:
    """Copy a region's nodes into `flat`; returns what the region returns."""
    at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
    inner = inline_regions(getattr(owner, str(node.args[at].target)).graph)  # type: ignore[union-attr]
    given = (env[a] if isinstance(a, fx.Node) else a for a in node.args[at + 1 :])
    inside: dict[fx.Node, Any] = dict(zip((n for n in inner.nodes if n.op == "placeholder"), given, strict=True))
    for n in inner.nodes:
        if n.op == "output":
            return map_arg(n.args[0], inside.__getitem__)
        if n.op != "placeholder":
            inside[n] = flat.node_copy(n, inside.__getitem__)
    return None
