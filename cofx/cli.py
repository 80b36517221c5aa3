"""The command line: ``cofx inspect | verify | bench | convert | run``.

Exit codes: 0 it went well; 1 a comparison failed; 2 the command, a file or an argument is wrong; 3 the model was
refused.
With ``--json`` standard output holds one JSON object and nothing else.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.utils import _pytree as pytree

from . import __version__, checkpoints
from .passes.errors import CompileError
from .runtime.errors import CofxError, InputError
from .step_module import StepModule, compile

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
out, err = Console(soft_wrap=True, emoji=False), Console(stderr=True, soft_wrap=True, emoji=False)

Model = Annotated[str, typer.Argument(help="package.module:factory, or a .pt2 file")]
Input = Annotated[
    list[str], typer.Option("--input", "-i", help="shape of a clip, such as 1x3x13x160x160; once for each input")
]
TimeDim = Annotated[str, typer.Option(help="time axis; or with commas one for each input (none: no time)")]
Kwargs = Annotated[str | None, typer.Option(help="arguments of the factory, in JSON: '{\"num_classes\": 4}'")]
Checkpoint = Annotated[Path | None, typer.Option(help=".safetensors, or a state dict in .pt, .pth, .ckpt")]
Strict = Annotated[bool, typer.Option("--strict/--no-strict", help="refuse missing and unexpected names")]
Trust = Annotated[bool, typer.Option("--trust-pickle", help="unpickle checkpoints, which may run any code in them")]
Equivalence = Annotated[str | None, typer.Option(help="stream, clip, prefix or first-clip; default the best there is")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]


@dataclass
class Source:
    """A model with an example, as the options name them."""

    model: nn.Module
    example: tuple[torch.Tensor, ...]
    time_dims: tuple[int | None, ...]
    equivalence: str | None

    def compile(self) -> StepModule:
        """The step model; the first-clip warning goes to standard error."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            step = compile(self.model, self.example, time_dim=self.time_dims, equivalence=self.equivalence)
        for message in told:
            if message.category is UserWarning:
                err.print(f"note: {message.message}", style="yellow", markup=False)
        return step


def _source(
    model: str,
    inputs: list[str],
    time_dim: str,
    kwargs: str | None,
    checkpoint: Path | None,
    strict: bool,
    trust_pickle: bool,
    equivalence: str | None,
) -> Source:
    made = checkpoints.load_model(model, checkpoints.parse_kwargs(kwargs))
    if checkpoint is not None:
        state = checkpoints.load_state_dict(checkpoint, trust_pickle)
        fit = checkpoints.apply_checkpoint(made, state, strict)
        for word, names in (("missing", fit.missing), ("unexpected", fit.unexpected)):
            for name in names:
                err.print(f"note: {word} in the checkpoint: {name}", style="yellow", markup=False)
    generator = torch.Generator().manual_seed(0)
    try:
        example = tuple(torch.randn(_shape(text), generator=generator) for text in inputs)
    except RuntimeError as error:
        raise InputError(f"no clip of shape {', '.join(inputs)} can be made: {str(error).splitlines()[0]}") from error
    dims: list[int | None] = []
    for word in time_dim.split(","):
        try:
            dims.append(None if word.strip().lower() == "none" else int(word))
        except ValueError as error:
            raise InputError(f"--time-dim takes numbers or none, not {word!r}") from error
    if len(dims) == 1:
        dims *= len(example)
    return Source(made, example, tuple(dims), equivalence)


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(n) for n in text.lower().split("x"))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise InputError(f"--input takes a shape such as 1x3x13x160x160, not {text!r}")
    return sizes


@contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    """Tell errors and turn them into exit codes."""
    try:
        with torch.no_grad():
            yield
    except CofxError as error:
        kind = "refused" if isinstance(error, CompileError) else "wrong"
        if as_json:
            print(json.dumps({"error": str(error), "kind": kind}))
        else:
            err.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(3 if kind == "refused" else 2) from None
    except (OSError, ImportError) as error:
        err.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from None


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Fraction):
        return int(value) if value.denominator == 1 else float(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _outputs(step: StepModule) -> list[dict[str, Any]]:
    names = ("equivalence", "delay", "receptive_field", "stride", "padding")
    return [{n: _plain(getattr(o, n)) for n in names} for o in step.outputs]


def _states(step: StepModule) -> list[dict[str, Any]]:
    specs = step.compiled.specs
    return [{"name": s.name, "shape": list(s.shape(1)), "dtype": str(s.dtype).removeprefix("torch.")} for s in specs]


def _table(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(*(rows[0] if rows else ()), title=title, title_justify="left")
    for row in rows:
        table.add_row(*("∞" if v is None else str(v) for v in row.values()))
    out.print(table)


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False) -> None:
    """Clip models as step models."""
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command()
def inspect(
    model: Model, input: Input, time_dim: TimeDim = "2", kwargs: Kwargs = None, checkpoint: Checkpoint = None,
    strict: Strict = True, trust_pickle: Trust = False, equivalence: Equivalence = None, as_json: AsJson = False,
    nodes: Annotated[bool, typer.Option("--nodes", help="the fact of every node, too")] = False,
) -> None:  # fmt: skip
    """Tell what becomes of a model: delays, state, what is streamed, what is recomputed or refused and why."""
    with _errors(as_json):
        source = _source(model, input, time_dim, kwargs, checkpoint, strict, trust_pickle, equivalence)
        try:
            step = source.compile()
        except CompileError as error:  # a refusal is what one wants to be told here
            if as_json:
                print(json.dumps({"refused": str(error).splitlines()}))
            else:
                out.print("refused", style="bold")
                out.print(str(error), markup=False)
            return
        report = step.report()
        graph = [
            {"node": n.name, "op": str(n.target), "fact": str(n.meta["cofx"])}
            for n in (step.graph_module.graph.nodes if nodes else ())
            if n.op != "output"
        ]
        found = {
            "outputs": _outputs(step), "clip_length": step.clip_length, "state": _states(step),
            "state_bytes": report.state_bytes, "macs_per_step": report.macs_per_step,
            "macs_per_clip": report.macs_per_clip, "streamed": report.streamed, "recomputed": list(report.recomputed),
            "nodes": graph,
        }  # fmt: skip
        if as_json:
            print(json.dumps(found))
            return
        _table("outputs", _outputs(step))
        _table("state", _states(step))
        if graph:
            _table("nodes", graph)
        out.print(str(report), markup=False, highlight=False)


@app.command()
def verify(
    model: Model, input: Input, time_dim: TimeDim = "2", kwargs: Kwargs = None, checkpoint: Checkpoint = None,
    strict: Strict = True, trust_pickle: Trust = False, equivalence: Equivalence = None, as_json: AsJson = False,
    onnx: Annotated[Path | None, typer.Option(help="compare this file too, made by convert or to_onnx")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="an .npy clip for each input instead of noise")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="frames of noise; default three clips and some")] = None,
) -> None:  # fmt: skip
    """Stream a clip and compare every output with the offline model. Exit code 1 if they differ."""
    with _errors(as_json):
        source = _source(model, input, time_dim, kwargs, checkpoint, strict, trust_pickle, equivalence)
        step = source.compile()
        clips = _given(data) if data else _noise(step, length)
        found = step.verify(*clips)
        result: dict[str, Any] = {
            "exact": found.exact, "difference": _plain(found.difference), "compared": found.compared,
            "equivalences": list(found.equivalences),
        }  # fmt: skip
        if onnx is not None:
            result["onnx"] = _compare_onnx(step, onnx, clips)
        exact = found.exact and (onnx is None or result["onnx"]["exact"])
        if as_json:
            print(json.dumps(result))
        else:
            out.print(f"{'exact' if exact else 'NOT exact'}: {found.compared} frames compared as "
                      f"{', '.join(found.equivalences)}, largest difference {found.difference:.3g}")  # fmt: skip
            if onnx is not None:
                out.print(f"{onnx}: largest difference {result['onnx']['difference']}")
    if not exact:
        raise typer.Exit(1)


def _given(files: list[Path]) -> list[torch.Tensor]:
    import numpy as np

    try:
        return [torch.from_numpy(np.load(f, allow_pickle=False)) for f in files]
    except ValueError as error:
        raise InputError(f"--data takes .npy arrays of numbers: {error}") from error


def _noise(step: StepModule, length: int | None) -> list[torch.Tensor]:
    spec = step.compiled.spec
    traced = step.compiled.plan.facts.streams.ticks[0]
    ticks = length or 3 * traced + step.compiled.plan.schedule.period
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn([1 if i == b else n for i, n in enumerate(size)], generator=generator).to(dtype)
        for size, dtype, b in zip(spec.sizes(ticks), spec.dtypes, spec.batches, strict=True)
    ]


def _compare_onnx(step: StepModule, path: Path, clips: list[torch.Tensor]) -> dict[str, Any]:
    """A file against the PyTorch step, over a whole stream."""
    import numpy as np

    from .runtime import OnnxStep

    runner = OnnxStep(path)
    ticks = step.compiled.spec.ticks(clips)
    whole = ticks - ticks % runner.frames_per_step
    parts = step.compiled.spec.part(clips, 0, whole)
    step.clean_state()
    expected = pytree.tree_leaves(step.forward_steps(*parts, pad_end=True))
    got = pytree.tree_leaves(runner.forward_steps(*(x.numpy() for x in parts), pad_end=True))
    worst = max((float(np.abs(a.numpy() - b).max()) for a, b in zip(expected, got, strict=True)), default=0.0)
    close = all(np.allclose(a.numpy(), b, rtol=1e-4, atol=1e-5) for a, b in zip(expected, got, strict=True))
    return {"exact": close, "difference": worst}


