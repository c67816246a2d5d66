"""Bradley-Terry scores and win rates beside independent computations."""

import math
from itertools import combinations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import binomtest

from lit_rlft.voting.questions import pairs_to_show
from lit_rlft.voting.scores import Choice, bradley_terry, wins
from lit_rlft.voting.win_rate import WinRate, wilson


def objective(scores: np.ndarray, choices: list[Choice], prior: float) -> float:
    """Return the negative log posterior, written down from its definition."""
    value = prior / 2 * float(np.sum(scores**2))
    for shown, chosen in choices:
        log_probability = {
            i: scores[i] - math.log(sum(math.exp(scores[j]) for j in shown)) for i in shown
        }
        if chosen is not None:
            value -= log_probability[chosen]
        else:
            value -= sum(log_probability.values()) / len(shown)
    return value


def drawn(size: int, seed: int, largest: int) -> list[Choice]:
    rng = np.random.default_rng(seed)
    choices = []
    for _ in range(3 * size):
        number = int(rng.integers(2, largest + 1))
        shown = tuple(int(i) for i in rng.choice(size, size=number, replace=False))
        chosen = None if rng.random() < 0.2 else int(rng.choice(shown))
        choices.append(Choice(shown, chosen))
    return choices


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("prior", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("largest", [2, 4])
def test_scores_are_those_of_an_independent_optimiser(
    size: int, prior: float, largest: int
) -> None:
    choices = drawn(size, seed=size, largest=min(largest, size))
    found = bradley_terry(size, choices, prior)
    other = minimize(objective, np.zeros(size), (choices, prior), "BFGS", options={"gtol": 1e-9})
    shown = sorted({i for choice in choices for i in choice.shown})
    np.testing.assert_allclose(found.numpy()[shown], other.x[shown], atol=1e-5)
    assert abs(float(found[shown].sum())) < 1e-9


def test_scores_of_one_pair_solve_their_equation() -> None:
    """With d = s_1 - s_2 the maximum has sigmoid(-d) = prior d / 2."""
    for prior in (0.1, 1.0, 5.0):
        first, second = bradley_terry(2, [Choice((0, 1), 0)], prior).tolist()
        apart = first - second
        assert first == pytest.approx(-second)
        assert 1 / (1 + math.exp(apart)) == pytest.approx(prior * apart / 2, rel=1e-9)
    assert bradley_terry(2, [Choice((0, 1), None)]).tolist() == [0, 0]


def test_what_was_never_compared_has_no_reward() -> None:
    scores, share = bradley_terry(3, [Choice((0, 2), 2)]), wins(3, [Choice((0, 2), 2)])
    assert scores.isnan().tolist() == share.isnan().tolist() == [False, True, False]
    assert share[[0, 2]].tolist() == [0, 1]
    assert bradley_terry(3, []).isnan().all() and wins(3, []).isnan().all()


def test_wins_count_ties_in_shares() -> None:
    choices = [Choice((0, 1), 0), Choice((1, 2), None), Choice((0, 1, 2, 3), 0)]
    # The second lost once, tied once and lost to the first among four, and so on.
    assert wins(4, choices).tolist() == pytest.approx([1, 0.5 / 3, 0.5 / 2, 0])


@pytest.mark.parametrize("size", range(2, 10))
def test_pairs_show_all_candidates_as_often_as_can_be(size: int) -> None:
    every = size * (size - 1) // 2
    pairs = pairs_to_show(size, every)
    assert {frozenset(pair) for pair in pairs} == set(map(frozenset, combinations(range(size), 2)))
    assert len(pairs) == every
    for number in range(1, every + 1):
        counts = np.bincount(np.ravel(pairs[:number]), minlength=size)
        assert counts.max() - counts.min() <= 2
    first = np.bincount(np.ravel(pairs[: size // 2]), minlength=size)
    assert first.max() == 1


@pytest.mark.parametrize(("won", "total"), [(0, 5), (3, 10), (48, 96), (96, 96), (1, 1)])
def test_intervals_are_those_of_scipy(won: int, total: int) -> None:
    other = binomtest(won, total).proportion_ci(method="wilson")
    assert wilson(won, total) == pytest.approx((other.low, other.high), abs=1e-12)


def test_the_sentence_of_a_win_rate() -> None:
    assert WinRate(0, 0, 2).sentence() == "no comparison was decided, 2 without a difference"
    assert (
        "won 30 of 40 comparisons, 8 without a difference: 75.0%" in WinRate(30, 10, 8).sentence()
    )
    # Pairs of one prompt are not: the words say what the interval takes for granted.
    assert WinRate(30, 10, 8).sentence().endswith("% if all comparisons are independent")
    assert wilson(0, 0) == (0, 1)
