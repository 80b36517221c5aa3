"""The one list of ops, and what a rule is given.

A rule is a function from a `Call` to its fact: a `Value`, a tuple of facts for an op with several results, or a raised
`NonLocal` / `Refuse`. It is registered under the exact ATen overloads that it speaks for::

    @rule(aten.flip.default)
    def flip(call: Call) -> Fact:
        x = call.stream("self")
        call.require(x.layout.time not in call.dims("dims"), "flip over the time axis needs the end of the stream")
        return call.framewise(x.layout)
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import fx, nn

from .errors import NonLocal
from .layout import TIME, Dim, Layout, Sizes, dim, from_sizes
from .schedule import Taps
from .stream_graph import Carry, Fill, Length, Lower, Op, Read, Rounded, StreamGraph, Value, View, read

Fact = Any  # Value, Static, InClip, or a tuple of these
Rule = Callable[["Call"], Fact]


@dataclass(frozen=True)
class Static:
    """Does not depend on time."""


@dataclass(frozen=True)
class InClip:
    """Depends on the clip as a whole: evaluated offline on each clip. `reason` is what ended the stream."""

    reason: str
    spectral: bool = field(default=False, kw_only=True)  # frequencies have taken the place of time


@dataclass(frozen=True)
class Tail(InClip):
    """The last frames of a stream, as they are when the stream ends now: frames ``L-first .. L-first+count-1``.

    Attributes:
        of: the stream.
        squeeze: the (single) frame's time axis is dropped.
        times: how often the (single) frame is repeated.
    """

    of: Value
    first: int
    count: int
    squeeze: bool
    times: int = 1


@dataclass(frozen=True)
class Sample:
    """A small module that exercises a rule: the contract test runs over all of them.

    Attributes:
        shape: of the example, one for each input if there are several.
        length, multiple: of the test stream (default twice the example's and some), and what it must be a multiple of.
        unbounded: the receptive field is infinite.
        lag: steps that an output may come later than it could (mirrored padding waits as long as its start needs).
        output_time_dim: where the output has its time axis, if not where the input has it.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] | list[tuple[int, ...]]
    time_dim: int = 2
    length: int = 0
    multiple: int = 1
    unbounded: bool = False
    lag: int = 0
    output_time_dim: int | str = "same"


@dataclass(frozen=True)
class Head(InClip):
    """The first frames of a stream: ``0 .. count-1``, as one that is put before the stream needs them.

    Attributes:
        of: the stream.
        count: how many.
        times: how often the (single) frame is repeated.
    """

    of: Value
    count: int
    times: int = 1


@dataclass(frozen=True)
class Rolled(InClip):
    """A stream of which what moves out at one end of the clip comes in at the other; overwritten there it is one again.

    Attributes:
        of: the stream.
        shift: by so many frames (negative: towards the start).
    """

    of: Value
    shift: int


@dataclass(frozen=True)
class Pair(InClip):
    """An entry for every two frames of a stream, as attention scores and masks have: it becomes a stream again where
    it is summed over one of the two, if what is summed reaches no further than so many frames ahead.

    Attributes:
        value: with `TIME` for the one frame and `KEY` for the other; its op is evaluated where it is summed up.
    """

    value: Value


@dataclass
class Entry:
    """All that is known of one op.

    Attributes:
        rule: for frames; None: torch's tags or its decomposition tell, or it is recomputed over clips.
        pair_rule: for pairs of frames; asked when the rule for frames cannot.
        spectral_rule: for what was made of spectra over the whole clip, of which it may make frames again.
        takes_edges: its rule understands `Head` and `Tail` facts of its arguments.
        takes_rolled: its rule understands `Rolled`.
        hands_on: it hands on its first argument as it is, in eval mode, and leaves the graph.
        stays: it is not decomposed, though it has no rule.
        draws_in_training: torch says that it draws random numbers, but in eval mode it does not.
    """

    rule: Rule | None = None
    pair_rule: Rule | None = None
    spectral_rule: Rule | None = None
    takes_edges: bool = False
    takes_rolled: bool = False
    hands_on: bool = False
    stays: bool = False
    draws_in_training: bool = False


