"""Code generation: the names in an ONNX file.

Inputs and outputs have the names that a caller sees. Nodes and what they give are named after the module whose work
they are, ``encoder.0.conv1/Conv``, as Netron shows them; what starts, holds and ends lanes is ``lanes/Where``. Weights
have the names that the model has for them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import fx

from ..errors import module_path

if TYPE_CHECKING:
    from ..pipeline import Plan

OUTER = "cofx::"  # before the names of inputs and outputs until they are told from the graph's own
_LANES = "lanes"
_HELD = "module."  # before the names of what the program holds
_SCOPES = "pkg.torch.onnx.name_scopes"


def tell_modules(program: fx.GraphModule) -> None:
    """Write to each node of a generated program, in the form of torch.export, the module that it comes from."""
    for node in program.graph.nodes:
        timing = node.meta.get("cofx")
        path = _LANES if timing is None or timing.value.node is None else module_path(timing.value.node)
        node.meta["nn_module_stack"] = {"": ("", "Step")} | ({path: (path, "Module")} if path else {})


def name_values(model: Any, plan: Plan) -> None:
    """Give everything in a model its final name, and leave out what the exporter noted for itself."""
    graph = model.graph
    outer = {n: n.removeprefix(OUTER) for n in _values(graph) if n.startswith(OUTER)}
    taken = {*outer.values()}

    def unique(name: str) -> str:
        found, count = name, 0
        while found in taken:
            count += 1
            found = f"{name}_{count}"
        taken.add(found)
        return found

    names = dict(outer)
    weights = {_HELD + str(n.target).replace(".", "_"): str(n.target) for n in plan.graph.nodes if n.op == "get_attr"}
    for tensor in graph.initializer:
        names.setdefault(tensor.name, unique(weights.get(tensor.name, tensor.name.removeprefix(_HELD))))
    for node in graph.node:
        node.name = unique("/".join(filter(None, (_module(node), node.op_type))))
        for i, given in enumerate(n for n in node.output if n and n not in names):
            names[given] = unique(f"{node.name}.{i}") if i else node.name
    for inner in _graphs(graph):  # of loops and branches: only to be told from the others
        for name in _values(inner) - names.keys():
            names[name] = unique(name)
    _rename(graph, names)
    _forget(model)


def name_batch(model: Any) -> None:
    """The open batch size by its name, instead of the exporter's symbol for it."""
    symbol = (
        next(v for v in model.graph.input if v.name.startswith("state_in_")).type.tensor_type.shape.dim[0].dim_param
    )
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for d in value.type.tensor_type.shape.dim:
            if d.dim_param:
                d.dim_param = re.sub(rf"\b{symbol}\b", "batch", d.dim_param)


def _module(node: Any) -> str:
    """The path of the module that a node comes from; of what has none, that of the lanes."""
    told = next((p.value for p in node.metadata_props if p.key == _SCOPES), "[]")
    scopes: list[str] = ast.literal_eval(told)
    if not scopes or scopes[0] != "":  # made by torch.export
        return _LANES
    return scopes[-2] if len(scopes) > 1 else ""


def _graphs(graph: Any) -> Iterator[Any]:
    """All graphs within a graph."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
                yield from _graphs(attribute.g)


def _values(graph: Any) -> set[str]:
    """The names of all values in a graph."""
    named = [*graph.input, *graph.output, *graph.initializer, *graph.value_info]
    return {v.name for v in named} | {n for node in graph.node for n in (*node.input, *node.output) if n}


def _rename(graph: Any, names: dict[str, str]) -> None:
    for one in (graph, *_graphs(graph)):
        for value in (*one.input, *one.output, *one.initializer, *one.value_info):
            value.name = names.get(value.name, value.name)
        for node in one.node:
            for field in (node.input, node.output):
                field[:] = [names.get(n, n) for n in field]


def _forget(model: Any) -> None:
    """Clear what the exporter notes: paths of this machine among it."""
    for one in (model.graph, *_graphs(model.graph)):
        for noted in (one, *one.node, *one.input, *one.output, *one.initializer, *one.value_info):
            del noted.metadata_props[:]
            noted.doc_string = ""


__all__ = ["OUTER", "name_batch", "name_values", "tell_modules"]
