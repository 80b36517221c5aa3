"""That it streams: no work is done twice, and the state stays as large as it was.

A step model that keeps all frames and runs the whole net again would pass every check of the contract.
"""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models import SAMPLES, Sample
from streaming import Case
from test_collection import compiled

SPAN = 120  # steps: a multiple of every period in the collection
STREAMS = [sample for sample in SAMPLES if sample.kind == "stream"]


def warm_up(case: Case) -> int:
    """Steps until every output flows, in whole lengths of the net."""
    finite = [o.receptive_field for o in case.step.outputs if o.receptive_field < SPAN]
    return case.sample.whole(int(max([case.sample.clip_length, *finite])) + 1)


def offline_flops(case: Case, steps: int) -> int:
    clips = case.sample.inputs(steps)
    with FlopCounterMode(display=False) as counter:
        case.model(*clips)
    return counter.get_total_flops()


def state_size(case: Case) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in case.step.get_state().items()}


@pytest.mark.parametrize("sample", STREAMS, ids=lambda sample: sample.name)
@torch.no_grad()
def test_steps_cost_no_more_than_the_clip(sample: Sample) -> None:
    """Multiply-adds per step, averaged over whole periods past the warm-up, against the offline net's per step."""
    case = compiled(sample.name)
    start = warm_up(case)
    offline = offline_flops(case, start + 2 * SPAN) - offline_flops(case, start + SPAN)
    run = case.run(sample.inputs(start + SPAN)).steps_to(start)
    with FlopCounterMode(display=False) as counter:
        run.steps_to(start + SPAN)
    stepping = counter.get_total_flops()
    assert stepping <= offline, f"{stepping / SPAN:.0f} operations per step, offline {offline / SPAN:.0f}"


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
@torch.no_grad()
def test_state_keeps_its_size(sample: Sample) -> None:
    case = compiled(sample.name)
    run = case.run(sample.inputs(40)).steps_to(1)
    first = state_size(case)
    assert all(isinstance(tensor, Tensor) for tensor in case.step.get_state().values())
    while run.position < 40:
        run.forward_step()
        assert state_size(case) == first, f"after step {run.position}"
