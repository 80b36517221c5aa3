"""Ops that ONNX has not, or not in every way in which PyTorch has them, written in ops that it has.

Each is a decomposition for `ExportedProgram.run_decompositions`; where a call has a form of its own it returns
`NotImplemented`, and the call stays as it is. Sizes other than the batch are numbers here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._decomp import decomposition_table

from ..canonicalize import listed
from ..symbolic_recurrence import LAYERS
from . import special_functions

aten = torch.ops.aten


def decompositions(graph: fx.Graph, plain: bool = False) -> dict[Any, Callable[..., Any]]:
    """Those that a graph needs; with `plain`, recurrent layers are written as products too."""
    targets = {n.target for n in graph.nodes if n.target not in _WHERE or n.meta["val"].dtype == torch.bool}
    table = TABLE | ({op: decomposition_table[op] for op in LAYERS} if plain else {})
    return {op: f for op, f in table.items() if op in targets}


def _out(size: int, k: int, s: int, p: int, d: int, ceil: bool) -> int:
    """How many windows there are; with `ceil` the last begins inside or in the left padding (torch.nn.MaxPool1d)."""
    reach = size + 2 * p - d * (k - 1) - 1
    windows = (-(-reach // s) if ceil else reach // s) + 1
    return windows - 1 if ceil and (windows - 1) * s >= size + p else windows


def _padded(
    x: torch.Tensor, outs: list[int], k: list[int], s: list[int], p: list[int], d: list[int], fill: float
) -> Any:
    """The input with all that its windows reach, and no more."""
    n = len(k)
    pads: list[int] = []
    for i in reversed(range(n)):
        size = int(x.shape[i - n])
        pads += [p[i], (outs[i] - 1) * s[i] + d[i] * (k[i] - 1) + 1 - p[i] - size]
    return F.pad(x, pads, value=fill)


def _max_pool(n: int) -> Callable[..., Any]:
    pool = getattr(aten, f"max_pool{n}d").default

    def decomposed(
        x: torch.Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil: bool = False
    ) -> Any:
        if not ceil:
            return NotImplemented
        k, d = listed(kernel, n), listed(dilation, n)
        s, p = listed(stride, n) if stride else k, listed(padding, n)
        outs = [_out(int(x.shape[i - n]), k[i], s[i], p[i], d[i], True) for i in range(n)]
        lowest = -math.inf if x.dtype.is_floating_point else torch.iinfo(x.dtype).min
        return pool(_padded(x, outs, k, s, p, d, lowest), k, s, 0, d)

    return decomposed


def _avg_pool(n: int) -> Callable[..., Any]:
    pool = getattr(aten, f"avg_pool{n}d").default

    def decomposed(
        x: torch.Tensor, kernel: Any, stride: Any = (), padding: Any = 0, ceil: bool = False,
        count_pad: bool = True, divisor: int | None = None,
    ) -> Any:  # fmt: skip
        k = listed(kernel, n)
        s, p = listed(stride, n) if stride else k, listed(padding, n)
        if divisor is None and not ceil and (count_pad or not any(p)):
            return NotImplemented
        sizes = [int(x.shape[i - n]) for i in range(n)]
        outs = [_out(sizes[i], k[i], s[i], p[i], 1, ceil) for i in range(n)]
        y = pool(_padded(x, outs, k, s, p, [1] * n, 0.0), k, s)
        if divisor is not None:
            return y * (math.prod(k) / divisor)
        for i in range(n):  # what a window is divided by is a product of what it has in each dimension
            counts = []
            for j in range(outs[i]):
                first = j * s[i] - p[i]
                last = min(first + k[i], sizes[i] + p[i])
                counts.append(last - first if count_pad else min(last, sizes[i]) - max(first, 0))
            if set(counts) != {k[i]}:
                shape = [-1 if j == i else 1 for j in range(n)]
                runs = [(c, len(list(same))) for c, same in itertools.groupby(counts)]
                weights = torch.cat([x.new_full((length,), k[i] / c) for c, length in runs])
                y = y * weights.reshape(shape)
        return y

    return decomposed


def _adaptive(n: int, mean: bool) -> Callable[..., Any]:
    def decomposed(x: torch.Tensor, output: Any) -> Any:
        y = x
        for i, out in enumerate(listed(output, n)):
            dim = x.dim() - n + i
            size = int(x.shape[dim])
            bounds = [(j * size // out, -(-(j + 1) * size // out)) for j in range(out)]
            parts = [y.narrow(dim, a, b - a) for a, b in bounds]
            y = torch.cat([q.mean(dim, True) if mean else q.amax(dim, True) for q in parts], dim)
        return y if mean else (y, torch.zeros_like(y, dtype=torch.int64))

    return decomposed


def _running(join: Callable[..., torch.Tensor], pair: bool) -> Callable[..., Any]:
    """A running product or extremum: ONNX has running sums only."""

    def decomposed(x: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
        x = x if dtype is None else x.to(dtype)
        parts = [x.narrow(dim, 0, 1)]
        for i in range(1, int(x.shape[dim])):
            parts.append(join(parts[-1], x.narrow(dim, i, 1)))
        y = torch.cat(parts, dim)
        return (y, torch.zeros_like(y, dtype=torch.int64)) if pair else y

    return decomposed


def _lstm(x: torch.Tensor, hx: Any, params: Any, *rest: Any) -> Any:
    """A projected LSTM, step by step."""
    if len({int(h.shape[-1]) for h in hx}) == 1:
        return NotImplemented
    return decomposition_table[aten.lstm.input](x, hx, params, *rest)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *rest: Any,
    **more: Any,
) -> Any:
    """The exporter knows attention with a batch and a heads dimension, no more and no fewer."""
    rank = query.dim()
    if rank == 4:
        return NotImplemented

    def four(x: torch.Tensor) -> torch.Tensor:
        if rank > 4:
            return x.expand(*query.shape[:-2], *x.shape[-2:]).flatten(0, rank - 4)
        while x.dim() < 4:
            x = x.unsqueeze(-3)
        return x

    given = (four(query), four(key), four(value), None if mask is None else four(mask))
    y = aten.scaled_dot_product_attention.default(*given, *rest, **more)
    return y.reshape(*query.shape[:-1], value.shape[-1])


def _rrelu(
    x: torch.Tensor, lower: Any = 1 / 8, upper: Any = 1 / 3, training: bool = False, generator: Any = None
) -> Any:
    return NotImplemented if training else F.leaky_relu(x, (lower + upper) / 2)


def _where(condition: torch.Tensor, a: Any, b: Any) -> Any:
    """ONNX Runtime chooses between numbers only."""
    if any(x.dtype != torch.bool if isinstance(x, torch.Tensor) else not isinstance(x, bool) for x in (a, b)):
        return NotImplemented
    a, b = (x if isinstance(x, torch.Tensor) else condition.new_full((), x) for x in (a, b))
    return (condition & a) | (condition.logical_not() & b)


def _hypot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Scaled, so that no square overflows."""
    large, small = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    ratio = torch.where(large > 0, small / torch.where(large > 0, large, 1), 0)
    return large * (1 + ratio * ratio).sqrt()


