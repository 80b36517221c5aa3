"""Which tensors of a program share memory."""

from __future__ import annotations

import operator

import torch
from torch import fx


def base(node: fx.Node) -> fx.Node:
    """The node whose memory a node's result is: itself, unless it is a view."""
    while (source := _viewed(node)) is not None:
        node = source
    return node


def _viewed(node: fx.Node) -> fx.Node | None:
    if node.target is operator.getitem:
        source = node.args[0]
        return source if isinstance(source, fx.Node) else None
    if isinstance(node.target, torch._ops.OpOverload):
        for argument, schema in zip(node.args, node.target._schema.arguments, strict=False):
            if schema.alias_info is not None and isinstance(argument, fx.Node):
                return argument
    return None
