"""Measurements of sets of images that no reward sees; every name tells its features."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from domains.image.networks.features import features_of, load_features
from domains.image.samples import check_pictures
from domains.image.saved_moments import read_moments
from domains.image.sources import Digits, Source
from lit_rlft.core.checks import at_least, reading
from lit_rlft.core.guard import LARGE_FALL, LARGE_RISE, Guard
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.reward import LeftOut, Metric
from lit_rlft.kit.leave_out import frechet_left_out, precision_recall_left_out
from lit_rlft.kit.set_metrics import RealFeatures, SourceDistances, pseudo_values, sums_over_others
from lit_rlft.kit.sources import prepare
from lit_rlft.kit.statistics import FittedGaussian, neighbour_distances, precision_recall

__all__ = ["Diversity", "FrechetDistance", "SetDistances"]


class SetDistances(SourceDistances["_Real"]):
    """FID, KID, precision and recall of all images of an evaluation against real ones.

    "fid_<f>", "kid_<f>", "precision_<f>" and "recall_<f>" with the features' name <f>. FID depends
    on the number of images: compare runs with equally many. Standard errors are those of drawing
    other images from the same model; the real images are taken as they are.

    Args:
        source: The real images; unless given, all embedded digits, including those that the
            embedded model was trained on.
        features: The feature network: "digits_features" or "shapes_features", which are embedded,
            a folder that `train.features` wrote, or the file of InceptionV3's weights in
            torch-fidelity's format.
        max_images: Compare with so many of the real images, drawn at random; None takes all.
        num_neighbours: k of precision and recall.
        num_draws: 0 leaves the standard errors of a test out; they all have closed forms here.

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
        super().__init__(num_draws)
        at_least(2, self, max_images=max_images)
        at_least(1, self, num_neighbours=num_neighbours)
        self.source = source or Digits()
        with reading(self, "features"):
            self.network = load_features(features)
        self.max_images, self.num_neighbours = max_images, num_neighbours

    def check(self, pipeline: Pipeline) -> None:
        prepare(self, "source", self.source)

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
        known, radii, generated = self.real.known, self.real.radii, features["features"]
        precision, recall = precision_recall(known.features, generated, self.num_neighbours, radii)
        values = {
            "fid": known.frechet_distance(generated),
            "kid": known.kernel_distance(generated),
            "precision": precision,
            "recall": recall,
        }
        return {f"{key}_{self.name}": value for key, value in values.items()}

    def left_out(self, features: Mapping[str, Tensor], pairs: Tensor) -> dict[str, LeftOut]:
        """Return all four; precision and recall need three images more than neighbours."""
        known, radii, generated = self.real.known, self.real.radii, features["features"]
        values = dict(zip(("fid", "kid"), known.distances_left_out(generated, pairs), strict=True))
        if min(len(generated) - 2, len(radii)) > self.num_neighbours:
            args = (known.features, generated, pairs, self.num_neighbours, radii)
            values["precision"], values["recall"] = precision_recall_left_out(*args)
        return {f"{key}_{self.name}": value for key, value in values.items()}

    def guards(self) -> dict[str, Guard]:
        """Return all four; a change for the worse by a fifth is a sign."""
        distances = {f"{key}_{self.name}": LARGE_RISE for key in ("fid", "kid")}
        return distances | {f"{key}_{self.name}": LARGE_FALL for key in ("precision", "recall")}

    def real_features(self) -> Tensor:
        """Return the features of the real images, computed when first needed, [n, D]."""
        return self.real.known.features

    def read(self) -> "_Real":
        pixels = self.source.load().pixels
        order = np.random.default_rng(0).permutation(len(pixels))[: self.max_images]
        images = torch.from_numpy(pixels[np.sort(order)])
        features = features_of(self.network, images).cpu()
        radii = neighbour_distances(features.double(), self.num_neighbours)
        return _Real(RealFeatures.of(features), radii)


class FrechetDistance(SourceDistances[FittedGaussian]):
    """FID of all images of an evaluation against statistics that another program saved.

    "fid_<f>_<s>" with the features' name <f> and the file's <s>. It is the published number where
    the features are those of the file (for pytorch-fid, clean-fid and ADM's reference batches
    InceptionV3), where as many images are drawn, and where they are brought to size alike.

    Args:
        statistics: An .npz file with the mean `mu` [D] and the covariance `sigma` [D, D] of the
            features of real images.
        features: The feature network, as for `SetDistances`.
        num_draws: 0 leaves the standard error of a test out, which has a closed form.

    Raises:
        UsageError: `features` is no feature network; or, before the run, the file is missing, holds
            something else, or its numbers are of other features.
    """

    def __init__(self, statistics: str, features: str, num_draws: int = 20) -> None:
        super().__init__(num_draws)
        self.statistics = statistics
        with reading(self, "features"):
            self.network = load_features(features)

    def check(self, pipeline: Pipeline) -> None:
        with reading(self, "statistics"):
            self._moments()

    @property
    def name(self) -> str:
        """What the number is called."""
        return f"fid_{self.network.name}_{Path(self.statistics).stem}"

    @torch.no_grad()
    def features(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the network's features of each image, {"features": [B, D]}."""
        return {"features": features_of(self.network, check_pictures(samples, condition))}

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the distance; NaN for fewer than two images."""
        return {self.name: self.real.frechet_distance(features["features"])}

    def left_out(self, features: Mapping[str, Tensor], pairs: Tensor) -> dict[str, LeftOut]:
        return {self.name: frechet_left_out(features["features"], self.real, pairs)}

    def guards(self) -> dict[str, Guard]:
        """Return the distance, of which a rise by a fifth is a sign."""
        return {self.name: LARGE_RISE}

    def read(self) -> FittedGaussian:
        return FittedGaussian.of_moments(*self._moments())

    def _moments(self) -> tuple[Tensor, Tensor]:
        return read_moments(Path(self.statistics), self.network.num_features)


@dataclass(frozen=True)
class _Real:
    """Features of the real images, and each one's distance to its k-th neighbour, [n]."""

    known: RealFeatures
    radii: Tensor


class Diversity(Metric):
    """Mean distance of two images of a batch and condition, root mean square over pixels.

    0 when all look the same. A fall below the reference's diversity is the first sign that a reward
    is being exploited. An image's own value says how much it moves the mean, so that the mean has
    the right error: it is not the image's distance, and may be negative or above 1.
    """

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return {"diversity": [B]}, `pseudo_values` with a mean in [0, 1]; NaN for one image."""
        flat = check_pictures(samples, condition).detach().float().flatten(1)
        # The faster way by a matrix product makes equal images differ.
        distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
        rows = condition.rows.to(distances.device)
        totals, counts = sums_over_others(distances, rows)
        means = totals / (counts.double() * flat.shape[1] ** 0.5).float()
        return {"diversity": pseudo_values(means, rows)}

    def guards(self) -> dict[str, Guard]:
        """Return {"diversity"}, of which a fall by a fifth is a sign."""
        return {"diversity": LARGE_FALL}
