"""What a compiled model costs: multiply-adds per step and per clip, the share that is streamed, bytes of state."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .compiled import Compiled
from .output_info import OutputInfo
from .passes.errors import user_frame
from .passes.leave_as_found import as_for_inference
from .passes.registry import InClip
from .report_page import page, section
from .runtime.state import StreamState
from .runtime.state_file import replace_file
from .stages import Stage, bytes_of, stages_of


@dataclass(frozen=True)
class Report:
    """The cost of a step model at batch size 1 (or the traced one, where the batch cannot be another).

    Attributes:
        macs_per_step: multiply-adds per tick in mid-stream, averaged over a period.
        macs_per_clip: multiply-adds of the offline model on one clip of the traced length.
        clip_frames: that length in ticks.
        streamed: the share of the offline multiply-adds in ops that run once per frame (1 if there are none).
        state_bytes: bytes kept between steps.
        recomputed: for each op that ended a stream, why and where.
        approximated: for each op that does otherwise than in the model, as the user allowed, what it does and where.
        outputs: delay, receptive field, stride, padding and equivalence of each output.
        stages: the model, submodule by submodule.
        name: of the model's class.
    """

    macs_per_step: float
    macs_per_clip: int
    clip_frames: int
    streamed: float
    state_bytes: int
    recomputed: tuple[str, ...]
    approximated: tuple[str, ...] = ()
    outputs: tuple[OutputInfo, ...] = ()
    stages: tuple[Stage, ...] = ()
    name: str = "model"

    def __str__(self) -> str:
        saved = self.macs_per_clip / self.macs_per_step if self.macs_per_step else 1.0
        lines = [
            f"multiply-adds per step   {self.macs_per_step:,.0f}",
            f"multiply-adds per clip   {self.macs_per_clip:,} ({self.clip_frames} frames; {saved:.1f} times a step)",
            f"share streamed           {self.streamed:.1%}",
            f"state                    {self.state_bytes:,} bytes",
        ]
        lines += [f"recomputed               {r}" for r in self.recomputed]
        lines += [f"approximated             {a}" for a in self.approximated]
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as one page of HTML: delays, work and state, module by module. No half-written file is left."""
        replace_file(path, page(self, self.name).encode())

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        return section(self, self.name)


def report(compiled: Compiled) -> Report:
    """Count the work of a compiled model with torch's flop counter, on random frames."""
    plan = compiled.plan
    ticks = plan.facts.streams.ticks[0]
    batch = 1 if compiled.open_batch else compiled.batch
    period, settled = plan.schedule.period, plan.schedule.settled
    warm = max([settled, *(first for first, _ in compiled.clips)])
    warm += -warm % period
    while compiled.idle(warm + 1):
        warm += period
    with torch.no_grad(), as_for_inference(compiled.model):
        clip = compiled.spec.zeros(compiled.spec.blank(batch, _untimed(compiled, batch)), ticks)
        state = StreamState()
        for _ in range(warm):
            _, state = compiled.advance(state, compiled.spec.part(clip, 0, 1), 1, None, frames=False)
        _period(compiled, clip, state, period)  # programs are generated here, and with them constants computed
        step = _macs(lambda: _period(compiled, clip, state, period))
        nodes = _macs_by_node(compiled, clip)
    specs = compiled.specs_after(max(state.count, ticks))
    total = sum(nodes.values())
    repeated = {n for op in plan.schedule.graph.ops if op.clip is not None for n in op.clip.nodes}
    ended = [
        n for n, f in plan.facts.of.items() if isinstance(f, InClip) and n in repeated and _first(n, plan.facts.of)
    ]
    bounded = [op for op in plan.schedule.graph.ops if op.approximate and op.node is not None]
    approximated = [f"attention reads a bounded context: {user_frame(op.node)}" for op in bounded if op.node]
    branch = (f"what is computed depends on the clip's length: {plan.branch}",) if plan.branch else ()
    return Report(
        macs_per_step=step / period,
        macs_per_clip=total,
        clip_frames=ticks,
        streamed=1.0 if total == 0 else 1 - sum(nodes.get(n, 0) for n in repeated) / total,
        state_bytes=sum(bytes_of(s, batch) for s in specs),
        recomputed=tuple(f"{plan.facts.of[n].reason}: {user_frame(n)}" for n in ended) + branch,
        approximated=(*plan.replaced, *approximated),
        outputs=tuple(OutputInfo.of(plan, leaf) for leaf in plan.outputs),
        stages=stages_of(plan, nodes, repeated, specs, batch),
        name=type(compiled.model).__name__,
    )


