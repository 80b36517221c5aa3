"""Compiled models in files: `StepModule.save` and `load`. Nothing is traced again, and a file is never executed."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import torch

from .backends import known_backend
from .inputs import InputSpec
from .options import Options
from .passes.capture import named_tensors
from .passes.pipeline import Plan
from .passes.saved_plan import SavedModel, SavedPlanError, decode_plan, encode_plan
from .runtime.errors import InputError
from .runtime.state_file import read_tensors, replace_file

if TYPE_CHECKING:
    from .step_module import StepModule

FORMAT = 1
KEY = "cofx_step"
PARAMETER = "model:"  # before the names of the module's own tensors


def save_step(step: StepModule, path: str | os.PathLike[str]) -> None:
    """See `StepModule.save`."""
    from safetensors.torch import save

    compiled, traced, asked = step.compiled, step.traced, step.options
    reference = step.reference_module
    if isinstance(reference, SavedModel):
        record, extra = reference.record, reference.extra
    else:
        options = {"equivalence": asked.equivalence, "newest": asked.newest, "context": asked.context}
        record, extra = encode_plan(compiled.plan, options, compiled.known_ends())
    named = named_tensors(reference)
    first: dict[int, str] = {}
    same = {name: first.setdefault(id(t), name) for name, t in named.items()}
    tensors = {f"{PARAMETER}{n}": named[n] for n in first.values()} | dict(extra)
    about = {
        "format": FORMAT,
        "plan": record,
        "same": {n: other for n, other in same.items() if n != other},
        "parameters": {n: t.requires_grad for n, t in reference.named_parameters(remove_duplicate=False)},
        "ticks": traced.ticks,
        "batch": compiled.batch,
        "time_dim": asked.time_dim,
        "batch_dim": asked.batch_dim,
        "clip_length": asked.clip_length,
        "equivalence": asked.equivalence,
        "newest": asked.newest,
        "context": asked.context,
    }
    data = save(
        {k: t.detach().contiguous().clone() for k, t in tensors.items()},
        metadata={KEY: json.dumps(about, default=list)},
    )
    replace_file(path, data)


def load(path: str | os.PathLike[str], *, backend: str = "eager") -> StepModule:
    """A step model that was written by `StepModule.save`, at the beginning of a stream.

    Its parameters are its own, and its `model` has no offline forward.

    Args:
        path: of the file.
        backend: as `compile` takes it.

    Raises:
        SavedPlanError: the file is none, or of another version.
        OSError: it cannot be read.
    """
    from .step_module import StepModule
    from .tracing import Traced

    known_backend(backend)
    name = os.fspath(path)
    try:
        tensors, about = read_tensors(name, KEY, "torch")
        if about["format"] != FORMAT:
            raise SavedPlanError(f"{name} has format {about['format']}; this version reads {FORMAT}")
        own = {k.removeprefix(PARAMETER): t for k, t in tensors.items() if k.startswith(PARAMETER)}
        extra = {k: t for k, t in tensors.items() if not k.startswith(PARAMETER)}
        own |= {n: own[other] for n, other in about["same"].items()}
        model = SavedModel(own, about["parameters"], about["plan"], extra).eval()
        options = Options(
            about["time_dim"],
            about["batch_dim"],
            about["clip_length"],
            about["equivalence"],
            "last" if about["newest"] else "all",
            context=about["context"],
            backend=backend,
        )
        plan = saved_plan(model, about["batch"])
        spec = InputSpec.of(plan)
        sizes = zip(spec.sizes(about["ticks"]), spec.dtypes, strict=True)
        example = tuple(torch.zeros(shape, dtype=dtype, device=spec.device) for shape, dtype in sizes)
        step = StepModule(model, options)
        step.restore(Traced(plan, None, example, about["ticks"], about["batch"]))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, InputError | SavedPlanError):
            raise
        raise SavedPlanError(f"{name} is no step model that cofx has saved: {error}") from error
    return step


def saved_plan(model: SavedModel, batch: int) -> Plan:
    """The plan of a step model that was loaded.

    Raises:
        SavedPlanError: it was traced for another batch size.
    """
    plan = decode_plan(model)
    traced = plan.capture.points[0].batch
    fixed = not plan.capture.symbolic_batch and any(b is not None for b in plan.clock.batch_dims)
    if fixed and batch != traced:
        raise SavedPlanError(
            f"this step model was saved for a batch of {traced}, not {batch}\n    try     compile the module itself "
            "with an example of that batch size"
        )
    return plan


__all__ = ["load", "save_step", "saved_plan"]
