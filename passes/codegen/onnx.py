"""Code generation: the lane program as an ONNX file that is right from the first frame in any runtime.

Inputs are the model's own (batch first, with a time axis of so many frames), ``state_in_000``, ... and, with controls,
``start``, ``ready`` and ``length`` of shape (batch, 1). Outputs are the model's own, ``<name>_valid`` (batch, frames),
and ``state_out_000``, ... in the order of the states that they follow. A state of zeros is a stream that has not begun.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch._decomp import decomposition_table
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ...runtime.onnx_meta import FORMAT
from ...runtime.state_file import folder_of
from ..capture import untraced
from ..errors import CompileError, user_frame
from ..functionalize import composite, mutates
from ..schedule_delays import Schedule
from .lane_states import lane_schedule
from .lanes import LaneProgram, generate_exported, model_axes
from .onnx_decompositions import decompositions
from .onnx_names import OUTER, name_batch, name_values, tell_modules

if TYPE_CHECKING:
    from ..pipeline import Plan

aten = torch.ops.aten

OPSET = 18
LARGEST = 2_000_000_000  # bytes in one file
CONTROLS = {"start": torch.bool, "ready": torch.bool, "length": torch.int64}

# written as others too, but the exporter knows their ONNX forms
_VIEWS = {
    aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.narrow.default, aten.expand_as.default,
    aten.broadcast_to.default, aten.contiguous.default, aten.mT.default, aten.chunk.default, aten.dropout.default,
}  # fmt: skip


class OnnxError(CompileError):
    """The step program has no ONNX form; the message names the ops."""


@dataclass(frozen=True)
class OnnxNames:
    """What goes in and comes out, by name and in order."""

    inputs: list[str]
    states_in: list[str]
    controls: list[str]
    outputs: list[str]
    states_out: list[str]

    @property
    def arguments(self) -> list[str]:
        """All inputs of the graph."""
        return [*self.inputs, *self.states_in, *self.controls]

    @property
    def results(self) -> list[str]:
        """All outputs of the graph."""
        return [*self.outputs, *(f"{n}_valid" for n in self.outputs), *self.states_out]


class _Step(nn.Module):
    """The lane program, its arguments and results in the file's order; interpreted, which keeps nodes' meta."""

    def __init__(self, program: LaneProgram, controls: bool) -> None:
        super().__init__()
        tell_modules(program.module)
        self.module, self.controls = program.module, controls
        self.inputs, self.states = len(program.inputs), len(program.states)

    def forward(self, *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Inputs, states, controls -> outputs, validity, states."""
        states = arguments[self.inputs : self.inputs + self.states]
        controls = arguments[self.inputs + self.states :]
        results, valid, after = fx.Interpreter(self.module).run(*arguments[: self.inputs], *controls, *states)
        return (*results, *valid, *after)


def export_onnx(
    plan: Plan,
    path: str | os.PathLike[str],
    about: dict[str, Any],
    *,
    ticks: int | None = None,
    dynamic_batch: bool = True,
    opset: int | None = None,
    controls: bool = True,
    capacity: int = 0,
    plain: bool = False,
) -> None:
    """Write the step program of a plan to a file, checked by onnx; a failure leaves no file behind.

    Args:
        plan: traced with an open batch size, or with a batch of one.
        path: of the file. What it holds beyond 2 GB goes to a file beside it.
        about: what else the metadata tells.
        ticks: per call, a multiple of the period; default one period.
        dynamic_batch: the batch size is left open; else it is one.
        opset: version of the operator set, 18 or later.
        controls: the graph takes start, ready and length.
        capacity: ticks of the longest stream, where all of a stream is kept.
        plain: recurrent layers are written as products, step by step.

    Raises:
        OnnxError: an op has no ONNX form.
        ImportError: onnx and onnxscript are not installed.
    """
    import onnx

    schedule = lane_schedule(plan)
    ticks = schedule.period if ticks is None else ticks
    device = next((t.device for t in plan.constants.tensors.values()), torch.device("cpu"))
    program = generate_exported(plan, ticks, device, controls, capacity)
    names = _names(plan, program, controls)
    model = _convert(plan, program, names, controls, dynamic_batch, OPSET if opset is None else opset, plain)
    _describe(model, plan, program, names, about | {"limit": _limit(plan, schedule, capacity)}, controls)
    _save(onnx, model, os.fspath(path))


