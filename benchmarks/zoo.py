"""Compile models of public packages, check each against itself, and say what became of it.

::

    benchmarks/install_zoo.sh DIR                        # the packages, without their dependencies
    python benchmarks/zoo.py --packages DIR              # all; writes benchmarks/results/zoo.json
    python benchmarks/zoo.py --packages DIR tcn wav2vec  # those whose names hold one of these words
    python benchmarks/zoo.py --packages DIR --backend c  # their steps in C beside eager ones; prints a line for each

Each model runs in a process of its own with a time limit. The columns:

    equivalence  what the compiled model promises, for each output
    exact        `step.verify` on the example clip and on a longer one
    streamed     the share of multiply-adds in ops that run once per frame
    saved        multiply-adds per clip over multiply-adds per step
    delay, state in input frames and bytes;  compile, in seconds of processor time
    why          what refused it, or what ended its stream

    built        the commit that was run (rows without it, or with an older one, were not run anew)

``hung`` is said of what took longer than the limit, which on a busy machine is the machine's doing as often as the
model's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

import cofx

sys.path.insert(0, str(Path(__file__).parent))
from zoo_entries import ENTRIES, Entry, prepare_imports

RESULTS = Path(__file__).parent / "results" / "zoo.json"
# a model that cannot be traced for one of these reasons is refused, for any other it failed
NAMED = ("what it computes depends on the data", "gives something else", "changes its parameters")
EXTRA = 6  # evaluations of a clip that are verified beyond the first
BESIDE, MOST = 24, 6000  # steps of a backend that are compared in mid-stream, and of a stream in all
CLOSE = 1e-4  # of the largest number of a stream's outputs


def measure(entry: Entry) -> dict[str, Any]:
    """All that the table says of one model."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    row: dict[str, Any] = {"model": entry.name}
    try:
        model = entry.build().eval()
        clip = entry.inputs()
        with torch.no_grad():
            model(*clip)
    except Exception as error:
        return row | {"outcome": "unavailable", "why": _short(error), "trace": traceback.format_exc()}
    try:
        began = time.process_time()
        step = cofx.compile(model, clip, time_dim=entry.time_dim)
        row["compile_s"] = round(time.process_time() - began, 1)
    except cofx.RefusedError as error:
        return row | {"outcome": "refused", "why": _short(error), "trace": str(error)}
    except Exception as error:
        outcome = "refused" if any(reason in str(error) for reason in NAMED) else "failed"
        return row | {"outcome": outcome, "why": _short(error), "trace": traceback.format_exc()}
    try:
        row["equivalence"] = "/".join(dict.fromkeys(o.equivalence for o in step.outputs))
        row["delay"] = str(step.delay)
        row["stride"] = str(step.stride)
        found = [step.verify(*clip)]
        frames = _longer(entry, step)
        if frames:
            row["verified_frames"] = frames
            found.append(step.verify(*entry.inputs(frames)))
        row["difference"] = max(v.difference for v in found)
        row["compared"] = sum(v.compared for v in found)
        exact = all(v.exact for v in found)
        cost = step.report()
        saved = cost.macs_per_clip / cost.macs_per_step if cost.macs_per_step else 1.0
        row |= {"streamed": round(cost.streamed, 4), "saved": round(saved, 1), "state_bytes": cost.state_bytes}
        row |= {"outcome": "exact" if exact else "WRONG", "why": "; ".join(cost.recomputed)[:300]}
    except Exception as error:
        row |= {"outcome": "failed", "why": _short(error), "trace": traceback.format_exc()}
    return row


def measure_backend(entry: Entry, backend: str) -> dict[str, Any]:
    """A row of a backend: its steps beside eager ones, and how long they take."""
    row: dict[str, Any] = {"model": entry.name}
    torch.manual_seed(0)
    try:
        model = entry.build().eval()
        clip = entry.inputs()
        plain = cofx.compile(model, clip, time_dim=entry.time_dim)
    except Exception as error:
        return row | {"outcome": "unavailable", "why": _short(error)}
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            step = cofx.compile(model, clip, time_dim=entry.time_dim, backend=backend)
        if any("steps run eagerly" in str(w.message) for w in told):
            return row | {"outcome": "eager"}
        spec, period = plain.compiled.spec, plain.compiled.plan.schedule.period
        first = plain.compiled.steady_from
        frames = first + max(BESIDE, 2 * period)
        if frames > MOST:
            return row | {"outcome": "long", "why": f"{frames} frames"}
        clips = entry.inputs(frames)
        worst, largest, taken = 0.0, 0.0, {"plain": 0.0, "backend": 0.0}
        with torch.no_grad():
            for t in range(frames):
                frame = spec.frame(spec.part(clips, t, 1))
                found = []
                for name, one in (("plain", plain), ("backend", step)):
                    began = time.process_time()
                    found.append(tree_leaves(one.forward_step(*frame)))
                    taken[name] += time.process_time() - began if t > first else 0.0
                for a, b in zip(*found, strict=True):
                    if isinstance(a, torch.Tensor) and a.numel():
                        worst = max(worst, (a.double() - b.double()).abs().max().item())
                        largest = max(largest, a.double().abs().max().item())
        row |= {
            "difference": worst,
            "largest": largest,
            "faster": round(taken["plain"] / max(taken["backend"], 1e-9), 2),
        }
        return row | {"outcome": "exact" if worst <= CLOSE * max(1.0, largest) else "WRONG"}
    except cofx.CompileError as error:
        return row | {"outcome": "no form", "why": _short(error)}
    except Exception as error:
        return row | {"outcome": "failed", "why": _short(error), "trace": traceback.format_exc()}


