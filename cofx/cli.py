"""The command line: ``cofx inspect | verify | bench | convert | run``.

Exit codes: 0 it went well; 1 a comparison failed; 2 the command, a file or an argument is wrong; 3 the model was
refused; 4 something else failed (the traceback is on standard error); 130 interrupted.

With ``--json`` standard output holds one JSON object and nothing else: the result, or ``error`` and ``kind`` ("wrong",
"refused", "failed").
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from . import __version__, checkpoints
from .passes.errors import CompileError
from .runtime.errors import CofxError, InputError
from .step_module import StepModule, compile

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
out, err = Console(soft_wrap=True, emoji=False), Console(stderr=True, soft_wrap=True, emoji=False)

Model = Annotated[str, typer.Argument(help="package.module:factory, or a .pt2 file: either is a program, which is run")]
Input = Annotated[
    list[str],
    typer.Option("--input", "-i", help="shape of a clip, such as 1x3x13x160x160, or 1x50:int64; once for each input"),
]
TimeDim = Annotated[str, typer.Option(help="time axis; or with commas one for each input (none: no time)")]
Kwargs = Annotated[str | None, typer.Option(help="arguments of the factory, in JSON: '{\"num_classes\": 4}'")]
Checkpoint = Annotated[Path | None, typer.Option(help=".safetensors, or a state dict in .pt, .pth, .ckpt")]
Strict = Annotated[bool, typer.Option("--strict/--no-strict", help="refuse missing and unexpected names")]
Trust = Annotated[bool, typer.Option("--trust-pickle", help="unpickle files, which may run any code in them")]
Equivalence = Annotated[str | None, typer.Option(help="stream, clip, prefix or first-clip; default the best there is")]
NonlocalOps = Annotated[
    str, typer.Option(help='recompute, continual or refuse what looks over clips; or JSON, \'{"*.se": "continual"}\'')
]
Context = Annotated[int | None, typer.Option(min=1, help="the most frames that attention reads, if nothing bounds it")]
ClipLength = Annotated[int | None, typer.Option(min=1, help="frames of a clip; default those of the input")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]


@dataclass
class Source:
    """A model with an example, as the options name them."""

    model: nn.Module
    example: tuple[torch.Tensor, ...]
    time_dims: tuple[int | None, ...]
    options: Mapping[str, Any]
    as_json: bool

    def compile(self) -> StepModule:
        """The step model; the first-clip warning goes to standard error."""
        with _busy("compiling", self.as_json), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            step = compile(self.model, self.example, time_dim=self.time_dims, **self.options)
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
    options: Mapping[str, Any],
    as_json: bool,
) -> Source:
    made = checkpoints.load_model(model, checkpoints.parse_kwargs(kwargs), trust_pickle)
    if checkpoint is not None:
        state = checkpoints.load_state_dict(checkpoint, trust_pickle)
        fit = checkpoints.apply_checkpoint(made, state, strict)
        for word, names in (("missing", fit.missing), ("unexpected", fit.unexpected)):
            for name in names:
                err.print(f"note: {word} in the checkpoint: {name}", style="yellow", markup=False)
    generator = torch.Generator().manual_seed(0)
    try:
        example = tuple(_random(*_shape(text), generator) for text in inputs)
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
    return Source(made, example, tuple(dims), options, as_json)


def _options(
    equivalence: str | None, nonlocal_ops: str, context: int | None, clip_length: int | None
) -> dict[str, Any]:
    """Arguments of `cofx.compile`."""
    chosen: Any = nonlocal_ops
    if nonlocal_ops.lstrip().startswith("{"):
        try:
            chosen = json.loads(nonlocal_ops)
        except ValueError as error:
            raise InputError(f"--nonlocal-ops is no JSON: {error}") from error
    return {"equivalence": equivalence, "nonlocal_ops": chosen, "context": context, "clip_length": clip_length}


def _shape(text: str) -> tuple[tuple[int, ...], torch.dtype]:
    """A shape, and a dtype after a colon."""
    shape, colon, name = text.lower().partition(":")
    dtype = getattr(torch, name, None) if colon else torch.float32
    try:
        sizes = tuple(int(n) for n in shape.split("x"))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise InputError(f"--input takes a shape such as 1x3x13x160x160, not {text!r}")
    if not isinstance(dtype, torch.dtype) or dtype.is_complex:
        raise InputError(f"--input takes a dtype such as float32, float64, int64 or bool after the colon, not {text!r}")
    return sizes, dtype


def _random(sizes: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Noise; whole numbers are 0 or 1, which most tables have."""
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(dtype)
    return torch.randint(0, 2, sizes, generator=generator).to(dtype)


@contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    """Tell errors and turn them into exit codes."""
    try:
        with torch.no_grad():
            yield
        return
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        err.print("interrupted", style="red")
        raise typer.Exit(130) from None
    except ImportError as error:
        kind, told = "wrong", f"{error} (pip install 'cofx[onnx]' brings what files take)"
    except (CofxError, OSError) as error:
        kind, told = "refused" if isinstance(error, CompileError) else "wrong", str(error)
    except Exception as error:
        err.print(traceback.format_exc(), markup=False, highlight=False)
        kind, told = "failed", f"{type(error).__name__}: {error}"
    if as_json:
        print(json.dumps({"error": told, "kind": kind}))
    else:
        err.print(f"error: {told}", style="red", markup=False, highlight=False)
    raise typer.Exit({"refused": 3, "wrong": 2, "failed": 4}[kind])


@contextmanager
def _busy(what: str, as_json: bool) -> Iterator[Callable[[str], None]]:
    """Shows on a terminal what is being done; the function that it gives tells of something else."""
    if as_json or not err.is_terminal:
        yield lambda what: None
        return
    with err.status(what) as status:
        yield status.update


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
    strict: Strict = True, trust_pickle: Trust = False, equivalence: Equivalence = None,
    nonlocal_ops: NonlocalOps = "recompute", context: Context = None, clip_length: ClipLength = None,
    as_json: AsJson = False,
    nodes: Annotated[bool, typer.Option("--nodes", help="the fact of every node, too")] = False,
    html: Annotated[Path | None, typer.Option(help="write it as a page of HTML, module by module")] = None,
) -> None:  # fmt: skip
    """Tell what becomes of a model: delays, state, what is streamed, what is recomputed or refused and why."""
    with _errors(as_json):
        options = _options(equivalence, nonlocal_ops, context, clip_length)
        source = _source(model, input, time_dim, kwargs, checkpoint, strict, trust_pickle, options, as_json)
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
        if html is not None:
            report.save(html)
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
    strict: Strict = True, trust_pickle: Trust = False, equivalence: Equivalence = None,
    nonlocal_ops: NonlocalOps = "recompute", context: Context = None, clip_length: ClipLength = None,
    as_json: AsJson = False,
    onnx: Annotated[Path | None, typer.Option(help="compare this file too, made by convert or to_onnx")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="an .npy clip for each input instead of noise")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="frames of noise; default three clips and some")] = None,
) -> None:  # fmt: skip
    """Stream a clip and compare every output with the offline model. Exit code 1 if they differ."""
    with _errors(as_json):
        options = _options(equivalence, nonlocal_ops, context, clip_length)
        source = _source(model, input, time_dim, kwargs, checkpoint, strict, trust_pickle, options, as_json)
        step = source.compile()
        with _busy("streaming", as_json) as tell:
            clips = _given(data) if data else _noise(step, length)
            found = step.verify(*clips)
            if onnx is not None:
                from .convert import compare_onnx

                tell(f"streaming through {onnx}")
                compared = compare_onnx(step, onnx, clips)
        result: dict[str, Any] = {
            "exact": found.exact, "difference": _plain(found.difference), "compared": found.compared,
            "equivalences": list(found.equivalences),
        }  # fmt: skip
        if onnx is not None:
            result["onnx"] = compared | {"difference": _plain(compared["difference"])}
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
    from .recordings import read

    for file in files:
        if file.suffix != ".npy":
            raise InputError(f"--data takes .npy arrays, not {file}")
    return [torch.from_numpy(read(file)) for file in files]


def _noise(step: StepModule, length: int | None) -> list[torch.Tensor]:
    spec = step.compiled.spec
    traced = step.compiled.plan.facts.streams.ticks[0]
    ticks = length or 3 * traced + step.compiled.plan.schedule.period
    generator = torch.Generator().manual_seed(1)
    return [
        _random([1 if i == b else n for i, n in enumerate(size)], dtype, generator)
        for size, dtype, b in zip(spec.sizes(ticks), spec.dtypes, spec.batches, strict=True)
    ]


