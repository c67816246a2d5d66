"""Errors of numbers of different kinds and of ratios, beside the deviation over fresh sets."""

import math

import pytest
import torch
from torch import Tensor

from lit_rlft.kit.distinct import KindCount, kind_error
from lit_rlft.kit.ratios import error_of_mean, ratio, ratio_parts

N = 300


def shares(kinds: Tensor, valid: Tensor, new: Tensor) -> dict[str, float]:
    """Return uniqueness, its product with validity, and novelty."""
    different = len(kinds[valid].unique())
    return {
        "uniqueness": different / int(valid.sum()),
        "valid_unique": different / N,
        "novelty": len(kinds[valid & new].unique()) / different,
    }


def counts(kinds: Tensor, valid: Tensor, new: Tensor) -> dict[str, KindCount]:
    """Return the counts of which `shares` are made."""
    found, none = shares(kinds, valid, new), torch.zeros(N)
    per_valid, different = valid / valid.sum(), len(kinds[valid].unique())
    weights = (new.double() - found["novelty"]) * valid / different
    return {
        "uniqueness": KindCount(kinds, per_valid, -found["uniqueness"] * per_valid),
        "valid_unique": KindCount(kinds, valid / N, none),
        "novelty": KindCount(kinds, weights, none),
    }


@pytest.mark.parametrize(
    ("law", "num_kinds", "within"),
    [
        ("equal", 60, 1.0),  # nearly every kind is met: few are left to tell the error from
        ("equal", 300, 0.2),
        ("equal", 3000, 0.2),
        ("zipf", 300, 0.2),
        ("zipf", 30_000, 0.2),
    ],
)
def test_errors_of_numbers_of_kinds(law: str, num_kinds: int, within: float) -> None:
    """From all kinds met often to hardly one met twice; four in five pairs are of one kind."""
    generator = torch.Generator().manual_seed(num_kinds)
    places = torch.arange(1, num_kinds + 1, dtype=torch.float64)
    chances = torch.ones_like(places) if law == "equal" else 1 / places

    def drawn() -> list[tuple[Tensor, Tensor, Tensor]]:
        first, second = chances.multinomial(2 * N, True, generator=generator).view(2, N)
        second = first.where(torch.rand(N, generator=generator) < 0.8, second)
        # A kind is valid or not, and new or not.
        return [(kinds, kinds % 5 > 0, kinds % 3 > 0) for kinds in (first, second)]

    pairs = [drawn() for _ in range(300)]
    for name in ("uniqueness", "valid_unique", "novelty"):
        values = torch.tensor([[shares(*arm)[name] for arm in pair] for pair in pairs])
        found = [[counts(*arm)[name] for arm in pair] for pair in pairs[:50]]
        for true, errors in (
            (values[:, 0].std().item(), [kind_error(pair[0]) for pair in found]),
            ((values[:, 0] - values[:, 1]).std().item(), [kind_error(*pair) for pair in found]),
        ):
            mean = torch.tensor(errors).square().mean().sqrt().item()
            # The deviation of 300 sets is itself known within 4 %.
            assert 0.8 * true < mean < (1 + within) * true, (name, true)


@pytest.mark.parametrize(("num_kinds", "per_row"), [(300, 50), (3000, 3), (30_000, 2)])
def test_errors_of_kinds_of_rows(num_kinds: int, per_row: int) -> None:
    """Four samples of a row have few kinds; taken alone they give from 0.39 of the deviation on."""
    generator = torch.Generator().manual_seed(num_kinds)
    rows = torch.arange(N // 4).repeat_interleave(4)

    def drawn() -> list[tuple[Tensor, Tensor, Tensor]]:
        starts = torch.randint(0, num_kinds, (N // 4,), generator=generator)[rows]
        first, second = starts + torch.randint(0, per_row, (2, N), generator=generator)
        second = first.where(torch.rand(N, generator=generator) < 0.5, second)
        return [(k % num_kinds, k % 5 > 0, k % 3 > 0) for k in (first, second)]

    pairs = [drawn() for _ in range(300)]
    for name in ("uniqueness", "valid_unique", "novelty"):
        values = torch.tensor([[shares(*arm)[name] for arm in pair] for pair in pairs])
        found = [[counts(*arm)[name] for arm in pair] for pair in pairs[:50]]
        alone = [kind_error(pair[0], groups=rows) for pair in found]
        paired = [kind_error(*pair, groups=rows) for pair in found]
        differences = values[:, 0] - values[:, 1]
        for true, errors in ((values[:, 0].std(), alone), (differences.std(), paired)):
            mean = torch.tensor(errors).square().mean().sqrt()
            assert 0.75 * true < mean < 1.2 * true, (name, true)


def test_errors_of_kinds_at_the_ends() -> None:
    ones, none = torch.ones(4) / 4, torch.zeros(4)
    same, apart = torch.zeros(4).long(), torch.arange(4)
    assert kind_error(KindCount(same, ones, none)) == 0
    assert kind_error(KindCount(apart, none, none)) == 0
    distinct = KindCount(apart, ones, none)
    assert kind_error(distinct, distinct) == 0
    assert math.isnan(kind_error(KindCount(apart[:1], ones[:1], none[:1])))


def test_ratio_and_its_error() -> None:
    parts = torch.tensor([1.0, 2.0, math.nan, 0.0])
    wholes = torch.tensor([2.0, 6.0, 9.0, 2.0])
    assert ratio(parts, wholes) == pytest.approx(0.3)
    assert math.isnan(ratio(parts[:0], wholes[:0])) and math.isnan(ratio(parts[3:], parts[3:]))
    assert ratio_parts(parts, wholes).mean().item() == pytest.approx(0, abs=1e-12)
    generator = torch.Generator().manual_seed(0)

    def drawn() -> tuple[Tensor, Tensor]:
        sizes = torch.randint(3, 20, (200,), generator=generator).double()
        # Small ones are better: not the mean of the shares.
        return (sizes - torch.rand(200, generator=generator) * sizes**1.5 / 5).round(), sizes

    sets = [drawn() for _ in range(500)]
    true = torch.tensor([ratio(*drawn_set) for drawn_set in sets]).std().item()
    errors = [error_of_mean(ratio_parts(*drawn_set)) for drawn_set in sets]
    assert sum(errors) / len(errors) == pytest.approx(true, rel=0.1)
    assert error_of_mean(ratio_parts(*sets[0]), ratio_parts(*sets[0])) == 0
    assert math.isnan(error_of_mean(torch.ones(1)))
