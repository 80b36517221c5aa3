"""What the command line writes and streams: a folder for whoever ships the model, recordings through its graph."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .passes.codegen.lanes import generate_lanes
from .runtime.errors import CofxError, InputError
from .step_module import StepModule

README = """# A step model

`step.onnx` takes {frames} frame(s) per call and keeps its state in the open: feed `state_out_*` back as `state_in_*`.
All states begin as zeros. `start` begins a lane anew, `ready` false holds it, `length` (else -1) tells where it ends;
after that further calls give what is still due. `<output>_valid` tells which frames of an output exist.

- Python: `from cofx.runtime import OnnxStep; step = OnnxStep("step.onnx"); y = step.forward_steps(x); step.flush()`
- C++: `session.Run(...)` with the inputs that step.json names; swap the two sets of state tensors after each call.
- JavaScript: `await session.run({{...frames, start, ready, length, ...states}})` of onnxruntime-web, likewise.

`step.pt2`, for `torch.export.load`, is the same: (frames, start, ready, length, states) -> (outputs, valid, states).
"""


class ConversionError(CofxError):
    """The files do not give the model's numbers; none was written."""


def convert(
    step: StepModule,
    output: Path,
    clips: Sequence[torch.Tensor],
    frames_per_step: int | None,
    quantize: str | None,
    compare: Callable[[Path], dict[str, Any]],
) -> dict[str, Any]:
    """Write the folder. It is made beside its place, verified there, and moved in at the end.

    Raises:
        ConversionError: the files are not exact. As after any error, what was there before is there still.
    """
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists() and not output.is_dir():
        raise InputError(f"{output} is a file, not a folder")
    made = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            step.to_onnx(made / "step.onnx", frames_per_step=frames_per_step, quantize=quantize)
        _write_program(step, made / "step.pt2", frames_per_step)
        meta = _metadata(made / "step.onnx")
        (made / "README.md").write_text(README.format(frames=meta["frames_per_step"]))
        (made / "step.json").write_text(json.dumps(meta, indent=1) + "\n")
        found = step.verify(*clips)
        onnx = compare(made / "step.onnx")
        if not found.exact or not (onnx["exact"] or quantize):
            raise ConversionError(
                f"the files do not give the model's numbers: the step differs by {found.difference:.3g}, step.onnx "
                f"from the step by {onnx['difference']:.3g}"
            )
        files = sorted(f.name for f in made.iterdir())
        output.mkdir(exist_ok=True)
        for name in files:
            os.replace(made / name, output / name)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return {"folder": str(output), "files": files, "exact": True, "difference": found.difference,
            "compared": found.compared, "onnx": onnx}  # fmt: skip


def _metadata(path: Path) -> dict[str, Any]:
    from .runtime.onnx_step import OnnxStep

    meta: dict[str, Any] = OnnxStep(path).meta
    return meta


def _write_program(step: StepModule, path: Path, frames_per_step: int | None) -> None:
    """The lane program as an exported program, its batch size open where the model's is."""
    lanes = step._programs()
    ticks = frames_per_step or lanes.schedule.period
    program = generate_lanes(lanes.plan, ticks, lanes.spec.device, controls=True, batch_first=True)
    count, device = 2, program.device
    frames = [
        torch.zeros([count if d == i.batch else n for d, n in enumerate(i.shape)], dtype=i.dtype, device=device)
        for i in program.inputs
    ]
    controls = [torch.zeros(count, 1, dtype=d, device=device) for d in (torch.bool, torch.bool, torch.int64)]
    states = [torch.zeros(s.shape(count), dtype=s.dtype, device=device) for s in program.states]
    batched = [i.batch is not None for i in program.inputs] + [True] * (len(controls) + len(states))
    shapes = tuple({0: torch.export.Dim.AUTO} if b else {} for b in batched)
    with torch.no_grad():
        exported = torch.export.export(
            program.module, (*frames, *controls, *states), dynamic_shapes=shapes, strict=False
        )
    torch.export.save(exported, path)


