"""The checks of work and state find what recomputes everything; programs do not grow. See test_collection.py, too."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import cofx
from cofx.passes.codegen.graph_module import generate
from cofx.passes.codegen.key import Key
from contract import compile_case
from models import SAMPLES
from oracle import Oracle
from streaming import Case
from work import check_state_size, check_work

NAMES = {sample.name: sample for sample in SAMPLES}


@pytest.mark.parametrize("check", [check_work, check_state_size])
@torch.no_grad()
def test_recomputing_everything_is_found(check: Callable[[Case], None]) -> None:
    sample = NAMES["conv1d_valid"]
    with pytest.raises(AssertionError):
        check(Case(sample, Oracle(sample), sample.model()))


@pytest.mark.parametrize("name", ["conv1d_valid", "unet_learned", "recurrent_gru", "fold_frames_then_recurrence"])
@torch.no_grad()
def test_programs_do_not_grow_with_chunk_or_batch(name: str) -> None:
    """A chunk is one program of the same size, however long; a step's does not depend on the batch."""
    model = compile_case(NAMES[name]).step.compiled
    period = model.plan.schedule.period
    assert len({len(model.program(Key(0, period * n)).module.graph.nodes) for n in (8, 9, 32, 100)}) == 1
    assert model.open_batch


@torch.no_grad()
def test_phases_in_which_the_same_is_done_share_a_program() -> None:
    net = nn.Sequential(nn.Conv1d(1, 3, 16, 8), nn.ReLU(), nn.ConvTranspose1d(3, 2, 4, 2), nn.Conv1d(2, 2, 3, 3)).eval()
    step = cofx.compile(net, torch.randn(1, 1, 96))
    assert step.verify(torch.randn(1, 1, 200)).exact
    compiled = step.compiled
    period, made = compiled.plan.schedule.period, {}
    for phase in range(period):
        program = compiled.program(Key(phase, 1))
        alone = generate(compiled.plan, Key(phase, 1), torch.device("cpu"))
        assert program.module.code == alone.module.code and program.outputs == alone.outputs
        assert all(torch.equal(program.tensors[name], tensor) for name, tensor in alone.tensors.items())
        made[id(program.module)] = program
    assert len(made) <= 6 < period
