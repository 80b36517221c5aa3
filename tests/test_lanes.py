"""Lanes: streams that begin, pause and end each by itself, in one batch."""

import warnings

import pytest
import torch

import cofx
from lane_streams import Batch, step_call
from models import SAMPLES

BATCHED = [s for s in SAMPLES if s.options.get("batch_dim", 0) is not None]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("sample", BATCHED, ids=lambda sample: sample.name)
def test_each_lane_is_its_stream_run_alone(sample) -> None:
    batch = Batch(sample, lanes=4, seed=0)
    step = cofx.compile(
        sample.model(), tuple(sample.inputs(sample.clip_length, seed=9)), time_dim=sample.time_dim, **sample.options
    )
    batch.run(step_call(step, sample, batch.period), calls=40)
    assert batch.compared > 10
