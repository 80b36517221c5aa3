"""How a step's time grows with depth, width and receptive field, beside an offline window and continual-inference.

::

    python benchmarks/growth.py    # writes benchmarks/results/growth.{json,md}

Stacks of convolutions over time with a ReLU each; the window is as long as the receptive field. CPU time per frame on
one thread, blocks of all variants in turn, the median; every net is verified before.
"""

from __future__ import annotations

import json
import statistics
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from workloads import conv_stack

import cofx

DEPTHS, WIDTHS, KERNELS = (2, 4, 8, 16, 32), (16, 32, 64, 128, 256), (2, 3, 5, 9, 17)
RESULTS = Path(__file__).parent / "results" / "growth.json"
ROUNDS = 15


def measure(depth: int, width: int, kernel: int) -> dict[str, Any]:
    """Microseconds per frame of each variant."""
    import continual

    torch.manual_seed(0)
    model = conv_stack(width, depth, kernel).eval()
    window = depth * (kernel - 1) + 1
    clip = torch.randn(1, width, window)
    frames = [x.contiguous() for x in clip.unbind(2)]
    calls: dict[str, Callable[[torch.Tensor], Any]] = {"offline": lambda x: model(clip)}
    for backend in ("eager", "onnxruntime"):
        step = cofx.compile(model, clip, backend=backend)
        assert step.verify(clip).exact
        calls[backend] = step.forward_step
    calls["continual"] = continual.convert.continual(deepcopy(model)).eval().forward_step
    for call in calls.values():
        for x in frames + frames:
            call(x)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            count = 10 if name == "offline" else 40
            began = time.process_time()
            for i in range(count):
                call(frames[i % window])
            taken[name].append((time.process_time() - began) / count * 1e6)
    row: dict[str, Any] = {"depth": depth, "width": width, "kernel": kernel, "receptive_field": window}
    return row | {name: round(statistics.median(times), 1) for name, times in taken.items()}


def main() -> None:
    """Print and write the tables."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    series = {
        "depth": [(depth, 64, 3) for depth in DEPTHS],
        "width": [(8, width, 3) for width in WIDTHS],
        "receptive field": [(8, 64, kernel) for kernel in KERNELS],
    }
    found = {name: [measure(*net) for net in nets] for name, nets in series.items()}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    lines = [
        "CPU time per frame in microseconds of stacks of convolutions (`python benchmarks/growth.py` writes this)."
    ]
    names = ["depth", "width", "kernel", "receptive_field", "offline", "continual", "eager", "onnxruntime"]
    for name, rows in found.items():
        lines += ["", f"Growth with {name}:", "", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
        lines += ["| " + " | ".join(f"{r[n]:,.0f}" for n in names) + " |" for r in rows]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
