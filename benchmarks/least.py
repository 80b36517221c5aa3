"""Multiply-adds per step of attention, recurrence and pools, beside the least that the op allows.

::

    python benchmarks/least.py      # writes benchmarks/results/least.json and least.md

The least counts each frame's projections once, one query against the keys that it may read for each output, and no
second pass over frames that cannot have changed. E is the width, N the frames of a clip, F the feed-forward's width.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cofx
from cofx.report import counter

RESULTS = Path(__file__).parent / "results" / "least.json"
E, N, F, HEADS = 64, 32, 128, 4


@dataclass(frozen=True)
class Case:
    """A net over (batch, N, E) with the least multiply-adds of a step, and why that is the least."""

    name: str
    build: Callable[[], nn.Module]
    least: int
    why: str
    options: dict[str, Any] = field(default_factory=dict)


class Read(nn.Module):
    """What is read of a net's output: ``read(net, x)``."""

    def __init__(self, net: nn.Module, read: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.net, self.read = net, read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, N, E)"""
        return self.read(self.net, x)


class Token(nn.Module):
    """An encoder over learnt positions, which is read at a class token in front."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.net = encoder(layers)
        self.token, self.table = nn.Parameter(torch.randn(1, 1, E)), nn.Parameter(torch.randn(1, N + 1, E))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, N, E) -> (batch, E)"""
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.table
        y: torch.Tensor = self.net(x)[:, 0]
        return y


def attention() -> nn.Module:
    """Self-attention."""
    return nn.MultiheadAttention(E, HEADS, batch_first=True)


def encoder(layers: int) -> nn.Module:
    """Layers of attention and feed-forward."""
    layer = nn.TransformerEncoderLayer(E, HEADS, F, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def self_attend(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """All frames attend to all."""
    y: torch.Tensor = net(x, x, x, need_weights=False)[0]
    return y


def causal(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Frames attend to those before."""
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    y: torch.Tensor = net(x, x, x, need_weights=False, attn_mask=mask)[0]
    return y


def banded(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Frames attend to the last 8."""
    i = torch.arange(x.shape[1])
    back = i[:, None] - i[None]
    y: torch.Tensor = net(x, x, x, need_weights=False, attn_mask=(back < 0) | (back > 7))[0]
    return y


GATES = {nn.RNN: 1, nn.GRU: 3, nn.LSTM: 4}
PROJECT, OUT, ROW, FEED = 3 * E * E, E * E, 2 * N * E, 2 * E * F  # of one frame; a row: one query against N keys
REST = OUT + FEED  # what a layer does to a frame behind its attention

CASES = [
    Case("attention, all rows", lambda: Read(attention(), self_attend), PROJECT + N * (ROW + OUT),
         "the new frame's projections; N queries", {"window_output": "all"}),
    Case("attention, newest row", lambda: Read(attention(), lambda net, x: self_attend(net, x)[:, -1]),
         PROJECT + ROW + OUT, "the new frame's projections; one query"),
    Case("attention, mean over rows", lambda: Read(attention(), lambda net, x: self_attend(net, x).mean(1)),
         PROJECT + N * (ROW + OUT), "N queries (what follows the mean could be applied once)"),
    Case("encoder layer, last token", lambda: Read(encoder(1), lambda net, x: net(x)[:, -1]), PROJECT + ROW + REST,
         "one query"),
    Case("2 layers, last token", lambda: Read(encoder(2), lambda net, x: net(x)[:, -1]),
         PROJECT + N * (ROW + REST) + N * 2 * E * E + E * E + ROW + REST,
         "all rows of the first layer; keys and values of all, one query of the second"),
    Case("1 layer, positions, class token", lambda: Token(1),
         (N + 1) * 2 * E * E + E * E + 2 * (N + 1) * E + REST, "positions move: all keys and values; one query"),
    Case("causal attention", lambda: Read(attention(), causal), PROJECT + ROW + OUT,
         "one query against N frames so far (there is room for more)", {"at": N}),
    Case("causal attention, context 16", lambda: Read(attention(), causal), PROJECT + 2 * 16 * E + OUT,
         "one query against 16", {"context": 16}),
    Case("band of 8 frames", lambda: Read(attention(), banded), PROJECT + 2 * 8 * E + OUT, "one query against 8"),
    *(Case(kind.__name__, lambda kind=kind: Read(kind(E, E, batch_first=True), lambda net, x: net(x)[0]),
           GATES[kind] * 2 * E * E, "one frame") for kind in GATES),
    Case("GRU, last state", lambda: Read(nn.GRU(E, E, batch_first=True), lambda net, x: net(x)[0][:, -1]),
         3 * 2 * E * E, "one frame"),
    Case("GRU, both directions, last", lambda: Read(nn.GRU(E, E, batch_first=True, bidirectional=True),
         lambda net, x: net(x)[0][:, -1]), (N + 1) * 3 * 2 * E * E - (N - 1) * 3 * E * E,
         "N frames from zero forwards, their inputs projected once, and one backwards"),
    Case("convolution and mean", lambda: Read(nn.Conv1d(E, E, 3), lambda net, x: net(x.mT).mean(2)), 3 * E * E,
         "one frame of the convolution"),
]  # fmt: skip


def measure(case: Case) -> dict[str, Any]:
    """One row of the table."""
    options = {k: v for k, v in case.options.items() if k != "at"}
    torch.manual_seed(0)
    step = cofx.compile(case.build().eval(), torch.randn(1, N, E), time_dim=1, **options)
    cost = step.report()
    steps = cost.macs_per_step
    if "at" in case.options:  # keys grow with the stream
        with torch.no_grad(), counter() as counted:
            for _ in range(case.options["at"]):
                before = counted.get_total_flops()
                step.forward_step(torch.randn(1, E))
            steps = (counted.get_total_flops() - before) // 2
    return {
        "op": case.name,
        "equivalence": step.equivalence,
        "macs_per_clip": cost.macs_per_clip,
        "macs_per_step": round(steps),
        "least": case.least,
        "ratio": round(steps / case.least, 2),
        "why": case.why,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "# Multiply-adds per step beside the least that an op allows",
        "",
        f"Made by `benchmarks/least.py`: width {E}, clips of {N} frames, feed-forward {F}, {HEADS} heads.",
        "",
        "| op | equivalence | per clip | per step | least | ratio | the least is |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {r['op']} | {r['equivalence']} | {r['macs_per_clip']:,} | {r['macs_per_step']:,} | {r['least']:,} "
        f"| {r['ratio']} | {r['why']} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all cases."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = [measure(case) for case in CASES]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
