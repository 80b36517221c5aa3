"""How much of the work of every net in tests/models is streamed: a table, and the same as JSON.

    python benchmarks/share.py          # writes benchmarks/results/share.md and share.json

Multiply-adds are counted by torch's flop counter, so that ops that multiply nothing count for nothing.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import cofx  # noqa: E402
from models import SAMPLES, Sample  # noqa: E402


def measure(sample: Sample) -> dict[str, Any]:
    """The report of one net."""
    example = sample.inputs(sample.clip_length, seed=9)
    step = cofx.compile(
        sample.model(), example[0] if len(example) == 1 else tuple(example), time_dim=sample.time_dim,
        **{"batch_dim": sample.batch_dim, **sample.options}
    )  # fmt: skip
    report = step.report()
    return {
        "net": sample.name,
        "equivalence": [o.equivalence for o in step.outputs],
        "streamed": report.streamed,
        "macs_per_step": report.macs_per_step,
        "macs_per_clip": report.macs_per_clip,
        "clip_frames": report.clip_frames,
        "state_bytes": report.state_bytes,
        "recomputed": list(report.recomputed),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, with what they come to."""
    whole = sum(r["streamed"] == 1 for r in rows)
    counted = [r for r in rows if r["macs_per_clip"]]
    mean = sum(r["streamed"] for r in counted) / len(counted)
    lines = [
        "# Share of the work that is streamed",
        "",
        f"Made by `benchmarks/share.py` with torch {torch.__version__.partition('+')[0]}. Of {len(rows)} nets {whole} "
        f"are streamed as a whole; over the {len(counted)} that multiply anything the mean share is {mean:.1%}.",
        "",
        "The share is that of the multiply-adds of one clip which lie in ops that run once per frame. A clip over a",
        "step is what a window that moves on by one frame costs, against a step.",
        "",
        "| net | equivalence | streamed | multiply-adds per step | per clip | clip / step | state, bytes |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        ratio = f"{r['macs_per_clip'] / r['macs_per_step']:.1f}" if r["macs_per_step"] else ""
        share = f"{r['streamed']:.0%}" if r["macs_per_clip"] else "nothing multiplied"
        lines.append(
            f"| {r['net']} | {', '.join(dict.fromkeys(r['equivalence']))} | {share} | {r['macs_per_step']:,.0f} "
            f"| {r['macs_per_clip']:,} | {ratio} | {r['state_bytes']:,} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = [measure(sample) for sample in SAMPLES]
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    for row in rows:  # lines of this tree, not of this machine
        row["recomputed"] = [r.replace(f"{ROOT}/", "") for r in row["recomputed"]]
    (results / "share.json").write_text(json.dumps(rows, indent=1) + "\n")
    (results / "share.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
