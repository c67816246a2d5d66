r"""GRAFT and P-GRAFT on the Gaussian mixture, whose parameters can hold the accepted law exactly.

With a reward r_k that is constant on each mode, top-1 of M accepts mode k with probability
:math:`q_k = w_k a_k = \frac{w_k}{P_k} \left[(F_k + P_k)^M - F_k^M\right]`, where F_k is the weight
of the modes with a smaller reward and P_k that of the modes with the same one. P-GRAFT with the
ancestral sampler (eta = 1) shapes the law of x_tau, again a mixture with weights q, and the
reference's completion mixes the modes by the posterior, C_jk = int N_j(x_tau) rho_k(x_tau).
"""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from domains.gaussian_mixture.closed_form.mixture import MEANS, STDS, WEIGHTS
from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.algorithms.base import Experience
from lit_rlft.algorithms.graft import GRAFT, PGRAFT
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.randomness import generators, seed_from
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.selection import Preference, RandomK, Threshold, TopK, Unique
from lit_rlft.core.state import State, tensor_of
from lit_rlft.kit.data import collate
from lit_rlft.loop.reference import LoRA
from tests.support import trainer_of

W, M = np.array(WEIGHTS), np.array(MEANS)
VALUES = (1.0, 0.0, 1.0, 2.0, 2.0)
CRITICAL = stats.chi2.ppf(0.999, df=len(W) - 1)
NUM_CONDITIONS, NUM_CANDIDATES, NUM_SAMPLES = 2048, 2, 4096


class ModeValue(Reward):
    """A value per mode, that of the mode nearest to the sample."""

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return torch.tensor(VALUES)[nearest(samples)]


@dataclass
class Run:
    """A finished fit: the tuner, what it collected, and the mixture's weights before each round."""

    tuner: PGRAFT
    experiences: list[Experience] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)

    @property
    def learned(self) -> np.ndarray:
        return weights_of(self.tuner)


def nearest(points: State) -> Tensor:
    assert isinstance(points, Tensor)
    return torch.cdist(points.detach().double(), torch.from_numpy(M)).argmin(dim=1)


def shares(points: State) -> np.ndarray:
    return np.bincount(nearest(points).numpy(), minlength=len(W)) / len(points)


def weights_of(tuner: PGRAFT) -> np.ndarray:
    assert isinstance(tuner.pipeline, GaussianMixturePipeline)
    return tuner.pipeline.denoiser.mixture.weights.double().numpy()


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


def tuner_of(cls: type[PGRAFT] = PGRAFT, *, width: int = 0, **settings: Any) -> PGRAFT:
    pipeline = GaussianMixturePipeline(
        schedule="rectified_flow", prediction_type="velocity", residual_width=width
    )
    base: dict[str, Any] = {"sampler": Sampler(8), "num_candidates": 4, "minibatch_size": 4}
    return cls(pipeline, settings.pop("reward", ModeValue()), **{**base, **settings})


def fit(tuner: PGRAFT, num_conditions: int = 8, num_rounds: int = 1, **trainer: Any) -> Run:
    run, collect = Run(tuner), tuner.collect

    def recorded(*args: Any) -> Experience:
        run.weights.append(weights_of(tuner))
        run.experiences.append(collect(*args))
        return run.experiences[-1]

    tuner.collect = recorded  # type: ignore[method-assign]
    data = MixtureData(num_train=num_conditions, batch_size=num_conditions)
    trainer_of(max_epochs=num_rounds, **trainer).fit(tuner, data)
    return run


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


@torch.no_grad()
def drawn(tuner: PGRAFT, num: int = NUM_SAMPLES) -> Tensor:
    """New x_0 of the tuned model: the policy above the cut, the reference below."""
    condition = tuner.pipeline.encode({"index": torch.arange(num)})
    keep, seeds = [tuner.sampler.num_steps], range(10**6, 10**6 + num)
    (x_0,) = tuner.draw_states(condition, seeds, keep=keep, relay=tuner.relay())
    assert isinstance(x_0, Tensor)
    return x_0


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graft")


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


