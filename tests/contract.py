"""The one equivalence check that every test uses.

`check_contract` compares a step model with the plain module it was compiled from. What each equivalence promises
(docs/design.md) is written once, in `expected_frames`: the frames that a whole stream gives, output by output, its
flush included. Each check is another way to walk through the stream, and has to meet the same frames.
"""

import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from models.sample import Sample
from reach import Reach, measure_reach
from streaming import Case, ContractError, Run, difference, require, same, spoil

Frames = list[Tensor]

# What each equivalence promises


def expected_frames(case: Case, clips: Sequence[Tensor]) -> list[Frames]:
    """Per output, all frames that the stream gives up to the flush after the last of these."""
    return [PROMISES[kind](case, clips, i) for i, kind in enumerate(case.kinds)]


def stream_frames(case: Case, clips: Sequence[Tensor], i: int) -> Frames:
    """The frames of ``f(whole stream)``."""
    return list(case.offline(clips)[i].unbind(case.time_dims[i]))  # type: ignore[arg-type]


def clip_frames(case: Case, clips: Sequence[Tensor], i: int) -> Frames:
    """``f(last T frames)`` at every step once there are T."""
    sample, stride = case.sample, case.step.outputs[i].stride
    require(stride in (1, sample.stride), f"output {i}: stride {stride}, expected {sample.stride}")
    stops = range(sample.clip_length, sample.steps(clips) + 1, int(stride))
    return [newest(case, sample.chunk(clips, stop - sample.clip_length, stop), i) for stop in stops]


def prefix_frames(case: Case, clips: Sequence[Tensor], i: int) -> Frames:
    """``f(all frames so far)`` at every step from the declared delay on, and no later than at a full clip."""
    sample, first = case.sample, int(case.step.outputs[i].delay)
    require(first < sample.clip_length, f"output {i}: delay {first}, expected less than {sample.clip_length}")
    return [newest(case, sample.chunk(clips, 0, stop), i) for stop in range(first + 1, sample.steps(clips) + 1)]


def first_clip_frames(case: Case, clips: Sequence[Tensor], i: int) -> Frames:
    """``f(clip)`` after T frames; then the net's head over as many of the stream's features as a clip has."""
    sample, dim = case.sample, case.sample.stack_dim
    if sample.steps(clips) == sample.clip_length:
        return [newest(case, clips, i)]
    if not isinstance(getattr(case.model, "features", None), nn.Module):  # not defined by the net: be consistent
        return [frame for _, frame in case.run(clips).finish().frames[i]]
    length = case.model.features(*sample.inputs(sample.clip_length)).shape[dim]
    windows = case.model.features(*clips).unfold(dim, length, 1).movedim(dim, 0).movedim(-1, dim + 1)
    return [pytree.tree_leaves(case.model.head(window))[i] for window in windows]


def newest(case: Case, clips: Sequence[Tensor], i: int) -> Tensor:
    """Output i for these clips; its newest frame where it keeps the time axis."""
    output, dim = case.offline(clips)[i], case.time_dims[i]
    return output if dim is None else output.select(dim, -1)


PROMISES: dict[str, Callable[[Case, Sequence[Tensor], int], Frames]] = {
    "stream": stream_frames, "clip": clip_frames, "prefix": prefix_frames, "first-clip": first_clip_frames
}  # fmt: skip


# The checks


