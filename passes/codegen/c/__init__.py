"""Code generation: the programs of a step in mid-stream as C, which the C compiler of this machine compiles.

For small nets, in which calls take longer than what they compute: a step is one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ....runtime.native import NativeResidence
from ....runtime.program import Program
from ...errors import user_frame
from .builder import NativeError, NoForm
from .compiler import compile_shared, native_target
from .step import step_source

if TYPE_CHECKING:
    from ...pipeline import Plan


def compile_native(
    plan: Plan, programs: Sequence[Program], arguments: Sequence[torch.Tensor], frames: int, groups: Sequence[int]
) -> NativeResidence:
    """The programs of a step in C, for arguments of just these shapes, with the rings in which state is kept.

    Args:
        plan: what they are the programs of, for error messages.
        programs: one for each phase, all on the same state:
            ``(frames..., parts of the state...) -> (outputs, parts of the state after)``.
        arguments: of the shapes and dtypes in question.
        frames: how many of them are not state.
        groups: for each part which history or state it belongs to.

    Raises:
        NativeError: an op has no form in C.
        InputError: there is no C compiler, or it does not take the program.
    """
    try:
        source = step_source(programs, arguments, frames, groups, native_target())
    except NoForm as error:
        lines = {user_frame(n): None for n in plan.graph.nodes if n.op == "call_function" and error.of(n)}
        raise NativeError("\n    at      ".join([f"the step program has no form in C: {error}", *lines])) from error
    library = compile_shared(source.text)
    return NativeResidence(library, source.results, source.rings, source.constants, source.scratch, frames)
