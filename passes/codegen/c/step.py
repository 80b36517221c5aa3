"""The programs of a step as one C file, and how state is kept for them.

Every history is a ring of frames. That of small frames is one tensor to the program: there each frame is written twice,
``slots`` apart, so that any window of it lies in one piece. What is not a history is a ring of one frame. A step writes
beside what the state before it is made of, so that this state stays whole until the step after the next.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ....runtime.native import Ring
from ....runtime.program import Program
from . import views
from .builder import Builder, Code, NoForm
from .core_graph import core_graph
from .expressions import Load, Value
from .forms import FORMS
from .kernels import Kernels
from .operators import TYPES
from .products import Target
from .rings import Phase, moves_by, place_of, push_of, rings_of, window_of
from .scratch import bytes_of, places_of, scoped
from .statements import Copy, Lines
from .views import Buffer, View, contiguous

aten = torch.ops.aten
_NAMES = re.compile(r"\b[A-Za-z_]\w*\b")
FAR = 1 << 20  # bytes of constants and state from which on they do not stay in the caches
LARGE = 8  # tiles of a product from which on it fetches something
LIMIT = 3000  # loop nests of a step: more take the compiler longer than is worth waiting for


@dataclass(frozen=True)
class Source:
    """A step in C.

    Attributes:
        text: the file.
        constants: what it reads besides, in the order of its pointers.
        scratch: bytes for what is in between.
        rings: how state is kept.
        results: for each phase the shapes and dtypes of the outputs; None where nothing is due.
        multiplies: in sums of products, of all phases.
    """

    text: str
    constants: list[torch.Tensor]
    scratch: int
    rings: list[Ring]
    results: list[list[tuple[tuple[int, ...], torch.dtype] | None]]
    multiplies: int


def step_source(
    programs: Sequence[Program], arguments: Sequence[torch.Tensor], frames: int, groups: Sequence[int], target: Target
) -> Source:
    """The programs of a step in C, for arguments of just these shapes.

    Args:
        programs: one for each phase, all on the same state:
            ``(frames..., parts of the state...) -> (outputs, parts of the state after)``.
        arguments: of the shapes and dtypes in question.
        frames: how many of them are not state.
        groups: for each part which history or state it belongs to.
        target: what it is compiled for.

    Raises:
        NoForm: an op has no form in C.
    """
    phases = []
    for program in programs:
        graph, held = core_graph(program.graph, program.tensors, arguments)
        results = [y is not None for y in program.graph.output_node().args[0][0]]
        phases.append(Phase(graph, held, results, program.tensors))
    for x in arguments:
        if x.dtype not in TYPES:
            raise NoForm("a step", f"on {x.dtype}")
    rings = rings_of(phases, arguments, frames, groups)
    for _ in range(3):  # what comes about in another order once its state does
        file = _File(phases, arguments, frames, rings, target)
        natural = [file.natural[i].most_common(1)[0][0] if i in file.natural else r.order for i, r in enumerate(rings)]
        if natural == [r.order for r in rings]:
            break
        rings = [replace(r, order=o) for r, o in zip(rings, natural, strict=True)]
    return file.source()


class _File:
    """A C file in the making."""

    def __init__(
        self, phases: Sequence[Phase], arguments: Sequence[torch.Tensor], frames: int, rings: list[Ring], target: Target
    ) -> None:
        self.rings, self.frames, self.arguments = rings, frames, arguments
        held = {id(t): t.nbytes for phase in phases for t in phase.tensors.values()}
        self.kernels = Kernels(target, sum(held.values()) + sum(x.nbytes for x in arguments) > FAR)
        self.constants: dict[int, Buffer] = {}
        self.natural: dict[int, Counter[tuple[int, ...]]] = {}
        self.results: list[list[tuple[tuple[int, ...], torch.dtype] | None]] = []
        self.bodies = [self._body(number, phase) for number, phase in enumerate(phases)]

    def _constant(self, name: str, tensor: torch.Tensor) -> Buffer:
        if id(tensor) not in self.constants:
            place = f"c{len(self.constants)}_" + re.sub(r"\W", "_", name)
            if tensor.dtype not in TYPES:
                raise NoForm("a step", f"with a constant of {tensor.dtype}")
            # as it is now, like those laid out anew
            copied = tensor.detach().clone(memory_format=torch.contiguous_format)
            self.constants[id(tensor)] = Buffer(place, tensor.dtype, tensor.numel(), copied)
        return self.constants[id(tensor)]

    def _body(self, number: int, phase: Phase) -> tuple[Code, list[str]]:
        """The statements of a phase, and its parameters."""
        code = Code(self.kernels)
        given = phase.placeholders()
        new = self._new(phase)
        homes: dict[fx.Node, View] = {}
        for (i, j), node in new.items():
            homes.setdefault(node, place_of(i, self.rings[i], j))
        builder = Builder(code, FORMS, phase.graph, homes)
        parameters = []
        frames: dict[fx.Node, Value] = {}
        for i, node in enumerate(given[: self.frames]):
            x = node.meta["val"]
            parameters.append(f"const {TYPES[x.dtype]} *restrict x{i}")
            value = Value(tuple(x.shape), Load(contiguous(Buffer(f"x{i}", x.dtype), x.shape), x.dtype))
            frames[node] = value
        parts = len(self.arguments) - self.frames
        for node, name in zip(given[self.frames + parts :], phase.held, strict=True):
            x = node.meta["val"]
            place = contiguous(self._constant(name, phase.tensors[name]), x.shape)
            builder.env[node] = Value(tuple(x.shape), Load(place, x.dtype))
        pushes: dict[fx.Node, tuple[int, int]] = {}
        for i, ring in enumerate(self.rings):
            code.statements.append(Lines(self._opened(i, ring)))
            for j, part in enumerate(ring.parts):
                node = given[self.frames + part]
                builder.env[node] = Value(ring.shape, Load(place_of(i, ring, j), ring.dtype))
            if ring.axis is not None and (pushed := push_of(phase, ring.parts[0], self.frames)) is not None:
                pushes[pushed[0]] = i, pushed[2]
        for node, value in frames.items():
            builder.env[node] = builder.settled(value, node)
        for node in phase.graph.nodes:
            if node in pushes:
                self._push(builder, node, *pushes[node])
            elif node.op == "call_function":
                builder.visit(node)
        if code.loops > LIMIT:
            raise NoForm("a step", f"of more than {LIMIT} loops")
        results: list[tuple[tuple[int, ...], torch.dtype] | None] = []
        outputs = iter(phase.outputs())
        for there in phase.results:
            if not there:
                results.append(None)
                continue
            node = next(outputs)
            value = builder.of(node)
            name = f"y{sum(r is not None for r in results)}"
            parameters.append(f"{TYPES[value.dtype]} *restrict {name}")
            results.append((value.shape, value.dtype))
            builder.store(value, contiguous(Buffer(name, value.dtype), value.shape), f"output {node.name}")
        moved = dict(pushes.values()) | dict(Counter(i for i, _ in new))
        for (i, j), node in new.items():
            value, place = builder.of(node), place_of(i, self.rings[i], j)
            self._note(i, builder.came.get(node) or builder.order(value))
            if value.view is None or value.view.offset != place.offset or value.view.buffer != place.buffer:
                builder.store(value, place, f"state {i}")
        for i, ring in enumerate(self.rings):
            begins = f"(at[{i}] + {moved[i]}) % {ring.slots}" if moved.get(i) else f"at[{i}]"
            code.statements.append(Lines([f"to[{i}] = {begins};"]))
        self.results.append(results)
        return code, parameters

    def _new(self, phase: Phase) -> dict[tuple[int, int], fx.Node]:
        """What a step makes of the rings that are no windows: the ring and the place in it, counted from its begin."""
        found = {}
        given, after = phase.placeholders(), phase.after()
        for i, ring in enumerate(self.rings):
            if ring.axis is not None:
                continue
            if len(ring.parts) > 1:
                count = moves_by(phase, ring.parts, self.frames)
                assert count is not None
            else:
                count = int(after[ring.parts[0]] is not given[self.frames + ring.parts[0]])
            for j in range(count):
                found[i, ring.frames + j] = after[ring.parts[len(ring.parts) - count + j]]
        return found

    # -- state ---------------------------------------------------------------------------------------------------------

    def _opened(self, i: int, ring: Ring) -> list[str]:
        """Where the frames of a ring lie before a step, and their places after it."""
        kind, size = TYPES[ring.dtype], ring.size
        text = (
            f"/* state {i}: {ring.frames} of {ring.slots} frames of {size} */"
            if ring.frames > 1
            else f"/* state {i} */"
        )
        if ring.axis is not None:
            return [text, f"{kind} *h{i} = ring{i} + at[{i}] * {size};"]
        return [
            text,
            *(f"{kind} *h{i}_{j} = ring{i} + (at[{i}] + {j}) % {ring.slots} * {size};" for j in range(ring.slots)),
        ]

    def _push(self, builder: Builder, node: fx.Node, i: int, new: int) -> None:
        """Write frames into a ring, each in both of its places; the `cat` then lies there."""
        ring, out = self.rings[i], node.meta["val"]
        axis = ring.axis
        assert axis is not None
        joined: Any = node.args[0]
        place, at = window_of(i, ring, ring.frames + new), ring.frames
        for x in joined[1:]:
            value = builder.of(x)
            if value.dtype != ring.dtype:
                raise NoForm("aten.cat", "of several types")
            count = value.shape[axis]
            builder.store(value, views.slice_(axis, at, count)(place), node.name)
            self._note(i, [d for d in builder.order(value) if d != axis])
            at += count
        for j in range(new):
            slot = f"(at[{i}] + {ring.frames + j})"
            mirror = f"ring{i} + ({slot} < {ring.slots} ? {slot} + {ring.slots} : {slot} - {ring.slots}) * {ring.size}"
            builder.code.add(Copy(mirror, f"h{i} + {(ring.frames + j) * ring.size}", ring.size, ring.dtype))
        builder.env[node] = Value(tuple(out.shape), Load(place, ring.dtype))

    def _note(self, i: int, order: Sequence[int]) -> None:
        self.natural.setdefault(i, Counter())[tuple(order)] += 1

    # -- the file -----------------------------------------------------------------------------------------------------

    def source(self) -> Source:
        """The file and what belongs to it."""
        buffers = [*self.constants.values(), *self.kernels.packed]
        named = [[set(_NAMES.findall("\n".join(x.text))) for x in code.statements] for code, _ in self.bodies]
        used = {name for phase in named for names in phase for name in names}
        kept = [b for b in buffers if b.name in used]
        places = {b.name: 3 + len(self.rings) + n for n, b in enumerate(kept)}
        lasting, room = self._lasting(named)
        most = room
        functions: list[str] = []
        for number, (code, parameters) in enumerate(self.bodies):
            mine = {name for names in named[number] for name in names}
            head = ["const int32_t *restrict at = p[k];", "int32_t *restrict to = p[1 - k];"]
            head += [f"{TYPES[r.dtype]} *ring{i} = p[{3 + i}];" for i, r in enumerate(self.rings)]
            head += [
                f"const {TYPES[b.dtype]} *restrict {b.name} = p[{places[b.name]}];" for b in kept if b.name in mine
            ]
            held, size = places_of([b for b in code.scratch if not b.zeros], named[number], room)
            held |= lasting[number]
            ahead = self._fetched(code, named[number], kept)
            body = scoped(code.statements, named[number], held, ahead)
            most = max(most, size)
            functions += [
                f"int step_{number}({', '.join(['void *const *restrict p, int k', *parameters])})", "{",
                *("  " + x for x in (*head, *body)), "  return 0;", "}", "",
            ]  # fmt: skip
        text = "\n".join([*self._preamble(), *self.kernels.source(), *functions])
        tensors = [b.tensor for b in kept if b.tensor is not None]
        return Source(text, tensors, most, self.rings, self.results, self.kernels.multiplies)

    def _fetched(self, code: Code, named: Sequence[set[str]], kept: Sequence[Buffer]) -> list[str]:
        """For each statement the arguments that tell what its function fetches while it computes.

        That is what the statements up to the next large product read, of constants and of the state.
        """
        sizes = {b.name: b.size * b.dtype.itemsize for b in kept}
        for i, ring in enumerate(self.rings):
            sizes |= {f"h{i}_{j}": ring.size * ring.dtype.itemsize for j in range(ring.slots)}
        found, near = ["(Ahead){0}, 0"] * len(named), set[str]()
        large = [i for i, x in enumerate(code.statements) if x.tiles >= LARGE]
        for i, until in itertools.pairwise([*large, len(named) - 1]):
            near |= named[i]
            soon = [n for names in named[i + 1 : until + 1] for n in sorted(names & sizes.keys() - near)]
            soon = list(dict.fromkeys(soon))
            if soon:
                lines = sum(-(-sizes[n] // 64) for n in soon)
                ranges = ", ".join(f"{{{n}, {sizes[n]}}}" for n in soon)
                each = -(-lines // code.statements[i].tiles)
                found[i] = f"(Ahead){{(const Range[]){{{ranges}}}, {len(soon)}, 0, 0}}, {each}"
        return found

    def _lasting(self, named: Sequence[Sequence[set[str]]]) -> tuple[list[dict[Buffer, int]], int]:
        """Places of the buffers whose zeros stay, for each phase, and the bytes that they take."""
        found: list[dict[Buffer, int]] = []
        room = 0
        for (code, _), statements in zip(self.bodies, named, strict=True):
            used = {name for names in statements for name in names}
            found.append({})
            for b in code.scratch:
                if b.zeros and b.name in used:
                    found[-1][b] = room
                    room += bytes_of(b)
        return found, room

    def _preamble(self) -> Iterator[str]:
        yield (Path(__file__).parent / "kernels.h").read_text()
        for dtype in (torch.float32, torch.float64):
            lanes, kind = self.kernels.target.lanes(dtype), TYPES[dtype]
            yield (
                f"typedef {kind} {kind}{lanes} __attribute__((vector_size({lanes * dtype.itemsize}), "
                f"aligned({dtype.itemsize}), may_alias));"
            )
        yield ""
        yield "/* p: where the frames of each ring begin (before and after, by turns), scratch, rings, constants."
        yield "   A step returns 1, and the state is as it was, if an index lies outside of what it chooses from. */"
        yield ""