class Streaming:
    """Recordings through a step graph, one call after the other."""

    def __init__(self, graph: Path, recordings: Sequence[Path]) -> None:
        from .runtime import OnnxStep

        if not graph.is_file():
            raise InputError(f"{graph} is not a file")
        self.step = OnnxStep(graph)
        inputs = self.step.meta["inputs"]
        if len(recordings) != len(inputs):
            raise InputError(f"the graph has {len(inputs)} inputs, {len(recordings)} recordings were given")
        self.axes = [i["model_axes"]["time"] for i in inputs]
        self.rates = [i["frames_per_tick"] for i in inputs]
        self.inputs = [_fitted(read(file), info, self.step) for file, info in zip(recordings, inputs, strict=True)]
        lengths = [x.shape[t] // k for x, t, k in zip(self.inputs, self.axes, self.rates, strict=True) if t is not None]
        self.ticks = int(min(lengths))
        self.parts: list[NDArray[Any]] = []

    def __len__(self) -> int:
        return -(-self.ticks // int(self.step.frames_per_step))

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def advance(self, call: int) -> None:
        """One call; the last one ends the stream."""
        size = self.step.frames_per_step
        start, stop = call * size, min((call + 1) * size, self.ticks)
        chunks = [
            x if t is None else np.take(x, range(start * k, stop * k), t)
            for x, t, k in zip(self.inputs, self.axes, self.rates, strict=True)
        ]
        due = self.step.forward_steps(*chunks, pad_end=call + 1 == len(self))
        while isinstance(due, (tuple, list, dict)):
            due = next(iter(due.values() if isinstance(due, dict) else due))
        if due is not None:
            self.parts.append(due)

    def write(self, path: Path) -> dict[str, Any]:
        """Write what came out, .npy or .csv (a line for each frame), and tell its shape."""
        if not self.parts:
            raise InputError("the recording is too short for the model to give an output")
        axis = next(t for t in self.axes if t is not None)
        axis = min(axis, self.parts[0].ndim - 1)
        whole = np.concatenate(self.parts, axis)
        if path.suffix not in (".npy", ".csv"):
            raise InputError(f"outputs are written as .npy or .csv, not {path.suffix or path.name}")
        beside = path.with_name(f".{path.name}.part")
        try:
            if path.suffix == ".npy":
                with open(beside, "wb") as file:
                    np.save(file, whole)
            else:
                with open(beside, "w", newline="") as text:
                    csv.writer(text).writerows(np.moveaxis(whole, axis, 0).reshape(whole.shape[axis], -1).tolist())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        return {"path": str(path), "frames": whole.shape[axis], "shape": list(whole.shape)}


def read(path: Path) -> NDArray[Any]:
    """A recording: .npy as it is; .wav as (channels, time); .mp4 and other video as (colours, time, height, width).

    Raises:
        InputError: it cannot be read.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    try:
        if path.suffix == ".npy":
            found: NDArray[Any] = np.load(path, allow_pickle=False)
            return found
        if path.suffix in (".wav", ".flac", ".ogg"):
            import soundfile  # type: ignore[import-not-found, import-untyped, unused-ignore]

            sound: NDArray[Any] = soundfile.read(path, dtype="float32", always_2d=True)[0].T
            return sound
        import av  # type: ignore[import-not-found, unused-ignore]

        with av.open(str(path)) as video:
            frames = [f.to_ndarray(format="rgb24") for f in video.decode(video=0)]
        return np.stack(frames).astype(np.float32).transpose(3, 0, 1, 2) / 255
    except ImportError as error:
        raise InputError(f"reading {path.suffix} takes the extra cofx[media]: {error}") from error
    except Exception as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _fitted(x: NDArray[Any], info: dict[str, Any], step: Any) -> NDArray[Any]:
    """A recording with a batch of one where the model has one and the recording has not, in the model's dtype."""
    axes = info["model_axes"]
    if axes["batch"] is not None and x.ndim == len(info["shape"]) - 1:
        x = np.expand_dims(x, axes["batch"])
    return x.astype(info["dtype"])
