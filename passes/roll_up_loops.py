"""Pass 2c: a Python loop over frames, unrolled by tracing, becomes one op again.

``for t in range(T): h = cell(x[:, t], h); out.append(h)`` is traced as T copies of the cell. Nodes that depend on frame
t and on none after it are iteration t; if all iterations have the same form, each one depending on the one before, they
are rolled up into a `Loop`: a body, what it carries from frame to frame, and what is collected of it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from .loops import Collected, Loop
from .propagate_facts import Facts
from .registry import Static
from .stream_graph import Value

aten = torch.ops.aten


@dataclass(frozen=True)
class _Frame:
    """A node that is one frame of a stream."""

    source: fx.Node
    index: int
    dim: int
    squeezed: bool


class _NoLoop(Exception):
    """These nodes are no loop."""


def roll_up_loops(graph: fx.Graph, facts: Facts) -> bool:
    """Roll up the loops over frames of streams that there are facts of; whether one was found."""
    frames = _frames(graph, facts)
    lengths = sorted({len(g) for g in frames.values()}, reverse=True)
    for length in (n for n in lengths if n >= 4):
        chosen = {n: f for group in frames.values() if len(group) == length for n, f in group.items()}
        try:
            _roll(graph, facts, chosen, length)
        except _NoLoop:
            continue
        return True
    return False


def gather_assignments(graph: fx.Graph) -> None:
    """``out[:, t] = h`` for every t, one after the other, is a stack of what was assigned."""
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
        parts = [assigned[i] for i in range(size)]
        with graph.inserting_before(node):
            stack = graph.call_function(aten.stack.default, (parts, dim))
        samples = [{"tensors": parts, "dim": dim} for _ in node.meta["samples"]]
        stack.meta = dict(node.meta) | {"samples": samples}
        _take_place(node, stack)
    graph.eliminate_dead_code()


def _take_place(old: fx.Node, new: fx.Node) -> None:
    """Let all that read one node read another."""
    old.replace_all_uses_with(new, propagate_meta=False)
    for user in new.users:
        user.meta["samples"] = [map_arg(s, lambda n: new if n is old else n) for s in user.meta.get("samples", [])]


def _frames(graph: fx.Graph, facts: Facts) -> dict[Any, dict[fx.Node, _Frame]]:
    """The streams of which every single frame is taken, by source and kind; one that is taken twice is taken once."""
    found: dict[Any, dict[fx.Node, _Frame]] = {}
    first: dict[_Frame, fx.Node] = {}
    for node in list(graph.nodes):
        frame = _frame(node, facts)
        if frame is None:
            continue
        if first.setdefault(frame, node) is not node:
            _take_place(node, first[frame])
            graph.erase_node(node)
            continue
        found.setdefault((frame.source, frame.squeezed), {})[node] = frame
    return {
        key: group
        for key, group in found.items()
        if sorted(f.index for f in group.values()) == list(range(facts.of[key[0]].lengths[0]))
    }


def _frame(node: fx.Node, facts: Facts) -> _Frame | None:
    args = node.meta["samples"][0] if node.op == "call_function" else {}
    index: Any = None
    squeezed = True
    if node.target in (aten.select.int, aten.slice.Tensor, aten.narrow.default):
        source = args["self"]
        index, squeezed = args.get("index", args.get("start") or 0), node.target is aten.select.int
        if node.target is aten.slice.Tensor and args["end"] != index + 1:
            return None
        if node.target is aten.narrow.default and args["length"] != 1:
            return None
    elif node.target is operator.getitem and args["0"].target in (aten.unbind.int, aten.split.Tensor):
        index, args = args["1"], args["0"].meta["samples"][0]
        source, squeezed = args["self"], "split_size" not in args
        if args.get("split_size", 1) != 1:
            return None
    else:
        return None
    value = facts.of.get(source)
    if not isinstance(value, Value) or not value.layout.clean or args["dim"] % len(value.layout) != value.layout.time:
        return None
    return _Frame(source, int(index) % max(value.lengths[0], 1), value.layout.time, squeezed)


def _roll(graph: fx.Graph, facts: Facts, frames: dict[fx.Node, _Frame], length: int) -> None:
    """Replace the loop over these frames by one node."""
    label, collectors = _labels(graph, frames, length)
    bodies: list[list[fx.Node]] = [[] for _ in range(length)]
    for node, t in label.items():
        bodies[t].append(node)
    match = _Match(label, frames, bodies)
    different, inits = _first(match, bodies)
    carried = sorted(match.carried)
    wanted = _wanted(match.place, collectors, bodies, label, length)
    if not wanted:
        raise _NoLoop
    slots = sorted({(f.source, f.dim, f.squeezed) for f in frames.values()}, key=lambda s: (s[0].name, s[2]))
    given = {bodies[1][i]: k for k, i in enumerate(carried)}
    results = [bodies[2][i] for i, _, _ in wanted.values()]
    after_first = [match.carried[i] for i in carried]
    firsts = [  # (what is read after the last frame has no first of its own: no clip has one frame only)
        after_first[0] if how == "last" else _parts(n)[0] for n, (_, how, _) in wanted.items()
    ]
    used = [*bodies[2], *(bodies[0] if different else [])]
    outer = {n: None for node in used if node not in frames for n in node.all_input_nodes if n not in label}
    statics = list(outer | {n: None for n in (after_first + firsts if different else []) if n not in label})
    if not all(isinstance(facts.of[n], Static) for n in statics):
        raise _NoLoop
    body = _cut(bodies[2], [*(bodies[2][i] for i in carried), *results], frames, slots, given, statics)
    start = _cut(bodies[0], [*after_first, *firsts], frames, slots, {}, statics) if different else None
    loop = Loop(
        body,
        start,
        [dim for _, dim, _ in slots],
        [squeezed for _, _, squeezed in slots],
        [Collected(how, dim) for _, how, dim in wanted.values()],
        [bodies[1][i].meta for i in carried],
    )
    begin = [] if different else [inits[i] for i in carried]
    _replace(graph, loop, [*(source for source, _, _ in slots), *begin, *statics], list(wanted))


def _labels(graph: fx.Graph, frames: dict[fx.Node, _Frame], length: int) -> tuple[dict[fx.Node, int], list[fx.Node]]:
    """For each node that depends on a frame the last one, and the nodes that put the iterations' results together."""
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
            if node.target in (aten.stack.default, aten.cat.default) and len(_parts(node)) == length:
                each = [label.get(n, -1) for n in _parts(node)]
                if each[1:] == list(range(1, length)) and each[0] <= 0:
                    collectors.append(node)
                    beyond.add(node)
                    continue
            if given:
                label[node] = max(given)
    return label, collectors


