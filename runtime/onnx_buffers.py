"""What is bound to a session of ONNX Runtime for one batch size: inputs, controls, outputs, two sets of states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from .errors import InputError
from .onnx_meta import CONTROLS, DTYPES

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Now:
    """Where the streams of a set of buffers are: replaced as a whole, so that a call that is interrupted moves nothing.

    Attributes:
        current: which set of states is the current one.
        held: the last call's inputs without time.
        ended: in the middle of a call's frames.
    """

    current: int = 0
    held: tuple[Array, ...] = ()
    ended: bool = False


class Buffers:
    """Everything that is bound for one batch size: inputs, controls, outputs, and two sets of states."""

    def __init__(self, session: ort.InferenceSession, meta: Mapping[str, Any], lanes: int) -> None:
        self.session, self.lanes = session, lanes
        self.inputs = {i["name"]: _zeros(i["shape"], i["dtype"], lanes) for i in meta["inputs"]}
        self.controls: dict[str, Array] = {}
        for name, dtype in CONTROLS.items() if meta["controls"] else ():
            self.controls[name] = np.zeros((lanes, 1), dtype)
        self.outputs = {
            o.name: _zeros([d if isinstance(d, int) else "batch" for d in o.shape], DTYPES[o.type], lanes)
            for o in session.get_outputs()
            if not o.name.startswith("state_out_")
        }
        self.states = [[_zeros(s["shape"], s["dtype"], lanes) for s in meta["states"]] for _ in range(2)]
        self.bindings = []
        for old, new in (self.states, self.states[::-1]):
            binding = session.io_binding()
            for name, array in (*self.inputs.items(), *self.controls.items()):
                binding.bind_ortvalue_input(name, lend(array))
            for name, array in self.outputs.items():
                binding.bind_ortvalue_output(name, lend(array))
            for spec, a, b in zip(meta["states"], old, new, strict=True):
                binding.bind_ortvalue_input(spec["name"], lend(a))
                binding.bind_ortvalue_output(spec["out"], lend(b))
            self.bindings.append(binding)
        self.now = Now()

    @property
    def state(self) -> list[Array]:
        """The states as they are now."""
        return self.states[self.now.current]

    def run(self) -> None:
        """One call; the states after it become the current ones once `now` is set to `after`."""
        self.session.run_with_iobinding(self.bindings[self.now.current])

    def after(self, held: Sequence[Array], ended: bool = False) -> Now:
        """Where the streams are after the last call, if that is kept."""
        return Now(1 - self.now.current, tuple(held), ended)

    def copy(self, states: Sequence[Array]) -> None:
        """Overwrite the states."""
        for mine, given in zip(self.state, states, strict=True):
            np.copyto(mine, given)


def _zeros(shape: Sequence[Any], dtype: str, lanes: int) -> Array:
    sizes = [lanes if d == "batch" else d for d in shape]
    try:
        return np.zeros(sizes, dtype)
    except (MemoryError, ValueError) as error:
        raise InputError(f"there is no room for an array of {dtype} {tuple(sizes)}: {error}") from error


def available_providers() -> list[str]:
    """Execution providers that this ONNX Runtime has."""
    return [str(p) for p in ort.get_available_providers()]


def open_session(
    model: str | bytes,
    threads: int,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    optimize: bool = True,
    optimized: str = "",
) -> ort.InferenceSession:
    """A session of a model; ONNX Runtime's own errors if it cannot be run.

    Args:
        model: itself, or the file that holds it.
        threads: that work on one op.
        providers: of kernels.
        optimize: whether ONNX Runtime optimizes it.
        optimized: a file for what it makes of it, if any.
    """
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized:
        options.optimized_model_filepath = optimized
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=list(providers))


def lend(array: Array) -> Any:
    """The array itself as ONNX Runtime sees it."""
    return ort.OrtValue.ortvalue_from_numpy(array)
