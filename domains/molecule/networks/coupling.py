r"""Noise that is reordered and rotated to lie near the data, for flows on sets of points.

A flow that mixes each sample with independent noise has to average over every order and every
orientation of the points, and its paths bend. Both are symmetries. Noise :math:`\epsilon` may
therefore be replaced by the reordering and rotation of its points that lies nearest to x_0. Up to
these symmetries its distribution is still that of noise: a network that respects them learns a
flow from the same noise to the same data, along straighter paths. Deterministic samplers are exact
for it. Samplers that add noise are not: their steps assume independent noise and data.

References:
    Equivariant flow matching (Klein et al., 2023), https://arxiv.org/abs/2306.15030
    Equivariant Flow Matching with Hybrid Probability Transport (Song et al., 2023),
    https://arxiv.org/abs/2312.07168
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lit_rlft.core.subspace import PointClouds, occupied

__all__ = ["CoupledPointClouds", "coupled"]


class CoupledPointClouds(PointClouds):
    """Sets of points; their training noise is brought near the data."""

    def couple(self, noise: Tensor, x: Tensor) -> Tensor:
        return coupled(noise, x, occupied(x), self.num_coordinates)


def coupled(noise: Tensor, x: Tensor, full: Tensor, num_coordinates: int) -> Tensor:
    """Return the noise with its points in the best order, then rotated, to be near x.

    The order has the least sum of squared distances in all channels; the proper rotation, for that
    order, in the coordinates.

    Args:
        noise: [B, N, D], coordinates around the points' centre.
        x: [B, N, D], likewise.
        full: bool [B, N, 1], which slots hold a point.
        num_coordinates: Channels that are coordinates of a space; 0 rotates nothing.
    """
    ordered = noise.gather(1, _best_order(noise, x, full).unsqueeze(-1).expand_as(noise))
    if not num_coordinates:
        return ordered
    place, rest = ordered[..., :num_coordinates], ordered[..., num_coordinates:]
    turned = place @ _best_rotation(place, x[..., :num_coordinates]).to(place)
    return torch.cat([turned, rest], dim=-1)


def _best_order(noise: Tensor, x: Tensor, full: Tensor) -> Tensor:
    """Return which point of the noise goes to each slot, int64 [B, N]; empty slots keep theirs."""
    costs = torch.cdist(x.double(), noise.double()).square().cpu().numpy()
    order = np.tile(np.arange(x.shape[1]), (len(x), 1))
    for cost, present, slots in zip(costs, full[..., 0].cpu().numpy(), order, strict=True):
        places = present.nonzero()[0]
        slots[places] = places[linear_sum_assignment(cost[np.ix_(places, places)])[1]]
    return torch.from_numpy(order).to(x.device)


def _best_rotation(a: Tensor, b: Tensor) -> Tensor:
    """Return the proper rotations R that bring a [B, N, K] R nearest to b, [B, K, K] (Kabsch)."""
    u, _, v = torch.linalg.svd(a.double().mT @ b.double())
    flips = torch.ones(u.shape[:-1], dtype=u.dtype, device=u.device)
    flips[:, -1] = torch.linalg.det(u @ v).sign()
    return u * flips.unsqueeze(1) @ v
