"""Pass 1: trace the module into one ATen graph, with as little of its shapes fixed as it allows.

Ways of tracing are tried in turn; the first that succeeds is taken. The result is a `Capture`: a graph
whose parameters are ``get_attr`` nodes of the user's own module, a way of telling what each of its sizes is at other
batch sizes and lengths, and another of telling whether what the trace took for certain holds there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import io
import logging
import math
import re
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, ParamSpec, TypeVar

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx, nn
from torch._dynamo.convert_frame import compile_lock
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import DimConstraints
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from .both_branches import both_branches
from .caught_errors import caught_errors
from .errors import CaptureError, raised_at
from .functionalize import composite, functionalize, needs_functionalization
from .inline_regions import inline_regions
from .known_values import KnownValues
from .leave_as_found import as_for_inference, run, written_by
from .own_writes import DataAccess, OwnWrites, Unsteady, check_repeats, check_writes, on_copies
from .record_calls import record_calls
from .reference import Reference
from .registry import entry, find_rule
from .symbolic_recurrence import symbolic_recurrence

TIME_LIMIT = 300.0  # seconds that one way of tracing may take
# Longer sample points differ from the traced length by this, so that they are alike modulo any product of strides that
# one meets: powers of two, and hops such as 300, 320 or 441 frames.
CONGRUENT = 2**12 * 3**2 * 5**2 * 7**2
TRACING = compile_lock  # torch keeps global state: one trace at a time, torch.compile's own among them
P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function run while no other thread traces.

    A module that is being traced has parameters that are not its own; and what runs on shapes alone sets aside torch's
    modes for tracing, of which some are those of all threads.
    """

    @functools.wraps(function)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        with TRACING:
            return function(*args, **kwargs)

    return waiting


@dataclass(frozen=True)
class Point:
    """A batch size and a number of ticks at which the graph's sizes are known."""

    batch: int
    ticks: int


@dataclass
class Capture:
    """A traced model.

    Attributes:
        graph: ATen operations; parameters and buffers are ``get_attr`` nodes with the module's own names.
        constants: tensors that the trace created, by the name of their ``get_attr`` node.
        inputs: the names of the inputs, in order.
        out_spec: the structure of the model's output.
        points: where sizes are known; the first is the trace's own.
        sample: a size, number or shape found in the graph (int, SymInt, ...) as it is at a point.
        assumed: whether all that the trace took for certain (branches on sizes, numbers that did not move between the
            points) also holds at so many ticks. With a fixed length: whether it was traced there.
        read: the buffers whose values decided what was traced (a flag, a stride), as they were.
        way: which of the ways of tracing succeeded.
    """

    graph: fx.Graph
    constants: dict[str, torch.Tensor]
    inputs: list[str]
    out_spec: pytree.TreeSpec
    points: list[Point]
    sample: Callable[[Any, Point], Any]
    symbolic_batch: bool
    symbolic_time: bool
    assumed: Callable[[int], bool]
    read: dict[str, torch.Tensor]
    way: str = ""


@dataclass(frozen=True)
class Clock:
    """How the inputs' axes lie: time and batch dimension and frames per tick of each input (None: has no such axis)."""

    time_dims: tuple[int | None, ...]
    batch_dims: tuple[int | None, ...]
    frames: tuple[int, ...]

    def batch(self, example: Sequence[torch.Tensor]) -> int:
        """The batch size of an example (1 if there is no batch axis)."""
        return next((x.shape[b] for x, b in zip(example, self.batch_dims, strict=True) if b is not None), 1)

    def ticks(self, example: Sequence[torch.Tensor]) -> int:
        """The length of an example in ticks."""
        return next(
            x.shape[t] // k for x, t, k in zip(example, self.time_dims, self.frames, strict=True) if t is not None
        )

    def resized(self, example: Sequence[torch.Tensor], point: Point) -> tuple[torch.Tensor, ...]:
        """The example with another batch size and length, its frames repeated or cropped.

        Contiguous: from a part of a longer clip torch.export takes its strides, and with them its length, for fixed.
        """
        return tuple(
            _tile(_tile(x, t, point.ticks * k), b, point.batch).contiguous()
            for x, t, b, k in zip(example, self.time_dims, self.batch_dims, self.frames, strict=True)
        )


