"""Time step models against the offline sliding window and continual-inference, in one process and interleaved.

::

    python benchmarks/run.py                        # W1 to W5, writes benchmarks/results/run.json
    python benchmarks/run.py --small x3d tcn        # small sizes; some of them
    python benchmarks/run.py --before DIR           # and the cofx of another checkout, for a change's before and after

Every variant runs blocks of whole periods in turn, on one thread, without gradients; the table has the median time per
input frame over the blocks, and the ratio of each to the sliding window. A model is checked before it is timed:
`step.verify` against the offline model, and continual-inference's outputs where it computes the same function.

The column "module" is what is left when the caller runs `step.graph_module` with the state at hand: what the step's
shell adds is the difference.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import cofx

sys.path.insert(0, str(Path(__file__).parent))
from workloads import Workload, workloads

RESULTS = Path(__file__).parent / "results" / "run.json"
Block = Callable[[], None]


def other_cofx(checkout: Path) -> Any:
    """The cofx of another checkout, beside this one."""
    name = "cofx_before"
    place = checkout.resolve() / "cofx"
    spec = importlib.util.spec_from_file_location(name, place / "__init__.py", submodule_search_locations=[str(place)])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def cofx_variants(load: Workload, package: Any, clip: torch.Tensor, row: dict[str, Any]) -> dict[str, Block]:
    """The step model's blocks, past its warm-up; verified before."""
    began = time.perf_counter()
    step = package.compile(load.model, clip, time_dim=load.time_dim, **load.options)
    row["compile_s"] = round(time.perf_counter() - began, 2)
    verified = step.verify(clip)
    row["exact"], row["worst"] = verified.exact, verified.difference
    row["equivalence"] = step.equivalence
    period = step.compiled.plan.schedule.period
    row["period"] = period
    frames = frames_of(clip, load.time_dim)
    for _ in range(3):
        for x in frames:
            step.forward_step(x)
    while step._state.count % period:
        step.forward_step(frames[0])
    row["state_bytes"] = sum(t.numel() * t.element_size() for t in step._state.tensors)
    place = [0]

    def block() -> None:
        for _ in range(period):
            step.forward_step(frames[place[0] % len(frames)])
            place[0] += 1

    variants = {"cofx": block}
    if period == 1:
        module, state = step.graph_module, [step._state.tensors]
        wants = [n.name for n in module.graph.nodes if n.op == "placeholder"]
        if len(wants) == len(state[0]) + 1:

            def bare() -> None:
                _, state[0] = module(frames[place[0] % len(frames)], *state[0])
                place[0] += 1

            variants["module"] = bare
    return variants


def frames_of(clip: torch.Tensor, time_dim: int) -> list[torch.Tensor]:
    """Its frames, each with memory of its own."""
    return [x.contiguous() for x in clip.unbind(time_dim)]


def continual_variant(load: Workload, clip: torch.Tensor, period: int, row: dict[str, Any]) -> Block:
    """The blocks of the same net in continual-inference; compared with the offline model if it is the same."""
    assert load.continual is not None
    net: Any = load.continual().eval()
    frames = frames_of(clip, load.time_dim)
    if load.same:
        got = net.forward_steps(clip, pad_end=True)
        want = load.model(clip)
        row["continual_same"] = torch.allclose(got.reshape(want.shape), want, 1e-3, 1e-4)
        net.clean_state()
    for x in [*frames, *frames]:
        net.forward_step(x)
    place = [0]

    def block() -> None:
        for _ in range(period):
            net.forward_step(frames[place[0] % len(frames)])
            place[0] += 1

    return block


def measure(load: Workload, rounds: int, before: Any) -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = {"workload": load.name, "clip": list(load.clip)}
    torch.manual_seed(0)
    load.model.eval()
    for m in load.model.modules():  # statistics that are not those of a fresh layer
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            m.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr,operator]
            m.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr,operator]
            m.weight.data.uniform_(0.5, 1.5)
    clip = torch.randn(load.clip)
    variants = cofx_variants(load, cofx, clip, row)
    period = row["period"]
    if before is not None:
        old: dict[str, Any] = {}
        variants |= {f"{name} before": block for name, block in cofx_variants(load, before, clip, old).items()}
    if load.continual is not None:
        try:
            variants["continual"] = continual_variant(load, clip, period, row)
        except Exception as error:
            row["continual_error"] = f"{type(error).__name__}: {error}"[:200]

    def offline() -> None:
        load.model(clip)

    variants["offline"] = offline
    frames = {name: 1 if name == "offline" or name.startswith("module") else period for name in variants}
    calls: dict[str, int] = {}
    for name, block in variants.items():  # blocks of a few milliseconds, so that caches are the variant's own
        block()
        began = time.perf_counter()
        block()
        calls[name] = max(1, int(0.004 / (time.perf_counter() - began)))
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, block in variants.items():
            began = time.perf_counter()
            for _ in range(calls[name]):
                block()
            taken[name].append((time.perf_counter() - began) / calls[name] / frames[name])
    for name, times in taken.items():
        low, middle, high = statistics.quantiles(times, n=4)
        row[name] = {"us": round(middle * 1e6, 1), "quartiles": [round(low * 1e6, 1), round(high * 1e6, 1)]}
    base = row["offline"]["us"]
    row["over_offline"] = {n: round(base / row[n]["us"], 2) for n in variants if n != "offline"}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown: microseconds per frame, and how many times faster than the sliding window."""
    names = [n for n in ("offline", "continual", "cofx before", "cofx", "module before", "module")
             if any(n in r for r in rows)]  # fmt: skip
    lines = [
        "| workload | clip | exact | " + " | ".join(names) + " | state bytes |", "|---" * (len(names) + 4) + "|"
    ]  # fmt: skip
    for r in rows:
        cells = []
        for n in names:
            ratio = r.get("over_offline", {}).get(n)
            cells.append("-" if n not in r else f"{r[n]['us']:.0f}" + (f" ({ratio}x)" if ratio else ""))
        exact = "yes" if r["exact"] else "NO"
        size = "x".join(map(str, r["clip"]))
        lines.append(f"| {r['workload']} | {size} | {exact} | " + " | ".join(cells) + f" | {r['state_bytes']} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="x3d slow stgcn tcn dilated dscnn encoder; default all")
    parser.add_argument("--small", action="store_true", help="smaller pictures, windows and widths")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--before", type=Path, help="another checkout, timed beside this one")
    parser.add_argument("--output", type=Path, help=f"JSON file (default {RESULTS.name} if all are run)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    before = None if given.before is None else other_cofx(given.before)
    makers = workloads(given.small, given.batch)
    rows = []
    for name in given.names or makers:
        rows.append(measure(makers[name](), given.rounds, before))
        print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    output = given.output or (None if given.names or given.small else RESULTS)
    if output is not None:
        about = {"torch": torch.__version__, "machine": platform.machine(), "cpu": _processor(), "threads": 1}
        output.write_text(json.dumps({"about": about, "batch": given.batch, "rows": rows}, indent=1) + "\n")
        output.with_suffix(".md").write_text(table(rows) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
