"""Measurements of sets of images that no reward sees; every name says which features it is of."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domains.image.distances import (
    Statistic,
    bootstrap_error,
    frechet_distance,
    kernel_distance,
    polynomial_mmd,
    precision_recall,
)
from domains.image.features import features_of, load_features
from domains.image.sources import Digits, Source
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Metric, of_batch
from lit_rlft.pictures import check_pictures

_NUM_SUBSETS = 10

__all__ = ["Diversity", "Estimate", "SetDistances", "compare_sets"]


@dataclass(frozen=True)
class Estimate:
    """A number and its bootstrap standard error."""

    value: float
    sem: float


class SetDistances(Metric):
    """Distances of a batch of images from a set of real ones, over the batch as a whole.

    "fid_<f>", "kid_<f>", "precision_<f>" and "recall_<f>" with the features' name <f>, each at the
    batch's first image and NaN at the others, so that a mean over images is one over batches. FID
    depends on the number of images: compare what has the same batch size.

    Args:
        source: The real images; unless given all embedded digits, those that the embedded model was
            trained on among them.
        features: The feature network: "digits_features" or "shapes_features", which are embedded,
            a folder that `train_features` wrote, or the file of InceptionV3's weights in
            torch-fidelity's format.
        max_images: Compare with so many of the real images, drawn at random; None takes all.
        num_neighbours: k of precision and recall.

    Raises:
        UsageError: `features` is no feature network.
    """

    def __init__(
        self,
        source: Source | None = None,
        features: str = "digits_features",
        max_images: int | None = 2048,
        num_neighbours: int = 3,
    ) -> None:
        super().__init__()
        self.source = source or Digits()
        self.network = load_features(features)
        self.max_images, self.num_neighbours = max_images, num_neighbours
        self._real: Tensor | None = None

    @property
    def name(self) -> str:
        """What the features are called."""
        return self.network.name

    @torch.no_grad()
    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the distances, [B] each."""
        generated = features_of(self.network, check_pictures(samples, condition))
        real = self.real_features()
        precision, recall = precision_recall(real, generated, self.num_neighbours)
        values = {
            "fid": frechet_distance(real, generated),
            "kid": kernel_distance(real, generated, num_subsets=_NUM_SUBSETS)[0],
            "precision": precision,
            "recall": recall,
        }
        return of_batch({f"{key}_{self.name}": v for key, v in values.items()}, len(generated))

    def real_features(self) -> Tensor:
        """Return the features of the real images, computed when first needed, [n, D]."""
        if self._real is None:
            pixels = self.source.load().pixels
            order = np.random.default_rng(0).permutation(len(pixels))[: self.max_images]
            images = torch.from_numpy(pixels[np.sort(order)])
            self._real = features_of(self.network, images)
        return self._real


class Diversity(Metric):
    """Mean distance of an image to the others of its batch, root mean square over pixels.

    0 when all look the same; a fall below the reference's is the first sign that a reward is being
    exploited.
    """

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return {"diversity": [B]}, in [0, 1], NaN for a batch of one."""
        flat = check_pictures(samples, condition).detach().float().flatten(1)
        # The faster way by a matrix product makes equal images differ.
        distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
        return {"diversity": distances.sum(dim=1) / (flat.shape[1] ** 0.5 * (len(flat) - 1))}


def compare_sets(
    metric: SetDistances,
    pictures: Tensor,
    *,
    num_draws: int = 100,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Return FID, KID, precision and recall of a whole set of images, with bootstrap errors.

    For tables; the names are `SetDistances`' own. Errors are those of drawing other images from
    the same model; the real images are taken as they are.

    Args:
        metric: Real images and features.
        pictures: [n, 3, H, W], uint8 or floating point in [0, 1].
        num_draws: Bootstrap sets; 0 leaves the errors out, as NaN.
        seed: Of the bootstrap.

    Raises:
        UsageError: There are too few images for precision and recall.
    """
    if len(pictures) <= metric.num_neighbours:
        raise UsageError(
            f"{len(pictures)} images are too few to compare; draw more than {metric.num_neighbours}"
        )
    real, generated = metric.real_features(), features_of(metric.network, pictures)
    neighbours = partial(precision_recall, num_neighbours=metric.num_neighbours)
    statistics: dict[str, Statistic] = {
        "fid": frechet_distance,
        "kid": polynomial_mmd,  # its mean over all subsets
        "precision": lambda a, b: neighbours(a, b)[0],
        "recall": lambda a, b: neighbours(a, b)[1],
    }
    return {
        f"{name}_{metric.name}": Estimate(
            statistic(real, generated),
            bootstrap_error(statistic, real, generated, num_draws=num_draws, seed=seed),
        )
        for name, statistic in statistics.items()
    }
