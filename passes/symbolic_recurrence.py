"""Keep recurrent layers and cells one op each while tracing, the layers with the time size open.

The stock python kernels of ``aten.lstm.input`` and its kin loop over time, which fixes T and makes tracing cost
O(T); those of a cell are a dozen ops, for each frame of a loop. While tracing they are replaced by ones that only tell
the shapes; the traced program runs the real kernels. So is max_pool1d, whose own kernel takes sizes for numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C import DispatchKey

aten = torch.ops.aten

LAYERS = aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input


def _lstm(x: torch.Tensor, hx: list[torch.Tensor], params: Any, biases: bool, layers: int, dropout: float,
          train: bool, bidirectional: bool, batch_first: bool) -> tuple[torch.Tensor, ...]:  # fmt: skip
    width = hx[0].shape[-1] * (2 if bidirectional else 1)  # hx[0] knows proj_size
    return _over_time(x, width, batch_first), hx[0].new_empty(hx[0].shape), hx[1].new_empty(hx[1].shape)


def _rnn(x: torch.Tensor, hx: torch.Tensor, params: Any, biases: bool, layers: int, dropout: float,
         train: bool, bidirectional: bool, batch_first: bool) -> tuple[torch.Tensor, ...]:  # fmt: skip
    width = hx.shape[-1] * (2 if bidirectional else 1)
    return _over_time(x, width, batch_first), hx.new_empty(hx.shape)


def _over_time(x: torch.Tensor, width: int, batch_first: bool) -> torch.Tensor:
    """What a layer yields for every frame: in memory time comes first, as the real kernels have it."""
    if not batch_first:
        return x.new_empty((*x.shape[:-1], width))
    return x.new_empty((x.shape[1], x.shape[0], width)).transpose(0, 1)


def _lstm_cell(x: torch.Tensor, hx: list[torch.Tensor], *params: Any) -> tuple[torch.Tensor, ...]:
    return hx[0].new_empty(hx[0].shape), hx[1].new_empty(hx[1].shape)


def _cell(x: torch.Tensor, hx: torch.Tensor, *params: Any) -> torch.Tensor:
    return hx.new_empty(hx.shape)


def _max_pool1d(x: torch.Tensor, kernel_size: Any, stride: Any = (), padding: Any = (0,), dilation: Any = (1,),
                ceil_mode: bool = False) -> torch.Tensor:  # fmt: skip
    wide = [[a, *b] if b else [] for a, b in zip((1, 1, 0, 1), (kernel_size, stride, padding, dilation), strict=True)]
    pooled: torch.Tensor = aten.max_pool2d_with_indices.default(x.unsqueeze(-2), *wide, ceil_mode)[0]
    return x.new_empty(pooled.squeeze(-2).shape)


SHAPE_KERNELS: dict[Any, Callable[..., Any]] = {
    aten.lstm.input: _lstm,
    aten.gru.input: _rnn,
    aten.rnn_tanh.input: _rnn,
    aten.rnn_relu.input: _rnn,
    aten.lstm_cell.default: _lstm_cell,
    aten.gru_cell.default: _cell,
    aten.rnn_tanh_cell.default: _cell,
    aten.rnn_relu_cell.default: _cell,
    aten.max_pool1d.default: _max_pool1d,
}


@contextlib.contextmanager
def symbolic_recurrence() -> Iterator[None]:
    """While this is open, tracing sees only the shapes of recurrent layers and cells."""
    saved = {op: dict(op.py_kernels) for op in SHAPE_KERNELS}
    for op, kernel in SHAPE_KERNELS.items():
        op.py_kernels[DispatchKey.CompositeImplicitAutograd] = kernel
        op._dispatch_cache.clear()
    try:
        yield
    finally:
        for op, kernels in saved.items():
            op.py_kernels.clear()
            op.py_kernels.update(kernels)
            op._dispatch_cache.clear()
