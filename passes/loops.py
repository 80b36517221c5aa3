"""A Python loop over frames, rolled up (see roll_up_loops): what it does to one frame, and what it hands on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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

    def __call__(self, *_: Any) -> Any:
        raise AssertionError("a loop is emitted frame by frame, never called")

    def __str__(self) -> str:
        form = [f"{n.op}:{n.target}" for g in (self.body, self.start) if g for n in g.nodes if n.op == "call_function"]
        return f"loop({form}, {self.dims}, {self.results})"