def _parts(node: fx.Node) -> list[fx.Node]:
    """What a stack or cat puts together."""
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    return parts


class _Match:
    """The iterations from the second on, node by node the same.

    Attributes:
        place: for each node its place in its iteration.
        carried: places of which the next iteration reads, with what stands for them after the first iteration.
    """

    def __init__(self, label: dict[fx.Node, int], frames: dict[fx.Node, _Frame], bodies: list[list[fx.Node]]) -> None:
        self.label, self.frames = label, frames
        self.place: dict[fx.Node, int] = {n: i for i, n in enumerate(bodies[1])}
        self.carried: dict[int, fx.Node] = {}
        last = len(bodies) - 1
        for t in range(2, last + 1):
            rest = iter(bodies[t])
            node = next(rest, None)
            for before in [n for n in bodies[t - 1] if n in self.place]:
                if node is not None and self.same(before, node, t):
                    self.place[node] = self.place[before]
                    node = next(rest, None)
                elif t == 2 < last:
                    raise _NoLoop  # (in the last iterations what nobody reads is missing)
            if node is not None and t < last:
                raise _NoLoop

    def same(self, before: fx.Node, node: fx.Node, t: int) -> bool:
        """Whether a node of iteration t does what one of the iteration before does."""
        if before in self.frames or node in self.frames:
            a, b = self.frames.get(before), self.frames.get(node)
            return a is not None and b is not None and (a.source, a.squeezed) == (b.source, b.squeezed)
        if str(before.target) != str(node.target):
            return False
        found: dict[int, fx.Node] = {}
        if not self._alike(before.meta["samples"][0], node.meta["samples"][0], t, found):
            return False
        return all(self.carried.setdefault(place, stands) is stands for place, stands in found.items())

    def _alike(self, a: Any, b: Any, t: int, found: dict[int, fx.Node]) -> bool:
        if isinstance(b, fx.Node):
            return isinstance(a, fx.Node) and self._alike_nodes(a, b, t, found)
        if isinstance(b, dict):
            return a.keys() == b.keys() and all(self._alike(a[k], b[k], t, found) for k in b)
        if isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(self._alike(x, y, t, found) for x, y in zip(a, b, strict=True))
        return bool(a == b)

    def _alike_nodes(self, a: fx.Node, b: fx.Node, t: int, found: dict[int, fx.Node]) -> bool:
        at = self.label.get(b, -1)
        if at == t:
            return self.label.get(a) == t - 1 and b in self.place and self.place.get(a) == self.place[b]
        if at == t - 1 and b in self.place:
            if t == 2:
                found[self.place[b]] = a
                return self.label.get(a, 0) == 0
            return self.label.get(a) == t - 2 and self.place.get(a) == self.place[b]
        return at < 0 and same_static(a, b)


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


