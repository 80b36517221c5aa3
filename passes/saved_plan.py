"""A plan as data, and back: what tracing has found, so that it need not be done again.

The canonical graph is written as JSON, its tensors apart; all that follows from the graph (facts, schedule, programs)
is worked out anew when it is read, in milliseconds. Reading executes nothing: a file names ops, which are looked up
among torch's own, and numbers.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from .capture import Capture, Clock, Point
from .errors import CompileError, module_path, user_frame
from .loops import Collected, Loop
from .pipeline import Plan, plan_of

NAMESPACES = ("aten", "prims", "torchvision")
PYTHON = {f.__name__: f for f in (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv)}
TYPES = (torch.dtype, torch.layout, torch.memory_format)
UNREAD = ("from_file",)  # ops that open files


class SavedPlanError(CompileError):
    """A plan cannot be written, or what was read is none."""


class SavedModel(nn.Module):
    """What stands for the module of a step model that was loaded: its parameters, under their own names."""

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        parameters: Mapping[str, bool],
        record: Any,
        extra: Mapping[str, torch.Tensor],
    ) -> None:
        """
        Args:
            tensors: by their names in the module.
            parameters: the names of those that are parameters, and whether they want gradients.
            record, extra: the plan, see `encode_plan`.
        """
        super().__init__()
        self.record, self.extra = record, dict(extra)
        made: dict[int, nn.Parameter] = {}  # one for all names of a tensor
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            home: nn.Module = self
            for part in path:
                if part not in home._modules:
                    home.add_module(part, nn.Module())
                home = home._modules[part]  # type: ignore[assignment]
            if name in parameters:
                made.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=parameters[name]))
                home.register_parameter(last, made[id(tensor)])
            else:
                home.register_buffer(last, tensor)

    def forward(self, *inputs: Any) -> Any:
        """There is no offline model in a file.

        Raises:
            SavedPlanError: always.
        """
        raise SavedPlanError(
            "a step model that was loaded from a file has no offline model, and cannot be traced again\n    try     "
            "forward_step and forward_steps; or compile the module itself, for forward, verify and other batch sizes"
        )


# -- writing -----------------------------------------------------------------------------------------------------------


def encode_plan(plan: Plan, options: Mapping[str, Any], ends: Mapping[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """A plan as JSON, and the tensors that it names beside the module's own.

    Args:
        plan: to be written.
        options: of `pipeline.plan_of`: equivalence, newest, context.
        ends: lengths at which a stream may end, see `runtime.onnx_meta.may_end`.

    Raises:
        SavedPlanError: it holds something that has no form in a file.
    """
    captured = plan.capture
    try:
        out_spec = pytree.treespec_dumps(captured.out_spec)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise SavedPlanError(f"the structure of the model's output has no form in a file: {error}") from error
    record = {
        "graph": _graph(plan.graph),
        "inputs": list(captured.inputs),
        "out_spec": out_spec,
        "points": [[p.batch, p.ticks] for p in captured.points],
        "open": [captured.symbolic_batch, captured.symbolic_time],
        "clock": [list(plan.clock.time_dims), list(plan.clock.batch_dims), list(plan.clock.frames)],
        "limit": None if plan.limit is None else list(plan.limit),
        "branch": plan.branch,
        "ends": dict(ends),
        "options": dict(options),
        "replaced": list(plan.replaced),
    }
    extra = {f"constant:{k}": v for k, v in captured.constants.items()}
    return record, extra | {f"read:{k}": v for k, v in captured.read.items()}


def _graph(graph: fx.Graph) -> Any:
    index = {n: i for i, n in enumerate(graph.nodes)}
    return [_node(n, index) for n in graph.nodes]


def _node(node: fx.Node, index: Mapping[fx.Node, int]) -> Any:
    target: Any = node.target
    if isinstance(target, Loop):
        target = {"loop": _loop(target, index)}
    elif node.op == "call_function":
        target = _target_name(node)
    encoded = {"op": node.op, "name": node.name, "target": target, "args": _value(node.args, index)}
    if node.kwargs:
        encoded["kwargs"] = _value(dict(node.kwargs), index)
    if node.op != "output":
        encoded |= _meta(node.meta, index) | {"line": user_frame(node), "module": module_path(node)}
    return encoded


def _meta(meta: Mapping[str, Any], index: Mapping[fx.Node, int]) -> dict[str, Any]:
    """What is known of a node: its dtypes and device, its sizes and arguments at the sample points."""
    known = {"is": _kind(meta.get("val"))}
    return known | {k: _value(meta[k], index) for k in ("sizes", "samples") if k in meta}


def _kind(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return [_name(value.dtype), str(value.device)]
    return {"several": [_kind(v) for v in value]} if isinstance(value, (list, tuple)) else None


def _loop(loop: Loop, index: Mapping[fx.Node, int]) -> Any:
    return {
        "body": _graph(loop.body),
        "starts": [_graph(g) for g in loop.starts],
        "dims": loop.dims,
        "squeezed": loop.squeezed,
        "results": [[r.how, r.dim, r.skipped] for r in loop.results],
        "carried": [_meta({k: v for k, v in m.items() if k != "samples"}, index) for m in loop.carried],
        "widths": loop.widths,
        "ramps": [list(r) for r in loop.ramps],
    }


def _target_name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace in NAMESPACES:
        return str(target)
    if PYTHON.get(getattr(target, "__name__", "")) is target:
        return f"operator.{target.__name__}"
    raise SavedPlanError(f"{target} has no form in a file\n    at      {user_frame(node)}")


def _name(kind: Any) -> str:
    return str(kind).removeprefix("torch.")


def _value(value: Any, index: Mapping[fx.Node, int]) -> Any:
    """An argument: numbers and text as they are, all else as an object with one entry, its kind."""
    if isinstance(value, fx.Node):
        return {"node": index[value]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return {"tuple": [_value(v, index) for v in value]}
    if isinstance(value, list):
        return [_value(v, index) for v in value]
    if isinstance(value, dict):
        return {"dict": [[str(k), _value(v, index)] for k, v in value.items()]}
    if isinstance(value, slice):
        return {"slice": [_value(v, index) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, Fraction):
        return {"fraction": [value.numerator, value.denominator]}
    for kind in TYPES:
        if isinstance(value, kind):
            return {"torch": _name(value)}
    raise SavedPlanError(f"{type(value).__name__} has no form in a file")


# -- reading -----------------------------------------------------------------------------------------------------------


def decode_plan(model: SavedModel) -> Plan:
    """The plan that a model was saved with.

    Raises:
        SavedPlanError: its record is none.
    """
    record, extra = model.record, model.extra
    try:
        with FakeTensorMode():
            graph = _read_graph(record["graph"])
        ends = record["ends"]
        captured = Capture(
            graph=graph,
            constants=_named(extra, "constant:"),
            inputs=list(record["inputs"]),
            out_spec=_read_spec(record["out_spec"]),
            points=[Point(int(b), int(t)) for b, t in record["points"]],
            sample=lambda size, point: size,
            symbolic_batch=bool(record["open"][0]),
            symbolic_time=bool(record["open"][1]),
            assumed=lambda ticks: True,
            read=_named(extra, "read:"),
        )
        clock = Clock(*(tuple(part) for part in record["clock"]))
        limit = None if record["limit"] is None else (int(record["limit"][0]), record["limit"][1])
        plan = plan_of(
            model, graph, captured, clock, limit=limit, branch=record["branch"], ends=ends, **record["options"]
        )
        return dataclasses.replace(plan, replaced=tuple(map(str, record["replaced"])))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        if isinstance(error, CompileError):
            raise
        raise SavedPlanError(f"this is no step model: {type(error).__name__}: {error}") from error


def _read_spec(text: str) -> pytree.TreeSpec:
    try:
        return pytree.treespec_loads(text)
    except NotImplementedError as error:
        if (found := re.search(r"Deserializing (\S+) in pytree", str(error))) is None:
            raise
        raise SavedPlanError(
            f"the model returns a {found[1]}, which is not known in this process\n"
            "    try     before loading, import it and call\n"
            f"            torch.export.register_dataclass(..., serialized_type_name={found[1]!r})"
        ) from error


def _named(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _read_graph(nodes: list[Any]) -> fx.Graph:
    graph, made = fx.Graph(), list[fx.Node]()
    for entry in nodes:
        target = entry["target"]
        if entry["op"] == "call_function":
            target = _read_loop(target["loop"], made) if isinstance(target, dict) else _read_target(target)
        args, kwargs = _read(entry["args"], made), _read(entry.get("kwargs", {"dict": []}), made)
        if entry["op"] not in ("placeholder", "get_attr", "call_function", "output"):
            raise ValueError(f"a node of kind {entry['op']!r}")
        node = graph.create_node(entry["op"], target, args, kwargs, name=entry["name"])
        made.append(node)
        if entry["op"] != "output":
            node.meta = {**_read_meta(entry, made), "line": entry["line"], "module": entry["module"]}
    graph.lint()
    return graph


def _read_meta(entry: Mapping[str, Any], made: list[fx.Node]) -> dict[str, Any]:
    meta = {k: _read(entry[k], made) for k in ("sizes", "samples") if k in entry}
    meta["val"] = _example(entry["is"], meta["sizes"][0] if meta.get("sizes") else None)
    return meta


def _example(kind: Any, size: Any) -> Any:
    if isinstance(kind, dict):
        return tuple(_example(k, s) for k, s in zip(kind["several"], size, strict=True))
    if kind is None:
        return None
    return torch.empty(size, dtype=_torch(kind[0], torch.dtype), device=kind[1])


def _read_loop(loop: Mapping[str, Any], made: list[fx.Node]) -> Loop:
    return Loop(
        _read_graph(loop["body"]),
        [_read_graph(g) for g in loop["starts"]],
        list(loop["dims"]),
        list(loop["squeezed"]),
        [Collected(how, dim, skipped) for how, dim, skipped in loop["results"]],
        [_read_meta(m, made) for m in loop["carried"]],
        list(loop["widths"]),
        [(at, step) for at, step in loop["ramps"]],
    )


def _read_target(name: str) -> Any:
    space, _, rest = name.partition(".")
    if space == "operator" and rest in PYTHON:
        return PYTHON[rest]
    packet, _, overload = rest.partition(".")
    if space not in NAMESPACES or packet in UNREAD:
        raise ValueError(f"no op {name!r}")
    found = getattr(getattr(getattr(torch.ops, space), packet), overload or "default")
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"no op {name!r}")
    return found


def _torch(name: str, *kinds: type) -> Any:
    found = getattr(torch, name)
    if not isinstance(found, kinds):
        raise ValueError(f"no type {name!r}")
    return found


def _read(value: Any, made: list[fx.Node]) -> Any:
    if isinstance(value, list):
        return [_read(v, made) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    match kind:
        case "node" if inner >= 0:
            return made[inner]
        case "float":
            return float(inner)
        case "tuple":
            return tuple(_read(v, made) for v in inner)
        case "dict":
            return {k: _read(v, made) for k, v in inner}
        case "slice":
            return slice(*(_read(v, made) for v in inner))
        case "device":
            return torch.device(inner)
        case "complex":
            return complex(*inner)
        case "fraction":
            return Fraction(*inner)
        case "torch":
            return _torch(inner, *TYPES)
    raise ValueError(f"a value of kind {kind!r}")


__all__ = ["SavedModel", "SavedPlanError", "decode_plan", "encode_plan"]
