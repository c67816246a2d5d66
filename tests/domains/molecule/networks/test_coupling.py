"""Noise reordered and rotated to be near data: the best order and rotation, and nothing else."""

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from domains.molecule.networks.coupling import CoupledPointClouds, coupled
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.schedule import RectifiedFlow
from lit_rlft.core.subspace import PointClouds

SIZES = (5, 3, 1, 4)
FULL = (torch.arange(5) < torch.tensor(SIZES).unsqueeze(1)).unsqueeze(-1)
CLOUDS = CoupledPointClouds(3)


def clouds(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return CLOUDS.project(torch.randn(4, 5, 5, generator=generator), FULL.expand(-1, -1, 5).float())


def test_no_order_of_the_points_is_nearer() -> None:
    x, noise = clouds(0), clouds(1)
    found = coupled(noise, x, FULL, 0)
    for row, size in enumerate(SIZES):
        costs = [
            float((noise[row, list(order)] - x[row, :size]).square().sum())
            for order in permutations(range(size))
        ]
        assert float((found[row] - x[row]).square().sum()) == pytest.approx(min(costs), rel=1e-5)


def test_the_rotation_is_the_best_proper_one() -> None:
    x, noise = clouds(0), clouds(1)
    ordered, found = coupled(noise, x, FULL, 0), coupled(noise, x, FULL, 3)
    for row, size in enumerate(SIZES):
        place, wanted = (v[row, :size, :3].double().numpy() for v in (ordered, x))
        if size > 1:
            rotation, _ = Rotation.align_vectors(wanted, place)
            np.testing.assert_allclose(found[row, :size, :3], rotation.apply(place), atol=1e-5)


def test_shapes_and_other_channels_are_kept() -> None:
    noise = clouds(1)
    found = coupled(noise, clouds(0), FULL, 3)
    for row, size in enumerate(SIZES):
        assert not found[row, size:].any()
        before, after = (v[row, :size] for v in (noise, found))
        rows = [before[:, 3:].tolist().index(values) for values in after[:, 3:].tolist()]
        assert sorted(rows) == list(range(size))
        distances = (torch.cdist(v, v) for v in (before[rows, :3], after[:, :3]))
        torch.testing.assert_close(*distances, atol=1e-5, rtol=0)
        # A mirror image would have the same distances.
        if size > 3:
            signs = [torch.linalg.det(v[1:4, :3] - v[:1, :3]).sign() for v in (before[rows], after)]
            assert signs[0] == signs[1]


def test_coupled_noise_is_what_training_mixes_data_with() -> None:
    x, t = clouds(0), torch.ones(4)
    rows = [torch.Generator().manual_seed(i) for i in range(4)]
    again = [torch.Generator().manual_seed(i) for i in range(4)]
    flow, plain = (
        GaussianProcess(RectifiedFlow(), "velocity", space) for space in (CLOUDS, PointClouds(3))
    )
    found, noise = flow.noised(x, 0 * t, t, rows), plain.noised(x, 0 * t, t, again)
    torch.testing.assert_close(found, coupled(noise, x, FULL, 3))
    assert (found - x).square().sum() < 0.8 * (noise - x).square().sum()
