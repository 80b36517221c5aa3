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
import traceback
from dataclasses import dataclass

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from ..runtime.errors import CofxError


class CompileError(CofxError):
    """The model could not be compiled."""


class CaptureError(CompileError):
    """No way of tracing the model succeeded; the message holds what each of them said.

    Attributes:
        always: it has nothing to do with the length of the clip.
    """

    always = False


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
    at: str | None = None  # the user's line, if not the node's

    def __str__(self) -> str:
        path, line = self.at or user_frame(self.node), module_path(self.node)
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
_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
_STANDARD = os.path.dirname(os.__file__) + os.sep
_LIBRARIES = (_TORCH, _PACKAGE, os.path.dirname(sympy.__file__) + os.sep, "<eval_with_key")


def user_frame(node: fx.Node) -> str:
    """The innermost line of the user's own code that led to `node`: ``file:line in function:  code``."""
    if "line" in node.meta:  # it was read from a file
        return str(node.meta["line"])
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if not f[0].startswith(_TORCH)] or frames
    if not own:
        return "(unknown line)"
    file, line, function = own[-1]
    return line_of(file, int(line), function)


def line_of(file: str, line: int, function: str) -> str:
    code = linecache.getline(file, line).strip()
    return f"{os.path.relpath(file) if file.startswith(os.getcwd()) else file}:{line} in {function}:  {code}"


def raised_at(error: BaseException) -> str | None:
    """The innermost line of the user's own code that led to an exception, or None."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    return line_of(frames[-1].filename, frames[-1].lineno or 0, frames[-1].name) if frames else None


def is_users(file: str) -> bool:
    return not file.startswith(_LIBRARIES) and (not file.startswith(_STANDARD) or "site-packages" in file)


def module_path(node: fx.Node) -> str:
    """The qualified name of the submodule in whose forward `node` was traced ("" for the model itself)."""
    if "module" in node.meta:
        return str(node.meta["module"])
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return re.sub(r"^(L\['self'\]|self)\.?", "", path)
