"""A Python loop over frames, rolled up (see roll_up_loops): what it does to one frame, and what it hands on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx


@dataclass(frozen=True)
class Collected:
    """A result of a loop: frames of a body's value put together along `dim`, or ("last") only the last one."""

    how: str  # "stack", "cat" or "last"
    dim: int = 0


@dataclass(eq=False)
class Loop:
    """A loop over frames, as the target of a node ``loop(streams..., inits..., statics...) -> results``.

    Attributes:
        body: placeholders for a frame of each stream, the carried values and the statics; returns the carried values
            and one value for each result.
        start: the same for the first frame, without carried values, if that is another one; then there are no inits.
        dims: the time axis of each stream.
        squeezed: whether its frames come without time axis.
        results: what is collected.
        carried: of the values that go from frame to frame what is known of the traced nodes (sizes and dtypes).
    """

    body: fx.Graph
    start: fx.Graph | None
    dims: list[int]
    squeezed: list[bool]
    results: list[Collected]
    carried: list[dict[str, Any]]
    __name__: str = field(default="loop", init=False)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """The loop offline, over whole clips. A step model never calls it: there it is emitted frame by frame."""
        count = len(self.dims)
        inits = 0 if self.start is not None else len(self.carried)
        streams, carried, statics = args[:count], args[count : count + inits], args[count + inits :]
        collected: list[list[Any]] = [[] for _ in self.results]
        for t in range(streams[0].shape[self.dims[0]]):
            body = self.body if t or self.start is None else self.start
            frames = [
                x.select(d, t) if squeezed else x.narrow(d, t, 1)
                for x, d, squeezed in zip(streams, self.dims, self.squeezed, strict=True)
            ]
            out = fx.Interpreter(torch.nn.Module(), graph=body).run(*frames, *carried, *statics)
            carried = out[: len(self.carried)]
            for parts, part in zip(collected, out[len(self.carried) :], strict=True):
                parts.append(part)
        join = {"stack": torch.stack, "cat": torch.cat, "last": lambda parts, _: parts[-1]}
        return tuple(join[r.how](parts, r.dim) for r, parts in zip(self.results, collected, strict=True))

    def __str__(self) -> str:
        form = [f"{n.op}:{n.target}" for g in (self.body, self.start) if g for n in g.nodes if n.op == "call_function"]
        return f"loop({form}, {self.dims}, {self.results})"
