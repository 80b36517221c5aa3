"""Pass 1b: what is written to part of a tensor in place is put into a new tensor instead.

``out[:, t] = h`` is traced as a view of ``out`` and a copy to that view. Each such write is followed back to the tensor
that the view is a part of, and what reads it or another view of it later reads the tensor as it is then. The graph
alone is rewritten: torch does the same by tracing it anew, which takes twice as long as the first trace.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx
from torch.fx.node import map_arg

aten = torch.ops.aten


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
            if node.target is aten.detach_.default:  # (of `torch.tensor`) writes no number
                viewed[node] = node.args[0]
                continue
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


def functionalize(graph: fx.Graph) -> bool:
    """Rewrite a traced graph so; False, with nothing changed, if it has views or writes that are not known here."""
    try:
        rewriting = _Rewriting(graph)
    except _Unknown:
        return False
    rewriting.run()
    return True


class _Unknown(Exception):
    """A view or a write that is not known here: the graph is left to torch."""


class _Rewriting:
    """A graph on its way through its nodes.

    Attributes:
        parent: what each view is a view of, and what each in-place op writes to.
        root: for each view and each in-place op, and each tensor that is written to, the tensor in memory.
        now: what stands for a node at this place in the graph.
        current: the version of its root that it stands for.
        version: how often each root has been written to so far.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.parent: dict[fx.Node, fx.Node] = {}
        self.root: dict[fx.Node, fx.Node] = {}
        self.writers: set[fx.Node] = set()
        for node in graph.nodes:
            if (of := _viewed(node)) is not None:
                self.parent[node] = of
            elif _writes(node):
                self.parent[node] = _target(node)
                self.writers.add(node)
            self.root[node] = self.root[self.parent[node]] if node in self.parent else node
        dirty = {self.root[w] for w in self.writers}
        if any(r.op != "call_function" for r in dirty):
            raise _Unknown("a buffer or an input is written to")
        memory = {_storage(r): r for r in dirty}
        for node, root in list(self.root.items()):
            if memory.get(_storage(node), root) is not root:
                raise _Unknown(f"what is written to is also seen by way of {node.target}")
            if root not in dirty:
                del self.root[node]
                self.parent.pop(node, None)
        for part in self.writers:
            while (part := self.parent[part]) in self.parent:
                if part not in self.writers and part.target not in _BACK and _part(part) is None:
                    raise _Unknown(f"something is written to a view by {part.target}")
        self.now: dict[fx.Node, fx.Node] = {}
        self.version = dict.fromkeys(dirty, 0)
        self.current = dict.fromkeys(self.root, 0)

    def run(self) -> None:
        """Rewrite the graph."""
        for node in list(self.graph.nodes):
            if node in self.writers:
                self._write(node)
                continue
            if any(n in self.root for n in node.all_input_nodes) and not _several(node):
                node.args, node.kwargs = self._arguments(node)
            if node in self.parent and not _several(node):
                self.current[node] = self.version[self.root[node]]
                if (part := _part(node)) is not None:
                    self.now[node] = self._made(node, part[0], (self._read(self.parent[node], node), *part[1:]))
        for node in reversed(list(self.graph.nodes)):
            if node in self.writers:
                self.graph.erase_node(node)
        self.graph.eliminate_dead_code()

    def _arguments(self, node: fx.Node) -> tuple[Any, Any]:
        """What a node is given, as it is just before it."""
        now: dict[fx.Node, fx.Node] = {n: self._read(n, node) for n in node.all_input_nodes if n in self.root}
        return map_arg(node.args, lambda n: now.get(n, n)), map_arg(node.kwargs, lambda n: now.get(n, n))

    def _read(self, node: fx.Node, before: fx.Node) -> fx.Node:
        """The node as it is just before another one."""
        if node in self.writers:
            return self._read(self.parent[node], before)
        if self.current[node] != self.version[self.root[node]]:
            of = self._read(self.parent[node], before)
            part = _part(node)
            target, rest = (node.target, node.args[1:]) if part is None else (part[0], part[1:])
            self.now[node] = self._made(node, target, (of, *rest), before, node.kwargs)
            self.current[node] = self.version[self.root[node]]
        return self.now.get(node, node)

    def _write(self, node: fx.Node) -> None:
        """What an in-place op writes to, and all that this is a part of, as new tensors."""
        args, kwargs = self._arguments(node)
        part, root = self.parent[node], self.root[node]
        new = self._made(node, functional(node.target), args, node, kwargs)
        changed = []
        while part is not root:
            if part in self.writers:
                part = self.parent[part]
                continue
            changed.append((part, new))
            whole = self._read(self.parent[part], node)
            new = self._put(part, whole, new, node)
            part = self.parent[part]
        self.version[root] += 1
        for part, new_part in [*changed, (root, new)]:
            self.now[part], self.current[part] = new_part, self.version[root]

    def _put(self, view: fx.Node, whole: fx.Node, new: fx.Node, before: fx.Node) -> fx.Node:
        """The whole with its part replaced by a new one."""
        if (part := _part(view)) is not None:
            target = aten.select_scatter.default if part[0] is aten.select.int else aten.slice_scatter.default
            return self._made(whole, target, (whole, new, *part[1:]), before)
        if (scatter := _SCATTERS.get(cast(Any, view.target))) is not None:
            return self._made(whole, scatter, (whole, new, *view.args[1:]), before, view.kwargs)
        back = _BACK[cast(Any, view.target)](view)
        return new if back is None else self._made(whole, back[0], (new, *back[1:]), before)

    def _made(
        self, like: fx.Node, target: Any, args: tuple[Any, ...], before: fx.Node | None = None, kwargs: Any = None
    ) -> fx.Node:
        """A new node with another's shape."""
        with self.graph.inserting_before(before if before is not None else like):
            new = self.graph.call_function(target, args, dict(kwargs or {}))
        new.meta = {"val": like.meta["val"]} | {
            k: v for k, v in (before or like).meta.items() if k in ("stack_trace", "nn_module_stack")
        }
        return new