def _tile(x: torch.Tensor, axis: int | None, size: int) -> torch.Tensor:
    if axis is None or x.shape[axis] == size:
        return x
    return x.index_select(axis, torch.arange(size, device=x.device) % x.shape[axis])


def capture(
    model: nn.Module,
    example: Sequence[torch.Tensor],
    clock: Clock,
    ticks: int,
    batch: int,
    like: Capture | None = None,
    closed: bool = False,
) -> Capture:
    """Trace `model` at `ticks` and at least 2 lanes, with batch and time left open where the model allows it.

    A model that does not leave its batch size open is traced at `batch` itself. `like`: a trace of it at another
    length, in whose way alone this one is made; `closed`: at its batch size, with nothing left open, which is faster.

    Raises:
        CaptureError: no way of tracing succeeded.
    """
    causes: dict[str, str] = {}  # by the line that raised
    fixed_axes: set[str] = set()
    with TRACING, quiet():
        ways = [(_export_open, max(2, batch)), (_export_open_time, batch), (_export_open_batch, max(2, batch)),
                (_export_fixed, batch), (_export_recorded, max(2, batch))]  # fmt: skip
        if like is not None:
            # where the trace fixed the length it need not be left open again, which costs most
            fixed = like.way == _export_open.__name__ and not like.symbolic_time
            ways = [w for w in ways if w[0].__name__ == (_export_open_batch.__name__ if fixed else like.way)]
        if like is not None and closed:
            ways, batch = [(_export_fixed, like.points[0].batch)], like.points[0].batch
        for way, lanes in dict.fromkeys(ways):
            if fixed_axes & _OPENED.get(way, set()):
                continue  # it would end as another did
            point = Point(lanes, ticks)
            try:
                with as_for_inference(model), time_limit(TIME_LIMIT):  # each way: forward may leave something behind
                    inputs, known = clock.resized(example, point), KnownValues(model)
                    with on_copies(model, written_by(model)):
                        program = way(model, inputs, clock, known)
                    found = _from_export(model, program, clock, point, known, recorded=way is _export_recorded)
                found.way = way.__name__
                if like is None:
                    check_repeats(model, inputs)
                if found.symbolic_batch or clock.batch(inputs) == batch:
                    return found
                raise CaptureError("the model fixes the batch size")
            except Exception as error:
                known_type = "which is not a known type" in str(error) and _make_known(model, inputs)
                if known_type or isinstance(error, OwnWrites):
                    return capture(model, example, clock, ticks, batch, like, closed)
                where = raised_at(error)
                told = _told(error, where)
                if isinstance(error, (SizeReturned, Unsteady)):  # the other ways would take it for a constant
                    failure = CaptureError(told)
                    failure.always = isinstance(error, Unsteady)
                    raise failure from error
                if isinstance(error, SizeFixed):
                    fixed_axes |= error.axes
                causes.setdefault(where or told, told)
    failure = CaptureError("\n".join(causes.values()))
    failure.always = any(told.startswith(ALWAYS) for told in causes.values())
    raise failure