def middle(case: Case) -> int:
    """A step at which the stream may be flushed, with some outputs before it: the net runs at that length."""
    sample = case.sample
    least = sample.clip_length if sample.clip_length < sample.length - 2 else 0
    return sample.whole(max(sample.length // 2 + 1, least))


def check_offline(case: Case) -> None:
    """``step(clip)`` is ``model(clip)``, at the example's length and, where the net takes it, at another."""
    lengths = [case.sample.clip_length] + [case.sample.length] * (len(case.streams) == len(case.kinds))
    for clips in map(case.sample.inputs, lengths):
        got, spec = pytree.tree_flatten(case.step(*clips))
        require(spec == case.example[1], f"structure {spec}, expected {case.example[1]}")
        for i, (a, b) in enumerate(zip(got, case.offline(clips), strict=True)):
            require(same(a, b), f"clip of {case.sample.steps(clips)}: output {i} {difference(a, b)}")


def check_steps(case: Case) -> None:
    """Frame by frame, then the flush; a long stream and one of exactly a clip."""
    for clips in map(case.sample.inputs, (case.sample.length, case.sample.clip_length)):
        wanted = expected_frames(case, clips)
        case.run(clips).finish().expect(wanted)


def check_chunks(case: Case) -> None:
    """Random chunks mixed with single steps; the whole stream as one chunk."""
    length, rng = case.sample.length, random.Random(case.sample.name)
    clips = case.sample.inputs(length)
    wanted = expected_frames(case, clips)
    for sizes in ((1,), (1, 1, 2, 3), (1, 4, 7, case.sample.clip_length)):
        run = case.run(clips)
        while run.position < length:
            stop = min(run.position + rng.choice(sizes), length)
            if stop == run.position + 1 < length and rng.random() < 0.5:
                run.forward_step()
            else:
                run.chunk_to(stop, pad_end=stop == length)
        run.expect(wanted)
    case.run(clips).chunk_to(length, pad_end=True).expect(wanted)
    case.run(clips).chunk_to(length).flush().expect(wanted)


def check_flush(case: Case) -> None:
    """``flush()`` gives what ``pad_end`` gives, twice alike, and the stream goes on as if it had not been asked."""
    half, clips = middle(case), case.sample.inputs(case.sample.length)
    wanted, wanted_half = expected_frames(case, clips), expected_frames(case, case.sample.chunk(clips, 0, half))
    emitted = case.run(clips).steps_to(half).emitted()
    for _ in range(2):
        case.run(clips, half, clean=False).flush().expect(wanted_half, emitted)
    case.run(clips, half, clean=False).finish().expect(wanted, emitted)
    case.run(clips).chunk_to(half, pad_end=True).expect(wanted_half)
    case.run(clips, half, clean=False).steps_to(case.sample.length).flush().expect(wanted, emitted)


def check_purity(case: Case) -> None:
    """``update_state=False`` (a step, a chunk, a chunk that ends) shows what would come, and leaves no trace."""
    sample, half = case.sample, middle(case)
    stop = sample.whole(min(half + 4, sample.length))
    clips, other = sample.inputs(sample.length), sample.inputs(sample.length, seed=5)
    wanted, ended = expected_frames(case, clips), expected_frames(case, sample.chunk(clips, 0, stop))
    calm = case.run(clips).steps_to(sample.length)

    def peek(at: int, source: Sequence[Tensor]) -> tuple[Run, Run]:
        step = case.run(source, at, clean=False).forward_step(update_state=False)
        chunk = case.run(source, at, clean=False).chunk_to(min(at + 4, sample.length), update_state=False)
        return step, chunk

    run = case.run(clips)
    for at in range(sample.length):
        if at < 3 or at == half:
            peek(at, other)
            case.step(*sample.inputs(sample.clip_length))
            for seen in peek(at, clips):
                due = calm.emitted_after(seen.position)
                seen.expect([frames[:n] for frames, n in zip(wanted, due, strict=True)], run.emitted())
        if at == half:
            for source in (other, clips):
                end = case.run(source, at, clean=False).chunk_to(stop, update_state=False, pad_end=True)
            end.expect(ended, run.emitted())
        run.forward_step()
    run.flush().expect(wanted)


def check_clean(case: Case) -> None:
    """``clean_state()`` starts again, in the middle of a stream and twice in a row."""
    clips, other = (case.sample.inputs(case.sample.length, seed=seed) for seed in (0, 5))
    wanted = expected_frames(case, clips)
    case.run(other).steps_to(case.sample.length // 2 + 1)
    case.step.clean_state()
    case.run(clips).finish().expect(wanted)


def check_snapshot(case: Case) -> None:
    """``get_state`` and ``set_state`` copy: neither later steps nor the caller's own writes reach the other side."""
    half, clips = case.sample.length // 2, case.sample.inputs(case.sample.length)
    wanted = expected_frames(case, clips)
    run = case.run(clips).steps_to(half)
    emitted, state = run.emitted(), case.step.get_state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    run.finish().expect(wanted)
    for clean in (False, True):
        mine = {name: tensor.clone() for name, tensor in state.items()}
        if clean:
            case.step.clean_state()
        case.step.set_state(mine)
        for tensor in mine.values():
            spoil(tensor)
        case.run(clips, half, clean=False).finish().expect(wanted, emitted)
        changed = [n for n, t in state.items() if not torch.equal(t.nan_to_num(), kept[n].nan_to_num())]
        require(not changed, f"the snapshot of step {half} changed afterwards: {changed}")


def check_poison(case: Case) -> None:
    """A state full of NaN at the start, after a stream of NaN, does not show."""
    clips, dirty = (case.sample.inputs(case.sample.length, seed=seed) for seed in (0, 5))
    wanted = expected_frames(case, clips)
    for clip in dirty:
        spoil(clip)
    case.run(dirty).steps_to(case.sample.length // 2)
    state = case.step.get_state()
    if "count" in state:
        state["count"].zero_()  # as it is before the first frame, but for what it holds
    else:
        case.step.clean_state()
        state = case.step.get_state()
    for tensor in state.values():
        if tensor.is_floating_point():
            spoil(tensor)
    case.step.set_state(state)
    case.run(clips, clean=False).finish().expect(wanted)


def check_batch(case: Case) -> None:
    """Other batch sizes, and the first one again."""
    for batch in () if case.sample.batch_dim is None else (case.sample.batch + 2, 1, case.sample.batch):
        clips = case.sample.inputs(case.sample.length, batch=batch)
        wanted = expected_frames(case, clips)
        case.run(clips).finish().expect(wanted)
        case.run(clips).chunk_to(case.sample.length).flush().expect(wanted)


def check_aliasing(case: Case) -> None:
    """Outputs are not overwritten by later steps; frames are neither modified nor kept."""
    clips = case.sample.inputs(case.sample.length)
    wanted, run = expected_frames(case, clips), case.run(clips)
    returned: list[tuple[Tensor, Tensor]] = []
    for at in range(case.sample.length):
        frames = [frame.clone() for frame in case.sample.frames(clips, at)]
        run.collect(case.step.forward_step(*frames), f"forward_step of frame {at}")
        require(all(map(torch.equal, frames, case.sample.frames(clips, at))), f"step {at} modified its input")
        for frame in frames:  # the caller uses the buffer again, as a camera does
            spoil(frame)
        returned += [(output, output.clone()) for output in run.returned[len(returned) :]]
    run.flush().expect(wanted)
    require(all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in returned), "an output changed after its step")
    require(all(not output.isnan().any() for output, _ in returned), "an output is a view of the caller's frame")


def check_attributes(case: Case) -> None:
    """Delay, stride and padding are declared as they are measured."""
    step, run = case.step, case.run(case.sample.inputs(case.sample.length)).steps_to(case.sample.length)
    for i, (kind, declared) in enumerate(zip(case.kinds, step.outputs, strict=True)):
        first = next((t for t, counts in enumerate(run.counts) if counts[i]), None)
        require(declared.delay == first, f"output {i}: delay {declared.delay}, but the first output is at step {first}")
        if kind == "stream":
            rate = steady_rate(case, i)
            require(declared.stride * rate == 1, f"output {i}: stride {declared.stride}, but {rate} frames per step")
        if not math.isinf(declared.receptive_field):
            padding = declared.receptive_field - 1 - declared.delay
            require(declared.padding == padding, f"output {i}: padding {declared.padding}, expected {padding}")
    for name in ("equivalence", "delay", "stride", "receptive_field"):
        ours, first = getattr(step, name), getattr(step.outputs[0], name)
        require(ours == first, f"step.{name} is {ours}, but {first} for the first output")


def steady_rate(case: Case, i: int, span: int = 120) -> Fraction:
    """Frames of output i per step, between two clips that differ by a span many periods divide."""
    lengths = (case.sample.length, case.sample.length + span)
    short, long = (case.offline(case.sample.inputs(n))[i].shape[case.time_dims[i]] for n in lengths)
    return Fraction(long - short, span)


def measured(case: Case) -> list[tuple[int, Reach]]:
    """Each streamed output with its reach, measured once per case."""
    if case.reaches is None:
        case.reaches = measure_reach(case, case.sample.whole(case.sample.length + 20))
    return list(zip(case.streams, case.reaches, strict=True))


def check_latency(case: Case) -> None:
    """No output comes later than the step at which it is fixed and certain to exist (or the sample's lag after it)."""
    length, lag = case.sample.length, case.sample.lag
    run = case.run(case.sample.inputs(length)).steps_to(length)
    for i, reach in measured(case):
        came = [t for t, counts in enumerate(run.counts) for _ in range(counts[i])]
        for j, due in enumerate(due for due in reach.due(steady_rate(case, i)) if due + lag < length):
            require(j < len(came), f"output {i}, frame {j} waits for the flush; it was due at step {due}")
            require(came[j] <= due + lag, f"output {i}, frame {j} comes at step {came[j]}; it was due at step {due}")


def check_receptive_field(case: Case) -> None:
    """No output depends on more steps than declared; where the sample is exact, some output on all of them."""
    for i, reach in measured(case):
        declared, span = case.step.outputs[i].receptive_field, reach.span()
        require(math.isinf(declared) == case.sample.is_unbounded(i), f"output {i}: receptive field {declared}")
        exact = case.sample.exact and not math.isinf(declared)
        fits = declared == span if exact else declared >= span
        require(fits, f"output {i}: receptive field {declared}, but {span} measured")


CHECKS: dict[str, Callable[[Case], None]] = {
    check.__name__.removeprefix("check_"): check
    for check in (check_offline, check_steps, check_chunks, check_flush, check_purity, check_clean, check_snapshot,
                  check_poison, check_batch, check_aliasing, check_attributes, check_latency, check_receptive_field)
}  # fmt: skip


def run_check(case: Case, name: str) -> None:
    """One check, whose failure names the model and the check."""
    try:
        with torch.no_grad():
            CHECKS[name](case)
    except ContractError as error:
        raise ContractError(f"{case.sample.name}, {name}: {error}") from None
    except Exception as error:
        error.add_note(f"{case.sample.name}, {name}")
        raise


def compile_case(sample: Sample, model: nn.Module | None = None, step: Any = None, **options: Any) -> Case:
    """The sample's net and its step model: the one given, or else compiled from the sample's example."""
    model = model or sample.model()
    if step is None:
        import cofx

        example = sample.inputs(sample.clip_length, seed=9)
        step = cofx.compile(model, example[0] if len(example) == 1 else tuple(example), time_dim=sample.time_dim,
                            **sample.options, **options)  # fmt: skip
    return Case(sample, step, model)


def check_contract(
    subject: Sample | nn.Module,
    inputs: Tensor | Sequence[Tensor] = (),
    *,
    step: Any = None,
    checks: Sequence[str] = tuple(CHECKS),
    **fields: Any,
) -> None:
    """Compiles a sample, or a module with an example, and checks the step model against it.

    Args:
        subject: a sample; or a module in eval mode, with ``inputs`` and further fields of a `Sample`.
        inputs: the example clip, one tensor per input of the module.
        step: the step model, by default ``cofx.compile`` of the subject.
        checks: names from `CHECKS`.

    Raises:
        ContractError: with the model, the check and the step.
    """
    if isinstance(subject, Sample):
        case = compile_case(subject, step=step)
    else:
        clips = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        fields = {"name": type(subject).__name__, "dtype": clips[0].dtype} | fields
        sample = Sample(build=lambda: subject, shapes=[tuple(clip.shape) for clip in clips], **fields)
        case = compile_case(sample, model=subject, step=step)
    for name in checks:
        run_check(case, name)
