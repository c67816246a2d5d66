"""Metrics of training see every sample that is scored, by workers too, also after a resume."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.algorithms.graft import PGRAFT
from lit_rlft.algorithms.noise_ppo import NoisePPO
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.callbacks.training_metrics import TrainingMetrics, training_values
from lit_rlft.core.checks import UsageError
from lit_rlft.core.gradient_plan import DRTune
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Metrics, Reward, WeightedSum
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.training_metric import TrainingMetric
from lit_rlft.loop.side.rewards import RewardWorkers
from tests.loop.test_reward_workers import tuner_of
from tests.support import assert_equal, trainer_of


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where tuned/ is written


class Heard(TrainingMetric):
    """Keeps the first coordinate and the reward of everything that is scored."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.zeros(0, 2)

    def features(self, samples: Any, condition: Condition, rewards: Tensor) -> dict[str, Tensor]:
        assert not rewards.requires_grad and len(rewards) == len(condition)
        return {"rows": torch.stack([samples.detach()[:, 0], rewards], dim=1)}

    def add(self, features: Mapping[str, Tensor]) -> None:
        self.rows = torch.cat([self.rows, features["rows"]])

    def values(self) -> dict[str, float]:
        return {"heard": float(len(self.rows))} if len(self.rows) else {}

    def history(self) -> dict[str, Tensor]:
        return {"rows": self.rows}

    def restore(self, history: Mapping[str, Tensor]) -> None:
        self.rows = history["rows"]


def both(normalize: bool = False) -> Reward:
    parts: dict[str, Reward] = {"a": Coordinate(0), "b": Coordinate(1)}
    return WeightedSum(parts, {"a": 2.0, "b": 0.0}, normalize=normalize)


def run(
    tuner: RewardFineTuner, ckpt_path: str | None = None, **settings: Any
) -> tuple[Heard, RewardFineTuner]:
    heard = Heard()
    tuner.metrics = Metrics([heard])
    given = {"callbacks": [TrainingMetrics()], "limit_val_batches": 1} | settings
    data = MixtureData(num_train=8, batch_size=4, num_val=2, num_test=2)
    trainer_of(**given).fit(tuner, data, ckpt_path=ckpt_path)
    return heard, tuner


THREADS = RewardWorkers(kind="thread")
SCORING: dict[str, tuple[type[RewardFineTuner], Reward, dict[str, Any]]] = {
    "p_graft": (PGRAFT, Coordinate(), {}),
    "in workers": (PGRAFT, both(), {"workers": THREADS}),
    "gdpo": (DDPO, both(), {"sampler": Sampler(3, eta=1.0), "decoupled_rewards": True}),
    "noise_ppo": (NoisePPO, Coordinate(), {}),
    "drtune": (RewardGradient, Coordinate(), {"microbatch_size": 3, "method": DRTune(k=1, m=1)}),
}


@pytest.mark.parametrize("name", SCORING)
def test_all_that_training_scores_is_heard_and_nothing_else(name: str) -> None:
    cls, reward, settings = SCORING[name]
    heard, tuner = run(tuner_of(reward, cls=cls, **settings))  # with validations
    assert len(heard.rows) == tuner.meter.total("reward_calls") > 0
    first, rewards = heard.rows.T
    torch.testing.assert_close(rewards, first * (2 if isinstance(reward, WeightedSum) else 1))
    logged = tuner.trainer.logged_metrics["train/heard"]
    assert logged == len(heard.rows) == training_values(tuner.metrics)["heard"]


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    last = str(tmp_path / "last.ckpt")
    whole, _ = run(tuner_of(Coordinate()), max_epochs=2)
    saves = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    keeping = {"callbacks": [TrainingMetrics(), saves], "enable_checkpointing": True}
    half, _ = run(tuner_of(Coordinate()), **keeping)
    resumed, tuner = run(tuner_of(Coordinate()), last, max_epochs=2)
    assert 0 < len(half.rows) < len(whole.rows)
    assert_equal(resumed.rows, whole.rows)
    heard = Heard()
    tuner.metrics = Metrics([heard])
    data = MixtureData(num_train=8, batch_size=4, num_val=2, num_test=2)
    trainer_of(callbacks=[TrainingMetrics()]).test(
        tuner, data, ckpt_path=str(tmp_path / "last.ckpt")
    )
    assert_equal(heard.rows, half.rows)


def test_rewards_whose_unit_changes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"Heard compares the rewards of all rounds.*normalize"):
        run(tuner_of(both(normalize=True)))


def test_without_such_metrics_nothing_is_kept() -> None:
    tuner = tuner_of(Coordinate())
    watch = TrainingMetrics()
    trainer_of(callbacks=[watch]).fit(tuner, MixtureData(num_train=4, batch_size=4))
    assert watch.state_dict() == {} == training_values(tuner.metrics)
    assert tuner.rollouts.scored is None