def _first(match: _Match, bodies: list[list[fx.Node]]) -> tuple[bool, dict[int, fx.Node]]:
    """Whether the first iteration differs from the others in more than where it begins, and from what it begins."""
    inits: dict[int, fx.Node] = {}
    after_first = match.carried
    if len(bodies[0]) != len(bodies[1]):
        return True, {}
    place = {n: i for i, n in enumerate(bodies[0])}
    for before, node in zip(bodies[0], bodies[1], strict=True):
        if node in match.frames:
            if before not in match.frames or match.frames[before].source is not match.frames[node].source:
                return True, {}
            continue
        if str(before.target) != str(node.target) or before in match.frames:
            return True, {}
        pairs: list[tuple[Any, Any]] = []
        if not _zip(before.meta["samples"][0], node.meta["samples"][0], pairs):
            return True, {}
        for a, b in pairs:
            at = match.label.get(b, -1)
            if at == 1:
                if place.get(a) != match.place[b]:
                    return True, {}
            elif at == 0:
                if b not in place or match.label.get(a, -1) >= 0 or inits.setdefault(place[b], a) is not a:
                    return True, {}
            elif not same_static(a, b):
                return True, {}
    if set(inits) != set(after_first) or any(after_first[i] is not bodies[0][i] for i in inits):
        return True, {}
    shapes = [(n.meta["sizes"], bodies[0][i].meta["sizes"]) for i, n in inits.items()]
    return any(a != b for a, b in shapes), inits


def _zip(a: Any, b: Any, pairs: list[tuple[Any, Any]]) -> bool:
    """Collect the nodes that stand in the same place; whether everything else is equal."""
    if isinstance(b, fx.Node):
        pairs.append((a, b))
        return isinstance(a, fx.Node)
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(_zip(a[k], b[k], pairs) for k in b)
    if isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_zip(x, y, pairs) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _wanted(
    place: dict[fx.Node, int],
    collectors: list[fx.Node],
    bodies: list[list[fx.Node]],
    label: dict[fx.Node, int],
    length: int,
) -> dict[fx.Node, tuple[int, str, int]]:
    """The nodes to replace: collectors, and values of the last iteration; with place, how, and dimension."""
    wanted: dict[fx.Node, tuple[int, str, int]] = {}
    taken = {n for i, b in enumerate(bodies) for n in b if i == 0 or n in place}
    for node in collectors:
        parts = _parts(node)
        places = {place.get(n) for n in parts[1:]}
        if len(places) != 1 or None in places:
            raise _NoLoop
        stack = node.target is aten.stack.default
        dim = int(node.meta["samples"][0]["dim"]) % len(node.meta["val"].shape)
        if not stack and any(n.meta["val"].shape[dim] != 1 for n in parts):
            raise _NoLoop
        wanted[node] = (place[parts[1]], "stack" if stack else "cat", dim)
    for node in taken:
        outside = [u for u in node.users if u not in taken and u not in wanted]
        if outside and (label[node] != length - 1 or node not in place):
            raise _NoLoop
        if outside:
            wanted[node] = (place[node], "last", 0)
    return wanted


def _cut(
    nodes: list[fx.Node],
    roots: list[fx.Node],
    frames: dict[fx.Node, _Frame],
    slots: list[tuple[fx.Node, int, bool]],
    carried: dict[fx.Node, int],
    statics: list[fx.Node],
) -> fx.Graph:
    """One iteration as a graph of its own: its inputs are a frame of each stream, carried values, and statics."""
    graph = fx.Graph()
    of_frames = [graph.placeholder(f"frame_{i}") for i in range(len(slots))]
    env: dict[fx.Node, fx.Node] = {n: graph.placeholder(f"carried_{k}") for n, k in carried.items()}
    env.update({n: graph.placeholder(f"static_{i}") for i, n in enumerate(statics)})
    for node in nodes:
        if node in frames:
            f = frames[node]
            env[node] = of_frames[slots.index((f.source, f.dim, f.squeezed))]
            continue
        if any(n not in env for n in node.all_input_nodes):
            raise _NoLoop
        args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
        new = graph.create_node("call_function", node.target, args, kwargs, name=node.name)
        new.meta = dict(node.meta) | {"samples": [map_arg(s, env.__getitem__) for s in node.meta["samples"]]}
        env[node] = new
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
        _take_place(old, item)
    graph.eliminate_dead_code()
    graph.lint()