@app.command()
def bench(
    model: Model, input: Input, time_dim: TimeDim = "2", kwargs: Kwargs = None, checkpoint: Checkpoint = None,
    strict: Strict = True, trust_pickle: Trust = False, equivalence: Equivalence = None,
    nonlocal_ops: NonlocalOps = "recompute", context: Context = None, clip_length: ClipLength = None,
    as_json: AsJson = False,
    steps: Annotated[int, typer.Option(min=1, help="steps that are timed")] = 50,
    threads: Annotated[int, typer.Option(min=1, help="threads of torch")] = 1,
) -> None:  # fmt: skip
    """Time a step against the offline model on a sliding window of a clip: the median of each."""
    with _errors(as_json):
        torch.set_num_threads(threads)
        options = _options(equivalence, nonlocal_ops, context, clip_length)
        source = _source(model, input, time_dim, kwargs, checkpoint, strict, trust_pickle, options, as_json)
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
            for name, value in timed.items():
                told = f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
                out.print(f"{name.replace('_', ' '):<16} {told:>18}", highlight=False)


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
    trust_pickle: Trust = False, equivalence: Equivalence = None,
    nonlocal_ops: NonlocalOps = "recompute", context: Context = None, clip_length: ClipLength = None,
    as_json: AsJson = False,
    frames_per_step: Annotated[int | None, typer.Option(help="frames per call; default the model's period")] = None,
    longest: Annotated[
        int | None, typer.Option(min=1, help="frames of the longest stream, if all of it is kept; default 4 clips")
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="int8: weights in 8 bits, for one stream")] = None,
    controls: Annotated[bool, typer.Option(help="start, ready and length of each lane in step.onnx")] = True,
    dynamic_batch: Annotated[bool, typer.Option(help="step.onnx takes any number of lanes; else one")] = True,
    opset: Annotated[int | None, typer.Option(min=18, help="version of ONNX's operators; default 18")] = None,
) -> None:  # fmt: skip
    """Write step.onnx, step.pt2, step.json and a README, and verify them. Nothing is left behind if that fails."""
    with _errors(as_json):
        from .convert import Form
        from .convert import convert as write

        options = _options(equivalence, nonlocal_ops, context, clip_length)
        source = _source(model, input, time_dim, kwargs, checkpoint, strict, trust_pickle, options, as_json)
        step = source.compile()
        with _busy("converting", as_json) as tell:
            form = Form(frames_per_step, longest, quantize, controls, dynamic_batch, opset)
            result = write(step, output, _noise(step, None), form, tell)
        if as_json:
            print(json.dumps(result))
        else:
            _table("outputs", _outputs(step))
            out.print(f"{output}: {', '.join(result['files'])}", markup=False)
            out.print(f"largest difference to the offline model {result['difference']:.3g}, "
                      f"to the step of step.onnx {result['onnx']['difference']:.3g}, "
                      f"of step.pt2 {result['program']['difference']:.3g}")  # fmt: skip


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="step.onnx, made by convert")],
    input: Annotated[
        list[Path], typer.Option("--input", "-i", help="recording: .npy, .wav (.flac, .ogg) or .mp4; one per input")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="where to write: .npy or .csv (the first output), .npz (all)")
    ] = Path("output.npy"),
    as_json: AsJson = False,
) -> None:
    """Stream a recording through a step graph, and write what comes out."""
    with _errors(as_json):
        from .recordings import Streaming

        steps = Streaming(file, input, output)
        for at in track(steps, file.name, console=err, transient=True, disable=as_json or not err.is_terminal):
            steps.advance(at)
        written = steps.write()
        if as_json:
            print(json.dumps(written))
        else:
            for name, shape in written["outputs"].items() if output.suffix == ".npz" else [("", written["shape"])]:
                out.print(f"{output}: {name}{' ' if name else ''}of shape {tuple(shape)}", markup=False)


def entry() -> None:
    """What the command ``cofx`` runs. A SIGTERM ends it as a ^C does: what was begun is cleared away."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(app())