_OPS: dict[torch._ops.OpOverload, Entry] = {}
_RULES_OF_KIND: dict[type, Rule] = {}


def rule(*overloads: torch._ops.OpOverload, **known: bool) -> Callable[[Rule], Rule]:
    """Register a rule for exact overloads, with further fields of their `Entry`.

    Raises:
        TypeError: for a packet (``aten.add`` instead of ``aten.add.Tensor``).
        ValueError: for an overload that has a rule already.
    """

    def register(function: Rule) -> Rule:
        for op in overloads:
            if op in _OPS and _OPS[op].rule is not None:
                raise ValueError(f"{op} has a rule already")
        note(*overloads, rule=function, **known)
        return function

    return register


def note(*overloads: torch._ops.OpOverload, **known: Any) -> None:
    """Set fields of the entries of exact overloads.

    Raises:
        TypeError: for a packet.
    """
    for op in overloads:
        if not isinstance(op, torch._ops.OpOverload):
            raise TypeError(f"{op} is not an overload")
        _OPS[op] = dataclasses.replace(_OPS.get(op, Entry()), **known)


def entry(target: Any) -> Entry:
    """What is known of an op; nothing of what is not in the list."""
    from . import rules  # noqa: F401

    return _OPS.get(target, _UNKNOWN)


_UNKNOWN = Entry()


def rule_of_kind(kind: type) -> Callable[[Rule], Rule]:
    """Register a rule for all targets of a class of our own."""

    def register(function: Rule) -> Rule:
        _RULES_OF_KIND[kind] = function
        return function

    return register


def pair_rule(*overloads: torch._ops.OpOverload) -> Callable[[Rule], Rule]:
    """Register a rule for overloads where pairs of frames go in or come out; asked when the frames' rule cannot."""

    def register(function: Rule) -> Rule:
        note(*overloads, pair_rule=function)
        return function

    return register


def overloads(names: str) -> Iterable[torch._ops.OpOverload]:
    """The ATen overloads named ``"relu.default add.Tensor ..."``, less those that this torch does not have."""
    for name in names.split():
        packet, _, variant = name.partition(".")
        found = getattr(getattr(torch.ops.aten, packet, None), variant, None)
        if found is not None:
            yield found


def is_pointwise(target: Any) -> bool:
    """Whether a node's target is an overload that computes entry by entry."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def find_rule(target: Any) -> Rule | None:
    """The rule of an overload, or the one for all pointwise ops, or None."""
    from . import rules

    if type(target) in _RULES_OF_KIND:
        return _RULES_OF_KIND[type(target)]
    if (known := entry(target).rule) is not None:
        return known
    if is_pointwise(target):
        return rules.pointwise.pointwise
    return None


def takes_edges(target: Any) -> bool:
    """Whether an overload's rule understands first and last frames of streams among its arguments."""
    from . import rules

    return entry(target).takes_edges or find_rule(target) is rules.pointwise.pointwise


def find_pair_rule(target: Any) -> Rule | None:
    """The rule of an overload for pairs of frames, or the one for all pointwise ops, or None."""
    from . import rules

    if (known := entry(target).pair_rule) is not None:
        return known
    return rules.pairs.pointwise if find_rule(target) is rules.pointwise.pointwise else None


