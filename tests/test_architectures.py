"""Published architectures, as `benchmarks/flops.py` has them at full size: here at one that runs in seconds.

Each meets the contract or, where ops inside of it look on the frames so far, equals the reference module; and a step
costs a clip's share, as the report counts it.
"""

import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import cofx
from contract import compile_case, run_check
from models import Sample

PACKAGE = Path(__file__).parent.parent / "benchmarks" / "models" / "__init__.py"


def load() -> Any:
    """`benchmarks/models`, under another name than the collection of nets here."""
    if "architectures" not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            "architectures", PACKAGE, submodule_search_locations=[str(PACKAGE.parent)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules["architectures"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["architectures"]


published = load()
SHALLOW = [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2)]  # half of the skeleton networks' blocks


def pooled(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], **fields: Any) -> Sample:
    return Sample(name, build, shape, kind="first-clip", output_time_dim=None, **fields)


# (net, at least this many times less per step than per clip)
EXACT: list[tuple[Sample, float]] = [
    (pooled("ST-GCN", lambda: published.STGCN(5, 8, SHALLOW), (1, 3, 32, 25), stride=4), 31),
    (pooled("S-TR", lambda: published.STR(5, 32, SHALLOW), (1, 3, 32, 25), stride=4), 31),
    (pooled("DS-CNN", lambda: published.DSCNN(5, 8, 2), (1, 1, 48, 10), stride=2), 47),
    (Sample("OadTR-1", lambda: published.OadTR(8, 5, 16, 1, 2, 16), (1, 16, 8), 1, "clip", output_time_dim=None), 3),
    (Sample("OadTR-2", lambda: published.OadTR(8, 5, 16, 2, 2, 16), (1, 16, 8), 1, "clip", output_time_dim=None), 1.5),
    (Sample("TCN", lambda: published.TCN(3, 4, 8, 4, 3), (1, 3, 40)), 40),
    (Sample("WaveNet", lambda: published.WaveNet(8, 8, 8, 2, 4), (1, 8, 40)), 40),
    (Sample("SEANet encoder", lambda: published.SEANetEncoder(4, 8, (2, 4)), (1, 1, 64), multiple=8, unbounded=True,
            exact=False), 64),
    (Sample("SEANet decoder", lambda: published.SEANetDecoder(4, 8, (4, 2)), (1, 8, 12), unbounded=True, exact=False),
     12),
    (Sample("Conv-TasNet", lambda: published.ConvTasNet(2, 16, 8, 8, 16, 3, 2), (1, 1, 64), unbounded=True, multiple=8,
            exact=False), 50),
]  # fmt: skip
TRAILING = {"A-GCN": (lambda: published.AGCN(5, 8, SHALLOW[1:3]), (1, 3, 16, 25), 15)}
VIDEO = {
    "X3D": ("x3d.create_x3d", {"input_clip_length": 4, "input_crop_size": 64, "model_num_class": 5, "depth_factor": 1.0,
                               "head_pool_act": None}, (1, 3, 4, 64, 64), 3.5, "continual"),
    "Slow": ("resnet.create_resnet", {"model_num_class": 5, "model_depth": 50, "stem_dim_out": 8, "stage1_pool": None,
                                      "head_pool_kernel_size": (8, 1, 1)}, (1, 3, 8, 32, 32), 7.9, "recompute"),
    "I3D": ("resnet.create_resnet", {"model_num_class": 5, "stem_dim_out": 8, "stem_conv_kernel_size": (5, 7, 7),
                                     "stage1_pool": nn.MaxPool3d, "stage1_pool_kernel_size": (2, 1, 1),
                                     "head_pool_kernel_size": (4, 1, 1)}, (1, 3, 8, 32, 32), 7.9, "recompute"),
    "R(2+1)D": ("r2plus1d.create_r2plus1d", {"model_num_class": 5, "stem_dim_out": 8,
                                             "head_pool_kernel_size": (1, 2, 2)},
                (1, 3, 16, 32, 32), 15.9, "recompute"),
    "CSN": ("csn.create_csn", {"model_num_class": 5, "stem_dim_out": 8, "head_pool_kernel_size": (1, 1, 1)},
            (1, 3, 16, 32, 32), 15.9, "recompute"),
}  # fmt: skip


LONG = ("Conv-TasNet", "S-TR")
QUICK = ("X3D", "Slow")  # the others are of the same builders


@pytest.mark.parametrize(
    ("sample", "least"),
    [pytest.param(s, least, id=s.name, marks=[pytest.mark.slow] * (s.name in LONG)) for s, least in EXACT],
)
def test_exact(sample: Sample, least: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case = compile_case(sample)
    for check in ("offline", "steps", "chunks", "snapshot"):
        run_check(case, check)
    cost = case.step.report()
    assert cost.macs_per_clip / cost.macs_per_step >= least, str(cost)


def check_streams(model: nn.Module, shape: tuple[int, ...], least: float, nonlocal_ops: str) -> None:
    """The step model gives what its reference does, at the clip's length and at another; nothing is done twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = cofx.compile(model, torch.randn(shape), nonlocal_ops=nonlocal_ops)
    cost = step.report()
    assert cost.streamed > 0.99 and cost.macs_per_clip / cost.macs_per_step >= least, str(cost)
    reference = step.reference_module
    assert (reference is model) == (nonlocal_ops == "recompute")
    with torch.no_grad():
        clip = torch.randn(shape)
        got = step.forward_steps(clip, pad_end=True)
        torch.testing.assert_close(got.flatten()[-5:], reference(clip).flatten()[-5:], rtol=1e-4, atol=1e-5)
        assert step.verify(torch.randn(*shape[:2], 2 * shape[2], *shape[3:])).exact


@pytest.mark.slow  # tests/test_nonlocal.py has its graph of joints by itself
@pytest.mark.parametrize("name", TRAILING)
def test_with_trailing_forms(name: str) -> None:
    build, shape, least = TRAILING[name]
    torch.manual_seed(0)
    check_streams(build().eval(), shape, least, "continual")


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in VIDEO if n not in QUICK)])
def test_video(name: str) -> None:
    """Models of pytorchvideo, as it builds them."""
    pytest.importorskip("pytorchvideo")
    path, options, shape, least, nonlocal_ops = VIDEO[name]
    published.VIDEO["small"] = (path, options, shape[2], shape[3])
    torch.manual_seed(0)
    check_streams(published.video("small"), shape, least, nonlocal_ops)


def test_no_more_work_than_an_op_needs() -> None:
    """`benchmarks/least.py` on attention and pools: multiply-adds per step are the least that the op allows."""
    spec = importlib.util.spec_from_file_location("least", PACKAGE.parent.parent / "least.py")
    assert spec is not None and spec.loader is not None
    sys.modules["least"] = least = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(least)
    names = ("attention, newest row", "1 layer, positions, class token", "band of 8 frames", "convolution and mean")
    for case in (c for c in least.CASES if c.name in names):
        row = least.measure(case)
        assert row["macs_per_step"] == row["least"], row
