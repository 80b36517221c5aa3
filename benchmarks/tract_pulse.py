"""The same clip model as a pulsed model of tract (the Rust library that does what cofx does), for `run.py`.

The model is exported to ONNX with an open time axis, and tract makes a streaming model of it that takes `pulse` frames
a call. It refuses most of the workloads; the reason is told.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

CLOSE = 1e-5  # of the largest output


def tract_variant(
    model: torch.nn.Module, clip: torch.Tensor, time_dim: int, pulse: int
) -> tuple[Callable[[], None], bool]:
    """Blocks of one pulse, and whether what comes of the clip is what the model gives offline.

    Raises:
        Exception: tract does not take the model (its own words).
    """
    import onnx
    import tract

    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "clip.onnx")
        torch.onnx.export(
            model, (clip,), file, dynamo=True, verbose=False, dynamic_shapes=[{time_dim: torch.export.Dim.DYNAMIC}]
        )
        graph = onnx.load(file)
        del graph.graph.value_info[:]  # tract works shapes out itself, in a symbol of its own
        onnx.save(graph, file)
        loaded = tract.onnx().load(str(file))
    sizes = ["S" if d == time_dim else str(n) for d, n in enumerate(clip.shape)]
    loaded.set_input_fact(0, f"{','.join(sizes)},f32")
    for i in range(loaded.output_count()):
        loaded.set_output_fact(i, None)
    net = loaded.into_model()
    net.transform(tract.Pulse(pulse, symbol="S"))
    delay = int(net.property("pulse.delay").to_numpy()[0])
    axis = int(net.property("pulse.output_axes").to_numpy()[0])
    run = net.into_runnable()
    pieces = [np.ascontiguousarray(x.numpy()) for x in clip.split(pulse, time_dim) if x.shape[time_dim] == pulse]
    same = _streams(run, pieces, model(clip), delay, axis)
    state, place = run.spawn_state(), [0]

    def block() -> None:
        state.run([pieces[place[0] % len(pieces)]])
        place[0] += 1

    return block, same


def _streams(run: Any, pieces: Sequence[Any], want: torch.Tensor, delay: int, axis: int) -> bool:
    """Whether the first outputs of a stream, after the delay, are those of the clip."""
    state = run.spawn_state()
    got = np.concatenate([state.run([x])[0].to_numpy() for x in pieces], axis)
    got = got.take(range(delay, got.shape[axis]), axis)
    head = want.numpy().take(range(got.shape[axis]), axis)
    return bool(np.abs(got - head).max() <= CLOSE * np.abs(head).max())
