"""Multiply-adds per step against per clip, beside the ratios that continual-inference publishes.

::

    python benchmarks/flops.py            # all; writes benchmarks/results/flops.json
    python benchmarks/flops.py X3D-S      # those whose names hold one of these words

A step is one frame; its cost is the mean over a period (a network with strides does less on some frames). A network
with global pooling inside (X3D's gates, A-GCN's attention over the clip) needs ``nonlocal_ops="continual"`` to stream
past it, as continual-inference does. Beside flops.json it writes a table, flops.md.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cofx

sys.path.insert(0, str(Path(__file__).parent))
import models

RESULTS = Path(__file__).parent / "results" / "flops.json"
# continual-inference's papers: times fewer per prediction than on the clip
PUBLISHED = {
    "X3D-L": 15.3, "X3D-M": 15.1, "X3D-S": 12.1, "Slow-R50": 8.0, "I3D-R50": 5.0, "ST-GCN": 107.7, "A-GCN": 108.7
}  # fmt: skip
# global pools and attention over the clip inside of these look on the frames so far, as in continual-inference
NONLOCAL = dict.fromkeys(["X3D-L", "X3D-M", "X3D-S", "A-GCN"], "continual")


def cases() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]]:
    """Name -> builder, shape of a clip, time axis."""
    found: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
        "ST-GCN": (models.STGCN, (1, 3, 300, 25), 2),
        "S-TR": (models.STR, (1, 3, 300, 25), 2),
        "A-GCN": (models.AGCN, (1, 3, 300, 25), 2),
        "OadTR-1": (lambda: models.OadTR(blocks=1), (1, 64, 3072), 1),
        "OadTR-2": (lambda: models.OadTR(blocks=2), (1, 64, 3072), 1),
        "TCN": (lambda: models.TCN(3, 10), (1, 3, 400), 2),
        "WaveNet": (models.WaveNet, (1, 256, 400), 2),
        "SEANet encoder": (models.SEANetEncoder, (1, 1, 3200), 2),
        "SEANet decoder": (models.SEANetDecoder, (1, 128, 16), 2),
        "Conv-TasNet (causal)": (models.ConvTasNet, (1, 1, 3200), 2),
        "DS-CNN": (models.DSCNN, (1, 1, 49, 10), 2),
    }
    for name, (_, _, frames, size) in models.VIDEO.items():
        found[name] = (lambda n=name: models.video(n), (1, 3, frames, size, size), 2)
    return found


def measure(name: str) -> dict[str, Any]:
    """One row of the table."""
    build, shape, axis = cases()[name]
    torch.manual_seed(0)
    began = time.perf_counter()
    step = cofx.compile(build().eval(), torch.randn(shape), time_dim=axis, nonlocal_ops=NONLOCAL.get(name, "recompute"))
    cost = step.report()
    return {
        "model": name,
        "clip": shape[axis],
        "macs_per_clip": cost.macs_per_clip,
        "macs_per_step": round(cost.macs_per_step),
        "ratio": round(cost.macs_per_clip / cost.macs_per_step, 1),
        "published": PUBLISHED.get(name),
        "equivalence": step.equivalence,
        "streamed": round(cost.streamed, 3),
        "state_bytes": cost.state_bytes,
        "seconds": round(time.perf_counter() - began),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "# Multiply-adds per step against per clip",
        "",
        f"Made by `benchmarks/flops.py` with torch {torch.__version__.partition('+')[0]}, at full depth and the sizes",
        "of the papers, random weights.",
        "What a window that moves on by one frame costs, over what a step costs; beside it the ratio that",
        "continual-inference publishes for its own form of the model.",
        "",
        "| model | frames of a clip | per clip | per step | ratio | theirs | equivalence | state, bytes |",
        "|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for r in rows:
        clip, step = (f"{r[key] / 1e6:,.2f} M" for key in ("macs_per_clip", "macs_per_step"))
        theirs = f"{r['published']}x" if r["published"] else ""
        lines.append(
            f"| {r['model']} | {r['clip']} | {clip} | {step} | {r['ratio']}x | {theirs} | {r['equivalence']} "
            f"| {r['state_bytes']:,} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the models that the command line names."""
    warnings.simplefilter("ignore")
    words = sys.argv[1:]
    rows = {r["model"]: r for r in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}
    print(f"{'model':<22} {'clip':>5} {'per clip':>10} {'per step':>10} {'ratio':>7} {'theirs':>7}  equivalence")
    for name in cases():
        if words and not any(w.lower() in name.lower() for w in words):
            continue
        row = rows[name] = measure(name)
        print(
            f"{name:<22} {row['clip']:>5} {row['macs_per_clip'] / 1e9:>9.3f}G {row['macs_per_step'] / 1e9:>9.4f}G "
            f"{row['ratio']:>6}x {row['published'] or '':>7}  {row['equivalence']}",
            flush=True,
        )
        RESULTS.parent.mkdir(exist_ok=True)
        found = [rows[n] for n in cases() if n in rows]
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(table(found))


if __name__ == "__main__":
    main()
