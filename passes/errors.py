"""What can go wrong at compile time, and how it is told.

::

    CofxError
    └── CompileError
        ├── CaptureError      the model could not be traced
        └── RefusedError      traced, but something in it cannot be streamed as asked; lists every refusal
            └── NonLocalError     all of the refusals are operations that need the whole clip

Rules raise `NonLocal` or `Refuse`, which know nothing of nodes and lines; `Refusal` adds these.
"""

from __future__ import annotations

import linecache
import os
import re
from dataclasses import dataclass

import torch
from torch import fx

from ..runtime.errors import CofxError


class CompileError(CofxError):
    """The model could not be compiled."""


class CaptureError(CompileError):
    """No way of tracing the model succeeded; the message holds what each of them said."""


class NonLocal(Exception):
    """Raised by a rule: this op needs the clip as a whole. Its result becomes a Window."""


class Refuse(Exception):
    """Raised by a rule: this op cannot be given exactly, not even by recomputing a clip."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True)
class Refusal:
    """One op that stands in the way, told in four lines."""

    reason: str
    node: fx.Node
    hint: str

    def __str__(self) -> str:
        path, line = user_frame(self.node), module_path(self.node)
        return "\n".join(
            (
                self.reason,
                f"    node    %{self.node.name} = {self.node.target}",
                f"    module  {line or '(the model itself)'}",
                f"    at      {path}",
                f"    try     {self.hint}",
            )
        )


class RefusedError(CompileError):
    """The model holds ops that cannot be streamed as asked. All of them are listed.

    Attributes:
        refusals: one `Refusal` for each op.
    """

    def __init__(self, refusals: list[Refusal]) -> None:
        self.refusals = refusals
        super().__init__("\n".join(str(r) for r in refusals))


class NonLocalError(RefusedError):
    """The model holds ops that need the whole clip, and was asked to be a stream.

    ::

        class Wrong(nn.Module):
            def forward(self, x):                 # (batch, channel, time)
                return x - x.mean(2, keepdim=True)    # the mean needs frames that have not come yet

        cofx.compile(Wrong(), clip, equivalence="stream")     # NonLocalError

    Leave `equivalence` away to have the clip recomputed at each step, or normalise with running statistics.
    """


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_TORCH = os.path.dirname(torch.__file__) + os.sep


def user_frame(node: fx.Node) -> str:
    """The innermost line of the user's own code that led to `node`: ``file:line in function:  code``."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if not f[0].startswith(_TORCH)] or frames
    if not own:
        return "(unknown line)"
    file, line, function = own[-1]
    code = linecache.getline(file, int(line)).strip()
    return f"{os.path.relpath(file) if file.startswith(os.getcwd()) else file}:{line} in {function}:  {code}"


def module_path(node: fx.Node) -> str:
    """The qualified name of the submodule in whose forward `node` was traced ("" for the model itself)."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return re.sub(r"^(L\['self'\]|self)\.?", "", path)
