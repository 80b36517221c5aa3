"""``nonlocal_ops="continual"``: the module with each clip-wide op inside of it in its trailing form.

Such an op (squeeze-excitation, a norm over time, attention over the whole clip) is applied back to every frame. Here it
looks on the frames so far instead of on the clip (see trailing.py). What is made is a reference that the user can run,
test and fine-tune; the step model is compiled from it and equals it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from .canonicalize import bind, canonicalize
from .capture import Capture, Clock, capture
from .codegen.constants import Constants
from .errors import NonLocalError, Refusal, module_path, user_frame
from .pipeline import ends, not_constant, tensors
from .propagate_facts import Facts, PerFrame, propagate_facts
from .reference import Reference, Replaced
from .registry import Call, InClip
from .stream_graph import Value
from .trailing import FORMS, STREAMS, from_frames, per_frame, present, to_frames, trailing

Choice = Callable[[str, str], str]  # (module path, op) -> "recompute", "continual" or "refuse"


def make_continual(
    model: nn.Module,
    example: Sequence[torch.Tensor],
    clock: Clock,
    ticks: int,
    batch: int,
    window: int,
    choose: Choice,
) -> Reference | None:
    """The reference module; None if there is nothing to replace.

    Args:
        window: the most frames that its ops look back on, the current one included (of a slower stream as many as it
            has in that time).
        choose: what becomes of an op.

    Raises:
        CaptureError: the model cannot be traced.
        RefusedError: it holds ops that are to be refused.
    """
    captured = capture(model, example, clock, ticks, batch)
    graph = canonicalize(captured)
    given = tensors(model, captured)
    facts = propagate_facts(
        graph, captured, clock, Constants(given, not_constant(graph, captured)), trail=_Trail(choose)
    )
    ended = [n for n in ends(facts) if type(facts.of[n]) is InClip]
    refused = [n for n in ended if choose(module_path(n), str(n.target)) == "refuse"]
    if refused:
        hint = "nonlocal_ops='recompute' or 'continual' takes it; or keep it out of the compiled model"
        raise NonLocalError([Refusal(facts.of[n].reason, n, hint) for n in refused])
    wanted = _wanted(facts)
    if not wanted:
        return None
    built = _Build(captured, facts, wanted, window).graph()
    used = {str(n.target) for n in built.nodes if n.op == "get_attr"}
    module = fx.GraphModule({name: t for name, t in given.items() if name in used}, built, class_name="Continual")
    replaced = [Replaced(str(n.target), module_path(n), user_frame(n)) for n in wanted]
    return Reference(module, captured.inputs, captured.out_spec, replaced)


class _Trail:
    """Which ops take their trailing form, for `propagate_facts`."""

    def __init__(self, choose: Choice) -> None:
        self.choose = choose

    def __call__(self, call: Call) -> Any:
        """The fact of a clip-wide op in its trailing form, or None if it has none."""
        node = call.node
        if node.target not in FORMS or self.choose(module_path(node), str(node.target)) != "continual":
            return None
        streams = [call.facts[n] for n in node.all_input_nodes if isinstance(call.facts[n], Value)]
        if not streams or any(_place(v) is None for v in streams):
            return None
        args = call.samples[0]
        if node.target in STREAMS:
            return _stream(call, streams)
        if "output_size" in args and any(s != 1 for s in args["output_size"]):
            return None
        if node.target in (torch.ops.aten.matmul.default, torch.ops.aten.bmm.default):
            contracted = len(streams) == 2 and [v.layout.time - len(v.layout) for v in streams] == [-1, -2]
            return PerFrame("") if contracted else None
        if args.get("dtype") is not None:
            return None
        return PerFrame("")


def _stream(call: Call, streams: list[Value]) -> Any:
    args = call.samples[0]
    x = streams[0]
    if call.node.target is torch.ops.aten.scaled_dot_product_attention.default:
        plain = args.get("attn_mask") is None and not args.get("is_causal")
        timed = len(streams) == len({id(s) for s in streams}) == 3 or len(streams) in (1, 2)
        if not (plain and timed and all(v.layout.time == len(v.layout) - 2 for v in streams)):
            return None
        from .layout import Layout

        value = call.facts[args["value"]]
        return call.framewise(Layout((*x.layout.dims[:-1], value.layout[len(value.layout) - 1])))
    return call.framewise(x.layout) if x.layout.clean and x.layout.time > 1 else None


def _place(value: Value) -> tuple[int, int, int] | None:
    """Where time lies in a stream: its dimension, and the sizes before and after it there; None beside the batch."""
    layout = value.layout
    factors = layout[layout.time]
    at = [isinstance(f, int) for f in factors].index(False)
    if not all(isinstance(f, int) for i, f in enumerate(factors) if i != at):
        return None
    sizes = [1, 1]
    for i, f in enumerate(factors):
        if i != at:
            sizes[i > at] *= int(f)  # type: ignore[arg-type]
    return layout.time, sizes[0], sizes[1]


def _wanted(facts: Facts) -> list[fx.Node]:
    """The replaced ops whose results come back to the frames; a head that pools the clip keeps doing so."""
    reaches: set[fx.Node] = set()
    for node in reversed(list(facts.graph.nodes)):
        if any(u in facts.joined or (u in reaches and isinstance(facts.of[u], PerFrame)) for u in node.users):
            reaches.add(node)
    return [n for n in facts.graph.nodes if n in facts.trailing and (n.target in STREAMS or n in reaches)]


class _Build:
    """Writes the reference's graph."""

    def __init__(self, captured: Capture, facts: Facts, wanted: list[fx.Node], window: int) -> None:
        self.captured, self.facts, self.window = captured, facts, window
        self.wanted = set(wanted)
        self.new = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.framed: dict[fx.Node, Value] = {}  # what has its frames in front, and a stream that has as many

    def graph(self) -> fx.Graph:
        for node in self.captured.graph.nodes:
            if node.op == "output":
                self.new.output(tuple(map_arg(pytree.tree_leaves(node.args[0]), self.env.__getitem__)))
            elif node.op != "call_function":
                self.env[node] = self.new.node_copy(node, self.env.__getitem__)
                self.env[node].meta = {}
            else:
                self.env[node] = self._node(node)
        self.new.eliminate_dead_code()
        self.new.lint()
        return self.new

    def _node(self, node: fx.Node) -> fx.Node:
        own = self._canonical(node)
        if own in self.wanted and own is not None and own.meta["traced"] is node:
            return self._trailing(node, own)
        if not any(n in self.framed for n in node.all_input_nodes):
            new = self.new.node_copy(node, self.env.__getitem__)
            new.meta = {}
            return new
        if node.target is torch.ops.aten.sym_size.int:
            source, dim = node.args
            rank = source.meta["val"].dim()  # type: ignore[union-attr]
            return self.new.call_function(node.target, (self.env[source], int(dim) % rank + 1))  # type: ignore[index,arg-type]
        if node.target is operator.getitem:
            self.framed[node] = self.framed[node.args[0]]  # type: ignore[index]
            return self.new.call_function(operator.getitem, (self.env[node.args[0]], node.args[1]))  # type: ignore[index]
        joined = own is not None and own in self.facts.joined and own.meta["traced"] is node
        return self._per_frame(node, own if joined else None)

    def _canonical(self, node: fx.Node) -> fx.Node | None:
        found = node.meta.get("canonical")
        return found if isinstance(found, fx.Node) else None

    def _fact(self, node: fx.Node) -> Any:
        own = self._canonical(node)
        return None if own is None else self.facts.of.get(own)

    def _trailing(self, node: fx.Node, own: fx.Node) -> fx.Node:
        bound = {k: v for k, v in bind(own.target, node.args, node.kwargs).items() if v is not None}
        places = [_place(f) for n in node.all_input_nodes if isinstance(f := self._fact(n), Value)]
        if own.target in (torch.ops.aten.matmul.default, torch.ops.aten.bmm.default):
            places = [_place(self._fact(bound[k])) for k in ("self", "other" if "other" in bound else "mat2")]
        stream = next(f for n in node.all_input_nodes if isinstance(f := self._fact(n), Value))
        if own.target not in STREAMS:
            self.framed[node] = stream
        mapped = map_arg(bound, self.env.__getitem__)
        args: Any = (own.target, max(1, int(self.window * stream.rate)), mapped, places)
        return self.new.call_function(trailing, args)

    def _per_frame(self, node: fx.Node, join: fx.Node | None) -> fx.Node:
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        batched: list[bool] = []
        given: list[Any] = []
        like = next(n for n in node.all_input_nodes if n in self.framed)
        for leaf in leaves:
            fact = self._fact(leaf) if isinstance(leaf, fx.Node) else None
            if isinstance(leaf, fx.Node) and leaf in self.framed:
                batched.append(True)
                given.append(self.env[leaf])
            elif isinstance(fact, Value):
                batched.append(True)
                given.append(self.new.call_function(to_frames, (self.env[leaf], *_place(fact))))  # type: ignore[misc]
            elif isinstance(leaf, fx.Node) and (count := self._count(leaf, like)) is not None:
                batched.append(True)
                given.append(count)
            else:
                batched.append(False)
                given.append(self.env[leaf] if isinstance(leaf, fx.Node) else leaf)
        args, kwargs = pytree.tree_unflatten(given, spec)
        call: Any = (node.target, batched, args, kwargs)
        new = self.new.call_function(per_frame, call)
        if join is None:
            self.framed[node] = self.framed[like]
            return new
        value = self.facts.of[join]
        return self.new.call_function(from_frames, (new, *_place(value)))  # type: ignore[misc]

    def _count(self, node: fx.Node, like: fx.Node) -> fx.Node | None:
        """A number that follows the clip's length, as it is for the frames so far; None if it does not.

        Args:
            like: what has as many frames in front as there are numbers.
        """
        value = node.meta.get("val")
        if not isinstance(value, torch.SymInt):
            return None
        stream = self.framed[like]
        points = [i for i, p in enumerate(self.captured.points) if p.batch == self.captured.points[0].batch]
        seen = [self.captured.sample(value, self.captured.points[i]) for i in points]
        if len(set(seen)) == 1:
            return None
        lengths = [stream.lengths[i] for i in points]
        per_frame = (seen[1] - seen[0]) // (lengths[1] - lengths[0])
        rest = seen[0] - per_frame * lengths[0]
        window = max(1, int(self.window * stream.rate))
        count = self.new.call_function(present, (self.env[like], window))
        flat = self.new.call_function(torch.ops.aten.reshape.default, (count, [-1]))
        scaled = self.new.call_function(torch.ops.aten.mul.Tensor, (flat, per_frame))
        return self.new.call_function(torch.ops.aten.add.Tensor, (scaled, rest))
