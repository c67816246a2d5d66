"""DataModule of the Gaussian mixture: conditions, and points drawn from the mixture."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from domains.gaussian_mixture.closed_form.mixture import MEANS, STDS, WEIGHTS, Mixture
from lit_rlft.core.checks import at_least
from lit_rlft.kit.data import Rows, Split, SplitData

__all__ = ["MixtureData"]


class MixtureData(SplitData):
    """Rows `{"index", "name": "mixture", "x_0": [d]}`; Pretrain learns from the points.

    Args:
        weights: [K] weights of the components, as in the pipeline.
        means: [K, d] means.
        stds: [K] standard deviations.
        num_train: Rows of the training split.
        num_val: Rows of the validation split.
        num_test: Rows of the test split.
        **loading: Arguments of the loaders: batch_size, eval_batch_size, seed, num_workers.

    Raises:
        UsageError: The mixture's settings do not fit together.
    """

    def __init__(
        self,
        weights: Sequence[float] = WEIGHTS,
        means: Sequence[Sequence[float]] = MEANS,
        stds: Sequence[float] = STDS,
        *,
        num_train: int = 1024,
        num_val: int = 64,
        num_test: int = 256,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        self.mixture = Mixture.of(weights, means, stds, self)
        at_least(1, self, num_train=num_train, num_val=num_val, num_test=num_test)
        self.sizes = {"train": num_train, "val": num_val, "test": num_test}

    def rows(self, split: Split) -> Dataset[dict[str, Any]]:
        stream = 3 * self.seed + list(self.sizes).index(split)
        points = self.mixture.sample(self.sizes[split], torch.Generator().manual_seed(stream))
        return Rows(len(points), lambda i: {"name": "mixture", "x_0": points[i].float()})
