r"""GRAFT and P-GRAFT on the Gaussian mixture, whose parameters can hold the accepted law exactly.

With a reward r_k that is constant on each mode, top-1 of M accepts mode k with probability
:math:`q_k = w_k a_k = \frac{w_k}{P_k} \left[(F_k + P_k)^M - F_k^M\right]`, where F_k is the weight
of the modes with a smaller reward and P_k that of the modes with the same one. P-GRAFT with the
ancestral sampler (eta = 1) shapes the law of x_tau, again a mixture with weights q, and the
reference's completion mixes the modes by the posterior, C_jk = int N_j(x_tau) rho_k(x_tau).
"""

import itertools
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.optim.lr_scheduler import LambdaLR

from domains.gaussian_mixture.closed_form.mixture import STDS
from lit_rlft.algorithms.graft import GRAFT, PGRAFT
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.selection import Preference, RandomK, RewardWeighted
from lit_rlft.core.state import State
from tests.algorithms.graft_support import (
    NUM_CANDIDATES,
    NUM_CONDITIONS,
    NUM_SAMPLES,
    VALUES,
    M,
    Run,
    W,
    drawn,
    fit,
    nearest,
    tuner_of,
)

CRITICAL = stats.chi2.ppf(0.999, df=len(W) - 1)


def shares(points: State) -> np.ndarray:
    return np.bincount(nearest(points).numpy(), minlength=len(W)) / len(points)


def accepted_weights(w: np.ndarray, num_candidates: int = NUM_CANDIDATES) -> np.ndarray:
    """The closed form of the module's docstring."""
    values = np.array(VALUES)
    below = np.array([w[values < value].sum() for value in VALUES])
    same = np.array([w[values == value].sum() for value in VALUES])
    return w / same * ((below + same) ** num_candidates - below**num_candidates)


def preferred_weights(w: np.ndarray) -> np.ndarray:
    """w_k a_k / E[a] of the Bradley-Terry rule, a_k = sum_j w_j sigmoid(r_k - r_j), E[a] = 1/2."""
    margins = np.subtract.outer(VALUES, VALUES)
    return 2 * w * (w / (1 + np.exp(-margins))).sum(axis=1)


def completed_weights(q: np.ndarray, tau: float) -> np.ndarray:
    """q C of the module's docstring on straight lines, by quadrature on a grid."""
    axis = np.linspace(-5, 5, 401)
    x = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    variance = ((1 - tau) * np.array(STDS)) ** 2 + tau**2
    squares = ((x[:, None] - (1 - tau) * M) ** 2).sum(axis=-1)
    density = np.exp(-0.5 * squares / variance) / (2 * np.pi * variance)
    posterior = W * density / (density @ W)[:, None]
    return q @ density.T @ posterior * (axis[1] - axis[0]) ** 2


def statistic(observed: np.ndarray, expected: np.ndarray, *sizes: int) -> float:
    """Pearson's chi-square of shares whose errors are those of independent samples of `sizes`."""
    return float(((observed - expected) ** 2 / expected).sum() / sum(1 / n for n in sizes))


@cache
def converged(
    cls: type[PGRAFT] = GRAFT, *, folder: Path, num_rounds: int = 1, eta: float = 0.0, **kw: Any
) -> Run:
    """A fit of the mixture's own parameters that leaves no error but that of the sample.

    The weights, which have far to go, learn faster than means and widths; when those are as fast,
    the vanishing modes turn into broad ones, a local minimum.
    """
    num_updates = 30 * 4 * num_rounds

    def optimizer(parameters: Any) -> Any:
        logits, *rest = parameters
        slow, fast = {"params": rest, "lr": 0.003}, {"params": [logits], "lr": 0.1}
        return torch.optim.Adam([fast, slow])

    tuner = tuner_of(
        cls,
        sampler=Sampler(20, eta),
        num_candidates=NUM_CANDIDATES,
        num_epochs=30,
        minibatch_size=512,
        sampling_batch_size=8192,
        optimizer=optimizer,
        lr_scheduler=lambda o: LambdaLR(o, lambda i: (1 + math.cos(math.pi * i / num_updates)) / 2),
        seed=1,
        **kw,
    )
    run = fit(tuner, NUM_CONDITIONS, num_rounds, default_root_dir=folder)
    assert tuner.num_updates == num_updates
    return run


def test_closed_forms() -> None:
    """Against enumeration of all groups; tau = 0 leaves the modes, tau = 1 forgets them."""
    q = np.zeros(len(W))
    for group in itertools.product(range(len(W)), repeat=3):
        best = [k for k in group if VALUES[k] == max(VALUES[j] for j in group)]
        for k in best:
            q[k] += W[list(group)].prod() / len(best)
    np.testing.assert_allclose(accepted_weights(W, 3), q)
    q = accepted_weights(W)
    np.testing.assert_allclose(q, [0.3, 0.0625, 0.2, 0.2625, 0.175])
    np.testing.assert_allclose(completed_weights(q, 0.01), q, atol=2e-3)
    np.testing.assert_allclose(completed_weights(q, 1.0), W, atol=1e-4)
    np.testing.assert_allclose(completed_weights(W, 0.5), W, atol=1e-4)


