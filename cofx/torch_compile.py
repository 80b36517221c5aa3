"""``torch.compile(model, backend="cofx")``: sliding windows that overlap are computed once.

Every call returns what ``model(window)`` returns. When a call's window is the one before moved on by some frames, only
the new frames are computed, from the state of the call before; that they are is checked by comparing the overlap.
Anything else (a jump, another batch, changed parameters) is computed in full, which primes the state anew.
While one thread's call runs, those of others are computed in full beside it.

Options of ``torch.compile(..., options={...})``:

    time_dim, batch_dim   as in `cofx.compile` (2 and 0); inputs of a lower rank have no time
    equivalence           "stream": the window is taken as the end of a stream that began with the last jump, with no
                          padding at the window's own start, and memory of what came before. Without it, models with
                          temporal padding or memory run in full, since their frames depend on where a window begins.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from .inputs import make_clock
from .passes.changes import glimpse, version
from .passes.errors import user_frame
from .passes.pipeline import Leaf
from .passes.stream_graph import Op, Value, View
from .runtime.errors import CofxError, InputError
from .step_module import compile

OPTIONS = ("time_dim", "batch_dim", "equivalence")


def backend(
    graph: fx.GraphModule, example: Sequence[Any], *, options: dict[str, Any] | None = None, **_: Any
) -> Callable[..., Any]:
    """The backend itself, as torch.compile calls it, once for each graph.

    Raises:
        InputError: an option is not known.
    """
    options = dict(options or {})
    for name in options:
        if name not in OPTIONS:
            raise InputError(f"unknown option {name!r} of backend 'cofx': one of {', '.join(OPTIONS)}")
    if options.get("equivalence") not in (None, "stream"):
        raise InputError(f"equivalence is 'stream' or left away, not {options['equivalence']!r}")
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    own = [_is_own(n, x) for n, x in zip(placeholders, example, strict=True)]
    if _trains(graph):
        return graph.forward
    windows = Windows(graph, own, options)
    run: Callable[..., Any] = torch.compiler.disable(windows)  # type: ignore[no-untyped-call]
    return run


def _is_own(node: fx.Node, example: Any) -> bool:
    """Whether an input is a parameter or buffer of the model, which dynamo has lifted."""
    source = getattr(node.meta.get("grapharg"), "source", None) or getattr(node, "_dynamo_source", None)
    try:
        guard = source.guard_source.name  # type: ignore[union-attr]
    except (AttributeError, NotImplementedError):
        guard = ""
    return isinstance(example, nn.Parameter) or "NN_MODULE" in guard


def _trains(graph: fx.GraphModule) -> bool:
    """Whether an op behaves as in training."""
    for node in graph.graph.nodes:
        if node.op == "call_function":
            names = getattr(getattr(node.target, "__code__", None), "co_varnames", ())
            given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            if given.get("training") is True:
                return True
    return False


class _Graph(nn.Module):
    """A graph as a function of its windows alone: whatever else it takes is held."""

    def __init__(self, graph: fx.GraphModule, given: Sequence[Any], windows: Sequence[int]) -> None:
        super().__init__()
        self.graph, self.windows = graph, list(windows)
        self.rest: list[tuple[int, Any]] = []
        for i, x in enumerate(given):
            if isinstance(x, nn.Parameter):
                self.register_parameter(f"given_{i}", x)
            elif isinstance(x, torch.Tensor) and i not in self.windows:
                self.register_buffer(f"given_{i}", x)
            elif i not in self.windows:
                self.rest.append((i, x))
        self.number = len(given)

    def forward(self, *windows: torch.Tensor) -> Any:
        given: list[Any] = [getattr(self, f"given_{i}", None) for i in range(self.number)]
        for i, x in (*zip(self.windows, windows, strict=True), *self.rest):
            given[i] = x
        with preserve_node_meta():  # errors name the user's lines
            return fx.Interpreter(self.graph).run(*given)


class Windows:
    """The calls of one graph."""

    def __init__(self, graph: fx.GraphModule, own: list[bool], options: dict[str, Any]) -> None:
        self.graph, self.own, self.options = graph, own, options
        self.loops: dict[Any, _Loop | None] = {}
        self.warned = False
        self.busy = threading.Lock()

    def __call__(self, *given: Any) -> Any:
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return self.graph(*given)
        if not self.busy.acquire(blocking=False):  # by another thread
            return self.graph(*given)
        try:
            loop = self._loop(given)
            return self.graph(*given) if loop is None else loop(given)
        finally:
            self.busy.release()

    def _loop(self, given: Sequence[Any]) -> _Loop | None:
        """The loop to which this call belongs: one for every set of shapes; None if it has to be run plainly."""
        key = tuple((tuple(x.shape), x.dtype, x.device) if isinstance(x, torch.Tensor) else x for x in given) + tuple(
            id(x) for x, own in zip(given, self.own, strict=True) if own
        )
        if key not in self.loops:
            try:
                with warnings.catch_warnings(), torch.no_grad():
                    warnings.simplefilter("ignore")
                    self.loops[key] = _Loop(self.graph, given, self.own, self.options)
            except CofxError as error:
                self.loops[key] = None
                if not self.warned:
                    self.warned = True
                    warnings.warn(f"backend 'cofx' runs this graph in full at every call: {error}", stacklevel=3)
        return self.loops[key]


class _Loop:
    """Windows of one shape, one after the other."""

    def __init__(self, graph: fx.GraphModule, given: Sequence[Any], own: list[bool], options: dict[str, Any]) -> None:
        dims = options.get("time_dim", 2)
        self.at = [i for i, (x, o) in enumerate(zip(given, own, strict=True)) if isinstance(x, torch.Tensor) and not o]
        windows = tuple(given[i] for i in self.at)
        if isinstance(dims, int):
            dims = [dims if -x.dim() <= dims < x.dim() else None for x in windows]
        batches = options.get("batch_dim", 0)
        if isinstance(batches, int):
            batches = [batches if x.dim() > batches else None for x in windows]
        clock, self.ticks = make_clock(windows, dims, batches)
        self.axes, self.frames = clock.time_dims, clock.frames
        self.asked = options.get("equivalence")
        model = _Graph(graph, given, self.at).eval()
        self.step = compile(model, windows, time_dim=dims, batch_dim=batches, window_output="all")
        inexact = [leaf for leaf in self._leaves if not self._exact(leaf)]
        if inexact:
            reason = _reason(inexact[0])
            self.step = compile(
                model, windows, time_dim=dims, batch_dim=batches, window_output="all", equivalence="clip"
            )
            self._worthwhile(f"{reason}; options={{'equivalence': 'stream'}} takes the window for the end of a stream")
        else:
            self._worthwhile(_reason(self._leaves[0]))
        self.before: list[torch.Tensor] | None = None
        self.seen: tuple[list[int], bytes] = [], b""  # of the parameters
        self.kept: list[torch.Tensor | None] = []

    @property
    def _leaves(self) -> list[Leaf]:
        return self.step.compiled.plan.outputs

    def _exact(self, leaf: Leaf) -> bool:
        """Whether a stream's frames are those of a window, wherever that begins."""
        if leaf.value is None or leaf.equivalence == "clip":
            return True
        if self.asked == "stream":
            return leaf.equivalence in ("stream", "prefix")
        return leaf.equivalence == "stream" and not (leaf.value.padded or leaf.value.memory or leaf.value.indexed)

    def _worthwhile(self, reason: str) -> None:
        """Take note of the costs.

        Raises:
            InputError: nothing would be saved.
        """
        report = self.step.report()
        self.per_tick, self.in_full = report.macs_per_step, report.macs_per_clip
        if self.ticks < 2 or self.per_tick >= 0.95 * self.in_full:
            raise InputError(f"nothing is saved by keeping state: {reason}")

    def __call__(self, given: Sequence[Any]) -> Any:
        windows = [given[i] for i in self.at]
        moved = None if self._changed() else self._moved(windows)
        if moved == 0:
            return self._packed()
        period = self.step.compiled.plan.schedule.period
        if moved is None or moved % period or moved * self.per_tick > self.in_full:
            self.step.clean_state()
            moved = None
        new = [
            x if t is None or moved is None else x.narrow(t, (self.ticks - moved) * k, moved * k)
            for x, t, k in zip(windows, self.axes, self.frames, strict=True)
        ]
        self.before = None  # should the step fail, the next call is a jump
        ended = self.asked == "stream"
        outputs = self._emitted(self.step.forward_steps(*new))
        tail: list[torch.Tensor | None] = self._emitted(self.step.flush()) if ended else [None] * len(outputs)
        self.kept, self.out = self._shifted(outputs, tail, moved is None)
        self.before = [x.clone() for x in windows]
        return self._packed()

    def _changed(self) -> bool:
        """Whether parameters have changed since the last call, also past torch's counter (``.data``, ``Module.to``)."""
        before, tensors = self.seen, list(self.step.model.state_dict(keep_vars=True).values())
        self.seen = [version(x) for x in tensors], glimpse(tensors)
        return self.seen != before

    def _moved(self, windows: list[torch.Tensor]) -> int | None:
        """By how many ticks the window has moved on, or None."""
        if self.before is None:
            return None
        first = next(i for i, t in enumerate(self.axes) if t is not None)
        t, k = self.axes[first], self.frames[first]
        assert t is not None
        head = windows[first].narrow(t, 0, 1)
        alike = (self.before[first] == head).movedim(t, 0).flatten(1).all(1)[::k].nonzero().flatten().tolist()
        for moved in alike:
            if all(self._overlaps(i, x, moved) for i, x in enumerate(windows)):
                return int(moved)
        return None

    def _overlaps(self, i: int, window: torch.Tensor, moved: int) -> bool:
        assert self.before is not None
        t, k, before = self.axes[i], self.frames[i], self.before[i]
        if t is None:
            return torch.equal(window, before)
        rest = (self.ticks - moved) * k
        return torch.equal(window.narrow(t, 0, rest), before.narrow(t, moved * k, rest))

    def _emitted(self, packed: Any) -> list[torch.Tensor | None]:
        if packed is None:
            return [None] * len(self._leaves)
        spec = self.step.compiled.plan.out_spec
        places = pytree.tree_leaves(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
        leaves: list[torch.Tensor | None] = pytree.tree_leaves(packed, is_leaf=lambda x: x is None)
        return [x for x, place in zip(leaves, places, strict=True) if place is not None]

    def _shifted(
        self, new: list[torch.Tensor | None], tail: list[torch.Tensor | None], anew: bool
    ) -> tuple[list[torch.Tensor | None], list[torch.Tensor]]:
        """For each output what is kept of it, and the window's own."""
        kept: list[torch.Tensor | None] = []
        out: list[torch.Tensor] = []
        for i, (leaf, frames) in enumerate(zip(self._leaves, new, strict=True)):
            if leaf.value is None:
                assert frames is not None
                kept.append(None)
                out.append(frames)
            elif leaf.clip:  # the newest evaluation
                axis = self._stacked(leaf, frames)
                last = frames.select(axis, -1) if frames is not None else self.out[i]
                kept.append(None)
                out.append(last.clone())
            else:
                axis = leaf.value.layout.time
                size = leaf.value.lengths[0]
                parts = [x for x in (None if anew else self.kept[i], frames) if x is not None]
                whole = torch.cat(parts, axis) if parts else None
                if whole is not None and whole.shape[axis] > size:
                    whole = whole.narrow(axis, whole.shape[axis] - size, size).clone()
                kept.append(whole)
                shown = torch.cat([x for x in (whole, tail[i]) if x is not None], axis)
                out.append(shown.narrow(axis, shown.shape[axis] - size, size).clone())
        return kept, out

    def _stacked(self, leaf: Leaf, frames: torch.Tensor | None) -> int:
        """The axis in which a clip's evaluations are stacked."""
        rank = 0 if frames is None else frames.dim()
        axis = next(v.layout.time for _, v in self.step.compiled.plan.inputs if v is not None)
        return min(axis, rank - 1)

    def _packed(self) -> Any:
        return pytree.tree_unflatten([x.clone() for x in self.out], self.step.compiled.plan.out_spec)


def _reason(leaf: Leaf) -> str:
    """What makes the frames of an output depend on where a window begins."""
    queue, seen, found = [leaf.value], set(), None
    while queue:
        value = queue.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        if _begins(value):
            found = value
        queue += _sources(value)
    if found is None or found.node is None:
        return leaf.reason or "every op depends on the whole window"
    why = "memory" if found.memory else "positions" if found.indexed else "padding in time"
    return f"{why} of %{found.node.name} at {user_frame(found.node)}"


def _begins(value: Value) -> bool:
    marked = value.padded or value.memory or value.indexed
    return marked and not any(v.padded or v.memory or v.indexed for v in _sources(value))


def _sources(value: Value) -> list[Value]:
    if isinstance(value.producer, View):
        return [value.producer.source]
    return [r.source for r in value.producer.reads] if isinstance(value.producer, Op) else []
