"""Parts of a sum brought to mean 0 and deviation 1 over all samples that a run has trained on."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate, Quadratic
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.algorithms.graft import PGRAFT
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Product, Reward, WeightedSum
from lit_rlft.core.sampling import Sampler
from lit_rlft.cost.meter import Meter
from lit_rlft.evaluation.jackknife import Moments
from lit_rlft.loop.rollouts import Rollouts
from lit_rlft.loop.scoring import Scoring
from lit_rlft.loop.side.rewards import RewardWorkers, SideReward
from tests.loop.side_rewards import Sums
from tests.support import assert_equal, trainer_of
from tests.test_distributed import processes

WEIGHTS = {"a": 1.0, "b": 0.5, "c": 0.01}


def reward_of(**settings: Any) -> WeightedSum:
    parts: dict[str, Reward] = {"a": Coordinate(), "b": Quadratic(), "c": Coordinate(1)}
    given = {"ranges": {"c": (-1.0, 1.0)}, "limits": {"a": (None, 1.0)}, "normalize": True}
    return WeightedSum(parts, WEIGHTS, **{**given, **settings})


def points(num: int) -> tuple[Tensor, Condition]:
    generator = torch.Generator().manual_seed(4)
    condition = GaussianMixturePipeline().example().repeat(num)
    return torch.randn(num, 2, generator=generator), condition


def scoring_of(reward: Reward, chunk_size: int, *, by_part: bool = False) -> Scoring:
    rollouts = Rollouts(GaussianMixturePipeline(), reward, chunk_size, 0, Meter())
    return Scoring(rollouts, by_part=by_part)


def by_hand(so_far: Tensor, samples: Tensor) -> Tensor:
    """Return a weighted sum's parts [n, 3], given all samples of the run so far."""

    def raw(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, 0].clamp(max=1.0).double(), -x.square().sum(dim=1).double()

    pairs = zip(raw(samples), raw(so_far), strict=True)
    a, b = ((own - every.mean()) / every.std(correction=0) for own, every in pairs)
    return torch.stack([a, b, (samples[:, 1].double() + 1) / 2], dim=1)


@pytest.mark.parametrize("chunk_size", [3, 64])
def test_all_samples_so_far_are_the_unit(chunk_size: int) -> None:
    reward, (samples, condition) = reward_of(), points(24)
    for end in (8, 24):
        x, rows = samples[end - 8 : end], condition.index(slice(0, 8))
        if end == 24:  # a round of which nothing else is known
            scoring_of(reward, chunk_size).finish(samples[8:16], rows, range(8), 1)
        found = scoring_of(reward, chunk_size).finish(x, rows, range(8), 1).rewards
        expected = by_hand(samples[:end], x) @ torch.tensor([*WEIGHTS.values()]).double()
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    # Evaluations use the unit and do not change it.
    state = {name: own.state_dict() for name, own in reward.moments.items()}
    values = reward.evaluate(x, rows)
    torch.testing.assert_close(values["WeightedSum"], found)
    assert_equal(values["a"], x[:, 0])
    assert {name: own.state_dict() for name, own in reward.moments.items()} == state
    assert state.keys() == {"a", "b"} and state["a"]["count"] == 24


def test_parts_for_themselves_are_in_the_same_unit() -> None:
    samples, condition = points(8)
    scoring = scoring_of(reward_of(), 3, by_part=True)
    found = scoring.finish(samples, condition, range(8), 1)
    assert scoring.rollouts.meter.current.reward_calls == 8
    torch.testing.assert_close(
        found.rewards.double(), by_hand(samples, samples), rtol=1e-5, atol=1e-6
    )


def test_processes_share_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, condition = points(9)
    seeds = [7, 3, 8, 1, 9, 2, 4, 6, 5]
    alone = reward_of()
    whole = scoring_of(alone, 4).finish(samples, condition, seeds, 1).rewards
    own, rows = [reward_of(), reward_of()], [[0, 3, 4, 8, 1], [2, 5, 6, 7]]

    def work(rank: int) -> Tensor:
        mine = torch.tensor(rows[rank])
        numbers = [seeds[i] for i in rows[rank]]
        return (
            scoring_of(own[rank], 4)
            .finish(samples[mine], condition.index(mine), numbers, 2)
            .rewards
        )

    for rank, found in enumerate(processes(monkeypatch, 2, work)):
        assert_equal(found, whole[rows[rank]])
        for name, moments in alone.moments.items():
            assert own[rank].moments[name].state_dict() == moments.state_dict()


