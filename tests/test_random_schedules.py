"""Random nets under random schedules: chunks, starts, holds, resets, snapshots, flushes, and calls that fail midway.

The same few each time; ``COFX_EXAMPLES=200`` tries that many new nets, each under 20 schedules (compiling costs most),
and shrinks what fails.
"""

import random
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cofx
from cofx.runtime import OnnxStep
from lane_streams import Batch, step_call
from models import Sample
from random_networks import networks
from shaken import Shaken
from streaming import Case, Run
from test_onnx import close
from test_random_networks import SEARCH, budget

seeds = st.integers(0, 2**20)
SCHEDULES = 20 if SEARCH else 1  # of each net


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def compiled(sample: Sample) -> cofx.StepModule:
    return cofx.compile(sample.model(), *sample.inputs(sample.clip_length, seed=9))


def check_schedule(sample: Sample, step: cofx.StepModule, seed: int, folder: Path) -> None:
    """All streams of the batch together: chunks of any size, and a flush wherever the net runs at that length."""
    rng = random.Random(seed)
    case = Case(sample, Shaken(step, rng, folder), step.model)
    clips = sample.inputs(sample.length, seed=seed)
    wanted = [list(y.unbind(2)) for y in case.offline(clips)]
    run = case.run(clips)
    while run.position < run.length:
        stop = min(run.length, run.position + rng.choice((1, 1, 1, 2, 3, 7)))
        if stop == run.position + 1 and rng.random() < 0.7:
            run.forward_step()
        else:
            run.chunk_to(stop)
        if rng.random() < 0.2 and run.position >= sample.clip_length:
            ended = case.offline(sample.chunk(clips, 0, run.position))
            Run(case, clips, run.position).flush().expect([list(y.unbind(2)) for y in ended], run.emitted())
        if rng.random() < 0.03:
            run = case.run(clips)
    run.flush().expect(wanted)


def check_lanes(sample: Sample, step: cofx.StepModule, seed: int, folder: Path, lanes: int) -> None:
    """Every lane by itself."""
    batch = Batch(sample, lanes=lanes, seed=seed, offline=True)
    batch.run(step_call(Shaken(step, batch.rng, folder), sample, batch.period), calls=30)


def check_onnx(sample: Sample, step: cofx.StepModule, seed: int, folder: Path) -> None:
    """Every lane by itself, now in ONNX Runtime, now in PyTorch."""
    batch = Batch(sample, lanes=3, seed=seed, same=close, offline=True)
    shaken = Shaken(OnnxStep(folder / "step.onnx"), batch.rng, folder, other=step)
    batch.run(step_call(shaken, sample, batch.period), calls=40, sizes=(1,))


@settings(budget, max_examples=SEARCH or 6)
@given(networks(), seeds)
def test_random_schedules(tmp_path_factory, sample: Sample, seed: int) -> None:
    step = compiled(sample)
    for i in range(SCHEDULES):
        step.clean_state()
        check_schedule(sample, step, seed + i, tmp_path_factory.getbasetemp())


@settings(budget, max_examples=SEARCH or 4)
@given(networks(), seeds, st.integers(1, 6))
def test_random_lanes(tmp_path_factory, sample: Sample, seed: int, lanes: int) -> None:
    step = compiled(sample)
    for i in range(SCHEDULES):
        step.clean_state()
        check_lanes(sample, step, seed + i, tmp_path_factory.getbasetemp(), lanes)


@settings(budget, max_examples=SEARCH or 2)
@given(networks(most=5), seeds)
def test_random_lanes_in_onnx(tmp_path_factory, sample: Sample, seed: int) -> None:
    step, folder = compiled(sample), tmp_path_factory.getbasetemp()
    step.to_onnx(folder / "step.onnx")
    for i in range(SCHEDULES):
        step.clean_state()
        check_onnx(sample, step, seed + i, folder)
