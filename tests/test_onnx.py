"""The ONNX step graph, run by ONNX Runtime without torch, against the PyTorch step model."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import cofx
from cofx.runtime.onnx_step import OnnxStep
from lane_streams import Batch, Leaves
from models import batched
from streaming import TOLERANCES

BATCHED = batched(40)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def close(a: Tensor, b: Tensor) -> bool:
    """Within 1e-5 of the tensor's own scale (the half types: their own tolerance)."""
    tolerance = 1e-5 if b.dtype in (torch.float32, torch.float64) else TOLERANCES.get(b.dtype, (0.0, 0.0))[0]
    scale = max([1.0, *b[b.isfinite()].double().abs().flatten().tolist()])
    same_form = a.shape == b.shape and a.dtype == b.dtype
    return same_form and torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance * scale)


def onnx_call(step: OnnxStep, sample):
    """Lane calls of a file: its own number of frames at a time, by frames where that is one."""
    count = 0

    def call(chunks: list[Tensor], start: list[bool], ready: list[bool], length: list[int]) -> tuple[Leaves, Leaves]:
        nonlocal count
        count += 1
        lanes = {"start": start, "ready": np.array(ready), "length": np.array(length)}
        if step.frames_per_step == 1 and count % 2:
            y, valid = step.forward_step(*(x.numpy() for x in sample.frames(chunks, 0)), **lanes)
        else:
            y, valid = step.forward_steps(*(x.numpy() for x in chunks), **lanes)
        return [[torch.from_numpy(a) for a in pytree.tree_leaves(t)] for t in (y, valid)]

    return call


@pytest.mark.parametrize("sample", BATCHED)
def test_collection(sample, tmp_path) -> None:
    """Random lanes; then all lanes together, frame by frame and as one chunk with an end."""
    try:
        batch = Batch(sample, lanes=3, seed=2, same=close)  # compiled with a batch of one
        batch.alone.to_onnx(tmp_path / "step.onnx")
        step = OnnxStep(tmp_path / "step.onnx")
        for _ in range(4):
            batch.run(onnx_call(step, sample), calls=30, sizes=(1,))
            if batch.compared > 10:
                break
        assert batch.compared > 10
        together(step, batch.alone, sample)
    except (cofx.CompileError, RuntimeError, cofx.InputError) as error:
        # types in which ONNX, or its runtime, does not have every op: said, not silently wrong
        missing = re.search("unsupported type|NOT_IMPLEMENTED|does not support double", str(error))
        assert sample.dtype in (torch.bfloat16, torch.float64) and missing, error


def together(step: OnnxStep, twin: cofx.StepModule, sample) -> None:
    """Without lane arguments the surface is that of the PyTorch step model."""
    clips = sample.inputs(sample.length, batch=2)
    arrays = [x.numpy() for x in clips]
    step.clean_state(), twin.clean_state()
    mine, theirs = step.forward_steps(*arrays, pad_end=True), twin.forward_steps(*clips, pad_end=True)
    match(mine, theirs)
    step.clean_state(), twin.clean_state()
    if step.frames_per_step == 1 and not twin.compiled.early:  # frames before the first wait in a file
        for t in range(sample.length):
            frames = sample.frames(clips, t)
            match(step.forward_step(*(f.numpy() for f in frames)), twin.forward_step(*frames))
        match(step.flush(), twin.flush())


def match(mine, theirs) -> None:
    """Two results, arrays and tensors, in one structure."""
    a, spec_a = pytree.tree_flatten(mine)
    b, spec_b = pytree.tree_flatten(theirs)
    assert spec_a == spec_b
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        assert y is None or close(torch.from_numpy(x), y)
