"""Ways to compute one frame of a convolution over time, timed beside each other: what `passes/codegen/lower.py` chooses
by. Run it on the machine in question: ``python benchmarks/ops.py``."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

RESULTS = Path(__file__).parent / "results" / "ops.json"
Way = Callable[[], torch.Tensor]

# name, batch, channels in and out, kernel, picture, spatial stride, depthwise
SHAPES: list[tuple[str, int, int, int, tuple[int, int, int], tuple[int, int], int, bool]] = [
    ("1-d k3 64", 1, 64, 64, (3, 1, 1), (1, 1), 1, False),
    ("1-d k3 256", 1, 256, 256, (3, 1, 1), (1, 1), 1, False),
    ("k9 64, 25 joints", 2, 64, 64, (9, 1, 1), (25, 1), 1, False),
    ("k9 256, 25 joints", 2, 256, 256, (9, 1, 1), (25, 1), 1, False),
    ("1x1 24->54 40x40", 1, 24, 54, (1, 1, 1), (40, 40), 1, False),
    ("1x1 192->432 5x5", 1, 192, 432, (1, 1, 1), (5, 5), 1, False),
    ("1x1 256->64 56x56", 1, 256, 64, (1, 1, 1), (56, 56), 1, False),
    ("1x1 256->512 56x56 s2", 1, 256, 512, (1, 1, 1), (56, 56), 2, False),
    ("(3,1,1) 1024->256 14x14", 1, 1024, 256, (3, 1, 1), (14, 14), 1, False),
    ("(3,1,1) 2048->512 7x7", 1, 2048, 512, (3, 1, 1), (7, 7), 1, False),
    ("(1,3,3) 64 56x56", 1, 64, 64, (1, 3, 3), (56, 56), 1, False),
    ("(1,3,3) 256 14x14", 1, 256, 256, (1, 3, 3), (14, 14), 1, False),
    ("dw 3x3x3 54 80x80 s2", 1, 54, 54, (3, 3, 3), (80, 80), 2, True),
    ("dw 3x3x3 108 20x20", 1, 108, 108, (3, 3, 3), (20, 20), 1, True),
    ("dw 3x3x3 216 10x10", 1, 216, 216, (3, 3, 3), (10, 10), 1, True),
    ("dw 3x3x3 432 5x5", 1, 432, 432, (3, 3, 3), (5, 5), 1, True),
    ("dw (5,1,1) 24 80x80", 1, 24, 24, (5, 1, 1), (80, 80), 1, True),
    ("dw (3,3) 64 1x5", 1, 64, 64, (3, 3, 1), (5, 1), 1, True),
]


def ways(shape: Any) -> dict[str, Way]:
    """Functions that compute the same."""
    _, batch, cin, cout, kernel, picture, stride, depthwise = shape
    groups = cin if depthwise else 1
    pad = (0, kernel[1] // 2, kernel[2] // 2)
    x = torch.randn(batch, cin, kernel[0], *picture)
    w, b = torch.randn(cout, cin // groups, *kernel), torch.randn(cout)
    steps = (1, stride, stride)
    found: dict[str, Way] = {"conv": lambda: F.conv3d(x, w, b, steps, pad, 1, groups)}
    if kernel[1:] == (1, 1) and not depthwise:
        flat, column = w.reshape(cout, -1), b[:, None]
        high = picture[0] // stride if stride > 1 else picture[0]
        wide = picture[1] // stride if stride > 1 else picture[1]

        def product() -> torch.Tensor:
            y = x[..., ::stride, ::stride] if stride > 1 else x
            y = y.reshape(batch, -1, high * wide)
            if batch == 1:
                return torch.addmm(column, flat, y[0]).view(1, cout, 1, high, wide)
            return (torch.matmul(flat, y) + column).view(batch, cout, 1, high, wide)

        found["mm"] = product
        if picture == (1, 1):
            turned = flat.t().contiguous()
            found["mm [K,N]"] = lambda: torch.addmm(b, x.view(batch, -1), turned).view(batch, cout, 1, 1, 1)
    if kernel[0] == 1:
        w2 = w[:, :, 0].contiguous()
        found["conv2d"] = lambda: F.conv2d(x[:, :, 0], w2, b, steps[1:], pad[1:], 1, groups).unsqueeze(2)
    if picture != (1, 1):
        found |= taps_apart(x, w, b, stride, pad, groups)
    if depthwise and prod(kernel[:1] + picture + picture) <= 1 << 11:
        found["all taps at their places"] = spread(x, w, b, pad)
    if depthwise:
        taps = [w[:, :, t].contiguous() for t in range(kernel[0])]

        def summed() -> torch.Tensor:
            y = F.conv2d(x[:, :, 0], taps[0], b, steps[1:], pad[1:], 1, groups)
            for t in range(1, kernel[0]):
                y += F.conv2d(x[:, :, t], taps[t], None, steps[1:], pad[1:], 1, groups)
            return y.unsqueeze(2)

        found["sum of conv2d"] = summed
        if kernel[1:] == (1, 1):
            rows = w.view(cin, 1, kernel[0])

            def batched() -> torch.Tensor:
                y = torch.bmm(rows, x.view(cin, kernel[0], -1))
                return y.view(1, cin, 1, *picture) + b.view(cin, 1, 1, 1)

            found["bmm"] = batched
            vectors = [w[:, 0, t] for t in range(kernel[0])]

            def shifted() -> torch.Tensor:
                y = torch.addcmul(b.view(1, cin, 1, 1), x[:, :, 0], vectors[0])
                for t in range(1, kernel[0]):
                    y.addcmul_(x[:, :, t], vectors[t])
                return y.unsqueeze(2)

            found["multiply-adds"] = shifted
        else:
            nhwc = torch.channels_last
            last = [x[:, :, t].contiguous(memory_format=nhwc) for t in range(kernel[0])]
            wlast = [t.contiguous(memory_format=nhwc) for t in taps]

            def lasting() -> torch.Tensor:
                y = F.conv2d(last[0], wlast[0], b, steps[1:], pad[1:], 1, groups)
                for t in range(1, kernel[0]):
                    y += F.conv2d(last[t], wlast[t], None, steps[1:], pad[1:], 1, groups)
                return y.unsqueeze(2)

            found["sum, frames apart, channels last"] = lasting
            folded = w.permute(0, 2, 1, 3, 4).reshape(cout, kernel[0], *kernel[1:]).contiguous()
            found["time in the channels"] = lambda: F.conv2d(
                x.view(batch, cin * kernel[0], *picture), folded, b, steps[1:], pad[1:], 1, groups
            ).unsqueeze(2)
    return found


def taps_apart(
    x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, stride: int, pad: tuple[int, ...], groups: int
) -> dict[str, Way]:
    """Frames that lie apart, channels last: a sum of taps, by oneDNN or, of pixels alone, by matrix products."""
    frames = [f.contiguous(memory_format=torch.channels_last) for f in x.unbind(2)]
    geometry = (list(pad[1:]), [stride, stride], [1, 1], groups)
    packed = [
        torch.ops.mkldnn._reorder_convolution_weight(t.contiguous(), *geometry, list(frames[0].shape))
        for t in w.unbind(2)
    ]

    def packs() -> torch.Tensor:
        run, add = torch.ops.mkldnn._convolution_pointwise, torch.ops.mkldnn._convolution_pointwise_
        y = run(frames[0], packed[0], b, *geometry, "none", [], "")
        for frame, tap in zip(frames[1:], packed[1:], strict=True):
            add(y, frame, tap, None, *geometry, "add", 1.0, None, [], "")
        return y.unsqueeze(2)  # type: ignore[no-any-return]

    found: dict[str, Way] = {"taps, oneDNN": packs}
    if w.shape[3:] == (1, 1) and groups == 1:
        turned = [t.flatten(1).t().contiguous() for t in w.unbind(2)]

        def pixels() -> torch.Tensor:
            y = b
            for frame, tap in zip(frames, turned, strict=True):
                rows = frame[:, :, ::stride, ::stride].permute(0, 2, 3, 1)
                y = torch.addmm(y, rows.reshape(-1, rows.shape[3]), tap)
            return y.view(*rows.shape[:3], -1).permute(0, 3, 1, 2).unsqueeze(2)

        found["taps, pixels x weights"] = pixels
    return found


def spread(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, pad: tuple[int, ...]) -> Way:
    """A depthwise convolution of few positions as a product for each channel."""
    batch, channels, frames, *picture = x.shape
    places = prod(picture)
    each = torch.eye(frames * places).view(-1, 1, frames, *picture).expand(-1, channels, -1, -1, -1)
    matrix = F.conv3d(each, w, None, 1, pad, 1, channels).flatten(2).transpose(0, 1).contiguous()
    column = b[:, None, None]

    def product() -> torch.Tensor:
        rows = x.reshape(batch, channels, frames * places).transpose(0, 1)
        return torch.baddbmm(column, rows, matrix).transpose(0, 1).reshape(batch, channels, 1, *picture)

    return product


def main() -> None:
    """Print and keep a table."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    rows = []
    for shape in SHAPES:
        found = ways(shape)
        want = found["conv"]()
        taken: dict[str, list[float]] = {name: [] for name in found}
        for name, way in found.items():
            torch.testing.assert_close(way(), want, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
        for _ in range(rounds):
            for name, way in found.items():
                way()
                began = time.perf_counter()
                for _ in range(5):
                    way()
                taken[name].append((time.perf_counter() - began) / 5e-6)
        row = {name: round(statistics.median(times), 1) for name, times in taken.items()}
        rows.append({"op": shape[0], "us": row})
        best = row["conv"]
        print(f"{shape[0]:26s}", "  ".join(f"{n} {t:.0f} ({best / t:.1f}x)" for n, t in row.items()), flush=True)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
