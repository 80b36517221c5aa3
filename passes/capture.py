"""Pass 1: trace the module into one ATen graph, with as little of its shapes fixed as it allows.

Ways of tracing are tried in turn (`_WAYS`); the first that succeeds is taken. The result is a `Capture`: a graph
whose parameters are ``get_attr`` nodes of the user's own module, and a way of telling what each of its sizes is at
other batch sizes and lengths.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import operator
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from .caught_errors import caught_errors
from .errors import CaptureError
from .inline_regions import inline_regions
from .known_values import KnownValues
from .registry import NEEDS_NO_RULE, find_rule
from .symbolic_recurrence import symbolic_recurrence

TIME_LIMIT = 300.0  # seconds that one way of tracing may take
# Longer sample points differ from the traced length by this, so that they are alike modulo any product of strides that
# one meets: powers of two, and hops such as 300, 320 or 441 frames.
CONGRUENT = 2**12 * 3**2 * 5**2 * 7**2
_TRACING = threading.RLock()  # torch.export keeps global state: one trace at a time


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
        most: ticks beyond which the model does otherwise than the trace, if there is such a length.
    """

    graph: fx.Graph
    constants: dict[str, torch.Tensor]
    inputs: list[str]
    out_spec: pytree.TreeSpec
    points: list[Point]
    sample: Callable[[Any, Point], Any]
    symbolic_batch: bool
    symbolic_time: bool
    most: int | None = None


@dataclass(frozen=True)
class Clock:
    """How the inputs' axes lie: time and batch dimension and frames per tick of each input (None: has no such axis)."""

    time_dims: tuple[int | None, ...]
    batch_dims: tuple[int | None, ...]
    frames: tuple[int, ...]

    def batch(self, example: Sequence[torch.Tensor]) -> int:
        """The batch size of an example (1 if there is no batch axis)."""
        return next((x.shape[b] for x, b in zip(example, self.batch_dims, strict=True) if b is not None), 1)

    def resized(self, example: Sequence[torch.Tensor], point: Point) -> tuple[torch.Tensor, ...]:
        """The example with another batch size and length, its frames repeated or cropped."""
        return tuple(
            _tile(_tile(x, t, point.ticks * k), b, point.batch)
            for x, t, b, k in zip(example, self.time_dims, self.batch_dims, self.frames, strict=True)
        )


def _tile(x: torch.Tensor, axis: int | None, size: int) -> torch.Tensor:
    if axis is None or x.shape[axis] == size:
        return x
    return x.index_select(axis, torch.arange(size, device=x.device) % x.shape[axis])


def capture(model: nn.Module, example: Sequence[torch.Tensor], clock: Clock, ticks: int, batch: int) -> Capture:
    """Trace `model` at `ticks` and at least 2 lanes, with batch and time left open where the model allows it.

    Raises:
        CaptureError: no way of tracing succeeded.
    """
    said = []
    with _TRACING, as_for_inference(model), quiet():
        for way, lanes in (
            (_export_open, 2),
            (_export_open_batch, 2),
            (_export_open_time, 1),
            (_export_fixed, 1),
        ):
            point = Point(max(lanes, batch), ticks)
            try:
                with time_limit(TIME_LIMIT):
                    program = way(model, clock.resized(example, point), clock)
                    return _from_export(model, program, clock, point)
            except Exception as error:
                said.append(f"{way.__name__.lstrip('_')}: {type(error).__name__}: {_first_line(error)}")
    raise CaptureError("the model could not be traced:\n    " + "\n    ".join(said))


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else ""


def _export(model: nn.Module, inputs: tuple[torch.Tensor, ...], dims: list[dict[int, Any]]) -> ExportedProgram:
    with symbolic_recurrence(), caught_errors(), KnownValues(model):
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
        known_to_torch = torch.export.default_decompositions()
        decompose = {op: known_to_torch[op] for op in unknown if op in known_to_torch and _composite(op)}
        if decompose or needs_functionalization(program.graph):
            program = program.run_decompositions(decompose)
    return program


def _composite(op: Any) -> bool:
    """Whether an op is only a name for others."""
    return (
        isinstance(op, torch._ops.OpOverload)
        and op not in NEEDS_NO_RULE
        and torch._C._dispatch_has_kernel_for_dispatch_key(op._name, "CompositeImplicitAutograd")
    )


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


def _export_open(model: nn.Module, inputs: tuple[torch.Tensor, ...], clock: Clock) -> ExportedProgram:
    dims = [
        {d: Dim.AUTO for d in (b, t) if d is not None} for b, t in zip(clock.batch_dims, clock.time_dims, strict=True)
    ]
    return _export(model, inputs, dims)


def _export_open_batch(model: nn.Module, inputs: tuple[torch.Tensor, ...], clock: Clock) -> ExportedProgram:
    return _export(model, inputs, [{} if b is None else {b: Dim.AUTO} for b in clock.batch_dims])


def _export_open_time(model: nn.Module, inputs: tuple[torch.Tensor, ...], clock: Clock) -> ExportedProgram:
    return _export(model, inputs, [{} if t is None else {t: Dim.AUTO} for t in clock.time_dims])


def _export_fixed(model: nn.Module, inputs: tuple[torch.Tensor, ...], clock: Clock) -> ExportedProgram:
    return _export(model, inputs, [{} for _ in inputs])


