"""Measurements of sets of images that no reward sees; every name says which features it is of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domains.image.networks.features import features_of, load_features
from domains.image.sources import Digits, Source
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Metric, SetMetric
from lit_rlft.kit.images import check_pictures
from lit_rlft.kit.statistics import (
    frechet_distance,
    kernel_distance,
    mmd,
    neighbour_distances,
    polynomial,
    precision_recall,
    similarity,
)

_NUM_SUBSETS = 10

__all__ = ["Diversity", "SetDistances"]


class SetDistances(SetMetric):
    """Distances of all images of an evaluation from a set of real ones.

    "fid_<f>", "kid_<f>", "precision_<f>" and "recall_<f>" with the features' name <f>. FID depends
    on the number of images: compare what has the same. Standard errors are those of drawing other
    images from the same model; the real images are taken as they are.

    Args:
        source: The real images; unless given all embedded digits, those that the embedded model was
            trained on among them.
        features: The feature network: "digits_features" or "shapes_features", which are embedded,
            a folder that `train.features` wrote, or the file of InceptionV3's weights in
            torch-fidelity's format.
        max_images: Compare with so many of the real images, drawn at random; None takes all.
        num_neighbours: k of precision and recall.
        num_draws: Bootstrap draws for the standard errors of a test; 0 leaves them out. With the
            2,048 features of InceptionV3 each takes seconds.

    Raises:
        UsageError: `features` is no feature network.
    """

    def __init__(
        self,
        source: Source | None = None,
        features: str = "digits_features",
        max_images: int | None = 2048,
        num_neighbours: int = 3,
        num_draws: int = 20,
    ) -> None:
        super().__init__()
        self.source = source or Digits()
        self.network = load_features(features)
        self.max_images, self.num_neighbours = max_images, num_neighbours
        self.num_draws = num_draws
        self._real: _Real | None = None

    @property
    def name(self) -> str:
        """What the features are called."""
        return self.network.name

    @torch.no_grad()
    def features(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the network's features of each image, {"features": [B, D]}."""
        return {"features": features_of(self.network, check_pictures(samples, condition))}

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the four distances; NaN where there are too few images."""
        real, generated = self.real_features(), features["features"]
        kid, _ = kernel_distance(real, generated, num_subsets=_NUM_SUBSETS)
        return self._values(kid, generated)

    def compare_draw(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the same, but KID of every pair at once instead of over subsets."""
        real, generated = self._reference(), features["features"]
        kid = mmd(real.features, generated, polynomial, real.similarity)
        return self._values(kid, generated)

    def real_features(self) -> Tensor:
        """Return the features of the real images, computed when first needed, [n, D]."""
        return self._reference().features

    def _values(self, kid: float, generated: Tensor) -> dict[str, float]:
        real = self._reference()
        precision, recall = precision_recall(
            real.features, generated, self.num_neighbours, real.radii
        )
        values = {
            "fid": frechet_distance(generated, real.features),
            "kid": kid,
            "precision": precision,
            "recall": recall,
        }
        return {f"{key}_{self.name}": value for key, value in values.items()}

    @torch.no_grad()
    def _reference(self) -> "_Real":
        if self._real is None:
            pixels = self.source.load().pixels
            order = np.random.default_rng(0).permutation(len(pixels))[: self.max_images]
            images = torch.from_numpy(pixels[np.sort(order)])
            features = features_of(self.network, images).cpu()
            radii = neighbour_distances(features.double(), self.num_neighbours)
            self._real = _Real(features, radii, similarity(features, polynomial))
        return self._real


@dataclass(frozen=True)
class _Real:
    """Features of the real images [n, D], their distances to neighbours [n], mean kernel."""

    features: Tensor
    radii: Tensor
    similarity: float


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
