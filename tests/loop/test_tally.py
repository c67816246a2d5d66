"""What updates log: the same values for any microbatches, in few operations for each."""

from fractions import Fraction

import torch

from lit_rlft.loop.tally import Tally
from tests.operations import Operations


def test_totals_against_exact_sums() -> None:
    """Parts may have other names than those before them."""
    parts = [
        {"loss": torch.tensor([1e8, 1.0, -1e8]), "far_max": torch.tensor([0.5, 2.0, 1.0])},
        {"loss": torch.tensor([0.25]), "far_max": torch.tensor([1.0]), "kl": torch.tensor([3.0])},
    ]
    tally = Tally()
    for part in parts:
        tally.add(part)
    found = tally.totals()
    for name in ("loss", "kl"):
        values = [Fraction(x) for part in parts if name in part for x in part[name].tolist()]
        assert found[name] == float(sum(values)), name  # single precision would lose the 1
    assert found["far_max"] == 2


def test_what_is_not_finite_is_not_lost() -> None:
    tally = Tally()
    for value in (1.0, float("nan"), 2.0):
        tally.add({"loss": torch.tensor([value]), "far_max": torch.tensor([value])})
    assert all(total.isnan() for total in tally.totals().values())


def test_nothing_was_logged() -> None:
    assert Tally().totals() == {}


def test_operations_do_not_grow_with_the_names() -> None:
    def count(num: int) -> int:
        tally, operations = Tally(), Operations()
        for _ in range(2):
            with operations:
                tally.add({f"{i}{end}": torch.ones(4) for i in range(num) for end in ("", "_max")})
        return operations.total - 2 * 2 * num  # those that make the values

    assert count(1) == count(8) <= 13  # of two parts