@dataclass(eq=False)
class Call:
    """One call of an op in the traced graph, with what is known of its arguments.

    Attributes:
        node: the traced node.
        facts: the facts of all nodes so far.
        samples: the arguments by name as seen at each sample point (ints differ where they depend on T or batch).
        sizes: the result's shape(s) at each sample point.
        constants: the values of what depends on parameters alone.
        context: the most frames back that attention may read, if the user bounds it.
    """

    node: fx.Node
    graph: StreamGraph
    facts: dict[fx.Node, Fact]
    samples: list[dict[str, Any]]
    sizes: list[Any]
    constants: Any = None
    context: int | None = None

    # -- arguments ---------------------------------------------------------------------------------------------------

    def arg(self, name: str, default: Any = None) -> Any:
        """An argument that must not depend on the clip's length."""
        seen = [s.get(name, default) for s in self.samples]
        first = seen[0]
        self.require(
            all(_plain(s) == _plain(first) for s in seen), f"its argument '{name}' depends on the clip's length"
        )
        return default if first is None else first

    def sampled(self, name: str, default: Any = None) -> list[Any]:
        """An argument as seen at each sample point."""
        return [s.get(name, default) for s in self.samples]

    def fact(self, arg: Any) -> Fact:
        """The fact of an argument (Static for what is not a node)."""
        return self.facts[arg] if isinstance(arg, fx.Node) else Static()

    def maybe(self, name: str) -> Value | None:
        """The stream given as this argument, or None if it does not depend on time."""
        fact = self.fact(self.samples[0].get(name))
        return fact if isinstance(fact, Value) else None

    def stream(self, name: str, *, clean: bool = False) -> Value:
        """The stream given as this argument; `clean`: with time in a dimension of its own.

        Raises:
            NonLocal: it is no stream, or time cannot be freed.
        """
        value = self.maybe(name)
        if value is None:
            raise NonLocal(f"its argument '{name}' does not depend on time but others do")
        return self.ungroup(value) if clean else value

    @property
    def stream_nodes(self) -> list[fx.Node]:
        """The traced arguments that are streams, in order."""
        return [n for n in self.node.all_input_nodes if isinstance(self.facts[n], Value)]

    @property
    def streams(self) -> list[Value]:
        """All arguments that are streams, in order."""
        return [self.facts[n] for n in self.stream_nodes]

    def require(self, condition: bool, reason: str) -> None:
        """Raise `NonLocal` with this reason unless the condition holds."""
        if not condition:
            raise NonLocal(reason)

    def static_layout(self, node: Any) -> Layout:
        """The layout of an argument that does not depend on time."""
        return from_sizes(self.sizes_of(node), self.graph.batch)

    def sizes_of(self, node: fx.Node) -> list[Sizes]:
        """A traced value's shape: for each dimension its sizes at the sample points."""
        return _by_dimension(node.meta["sizes"])

    @property
    def op_name(self) -> str:
        """The op's name without that of the overload: ``aten::slice``."""
        target: Any = self.node.target
        name: str = target._schema.name
        return name

    @property
    def out_sizes(self) -> list[Sizes]:
        """The (single) result's shape: for each dimension its sizes at the sample points."""
        return _by_dimension(self.sizes)

    def resized(self, value: Value, axis: int) -> Dim:
        """A dimension of the (first) result that `value` has too, perhaps with another size."""
        sizes = [s[0] if s and isinstance(s[0], tuple) else s for s in self.sizes]
        after = tuple(s[axis] for s in sizes)
        before = tuple(value.layout.sizes(b, n)[axis] for b, n in zip(self.graph.batch, value.lengths, strict=True))
        return value.layout[axis] if before == after else from_sizes([after], self.graph.batch)[0]

    def length_like(self, wanted: Sizes) -> tuple[Value, Length]:
        """A value whose length the sizes `wanted` follow, and how: they are its own, differ by a constant, or are that
        rounded to a multiple of something."""
        for value in reversed(self.graph.values):
            if value.lengths == wanted:
                return value, lambda n: n
        for value in self.graph.inputs:
            differences = [w - n for w, n in zip(wanted, value.lengths, strict=True)]
            if len(set(value.lengths)) > 1 and len(set(differences)) == 1:
                return value, functools.partial(operator.add, differences[0])
        for value in self.graph.inputs:
            if (rounded := _rounded(value.lengths, wanted)) is not None:
                return value, rounded
        raise NonLocal("its length follows the clip's in a way that is not understood")

    # -- making values -----------------------------------------------------------------------------------------------

    def emit(self, layout: Layout, reads: Sequence[Read], *, lower: Lower, **options: Any) -> Value:
        """Append an op with one result; see `emit_several`."""
        return self.emit_several([layout], reads, lower=lower, several=False, **options)[0]

    def emit_several(
        self,
        layouts: Sequence[Layout],
        reads: Sequence[Read],
        *,
        lower: Lower,
        several: bool = True,
        rate: Fraction | None = None,
        length: Length | None = None,
        length_of: Sequence[Value] | None = None,
        carries: Sequence[Carry] = (),
        indexed: bool = False,
        padded: bool = False,
        memory: bool | None = None,
        sequential: bool = False,
        limit: int | None = None,
        dtypes: Sequence[torch.dtype] | None = None,
        nodes: Sequence[fx.Node] | None = None,
        masked_until: int = 0,
    ) -> tuple[Value, ...]:
        """Append an op; returns its values.

        Args:
            layouts: of the results.
            reads: what it reads.
            lower: emits it into a generated program.
            rate, length: of the results; default those of the first source.
            length_of: the values whose lengths `length` takes; default the sources of the reads as the op sees them.
            carries, sequential, limit: see `Op`.
            indexed, padded, memory: see `Value`; it is so by itself, whatever it reads.
            dtypes: of the results, where the traced node does not tell.
            nodes: the traced arguments that the reads stand for; default all that are streams.
            masked_until: its first so many frames are made by a masked program, whatever it reads.
        """
        sources = tuple(length_of if length_of is not None else [r.source for r in reads])
        length = length or (lambda n, *_: n)
        inputs = [r.source for r in reads] + list(sources)
        op = Op(self.node.name, self.node, list(reads), lower, [], list(carries), sequential, limit)
        op.several, op.masked_until = several, masked_until
        op.stream_nodes = list(self.stream_nodes if nodes is None else nodes)
        for i, one in enumerate(layouts):
            value = Value(
                name=self.node.name if len(layouts) == 1 else f"{self.node.name}_{i}",
                layout=one,
                dtype=dtypes[i] if dtypes else self.dtype(i if several else None),
                rate=inputs[0].rate if rate is None else rate,
                lengths=tuple(length(*(s.lengths[p] for s in sources)) for p in range(len(self.graph.ticks))),
                length_sources=sources,
                length=length,
                producer=op,
                node=self.node,
                indexed=indexed or any(v.indexed for v in inputs),
                padded=padded or any(v.padded for v in inputs) or any(r.levels for r in reads),
                memory=(bool(carries) if memory is None else memory) or any(v.memory for v in inputs),
            )
            op.outputs.append(self.graph.add_value(value))
        self.graph.ops.append(op)
        return tuple(op.outputs)

    def view(
        self, value: Value, offset: int, length: Length, fill: Fill | None = None, length_of: Value | None = None
    ) -> Value:
        """`value` read at other indices: frame i is frame ``i + offset``, `fill` outside; nothing is computed.

        `length_of`: the value whose length `length` takes, if not its own.
        """
        like = length_of or value
        return self.graph.add_value(
            Value(
                name=self.node.name,
                layout=value.layout,
                dtype=value.dtype,
                rate=value.rate,
                lengths=tuple(length(n) for n in like.lengths),
                length_sources=(like,),
                length=length,
                producer=View(value, offset, fill),
                node=self.node,
                indexed=value.indexed,
                padded=value.padded or fill is not None,
                memory=value.memory,
            )
        )

    def framewise(
        self, layout: Layout | Sequence[Layout], values: Sequence[Value] | None = None, lower: Lower | None = None
    ) -> Any:
        """The op applied to each frame by itself: frame j of the result from frame j of every stream."""
        values = self.streams if values is None else values
        rates = {v.rate for v in values}
        self.require(len(rates) == 1, "its arguments have different frame rates")
        self.require(len({v.lengths for v in values}) == 1, "its arguments have different lengths in time")
        reads = [read(v) for v in values]
        if isinstance(layout, Layout):
            return self.emit(layout, reads, lower=lower or lower_call, length_of=[values[0]])
        return self.emit_several(layout, reads, lower=lower or lower_call, length_of=[values[0]])

    def dtype(self, index: int | None = None) -> torch.dtype:
        """The (index-th, else the first) result's dtype."""
        val = self.node.meta["val"]
        dtype: torch.dtype = (val[index or 0] if isinstance(val, (tuple, list)) else val).dtype
        return dtype

    # -- the time axis -----------------------------------------------------------------------------------------------

    def ungroup(self, value: Value) -> Value:
        """`value` with time in a dimension of its own: ``T*2`` (time outside) becomes a clock twice as fast."""
        if value.layout.clean:
            return value
        axis = value.layout.time
        time_first = value.layout[axis][0] is TIME
        rest = value.layout[axis][1:]
        self.require(time_first and all(isinstance(f, int) for f in rest), "time is folded into another dimension")
        if "ungrouped" not in value.normalised:
            (up,) = rest
            assert isinstance(up, int)
            value.normalised["ungrouped"] = self.emit(
                value.layout.replace(axis, (TIME,)),
                [read(value, Taps(1, up, 0, 0))],
                rate=value.rate * up,
                length=lambda n: n * up,
                length_of=[value],
                lower=lambda b, op, windows, span, _: b.narrow_merged(op.outputs[0], windows[0], up, span),
                dtypes=[value.dtype],
            )
        ungrouped: Value = value.normalised["ungrouped"]
        return ungrouped

    def group(self, value: Value, frames: int) -> Value:
        """`value` with every `frames` frames made one: a clock slower by that factor."""
        key = ("grouped", frames)
        if key not in value.normalised:
            axis = value.layout.time
            parts = value.layout[axis]
            at = parts.index(TIME)
            value.normalised[key] = self.emit(
                value.layout.replace(axis, dim(*parts[:at], TIME, frames, *parts[at + 1 :])),
                [read(value, Taps(frames, 1, 0, frames - 1))],
                rate=value.rate / frames,
                length=lambda n: n // frames,
                length_of=[value],
                lower=lambda b, op, windows, span, _: windows[0].node,
                dtypes=[value.dtype],
            )
        grouped: Value = value.normalised[key]
        return grouped

    def as_table(self, node: fx.Node, axis: int, like: Value) -> Value:
        """A static tensor whose dimension `axis` lies along time: a stream that ends with the table."""
        size = self.sizes_of(node)[axis][0]
        self.require(set(like.lengths) == {size}, "something without time lies along the time axis")
        layout = self.static_layout(node).replace(axis, (TIME,))
        return self.emit(
            layout,
            [],
            rate=like.rate,
            length_of=[like],
            length=lambda n: n,
            indexed=True,
            limit=size,
            lower=lambda b, op, windows, span, _: b.table(node, axis, 0, size, op, span),
            dtypes=[node.meta["val"].dtype],
        )


