"""The samples of every rule meet the contract, and every rule has some."""

import pytest

from cofx.passes import registry
from cofx.passes.rules import FAMILIES
from contract import check_contract
from models import Sample

CASES = [(family, sample) for family in FAMILIES for sample in family.SAMPLES]


@pytest.mark.parametrize(("family", "sample"), CASES, ids=lambda x: getattr(x, "name", None))
def test_samples(family: object, sample: registry.Sample) -> None:
    check_contract(
        Sample(
            sample.name,
            sample.build,
            sample.shape,
            sample.time_dim,
            length=sample.length,
            multiple=sample.multiple,
            unbounded=sample.unbounded,
            exact=False,
            lag=sample.lag,
            output_time_dim=sample.output_time_dim,
        )
    )


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__.rsplit(".", 1)[-1])
def test_every_family_has_samples(family: object) -> None:
    assert family.SAMPLES


def test_packets_and_duplicates_are_refused() -> None:
    import torch

    with pytest.raises(TypeError):
        registry.rule(torch.ops.aten.add)(lambda call: None)
    with pytest.raises(ValueError):
        registry.rule(torch.ops.aten.conv1d.default)(lambda call: None)
