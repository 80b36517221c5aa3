"""A stream on its way through a step model: what is fed, and the frames that come out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from models.sample import Kind, Sample

TOLERANCES = {  # relative, absolute
    torch.float32: (1e-4, 1e-5),
    torch.float64: (1e-10, 1e-10),
    torch.float16: (2e-2, 2e-2),
    torch.bfloat16: (2e-2, 2e-2),
}


class ContractError(AssertionError):
    """A promise is broken; the message names the model, the check and the step."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ContractError(message)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal within the tolerances of docs/design.md."""
    rtol, atol = TOLERANCES.get(b.dtype, (0.0, 0.0))
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=rtol, atol=atol)


def difference(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"is {tuple(a.shape)} {a.dtype}, expected {tuple(b.shape)} {b.dtype}"
    return f"differs by {(a.double() - b.double()).abs().max().item():.2g}"


def spoil(tensor: Tensor) -> None:
    """Overwrites a tensor with what must not show: NaN, or another integer."""
    if tensor.is_floating_point():
        tensor.fill_(math.nan)
    else:
        tensor.zero_()


@dataclass
class Case:
    """A net, the step model made from it, and what is asked of the pair."""

    sample: Sample
    step: Any
    model: nn.Module = field(repr=False)
    reaches: list[Any] | None = field(default=None, repr=False)  # measured once, see reach.py

    def offline(self, clips: Sequence[Tensor]) -> list[Tensor]:
        return pytree.tree_leaves(self.model(*clips))

    @cached_property
    def example(self) -> tuple[list[Tensor], pytree.TreeSpec]:
        return pytree.tree_flatten(self.model(*self.sample.inputs(self.sample.clip_length)))

    @cached_property
    def time_dims(self) -> list[int | None]:
        return self.sample.output_time_dims(len(self.example[0]))

    @cached_property
    def kinds(self) -> list[Kind]:
        """Per output: what the sample demands, or the alternative that the step model declares."""
        demanded = self.sample.kinds(len(self.example[0]))
        require(len(self.step.outputs) == len(demanded), f"step.outputs has {len(self.step.outputs)} entries")
        for i, (kind, output) in enumerate(zip(demanded, self.step.outputs, strict=True)):
            fits = output.equivalence in (kind, self.sample.or_kind)
            require(fits, f"output {i} is declared {output.equivalence!r}, expected {kind!r}")
        return [output.equivalence for output in self.step.outputs]

    @property
    def streams(self) -> list[int]:
        """The outputs that are streams."""
        return [i for i, kind in enumerate(self.kinds) if kind == "stream"]

    def frame_rank(self, i: int) -> int:
        return self.example[0][i].dim() - (self.time_dims[i] is not None)

    def stack_dim(self, i: int) -> int:
        """The axis along which output i holds the frames of several steps."""
        if self.kinds[i] == "stream":
            return self.time_dims[i]  # type: ignore[return-value]
        return min(self.sample.stack_dim, self.frame_rank(i))

    def run(self, clips: Sequence[Tensor], start: int = 0, clean: bool = True) -> "Run":
        if clean:
            self.step.clean_state()
        return Run(self, clips, start)


class Run:
    """One pass of a stream through the step model, and the frames that came out, output by output."""

    def __init__(self, case: Case, clips: Sequence[Tensor], start: int = 0) -> None:
        self.case, self.clips, self.position = case, clips, start
        self.length = case.sample.steps(clips)
        self.frames: list[list[tuple[str, Tensor]]] = [[] for _ in case.example[0]]
        self.counts: list[list[int]] = []  # frames per call and output
        self.returned: list[Tensor] = []
        self.ranks: dict[int, int] = {}  # of each output, as single steps give it

    def forward_step(self, **options: bool) -> "Run":
        frames, label = self.case.sample.frames(self.clips, self.position), f"forward_step of frame {self.position}"
        output = self.collect(self.case.step.forward_step(*frames, **options), label)
        for i, leaf in enumerate(output):
            rank = self.ranks.setdefault(i, leaf.dim()) if leaf is not None else None
            require(leaf is None or leaf.dim() == rank, f"{label}: output {i} once has its time axis, once not")
        self.position += 1
        return self

    def steps_to(self, stop: int) -> "Run":
        while self.position < stop:
            self.forward_step()
        return self

    def chunk_to(self, stop: int, **options: bool) -> "Run":
        chunk = self.case.sample.chunk(self.clips, self.position, stop)
        label = f"forward_steps of frames {self.position}:{stop}" + (" with pad_end" if options.get("pad_end") else "")
        self.require_chunks(self.collect(self.case.step.forward_steps(*chunk, **options), label), label)
        self.position = stop
        return self

    def flush(self) -> "Run":
        label = f"flush after {self.position} frames"
        self.require_chunks(self.collect(self.case.step.flush(), label), label)
        return self

    def require_chunks(self, leaves: list[Tensor | None], label: str) -> None:
        for i in self.case.streams:
            leaf = leaves[i]
            require(leaf is None or leaf.dim() == self.case.frame_rank(i) + 1, f"{label}: output {i} has no time axis")

    def finish(self) -> "Run":
        """Single steps to the end, the last frame by a chunk that ends the stream."""
        return self.steps_to(self.length - 1).chunk_to(self.length, pad_end=True)

    def collect(self, output: Any, label: str) -> list[Tensor | None]:
        """Takes note of what a call returned; gives its leaves."""
        leaves, spec = pytree.tree_flatten(output)
        if output is None:
            leaves = [None] * len(self.frames)
        else:
            require(spec == self.case.example[1], f"{label}: structure {spec}, expected {self.case.example[1]}")
        self.counts.append([])
        for i, leaf in enumerate(leaves):
            frames = [] if leaf is None else self.split(leaf, i, label)
            require(leaf is None or len(frames) > 0, f"{label}: output {i} has no frames where None is expected")
            self.frames[i] += [(label, frame.clone()) for frame in frames]
            self.counts[-1].append(len(frames))
            self.returned += [] if leaf is None else [leaf]
        return leaves

    def split(self, leaf: Tensor, i: int, label: str) -> list[Tensor]:
        rank = self.case.frame_rank(i)
        require(leaf.dim() in (rank, rank + 1), f"{label}: output {i} is {tuple(leaf.shape)}, expected rank {rank}")
        return [leaf] if leaf.dim() == rank else list(leaf.unbind(self.case.stack_dim(i)))

    def expect(self, wanted: Sequence[Sequence[Tensor]], since: Sequence[int] | None = None) -> "Run":
        """The frames are these; those before ``since`` (per output) came out earlier."""
        for i, (got, want) in enumerate(zip(self.frames, wanted, strict=True)):
            first = since[i] if since else 0
            for j, ((label, frame), target) in enumerate(zip(got, want[first:], strict=False), first):
                require(same(frame, target), f"{label}: output {i}, its frame {j}, {difference(frame, target)}")
            place = got[-1][0] if got else f"step {self.position}"
            require(len(got) == len(want) - first, f"up to {place}: output {i} gave {len(got)} frames, expected "
                    f"{len(want) - first}")  # fmt: skip
        return self

    def emitted(self) -> list[int]:
        """Frames so far, per output."""
        return [len(frames) for frames in self.frames]

    def emitted_after(self, steps: int) -> list[int]:
        """Frames of the first so many calls, per output."""
        return [sum(counts[i] for counts in self.counts[:steps]) for i in range(len(self.frames))]
