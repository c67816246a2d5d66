r"""Acceptance rules against the closed forms of generalised rejection sampling.

For a rule with :math:`a(x) = P(C_1 = 1 | x^{(1)} = x)` the accepted law of p_ref = N(0, 1) with
reward r(x) = x is N(x; 0, 1) a(x) / E[a]; its moments come from quadrature.
"""

from collections.abc import Callable
from itertools import pairwise
from math import comb
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.randomness import generators
from lit_rlft.core.selection import (
    BestOfM,
    Classical,
    Preference,
    RandomK,
    RewardWeighted,
    Selection,
    Threshold,
    TopK,
    Unique,
)

Acceptance = Callable[[np.ndarray], np.ndarray]
GRID = np.linspace(-9, 9, 20_001)

TABLE = [
    # k, M, mean, std, KL of the accepted law
    (1, 2, 0.5642, 0.826, 0.1931),
    (1, 4, 1.0294, 0.701, 0.6363),
    (1, 8, 1.4236, 0.611, 1.2044),
    (4, 16, 1.2010, 0.567, 0.9877),
    (10, 100, 1.7298, 0.439, 2.0194),
]


def top_k(k: int, m: int) -> Acceptance:
    def a(x: np.ndarray) -> np.ndarray:
        below = stats.norm.cdf(x)
        above = stats.norm.sf(x)
        return sum(comb(m - 1, j) * above**j * below ** (m - 1 - j) for j in range(k))

    return a


def bradley_terry(x: np.ndarray) -> np.ndarray:
    y, weights = np.polynomial.hermite_e.hermegauss(80)
    return (1 / (1 + np.exp(y - x[:, None]))) @ weights / np.sqrt(2 * np.pi)


def classical(x: np.ndarray) -> np.ndarray:
    return np.minimum(1, np.exp((x - 1.0) / 0.7))


def expectation(values: np.ndarray) -> float:
    return float(integrate.simpson(stats.norm.pdf(GRID) * values, x=GRID))


def accepted_moments(a: Acceptance) -> tuple[float, float, float]:
    """Mean, std and KL to the reference of the accepted law, by quadrature."""
    density = a(GRID) / expectation(a(GRID))
    mean = expectation(GRID * density)
    std = np.sqrt(expectation(GRID**2 * density) - mean**2)
    log = np.log(np.maximum(density, 1e-300))
    return mean, std, expectation(density * log)


def rewards(num_groups: int, m: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_groups, m, generator=torch.Generator().manual_seed(seed))


def group_mean(values: torch.Tensor, weights: torch.Tensor) -> tuple[float, float]:
    """Ratio sum(values) / sum(weights) over groups [G] and its standard error (delta method)."""
    ratio = values.sum() / weights.sum()
    error = (values - ratio * weights).std() / (weights.mean() * len(values) ** 0.5)
    return ratio.item(), error.item()


def check_acceptance(rule: Selection, m: int, a: Acceptance, num_groups: int = 20_000) -> None:
    """Acceptance in 12 bins of equal probability is the integral of a, within 4 std. errors."""
    torch.manual_seed(1)
    r = rewards(num_groups, m).double()
    accepted = rule(r)
    assert accepted.shape == r.shape and accepted.dtype == torch.bool
    edges = stats.norm.ppf(np.linspace(0, 1, 13))
    for low, high in pairwise(edges):
        inside = (r >= low) & (r < high)
        x = stats.norm.ppf(stats.norm.cdf(low) + (np.arange(4000) + 0.5) / 4000 * (1 / 12))
        exact = a(x).mean()
        measured, error = group_mean(
            (accepted & inside).sum(dim=1).double(), inside.sum(dim=1).double()
        )
        assert measured == pytest.approx(exact, abs=4 * error + 1e-4)