def _make_known(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> bool:
    """Tell torch of the dataclasses in which a model returns its tensors; whether there were any that it did not know.

    It then takes them apart, as it does tuples and dicts, in this process.
    """
    waiting, new = [run(model, inputs)], False
    while waiting:
        value = waiting.pop()
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            if type(value) not in pytree.SUPPORTED_NODES:
                kind = type(value)
                torch.export.register_dataclass(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
                new = True
            waiting += [getattr(value, f.name) for f in dataclasses.fields(value)]
        elif isinstance(value, (list, tuple, dict)):
            waiting += value.values() if isinstance(value, dict) else value
    return new


NOT_TRACED = "the model could not be traced: "
BY_THE_DATA = NOT_TRACED + "what it computes depends on the data, by a branch or a size"
CHANGES = NOT_TRACED + "it changes its parameters or buffers in forward, even in eval mode"
PACKS = NOT_TRACED + "it packs sequences, whose sizes are data"
ALWAYS = (BY_THE_DATA, CHANGES, PACKS)  # whatever the length of the clip


def _cause(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else ""


def _told(error: Exception, where: str | None) -> str:
    """Why a trace failed, where, and what to do about it."""
    kind = type(error).__name__
    hint = "keep this out of the model that is compiled, or rewrite it so that torch.export takes the model"
    if "DataDependent" in kind or "value out of a tracing tensor" in str(error):
        reason = BY_THE_DATA
        hint = "compute both sides and choose with torch.where, or keep this out of the model that is compiled"
    elif "fake tensor in the exported program" in str(error):
        reason, where = CHANGES, None
        hint = "change them once before compiling, or write forward so that it computes changed copies"
    elif found := re.search(r"Found <class '([^']*)'> in output", str(error)):
        reason, where = f"{NOT_TRACED}it returns a {found[1]}, and torch cannot tell which tensors that holds", None
        hint = "a dataclass, tuple or dict, or torch.utils._pytree.register_pytree_node"
    elif _packs(error):
        reason = PACKS
        hint = "give recurrent layers the clip itself: in a stream nothing is padded, and lanes have a `length`"
    elif isinstance(error, Unsteady):
        reason, hint = NOT_TRACED + _cause(error), error.hint
    elif isinstance(error, CaptureError):
        reason = NOT_TRACED + _cause(error)
    else:
        reason = f"{NOT_TRACED}{kind}: {_cause(error)}"
    return "\n".join([reason, *([f"    at      {where}"] if where else []), f"    try     {hint}"])


def _packs(error: Exception) -> bool:
    """Whether it was raised where sequences are packed, or used so."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "pack_padded_sequence":
            return True
        if any(isinstance(v, PackedSequence) for v in frame.f_locals.values()):
            return True
    return False


def _export(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], dims: list[dict[int, Any]], known: KnownValues
) -> ExportedProgram:
    with symbolic_recurrence(), caught_errors(), both_branches(known), unsolved_sizes(), DataAccess(), known:
        program = export(
            model,
            inputs,
            dynamic_shapes=_dynamic_shapes(model, dims),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        unknown = {
            n.target
            for n in program.graph.nodes
            if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor) and find_rule(n.target) is None
        }
        named = {op for op in unknown if _to_be_parted(op)}
        known_to_torch = torch.export.default_decompositions() if named else {}  # (a table of all ops)
        decompose = {op: known_to_torch[op] for op in named if op in known_to_torch}
        vmapped = any("functorch" in str(getattr(n.target, "__module__", "")) for n in program.graph.nodes)
        if decompose or vmapped or (needs_functionalization(program.graph) and not functionalize(program.graph)):
            program = program.run_decompositions(decompose)
    return program


@contextlib.contextmanager
def unsolved_sizes() -> Iterator[None]:
    """While this is open, torch.export goes on where it cannot solve what the trace demands of a size.

    It solves that to name a constant; whether there is one is found anyway, see `_check_equalities`.
    """
    original = DimConstraints.solve

    def solve(self: DimConstraints) -> None:
        with contextlib.suppress(NotImplementedError):
            original(self)

    DimConstraints.solve = solve  # type: ignore[method-assign]
    try:
        yield
    finally:
        DimConstraints.solve = original  # type: ignore[method-assign]


def _to_be_parted(op: Any) -> bool:
    """Whether an op is only a name for others, and no rule wants it whole."""
    return composite(op) and not (entry(op).hands_on or entry(op).stays)


def _dynamic_shapes(model: nn.Module, dims: list[dict[int, Any]]) -> Any:
    """The shapes as the forward's signature takes them: an argument ``*xs`` holds the remaining inputs as a tuple."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    shapes: list[Any] = []
    for i, parameter in enumerate(parameters):
        if parameter.kind is parameter.VAR_POSITIONAL:
            shapes += [tuple(dims[i:])] if dims[i:] else []
            break
        if i < len(dims):
            shapes.append(dims[i])
    return tuple(shapes)


def _export_open(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], clock: Clock, known: KnownValues
) -> ExportedProgram:
    dims = [
        {d: Dim.AUTO for d in (b, t) if d is not None} for b, t in zip(clock.batch_dims, clock.time_dims, strict=True)
    ]
    return _export(model, inputs, dims, known)


def _export_open_batch(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], clock: Clock, known: KnownValues
) -> ExportedProgram:
    return _export(model, inputs, [{} if b is None else {b: Dim.AUTO} for b in clock.batch_dims], known)


def _export_open_time(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], clock: Clock, known: KnownValues
) -> ExportedProgram:
    return _export(model, inputs, [{} if t is None else {t: Dim.AUTO} for t in clock.time_dims], known)


