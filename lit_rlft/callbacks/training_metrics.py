"""Gives metrics of training what it scores; logs, keeps and reports their numbers."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Metric, WeightedSum
from lit_rlft.core.training_metric import TrainingMetric
from lit_rlft.distributed import gather

__all__ = ["TrainingMetrics", "training_metrics", "training_values"]

Features = Mapping[str, Tensor]


class TrainingMetrics(Callback):
    """Shows every sample that training scores to the metrics of training, if there are any.

    Their numbers go to the log under `train/` after every round, and their history into the
    checkpoint, so that a resumed run goes on counting and a test knows them.
    """

    def __init__(self) -> None:
        self._heard: dict[str, list[Features]] = {}
        self._restored: dict[str, Features] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the reward and go on where the checkpoint ends."""
        assert isinstance(pl_module, RewardFineTuner)
        self._restore(pl_module)
        reward, found = pl_module.reward, training_metrics(pl_module.metrics)
        if found and isinstance(reward, WeightedSum) and reward.moments:
            raise UsageError(
                f"{type(next(iter(found.values()))).__name__} compares the rewards of all rounds, "
                "but reward.init_args.normalize changes their unit from round to round; set it to "
                "false and give reward.init_args.ranges"
            )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the training of the checkpoint that is tested."""
        self._restore(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Listen to what is scored."""
        assert isinstance(pl_module, RewardFineTuner)
        metrics = training_metrics(pl_module.metrics)
        self._heard = {name: [] for name in metrics}

        def hear(samples: Any, condition: Condition, rewards: Tensor) -> None:
            for name, metric in metrics.items():
                self._heard[name].append(metric.features(samples, condition, rewards))

        if metrics:
            pl_module.rollouts.scored = hear

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell the metrics what all processes have scored, and log their numbers."""
        assert isinstance(pl_module, RewardFineTuner)
        pl_module.rollouts.scored = None
        for name, metric in training_metrics(pl_module.metrics).items():
            parts = [one for own in gather(self._heard[name], trainer.world_size) for one in own]
            if parts:
                metric.add({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
            for key, value in metric.values().items():
                pl_module.log(f"train/{key}", value)
            self._restored[name] = metric.history()

    def state_dict(self) -> dict[str, Any]:
        return {name: dict(history) for name, history in self._restored.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = dict(state_dict)

    def _restore(self, module: LightningModule) -> None:
        assert isinstance(module, RewardFineTuner)
        for name, metric in training_metrics(module.metrics).items():
            if name in self._restored:
                metric.restore(self._restored[name])


def training_metrics(metrics: Metric) -> dict[str, TrainingMetric]:
    """Return the metrics of training among a run's metrics, by their place in it."""
    named = metrics.named_modules()
    return {name: metric for name, metric in named if isinstance(metric, TrainingMetric)}


def training_values(metrics: Metric) -> dict[str, float]:
    """Return the numbers of all metrics of training."""
    found = training_metrics(metrics).values()
    return {name: value for metric in found for name, value in metric.values().items()}
