"""Best-of-n baselines: order statistics of the reference's rewards, at the cost that is stated."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.cli import main
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import WeightedSum
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import tensor_of
from lit_rlft.evaluation.best_of import best_of
from tests.support import arguments, report, trainer_of, working_directory

NUM, N = 4096, 4
CONFIGS = ("configs/domains/gaussian_mixture.yaml", "configs/algorithms/graft.yaml")


def tuner_of(eta: float, num_steps: int = 8) -> GRAFT:
    sampler = Sampler(num_steps, eta)
    tuner = GRAFT(GaussianMixturePipeline(), Coordinate(), sampler=sampler, sampling_batch_size=999)
    tuner.trainer = trainer_of()
    tuner.setup("test")
    return tuner


@torch.no_grad()
def rewards_of(eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return [NUM] rewards of the reference's own samples, of the best, and of the best noise."""
    tuner = tuner_of(eta)
    condition = tuner.pipeline.encode({"index": torch.arange(NUM)})
    seeds = list(range(NUM))
    (own,) = tuner.rollouts.draw(tuner.reference_route(), condition, seeds, keep=[8])
    arms = best_of(tuner.rollouts, tuner.reference_route(), condition, seeds, N)
    assert list(arms) == ["best_of_4_samples", "best_of_4_noise"]
    assert tuner.meter.training.reward_calls == N * NUM
    first, second, third = (tensor_of(x)[:, 0] for x in (own, *arms.values()))
    return first, second, third


def expected_best(rewards: Tensor) -> tuple[float, float]:
    """Return mean and standard error of the best of N, from the samples of one."""
    ranks = torch.arange(1, len(rewards) + 1, dtype=torch.float64) / len(rewards)
    weights = ranks**N - (ranks - 1 / len(rewards)) ** N
    ordered = rewards.double().sort().values
    mean = float(weights @ ordered)
    spread = float(weights @ (ordered - mean).square()) ** 0.5
    return mean, spread * (2 / len(rewards)) ** 0.5  # both sides are estimates


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_best_samples_are_an_order_statistic(eta: float) -> None:
    own, samples, _ = rewards_of(eta)
    mean, error = expected_best(own)
    assert float(samples.double().mean()) == pytest.approx(mean, abs=4 * error)
    assert (samples >= own - 1e-5).all()  # the reference's own sample is a candidate


@pytest.mark.slow
def test_the_best_noise_is_worth_what_the_sampler_keeps_of_it() -> None:
    """All of it where the sampler is deterministic; less where it adds noise of its own."""
    own, samples, noise = rewards_of(0.0)
    assert torch.equal(samples, noise)
    own, samples, noise = rewards_of(1.0)
    error = float(own.std()) / NUM**0.5
    assert own.mean() - 4 * error < noise.mean() < samples.mean() - 10 * error
    own_half, samples_half, noise_half = rewards_of(0.3)
    assert own_half.mean() + 10 * error < noise_half.mean() < samples_half.mean()


def test_the_best_noise_starts_where_the_best_sample_did() -> None:
    """With next to no noise on the way a fresh sample from there is next to the best one."""
    tuner = tuner_of(1e-3)
    condition, seeds = tuner.pipeline.encode({"index": torch.arange(16)}), list(range(16))
    arms = best_of(tuner.rollouts, tuner.reference_route(), condition, seeds, N).values()
    samples, noise = (tensor_of(x_0) for x_0 in arms)
    torch.testing.assert_close(noise, samples, rtol=0, atol=0.05)
    assert not torch.equal(noise, samples)


def test_a_fresh_sample_has_noise_that_no_candidate_had(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, seen = tuner_of(1.0), []
    chunks = tuner.rollouts.chunks

    def watched(condition: Condition, seeds: Any = None, label: Any = None) -> Any:
        seen.extend(seeds or [])
        return chunks(condition, seeds, label)

    monkeypatch.setattr(tuner.rollouts, "chunks", watched)
    condition = tuner.pipeline.encode({"index": torch.arange(3)})
    best_of(tuner.rollouts, tuner.reference_route(), condition, [5, 6, 7], N)
    assert len(seen) == len(set(seen)) == 3 * (N + 1) and {5, 6, 7} < set(seen)


def test_the_best_are_chosen_in_the_present_unit() -> None:
    """A normalised reward learns nothing from the samples of an evaluation."""
    tuner, reward = tuner_of(0.0), WeightedSum({"a": Coordinate()}, normalize=True)
    reward.learn({"a": torch.tensor([0.0, 2.0])})
    tuner.rollouts.reward = reward
    condition = tuner.pipeline.encode({"index": torch.arange(3)})
    best_of(tuner.rollouts, tuner.reference_route(), condition, [5, 6, 7], N)
    assert reward.moments["a"].state_dict()["count"] == 2


def test_through_the_command_line(tmp_path: Path) -> None:
    settings = {
        "data.init_args.num_test": 8,
        "data.init_args.eval_batch_size": 3,
        "model.init_args.num_eval_samples": 2,
        "model.init_args.sampler.num_steps": 3,
        "model.init_args.sampler.eta": 0,
        "model.init_args.best_of": 3,
        "trainer.enable_progress_bar": False,
        "name": "run",
    }
    with working_directory(tmp_path):
        main(arguments("test", CONFIGS, settings))
        metrics = report()
    arms = ("reference", "best_of_3_samples", "best_of_3_noise")
    assert set(metrics["best_of_3_noise"]) >= {"Coordinate"}
    own, samples, noise = (metrics[arm]["Coordinate"]["mean"] for arm in arms)
    assert samples == noise > own  # with a deterministic sampler
    tuned, rows = metrics["tuned"]["Coordinate"]["mean"], metrics["kept"]["Coordinate"]
    assert rows["mean"] == pytest.approx((tuned - own) / (samples - own), abs=1e-9)
    assert metrics["num_samples"] == 16 and metrics["cost"]["test_reward_calls"] == 16 * 3
    assert metrics["cost"]["test_denoiser_calls"] == 16 * 3 * (2 + 3)


def test_one_is_no_choice() -> None:
    with pytest.raises(UsageError, match=r"best_of must be 0 for none, or above 1"):
        GRAFT(GaussianMixturePipeline(), Coordinate(), best_of=1).setup("test")


class Unreliable(Coordinate):
    """Fails for what lies high."""

    def forward(self, samples: Tensor, condition: Condition) -> Tensor:
        values = super().forward(samples, condition)
        return values.where(samples[:, 1] < 0.3, torch.nan)


def test_what_cannot_be_scored_is_not_chosen() -> None:
    tuner = tuner_of(1.0)
    tuner.rollouts.reward = Unreliable()
    condition = tuner.pipeline.encode({"index": torch.arange(256)})
    seeds = list(range(256))
    samples, _ = best_of(tuner.rollouts, tuner.reference_route(), condition, seeds, N).values()
    low = float((tensor_of(samples)[:, 1] < 0.3).double().mean())
    assert low > 0.8  # all four fail for the others; where a NaN is the largest it is 0.03