def _kthvalue(x: torch.Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    """The k-th smallest, by sorting."""
    values, indices = (y.narrow(dim, k - 1, 1) for y in torch.sort(x, dim))
    return (values, indices) if keepdim else (values.squeeze(dim), indices.squeeze(dim))


def _median(x: torch.Tensor, dim: int, keepdim: bool = False) -> Any:
    """The lower of the two in the middle."""
    return _kthvalue(x, (int(x.shape[dim]) + 1) // 2, dim, keepdim)


def _searchsorted(
    ordered: torch.Tensor, x: torch.Tensor, *, out_int32: bool = False, right: bool = False, side: str | None = None,
    sorter: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """How many come before; none does before NaN, which so comes last, as in torch."""
    ordered = ordered if sorter is None else ordered.gather(-1, sorter)
    ordered, x = ordered if ordered.dim() == 1 else ordered.unsqueeze(-2), x.unsqueeze(-1)
    behind = ordered > x if right or side == "right" else ordered >= x
    return behind.logical_not().to(torch.int64).sum(-1).to(torch.int32 if out_int32 else torch.int64)


def _gcd(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclid's, for as long as numbers of so many bits can take (those of Fibonacci take longest)."""
    a, b, bits = a.abs(), b.abs(), torch.iinfo(torch.result_type(a, b)).bits
    for _ in range(math.ceil(bits / math.log2((1 + math.sqrt(5)) / 2))):
        a, b = torch.where(b != 0, b, a), torch.where(b != 0, a % torch.where(b != 0, b, 1), 0)
    return a


_WHERE = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar}


TABLE: dict[Any, Callable[..., Any]] = {
    aten.cumprod.default: _running(torch.mul, False),
    aten.cummax.default: _running(torch.maximum, True),
    aten.cummin.default: _running(torch.minimum, True),
    aten.gcd.default: _gcd,
    aten.hypot.default: _hypot,
    aten.kthvalue.default: _kthvalue,
    aten.lstm.input: _lstm,
    aten.median.dim: _median,
    aten.rrelu.default: _rrelu,
    aten.scaled_dot_product_attention.default: _attention,
    aten.searchsorted.Tensor: _searchsorted,
    **special_functions.TABLE,
}
TABLE.update(dict.fromkeys(_WHERE, _where))
for _n in (1, 2, 3):
    TABLE[getattr(aten, f"max_pool{_n}d").default] = _max_pool(_n)
    TABLE[getattr(aten, f"avg_pool{_n}d").default] = _avg_pool(_n)
    TABLE[getattr(aten, f"adaptive_max_pool{_n}d").default] = _adaptive(_n, False)
for _n, _name in itertools.product((1, 2, 3), ("adaptive_avg_pool{}d", "_adaptive_avg_pool{}d")):
    if hasattr(aten, _name.format(_n)):
        TABLE[getattr(aten, _name.format(_n)).default] = _adaptive(_n, True)
