"""Every net of the collection meets the contract."""

import functools
import warnings

import pytest

from contract import CHECKS, compile_case, run_check
from models import SAMPLES, Sample
from streaming import Case

NAMES = {sample.name: sample for sample in SAMPLES}
FIRST_CLIPS = [sample for sample in SAMPLES if sample.kind == "first-clip"]


@functools.lru_cache(maxsize=8)  # tests come sample by sample; a refusal is found again by each check
def compiled(name: str) -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compile_case(NAMES[name])


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_contract(sample: Sample, check: str) -> None:
    run_check(compiled(sample.name), check)


@pytest.mark.parametrize("sample", FIRST_CLIPS, ids=lambda sample: sample.name)
def test_first_clip_warns_and_can_be_asked_for_the_clip(sample: Sample) -> None:
    """The default says that later steps pool over the stream; ``equivalence="clip"`` recomputes instead."""
    with pytest.warns(UserWarning):
        assert compile_case(sample).step.equivalence == "first-clip"
    windowed = Sample(sample.name, sample.build, sample.shapes, sample.time_dim, kind="clip", output_time_dim=None)
    case = compile_case(windowed, equivalence="clip")
    for check in CHECKS:
        run_check(case, check)
