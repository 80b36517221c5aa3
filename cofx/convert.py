"""What ``cofx convert`` writes: a folder for whoever ships the model, verified before it is there."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from .passes.capture import quiet
from .passes.codegen.lanes import generate_exported
from .runtime.errors import CofxError, InputError
from .runtime.onnx_arrays import Arrays
from .runtime.onnx_step import OnnxStep
from .step_module import StepModule
from .verification import TOLERANCES

README = """# A step model

Takes {inputs}: {ticks} frame(s) per call; gives {outputs}, and `<name>_valid`: which of its frames exist.
State is in the open: `state_out_*` of a call is `state_in_*` of the next one; all zeros is a stream that has not begun.
{controls} step.json has every shape, dtype and delay.

Python (`OnnxStep` does all of this; `pip install cofx onnxruntime`, or without torch `pip install --no-deps cofx` and
`pip install numpy onnxruntime safetensors`):
```python
from cofx.runtime import OnnxStep
step = OnnxStep("step.onnx")
y = step.forward_steps({arguments})  # any multiple of {ticks} frames; None as long as nothing is due
{rest}```
C++ (ONNX Runtime), names as in step.json:
```cpp
auto out = session.Run({{}}, in_names, inputs.data(), inputs.size(), out_names, n_out);
for (size_t k = 0; k < {states}; ++k) inputs[{first} + k] = std::move(out[n_out - {states} + k]);
```
JavaScript (onnxruntime-web), `meta` being step.json and `state` zeros by name:
```js
const out = await session.run({{{given}, ...state}});
for (const s of meta.states) state[s.name] = out[s.out];
```
`step.pt2`, for `torch.export.load`, is the same: (frames, start, ready, length, states) -> (outputs, valid, states).
"""
LANES = """Per lane (batch, 1): `start` (bool) begins anew, `ready` (bool) false holds it, `length` (int64, else -1) is
its end, after which {flush} more call(s) give what is still due."""
BARE = "All lanes begin with states of zeros, and none ends."


def readme(meta: Mapping[str, Any]) -> str:
    """How to drive the files, from what step.onnx says of itself."""
    names = [i["name"] for i in meta["inputs"]]
    controls = bool(meta["controls"])
    return README.format(
        controls=LANES.format(flush=meta["flush_calls"]) if controls else BARE,
        rest="rest = step.flush()\n" if controls else "",
        given=", ".join([*names, *(("start", "ready", "length") if controls else ())]),
        inputs=", ".join(f"`{i['name']}` {i['dtype']} ({', '.join(map(str, i['shape']))})" for i in meta["inputs"]),
        outputs=", ".join(f"`{o['name']}` ({o['equivalence']}, delay {o['delay']})" for o in meta["outputs"]),
        ticks=meta["frames_per_step"], arguments=", ".join(names),
        states=len(meta["states"]), first=len(names),
    )  # fmt: skip


@dataclass(frozen=True)
class Form:
    """What the files are like: arguments of `StepModule.to_onnx`. All but `step.onnx` have controls in any case."""

    frames_per_step: int | None = None
    longest: int | None = None
    quantize: str | None = None
    controls: bool = True
    dynamic_batch: bool = True
    opset: int | None = None


class ConversionError(CofxError):
    """The files do not give the model's numbers; none was written."""


