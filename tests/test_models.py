"""The collection by itself: every net runs offline, at the example's length and at the test's."""

import pytest
import torch
from torch.utils import _pytree as pytree

from models import SAMPLES


def test_names_are_unique():
    assert len({sample.name for sample in SAMPLES}) == len(SAMPLES) >= 80


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
@torch.no_grad()
def test_runs_offline(sample):
    model = sample.model()
    windows = any(kind == "clip" for kind in sample.kinds(1))
    for steps in (sample.clip_length, sample.clip_length if windows else sample.length):
        outputs = pytree.tree_leaves(model(*sample.inputs(steps)))
        for output, time_dim in zip(outputs, sample.output_time_dims(len(outputs)), strict=True):
            assert output.isfinite().all()
            assert time_dim is None or output.shape[time_dim] > 0
            assert output.dtype in (sample.dtype, torch.int64)
    assert sample.length != sample.clip_length