def _names(plan: Plan, program: LaneProgram, controls: bool) -> OnnxNames:
    """Unique names for everything."""
    structure = pytree.tree_unflatten(list(range(len(plan.outputs))), plan.out_spec)
    if len(pytree.tree_leaves(structure)) != len(plan.outputs):
        raise OnnxError("an output that is no tensor (None or a number) has no form in a step graph")
    outputs = [f"output_{i}" if len(plan.outputs) > 1 else "output" for i in range(len(plan.outputs))]
    if isinstance(structure, dict):
        for keys, i in pytree.tree_flatten_with_path(structure)[0]:
            outputs[i] = "_".join(re.sub(r"\W", "_", str(getattr(k, "key", getattr(k, "idx", k)))) for k in keys)
    count = len(program.states)
    taken: set[str] = {*CONTROLS, *(f"state_{w}_{i:03d}" for w in ("in", "out") for i in range(count))}

    def unique(name: str, *suffixes: str) -> str:
        while any(name + s in taken for s in ("", *suffixes)):
            name += "_"
        taken.update(name + s for s in ("", *suffixes))
        return name

    return OnnxNames(
        [unique(i.name) for i in program.inputs],
        [f"state_in_{i:03d}" for i in range(count)],
        list(CONTROLS) if controls else [],
        [unique(n, "_valid") for n in outputs],
        [f"state_out_{i:03d}" for i in range(count)],
    )


def _convert(
    plan: Plan, program: LaneProgram, names: OnnxNames, controls: bool, dynamic_batch: bool, opset: int, plain: bool
) -> Any:
    """The program as an ONNX model."""
    lanes = 2 if dynamic_batch else 1
    device = program.device
    arguments = [_example(i.shape, i.batch, i.dtype, lanes, device) for i in program.inputs]
    arguments += [torch.zeros(s.shape(lanes), dtype=s.dtype, device=device) for s in program.states]
    arguments += [torch.ones(lanes, 1, dtype=CONTROLS[n], device=device) for n in names.controls]
    batched = [i.batch is not None for i in program.inputs] + [True] * (len(arguments) - len(program.inputs))
    dims = [{0: torch.export.Dim("batch", min=1)} if b and dynamic_batch else {} for b in batched]
    model = onnx_model(
        plan,
        _Step(program, controls).eval(),
        arguments,
        dynamic_shapes=(tuple(dims),),
        plain=plain,
        opset_version=opset,
        input_names=[f"{OUTER}{n}" for n in names.arguments],
        output_names=[f"{OUTER}{n}" for n in names.results],
    )
    if (made := model.opset_import[0].version) != opset:
        raise OnnxError(f"the exporter writes no opset {opset}, but {made}: ask for one between {OPSET} and its newest")
    name_values(model, plan)
    if dynamic_batch:
        name_batch(model)
    return model


@untraced
def onnx_model(
    plan: Plan,
    step: nn.Module,
    arguments: Sequence[torch.Tensor],
    dynamic_shapes: Any = None,
    plain: bool = False,
    **options: Any,
) -> Any:
    """A module as an ONNX model, with what ONNX has not written in what it has.

    Args:
        plan: whose program it is, for error messages.
        step: takes and returns tensors.
        arguments: examples of what it takes.
        dynamic_shapes: of `torch.export.export`.
        plain: of `decompositions`.
        options: of `torch.onnx.export`.

    Raises:
        OnnxError: an op has no ONNX form.
    """
    with torch.no_grad(), _quiet(), _reshapes_around_products(), torch.fx.traceback.preserve_node_meta():
        try:
            exported = torch.export.export(step, tuple(arguments), dynamic_shapes=dynamic_shapes, strict=False)
            if table := decompositions(exported.graph, plain):
                exported = exported.run_decompositions(table)
            _decompose_once(exported)
            converted = torch.onnx.export(exported, dynamo=True, verbose=False, **options)
        except torch.onnx.errors.OnnxExporterError as error:
            raise _blame(plan, error) from error
    assert converted is not None
    return converted.model_proto