def calls_of(tuner: PGRAFT) -> list[tuple[str, float, int, bool]]:
    """Record (who, t, rows, with gradients) of every call of the denoiser or its frozen copy."""
    calls: list[tuple[str, float, int, bool]] = []
    setup = tuner.setup

    def recorded(stage: str) -> None:
        setup(stage)
        assert tuner.reference is not None
        modules = {"policy": tuner.pipeline.denoiser, "frozen": tuner.reference.frozen}
        for who, module in modules.items():
            if module is not None:
                module.register_forward_hook(_hook(who, calls, tuner))

    tuner.setup = recorded  # type: ignore[method-assign]
    return calls


def _hook(who: str, calls: list[Any], tuner: PGRAFT) -> Any:
    def record(module: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        for t, num in Counter(inputs[1].tolist()).items():
            disabled = tuner.lora is not None and module.residual.fc1.disable_adapters
            calls.append(("frozen" if disabled else who, t, num, torch.is_grad_enabled()))

    return record


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
@pytest.mark.parametrize(("cut", "cut_step"), [(0.25, 6), (0.5, 4), (0.0, 8), (0.8, 2)])
def test_reference_runs_the_last_steps(
    folder: Path, lora: LoRA | None, cut: float, cut_step: int
) -> None:
    tuner = tuner_of(cut=cut, lora=lora, width=8 if lora else 0)
    calls = calls_of(tuner)
    fit(tuner, default_root_dir=folder)
    assert tuner.cut_step == cut_step
    calls.clear()
    drawn(tuner, 5)
    times = tuner.pipeline.process.times(8).tolist()
    who = ["policy"] * cut_step + ["frozen"] * (8 - cut_step)
    assert calls == [(name, t, 5, False) for name, t in zip(who, times[:-1], strict=True)]
    assert tuner.tau == (times[cut_step] if cut else 0.0)
    assert all(t > tuner.tau for name, t, *_ in calls if name == "policy")


@pytest.mark.parametrize("train_from", ["intermediate", "clean"])
@pytest.mark.parametrize("cut", [0.0, 0.25, 0.5])
def test_only_levels_above_the_cut_are_trained(folder: Path, train_from: Any, cut: float) -> None:
    tuner = tuner_of(cut=cut, train_from=train_from, num_epochs=20)
    calls = calls_of(tuner)
    fit(tuner, 32, default_root_dir=folder)
    trained = np.array([t for _, t, num, grad in calls if grad for _ in range(num)])
    assert len(trained) == 32 * 20 and {who for who, *_, grad in calls if grad} == {"policy"}
    assert trained.min() > cut and trained.max() <= 1
    # Uniform above the cut: Kolmogorov-Smirnov at 99.9 %.
    assert stats.kstest(trained, "uniform", (cut, 1 - cut)).pvalue > 1e-3


@pytest.mark.parametrize("iterative", [False, True])
def test_rejected_samples_cost_nothing_after_selection(folder: Path, iterative: bool) -> None:
    tuner = tuner_of(cut=0.25, num_epochs=3, iterative=iterative, lora=LoRA(rank=2), width=8)
    calls = calls_of(tuner)
    run = fit(tuner, 8, 2, default_root_dir=folder)
    accepted = sum(map(len, run.experiences))
    assert accepted == 2 * 8
    assert sum(num for *_, num, grad in calls if grad) == accepted * 3
    rollouts = 2 * 8 * 4
    assert sum(num for *_, num, grad in calls if not grad) == rollouts * 8
    assert tuner.cost.denoiser_calls == rollouts * 8 + accepted * 3
    assert tuner.cost.reward_calls == tuner.num_samples == rollouts
    own = Counter(who for who, *_, grad in calls if not grad)
    assert own == ({"policy": 2 * 6, "frozen": 2 * 2} if iterative else {"frozen": 2 * 8})


@pytest.mark.parametrize("train_from", ["intermediate", "clean"])
def test_only_accepted_states_are_kept(folder: Path, train_from: Any) -> None:
    tuner = tuner_of(cut=0.5, train_from=train_from, reward=Coordinate(), selection=TopK(2))
    (experience,) = fit(tuner, default_root_dir=folder).experiences
    x_s = experience.states["x_s"]
    assert isinstance(x_s, Tensor) and x_s.shape == (16, 2) == (len(experience), 2)
    assert x_s.untyped_storage().nbytes() == 16 * 2 * 4 and not x_s.requires_grad
    # The seeds of accepted samples draw them again; the reference's trajectories are fixed.
    keep = [4 if train_from == "intermediate" else 8]
    with torch.no_grad():
        (again,) = tuner.draw_states(
            experience.condition, experience.seeds, keep=keep, relay=tuner.reference_relay()
        )
    torch.testing.assert_close(again, x_s)
    metrics = experience.metrics
    assert metrics["acceptance_rate"] == 0.5 and metrics["accepted_reward"] > metrics["reward"]
    assert {name: len(values) for name, values in experience.histograms.items()} == {
        "reward": 32,
        "accepted_reward": 16,
    }


def test_the_best_of_each_condition_are_accepted(folder: Path) -> None:
    tuner = tuner_of(GRAFT, reward=Coordinate(), selection=TopK(2), sampling_batch_size=5)
    (experience,) = fit(tuner, default_root_dir=folder).experiences
    rewards = experience.histograms["reward"].view(8, 4)
    best = rewards.topk(2, dim=1).values.flatten()
    kept = experience.states["x_s"]
    assert isinstance(kept, Tensor)
    torch.testing.assert_close(kept[:, 0].sort().values, best.sort().values)


def test_contrast_weighs_the_rejected_against_the_accepted(folder: Path) -> None:
    """a_i - mean(a) over the candidates of a condition; without contrast 1 for the accepted."""
    settings: dict[str, Any] = {"reward": Coordinate(), "selection": TopK(1)}
    plain, contrast = (
        fit(tuner_of(contrast=c, **settings), default_root_dir=folder).experiences[0]
        for c in (0.0, 1.0)
    )
    assert torch.equal(tensor_of(plain.states["weight"]), torch.ones(8)) and len(contrast) == 32
    weights = tensor_of(contrast.states["weight"])
    assert weights.view(8, 4).sort(dim=1).values.tolist() == [[-0.25, -0.25, -0.25, 0.75]] * 8
    accepted = tensor_of(contrast.states["x_s"])[weights > 0]
    assert torch.equal(accepted, tensor_of(plain.states["x_s"]))
    # Groups that are accepted or rejected as a whole say nothing about their members.
    for minimum in (-5.0, 5.0):
        tuner = tuner_of(contrast=1.0, selection=Threshold(minimum))
        assert len(fit(tuner, default_root_dir=folder).experiences[0]) == 0


def moved(tuner: PGRAFT, amount: float) -> PGRAFT:
    """Return a tuner that is set up, its weights moved away from the reference's."""
    tuner.trainer = trainer_of()
    tuner.setup("fit")
    with torch.no_grad():
        for i, parameter in enumerate(tuner.trainable().parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.add_(amount * noise)
    return tuner


def gradient(tuner: PGRAFT, experience: Experience, *, signed: bool = False) -> Tensor:
    """Return the gradient of the contrast, or of the loss with negative weights, by autograd."""
    noise = generators(list(experience.seeds))
    losses = tuner.loss(experience, noise)[0]
    if signed:
        plain = tuner_of(contrast=0.0, train_from="clean", cut=tuner.cut)
        plain.pipeline = tuner.pipeline
        one = {**experience.states, "weight": torch.ones(len(experience))}
        unit = Experience(one, experience.condition, experience.seeds)
        losses = plain.loss(unit, generators(list(experience.seeds)))[0]
        losses = losses * tensor_of(experience.states["weight"])
    parameters = list(tuner.trainable().parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(losses.sum(), parameters)])


def candidates_of(x_s: Tensor, weights: Sequence[float], tuner: PGRAFT) -> Experience:
    condition = tuner.pipeline.encode({"index": torch.arange(len(x_s))})
    states = {"x_s": x_s, "weight": torch.tensor(weights)}
    return Experience(states, condition, [3] * len(x_s))


@pytest.mark.parametrize("contrast", [0.5, 1.0, 16.0])
def test_contrast_starts_as_the_loss_with_negative_weights(contrast: float) -> None:
    """At the reference their gradients are parallel; elsewhere the contrast is bounded by 0."""
    tuner = moved(tuner_of(contrast=contrast, train_from="clean", cut=0.0, width=8), 0.0)
    x_s = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    experience = candidates_of(x_s, [0.75, -0.25, -0.25, -0.25], tuner)
    ours, signed = gradient(tuner, experience), gradient(tuner, experience, signed=True)
    torch.testing.assert_close(ours * contrast, signed, rtol=1e-4, atol=1e-6)
    far = moved(tuner_of(contrast=contrast, train_from="clean", cut=0.0, width=8), 3.0)
    assert (far.loss(experience, generators([3] * 4))[0] >= 0).all()


def test_contrast_has_the_optimum_that_is_stated() -> None:
    """f - f_ref = contrast / 2 (fit of accepted - fit of rejected), solved for one prediction."""
    contrast, f_ref = 6.0, torch.tensor([0.3, -0.2], dtype=torch.float64)
    process = GaussianMixturePipeline(
        schedule="rectified_flow", prediction_type="velocity", residual_width=0
    ).process
    assert isinstance(process, GaussianProcess)
    tuner = tuner_of(contrast=contrast)
    t, s = torch.full((2,), 0.5).double(), torch.zeros(2).double()
    x_s = torch.tensor([[1.0, 0.5], [-0.4, 0.8]], dtype=torch.float64)
    x_t = torch.tensor([[0.2, 0.1], [0.2, 0.1]], dtype=torch.float64)
    tuner.pipeline.predict = lambda *args: f_ref.expand(2, 2)  # type: ignore[method-assign]
    tuner.guided_loss, tuner.trainer = False, trainer_of()
    tuner.setup("fit")
    condition = tuner.pipeline.encode({"index": torch.arange(2)})
    sign = torch.tensor([1.0, -1.0])

    def loss(f: Tensor) -> Tensor:
        prediction = tuner._mirrored(f.expand(2, 2), x_t, t, condition, sign)
        return process.loss(prediction, x_s, x_t, s, t).sum()

    f = f_ref.clone().requires_grad_()
    # Quadratic: one Newton step.
    (slope,) = torch.autograd.grad(loss(f), f)
    curvature = torch.autograd.functional.hessian(loss, f.detach())
    best = f.detach() - torch.linalg.solve(curvature, slope)
    accepted, rejected = process.target(x_s, x_t, s, t)
    torch.testing.assert_close(best, f_ref + contrast / 2 * (accepted - rejected))


def test_noise_that_candidates_share_cancels() -> None:
    """Candidates that do not differ teach nothing at the reference, whatever noise they get."""
    tuner = moved(tuner_of(contrast=4.0, train_from="clean", cut=0.0, width=8), 0.0)
    same = candidates_of(torch.ones(4, 2), [0.75, -0.25, -0.25, -0.25], tuner)
    assert gradient(tuner, same).abs().max() < 1e-6
    other = Experience(same.states, same.condition, [3, 4, 5, 6])
    assert gradient(tuner, other).abs().max() > 1e-2


def test_candidates_of_a_condition_are_noised_alike(folder: Path) -> None:
    plain, contrast = (
        fit(tuner_of(contrast=c), default_root_dir=folder).experiences[0] for c in (0.0, 2.0)
    )
    assert len(set(plain.seeds)) == len(plain)
    assert [Counter(contrast.seeds)[seed] for seed in dict.fromkeys(contrast.seeds)] == [4] * 8


def test_rounds_that_accept_nothing_or_unequally(folder: Path) -> None:
    nothing = tuner_of(GRAFT, selection=Threshold(5.0))
    run = fit(nothing, num_rounds=2, default_root_dir=folder)
    assert [len(e) for e in run.experiences] == [0, 0] and nothing.num_updates == 0
    assert np.array_equal(run.weights[0], run.learned)
    some = tuner_of(GRAFT, selection=Threshold(2.0), minibatch_size=4)
    (experience,) = fit(some, default_root_dir=folder).experiences
    reward = experience.histograms["reward"]
    assert 0 < len(experience) == int((reward == 2).sum()) < 32
    assert some.num_updates == -(-len(experience) // 4)


def test_unique_takes_one_of_each_mode(folder: Path) -> None:
    tuner = tuner_of(GRAFT, selection=Unique(Threshold(1.0)), num_candidates=16)
    (experience,) = fit(tuner, default_root_dir=folder).experiences
    assert (experience.histograms["accepted_reward"] >= 1).all()
    # The data set's row that each accepted sample was drawn for, from its seed.
    seeds = tuner.sample_seeds({"index": torch.arange(8)}, 16, 10, 0)
    rows = [seeds.index(seed) // 16 for seed in experience.seeds]
    modes = nearest(experience.states["x_s"]).tolist()
    assert len(set(zip(rows, modes, strict=True))) == len(experience) > 16
    assert set(rows) == set(range(8))


def test_graft_is_p_graft_without_a_cut(folder: Path) -> None:
    runs = [
        fit(tuner, num_rounds=2, default_root_dir=folder)
        for tuner in (
            tuner_of(GRAFT, num_epochs=2),
            tuner_of(PGRAFT, cut=0.0, num_epochs=2),
            tuner_of(PGRAFT, cut=0.0, num_epochs=2, train_from="clean"),
            tuner_of(PGRAFT, cut=0.01, num_epochs=2),  # less than half a step
        )
    ]
    states = [run.tuner.pipeline.denoiser.state_dict() for run in runs]
    for state in states[1:]:
        assert all(torch.equal(states[0][name], state[name]) for name in state)
    assert not np.allclose(runs[0].learned, W, atol=1e-4)


def test_a_cut_changes_what_is_learned(folder: Path) -> None:
    learned = [
        fit(tuner_of(cut=cut, train_from=train_from), default_root_dir=folder).learned
        for cut, train_from in ((0.0, "clean"), (0.25, "clean"), (0.25, "intermediate"))
    ]
    assert all(not np.allclose(a, b) for a, b in itertools.combinations(learned, 2))


@pytest.mark.parametrize("microbatch_size", [1, 3, 4, 100])
def test_updates_do_not_depend_on_microbatches(folder: Path, microbatch_size: int) -> None:
    def learned(size: int | None) -> dict[str, Tensor]:
        tuner = tuner_of(
            cut=0.25,
            minibatch_size=7,
            microbatch_size=size,
            num_epochs=2,
            max_grad_norm=0.01,
            optimizer=lambda p: torch.optim.SGD(p, lr=10.0),
        )
        fit(tuner, 16, default_root_dir=folder)
        assert tuner.num_updates == 6
        return tuner.pipeline.denoiser.state_dict()

    whole, parts = learned(None), learned(microbatch_size)
    assert not torch.allclose(whole["logits"], torch.tensor(W).log().float(), atol=1e-3)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sampling_batch_size", [1, 5, 1000])
def test_candidates_do_not_depend_on_sampling_batches(
    folder: Path, sampling_batch_size: int
) -> None:
    sizes = (7, sampling_batch_size)
    tuners = [tuner_of(sampler=Sampler(8, 1.0), sampling_batch_size=size) for size in sizes]
    first, second = (fit(tuner, default_root_dir=folder).experiences[0] for tuner in tuners)
    assert first.seeds == second.seeds
    torch.testing.assert_close(first.states["x_s"], second.states["x_s"])


def planned(tuner: PGRAFT, num: int, counts: Sequence[int] | None, monkeypatch: Any) -> list[Any]:
    if counts:
        monkeypatch.setattr("lit_rlft.loop.updates.gather", lambda value, size: list(counts))
    rows = torch.zeros(num, dtype=torch.int64)
    states = {"x_s": torch.arange(float(num)).unsqueeze(1)}
    return tuner.updates.plan(Experience(states, Condition([{}], {}, rows), list(range(num))))


@pytest.mark.parametrize("num", [1, 4, 9, 10, 23])
def test_each_epoch_covers_the_experience_once(monkeypatch: pytest.MonkeyPatch, num: int) -> None:
    tuner = tuner_of(num_epochs=3, minibatch_size=4)
    tuner.trainer = trainer_of()
    updates = planned(tuner, num, None, monkeypatch)
    sizes = [len(update.minibatch) for update in updates]
    assert len(updates) == 3 * -(-num // 4) and max(sizes) <= 4
    assert max(sizes) - min(sizes) <= 1 and [update.total for update in updates] == sizes
    orders = []
    for epoch in range(3):
        parts = [update.minibatch for update in updates if update.epoch == epoch]
        order = [seed for part in parts for seed in part.seeds]
        assert sorted(order) == list(range(num))
        # Seeds, states and conditions stay together.
        states = torch.cat([part.states["x_s"] for part in parts])
        assert states.flatten().tolist() == order
        orders.append(order)
    if num > 4:
        assert orders[0] != orders[1] != orders[2]
    again = planned(tuner, num, None, monkeypatch)
    assert [u.minibatch.seeds for u in again] == [u.minibatch.seeds for u in updates]
    tuner.num_rounds = 1
    if num > 4:
        later = planned(tuner, num, None, monkeypatch)
        assert [u.minibatch.seeds for u in later] != [u.minibatch.seeds for u in updates]


@pytest.mark.parametrize("counts", [(9, 2, 0), (4, 4, 5), (0, 0, 0), (1, 0, 0)])
def test_processes_agree_on_the_number_and_sizes_of_updates(
    monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...]
) -> None:
    tuner = tuner_of(num_epochs=2, minibatch_size=4)
    tuner.trainer = trainer_of()
    plans = [planned(tuner, num, counts, monkeypatch) for num in counts]
    assert {len(plan) for plan in plans} == {2 * -(-max(counts) // 4)}
    for updates in zip(*plans, strict=True):
        assert {u.total for u in updates} == {sum(len(u.minibatch) for u in updates)}
    for plan, num in zip(plans, counts, strict=True):
        assert sum(len(update.minibatch) for update in plan) == 2 * num


def test_an_update_is_a_step_on_the_mean_loss_with_clipped_gradients(folder: Path) -> None:
    sgd = {"optimizer": lambda p: torch.optim.SGD(p, lr=1.0), "minibatch_size": 100}
    tuner, twin = (tuner_of(cut=0.25, max_grad_norm=0.05, **sgd) for _ in range(2))
    (experience,) = fit(tuner, default_root_dir=folder).experiences
    noise = generators([seed_from(seed, 2, 0) for seed in experience.seeds])
    losses, _ = twin.loss(experience, noise)
    assert losses.shape == (8,)
    losses.mean().backward()
    parameters = list(twin.pipeline.denoiser.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    assert norm > 0.05
    for ours, p in zip(tuner.pipeline.denoiser.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, p - p.grad * 0.05 / norm, rtol=1e-4, atol=1e-6)


class Brightness(Reward):
    """Mean of the pixels."""

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return samples.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("guided_loss", [False, True])
def test_prompts_are_encoded_once_per_round(
    tiny_stable_diffusion: Any, folder: Path, guided_loss: bool
) -> None:
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()), guidance_scale=3.0)
    rows: list[int] = []
    pipeline.encoder.register_forward_hook(lambda module, args, out: rows.append(len(out[0])))
    unet: list[tuple[int, bool]] = []
    pipeline.denoiser.register_forward_hook(
        lambda module, args, out: unet.append((len(args[0]), torch.is_grad_enabled()))
    )
    tuner = PGRAFT(
        pipeline,
        Brightness(),
        cut=0.5,
        num_candidates=3,
        sampler=Sampler(4),
        lora=LoRA(rank=2),
        num_epochs=2,
        sampling_batch_size=5,
        guided_loss=guided_loss,
    )
    prompts = ["a ring", "a red cross", "a ring", "a ring"]
    records = [{"index": i, "prompt": prompt} for i, prompt in enumerate(prompts)]
    loader = torch.utils.data.DataLoader(records, batch_size=4, collate_fn=collate)
    trainer_of(max_epochs=2, default_root_dir=folder).fit(tuner, loader)
    assert rows == [3, 3]  # two prompts and the negative one, in each of two rounds
    # Rounds, epochs or steps, accepted samples or candidates; two halves where guided.
    assert sum(num for num, grad in unet if grad) == 2 * 2 * 4 * (1 + guided_loss)
    assert sum(num for num, grad in unet if not grad) == 2 * 4 * 12 * 2
    assert tuner.cost.denoiser_calls == sum(num for num, _ in unet)
    assert tuner.num_updates == 4


def test_guided_loss_trains_what_is_sampled_from(tiny_stable_diffusion: Any) -> None:
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()), guidance_scale=3.0)
    condition = pipeline.encode({"index": torch.arange(2), "prompt": ["a ring", "a cross"]})
    states = {"x_s": torch.randn(2, 4, 2, 2), "weight": torch.ones(2)}
    experience = Experience(states, condition, [0, 1])
    losses = {}
    for guided in (False, True):
        tuner = PGRAFT(pipeline, Brightness(), guided_loss=guided)
        rows = [torch.Generator().manual_seed(i) for i in range(2)]
        losses[guided] = tuner.loss(experience, rows)[0]
    pipeline.guidance_scale = 1.0
    rows = [torch.Generator().manual_seed(i) for i in range(2)]
    plain = PGRAFT(pipeline, Brightness(), guided_loss=True).loss(experience, rows)[0]
    torch.testing.assert_close(plain, losses[False])
    assert not torch.allclose(losses[True], losses[False])


def test_rollouts_see_the_denoiser_in_evaluation_mode(folder: Path) -> None:
    """A denoiser with dropout must not sample with it."""
    tuner = tuner_of(GRAFT, lora=LoRA(rank=2), width=8)
    modes: set[tuple[bool, bool]] = set()
    tuner.pipeline.denoiser.register_forward_hook(
        lambda module, args, out: modes.add((torch.is_grad_enabled(), module.training))
    )
    fit(tuner, num_rounds=2, default_root_dir=folder)
    assert modes == {(False, False), (True, True)}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"cut": 1.0}, r"cut is 1\.0"),
        ({"cut": -0.1}, r"cut is -0\.1"),
        ({"contrast": -1.0}, "contrast must be positive"),
        ({"cut": 0.95}, "at least one of the sampler's 8 steps"),
        ({"selection": TopK(5)}, r"num_candidates \(4\)"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    folder: Path, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        fit(tuner_of(**settings), default_root_dir=folder)


def test_contrast_weighs_candidates_against_their_group() -> None:
    accepted = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    pipeline = GaussianMixturePipeline()
    weights = PGRAFT(pipeline, Coordinate(0), contrast=1.0)._weights(accepted)
    torch.testing.assert_close(weights[0], torch.tensor([0.75, -0.25, -0.25, -0.25]))
    assert not weights[1:].any()  # groups without a difference teach nothing and cost nothing
    assert torch.equal(PGRAFT(pipeline, Coordinate(0))._weights(accepted), accepted)
