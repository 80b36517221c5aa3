"""A run of a model on tensors that have shapes and no numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from .capture import TRACING, quiet
from .changes import version
from .leave_as_found import as_for_inference
from .symbolic_recurrence import symbolic_recurrence


@contextlib.contextmanager
def on_fake_tensors(model: nn.Module) -> Iterator[None]:
    """Tensors that are made in here compute nothing, also when the model runs on them. What it writes to its buffers,
    which are real, is taken back."""
    before = [(b, version(b), b.detach().clone()) for b in model.buffers()]
    try:
        with _fake(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, count, content in before:
                if version(buffer) != count:
                    buffer.copy_(content)


@contextlib.contextmanager
def _fake(model: nn.Module) -> Iterator[None]:
    with (
        TRACING,
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
        as_for_inference(model),
        quiet(),
        symbolic_recurrence(),
        enable_python_dispatcher(),  # which asks for the kernels that symbolic_recurrence sets
    ):
        yield
