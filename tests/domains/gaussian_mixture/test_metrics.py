"""MMD from exact draws: nothing for the mixture's own points, much for others."""

import pytest
import torch

from domains.gaussian_mixture.closed_form.mixture import MEANS, STDS, WEIGHTS, Mixture
from domains.gaussian_mixture.metrics import MMD
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.evaluation.jackknife import compared

NOWHERE = Condition([{"name": "mixture"}], {}, torch.zeros(500, dtype=torch.int64))


def test_points_of_the_mixture_are_near_it_and_shifted_ones_are_not() -> None:
    metric, mixture = MMD(), Mixture.of(WEIGHTS, MEANS, STDS)
    generator = torch.Generator().manual_seed(7)
    points = [mixture.sample(500, generator) for _ in range(2)]
    arms = {"reference": points[0], "tuned": points[1] + 0.8}
    features = {arm: metric.features(x, NOWHERE) for arm, x in arms.items()}
    found = compared(metric, features, metric.num_draws)
    assert abs(found["reference"]["mmd"]["mean"]) < 4 * found["reference"]["mmd"]["sem"]
    assert found["gain"]["mmd"]["mean"] > 4 * found["gain"]["mmd"]["sem"] > 0


def test_other_coordinates_are_refused() -> None:
    with pytest.raises(UsageError, match="means of MMD have 2 coordinates, the points have 3"):
        MMD().features(torch.zeros(500, 3), NOWHERE)