def _untimed(compiled: Compiled, batch: int) -> list[torch.Tensor]:
    spec, out = compiled.spec, []
    for shape, dtype, t, b in zip(spec.shapes, spec.dtypes, spec.times, spec.batches, strict=True):
        if t is None:
            size = [batch if i == b else n for i, n in enumerate(shape)]
            out.append(torch.zeros(size, dtype=dtype, device=spec.device))
    return out


def _first(node: fx.Node, facts: dict[fx.Node, Any]) -> bool:
    """Whether a node is where a stream ends, and not behind another that does."""
    return not any(isinstance(facts[n], InClip) for n in node.all_input_nodes)


def _period(compiled: Compiled, clip: list[torch.Tensor], state: StreamState, period: int) -> None:
    frames = compiled.spec.part(clip, 0, 1)
    for _ in range(period):
        _, state = compiled.advance(state, frames, 1, None, frames=False)


def _fused_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _fused_lstm(frames: Any, of_input: Any, of_state: Any, *_: Any, **__: Any) -> int:
    """One layer in one direction on (time, batch, features), by its two matrices."""
    return 2 * int(frames[0] * frames[1] * (prod(of_input) + prod(of_state)))


# what a CPU runs fused and torch's own table of ops lacks
ALSO_COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention,
    torch.ops.aten.mkldnn_rnn_layer: _fused_lstm,
}


def counter() -> FlopCounterMode:
    """Torch's flop counter, which also knows the attention and the LSTM that are fused on the CPU."""
    return FlopCounterMode(display=False, custom_mapping=ALSO_COUNTED)


def _macs(run: Callable[[], Any]) -> int:
    with counter() as counted:
        run()
    return int(counted.get_total_flops()) // 2


def _macs_by_node(compiled: Compiled, clip: list[torch.Tensor]) -> dict[fx.Node, int]:
    """Multiply-adds of every traced node on one clip."""
    found: dict[fx.Node, int] = {}
    tensors = compiled.plan.constants.tensors
    batch = compiled.plan.facts.streams.batch[0]
    axes = compiled.spec.batches
    wide = [
        x if b is None or not compiled.open_batch else x.repeat_interleave(batch, b)
        for x, b in zip(clip, axes, strict=True)
    ]

    class Count(fx.Interpreter):
        def fetch_attr(self, target: str) -> Any:
            return tensors[target]

        def run_node(self, n: fx.Node) -> Any:
            with counter() as counted:
                result = super().run_node(n)
            found[n] = int(counted.get_total_flops()) // 2 // (batch if compiled.open_batch else 1)
            return result

    Count(torch.nn.Module(), graph=compiled.plan.graph).run(*wide)
    return found


def tell_ptflops(kind: type[torch.nn.Module]) -> None:
    """Let ptflops, if there is one, count step models: what it sees by itself is only what modules of torch.nn do."""
    try:
        from ptflops.pytorch_ops import MODULES_MAPPING
    except ImportError:
        return
    MODULES_MAPPING[kind] = _count


def _count(step: Any, inputs: Any, output: Any) -> None:
    """A hook of ptflops: of a step, what the report says; offline, what its modules have counted."""
    mode = step.call_mode
    if mode == "forward":
        step.__flops__ = sum(int(getattr(m, "__flops__", 0)) for m in step.modules() if m is not step)
        return
    spec = step.compiled.spec
    i, t = next((i, t) for i, t in enumerate(spec.times) if t is not None)
    frames = 1 if mode == "forward_step" else inputs[i].shape[t] // spec.frames[i]
    batch = spec.batches[i]
    lanes = 1 if batch is None else inputs[i].shape[batch - (mode == "forward_step" and t < batch)]
    step.__flops__ += round(step.report().macs_per_step * frames * lanes)
