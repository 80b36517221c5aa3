"""Int8 weights for the ONNX step graph, by onnxruntime's own tool."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils import _pytree as pytree

KINDS = ("int8",)


def quantize_int8(source: Path, target: Path, clips: Sequence[Any]) -> dict[str, float]:
    """Write a step graph with int8 weights in its convolutions and products; state stays float.

    Activations are quantised by what each call has, over its whole batch: the file is for one stream. Of the weights'
    eight bits seven are used: processors without VNNI add two products of 8 bits in 16, which would saturate there.

    Args:
        source: a file of `export_onnx`, for a batch of one.
        target: of the new file.
        clips: arrays to stream through both, for the error.

    Returns:
        the largest difference of an output to that of the source, and the largest output.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from .runtime.onnx_step import OnnxStep

    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        quantize_dynamic(os.fspath(source), os.fspath(target), weight_type=QuantType.QInt8, reduce_range=True)
    finally:
        logging.disable(disabled)
    outputs = []
    for path in (source, target):
        step = OnnxStep(path)
        if step.meta["controls"]:
            out = step.forward_steps(*clips, pad_end=True)
        else:
            out = step.forward_steps(*step.whole_calls(clips))
        outputs.append([x for x in pytree.tree_leaves(out) if x is not None and x.dtype.kind == "f"])
    pairs = list(zip(*outputs, strict=True))
    found = {
        "difference": max((float(np.abs(a - b).max()) for a, b in pairs), default=0.0),
        "largest": max((float(np.abs(a).max()) for a, _ in pairs), default=0.0),
    }
    model = onnx.load(target)
    entry = next(p for p in model.metadata_props if p.key == "cofx")
    entry.value = json.dumps({**json.loads(entry.value), "quantized": {"kind": "int8", **found}})
    onnx.save(model, target)
    return found
