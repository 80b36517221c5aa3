"""A step model that keeps all frames and runs the module anew at each step: slow, exact, and of least delay.

It is what the contract's own tests are tried on, before and beside the compiler.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from contract import PROMISES, newest, steady_rate
from models.sample import Sample
from reach import measure_reach
from streaming import Case


@dataclass
class Output:
    """What an output declares."""

    equivalence: str
    delay: int | float = 0
    stride: int | Fraction = 1
    receptive_field: int | float = math.inf

    @property
    def padding(self) -> float:
        return self.receptive_field - 1 - self.delay


class Oracle:
    """The surface of a compiled step model, by recomputing everything."""

    def __init__(self, sample: Sample, model: nn.Module | None = None) -> None:
        self.sample, self.model = sample, model or sample.model()
        self.case = Case(sample, self, self.model)
        self.outputs = [Output(kind) for kind in sample.kinds(len(self.case.example[0]))]
        self.horizon = sample.whole(sample.length + 20)
        self.due: dict[int, list[int]] = {}
        for i, reach in zip(self.case.streams, measure_reach(self.case, self.horizon), strict=True):
            self.due[i] = reach.due(steady_rate(self.case, i))
            self.outputs[i].stride = 1 / steady_rate(self.case, i)
            self.outputs[i].receptive_field = math.inf if sample.is_unbounded(i) else reach.span()
        for i, output in enumerate(self.outputs):
            if output.equivalence == "first-clip":  # a window over features is due with the last of them
                features = Case(replace(sample, kind="stream", output_time_dim="same"), self, self.model.features)
                length = features.example[0][i].shape[sample.stack_dim]
                features.kinds = ["stream"]
                self.due[i] = measure_reach(features, self.horizon)[0].due(steady_rate(features, 0))[length - 1 :]
            if output.equivalence != "stream":
                output.stride = sample.stride
            if i in self.due:
                output.delay = self.due[i][0]
            elif output.equivalence == "clip":
                output.delay = sample.clip_length - 1
        self.first = [output.delay for output in self.outputs]
        self.clean_state()

    equivalence = property(lambda self: self.outputs[0].equivalence)
    delay = property(lambda self: self.outputs[0].delay)
    stride = property(lambda self: self.outputs[0].stride)
    padding = property(lambda self: self.outputs[0].padding)
    receptive_field = property(lambda self: self.outputs[0].receptive_field)

    def __call__(self, *clips: Tensor) -> Any:
        return self.model(*clips)

    def clean_state(self) -> None:
        self.state: dict[str, Tensor] = {}

    def get_state(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.state.items()}

    def set_state(self, state: dict[str, Tensor]) -> None:
        self.state = {name: tensor.clone() for name, tensor in state.items()}

    def forward_step(self, *frames: Tensor, update_state: bool = True) -> Any:
        pairs = zip(frames, self.sample.time_dims, self.sample.rates, strict=True)
        chunk = [x.unsqueeze(d) if r == 1 and d is not None else x for x, d, r in pairs]
        return self.advance(chunk, False, update_state, single=True)

    def forward_steps(self, *chunk: Tensor, pad_end: bool = False, update_state: bool = True) -> Any:
        return self.advance(chunk, pad_end, update_state)

    def flush(self) -> Any:
        empty = [
            x if d is None else x.narrow(d, 0, 0) for x, d in zip(self.clips(), self.sample.time_dims, strict=True)
        ]
        return self.advance(empty, True, False)

    def clips(self) -> list[Tensor]:
        """All inputs so far."""
        return [self.state[f"clip_{i}"] for i in range(len(self.sample.time_dims)) if f"clip_{i}" in self.state]

    def advance(self, chunk: Sequence[Tensor], pad_end: bool, update_state: bool, single: bool = False) -> Any:
        dims, before = self.sample.time_dims, self.clips()
        clips = [x.clone() for x in chunk]
        if before:
            clips = [x if d is None else torch.cat([a, x], d) for a, x, d in zip(before, chunk, dims, strict=True)]
        start = self.sample.steps(before) if before else 0
        leaves = [self.emit(i, clips, start, pad_end, single) for i in range(len(self.outputs))]
        if update_state:
            self.state = {f"clip_{i}": clip.clone() for i, clip in enumerate(clips)}
        if all(leaf is None for leaf in leaves):
            return None
        return pytree.tree_unflatten(leaves, self.case.example[1])

    def emit(self, i: int, clips: list[Tensor], start: int, pad_end: bool, single: bool) -> Tensor | None:
        stop = self.sample.steps(clips)
        if i in self.due:
            frames = self.due_frames(i, clips, start, stop, pad_end)
        else:
            frames = [frame for t in range(start, stop) for frame in self.window_frames(i, clips, t)]
        if not frames:
            return None
        keeps_axis = i in self.due and len(set(self.due[i])) < len(self.due[i])
        return frames[0] if single and not keeps_axis else torch.stack(frames, self.case.stack_dim(i))

    def due_frames(self, i: int, clips: list[Tensor], start: int, stop: int, pad_end: bool) -> list[Tensor]:
        """Those due between two steps: of the stream as if it went on with its last frame for a while."""
        longer = [x if d is None else extend(x, d, self.horizon * r - x.shape[d])
                  for x, d, r in zip(clips, self.sample.time_dims, self.sample.rates, strict=True)]  # fmt: skip
        promise = PROMISES[self.outputs[i].equivalence]
        sent, known = (sum(due < n for due in self.due[i]) for n in (start, stop))
        frames = promise(self.case, longer, i)[sent:known]
        if pad_end:
            frames += promise(self.case, clips, i)[known:]
        return [frame.contiguous() for frame in frames]

    def window_frames(self, i: int, clips: list[Tensor], t: int) -> list[Tensor]:
        """What step t gives."""
        if t < self.first[i] or (t - self.first[i]) % self.sample.stride:
            return []
        start = 0 if self.outputs[i].equivalence == "prefix" else t + 1 - self.sample.clip_length
        return [newest(self.case, self.sample.chunk(clips, start, t + 1), i)]


def extend(x: Tensor, dim: int, frames: int) -> Tensor:
    """Repeats the last frame."""
    if frames <= 0:
        return x
    last = x.narrow(dim, -1, 1)
    return torch.cat([x] + [last] * frames, dim)
