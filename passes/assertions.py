"""Conditions on data that do nothing but raise an error: ``assert (a == b).all()``, ``if x.min() < 0: raise ...``.

A tensor has no value while it is traced, so that a branch on one cannot be traced. Where one side of it leads to
an error whatever else happens, the model takes the other whenever it gives a result at all: so does the trace.
"""

from __future__ import annotations

import dis
import sys
from types import CodeType, FrameType

import torch

_OWN = (str(torch.__path__[0]), __file__.rpartition("/")[0])


def truth_without_error(func: object) -> bool | None:
    """What a tensor must be that is asked for its truth so that no error is raised.

    To be called where a mode's ``__torch_function__`` is given `func`. None: it is no such question, or no side of the
    branch leads to an error, or both do.
    """
    if getattr(func, "__name__", "") != "__bool__":
        return None
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    return _without_error(frame.f_code, frame.f_lasti) if frame is not None else None


def _without_error(code: CodeType, at: int) -> bool | None:
    instructions = [i for i in dis.get_instructions(code) if i.opname not in ("CACHE", "NOT_TAKEN")]
    place = {instruction.offset: n for n, instruction in enumerate(instructions)}
    n = place.get(at, len(instructions))
    if n < len(instructions) and instructions[n].opname == "TO_BOOL":
        n += 1
    if n >= len(instructions) or "JUMP" not in (name := instructions[n].opname) or "IF_" not in name:
        return None
    if name.endswith("NONE") or name.endswith("NOT_NONE"):
        return None
    jumps_if = "IF_TRUE" in name
    jumping, falling = (_raises(instructions, place, m) for m in (place[instructions[n].argval], n + 1))
    if jumping == falling:
        return None
    return not jumps_if if jumping else jumps_if


def _raises(instructions: list[dis.Instruction], place: dict[int, int], n: int) -> bool:
    """Whether all ways through the code from an instruction on lead to an error."""
    seen: set[int] = set()
    ahead = [n]
    while ahead:
        n = ahead.pop()
        if n in seen:
            continue
        if n >= len(instructions) or instructions[n].opname.startswith(("RETURN", "YIELD", "INSTRUMENTED")):
            return False
        seen.add(n)
        instruction = instructions[n]
        if instruction.opname in ("RAISE_VARARGS", "RERAISE"):
            continue
        if instruction.opcode in (*dis.hasjrel, *dis.hasjabs):
            ahead.append(place[instruction.argval])
            if instruction.opname in ("JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_ABSOLUTE"):
                continue
        ahead.append(n + 1)
    return True