def _decompose_once(exported: ExportedProgram) -> None:
    """Spare the exporter its own decompositions where they have nothing to do: the program would be traced anew."""
    for node in exported.graph.nodes:
        if node.target is aten.movedim.int:  # which the exporter does not know
            rank = node.meta["val"].dim()
            source, to = (d % rank for d in node.args[1:])
            order = [d for d in range(rank) if d != source]
            order.insert(to, source)
            node.target, node.args = aten.permute.default, (node.args[0], order)
    anew = exported.run_decompositions
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, fx.GraphModule)]
    ops = {n.target for graph in graphs for n in graph.nodes if n.op == "call_function"}

    def run_decompositions(table: Any = None, **options: Any) -> ExportedProgram:
        idle = table is not None and not any(op in table or mutates(op) or _always_decomposed(op) for op in ops)
        return exported if idle else anew(table, **options)

    exported.run_decompositions = run_decompositions


@functools.cache
def _always_decomposed(op: Any) -> bool:
    """Whether torch writes an op as others whatever the table says, and ONNX has no form for it."""
    return composite(op) and op not in _VIEWS and op not in torch.export.default_decompositions()


def _example(shape: Sequence[int], batch: int | None, dtype: torch.dtype, lanes: int, device: Any) -> torch.Tensor:
    sizes = [lanes if i == batch else s for i, s in enumerate(shape)]
    return torch.zeros(sizes, dtype=dtype, device=device)


def _blame(plan: Plan, error: BaseException) -> OnnxError:
    """An error that names the ops that have no ONNX form, from what the exporter says, and the user's lines."""
    chain, said = error, []
    while chain is not None:
        said.append(str(chain))
        chain = chain.__cause__ or chain.__context__  # type: ignore[assignment]
    ops = sorted({f"{space}.{op}" for space, op in re.findall(r"(aten|prims)[.:]+(\w+)", " ".join(said))})
    text = ", ".join(ops) if ops else said[-1].strip().splitlines()[0]
    calls = [n for n in plan.graph.nodes if n.op == "call_function"]
    lines = {user_frame(n): None for n in calls if _made_of(n) & set(ops)}
    return OnnxError("\n    at      ".join([f"the step program has no ONNX form: {text}", *filter(None, lines)]))


def _made_of(node: fx.Node) -> set[str]:
    """An op's name, and those of what it is decomposed into."""
    found = {".".join(str(node.target).split(".")[:2])}
    if isinstance(node.target, torch._ops.OpOverload) and node.target in decomposition_table:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        flat, spec = pytree.tree_flatten((args, kwargs))
        tensors = [i for i, x in enumerate(flat) if isinstance(x, torch.Tensor)]

        def run(*given: torch.Tensor) -> Any:
            filled = list(flat)
            for i, x in zip(tensors, given, strict=True):
                filled[i] = x
            a, k = pytree.tree_unflatten(filled, spec)
            return node.target(*a, **k)  # type: ignore[operator]

        with contextlib.suppress(Exception):  # a size that was left open
            examples = [torch.empty([int(s) for s in flat[i].shape], dtype=flat[i].dtype) for i in tensors]
            table: dict[Any, Any] = dict(decomposition_table)
            traced = make_fx(run, table, tracing_mode="fake")(*examples)
            found |= {".".join(str(n.target).split(".")[:2]) for n in traced.graph.nodes}
    return found


