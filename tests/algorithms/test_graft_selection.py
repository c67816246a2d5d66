"""What is accepted and kept, and how contrast weighs it against the rejected."""

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.graft import GRAFT, PGRAFT
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.randomness import generators
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.selection import (
    Classical,
    Preference,
    RandomK,
    RewardWeighted,
    Selection,
    Threshold,
    TopK,
    Unique,
)
from lit_rlft.core.state import tensor_of
from lit_rlft.loop.experience import Experience
from tests.algorithms.graft_support import Guided, fit, nearest, tuner_of
from tests.support import trainer_of


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
        (again,) = tuner.rollouts.draw(
            tuner.reference_route(), experience.condition, experience.seeds, keep=keep
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


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("contrast", [0.0, 2.0])
def test_the_losses_by_hand_after_the_model_has_moved(contrast: float, guided: bool) -> None:
    """The mirror is the frozen reference, and both predict as the sampler does if asked to."""
    pipeline = Guided(schedule="rectified_flow", prediction_type="velocity", residual_width=8)
    settings: dict[str, Any] = {"cut": 0.5, "sampler": Sampler(8), "guided_loss": guided}
    tuner = moved(PGRAFT(pipeline, Coordinate(), contrast=contrast, **settings), 0.3)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0]) if contrast else torch.ones(4)
    x_s = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    experience = candidates_of(x_s, (signs * torch.tensor([0.5, 0.25, 2.0, 1.0])).tolist(), tuner)
    losses = tuner.loss(experience, generators(range(4)))[0]
    noise, process = generators(range(4)), pipeline.process
    t = tuner.relay.random_times(process, 8, x_s, noise)
    s = torch.full_like(t, 0.5)
    x_t = process.noised(x_s, s, t, noise)
    assert tuner.reference.frozen is not None
    f, f_ref = (
        (1.5 if guided else 1.0) * denoiser(x_t, t)
        for denoiser in (pipeline.denoiser, tuner.reference.frozen)
    )
    assert (f - f_ref).abs().max() > 0.1
    if contrast:
        f = f_ref + signs.unsqueeze(1) * (f - f_ref) / contrast
    weights = torch.tensor([0.5, 0.25, 2.0, 1.0])
    torch.testing.assert_close(losses, weights * process.loss(f, x_s, x_t, s, t))
    (found,) = torch.autograd.grad(losses.sum(), pipeline.denoiser.means)
    assert found.abs().max() > 0


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


def test_the_accepted_reward_is_a_weighted_mean(folder: Path) -> None:
    """Also where only some of the weights are left, which sum to their number no longer."""
    tuner = tuner_of(GRAFT, reward=Coordinate(), selection=Unique(RewardWeighted(0.2)))
    (experience,) = fit(tuner, default_root_dir=folder).experiences
    weights, rewards = (
        tensor_of(experience.states["weight"]),
        experience.histograms["accepted_reward"],
    )
    assert len(weights) == len(rewards) < 32 and abs(float(weights.mean()) - 1) > 0.1
    mean = float((weights * rewards).sum() / weights.sum())
    assert experience.metrics["accepted_reward"] == pytest.approx(mean, rel=1e-5)


def test_unique_takes_one_of_each_mode(folder: Path) -> None:
    tuner = tuner_of(GRAFT, selection=Unique(Threshold(1.0)), num_candidates=16)
    (experience,) = fit(tuner, default_root_dir=folder).experiences
    assert (experience.histograms["accepted_reward"] >= 1).all()
    # The data set's row that each accepted sample was drawn for, from its seed.
    seeds = tuner.rollouts.seeds({"index": torch.arange(8)}, 16, 10, 0)
    rows = [seeds.index(seed) // 16 for seed in experience.seeds]
    modes = nearest(experience.states["x_s"]).tolist()
    assert len(set(zip(rows, modes, strict=True))) == len(experience) > 16
    assert set(rows) == set(range(8))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"cut": 1.0}, r"cut must be in \[0, 1\), got 1\.0"),
        ({"cut": -0.1}, r"cut must be in \[0, 1\), got -0\.1"),
        ({"contrast": -1.0}, "contrast must be at least 0"),
        ({"cut": 0.95}, "at least one of the sampler's 8 steps"),
        ({"selection": TopK(5)}, "k is 5, more than the 4 candidates"),
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
    known = torch.ones_like(accepted, dtype=torch.bool)
    weights = PGRAFT(pipeline, Coordinate(0), contrast=1.0)._weights(accepted, known)
    torch.testing.assert_close(weights[0], torch.tensor([0.75, -0.25, -0.25, -0.25]))
    assert not weights[1:].any()  # groups without a difference teach nothing and cost nothing
    assert torch.equal(PGRAFT(pipeline, Coordinate(0))._weights(accepted, known), accepted)
    known[0, 3] = False  # it could not be scored: no member of its group
    weights = PGRAFT(pipeline, Coordinate(0), contrast=1.0)._weights(accepted, known)
    torch.testing.assert_close(weights[0], torch.tensor([2 / 3, -1 / 3, -1 / 3, 0.0]))