def lower_call(b: Any, op: Op, windows: list[Any], span: range, carries: list[fx.Node]) -> Any:
    """The op itself on the windows of its streams: what most ops lower to."""
    return b.call(op, windows)


MOST_ROUNDED = 4096


def _rounded(lengths: Sizes, wanted: Sizes) -> Length | None:
    """How sizes follow lengths, if it is by rounding them, and something constant, to a multiple of a number."""
    differences = [w - n for w, n in zip(wanted, lengths, strict=True)]
    spread = max(differences) - min(differences)
    if spread > MOST_ROUNDED:
        return None
    for multiple in range(spread + 1, 2 * spread + 2):
        left = wanted[0] % multiple
        if all(w % multiple == left for w in wanted):
            more = max(differences) - left
            rounded = Rounded(more, multiple, left)
            if all(rounded(n) == w for w, n in zip(wanted, lengths, strict=True)):
                return rounded
    return None


def _by_dimension(shapes: Sequence[Sequence[int]]) -> list[Sizes]:
    """Shapes at the sample points, dimension by dimension.

    Raises:
        NonLocal: they have not the same number of dimensions (`squeeze` of what is one frame only in a clip).
    """
    if len({len(s) for s in shapes}) > 1:
        raise NonLocal("how many dimensions there are depends on the clip's length")
    return list(zip(*shapes, strict=True))


def _plain(arg: Any) -> Any:
    """An argument in a form in which two can be compared."""
    if isinstance(arg, (list, tuple)):
        return tuple(_plain(a) for a in arg)
    return "nan" if isinstance(arg, float) and arg != arg else arg
