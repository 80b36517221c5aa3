"""Random nets stream exactly, frame by frame, in chunks and at the end. ``COFX_EXAMPLES=2000`` tries that many."""

import os
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from contract import check_contract
from models import Sample
from oracle import Oracle
from random_networks import networks

EXAMPLES = int(os.environ.get("COFX_EXAMPLES", "60"))
CHECKS = ("offline", "steps", "chunks", "flush", "poison", "latency", "receptive_field")
budget = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize="COFX_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@budget
@given(networks())
def test_random_networks_stream(sample: Sample) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_contract(sample, checks=CHECKS)


@pytest.mark.slow
@settings(budget, max_examples=20)
@given(networks())
@torch.no_grad()
def test_random_networks_are_streamable(sample: Sample) -> None:
    """The generator makes nets that can be streamed at all: the oracle does."""
    check_contract(sample, checks=CHECKS, step=Oracle(sample))