@pytest.mark.parametrize(("k", "m", "mean", "std", "kl"), TABLE)
def test_closed_form_of_top_k(k: int, m: int, mean: float, std: float, kl: float) -> None:
    a = top_k(k, m)
    assert expectation(a(GRID)) == pytest.approx(k / m, rel=1e-6)
    exact = accepted_moments(a)
    assert exact == pytest.approx((mean, std, kl), abs=5.1e-4)
    assert exact[0] == pytest.approx(mean, abs=5.1e-5)
    assert exact[2] == pytest.approx(kl, abs=5.1e-5)


@pytest.mark.parametrize(("k", "m", "mean", "std", "kl"), TABLE)
def test_top_k_accepts_its_law(k: int, m: int, mean: float, std: float, kl: float) -> None:
    """First and second moment of the accepted samples within 4 standard errors over groups."""
    num_groups = 200_000 // m
    torch.manual_seed(0)
    r = rewards(num_groups, m)
    accepted = TopK(k)(r)
    assert (accepted.sum(dim=1) == k).all()
    assert (r.where(accepted, torch.inf).amin(1) >= r.where(~accepted, -torch.inf).amax(1)).all()
    mean, std, _ = accepted_moments(top_k(k, m))
    for power, exact in ((1, mean), (2, mean**2 + std**2)):
        values = (r.double() ** power * accepted).sum(dim=1) / k
        error = values.std() / num_groups**0.5
        assert values.mean().item() == pytest.approx(exact, abs=4 * error.item())
    check_acceptance(TopK(k), m, top_k(k, m), num_groups=100_000 // m)


@pytest.mark.parametrize("m", [2, 4, 8])
def test_best_of_m(m: int) -> None:
    _, _, kl = accepted_moments(top_k(1, m))
    assert kl == pytest.approx(np.log(m) - (m - 1) / m, abs=1e-6)
    r = rewards(100, m)
    assert torch.equal(BestOfM()(r).float().argmax(dim=1), r.argmax(dim=1))
    assert (BestOfM()(r).sum(dim=1) == 1).all()


def test_bradley_terry_preference() -> None:
    check_acceptance(Preference(), 2, bradley_terry, num_groups=60_000)
    accepted = Preference()(rewards(50, 6)).reshape(50, 3, 2)
    assert (accepted.sum(dim=2) == 1).all()


def test_sharp_preference_is_top_one_of_two() -> None:
    r = rewards(200, 2)
    assert torch.equal(Preference()(r * 1e6), TopK(1)(r))


def test_classical_rejection() -> None:
    check_acceptance(Classical(alpha=0.7, r_max=1.0), 4, classical)


def test_classical_rejection_reaches_the_exponential_tilt() -> None:
    # On bounded rewards the accepted law is p_ref exp(r / alpha) exactly: reward uniform in [0, 1].
    torch.manual_seed(0)
    r = torch.rand(60_000, 2, dtype=torch.float64)
    accepted = Classical(alpha=0.5, r_max=1.0)(r)
    kept = r[accepted].numpy()

    def cdf(x: np.ndarray) -> np.ndarray:
        return np.expm1(2 * np.clip(x, 0, 1)) / np.expm1(2)

    assert stats.kstest(kept, cdf).pvalue > 1e-3


def test_threshold_conditions_on_success() -> None:
    r = torch.tensor([[0.0, 1.0, 0.5, 1.0], [0.0, 0.0, 0.0, 2.0]])
    assert torch.equal(Threshold()(r), r >= 1)
    assert torch.equal(Threshold(0.5)(r), r >= 0.5)


@pytest.mark.parametrize(("m", "q", "acceptance"), [(10, 0.05, 0.8025), (50, 0.1, 0.1990)])
def test_deduplication(m: int, q: float, acceptance: float) -> None:
    """Acceptance of a member of a class of mass q, within 4 standard errors over groups."""
    assert (1 - (1 - q) ** m) / (m * q) == pytest.approx(acceptance, abs=5.1e-5)
    num_groups = 60_000 // m
    torch.manual_seed(0)
    in_class = torch.rand(num_groups, m) < q
    # Half of all others fail; the rest are all different.
    r = (in_class | (torch.rand(num_groups, m) < 0.5)).float()
    keys = [
        ["class" if member else str(i) for i, member in enumerate(group)]
        for group in in_class.tolist()
    ]
    accepted = Unique(Threshold())(r, keys)
    assert not accepted[r == 0].any()
    assert accepted[(r == 1) & ~in_class].all()
    members = (accepted & in_class).sum(dim=1)
    assert torch.equal(members, in_class.any(dim=1).long())
    measured, error = group_mean(members.double(), in_class.sum(dim=1).double())
    assert measured == pytest.approx(acceptance, abs=4 * error)


def test_deduplication_keeps_a_member_at_random() -> None:
    """Chi-square at 1e-3."""
    torch.manual_seed(0)
    accepted = Unique(Threshold())(torch.ones(3000, 4), [["same"] * 4] * 3000)
    counts = accepted.sum(dim=0).numpy()
    assert counts.sum() == 3000 and stats.chisquare(counts).pvalue > 1e-3


def test_deduplication_counts_accepted_candidates_only() -> None:
    r = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    accepted = Unique(Threshold())(r, [["a", "a", "b", "b"]])
    assert accepted.tolist() == [[False, True, False, True]]


def test_a_twin_that_failed_does_not_stand_for_a_candidate() -> None:
    r = torch.tensor([[1.0, -torch.inf]]).repeat(64, 1)
    accepted = Unique(TopK(2))(r, [["a", "a"]] * 64)
    assert accepted.tolist() == [[True, False]] * 64


def test_reward_weights_by_hand() -> None:
    """exp(r / beta) over its mean in each row; what failed (-inf) counts nothing."""
    rule = RewardWeighted(beta=0.5)
    r = torch.tensor([[0.0, 0.5 * np.log(3), 0.0], [1e4, 1e4 - 0.5 * np.log(2), -np.inf]])
    found = rule.weights(r.double())
    torch.testing.assert_close(found, torch.tensor([[0.6, 1.8, 0.6], [4 / 3, 2 / 3, 0.0]]))
    assert rule(r).tolist() == [[True] * 3, [True, True, False]]
    assert not rule.weights(torch.full((1, 3), -torch.inf)).any()
    cold = RewardWeighted(beta=1e-3).weights(torch.tensor([[0.0, 1.0, 0.0, -torch.inf]]))
    assert (cold > 0).tolist() == [[True, True, True, False]]  # all that count are trained on
    assert float(cold.sum()) == 3.0


def test_reward_weights_tilt_the_reference() -> None:
    """Of N(0, 1) and r(x) = x to N(1 / beta, 1), within the error of weighted samples."""
    x = torch.randn(8, 50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = RewardWeighted(beta=2.0).weights(x).double()
    mean, second = (weights * x).mean(dim=1), (weights * x.square()).mean(dim=1)
    error = 4 / 8**0.5
    assert float(mean.mean()) == pytest.approx(0.5, abs=error * float(mean.std()))
    assert float(second.mean()) == pytest.approx(1.25, abs=error * float(second.std()))
    assert torch.equal(RewardWeighted(2.0).weights(x - 7), weights.float())


def test_unique_keeps_the_weight_of_one_of_a_class() -> None:
    r, keys = torch.tensor([[0.0, 1.0, 2.0]]), [["a", "a", "b"]]
    whole = RewardWeighted().weights(r)
    found = Unique(RewardWeighted()).weights(r, keys)
    assert found[0, 2] == whole[0, 2] and int((found[0, :2] > 0).sum()) == 1
    assert (found == whole)[found > 0].all()


@pytest.mark.parametrize("rule", [TopK(2), TopK(1), BestOfM()], ids=["2", "1", "best"])
def test_ties_are_broken_at_random(rule: TopK) -> None:
    """Binary rewards: every member of a tie is accepted equally often; chi-square at 1e-3."""
    torch.manual_seed(0)
    r = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0]).expand(6000, 5)
    counts = rule(r).sum(dim=0).numpy()
    assert counts[[0, 3]].sum() == 0
    assert stats.chisquare(counts[[1, 2, 4]]).pvalue > 1e-3
    counts = TopK(4)(r).sum(dim=0).numpy()
    assert (counts[[1, 2, 4]] == 6000).all() and stats.chisquare(counts[[0, 3]]).pvalue > 1e-3