def _export_fixed(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], clock: Clock, known: KnownValues
) -> ExportedProgram:
    return _export(model, inputs, [{} for _ in inputs], known)


def _export_recorded(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], clock: Clock, known: KnownValues
) -> ExportedProgram:
    point = Point(clock.batch(inputs), clock.ticks(inputs))
    wider, longer = Point(point.batch + 1, point.ticks), Point(point.batch, 2 * point.ticks)
    recorded, (batch, time) = record_calls(
        model, inputs, [lambda: clock.resized(inputs, wider), lambda: clock.resized(inputs, longer)]
    )
    dims = [
        {d: Dim.AUTO for d, same in ((b, batch), (t, time)) if d is not None and same}
        for b, t in zip(clock.batch_dims, clock.time_dims, strict=True)
    ]
    return _export(recorded, inputs, dims, known)


# the axes whose sizes a way leaves open
_OPENED = {
    _export_open: {"time", "batch"},
    _export_open_time: {"time"},
    _export_open_batch: {"batch"},
}


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a module by all of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _from_export(
    model: nn.Module, program: ExportedProgram, clock: Clock, point: Point, known: KnownValues, recorded: bool
) -> Capture:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    constants: dict[str, torch.Tensor] = {}
    specs = {s.arg.name: s for s in program.graph_signature.input_specs if hasattr(s.arg, "name")}
    state = named_tensors(model)
    placeholders: list[fx.Node] = []
    names = model.input_names if isinstance(model, Reference) else []
    for node in inline_regions(program.graph).nodes:
        if node.op == "placeholder" and specs[node.name].kind is not InputKind.USER_INPUT:
            target = specs[node.name].target
            if target is None:
                raise CaptureError(f"an input of kind {specs[node.name].kind} is not understood")
            if target not in state:
                constants[target] = program.constants[target]
            new = graph.get_attr(target)
            new.meta = dict(node.meta)
        elif node.op == "placeholder":
            new = graph.placeholder(names[len(placeholders)] if names else str(node.target))
            new.meta = dict(node.meta)
            placeholders.append(node)
        else:
            new = graph.node_copy(node, env.__getitem__)
        env[node] = new
    check_writes(model, program)
    out_spec = _tensors_alone(graph, program.call_spec.out_spec)
    symbols = _symbols(placeholders, clock)
    free = {
        axis
        for n, t, b in zip(placeholders, clock.time_dims, clock.batch_dims, strict=True)
        for axis, d in (("time", t), ("batch", b))
        if d is not None and _varies(n.meta["val"].shape[d])
    }
    time, batch = "time" in free, "batch" in free
    points = [point]
    if batch:
        points.append(Point(point.batch + 1, point.ticks))
    if time:
        points += [Point(point.batch, point.ticks + CONGRUENT), Point(point.batch, point.ticks + 3 * CONGRUENT)]
    _check_sizes(graph, symbols)
    _check_equalities(placeholders, symbols, points)
    return Capture(
        graph=graph,
        constants=constants,
        inputs=[env[n].name for n in placeholders],
        out_spec=out_spec,
        points=points,
        sample=Sampler(symbols),
        symbolic_batch=batch,
        symbolic_time=time,
        assumed=Assumptions(program, symbols, points)
        if time and not recorded
        else lambda ticks: ticks in {p.ticks for p in points},
        read={name: state[name].detach().clone() for name in sorted(known.read)},
    )


