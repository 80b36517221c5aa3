"""Every net of the collection meets the contract, does no work twice and keeps its size."""

import functools
import warnings
from typing import Any

import pytest
import torch

from contract import CHECKS, compile_case, run_check
from models import SAMPLES, Sample, spread
from streaming import Case
from work import check_state_size, check_work

NAMES = {sample.name: sample for sample in SAMPLES}
FURTHER = {"state_size": check_state_size, "work": check_work}
OF_EACH = ("offline", "chunks")  # whose streams are flushed too
FIRST_CLIPS = [sample for sample in SAMPLES if sample.kind == "first-clip"]


@functools.lru_cache(maxsize=8)  # tests come sample by sample; a refusal is found again by each check
def compiled(name: str) -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compile_case(NAMES[name])


def checks(sample: Sample) -> list[str]:
    """What is checked of a net; of one that is evaluated on whole clips not how much work that is."""
    return [*CHECKS, *FURTHER] if sample.kind == "stream" else [*CHECKS, "state_size"]


def parameters() -> list[Any]:
    """Every net with what is checked of it; but for the numbers themselves by default for every fifth."""
    slow, slowly = {p.values[0].name for p in spread(5) if p.marks}, [pytest.mark.slow]
    return [
        pytest.param(s, check, id=f"{s.name}-{check}", marks=slowly if s.name in slow and check not in OF_EACH else [])
        for s in SAMPLES
        for check in checks(s)
    ]


@pytest.mark.parametrize("sample, check", parameters())
def test_contract(sample: Sample, check: str) -> None:
    case = compiled(sample.name)
    if check in CHECKS:
        return run_check(case, check)
    with torch.no_grad():
        FURTHER[check](case)


@pytest.mark.parametrize("sample", FIRST_CLIPS, ids=lambda sample: sample.name)
def test_first_clip_warns_and_can_be_asked_for_the_clip(sample: Sample) -> None:
    """The default says that later steps pool over the stream; ``equivalence="clip"`` recomputes instead."""
    with pytest.warns(UserWarning):
        assert compile_case(sample).step.equivalence == "first-clip"
    windowed = Sample(sample.name, sample.build, sample.shapes, sample.time_dim, kind="clip", output_time_dim=None)
    case = compile_case(windowed, equivalence="clip")
    for check in CHECKS:
        run_check(case, check)
