"""Time step models against the offline sliding window, continual-inference and tract, in one process and interleaved.

::

    python benchmarks/run.py                        # W1 to W5, writes benchmarks/results/run.{json,md,svg}
    python benchmarks/run.py --batch 1 8            # at both batch sizes
    python benchmarks/run.py --small x3d tcn        # small sizes; some of them
    python benchmarks/run.py --before DIR           # and the cofx of another checkout, for a change's before and after

Every variant runs blocks of whole periods in turn, on one thread, without gradients; the table has the median CPU time
per input frame over the blocks, without their first call: that finds the caches full of the other variants' data, as
a step does that shares its core, and is told under the table. A model is checked before it is timed: `step.verify`
against the offline model, other backends against the first; continual-inference and tract (as a pulsed model, where
it takes the model) where they compute the same function. The column ``limit`` is what the convolutions and products
of a step take alone, on inputs that lie ready (`limit.py`).

`python benchmarks/readme.py` puts the numbers into README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

import cofx
import cofx.backends

sys.path.insert(0, str(Path(__file__).parent))
from limit import limit
from readme import best
from tract_pulse import tract_variant
from workloads import Workload, workloads

RESULTS = Path(__file__).parent / "results" / "run.json"
Block = Callable[[], None]
HOT = 3  # calls of a block at least, after the first
LONG = 0.2  # seconds of a call for which one is enough: its caches are its own in any case
PERIODS = 9  # for the medians of each phase
CLOSE = 1e-5  # of the largest number of an output: what float32 leaves of a deep net, offline as in a stream


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


def cofx_variants(
    load: Workload,
    package: Any,
    clip: torch.Tensor,
    row: dict[str, Any],
    backends: Sequence[str],
    chunks: Sequence[int],
) -> dict[str, tuple[Block, int]]:
    """Blocks of each backend's steps past their warm-up, and of chunks, with the frames that a block takes.

    The step model is verified before; what other backends give is compared with what it gives.
    """
    frames = frames_of(clip, load.time_dim)
    variants: dict[str, tuple[Block, int]] = {}
    first: list[Any] = []
    for backend in backends:
        began = time.process_time()
        options = {} if backend == "eager" else {"backend": backend}
        step = package.compile(load.model, clip, time_dim=load.time_dim, **load.options, **options)
        row[f"compile {backend} s"] = round(time.process_time() - began, 2)
        period = step.compiled.plan.schedule.period
        if backend == "eager":
            largest = max(y.abs().max().item() for y in tree_leaves(load.model(clip)))
            worst = step.verify(clip).difference
            row |= {"exact": worst <= CLOSE * largest, "worst": worst, "largest": largest, "period": period}
            row |= {"equivalence": step.equivalence, "state_bytes": step.report().state_bytes * row["batch"]}
            eager = step
        warm = max(3 * len(frames), getattr(step.compiled, "steady_from", 0) + len(frames))
        warm += -warm % period
        last = [step.forward_step(frames[i % len(frames)]) for i in range(warm)][-2 * len(frames) :]
        if not first:
            first = last
        row[f"same {backend}"] = all(_same(a, b) for a, b in zip(last, first, strict=True))
        row.setdefault("slowest phase us", {})[backend] = _slowest_phase(step, frames, period)
        variants[backend] = _steps(step, frames, period), period
        for n in chunks if backend == "eager" else ():
            take = n + -n % period
            if take > 1:
                chunk = torch.stack([frames[i % len(frames)] for i in range(take)], load.time_dim)
                step.forward_steps(chunk, update_state=False)
                variants[f"chunks of {take}"] = lambda step=step, chunk=chunk: step.forward_steps(chunk), take
    if package is cofx:
        row["limit"] = {"us": round(limit(eager, [x.contiguous() for x in frames[:1]]) * 1e6, 1)}
    return variants


def _steps(step: Any, frames: list[torch.Tensor], period: int) -> Block:
    place = [0]

    def block() -> None:
        for _ in range(period):
            step.forward_step(frames[place[0] % len(frames)])
            place[0] += 1

    return block


def _slowest_phase(step: Any, frames: list[torch.Tensor], period: int) -> float:
    """The median time of the steps of a phase, of that phase in which it is longest."""
    taken: list[list[float]] = [[] for _ in range(period)]
    for i in range(PERIODS * period):
        began = time.process_time()
        step.forward_step(frames[i % len(frames)])
        taken[i % period].append(time.process_time() - began)
    return round(max(map(statistics.median, taken)) * 1e6, 1)


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return bool((a - b).abs().max() <= CLOSE * b.abs().max())


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
    row["continual_state_bytes"] = kept_bytes(net)
    return _steps(net, frames, period)


def kept_bytes(net: torch.nn.Module) -> int:
    """Bytes of the tensors that a module of continual-inference keeps between steps: not saved, and no parameters."""
    kept = {}
    for m in net.modules():
        for name, value in vars(m).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                kept |= {id(t): t.nbytes for t in tree_leaves(value) if isinstance(t, torch.Tensor)}
        kept |= {id(t): t.nbytes for n, t in m._buffers.items() if t is not None and n in m._non_persistent_buffers_set}
    return sum(kept.values()) - sum(p.nbytes for p in net.parameters() if id(p) in kept)


def measure(
    load: Workload, batch: int, rounds: int, before: Any, backends: Sequence[str], chunks: Sequence[int]
) -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = {"workload": load.name, "clip": list(load.clip), "batch": batch}
    torch.manual_seed(0)
    load.model.eval()
    for m in load.model.modules():  # statistics that are not those of a fresh layer
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            m.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr,operator]
            m.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr,operator]
            m.weight.data.uniform_(0.5, 1.5)
    clip = torch.randn(load.clip)
    variants = cofx_variants(load, cofx, clip, row, backends, chunks)
    period = row["period"]
    if before is not None:
        old = cofx_variants(load, before, clip, {"batch": batch}, ["eager"], [])
        variants |= {f"{name} before": variant for name, variant in old.items()}
    if load.continual is not None:
        try:
            variants["continual"] = continual_variant(load, clip, period, row), period
        except Exception as error:
            row["continual_error"] = f"{type(error).__name__}: {error}"[:200]
    try:
        long = torch.cat([clip] * 3, load.time_dim)
        pulse, row["tract_same"] = tract_variant(load.model, long, load.time_dim, period)
        variants["tract"] = pulse, period
    except Exception as error:
        row["tract_error"] = str(error).split("Stack backtrace")[0].strip()[-300:]
    variants["offline"] = (lambda: load.model(clip)), 1
    calls: dict[str, int] = {}
    for name, (block, _) in variants.items():
        block()
        began = time.perf_counter()
        block()
        taken_once = time.perf_counter() - began
        calls[name] = max(HOT if taken_once < LONG else 1, int(0.004 / taken_once))
    taken: dict[str, list[float]] = {name: [] for name in variants}
    first: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, (block, frames) in variants.items():
            first[name].append(_cpu_time(block, 1) / frames)
            taken[name].append(_cpu_time(block, calls[name]) / frames)
    for name, times in taken.items():
        low, middle, high = statistics.quantiles(times, n=4)
        row[name] = {
            "us": round(middle * 1e6, 1),
            "quartiles": [round(low * 1e6, 1), round(high * 1e6, 1)],
            "first us": round(statistics.median(first[name]) * 1e6, 1),
        }
    row["variants"] = list(variants)
    for base in ("offline", "continual"):
        if base in variants:
            row[f"over {base}"] = {n: round(row[base]["us"] / row[n]["us"], 2) for n in variants if n != base}
    return row


def _cpu_time(block: Callable[[], object], calls: int) -> float:
    """Seconds for a call."""
    began = time.process_time()
    for _ in range(calls):
        block()
    return (time.process_time() - began) / calls


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown: microseconds per frame; in brackets how many times faster than continual-inference."""
    names = list(dict.fromkeys(n for r in rows for n in r["variants"]))
    names.sort(key=lambda n: (n not in ("offline", "continual", "tract"), n.startswith("chunks"), len(n)))
    heads = ["workload", "clip", "exact", *names, "limit", "state bytes", "continual's"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for r in rows:
        cells = []
        for n in names:
            ratio = r.get("over continual", {}).get(n)
            cells.append("-" if n not in r else f"{r[n]['us']:,.0f}" + (f" ({ratio:.1f}x)" if ratio else ""))
        exact = "yes" if r["exact"] and all(v for k, v in r.items() if k.startswith("same ")) else "NO"
        size = "x".join(map(str, r["clip"]))
        theirs = r.get("continual_state_bytes")
        cells += [f"{r['limit']['us']:,.0f}" if "limit" in r else "-", f"{r['state_bytes']:,}"]
        cells.append(f"{theirs:,}" if theirs else "-")
        lines.append(f"| {r['workload']} | {size} | {exact} | " + " | ".join(cells) + " |")
    for batch in sorted({r.get("batch", 1) for r in rows}):
        found = [r for r in rows if r.get("batch", 1) == batch and "over continual" in r]
        if found:
            ratio = statistics.geometric_mean(map(best, found))
            cold = ""
            if all("first us" in r["continual"] for r in found):
                first = statistics.geometric_mean(best(r, "first us") for r in found)
                cold = f"; {first:.1f}x where other work has just emptied the caches"
            lines += ["", f"Best backend over continual-inference, batch {batch}, geometric mean of {len(found)} rows: "
                          f"{ratio:.1f}x{cold}."]  # fmt: skip
    slowest = [min(r["slowest phase us"].values()) / r["offline"]["us"] for r in rows if "slowest phase us" in r]
    if slowest:
        lines += ["", f"The slowest phase of a step, by its best backend: at most {max(slowest):.2f} of the window."]
    refused = {r["workload"]: r["tract_error"].splitlines()[-1].strip() for r in rows if "tract_error" in r}
    lines += ["", *(f"- tract does not take {name}: {why}" for name, why in refused.items())] if refused else []
    kept = [r["state_bytes"] / r["continual_state_bytes"] for r in rows if r.get("continual_state_bytes")]
    if kept:
        lines += ["", f"State over continual-inference's, geometric mean: {statistics.geometric_mean(kept):.2f}."]
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A picture of the rows that continual-inference has: how many times faster than it each variant is."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    rows = [r for r in rows if "over continual" in r]
    names = list(dict.fromkeys(n for r in rows for n in r["variants"] if n != "continual"))
    figure, axes = pyplot.subplots(figsize=(10, 4.5))
    for i, n in enumerate(names):
        at = [j + 0.8 * (i - (len(names) - 1) / 2) / len(names) for j, r in enumerate(rows) if n in r["over continual"]]
        axes.bar(at, [r["over continual"][n] for r in rows if n in r["over continual"]], 0.8 / len(names), label=n)
    axes.set_xticks(range(len(rows)), [f"{r['workload']}\nbatch {r.get('batch', 1)}" for r in rows], fontsize=8)
    axes.set_yscale("log")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel("times faster than continual-inference")
    axes.legend(fontsize=8, ncols=3, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="x3d slow stgcn tcn dilated dscnn encoder; default all")
    parser.add_argument("--small", action="store_true", help="smaller pictures, windows and widths")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--backends", nargs="+", default=["eager", "onnxruntime", "c", "inductor"], choices=cofx.backends.BACKENDS
    )
    parser.add_argument("--chunks", type=int, nargs="*", default=[4, 16], help="frames per call of forward_steps")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--before", type=Path, help="another checkout, timed beside this one")
    parser.add_argument("--output", type=Path, help=f"JSON file (default {RESULTS.name} if all are run)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    before = None if given.before is None else other_cofx(given.before)
    rows = []
    for batch in given.batch:
        makers = workloads(given.small, batch)
        for name in given.names or makers:
            rows.append(measure(makers[name](), batch, given.rounds, before, given.backends, given.chunks))
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    output = given.output or (None if given.names or given.small else RESULTS)
    if output is not None:
        if output.exists():  # rows of other workloads stay
            mine = {(r["workload"], str(r["clip"])) for r in rows}
            kept = [r for r in json.loads(output.read_text())["rows"] if (r["workload"], str(r["clip"])) not in mine]
            rows = sorted(kept + rows, key=lambda r: (r["workload"], r["clip"]))
        versions = {}
        for name in ("torch", "onnxruntime", "continual-inference", "tract"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # which its column says
                versions[name] = importlib.metadata.version(name)
        about = {**versions, "machine": platform.machine(), "cpu": cofx.backends.processor(), "threads": 1}
        output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        text = ", ".join(f"{k} {v}" for k, v in about.items())
        output.with_suffix(".md").write_text(
            f"CPU time per input frame in microseconds, median of blocks run in turn ({text}); in brackets how many "
            f"times faster than continual-inference. `python benchmarks/run.py` writes this.\n\n{table(rows)}\n"
        )
        plot(rows, output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
