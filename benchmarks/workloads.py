"""The workloads of `benchmarks/run.py`: clip models in plain PyTorch, and the same nets in continual-inference."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from models.video import VIDEO, video
from torch import nn

from models import DSCNN, STGCN, TCN


@dataclass
class Workload:
    """One net.

    Attributes:
        name: of the table's row.
        model: takes a clip.
        clip: the shape of an example, batch first.
        time_dim: where it has time.
        options: of `cofx.compile`.
        continual: the same net, with the same weights, in continual-inference; None if it cannot say it.
        same: whether that net computes the same function (else it is timed, not compared).
    """

    name: str
    model: nn.Module
    clip: tuple[int, ...]
    time_dim: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    continual: Callable[[], nn.Module] | None = None
    same: bool = True


def conv_stack(width: int = 64, layers: int = 8, kernel: int = 3) -> nn.Module:
    """Convolutions over time with a ReLU each."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Conv1d(width, width, kernel), nn.ReLU()]
    return nn.Sequential(*parts)


class Encoder(nn.Module):
    """An encoder over a window, of which the last frame's output is used."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, width) -> (batch, width)"""
        return self.encoder(x)[:, -1]


def workloads(small: bool, batch: int) -> dict[str, Callable[[], Workload]]:
    """W1 to W5; `small` shrinks pictures, windows and widths, for a quick look."""
    side = {"X3D-S": 64 if small else 160, "Slow-R50": 64 if small else 224}

    def x3d() -> Workload:
        return Workload(
            "W1 X3D-S",
            _video("X3D-S", side["X3D-S"]),
            (batch, 3, 13, side["X3D-S"], side["X3D-S"]),
            options={"nonlocal_ops": "continual"},
            continual=lambda: continual_video(_video("X3D-S", side["X3D-S"])),
            same=False,
        )

    def slow() -> Workload:
        model = _video("Slow-R50", side["Slow-R50"])
        clip = (batch, 3, 8, side["Slow-R50"], side["Slow-R50"])
        return Workload("W2 Slow-R50", model, clip, continual=lambda: continual_video(model))

    def skeleton() -> Workload:
        model = STGCN()
        clip = (2 * batch, 3, 100 if small else 300, 25)
        # continual-inference gives another result for a strided residual: timed, not compared
        return Workload("W3 ST-GCN", model, clip, continual=lambda: continual_stgcn(model), same=False)

    def stack() -> Workload:
        model = conv_stack()
        return Workload(
            "W4 TCN k3", model, (batch, 64, 17), continual=lambda: _continual().convert.continual(deepcopy(model))
        )

    def dilated() -> Workload:
        return Workload("W4 TCN dilated", TCN(64, 64, 64, 4, 2), (batch, 64, 64))

    def keywords() -> Workload:
        return Workload("W4 DS-CNN", DSCNN(), (batch, 1, 49, 10))

    def encoder() -> Workload:
        width, window = (256, 16) if small else (1024, 64)
        model = Encoder(width, 8, 2)
        return Workload(
            "W5 encoder",
            model,
            (batch, window, width),
            time_dim=1,
            continual=lambda: continual_encoder(model, width, window),
            same=False,
        )

    return {
        "x3d": x3d, "slow": slow, "stgcn": skeleton, "tcn": stack, "dilated": dilated, "dscnn": keywords,
        "encoder": encoder,
    }  # fmt: skip


