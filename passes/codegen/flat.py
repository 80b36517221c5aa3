"""What runs of a generated program: its graph as one flat Python function.

A GraphModule looks every parameter up on itself and calls every op through its `OpOverload`, which parses its arguments
by the schema at each call. Here tensors are bound once, and ops are called by torch's own Python functions where those
are the same function: an aten packet's overloads are one function in `torch._C`, and with arguments of just the types
that the overload's schema names, the one picked does what the overload does.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_NUMBERS = {"int", "SymInt", "float", "bool", "number", "Scalar"}


def flatten(graph: fx.Graph, tensors: Mapping[str, torch.Tensor]) -> Callable[..., Any]:
    """A function with the arguments and results of a graph that calls functions only; `tensors`: its attributes."""
    scope: dict[str, Any] = {}
    names: dict[fx.Node, str] = {}
    lines: list[str] = []
    arguments: list[str] = []
    dies = _last_uses(graph)
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = f"v{len(names)}"
            arguments.append(names[node])
        elif node.op == "get_attr":
            names[node] = f"c{len(names)}"
            scope[names[node]] = tensors[str(node.target)]
        elif node.op == "call_function":
            text = _call(node, names, scope)
            names[node] = f"v{len(names)}"
            freed = "".join(f"; {names[n]} = None" for n in dies.get(node, ()) if n.op != "get_attr")
            lines.append(f"    {names[node]} = {text}{freed}")
        elif node.op == "output":
            lines.append(f"    return {_text(node.args[0], names, scope)}")
        else:
            raise AssertionError(f"a step program has no {node.op}")
    source = f"def step({', '.join(arguments)}):\n" + "\n".join(lines) + "\n"
    exec(compile(source, "<cofx step program>", "exec"), scope)
    function: Callable[..., Any] = scope["step"]
    return function


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node the values that nobody needs after it."""
    seen: set[fx.Node] = set()
    dies: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                dies.setdefault(node, []).append(used)
    return dies


def _call(node: fx.Node, names: dict[fx.Node, str], scope: dict[str, Any]) -> str:
    """The Python expression of a node."""
    target = node.target
    if target is aten.slice.Tensor and _constant_slice(node):
        source, axis, *bounds = list[Any](node.args)
        scope[place := f"s{len(scope)}"] = (*[slice(None)] * axis, slice(*bounds))
        return f"{_text(source, names, scope)}[{place}]"
    if target is aten.sym_size.int:
        return f"{_text(node.args[0], names, scope)}.shape[{node.args[1]}]"
    if target is operator.getitem:
        return f"{_text(node.args[0], names, scope)}[{_text(node.args[1], names, scope)}]"
    function = builtin(node) or target
    name = f"f_{str(target).replace('.', '_')}" if isinstance(target, torch._ops.OpOverload) else f"f{len(scope)}"
    if scope.setdefault(name, function) is not function:
        scope[name := f"f{len(scope)}"] = function
    parts = [_text(a, names, scope) for a in node.args]
    parts += [f"{k}={_text(v, names, scope)}" for k, v in node.kwargs.items()]
    return f"{name}({', '.join(parts)})"


def _constant_slice(node: fx.Node) -> bool:
    """Whether a slice's dimension and bounds are numbers that indexing understands."""
    if node.kwargs or len(node.args) < 2:
        return False
    axis, *bounds = node.args[1:]
    return isinstance(axis, int) and axis >= 0 and all(b is None or isinstance(b, int) for b in bounds)


def _text(value: Any, names: dict[fx.Node, str], scope: dict[str, Any]) -> str:
    """An argument as Python source; what has none is bound by a name."""
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (tuple, list)):
        parts = [_text(v, names, scope) for v in value]
        return f"({', '.join(parts)},)" if parts else "()"
    if value is None or isinstance(value, (bool, int)):
        return repr(value)
    scope[name := f"k{len(scope)}"] = value
    return name


def builtin(node: fx.Node) -> Any:
    """torch's Python function that does what a node's overload does on such arguments; None if there is none."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    schema = target._schema
    packet = schema.name.removeprefix("aten::")
    if schema.is_mutable and not packet.endswith("_"):
        return None
    function = getattr(torch._C._VariableFunctions, packet, None) or getattr(torch._C._nn, packet, None)
    if function is None or getattr(torch, packet, function) is not function:  # in front of which torch has its own
        return None
    given = dict(zip((a.name for a in schema.arguments if not a.kwarg_only), node.args, strict=False)) | node.kwargs
    kinds = {a.name: str(a.type) for a in schema.arguments}
    return function if all(_fits(v, kinds[k]) for k, v in given.items()) else None


def _fits(value: Any, kind: str) -> bool:
    """Whether an argument is just of the type that the schema names, as far as Python's functions tell types apart."""
    optional = kind.startswith("Optional[")
    if optional:
        kind = kind[len("Optional[") : -1]
        if value is None:
            return True
    if kind.startswith("List["):
        inner = kind[len("List[") : -1].removeprefix("Optional[").removesuffix("]")  # (None in a list is not taken)
        return isinstance(value, (tuple, list)) and all(_fits(v, inner) for v in value)
    if kind == "Tensor":
        return isinstance(value, fx.Node) and not _number(value)
    if isinstance(value, (torch.dtype, torch.memory_format)):
        return kind == "int"  # so the schema names them
    if kind in _NUMBERS:
        return _number(value) if isinstance(value, fx.Node) else isinstance(value, (bool, int, float))
    return kind == "str" and isinstance(value, str)


def _number(node: fx.Node) -> bool:
    """Whether a node gives an integer, not a tensor."""
    return node.target in (aten.sym_size.int, operator.mul, operator.add)
