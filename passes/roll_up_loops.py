"""Pass 2e: a Python loop over frames, unrolled by tracing, becomes one op again.

``for t in range(T): h = cell(x[:, t], h); out.append(h)`` is traced as T copies of the cell. Nodes that depend on frame
t and on none after it are iteration t; if all iterations have the same form, each one depending on the one before, they
are rolled up into a `Loop`: a body, what it carries from frame to frame, and what is collected of it.
"""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from .canonicalize import unbind
from .graph_edits import call_at, take_place
from .loops import Collected, Loop
from .propagate_facts import Facts
from .registry import Static
from .stream_graph import Value

aten = torch.ops.aten


@dataclass(frozen=True)
class _Frame:
    """A node that is one frame of a stream, or one of the parts of `width` frames into which it is cut."""

    source: fx.Node
    index: int
    dim: int
    squeezed: bool
    width: int

    @property
    def slot(self) -> _Slot:
        """What all frames of a loop's input have in common."""
        return self.source, self.dim, self.squeezed, self.width


_Slot = tuple[fx.Node, int, bool, int]
AT_FIRST = 3  # so many iterations may differ from the others
BACK = 3  # so many iterations back an iteration may read


class _NoLoop(Exception):
    """These nodes are no loop."""


def roll_up_loops(graph: fx.Graph, facts: Facts) -> bool:
    """Roll up the loops over frames of streams that there are facts of; whether one was found."""
    frames = _frames(graph, facts)
    lengths = sorted({len(g) for g in frames.values()}, reverse=True)
    for length in (n for n in lengths if n >= 4):
        chosen = {n: f for group in frames.values() if len(group) == length for n, f in group.items()}
        for with_statics in (False, True):
            try:
                _roll(graph, facts, chosen, length, with_statics)
            except _NoLoop:
                continue
            return True
    return False


def gather_assignments(graph: fx.Graph) -> None:
    """``out[:, t] = h`` for every t, one after the other, is a stack of what was assigned.

    What is read of ``out`` meanwhile is what was assigned there.
    """
    for node in list(graph.nodes):
        if node.target is aten.select.int and (source := _assigned(graph, node)) is not None:
            take_place(node, source)
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target is aten.slice.Tensor and (parts := _assigned_frames(graph, node)) is not None:
            take_place(node, _stack(graph, node, parts, node.meta["samples"][0]["dim"]))
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target is not aten.select_scatter.default or any(u.target is node.target for u in node.users):
            continue
        args = node.meta["samples"][0]
        dim = args["dim"] % len(node.meta["val"].shape)
        assigned: dict[int, fx.Node] = {}
        link: Any = node
        while isinstance(link, fx.Node) and link.target is node.target and (link is node or len(link.users) == 1):
            at = link.meta["samples"][0]
            index = at["index"] % node.meta["sizes"][0][dim]
            if (
                at["dim"] % len(node.meta["val"].shape) != dim
                or not isinstance(at["src"], fx.Node)
                or index in assigned
            ):
                break
            assigned[index] = at["src"]
            link = at["self"]
        size = node.meta["sizes"][0][dim]
        if (
            len(assigned) != size
            or size < 2
            or any(n.meta["val"].dtype != node.meta["val"].dtype for n in assigned.values())
        ):
            continue
        take_place(node, _stack(graph, node, [assigned[i] for i in range(size)], dim))
    graph.eliminate_dead_code()


def _stack(graph: fx.Graph, node: fx.Node, parts: list[fx.Node], dim: int) -> fx.Node:
    """A node as a stack of its frames."""
    calls: list[Any] = [((parts, dim), {})] * len(node.meta["sizes"])
    return call_at(graph, node, aten.stack.default, calls, node.meta["sizes"], node.meta["val"])