def _longer(entry: Entry, step: cofx.StepModule) -> int | None:
    """Frames of the second stream to verify, or None where the model itself takes no other length."""
    words = {o.equivalence for o in step.outputs}
    if "first-clip" in words:
        return None
    if "clip" in words:
        return entry.clip_length + EXTRA * int(step.stride)
    frames = entry.length or 2 * entry.clip_length
    with torch.no_grad():
        try:
            step.model(*entry.inputs(frames))
        except Exception:
            return None
    return frames


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    at = [line.strip() for line in lines if line.strip().startswith("at ")]
    text = " | ".join([*lines[: 4 if isinstance(error, cofx.CaptureError) else 1], *at[:1]])
    return f"{type(error).__name__}: {text}"[:400]


def run(entry: Entry, limit: float, backend: str | None) -> dict[str, Any]:
    """`measure`, or `measure_backend`, in a process of its own."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def child() -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        warnings.simplefilter("ignore")
        send.send(measure(entry) if backend is None else measure_backend(entry, backend))
        send.close()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    send.close()
    row = {"model": entry.name, "outcome": "hung", "why": f"took more than {limit:.0f} s"}
    if receive.poll(limit):
        try:
            row = receive.recv()
        except EOFError:
            row |= {"outcome": "crashed", "why": "the process died"}
    process.kill()
    process.join()
    return row


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    streamed = f"{row['streamed']:.0%}" if "streamed" in row else ""
    cells = (row["outcome"], row.get("equivalence", ""), streamed, row.get("saved", ""), row.get("delay", ""),
             row.get("state_bytes", ""), row.get("compile_s", ""))  # fmt: skip
    widths = (11, 10, 5, 6, 6, 9, 5)
    head = " ".join(f"{c!s:<{w}}" for c, w in zip(cells, widths, strict=True))
    return f"{row['model']:<42} {head} {row.get('why', '')[:150]}"


def main() -> None:
    """Run the models that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only models whose names hold one of these")
    parser.add_argument("--packages", help="a folder with the public packages")
    parser.add_argument("--limit", type=float, default=180, help="seconds for each model")
    parser.add_argument("--resume", action="store_true", help="only models of which the results have no row")
    parser.add_argument("--backend", help="the steps of a backend beside eager ones; prints, and keeps no results")
    parser.add_argument("--every", type=int, default=1, help="one model of so many")
    parser.add_argument("--here", action="store_true", help="in this process, and with the traceback")
    arguments = parser.parse_args()
    if arguments.packages:
        sys.path.append(arguments.packages)
    torch.set_num_threads(1)
    prepare_imports()
    _ = cofx.compile  # what it imports is imported here, not in each model's process
    words = arguments.words
    entries = [e for e in ENTRIES.values() if not words or any(w.lower() in e.name.lower() for w in words)]
    entries = entries[:: arguments.every]
    known = kept_rows() if arguments.resume else {}
    rows = []
    for entry in (e for e in entries if e.name not in known):
        import_package(entry)
        if arguments.backend is not None:
            rows.append(run(entry, arguments.limit, arguments.backend))
            print(json.dumps(rows[-1]), flush=True)
            continue
        row = (measure(entry) if arguments.here else run(entry, arguments.limit, None)) | {"built": build()}
        for folder in (arguments.packages, Path(torch.__file__).parent.parent):  # (sources are told from there)
            for told in (str(folder).rstrip("/"), os.path.relpath(folder)) if folder else ():
                row["why"] = row.get("why", "").replace(f"{told}/", "")
        rows.append(row)
        print(line(row), flush=True)
        if arguments.here and "trace" in row:
            print(row["trace"])
        keep(row)
    print(dict(Counter(r["outcome"] for r in rows)))


def build() -> str:
    """The commit that is run and its date, with a ``+`` if files were changed since."""
    git = ["git", "-C", str(Path(__file__).parent)]
    found = subprocess.run([*git, "log", "-1", "--format=%h %cs"], capture_output=True, text=True, check=False).stdout
    dirty = ("diff", "--quiet", "HEAD", "--", "../cofx", "../passes", "../runtime")
    changed = subprocess.run([*git, *dirty], check=False)
    return found.strip() + "+" * (changed.returncode != 0)


def import_package(entry: Entry) -> None:
    """Import a model's package here, so that the processes of its models need not each do so."""
    package = entry.name.split("/")[0]
    for name in (package, *ALSO.get(package, ())):
        try:
            importlib.import_module(name)
        except Exception:
            return


ALSO = {"transformers": ("transformers.modeling_utils",), "tsai": ("tsai.models.all",)}


def kept_rows() -> dict[str, dict[str, Any]]:
    """The rows of the results so far, by model."""
    return {r["model"]: r for r in json.loads(RESULTS.read_text())} if RESULTS.exists() else {}


def keep(row: dict[str, Any]) -> None:
    """Put a row into the results, in the place of an older one."""
    rows = kept_rows()
    rows[row["model"]] = {k: v for k, v in row.items() if k != "trace"}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps([rows[n] for n in ENTRIES if n in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
