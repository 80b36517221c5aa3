"""Recordings in files, streamed through a step graph: what ``cofx run`` does."""

from __future__ import annotations

import csv
import io
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils import _pytree as pytree

from .runtime.errors import InputError
from .runtime.onnx_arrays import Arrays
from .runtime.onnx_step import OnnxStep

CALLS = 64  # of the graph in one piece of a recording


class Streaming:
    """Recordings through a step graph, some frames after the other.

    Args:
        graph: a file of `StepModule.to_onnx`.
        recordings: one for each input.
        output: where `write` will put what comes out: .npy or .csv (the first output), or .npz (all, by name).

    Raises:
        InputError: one of them does not fit, or cannot be read.
    """

    def __init__(self, graph: Path, recordings: Sequence[Path], output: Path) -> None:
        if not graph.is_file():
            raise InputError(f"{graph} is not a file")
        self.output = output
        if output.suffix not in (".npy", ".csv", ".npz"):
            raise InputError(f"outputs are written as .npy, .csv or .npz, not {output.suffix or output.name}")
        if not output.absolute().parent.is_dir():
            raise InputError(f"{output.absolute().parent} is not a folder")
        self.step = OnnxStep(graph)
        inputs = self.step.meta["inputs"]
        if len(recordings) != len(inputs):
            names = ", ".join(i["name"] for i in inputs)
            raise InputError(f"the graph has {len(inputs)} inputs ({names}), {len(recordings)} recordings were given")
        self.axes = [i["model_axes"]["time"] for i in inputs]
        self.rates = [i["frames_per_tick"] for i in inputs]
        pairs, shapes = zip(recordings, inputs, strict=True), Arrays(self.step.meta)
        self.inputs = [_fitted(file, read(file), info, shapes.model_shape(info, 0)) for file, info in pairs]
        lengths = [x.shape[t] // k for x, t, k in zip(self.inputs, self.axes, self.rates, strict=True) if t is not None]
        self.ticks = int(min(lengths))
        if not self.ticks:
            raise InputError("a recording of no frames")
        self.parts: list[list[NDArray[Any]]] = [[] for _ in self.step.meta["outputs"]]

    def __len__(self) -> int:
        return -(-self.ticks // self._size)

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    @property
    def _size(self) -> int:
        return CALLS * int(self.step.frames_per_step)

    def advance(self, piece: int) -> None:
        """Some frames; the last piece ends the stream."""
        start, stop = piece * self._size, min((piece + 1) * self._size, self.ticks)
        at = [(slice(None),) * (t or 0) for t in self.axes]
        chunks = [
            x if t is None else x[(*front, slice(start * k, stop * k))]
            for x, t, k, front in zip(self.inputs, self.axes, self.rates, at, strict=True)
        ]
        due = self.step.forward_steps(*chunks, pad_end=piece + 1 == len(self))
        if due is not None:
            for part, y in zip(self.parts, pytree.tree_leaves(due, is_leaf=lambda y: y is None), strict=True):
                part += [] if y is None else [y]

    def write(self) -> dict[str, Any]:
        """Write what came out, all at once or not at all, and tell its shape (.csv: a line for each frame)."""
        if not self.parts[0] and self.output.suffix != ".npz" or not any(self.parts):
            raise InputError("the recording is too short for the model to give an output")
        whole = {}
        for info, part in zip(self.step.meta["outputs"], self.parts, strict=True):
            if part:
                axis = info["model_axes"]["time"]
                whole[info["name"]] = part[-1] if axis is None else np.concatenate(part, axis)
        info = self.step.meta["outputs"][0]
        axis, first = info["model_axes"]["time"], whole.get(info["name"])
        beside = self.output.with_name(f".{self.output.name}.part")
        try:
            with open(beside, "wb") as file:
                if self.output.suffix == ".npz":
                    _save_all(file, whole)
                elif self.output.suffix == ".npy":
                    np.save(file, whole[info["name"]])
                else:
                    _save_lines(file, whole[info["name"]], axis)
            os.replace(beside, self.output)
        finally:
            beside.unlink(missing_ok=True)
        told = {n: list(y.shape) for n, y in whole.items()}
        if first is None:
            return {"path": str(self.output), "outputs": told}
        frames = 1 if axis is None else first.shape[axis]
        return {"path": str(self.output), "frames": frames, "shape": list(first.shape), "outputs": told}


def _save_lines(file: IO[bytes], y: NDArray[Any], axis: int | None) -> None:
    """A line of text for each frame."""
    lines = y[None] if axis is None else np.moveaxis(y, axis, 0)
    text = io.TextIOWrapper(file, newline="", write_through=True)
    csv.writer(text).writerows(lines.reshape(len(lines), -1).tolist())
    text.detach()


def _save_all(file: IO[bytes], arrays: Mapping[str, NDArray[Any]]) -> None:
    """As `numpy.savez` does, whatever their names."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as part:
                np.lib.format.write_array(part, array, allow_pickle=False)


def read(path: Path) -> NDArray[Any]:
    """A recording: .npy as it is; .wav as (channels, time); .mp4 and other video as (colours, time, height, width).

    Raises:
        InputError: it cannot be read.
    """
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    try:
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
            if not isinstance(found, np.ndarray) or found.dtype.kind not in "biuf":
                raise InputError(f"{path} holds no array of numbers")
            return found
        if path.suffix in (".wav", ".flac", ".ogg"):
            import soundfile  # type: ignore[import-not-found, import-untyped, unused-ignore]

            sound: NDArray[Any] = soundfile.read(path, dtype="float32", always_2d=True)[0].T
            return sound
        import av  # type: ignore[import-not-found, unused-ignore]

        with av.open(str(path)) as video:
            if not video.streams.video:
                raise InputError(f"{path} holds no video")
            frames = [f.to_ndarray(format="rgb24") for f in video.decode(video=0)]
        return np.stack(frames).astype(np.float32).transpose(3, 0, 1, 2) / 255
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"reading {path.suffix} takes the extra cofx[media]: {error}") from error
    except Exception as error:
        told = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{path} cannot be read: {told[0][:300]}") from error


def _fitted(file: Path, x: NDArray[Any], info: dict[str, Any], shape: Sequence[Any]) -> NDArray[Any]:
    """A recording with a batch of one where the model has one and the recording has not, in the model's dtype."""
    axes, given = info["model_axes"], x.shape
    if axes["batch"] is not None and x.ndim == len(shape) - 1:
        x = np.expand_dims(x, axes["batch"])
    sizes = [n for d, n in enumerate(shape) if d not in axes.values()]
    if x.ndim != len(shape) or [n for d, n in enumerate(x.shape) if d not in axes.values()] != sizes:
        names = {axes["batch"]: "batch", axes["time"]: "time"}
        wanted = ", ".join(names.get(d, str(n)) for d, n in enumerate(shape))
        raise InputError(f"{file} has shape {given}; input '{info['name']}' takes ({wanted})")
    return x.astype(info["dtype"])