def test_top_k_of_discrete_rewards_has_the_closed_form() -> None:
    # With ties a(r) is the integral of a over F's jump: r in {0, 1, 2} with probability 1/3 each.
    num, m, k = 40_000, 4, 2
    torch.manual_seed(0)
    r = torch.randint(0, 3, (num, m)).float()
    accepted = TopK(k)(r)
    u = (np.arange(30_000) + 0.5) / 30_000
    a = sum(comb(m - 1, j) * (1 - u) ** j * u ** (m - 1 - j) for j in range(k))
    for value, exact in enumerate(a.reshape(3, -1).mean(axis=1)):
        held = r == value
        measured, error = group_mean(
            (accepted & held).sum(dim=1).double(), held.sum(dim=1).double()
        )
        assert measured == pytest.approx(exact, abs=4 * error)


def test_random_k_does_not_tilt() -> None:
    check_acceptance(RandomK(3), 8, lambda x: np.full_like(x, 3 / 8), num_groups=10_000)
    r = rewards(500, 8)
    assert (RandomK(3)(r).sum(dim=1) == 3).all()


def test_random_k_ignores_rewards() -> None:
    r = rewards(20, 6)
    first = RandomK(2)(r, noise=generators(range(20)))
    assert torch.equal(first, RandomK(2)(-r, noise=generators(range(20))))
    assert not torch.equal(first, RandomK(2)(r, noise=generators(range(20, 40))))