def _describe(
    model: Any, plan: Plan, program: LaneProgram, names: OnnxNames, about: dict[str, Any], controls: bool
) -> None:
    """Put what a runtime needs to know into the file."""
    outputs = []
    for i, (leaf, name, out) in enumerate(zip(plan.outputs, names.outputs, program.outputs, strict=True)):
        batch, time = model_axes(plan, i, out)
        given = about["outputs"][i]
        outputs.append(
            {
                **given,
                "name": name,
                "valid": f"{name}_valid",
                "time_axis": out.time,
                "frames": out.frames,
                "timed": leaf.value is not None,
                "single": leaf.single,
                "model_axes": {"batch": batch, "time": time},
            }
        )
    inputs = []
    for i, (name, taken) in enumerate(zip(names.inputs, program.inputs, strict=True)):
        value = plan.inputs[i][1]
        inputs.append(
            {
                "name": name,
                "shape": ["batch" if d == taken.batch else s for d, s in enumerate(taken.shape)],
                "dtype": _dtype(taken.dtype),
                "time_axis": taken.time,
                "frames_per_tick": 0 if value is None else int(value.rate),
                "model_axes": {"batch": plan.clock.batch_dims[i], "time": plan.clock.time_dims[i]},
            }
        )
    states = [
        {
            "name": i,
            "out": o,
            "key": s.name,
            "shape": ["batch", *s.shape(1)[1:]],
            "dtype": _dtype(s.dtype),
            "grows": s.grows,
            "holds": s.holds,
        }
        for i, o, s in zip(names.states_in, names.states_out, program.states, strict=True)
    ]
    meta = {
        "format": FORMAT,
        **{k: v for k, v in about.items() if k != "outputs"},
        "frames_per_step": program.ticks,
        "period": plan.schedule.period,
        "flush_calls": program.flush_calls,
        "controls": controls,
        "structure": _structure(pytree.tree_unflatten(list(range(len(plan.outputs))), plan.out_spec)),
        "inputs": inputs,
        "outputs": outputs,
        "states": states,
    }
    entry = model.metadata_props.add()
    entry.key, entry.value = "cofx", json.dumps(meta)


def _limit(plan: Plan, schedule: Schedule, capacity: int) -> int | None:
    """Ticks that a stream may have before a table of positions runs out, there is no more room for it, or the model
    would do otherwise than where it was traced."""
    limits = [capacity] if capacity else []
    limits += [] if plan.limit is None else [plan.limit[0]]
    for op in schedule.graph.ops:
        if op.limit is not None:
            n = 0
            while schedule.count(op.outputs[0], n + 1) <= op.limit:
                n += 1
            limits.append(n)
    return min(limits, default=None)


def _structure(nested: Any) -> Any:
    """The structure of the model's output as JSON: the number of a leaf, or a list, tuple or dict of such."""
    if isinstance(nested, int):
        return nested
    if isinstance(nested, dict):
        return {"dict": [[k, _structure(v)] for k, v in nested.items()]}
    kind = "list" if isinstance(nested, list) else "tuple"
    return {kind: [_structure(v) for v in nested] if isinstance(nested, (list, tuple)) else pytree.tree_leaves(nested)}


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _save(onnx: Any, model: Any, path: str) -> None:
    """Check the model, then put it in place all at once."""
    folder = folder_of(path)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".cofx-") as scratch:
        draft = os.path.join(scratch, os.path.basename(path))
        if too_large(model):
            onnx.save(model, draft, save_as_external_data=True, location=os.path.basename(path) + ".data")
        else:
            onnx.save(model, draft)
        try:
            onnx.checker.check_model(draft, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            found = re.search(r"node name: ([^\s),]+)", str(error))
            where = f"\n    module  {found[1].rpartition('/')[0] or '(the model itself)'}" if found else ""
            raise OnnxError(f"the step program has no valid ONNX form: {str(error).strip()[:500]}{where}") from error
        for name in sorted(os.listdir(scratch), reverse=True):  # the data before the graph that needs it
            os.replace(os.path.join(scratch, name), os.path.join(folder, name))


def too_large(model: Any) -> bool:
    """Whether a model is too much for one file, by its tensors: beyond 2 GB it cannot tell its own size."""
    import onnx

    sizes = (onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in model.graph.initializer)
    total: int = sum(size * math.prod(t.dims) for size, t in zip(sizes, model.graph.initializer, strict=True))
    return total > LARGEST


@contextlib.contextmanager
def _reshapes_around_products() -> Iterator[None]:
    """Let the exporter keep reshapes around products of matrices.

    It takes them away where the shapes without them happen to broadcast to the same result; they may do so along other
    dimensions, as where there are as many heads as lanes.
    """
    from onnxscript.rewriter.rules.common import _broadcast_to_matmul as rules

    kept = (rules.two_reshapes_matmul_reshape_rule, rules.one_reshape_matmul_reshape_rule)
    before = [rule._condition_function for rule in kept]
    try:
        for rule in kept:
            rule._condition_function = lambda *_, **__: False
        yield
    finally:
        for rule, condition in zip(kept, before, strict=True):
            rule._condition_function = condition


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the exporter tells of its work is not the caller's business."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