def _assigned(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """What ``y[:, t]`` is, where frames of y were assigned one by one; one that was not is that of y as it began."""
    args = node.meta["samples"][0]
    link: Any = args["self"]
    index = args["index"]
    if link.target is not aten.select_scatter.default or any(s["index"] != index for s in node.meta["samples"]):
        return None
    rank = link.meta["val"].dim()
    dim = args["dim"] % rank
    while link.target is aten.select_scatter.default:
        at = link.meta["samples"][0]
        same = all(s["index"] == at["index"] for s in link.meta["samples"])
        if at["dim"] % rank != dim or not same or (at["index"] < 0) != (index < 0):
            return None  # (whether two places are the same may depend on the length)
        if at["index"] == index:
            source: Any = at["src"]
            alike = isinstance(source, fx.Node) and source.meta["val"].dtype == node.meta["val"].dtype
            return source if alike else None
        link = at["self"]
    calls: list[Any] = [((link, dim, index), {})] * len(node.meta["sizes"])
    return call_at(graph, node, aten.select.int, calls, node.meta["sizes"], node.meta["val"])


def _assigned_frames(graph: fx.Graph, node: fx.Node) -> list[fx.Node] | None:
    """The frames of ``y[:, t : t + n]``, of a y that was one number and some of whose frames were assigned."""
    args, sizes = node.meta["samples"][0], node.meta["sizes"]
    link: Any = args["self"]
    dim = args["dim"] % len(sizes[0])
    whole = {s[dim] for s in link.meta["sizes"]}
    bounds = {(s["start"], s["end"], s["step"]) for s in node.meta["samples"]}
    if link.target is not aten.select_scatter.default or len(whole) > 1 or len(bounds) > 1:
        return None
    size = whole.pop()
    wanted = range(*slice(*bounds.pop()).indices(size))
    found: dict[int, fx.Node] = {}
    while link.target is aten.select_scatter.default:
        at = link.meta["samples"][0]
        same = all(s["index"] == at["index"] for s in link.meta["samples"])
        if at["dim"] % len(sizes[0]) != dim or not same or not isinstance(at["src"], fx.Node):
            return None
        index = at["index"] % size
        if index in wanted:
            found.setdefault(index, at["src"])
        link = at["self"]
    if link.target is not aten.full.default or any(
        n.meta["val"].dtype != node.meta["val"].dtype for n in found.values()
    ):
        return None
    if len(found) < len(wanted):
        blank = _blank_frame(graph, link, dim)
        return [found.get(i, blank) for i in wanted]
    return [found[i] for i in wanted]


def _blank_frame(graph: fx.Graph, full: fx.Node, dim: int) -> fx.Node:
    """A frame of a tensor that is one number everywhere; the same node whenever it is asked for."""
    known = full.meta.setdefault("frames", {})
    if dim not in known:
        shapes = [(*s[:dim], *s[dim + 1 :]) for s in full.meta["sizes"]]
        given = [
            unbind(aten.full.default, a | {"size": list(s)}) for a, s in zip(full.meta["samples"], shapes, strict=True)
        ]
        value = full.meta["val"].select(dim, 0)
        known[dim] = call_at(graph, full.next, aten.full.default, given, shapes, value)
    blank: fx.Node = known[dim]
    return blank


def _frames(graph: fx.Graph, facts: Facts) -> dict[Any, dict[fx.Node, _Frame]]:
    """The streams of which every single frame is taken, by source and kind; one that is taken twice is taken once."""
    found: dict[Any, dict[fx.Node, _Frame]] = {}
    first: dict[_Frame, fx.Node] = {}
    for node in list(graph.nodes):
        frame = _frame(node, facts)
        if frame is None:
            continue
        if first.setdefault(frame, node) is not node:
            take_place(node, first[frame])
            graph.erase_node(node)
            continue
        found.setdefault(frame.slot, {})[node] = frame
    return {
        slot: group
        for slot, group in found.items()
        if sorted(f.index * slot[3] for f in group.values()) == list(range(0, facts.of[slot[0]].lengths[0], slot[3]))
        and facts.of[slot[0]].lengths[0] % slot[3] == 0
    }


def _frame(node: fx.Node, facts: Facts) -> _Frame | None:
    args = node.meta["samples"][0] if node.op == "call_function" else {}
    squeezed, width = False, 1
    if node.target in (aten.select.int, aten.slice.Tensor, aten.narrow.default):
        source, squeezed = args["self"], node.target is aten.select.int
        start = int(args["index"] if squeezed else args.get("start") or 0)
        if not squeezed:
            width = int(args["length"]) if "length" in args else int(args["end"] or sys.maxsize) - start
            if args.get("step", 1) != 1:
                return None
    elif node.target is operator.getitem and args["0"].target in (aten.unbind.int, aten.split.Tensor):
        index, args = int(args["1"]), args["0"].meta["samples"][0]
        source, squeezed = args["self"], "split_size" not in args
        width = int(args.get("split_size", 1))
        start = index * width
    else:
        return None
    value = facts.of.get(source)
    if not isinstance(value, Value) or not value.layout.clean or args["dim"] % len(value.layout) != value.layout.time:
        return None
    length = max(value.lengths[0], 1)
    if width < 1 or width > length // 2 or (start % length) % width:
        return None
    return _Frame(source, start % length // width, value.layout.time, squeezed, width)


def _roll(graph: fx.Graph, facts: Facts, frames: dict[fx.Node, _Frame], length: int, with_statics: bool) -> None:
    """Replace the loop over these frames by one node."""
    label, collectors = _labels(graph, frames, length, with_statics)
    bodies: list[list[fx.Node]] = [[] for _ in range(length)]
    for node, t in label.items():
        bodies[t].append(node)
    for first, model in ((p, p + k) for p in range(AT_FIRST) for k in range(1, BACK + 1)):
        if model >= length - 1:
            continue
        try:
            match = _Match(label, frames, bodies, first, model)
            wanted = _wanted(match, collectors, length)
        except _NoLoop:
            continue
        break
    else:
        raise _NoLoop
    slots = sorted({f.slot for f in frames.values()}, key=lambda s: (s[0].name, s[2], s[3]))
    at = {(f.slot, f.index): n for n, f in frames.items()}
    registers = sorted((place, d) for place, back in match.backs.items() for d in range(1, back + 1))
    begin = [match.before[place, first - d] for place, d in registers]
    outer = dict.fromkeys(n for node in bodies[model] if node not in frames for n in node.all_input_nodes)
    if first:
        outer |= dict.fromkeys(
            n for b in bodies[:first] for node in b if node not in frames for n in node.all_input_nodes
        )
        outer |= dict.fromkeys([*begin, *(n for w in wanted.values() for n in w.firsts)])
    statics = [n for n in outer if n not in label]
    if not all(isinstance(facts.of[n], Static) for n in statics):
        raise _NoLoop
    ramps = {key: i for i, key in enumerate(match.ramps)}
    stands = {match.at(model - d, place): f"carried_{k}" for k, (place, d) in enumerate(registers)}
    given: list[tuple[str, fx.Node | None]] = [(f"frame_{i}", at[slot, model]) for i, slot in enumerate(slots)]
    given += [(f"ramp_{i}", None) for i in ramps.values()]
    given += [(name, node) for node, name in stands.items()]
    given += [(f"static_{i}", n) for i, n in enumerate(statics)]
    results = [match.at(model - w.late, w.place) for w in wanted.values()]
    after = [match.at(model - d + 1, place) for place, d in registers]
    numbers = {(match.at(model, place), name): f"ramp_{i}" for (place, name), i in ramps.items()}
    body = _cut(bodies[model], [*after, *results], given, numbers)
    starts = []
    for k in range(first):
        given = [(f"frame_{t}_{i}", at[slot, t]) for t in range(k + 1) for i, slot in enumerate(slots)]
        given += [(f"static_{i}", n) for i, n in enumerate(statics)]
        roots = [w.firsts[k - w.skipped] for w in wanted.values() if w.how != "last" and k >= w.skipped]
        roots = [*(begin if k == first - 1 else []), *roots]
        starts.append(_cut([n for b in bodies[: k + 1] for n in b], roots, given, {}))
    loop = Loop(
        body,
        starts,
        [dim for _, dim, _, _ in slots],
        [squeezed for _, _, squeezed, _ in slots],
        [Collected(w.how, w.dim, w.skipped) for w in wanted.values()],
        [match.at(model, place).meta for place, _ in registers],
        [width for _, _, _, width in slots],
        list(match.ramps.values()),
    )
    _replace(graph, loop, [*(source for source, *_ in slots), *([] if first else begin), *statics], list(wanted))


def _labels(
    graph: fx.Graph, frames: dict[fx.Node, _Frame], length: int, with_statics: bool
) -> tuple[dict[fx.Node, int], list[fx.Node]]:
    """For each node that depends on a frame the last one, and the nodes that put the iterations' results together.

    `with_statics`: what depends on no frame, but is made anew for each iteration (a gain that is known beforehand,
    computed step by step), belongs to the first iteration that it is needed for.
    """
    label: dict[fx.Node, int] = {}
    collectors: list[fx.Node] = []
    beyond: set[fx.Node] = set()
    for node in graph.nodes:
        if node in frames:
            label[node] = frames[node].index
        elif node.op == "call_function":
            if any(n in beyond for n in node.all_input_nodes):
                beyond.add(node)
                continue
            given = [label[n] for n in node.all_input_nodes if n in label]
            joins = node.target in (aten.stack.default, aten.cat.default)
            if given and joins and max(4, length - BACK) <= len(_parts(node)) <= length:
                each = [label.get(n, -1) for n in _parts(node)]
                late = length - 1 - each[-1]
                if 0 <= late <= BACK and each[AT_FIRST:] == list(range(length - late))[AT_FIRST - len(each) :]:
                    collectors.append(node)
                    beyond.add(node)
                    continue
            if given:
                label[node] = max(given)
    if not with_statics:
        return label, collectors
    for node in reversed(graph.nodes):
        used = [label[u] for u in node.users if u in label]
        if node.op != "call_function" or node in label or node in beyond or len(used) < max(len(node.users), 1):
            continue
        if min(used) > 0 and max(used) - min(used) <= 1:
            label[node] = min(used)
    return {n: label[n] for n in graph.nodes if n in label}, collectors


def _parts(node: fx.Node) -> list[fx.Node]:
    """What a stack or cat puts together."""
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    return parts


class _Match:
    """The iterations from the one numbered `first` on, node by node the same.

    Attributes:
        place: for each node its place in its iteration, by the iteration that is the model of all.
        backs: for each place of which later iterations read, how many iterations back they look.
        before: what they find there where that lies before the first: by place and iteration (negative before all).
        ramps: numbers that grow by the same from iteration to iteration, by place and argument: at iteration 0, and
            by how much.
    """

    def __init__(
        self,
        label: dict[fx.Node, int],
        frames: dict[fx.Node, _Frame],
        bodies: list[list[fx.Node]],
        first: int,
        model: int,
    ) -> None:
        self.label, self.frames, self.bodies, self.first, self.model = label, frames, bodies, first, model
        self.place: dict[fx.Node, int] = {}
        self.backs: dict[int, int] = {}
        self.before: dict[tuple[int, int], fx.Node] = {}
        self.ramps: dict[tuple[int, str], tuple[float, float]] = {}
        last = len(bodies) - 1
        for t in range(first, model + 1):
            if len(bodies[t]) != len(bodies[model]):
                raise _NoLoop
            self.place.update({n: i for i, n in enumerate(bodies[t])})
        for t in range(first, model + 1):
            if not all(self.same(a, b, t) for a, b in zip(bodies[model], bodies[t], strict=True)):
                raise _NoLoop
        for t in range(model + 1, last + 1):
            rest = iter(bodies[t])
            node = next(rest, None)
            for like in bodies[model]:
                if node is not None and self.same(like, node, t):
                    self.place[node] = self.place[like]
                    node = next(rest, None)
                elif t < last - BACK:  # (in the last iterations what nobody reads is missing)
                    raise _NoLoop
            if node is not None and t < last:
                raise _NoLoop

    def at(self, iteration: int, place: int) -> fx.Node:
        """The node at a place of one of the iterations up to the model."""
        return self.bodies[iteration][place]

    def begins(self) -> bool:
        """Whether what stands before the first iteration can be what the loop begins with."""
        for (place, _), node in self.before.items():
            like = self.at(self.model, place)
            if node.meta["val"].dtype != like.meta["val"].dtype:
                return False
            if not self.first and (node in self.label or node.meta["sizes"] != like.meta["sizes"]):
                return False
        wanted = ((p, self.first - d) for p, back in self.backs.items() for d in range(1, back + 1))
        return all(key in self.before for key in wanted)

    def same(self, like: fx.Node, node: fx.Node, t: int) -> bool:
        """Whether a node of iteration t does what one of the model does."""
        if like in self.frames or node in self.frames:
            a, b = self.frames.get(like), self.frames.get(node)
            return a is not None and b is not None and a.slot == b.slot
        if str(like.target) != str(node.target):
            return False
        kept = dict(self.before), dict(self.backs), dict(self.ramps)
        a, b = like.meta["samples"][0], node.meta["samples"][0]
        if a.keys() == b.keys() and all(self._alike(a[k], b[k], t) or self._on_ramp(like, k, a[k], b[k], t) for k in a):
            return True
        self.before, self.backs, self.ramps = kept
        return False

    def _on_ramp(self, like: fx.Node, name: str, a: Any, b: Any, t: int) -> bool:
        """Whether a number in place of a tensor grows from iteration to iteration."""
        if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (a, b)):
            return False
        schema = getattr(like.target, "_schema", None)
        tensor = schema and any(g.name == name and isinstance(g.type, torch.TensorType) for g in schema.arguments)
        key = self.place[like], name
        if not tensor or t == self.model:
            return False
        step = (a - b) / (self.model - t)
        return self.ramps.setdefault(key, (a - step * self.model, step)) == (a - step * self.model, step)

    def _alike(self, a: Any, b: Any, t: int) -> bool:
        if isinstance(b, fx.Node):
            return isinstance(a, fx.Node) and self._alike_nodes(a, b, t)
        if isinstance(b, dict):
            return a.keys() == b.keys() and all(self._alike(a[k], b[k], t) for k in b)
        if isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(self._alike(x, y, t) for x, y in zip(a, b, strict=True))
        return type(a) is type(b) and bool(a == b)

    def _alike_nodes(self, a: fx.Node, b: fx.Node, t: int) -> bool:
        if a not in self.label:
            return b not in self.label and same_static(a, b)
        back = self.model - self.label[a]
        if a not in self.place or back > BACK:
            return False
        place = self.place[a]
        if back:
            self.backs[place] = max(back, self.backs.get(place, 0))
        if t - back >= self.first:
            return self.label.get(b) == t - back and self.place.get(b) == place
        stands = self.before.setdefault((place, t - back), b)
        return self.label.get(b, -1) <= t - back and (stands is b or same_static(stands, b))


def same_static(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes that depend on no frame have the same value."""
    if a is b:
        return True
    if a.op != "call_function" or b.op != "call_function" or str(a.target) != str(b.target):
        return False
    if torch.Tag.nondeterministic_seeded in getattr(a.target, "tags", ()):
        return False
    x, y = a.meta["samples"][0], b.meta["samples"][0]
    nodes = list(zip(a.all_input_nodes, b.all_input_nodes, strict=False))
    plain = map_arg(x, lambda n: "node") == map_arg(y, lambda n: "node")
    return plain and len(a.all_input_nodes) == len(b.all_input_nodes) and all(same_static(m, n) for m, n in nodes)


@dataclass(frozen=True)
class _Wanted:
    """A value that is read outside of its loop: where it stands, and what is collected of it.

    Attributes:
        late: so many iterations back, at each.
        skipped: so many iterations give nothing.
        firsts: of a collector, what the first iterations give.
    """

    place: int
    how: str
    dim: int = 0
    late: int = 0
    skipped: int = 0
    firsts: tuple[fx.Node, ...] = ()


def _wanted(match: _Match, collectors: list[fx.Node], length: int) -> dict[fx.Node, _Wanted]:
    """The nodes to replace: collectors, and values of the last iteration."""
    wanted: dict[fx.Node, _Wanted] = {}
    taken = {n for i, b in enumerate(match.bodies) for n in b if i < match.first or n in match.place}
    for node in collectors:
        parts = _parts(node)
        skipped, late = length - len(parts), length - 1 - match.label[parts[-1]]
        firsts = max(match.first + late - skipped, 0)  # (the others come from iterations that are alike)
        places = {match.place.get(n) for n in parts[firsts:]}
        each = [match.label.get(n) for n in parts[firsts:]]
        if (
            len(places) != 1
            or None in places
            or skipped > match.first
            or each != list(range(length - late))[-len(each) :]
        ):
            raise _NoLoop
        (place,) = places
        assert place is not None
        if late:
            match.backs[place] = max(late, match.backs.get(place, 0))
            if match.model - late < match.first or any(
                match.before.setdefault((place, i + skipped - late), n) is not n for i, n in enumerate(parts[:firsts])
            ):
                raise _NoLoop
        stack = node.target is aten.stack.default
        dim = int(node.meta["samples"][0].get("dim", 0)) % len(node.meta["val"].shape)
        how = "stack" if stack else "cat"
        wanted[node] = _Wanted(place, how, dim, late, skipped, tuple(parts[: match.first]))
    for node in taken:
        outside = [u for u in node.users if u not in taken and u not in wanted]
        if outside and (match.label[node] != length - 1 or node not in match.place):
            raise _NoLoop
        if outside:
            wanted[node] = _Wanted(match.place[node], "last")
    if not wanted or not match.begins():
        raise _NoLoop
    return wanted


def _cut(
    nodes: list[fx.Node],
    roots: list[fx.Node],
    given: list[tuple[str, fx.Node | None]],
    numbers: dict[tuple[fx.Node, str], str],
) -> fx.Graph:
    """Some nodes as a graph of their own; its inputs stand for nodes that are given, or for numbers."""
    graph = fx.Graph()
    inputs = {name: graph.placeholder(name) for name, _ in given}
    env = {node: inputs[name] for name, node in given if node is not None}
    for node, stands in env.items():  # (a frame may be a result as it is)
        stands.meta = {k: node.meta[k] for k in ("val", "sizes") if k in node.meta}
    for node in nodes:
        if node in env:
            continue
        if any(n not in env for n in node.all_input_nodes):
            raise _NoLoop
        args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
        samples = [map_arg(s, env.__getitem__) for s in node.meta["samples"]]
        for (at, name), number in numbers.items():
            if at is node:
                place = [a.name for a in node.target._schema.arguments].index(name)  # type: ignore[union-attr]
                args = tuple(inputs[number] if i == place else a for i, a in enumerate(args))
                samples = [dict(s) | {name: inputs[number]} for s in samples]
        new = graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        new.meta = dict(node.meta) | {"samples": samples}
        env[node] = new
    if any(r not in env for r in roots):
        raise _NoLoop
    graph.output(tuple(env[r] for r in roots))
    graph.eliminate_dead_code()
    return graph


def _replace(graph: fx.Graph, loop: Loop, args: list[fx.Node], wanted: list[fx.Node]) -> None:
    """Put the loop's node into the graph and its results in the places of what it replaces."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    last = max(args, key=lambda n: order[n])
    first_user = min(wanted, key=lambda n: order[n])
    at = last if order[last] >= order[first_user] else None
    with graph.inserting_after(at) if at is not None else graph.inserting_before(first_user):
        node = graph.create_node("call_function", loop, tuple(args), {}, name="loop")
    points = range(len(first_user.meta["samples"]))
    node.meta = {k: first_user.meta[k] for k in ("stack_trace", "nn_module_stack") if k in first_user.meta}
    node.meta["val"] = tuple(w.meta["val"] for w in wanted)
    node.meta["samples"] = [{str(i): a for i, a in enumerate(args)} for _ in points]
    node.meta["sizes"] = [tuple(w.meta["sizes"][p] for w in wanted) for p in points]
    previous = node
    for i, old in enumerate(wanted):
        with graph.inserting_after(previous):
            item = graph.create_node("call_function", operator.getitem, (node, i), {}, name=f"{old.name}_rolled")
        item.meta = dict(old.meta) | {"samples": [{"0": node, "1": i} for _ in points]}
        previous = item
        take_place(old, item)
    graph.eliminate_dead_code()
    graph.lint()