def convert(
    step: StepModule,
    output: Path,
    clips: Sequence[torch.Tensor],
    form: Form,
    tell: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Write the folder. It is made beside its place, verified there, and moved in at the end.

    Args:
        step: what is converted.
        output: the folder.
        clips: to stream through the files, a batch of one.
        form: of the files.
        tell: called with what is being done.

    Raises:
        ConversionError: the files are not exact. As after any error, what was there before is there still.
    """
    output = output.absolute()
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file, not a folder")
    parent = next(p for p in output.parents if p.exists())  # nothing is made before all has gone well
    made = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=parent))
    try:
        tell("writing step.onnx")
        with contextlib.redirect_stdout(sys.stderr):
            step.to_onnx(made / "step.onnx", **vars(form))
        tell("writing step.pt2")
        _write_program(step, made / "step.pt2", form.frames_per_step, form.longest)
        runner = OnnxStep(made / "step.onnx")
        (made / "README.md").write_text(readme(runner.meta))
        (made / "step.json").write_text(json.dumps(runner.meta, indent=1) + "\n")
        tell("verifying the step model")
        found = step.verify(*clips)
        tell("verifying step.onnx")
        onnx = compare_onnx(step, made / "step.onnx", clips)
        tell("verifying step.pt2")
        program = _compare_program(step, made / "step.pt2", runner.meta, clips)
        if not found.exact or not (onnx["exact"] or form.quantize) or not program["exact"]:
            raise ConversionError(
                f"the files do not give the model's numbers: the step differs by {found.difference:.3g}, step.onnx "
                f"from the step by {onnx['difference']:.3g}, step.pt2 by {program['difference']:.3g}"
            )
        files = sorted(f.name for f in made.iterdir())
        output.mkdir(parents=True, exist_ok=True)
        for name in files:
            os.replace(made / name, output / name)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return {"folder": str(output), "files": files, "exact": True, "difference": found.difference,
            "compared": found.compared, "onnx": onnx, "program": program}  # fmt: skip


def _write_program(step: StepModule, path: Path, frames_per_step: int | None, longest: int | None) -> None:
    """The lane program as an exported program, its batch size open where the model's is."""
    lanes = step._programs()
    ticks = frames_per_step or lanes.schedule.period
    program = generate_exported(lanes.plan, ticks, lanes.spec.device, True, lanes.longest(longest))
    count, device = 2, program.device
    frames = [
        torch.zeros([count if d == i.batch else n for d, n in enumerate(i.shape)], dtype=i.dtype, device=device)
        for i in program.inputs
    ]
    controls = [torch.zeros(count, 1, dtype=d, device=device) for d in (torch.bool, torch.bool, torch.int64)]
    states = [torch.zeros(s.shape(count), dtype=s.dtype, device=device) for s in program.states]
    batched = [i.batch is not None for i in program.inputs] + [True] * (len(controls) + len(states))
    shapes = tuple({0: torch.export.Dim.AUTO} if b else {} for b in batched)
    with torch.no_grad(), quiet():
        exported = torch.export.export(
            program.module, (*frames, *controls, *states), dynamic_shapes=shapes, strict=False
        )
        torch.export.save(exported, path)


def compare_onnx(step: StepModule, path: Path, clips: Sequence[torch.Tensor]) -> dict[str, Any]:
    """A step graph against the step model, over a whole stream.

    Raises:
        InputError: the file cannot be read, or is of another model.
    """
    runner = OnnxStep(path)
    ends = bool(runner.meta["controls"])
    ours, theirs = step._programs().fingerprint, runner.meta["fingerprint"]
    arrays = [x.numpy() for x in _whole(step, clips, runner.frames_per_step)]
    try:
        got = runner.forward_steps(*arrays, pad_end=ends)
    except CofxError as error:
        raise InputError(f"{path} is of another model: {error}") from error
    return {**_difference(step, clips, runner.frames_per_step, got, ends), "same_model": ours == theirs}


def _compare_program(step: StepModule, path: Path, meta: Mapping[str, Any], clips: Sequence[torch.Tensor]) -> Any:
    """The exported program likewise; `meta` says how its arrays lie."""
    with quiet():
        run = torch.export.load(path).module()
    arrays, device = Arrays(meta), step.compiled.spec.device
    size = arrays.frames_per_step
    given = [x.numpy() for x in _whole(step, clips, size)]
    ticks = arrays.ticks(given)
    states = [torch.zeros([1 if d == "batch" else d for d in s["shape"]], dtype=getattr(torch, s["dtype"]),
                          device=device) for s in meta["states"]]  # fmt: skip
    names = [o["name"] for o in meta["outputs"]], [o["valid"] for o in meta["outputs"]]
    parts: list[list[Any]] = [[] for _ in meta["outputs"]]
    for at in range(0, ticks + meta["flush_calls"] * size, size):
        chunk = arrays.part(given, at, size) if at < ticks else arrays.blank(1, arrays.untimed(given))
        frames = [torch.from_numpy(arrays.batch_first(i, x).copy()) for i, x in zip(meta["inputs"], chunk, strict=True)]
        controls = [torch.tensor([[v]], device=device) for v in (False, True, ticks)]
        with torch.no_grad():
            results, valid, states = run(*(x.to(device) for x in frames), *controls, *states)
        outputs = dict(zip((*names[0], *names[1]), (x.cpu().numpy() for x in (*results, *valid)), strict=True))
        arrays.collect(outputs, parts)
    return _difference(step, clips, size, arrays.due(parts, frames=False))


def _whole(step: StepModule, clips: Sequence[torch.Tensor], size: int) -> list[torch.Tensor]:
    """As many of these frames as make whole calls."""
    spec = step.compiled.spec
    ticks = spec.ticks(clips) // size * size
    if not ticks:
        raise InputError(f"a clip of {spec.ticks(clips)} frames: a call takes {size}")
    return spec.part(clips, 0, ticks)


def _difference(
    step: StepModule, clips: Sequence[torch.Tensor], size: int, got: Any, ends: bool = True
) -> dict[str, Any]:
    """What the step model gives for a whole stream, or one that does not end, against arrays."""
    step.clean_state()
    expected = step.forward_steps(*_whole(step, clips, size), pad_end=ends)
    step.clean_state()
    wanted = [x if x is None else x.cpu().double().numpy() for x in _leaves(expected)]
    pairs = list(zip(wanted, _leaves(got), strict=False))
    exact = len(wanted) == len(_leaves(got)) and all((a is None) == (b is None) for a, b in pairs)
    exact = exact and all(a is None or a.shape == b.shape for a, b in pairs)
    if not exact:
        return {"exact": False, "difference": math.inf}
    worst = max((float(np.abs(a - b).max()) for a, b in pairs if a is not None and a.size), default=0.0)
    rtol, atol = max(TOLERANCES.get(d, (0.0, 0.0)) for d in step.compiled.spec.dtypes)
    close = all(a is None or np.allclose(a, b, rtol, atol, equal_nan=True) for a, b in pairs)
    return {"exact": close, "difference": worst}


def _leaves(nested: Any) -> list[Any]:
    return pytree.tree_leaves(nested, is_leaf=lambda x: x is None)