def mutates(target: Any) -> bool:
    """Whether a node's target is an op that writes to an argument."""
    return isinstance(target, torch._ops.OpOverload) and bool(target._schema.is_mutable)


def composite(target: Any) -> bool:
    """Whether a node's target is an op that torch writes as others."""
    return isinstance(target, torch._ops.OpOverload) and torch._C._dispatch_has_kernel_for_dispatch_key(
        target._name, "CompositeImplicitAutograd"
    )


def functional(target: Any) -> Any:
    """The functional twin of an in-place overload; any other target as it is."""
    if not mutates(target):
        return target
    name = target._schema.name.split("::")[1]
    packet = getattr(aten, name.rstrip("_"), None)
    twin = getattr(packet, target._overloadname, None) or getattr(packet, "default", None)
    if twin is None:
        raise TypeError(f"{target} has no functional twin")
    return twin


def _viewed(node: fx.Node) -> fx.Node | None:
    """What a node is a view of, if it is one."""
    if node.target is operator.getitem:
        several: Any = node.args[0]
        return several.args[0] if _several(several) else None
    if not isinstance(node.target, torch._ops.OpOverload) or _several(node) or not node.args:
        return None
    schema, first = node.target._schema.arguments[0], node.args[0]
    if node.target is aten.detach_.default:
        return _target(node)
    alias = schema.alias_info is not None and not schema.alias_info.is_write
    return first if alias and isinstance(first, fx.Node) and _same_memory(first, node) else None


def _same_memory(one: fx.Node, other: fx.Node) -> bool:
    """Whether two tensors share their memory: what may be a view, as ``reshape``, may also be a copy."""
    return _storage(one) is not None and _storage(one) == _storage(other)


def _storage(node: fx.Node) -> int | None:
    """Which memory a tensor lies in; None of what is no tensor."""
    value = node.meta.get("val")
    return int(value.untyped_storage()._cdata) if isinstance(value, torch.Tensor) else None


def _several(node: fx.Node) -> bool:
    """Whether a node is several views."""
    return node.target in (
        aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.split.sizes,
    )  # fmt: skip


def _writes(node: fx.Node) -> bool:
    """Whether a node writes in place.

    Raises:
        _Unknown: in a way that is not known here.
    """
    if not mutates(node.target) or node.target is aten.detach_.default:
        return False
    schema = cast(torch._ops.OpOverload, node.target)._schema
    written = [i for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
    tensors = [n.meta.get("val") for n in node.all_input_nodes]
    target = node.args[0].meta["val"] if isinstance(node.args[0], fx.Node) else None
    try:
        functional(node.target)
    except TypeError:
        raise _Unknown(str(node.target)) from None
    if written != [0] or not isinstance(target, torch.Tensor):
        raise _Unknown(str(node.target))
    casts = any(isinstance(t, torch.Tensor) and torch.result_type(t, target) != target.dtype for t in tensors)
    if casts and node.target not in (aten.copy_.default, aten.fill_.Tensor):
        raise _Unknown("what is written is converted")
    return True


def _target(node: fx.Node) -> fx.Node:
    target = node.args[0]
    assert isinstance(target, fx.Node)
    return target


def _part(node: fx.Node) -> tuple[Any, ...] | None:
    """One of several views as the op that takes it alone, with its arguments."""
    if node.target is not operator.getitem:
        return None
    several, index = node.args
    assert isinstance(several, fx.Node) and isinstance(index, int)
    index %= len(several.meta["val"])
    dim: Any = several.args[-1] if len(several.args) > (1 if several.target is aten.unbind.int else 2) else 0
    dim = several.kwargs.get("dim", dim)
    if several.target is aten.unbind.int:
        return aten.select.int, dim, index
    sizes = [v.shape[dim] for v in several.meta["val"][: index + 1]]
    return aten.slice.Tensor, dim, sum(sizes[:-1]), sum(sizes), 1


_SCATTERS = {
    aten.select.int: aten.select_scatter.default,
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.diagonal.default: aten.diagonal_scatter.default,
}


def _reshaped(view: fx.Node) -> tuple[Any, ...]:
    return aten.reshape.default, list(_target(view).meta["val"].shape)


def _again(view: fx.Node) -> tuple[Any, ...]:
    return view.target, *view.args[1:]


def _permuted(view: fx.Node) -> tuple[Any, ...]:
    order: Any = view.args[1]
    back = sorted(range(len(order)), key=lambda i: order[i] % len(order))
    return aten.permute.default, back


def _unchanged(view: fx.Node) -> None:
    return None


# from a view back to what it is a view of: an op with its arguments, None for none
_BACK: dict[Any, Callable[[fx.Node], tuple[Any, ...] | None]] = {
    **dict.fromkeys(_SCATTERS, _unchanged),
    **dict.fromkeys(
        (
            aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
            aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
        ),
        _reshaped,
    ),
    **dict.fromkeys((aten.transpose.int, aten.t.default, aten.mT.default, aten.swapaxes.default), _again),
    aten.permute.default: _permuted,
    aten.alias.default: _unchanged,
    aten.detach.default: _unchanged,
    aten.detach_.default: _unchanged,
}  # fmt: skip