def _video(name: str, side: int) -> nn.Module:
    """A model of pytorchvideo for pictures of another size than the published one."""
    _, options, frames, _ = VIDEO[name]
    given = dict(options)
    if name == "X3D-S":
        given["input_crop_size"] = side
    else:
        given["head_pool_kernel_size"] = (frames, side // 32, side // 32)
    torch.manual_seed(0)
    path = VIDEO[name][0]
    VIDEO["resized"] = (path, given, frames, side)
    return video("resized")


# -- the same nets in continual-inference ------------------------------------------------------------------------------


def _continual() -> Any:
    import continual

    return continual


def converted(model: nn.Module) -> nn.Module:
    """A chain of layers that continual-inference converts by itself."""
    net: nn.Module = _continual().convert.continual(deepcopy(model))
    return net


def continual_video(model: Any) -> nn.Module:
    """Slow-R50 or X3D of pytorchvideo. X3D's squeeze-and-excitation looks on the frame alone, which is cheaper."""
    co = _continual()

    def stage(blocks: Any) -> Any:
        return co.Sequential(*(block(b) for b in blocks))

    def several(*modules: nn.Module | None) -> Any:
        flat: list[Any] = []
        for m in modules:
            if isinstance(m, nn.Sequential):
                flat += [x for x in m if not isinstance(x, nn.Identity)]
            elif m is not None and not isinstance(m, nn.Identity):
                flat.append(m)
        return co.Sequential(*(part(m) for m in flat))

    def part(m: nn.Module) -> Any:
        if type(m).__name__ == "SqueezeExcitation":
            return co.Lambda(_Excite(m), takes_time=True)
        if type(m).__name__ == "Conv2plus1d":
            return several(m.conv_t, m.norm, m.activation, m.conv_xy)
        if type(m).__name__ == "Swish":
            return co.Lambda(torch.nn.functional.silu, takes_time=True)
        return co.convert.continual(m)

    def block(b: Any) -> Any:
        m = b.branch2
        inner = several(m.conv_a, m.norm_a, m.act_a, m.conv_b, m.norm_b, m.act_b, m.conv_c, m.norm_c)
        if b.branch1_conv is None:
            joined = co.Residual(inner)
        else:
            joined = co.BroadcastReduce(several(b.branch1_conv, b.branch1_norm), inner)
        return co.Sequential(joined, part(b.activation))

    model = deepcopy(model)
    stem, *stages, head = model.blocks
    pool = head.pool
    last: list[Any] = []
    if hasattr(pool, "pre_conv"):
        last += [several(pool.pre_conv, pool.pre_norm, pool.pre_act)]
        last += [co.AvgPool3d(tuple(pool.pool.kernel_size), stride=1), several(pool.post_conv, pool.post_act)]
    else:
        last += [co.AvgPool3d(tuple(pool.kernel_size), stride=1)]
    last += [co.Lambda(lambda x: head.proj(x.movedim(1, -1)).movedim(-1, 1), takes_time=True)]
    return co.Sequential(
        several(stem.conv, stem.norm, stem.activation, stem.pool), *(stage(s.res_blocks) for s in stages), *last
    )


class _Excite(nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.block = module.block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.block(x.mean((3, 4), keepdim=True))


def continual_stgcn(model: Any) -> nn.Module:
    """CoST-GCN: the mean over the joints of each frame, then over the frames of a clip."""
    co = _continual()
    model = deepcopy(model)

    def block(b: Any) -> Any:
        relu, conv, norm = b.time
        inner = co.Sequential(co.Lambda(b.joints, takes_time=True), relu, co.Conv2d.build_from(conv), norm)
        if not b.residual:
            return co.Sequential(inner, nn.ReLU())
        if isinstance(b.past, nn.Identity):
            return co.Sequential(co.Residual(inner), nn.ReLU())
        over = co.Sequential(co.Conv2d.build_from(b.past[0]), b.past[1])
        return co.Sequential(co.BroadcastReduce(over, inner), nn.ReLU())

    def begin(x: torch.Tensor) -> torch.Tensor:
        y = model.norm(x.permute(0, 3, 1, 2).flatten(1, 2)).unflatten(1, (25, 3))
        return y.permute(0, 2, 3, 1)

    def end(x: torch.Tensor) -> torch.Tensor:
        return model.head(x.mean(3).movedim(1, -1)).movedim(-1, 1)

    return co.Sequential(
        co.Lambda(begin, takes_time=True), *(block(b) for b in model.blocks), co.AvgPool2d((75, 1), stride=1),
        co.Lambda(end, takes_time=True),
    )  # fmt: skip


def continual_encoder(model: Any, width: int, window: int) -> nn.Module:
    """co.TransformerEncoder: all outputs of the first layers are updated, one of the last is made."""
    co = _continual()
    factory = co.TransformerEncoderLayerFactory(width, 8, 2 * width, dropout=0.0, sequence_len=window)
    return co.TransformerEncoder(factory, len(model.encoder.layers))