def fit(cls: type[RewardFineTuner], folder: Path, rounds: int, path: Path | None = None) -> Any:
    torch.manual_seed(2)
    pipeline = GaussianMixturePipeline(
        schedule="rectified_flow", prediction_type="velocity", residual_width=4
    )
    settings: dict[str, Any] = {"sampler": Sampler(3, eta=1.0), "num_eval_samples": 1}
    tuner = cls(pipeline, reward_of(), lora=None, **settings)
    data = MixtureData(num_train=16, batch_size=4, num_val=2, num_test=2)
    trainer = trainer_of(max_steps=-1, limit_train_batches=4, default_root_dir=folder)
    trainer.fit_loop.max_epochs = rounds
    trainer.fit(tuner, data, ckpt_path=path)
    trainer.save_checkpoint(folder / f"{rounds}.ckpt")
    return tuner


@pytest.mark.parametrize("cls", [PGRAFT, pytest.param(DDPO, marks=pytest.mark.slow)])
def test_a_resumed_run_goes_on_bit_for_bit(cls: type[RewardFineTuner], tmp_path: Path) -> None:
    whole = fit(cls, tmp_path, 2)
    fit(cls, tmp_path, 1)
    resumed = fit(cls, tmp_path, 2, tmp_path / "1.ckpt")
    assert_equal(whole.trainable().state_dict(), resumed.trainable().state_dict())
    for name, moments in whole.reward.moments.items():
        assert moments.state_dict() == resumed.reward.moments[name].state_dict()
        assert moments.count == 2 * 4 * 4 * 4
    loaded = cls.load_from_checkpoint(
        tmp_path / "2.ckpt", pipeline=GaussianMixturePipeline(
            schedule="rectified_flow", prediction_type="velocity", residual_width=4
        ), reward=reward_of(), lora=None,
    )  # fmt: skip
    assert loaded.reward.moments["b"].state_dict() == whole.reward.moments["b"].state_dict()


def test_parts_in_workers_have_the_same_unit() -> None:
    samples, condition = points(8)
    reward = WeightedSum({"a": Sums(), "b": Sums(3.0)}, normalize=True)
    plain = scoring_of(reward, 3).finish(samples, condition, range(8), 1).rewards
    other = WeightedSum({"a": Sums(), "b": Sums(3.0)}, normalize=True)
    aside = RewardWorkers(kind="thread").beside(other, rank=0)
    assert_equal(scoring_of(aside, 3).finish(samples, condition, range(8), 1).rewards, plain)
    for part in other.rewards.values():
        assert isinstance(part, SideReward)
        part.stop()


def test_only_a_whole_reward_is_normalised() -> None:
    inner = WeightedSum({"a": Coordinate()}, normalize=True)
    with pytest.raises(UsageError, match=r"without normalize in its parts \['b'\]"):
        Product({"a": Coordinate(), "b": inner})


def test_a_model_that_does_not_change_gains_nothing(tmp_path: Path) -> None:
    """The unit changes with every round; the reference's kept values follow it."""
    reward = WeightedSum({"a": Coordinate(), "b": Quadratic()}, normalize=True)
    tuner = DDPO(
        GaussianMixturePipeline(),
        reward,
        sampler=Sampler(4, 1.0),
        optimizer=partial(torch.optim.SGD, lr=0.0),
        num_candidates=4,
    )
    found: list[dict[str, Moments]] = []

    class Look(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            found.append(tuner.evaluator.latest["gain"])

    settings = {"max_epochs": 1, "val_check_interval": 1, "limit_train_batches": 4}
    settings |= {"limit_val_batches": 1}
    trainer = trainer_of(default_root_dir=tmp_path, callbacks=[Look()], **settings)
    trainer.fit(tuner, MixtureData(num_train=64, num_val=16, batch_size=8))
    assert len(found) >= 4
    units = {float(reward.moments[name].mean) for name in reward.moments}
    assert 0.0 not in units
    for gain in found:
        assert [own["mean"] for own in gain.values()] == pytest.approx([0.0] * len(gain), abs=1e-6)
