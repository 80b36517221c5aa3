"""What it saves to place delays where they take the fewest bytes, instead of where branches meet.

::

    python benchmarks/delays.py    # writes benchmarks/results/delays.md

Bytes of state for a batch of one, with every op run as soon as it can and its results waiting at the join, and as
`cofx.compile` places them. No time is measured.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from models.video import video
from torch import nn

import cofx
from cofx.passes.schedule_delays import Schedule, schedule_delays
from models import STGCN


class Inception(nn.Module):
    """Branches of several lengths over the same frames (Szegedy et al. 2015), over time: three blocks."""

    def __init__(self, width: int = 32, blocks: int = 3) -> None:
        super().__init__()
        self.kernels = (1, 5, 9, 19)
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Conv1d(width * 4 if i else 6, width, k, padding=k // 2) for k in self.kernels)
            for i in range(blocks)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 6, time) -> (batch, 4 * width, time)"""
        for branches in self.blocks:
            x = torch.cat([branch(x).relu() for branch in branches], 1)
        return x


class Wide(nn.Module):
    """Residual blocks whose shortcut widens the channels."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 64, 256)
        self.long = nn.ModuleList(nn.Conv1d(a, b, 9, padding=4) for a, b in zip(widths, widths[1:], strict=False))
        self.short = nn.ModuleList(nn.Conv1d(a, b, 1) for a, b in zip(widths, widths[1:], strict=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 16, time) -> (batch, 256, time)"""
        for long, short in zip(self.long, self.short, strict=True):
            x = (long(x) + short(x)).relu()
        return x


def state_bytes(schedule: Schedule) -> int:
    """Bytes of all histories, for a batch of one."""
    return sum(
        frames * math.prod(value.layout.sizes(1, 1)) * value.dtype.itemsize
        for value, frames in schedule.history.items()
    )


def main() -> None:
    """Print and write the table."""
    torch.set_grad_enabled(False)
    nets: list[tuple[str, nn.Module, tuple[int, ...]]] = [
        ("Inception over time, 3 blocks", Inception(), (1, 6, 64)),
        ("widening shortcuts", Wide(), (1, 16, 64)),
        ("ST-GCN", STGCN(), (1, 3, 100, 25)),
        ("Slow-R50", video("Slow-R50"), (1, 3, 8, 224, 224)),
        ("I3D-R50", video("I3D-R50"), (1, 3, 8, 224, 224)),
    ]
    lines = [
        "Bytes of state, delays where branches meet against delays where they take the fewest bytes "
        "(`python benchmarks/delays.py` writes this).\n",
        "| net | at the join | placed | ratio |",
        "|---|---|---|---|",
    ]
    for name, model, shape in nets:
        schedule = cofx.compile(model.eval(), torch.randn(shape)).compiled.plan.schedule
        placed = state_bytes(schedule)
        for op in schedule.graph.ops:
            op.late = 0
        joined = state_bytes(schedule_delays(schedule.graph, schedule.outputs))
        lines.append(f"| {name} | {joined:,} | {placed:,} | {placed / joined:.2f} |")
        print(lines[-1], flush=True)
    Path(__file__).with_name("results").joinpath("delays.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