def needs_functionalization(graph: fx.Graph) -> bool:
    """Whether something is written in place to a tensor that is seen elsewhere too.

    An in-place op on a value that nothing else looks at is as good as its functional twin (see `canonicalize`).
    """
    order = {n: i for i, n in enumerate(graph.nodes)}
    written: dict[fx.Node, fx.Node] = {}  # in-place op -> what it writes to
    viewed: dict[fx.Node, fx.Node] = {}  # view -> what it is a view of
    for node in graph.nodes:
        if node.target is operator.getitem:
            viewed[node] = node.args[0]
        elif isinstance(node.target, torch._ops.OpOverload):
            for arg, schema in zip(node.args, node.target._schema.arguments, strict=False):
                if schema.alias_info is not None and isinstance(arg, fx.Node):
                    (written if schema.alias_info.is_write else viewed)[node] = arg

    def base(node: fx.Node, through_views: bool) -> fx.Node:
        while node in written or (through_views and node in viewed):
            node = written[node] if node in written else viewed[node]
        return node

    for writer, target in written.items():
        whole = base(target, through_views=False)
        if whole in viewed or whole.op != "call_function":
            return True
        for view in viewed:
            later = any(order[user] > order[writer] for user in view.users)
            if later and order[view] < order[writer] and base(view, through_views=True) is whole:
                return True
    return False


def _from_export(model: nn.Module, program: ExportedProgram, clock: Clock, point: Point) -> Capture:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    constants: dict[str, torch.Tensor] = {}
    specs = {s.arg.name: s for s in program.graph_signature.input_specs if hasattr(s.arg, "name")}
    state = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    placeholders = []
    for node in inline_regions(program.graph).nodes:
        if node.op == "placeholder" and specs[node.name].kind is not InputKind.USER_INPUT:
            target = specs[node.name].target
            if target is None:
                raise CaptureError(f"an input of kind {specs[node.name].kind} is not understood")
            if target not in state:
                constants[target] = program.constants[target]
            new = graph.get_attr(target)
            new.meta = dict(node.meta)
        else:
            new = graph.node_copy(node, env.__getitem__)
            if node.op == "placeholder":
                placeholders.append(node)
        env[node] = new
    outputs = program.graph_signature.output_specs
    if any(o.kind.name != "USER_OUTPUT" for o in outputs):
        raise CaptureError("the model changes its buffers or inputs in forward, even in eval mode")
    symbols = _symbols(placeholders, clock)
    free = {
        axis
        for n, t, b in zip(placeholders, clock.time_dims, clock.batch_dims, strict=True)
        for axis, d in (("time", t), ("batch", b))
        if d is not None and isinstance(n.meta["val"].shape[d], torch.SymInt)
    }
    time, batch = "time" in free, "batch" in free
    points = [point]
    if batch:
        points.append(Point(point.batch + 1, point.ticks))
    if time:
        points += [Point(point.batch, point.ticks + CONGRUENT), Point(point.batch, point.ticks + 3 * CONGRUENT)]
    _check_sizes(graph, symbols)
    _check_assumptions(placeholders, symbols, points)
    most = _most_ticks(placeholders, clock) if time else None
    return Capture(
        graph=graph,
        constants=constants,
        inputs=[n.name for n in placeholders],
        out_spec=program.call_spec.out_spec,
        points=points,
        sample=Sampler(symbols),
        symbolic_batch=batch,
        symbolic_time=time,
        most=most,
    )


def _check_sizes(graph: fx.Graph, symbols: dict[sympy.Symbol, Callable[[Point], int]]) -> None:
    """Raise `CaptureError` for a size that follows from nothing but the data."""
    for node in graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            for size in value.shape if isinstance(value, torch.Tensor) else ():
                if isinstance(size, torch.SymInt) and not size.node.expr.free_symbols <= set(symbols):
                    raise CaptureError(f"a size depends on the data: {size.node.expr}")


def _check_assumptions(
    placeholders: list[fx.Node], symbols: dict[sympy.Symbol, Callable[[Point], int]], points: list[Point]
) -> None:
    """Try what the trace assumed of its sizes at every sample point.

    Raises:
        CaptureError: an equality fails there: a number was made of a size (``int(n)``, ``len(x)``), which fixes it.
    """
    sizes = [s for n in placeholders for s in n.meta["val"].shape if isinstance(s, torch.SymInt)]
    if not sizes:
        return
    environment = sizes[0].node.shape_env
    for symbol in symbols:
        span = environment.var_to_range[symbol]
        if span.lower == span.upper:
            raise CaptureError(f"the trace took a size for a constant: {span.lower}")
    assumed = [g.expr for g in environment.guards]
    assumed += [a.expr for asserts in environment.deferred_runtime_asserts.values() for a in asserts]
    for expr in assumed:
        if isinstance(expr, sympy.Eq) and set(expr.free_symbols) <= set(symbols):
            for point in points:
                if expr.xreplace({s: sympy.Integer(f(point)) for s, f in symbols.items()}) == sympy.false:
                    raise CaptureError(f"the trace took a size for a constant: {expr}")


def _most_ticks(placeholders: list[fx.Node], clock: Clock) -> int | None:
    """The longest clip for which the trace holds, or None."""
    bounds = []
    for n, t, k in zip(placeholders, clock.time_dims, clock.frames, strict=True):
        size = n.meta["val"].shape[t] if t is not None else None
        if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
            upper = size.node.shape_env.var_to_range[size.node.expr].upper
            if isinstance(upper, sympy.Integer) and upper < CONGRUENT:
                bounds.append(int(upper) // k)
    return min(bounds, default=None)


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
def as_for_inference(model: nn.Module) -> Iterator[None]:
    """The module in eval mode, each submodule put back afterwards to the mode that it was in."""
    modes = [(m, m.training) for m in model.modules()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        for m, _ in modes:
            m.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        for m, training in modes:
            m.training = training
        torch.backends.mha.set_fastpath_enabled(fastpath)


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