class SizeFixed(CaptureError):
    """A trace took sizes for constants that were to be left open: those of `axes`, of "time" and "batch"."""

    def __init__(self, message: str, axes: set[str]) -> None:
        super().__init__(message)
        self.axes = axes


class SizeReturned(CaptureError):
    """A leaf of the model's output is a number that is another for clips of another size."""


class _Fixed:
    """What stands in an output's structure for a leaf that is no tensor: None or a number, always the same."""


pytree.register_pytree_node(
    _Fixed,
    lambda fixed: ([], None),
    lambda children, value: value,
    serialized_type_name="cofx.Fixed",
    to_dumpable_context=lambda value: value,
    from_dumpable_context=lambda value: value,
)


def _tensors_alone(graph: fx.Graph, spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """Take leaves that are no tensors out of a graph's outputs; the structure of what is left knows them.

    Raises:
        CaptureError: one is a number that follows from a size.
    """
    node = graph.output_node()
    leaves: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    if any(isinstance(x, fx.Node) and not isinstance(x.meta.get("val"), torch.Tensor) for x in leaves):
        raise SizeReturned("the model returns a number that follows from the size of its inputs")
    rest = iter(leaves)

    def without(part: pytree.TreeSpec) -> pytree.TreeSpec:
        if part.is_leaf():
            leaf = next(rest)
            return part if isinstance(leaf, fx.Node) else pytree.TreeSpec(_Fixed, leaf, [])
        return pytree.TreeSpec(part.type, part.context, [without(child) for child in part.children()])

    if all(isinstance(x, fx.Node) for x in leaves):
        return spec
    node.args = (tuple(x for x in leaves if isinstance(x, fx.Node)),)
    return without(spec)


class Assumptions:
    """Whether what a trace took for certain holds at other lengths too: see `Capture.assumed`."""

    def __init__(
        self, program: ExportedProgram, symbols: dict[sympy.Symbol, Callable[[Point], int]], points: list[Point]
    ) -> None:
        self.symbols, self.point, self._sample = {str(s): f for s, f in symbols.items()}, points[0], Sampler(symbols)
        printer = PythonPrinter()
        branches: dict[str, Any] = {}
        self._sizes: dict[str, torch.SymInt] = {}
        for symbol, allowed in program.range_constraints.items():
            if symbol in symbols:
                for op, limit in ((">=", allowed.lower), ("<=", allowed.upper)):
                    if isinstance(limit, sympy.Integer) and not (op == ">=" and limit <= 2):  # torch knows no 0 and 1
                        branches[f"{symbol} {op} {limit}"] = True
        for node in program.graph.nodes:
            if "assert" in str(node.target):
                condition = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
                if isinstance(condition, torch.SymBool):
                    branches[printer.doprint(condition.node.expr)] = True
            self._sizes |= {printer.doprint(size.node.expr): size for size in _sizes(node)}
        self._branches = _compiled(branches)
        self.know(points)

    def know(self, points: Sequence[Point]) -> None:
        """Take for certain what is the same at all of these points (of one batch size)."""
        numbers: dict[str, Any] = {}
        for line, size in self._sizes.items():
            seen = {self._sample(size, p) for p in points if p.batch == self.point.batch}
            if len(seen) == 1:
                numbers[line] = seen.pop()
        self._numbers = _compiled(numbers)

    def __call__(self, ticks: int) -> bool:
        return self._hold([*self._branches, *self._numbers], ticks)

    def same_branches(self, ticks: int) -> bool:
        """Whether the branches hold, whatever the numbers are."""
        return self._hold(self._branches, ticks)

    def _hold(self, code: list[tuple[CodeType, Any]], ticks: int) -> bool:
        point = Point(self.point.batch, ticks)
        values: dict[str, Any] = {s: f(point) for s, f in self.symbols.items()}
        values["math"] = math
        try:
            return all(eval(line, values) == wanted for line, wanted in code)
        except (ArithmeticError, NameError):
            return False


def _compiled(lines: dict[str, Any]) -> list[tuple[CodeType, Any]]:
    return [(compile(line, "<assumption>", "eval"), value) for line, value in lines.items()]


def _sizes(node: fx.Node) -> Iterator[torch.SymInt]:
    """The sizes of a node that were left open."""
    for value in pytree.tree_leaves(node.meta.get("val")):
        for size in value.shape if isinstance(value, torch.Tensor) else (value,):
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Expr):
                yield size


