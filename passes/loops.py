"""A Python loop over frames, rolled up (see roll_up_loops): what it does to one frame, and what it hands on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import fx

T = TypeVar("T")


@dataclass(frozen=True)
class Collected:
    """A result of a loop: frames of a body's value put together along `dim`, or ("last") only the last one."""

    how: str  # "stack", "cat" or "last"
    dim: int = 0
    skipped: int = 0  # so many frames of the streams have none


@dataclass(eq=False)
class Loop:
    """A loop over frames, as the target of a node ``loop(streams..., inits..., statics...) -> results``.

    Attributes:
        body: placeholders for a frame of each stream, the ramps, the carried values and the statics; returns the
            carried values and one value for each result.
        starts: graphs for the first frames, if they are others; then there are no inits. The k-th has placeholders for
            frames 0 to k of each stream and the statics; it returns the values of the results that have one for frame
            k, in front of which the last puts the carried values.
        dims: the time axis of each stream.
        squeezed: whether its frames come without time axis.
        results: what is collected.
        carried: of the values that go from frame to frame what is known of the traced nodes (sizes and dtypes).
        widths: so many frames of each stream are one of the loop.
        ramps: numbers that grow from frame to frame: at frame 0, and by how much.
    """

    body: fx.Graph
    starts: list[fx.Graph]
    dims: list[int]
    squeezed: list[bool]
    results: list[Collected]
    carried: list[dict[str, Any]]
    widths: list[int]
    ramps: list[tuple[float, float]]
    __name__: str = field(default="loop", init=False)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """The loop offline, over whole clips. A step model never calls it: there it is emitted frame by frame."""
        count = len(self.dims)
        inits = 0 if self.starts else len(self.carried)
        streams, carried, statics = args[:count], args[count : count + inits], args[count + inits :]
        collected: list[list[Any]] = [[] for _ in self.results]
        for t in range(streams[0].shape[self.dims[0]] // self.widths[0]):
            frames = self.frames(streams, t, torch.select, torch.narrow)
            if t < len(self.starts):
                out = fx.Interpreter(torch.nn.Module(), graph=self.starts[t]).run(*frames, *statics)
            else:
                ramps = [torch.tensor(at + t * step) for at, step in self.ramps]
                out = fx.Interpreter(torch.nn.Module(), graph=self.body).run(*frames, *ramps, *carried, *statics)
            for i, part in self.of_start(t, out) if t < len(self.starts) else enumerate(out[len(self.carried) :]):
                collected[i].append(part)
            if t + 1 >= len(self.starts):
                carried = out[: len(self.carried)]
        join = {"stack": torch.stack, "cat": torch.cat, "last": lambda parts, _: parts[-1]}
        return tuple(join[r.how](parts, r.dim) for r, parts in zip(self.results, collected, strict=True))

    def frames(
        self, streams: Sequence[T], t: int, select: Callable[[T, int, int], T], narrow: Callable[[T, int, int, int], T]
    ) -> list[T]:
        """What iteration `t` takes of whole streams: its frame of each, at first those before it too."""
        return [
            select(x, d, i) if squeezed else narrow(x, d, i * w, w)
            for i in (range(t + 1) if t < len(self.starts) else range(t, t + 1))
            for x, d, squeezed, w in zip(streams, self.dims, self.squeezed, self.widths, strict=True)
        ]

    def ramp_dtypes(self) -> list[torch.dtype]:
        """Of what kind the numbers are that grow from frame to frame."""
        inputs = [n for n in self.body.nodes if n.op == "placeholder"]
        users = [next(iter(n.users)) for n in inputs[len(self.dims) : len(self.dims) + len(self.ramps)]]
        kinds = [u.meta["val"].dtype for u in users]
        return [torch.float32 if k == torch.bool else k for k in kinds]

    def of_start(self, k: int, out: Sequence[T]) -> list[tuple[int, T]]:
        """What one of `starts` returned for results, by the number of the result."""
        given = [i for i, r in enumerate(self.results) if r.how != "last" and k >= r.skipped]
        return list(zip(given, out[len(self.carried) if k == len(self.starts) - 1 else 0 :], strict=True))

    def __str__(self) -> str:
        form = [f"{n.op}:{n.target}" for g in (self.body, *self.starts) for n in g.nodes if n.op == "call_function"]
        return f"loop({form}, {self.dims}, {self.widths}, {self.results}, {self.ramps})"