@pytest.mark.parametrize(
    "selection", [TopK(3), Threshold(-100.0), Preference(), Classical(r_max=-50.0), RandomK(4)]
)
def test_candidates_that_could_not_be_scored_are_left_out(
    folder: Path, selection: Selection
) -> None:
    class Sometimes(Coordinate):
        """Fails for the first two candidates of each condition, and for one whole condition."""

        def forward(self, samples: Any, condition: Condition) -> Tensor:
            rewards = super().forward(samples, condition).view(-1, 4).clone()
            rewards[:, :2] = torch.tensor([torch.nan, torch.inf])
            rewards[3] = torch.nan
            return rewards.flatten()

    tuner = tuner_of(cut=0.5, reward=Sometimes(), selection=selection)
    settings: dict[str, Any] = {"limit_val_batches": 0, "default_root_dir": folder}
    (experience,) = fit(tuner, **settings).experiences
    assert experience.metrics["failed_rewards"] == pytest.approx((7 * 2 + 4) / 32)
    assert np.isfinite(experience.metrics["reward"]) and experience.counts is not None
    assert experience.counts[3] == 0 and 0 < max(experience.counts) <= 2
    assert experience.histograms["accepted_reward"].isfinite().all()
    assert len(experience.histograms["reward"]) == 14


class Odd(Selection):
    """Returns what it is told to, which is no bit per candidate."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def __call__(self, rewards: Tensor, keys: Any = None, noise: Any = None) -> Tensor:
        found: Tensor = self.found
        return found


@pytest.mark.parametrize(
    ("found", "given"), [(None, "None"), (torch.ones(32, dtype=torch.bool), r"\(32,\)")]
)
def test_a_selection_that_returns_no_bits_is_named(folder: Path, found: Any, given: str) -> None:
    tuner = tuner_of(GRAFT, reward=Coordinate(), selection=Odd(found))
    with pytest.raises(UsageError, match=f"Odd returned {given}; a selection returns a .*tensor"):
        fit(tuner, default_root_dir=folder)


def test_a_round_that_accepts_nothing_is_warned_of_once(folder: Path) -> None:
    tuner = tuner_of(GRAFT, reward=Coordinate(), selection=Threshold(1e9))
    with pytest.warns(UserWarning, match="none of the 32 candidates of round 1, .*selection") as w:
        fit(tuner, num_rounds=2, default_root_dir=folder)
    assert sum("Threshold accepted none" in str(one.message) for one in w) == 1
    assert tuner.num_updates == 0


def test_rules_that_need_classes_are_refused_where_samples_have_none() -> None:
    class Nameless(GaussianMixturePipeline):
        keys = Pipeline.keys  # type: ignore[assignment]

    settings = {"num_candidates": 4, "sampler": Sampler(4)}
    GRAFT(Nameless(), Coordinate(), selection=Threshold(0.0), **settings).setup("fit")
    with pytest.raises(UsageError, match="selection: Unique needs equivalence classes of samples"):
        GRAFT(Nameless(), Coordinate(), selection=Unique(Threshold(0.0)), **settings).setup("fit")


@pytest.mark.parametrize(
    ("rule", "candidates", "warns"),
    [(TopK(1), 1, True), (TopK(4), 4, True), (TopK(3), 4, False), (RandomK(4), 4, False)],
)
def test_a_rule_that_accepts_everything_is_told(rule: TopK, candidates: int, warns: bool) -> None:
    tuner = GRAFT(GaussianMixturePipeline(), Coordinate(), selection=rule)
    tuner.num_candidates = candidates
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuner.check()
    told = ["nothing is selected; raise num_candidates" in str(one.message) for one in caught]
    assert any(told) == warns
