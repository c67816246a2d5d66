"""Running moments against torch's mean and deviation of all values at once."""

import pytest
import torch
from torch import Tensor

from lit_rlft.core.moments import RunningMoments

CHUNKS = ([30], [1] * 30, [7, 0, 13, 10])


def values(shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(30, dtype=torch.float64, generator=generator) + shift


@pytest.mark.parametrize("sizes", CHUNKS)
@pytest.mark.parametrize("shift", [0.0, -3.0, 1e8])
def test_moments_are_those_of_all_values(sizes: list[int], shift: float) -> None:
    own, moments = values(shift), RunningMoments()
    for part in own.split(sizes):
        moments.update(part)
    assert moments.count == 30
    assert moments.mean == pytest.approx(float(own.mean()), rel=1e-14, abs=1e-14)
    # Values near 1e8 are themselves known to 1.5e-8.
    assert moments.std == pytest.approx(
        float(own.std(correction=0)), rel=1e-13 + 1e-16 * abs(shift)
    )
    found = moments.standardised(own)
    assert float(found.mean()) == pytest.approx(0, abs=1e-12 + 1e-15 * abs(shift))
    assert float(found.std(correction=0)) == pytest.approx(1, rel=1e-7)


def test_failed_values_do_not_count() -> None:
    moments, own = RunningMoments(), values()
    moments.update(torch.cat([own, torch.tensor([torch.nan, torch.inf], dtype=torch.float64)]))
    plain = RunningMoments()
    plain.update(own)
    assert moments.state_dict() == plain.state_dict()
    assert moments.standardised(torch.tensor([torch.nan, 0.0])).isnan().tolist() == [True, False]


def test_equal_values_count_nothing_and_no_values_change_nothing() -> None:
    # In double precision: the mean of seven such numbers is another one.
    moments, own = RunningMoments(), torch.tensor([0.1, torch.nan], dtype=torch.float64)
    assert torch.equal(moments.standardised(own[:1]), own[:1])
    for _ in range(3):
        moments.update(own[:1].expand(7))
    assert moments.std == 0
    found = moments.standardised(own)
    assert found[0] == 0 and found[1].isnan()


def test_state_goes_on_bit_for_bit() -> None:
    whole, first, second = RunningMoments(), RunningMoments(), RunningMoments()
    parts = values(1e3).split(10)
    for part in parts:
        whole.update(part)
    first.update(parts[0])
    second.load_state_dict(first.state_dict())
    for part in parts[1:]:
        second.update(part)
    assert second.state_dict() == whole.state_dict()
