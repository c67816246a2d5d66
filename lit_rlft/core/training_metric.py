"""Measurements of what training scores, where metrics measure what an evaluation draws."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Metric

__all__ = ["TrainingMetric"]


class TrainingMetric(Metric):
    """A measurement of all samples that training scores, such as the best ones over reward calls.

    It stands among the metrics, costs no sample and no reward call of its own, and survives a
    resume (`callbacks.TrainingMetrics`).
    """

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return nothing: an evaluation's samples do not count."""
        return {}

    @abstractmethod
    def features(self, samples: Any, condition: Condition, rewards: Tensor) -> dict[str, Tensor]:
        """Return what `add` needs of decoded samples, [n, ...] each, on the CPU.

        Args:
            samples: B decoded samples; n of them may count.
            condition: One row per sample.
            rewards: [B], without a graph, NaN where scoring failed.
        """

    @abstractmethod
    def add(self, features: Mapping[str, Tensor]) -> None:
        """Take in the samples of a round.

        Args:
            features: Those of all chunks and processes, in an order that depends on the number of
                processes: nothing else may.
        """

    @abstractmethod
    def values(self) -> dict[str, float]:
        """Return named numbers of all rounds so far; none before the first sample."""

    @abstractmethod
    def history(self) -> dict[str, Tensor]:
        """Return what a resumed run needs."""

    @abstractmethod
    def restore(self, history: Mapping[str, Tensor]) -> None:
        """Take what `history` returned."""