@app.command()
def bench(
    model: Model, input: Input, time_dim: TimeDim = "2", kwargs: Kwargs = None, checkpoint: Checkpoint = None,
    strict: Strict = True, trust_pickle: Trust = False, equivalence: Equivalence = None, as_json: AsJson = False,
    steps: Annotated[int, typer.Option(min=1, help="steps that are timed")] = 50,
    threads: Annotated[int, typer.Option(min=1, help="threads of torch")] = 1,
) -> None:  # fmt: skip
    """Time a step against the offline model on a sliding window of a clip: the median of each."""
    with _errors(as_json):
        torch.set_num_threads(threads)
        source = _source(model, input, time_dim, kwargs, checkpoint, strict, trust_pickle, equivalence)
        step = source.compile()
        clips = _noise(step, step.compiled.plan.facts.streams.ticks[0])
        spec = step.compiled.spec
        period = step.compiled.plan.schedule.period
        chunk = spec.part(clips, 0, period) if spec.ticks(clips) >= period else clips
        warm = step.compiled.plan.schedule.settled + spec.ticks(clips) + period
        for _ in range(-(-warm // period) + 2):
            step.forward_steps(*chunk)
        offline = step.model.eval()
        timed = {
            "step_ms": _median(lambda: step.forward_steps(*chunk), steps, as_json, "steps") / period,
            "window_ms": _median(lambda: offline(*clips), max(3, steps // 5), as_json, "windows"),
        }
        report = step.report()
        timed |= {"window_frames": spec.ticks(clips), "speedup": timed["window_ms"] / timed["step_ms"],
                  "macs_per_step": report.macs_per_step, "macs_per_window": report.macs_per_clip}  # fmt: skip
        if as_json:
            print(json.dumps(timed))
        else:
            _table("", [{k: f"{v:,.4g}" for k, v in timed.items()}])


def _median(run: Callable[[], Any], times: int, quiet: bool, what: str) -> float:
    """Milliseconds of a call."""
    seen = []
    for _ in track(range(times), what, console=err, transient=True, disable=quiet or not err.is_terminal):
        start = time.perf_counter()
        run()
        seen.append(time.perf_counter() - start)
    return 1000 * sorted(seen)[len(seen) // 2]


@app.command()
def convert(
    model: Model, input: Input, output: Annotated[Path, typer.Option("--output", "-o", help="folder to write to")],
    time_dim: TimeDim = "2", kwargs: Kwargs = None, checkpoint: Checkpoint = None, strict: Strict = True,
    trust_pickle: Trust = False, equivalence: Equivalence = None, as_json: AsJson = False,
    frames_per_step: Annotated[int | None, typer.Option(help="frames per call; default the model's period")] = None,
    quantize: Annotated[str | None, typer.Option(help="int8: weights in 8 bits, for one stream")] = None,
) -> None:  # fmt: skip
    """Write step.onnx, step.pt2, step.json and a README, and verify them. Nothing is left behind if that fails."""
    from .convert import convert as write

    with _errors(as_json):
        source = _source(model, input, time_dim, kwargs, checkpoint, strict, trust_pickle, equivalence)
        step = source.compile()
        clips = _noise(step, None)
        result = write(step, output, clips, frames_per_step, quantize, lambda path: _compare_onnx(step, path, clips))
        if as_json:
            print(json.dumps(result))
        else:
            _table("outputs", _outputs(step))
            out.print(f"{output}: {', '.join(result['files'])}", markup=False)
            out.print(f"largest difference to the offline model {result['difference']:.3g}, "
                      f"of step.onnx to the step {result['onnx']['difference']:.3g}")  # fmt: skip


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="step.onnx, made by convert")],
    input: Annotated[list[Path], typer.Option("--input", "-i", help="recording: .npy, .wav or .mp4; one per input")],
    output: Annotated[Path, typer.Option("--output", "-o", help="where to write: .npy or .csv")] = Path("output.npy"),
    as_json: AsJson = False,
) -> None:
    """Stream a recording through a step graph, and write the (first) output."""
    from . import convert as conversion

    with _errors(as_json):
        steps = conversion.Streaming(file, input)
        for at in track(steps, file.name, console=err, transient=True, disable=as_json or not err.is_terminal):
            steps.advance(at)
        written = steps.write(output)
        if as_json:
            print(json.dumps(written))
        else:
            out.print(f"{output}: {written['frames']} frames of shape {tuple(written['shape'])}", markup=False)


def entry() -> None:
    """What the command ``cofx`` runs."""
    sys.exit(app())


if __name__ == "__main__":
    entry()
