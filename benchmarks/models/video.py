"""Loaders of pytorchvideo's models, as published: X3D, Slow, I3D, R(2+1)D, CSN."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from torch import nn

# name -> builder, frames, picture size
VIDEO: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "X3D-S": ("x3d.create_x3d", {"input_clip_length": 13, "input_crop_size": 160}, 13, 160),
    "X3D-M": ("x3d.create_x3d", {"input_clip_length": 16, "input_crop_size": 224}, 16, 224),
    "X3D-L": (
        "x3d.create_x3d",
        {"input_clip_length": 16, "input_crop_size": 312, "depth_factor": 5.0},
        16,
        312,
    ),
    "Slow-R50": ("resnet.create_resnet", {"head_pool_kernel_size": (8, 7, 7)}, 8, 224),
    "I3D-R50": (
        "resnet.create_resnet",
        {
            "stem_conv_kernel_size": (5, 7, 7),
            "stage1_pool": nn.MaxPool3d,
            "stage1_pool_kernel_size": (2, 1, 1),
            "stage_conv_a_kernel_size": (
                (3, 1, 1),
                [(3, 1, 1), (1, 1, 1)],
                [(3, 1, 1), (1, 1, 1)],
                [(1, 1, 1), (3, 1, 1)],
            ),
            "head_pool_kernel_size": (4, 7, 7),
        },
        8,
        224,
    ),
    "R(2+1)D": ("r2plus1d.create_r2plus1d", {}, 16, 224),
    "CSN-R50": ("csn.create_csn", {}, 32, 224),
}


def video(name: str) -> nn.Module:
    """A model of `VIDEO` with random weights, (batch, 3, frames, height, width) -> (batch, classes)."""
    path, options, _, _ = VIDEO[name]
    module, builder = path.split(".")
    with _torchvision():
        build = getattr(import_module(f"pytorchvideo.models.{module}"), builder)
    model: nn.Module = build(**options)
    return model.eval()


@contextlib.contextmanager
def _torchvision() -> Iterator[None]:
    """Something in its place where it is not installed: pytorchvideo imports it for detection alone."""
    try:
        import_module("torchvision")
    except Exception:
        ops = types.ModuleType("torchvision.ops")
        vars(ops)["RoIAlign"] = nn.Identity
        stubs = {"torchvision": types.ModuleType("torchvision"), "torchvision.ops": ops}
        sys.modules.update(stubs)
        try:
            yield
        finally:
            for stub in stubs:
                del sys.modules[stub]
    else:
        yield
