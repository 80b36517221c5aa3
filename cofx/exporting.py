"""Step models as ONNX files: `StepModule.to_onnx`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from .lanes import Lanes
from .options import whole
from .quantize import KINDS, quantize_int8
from .runtime.errors import InputError
from .runtime.state_file import folder_of


def export(
    programs: Lanes,
    path: str | os.PathLike[str],
    frames_per_step: int | None,
    dynamic_batch: bool,
    opset: int | None,
    controls: bool,
    longest: int | None,
    plain: bool = False,
) -> None:
    """Write a step graph in full precision; see `StepModule.to_onnx`.

    Args:
        programs: the lane programs of the step model.
        path, frames_per_step, dynamic_batch, opset, controls, longest: as there.
        plain: recurrent layers as products, which can be quantised.
    """
    from .passes.codegen.onnx import OPSET, export_onnx

    period = programs.schedule.period
    if frames_per_step is not None and not (whole(frames_per_step, 1) and frames_per_step % period == 0):
        raise InputError(f"frames_per_step is a multiple of {period}, the model's period, not {frames_per_step!r}")
    if opset is not None and not whole(opset, OPSET):
        raise InputError(f"opset is a version of ONNX's operators, {OPSET} or later, not {opset!r}")
    if longest is not None and not whole(longest, 1):
        raise InputError(f"longest is a number of frames, at least 1, not {longest!r}")
    export_onnx(
        programs.plan,
        path,
        programs.about(),
        ticks=frames_per_step,
        dynamic_batch=dynamic_batch,
        opset=opset,
        controls=controls,
        capacity=programs.longest(longest),
        plain=plain,
    )


def export_quantized(
    programs: Lanes,
    path: str | os.PathLike[str],
    kind: str,
    example: Sequence[torch.Tensor],
    frames_per_step: int | None,
    opset: int | None,
    controls: bool,
    longest: int | None,
) -> None:
    """Write a step graph whose weights have 8 bits, for one stream, and print how far it is from full precision.

    Args:
        programs, path, frames_per_step, opset, controls, longest: see `export`.
        kind: "int8".
        example: clips on which the two are compared.
    """
    if kind not in KINDS:
        raise InputError(f"quantize is one of {', '.join(KINDS)}, not {kind!r}")
    batches = programs.source.plan.clock.batch_dims
    one = [x if b is None else x.narrow(b, 0, 1) for x, b in zip(example, batches, strict=True)]
    with tempfile.TemporaryDirectory(dir=folder_of(path), prefix=".cofx-") as scratch:
        full, small = Path(scratch, "full.onnx"), Path(scratch, "small.onnx")
        export(programs, full, frames_per_step, False, opset, controls, longest, plain=True)
        found = quantize_int8(full, small, [x.cpu().numpy() for x in one])
        os.replace(small, path)
    print(f"int8: differs from full precision by {found['difference']:.3g} (outputs up to {found['largest']:.3g})")