def _check_sizes(graph: fx.Graph, symbols: dict[sympy.Symbol, Callable[[Point], int]]) -> None:
    """Raise `CaptureError` for a size that follows from nothing but the data."""
    for node in graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            for size in value.shape if isinstance(value, torch.Tensor) else ():
                if isinstance(size, torch.SymInt) and not size.node.expr.free_symbols <= set(symbols):
                    raise CaptureError(f"a size depends on the data: {size.node.expr}")


def _check_equalities(
    placeholders: list[fx.Node], symbols: dict[sympy.Symbol, Callable[[Point], int]], points: list[Point]
) -> None:
    """Try the equalities that the trace assumed of its sizes at every sample point.

    Raises:
        CaptureError: one fails there: a number was made of a size (``int(n)``, ``len(x)``), which fixes it. Then
            another way of tracing, with that size fixed, is better.
    """
    sizes = [s for n in placeholders for s in n.meta["val"].shape if isinstance(s, torch.SymInt)]
    if not sizes:
        return
    environment = sizes[0].node.shape_env
    assumed = [g.expr for g in environment.guards]
    assumed += [a.expr for asserts in environment.deferred_runtime_asserts.values() for a in asserts]
    for expr in assumed:
        if isinstance(expr, sympy.Eq) and set(expr.free_symbols) <= set(symbols):
            for point in points:
                if expr.xreplace({s: sympy.Integer(f(point)) for s, f in symbols.items()}) == sympy.false:
                    axes = {_axis(symbols[s]) for s in expr.free_symbols}
                    raise SizeFixed(f"the trace took a size for a constant: {expr}", axes)


def _axis(size: Callable[[Point], int]) -> str:
    """The axis whose size it is."""
    return "time" if size(Point(2, 16)) == size(Point(3, 16)) else "batch"


def _varies(size: int | torch.SymInt) -> bool:
    """Whether a size was left open (after a loop over it, ``range(n)``, a symbol may have one value only)."""
    if not isinstance(size, torch.SymInt):
        return False
    allowed = size.node.shape_env.bound_sympy(size.node.expr)
    return bool(allowed.lower != allowed.upper)


def _symbols(placeholders: list[fx.Node], clock: Clock) -> dict[sympy.Symbol, Callable[[Point], int]]:
    """What each symbol of the graph is at a point, from the inputs' own sizes."""
    symbols: dict[sympy.Symbol, Callable[[Point], int]] = {}
    for node, t, b, k in zip(placeholders, clock.time_dims, clock.batch_dims, clock.frames, strict=True):
        shape = node.meta["val"].shape
        for d, value in ((t, lambda p, k=k: p.ticks * k), (b, lambda p: p.batch)):
            size = shape[d] if d is not None else None
            if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                symbols[size.node.expr] = value
    return symbols


class Sampler:
    """Evaluates the sizes of a traced graph at a point; each expression once for each point."""

    def __init__(self, symbols: dict[sympy.Symbol, Callable[[Point], int]]) -> None:
        self.symbols = symbols
        self.cache: dict[tuple[sympy.Expr, Point], Any] = {}

    def __call__(self, size: Any, point: Point) -> Any:
        if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return size
        expr = size.node.expr
        key = (expr, point)
        if key not in self.cache:
            value = expr.xreplace({s: sympy.Integer(f(point)) for s, f in self.symbols.items()})
            if getattr(value, "free_symbols", None):
                raise CaptureError(f"a size depends on the data: {expr}")
            kind = int if isinstance(size, torch.SymInt) else float if isinstance(size, torch.SymFloat) else bool
            self.cache[key] = kind(value)
        return self.cache[key]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Tracing tells its own developers many things; the user hears what concerns them in one exception."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(disabled)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what runs inside with a TimeoutError after so many seconds (main thread only, where signals are)."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"tracing took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