def test_graft_learns_the_accepted_law(folder: Path) -> None:
    """Chi-square at 99.9 % of the accepted shares, of the learned weights and of new samples."""
    run, q = converged(folder=folder), accepted_weights(W)
    (experience,) = run.experiences
    assert len(experience) == NUM_CONDITIONS
    assert statistic(shares(experience.states["x_s"]), q, NUM_CONDITIONS) < CRITICAL
    assert statistic(run.learned, q, NUM_CONDITIONS) < CRITICAL
    assert statistic(run.learned, W, NUM_CONDITIONS) > 10 * CRITICAL
    assert statistic(shares(drawn(run.tuner)), q, NUM_CONDITIONS, NUM_SAMPLES) < CRITICAL
    mixture = run.tuner.pipeline.denoiser.mixture
    assert np.abs(mixture.means.numpy() - M).max() < 0.1
    assert np.abs(mixture.stds.numpy() / STDS - 1).max() < 0.1


@pytest.mark.slow
def test_rwr_learns_the_tilted_law(tmp_path: Path) -> None:
    """q_k = w_k exp(v_k / beta) / Z; chi-square at 99.9 % of as many samples as weights leave."""
    beta, num_conditions = 1.0, 64

    def optimizer(parameters: Any) -> Any:
        logits, *rest = parameters
        return torch.optim.Adam([{"params": rest, "lr": 0.003}, {"params": [logits], "lr": 0.1}])

    tuner = tuner_of(
        GRAFT,
        selection=RewardWeighted(beta),
        sampler=Sampler(20),
        num_candidates=64,
        num_epochs=20,
        minibatch_size=512,
        sampling_batch_size=8192,
        optimizer=optimizer,
        lr_scheduler=lambda o: LambdaLR(o, lambda i: (1 + math.cos(math.pi * i / 160)) / 2),
    )
    assert tuner.algorithm == "RWR"
    run = fit(tuner, num_conditions, default_root_dir=tmp_path)
    assert tuner.num_updates == 160
    q = W * np.exp(np.array(VALUES) / beta)
    q /= q.sum()
    weight = run.experiences[0].states["weight"].double()  # type: ignore[union-attr]
    effective = float(weight.sum() ** 2 / weight.square().sum())
    assert len(weight) == 64 * num_conditions and effective < 0.8 * len(weight)
    assert statistic(run.learned, q, int(effective)) < CRITICAL
    assert statistic(run.learned, W, int(effective)) > 10 * CRITICAL


def test_accepting_at_random_learns_nothing(folder: Path) -> None:
    run = converged(folder=folder, selection=RandomK(1))
    assert statistic(shares(run.experiences[0].states["x_s"]), W, NUM_CONDITIONS) < CRITICAL
    assert statistic(run.learned, W, NUM_CONDITIONS) < CRITICAL
    assert statistic(shares(drawn(run.tuner)), W, NUM_CONDITIONS, NUM_SAMPLES) < CRITICAL
    mixture = run.tuner.pipeline.denoiser.mixture
    assert np.abs(mixture.means.numpy() - M).max() < 0.1
    assert np.abs(mixture.stds.numpy() / STDS - 1).max() < 0.1


def test_iterative_rounds_start_from_what_was_learned(folder: Path) -> None:
    """By Bradley-Terry preference, which is mild enough for all modes to survive two rounds."""
    run = converged(folder=folder, iterative=True, num_rounds=2, selection=Preference())
    first, second = (shares(e.states["x_s"]) for e in run.experiences)
    start, between = run.weights
    np.testing.assert_allclose(start, W, rtol=1e-6)
    assert statistic(first, preferred_weights(W), NUM_CONDITIONS) < CRITICAL
    q = preferred_weights(between / between.sum())
    assert statistic(second, q, NUM_CONDITIONS) < CRITICAL
    assert statistic(run.learned, q, NUM_CONDITIONS) < CRITICAL
    assert statistic(second, preferred_weights(W), NUM_CONDITIONS) > 2 * CRITICAL


def test_other_rounds_start_from_the_reference(folder: Path) -> None:
    tuner = tuner_of(GRAFT, num_candidates=2, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    run = fit(tuner, 512, 2, default_root_dir=folder)
    assert statistic(run.weights[1], W, 512) > CRITICAL  # the policy has moved
    first, second = (e.states["x_s"] for e in run.experiences)
    for points in (first, second):
        assert statistic(shares(points), accepted_weights(W), 512) < CRITICAL
    assert not torch.equal(first, second)


@pytest.mark.parametrize("cut", [0.25, 0.5])
@pytest.mark.parametrize("train_from", ["intermediate", "clean"])
def test_p_graft_learns_the_law_it_predicts(folder: Path, cut: float, train_from: str) -> None:
    """Shares of the composite's samples, chi-square at 99.9 %; their mean within 4 errors.

    eta = 1, where both training targets have the same optimum.
    """
    run = converged(PGRAFT, folder=folder, cut=cut, eta=1.0, train_from=train_from)
    p = completed_weights(accepted_weights(W), cut)
    x_0 = drawn(run.tuner)
    assert statistic(shares(x_0), p, NUM_CONDITIONS, NUM_SAMPLES) < CRITICAL
    assert statistic(shares(x_0), W, NUM_CONDITIONS, NUM_SAMPLES) > 2 * CRITICAL
    error = x_0.std(dim=0).numpy() * (1 / NUM_CONDITIONS + 1 / NUM_SAMPLES) ** 0.5
    assert (np.abs(x_0.mean(dim=0).numpy() - p @ M) < 4 * error).all()
    if cut == 0.5:
        graft = accepted_weights(W)
        assert statistic(shares(x_0), graft, NUM_CONDITIONS, NUM_SAMPLES) > 2 * CRITICAL