@pytest.mark.parametrize("rescale", [torch.exp, lambda r: 3 * r - 7, lambda r: r**3])
def test_top_k_is_invariant_to_monotone_rescaling(
    rescale: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    r = rewards(300, 8).double()
    assert torch.equal(TopK(3)(r), TopK(3)(rescale(r)))


@pytest.mark.parametrize(
    "rule",
    [TopK(2), RandomK(2), Classical(), Preference(), Unique(TopK(2))],
    ids=lambda rule: type(rule).__name__,
)
def test_a_group_is_decided_alike_in_every_batch(rule: Selection) -> None:
    r = rewards(5, 4).round()
    keys = [["a", "a", "b", "b"]] * 5
    whole = rule(r, keys, generators(range(5)))
    assert torch.equal(rule(r[3:], keys[3:], generators([3, 4])), whole[3:])


def test_settings_that_cannot_work_are_refused() -> None:
    for build in (
        lambda: TopK(0),
        lambda: Classical(alpha=0.0),
        lambda: TopK(5).check(4),
        lambda: RandomK(5)(rewards(1, 4)),
        lambda: Preference().check(3),
        lambda: Unique(TopK(5)).check(4),
        lambda: Unique(TopK(1))(rewards(1, 4)),
    ):
        with pytest.raises(UsageError):
            build()
    for rule in (TopK(4), Preference(), Threshold(), Classical(), Unique(TopK(4)), RandomK(4)):
        rule.check(4)


@pytest.mark.parametrize("wrong", [torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int64), None])
def test_accept_bits_are_bools(wrong: Any) -> None:
    """Rewards in their place would be taken for weights."""

    class Own(Selection):
        def __call__(self, rewards: Tensor, keys: Any = None, noise: Any = None) -> Tensor:
            return wrong

    with pytest.raises(UsageError, match=r"Own returned .*; a selection returns a bool tensor"):
        Own().weights(torch.zeros(2, 3))
