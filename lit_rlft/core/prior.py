r"""Learned priors: a network that moves and stretches the initial noise, given a condition.

.. math::
    z = \mu(c) + \sigma(c)\, e, \qquad e \sim N(0, I), \qquad
    KL(\pi \,\|\, N(0, I)) = \tfrac12 \sum_i (\mu_i^2 + \sigma_i^2 - 1 - \log \sigma_i^2).

The network's output layer is zero at the start: z then equals e to the last bit. How :math:`\mu`
and :math:`\log\sigma` are parametrised is a choice (`Maps`): an average of d dimensions is learned
from far fewer samples than each of them.

References:
    Noise PPO (Miao et al., 2025), https://arxiv.org/abs/2506.12036
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lit_rlft.core.block_checkpointing import BlockCheckpointing
from lit_rlft.core.checks import at_least
from lit_rlft.core.distribution import Gaussian
from lit_rlft.core.pipeline import pooled
from lit_rlft.core.settings import Recorded

__all__ = ["FullResolution", "LowRank", "LowResolution", "Maps", "NoisePolicy", "bounded"]

_SHARPNESS = 16.0
"""Of the first scores: the heaviest of 16 tokens has a weight of 0.4 on the embedded model."""


class Maps(Recorded, ABC):
    """How mu and log sigma of a state are made from hidden units."""

    @abstractmethod
    def head(self, width: int, shape: Sequence[int]) -> nn.Module:
        """Return a network from hidden units [B, width] to [B, 2, *shape], zero at the start.

        Args:
            width: Number of hidden units.
            shape: A sample's, without the batch.
        """


class FullResolution(Maps):
    """A number of its own for every dimension."""

    def head(self, width: int, shape: Sequence[int]) -> nn.Module:
        return nn.Sequential(
            _zero_linear(width, 2 * math.prod(shape)), nn.Unflatten(1, (2, *shape))
        )


class LowResolution(Maps):
    """Small maps, interpolated (bilinear) to the size of the state.

    States other than [C, H, W] have nothing to interpolate over and get `FullResolution`.

    Args:
        size: Height and width of the small maps, at most; 1 is one number per channel.
    """

    def __init__(self, size: int = 4) -> None:
        at_least(1, self, size=size)
        self.size = size

    def head(self, width: int, shape: Sequence[int]) -> nn.Module:
        if len(shape) != 3:
            return FullResolution().head(width, shape)
        channels, *large = shape
        small = (channels, *(min(self.size, pixels) for pixels in large))
        return nn.Sequential(FullResolution().head(width, small), _Upsample(large))


class LowRank(Maps):
    """Combinations of a few learned maps, which all conditions share.

    Args:
        rank: Number of maps for mu, and for log sigma.
    """

    def __init__(self, rank: int = 8) -> None:
        at_least(1, self, rank=rank)
        self.rank = rank

    def head(self, width: int, shape: Sequence[int]) -> nn.Module:
        return nn.Sequential(_zero_linear(width, 2 * self.rank), _Combine(self.rank, shape))


class NoisePolicy(nn.Module, BlockCheckpointing):
    """The distribution N(mu(c), sigma(c)^2) of the initial noise, N(0, I) at the start.

    Args:
        num_features: F, size of the encoding of a condition, or of each of its tokens.
        shape: A sample's shape, without the batch.
        maps: How mu and log sigma are made.
        width: Units of the two hidden layers.
        conditional: False ignores the encoding: one distribution for all conditions.
        heads: Weighted averages of the tokens that the policy reads, each with learned weights; 0
            reads their plain average.
    """

    def __init__(
        self,
        num_features: int,
        shape: Sequence[int],
        maps: Maps,
        *,
        width: int = 256,
        conditional: bool = True,
        heads: int = 0,
    ) -> None:
        super().__init__()
        at_least(1, self, num_features=num_features, width=width)
        at_least(0, self, heads=heads)
        self.num_features, self.shape = num_features, tuple(shape)
        self.maps, self.width, self.conditional, self.heads = maps, width, conditional, heads
        self.attention = _Attention(num_features, heads) if heads else None
        self.trunk = nn.Sequential(
            nn.Linear(num_features * max(heads, 1), width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
        )
        self.head = maps.head(width, self.shape)

    def forward(self, encoding: Tensor) -> Gaussian:
        """Return the distribution of z [B, *shape], in the network's dtype.

        Args:
            encoding: Tokens [B, L, F]; without heads also their average, [B, F].
        """
        weight = next(self.parameters())
        # Rounded as in mixed precision, mu would depend on how samples are batched.
        with torch.autocast(weight.device.type, enabled=False):
            if self.attention is None:
                encoding = pooled(encoding) if encoding.dim() > 2 else encoding
            # Multiplied by 0, not left out: all parameters keep a gradient.
            features = bounded(encoding.to(weight)) * self.conditional
            mu, log_sigma = self.run(self._maps_of, features).unbind(dim=1)
        return Gaussian(mu, log_sigma.exp())

    def _maps_of(self, features: Tensor) -> Tensor:
        read = features if self.attention is None else self.attention(features)
        maps: Tensor = self.head(self.trunk(read))
        return maps


class _Attention(nn.Module):
    """Weighted averages of tokens; the weights are a softmax of learned scores.

    Args:
        num_features: F, numbers of a token.
        heads: H, averages.
    """

    def __init__(self, num_features: int, heads: int) -> None:
        super().__init__()
        self.scores = nn.Linear(num_features, heads, bias=False)
        # Softer, all heads would start near to the plain average.
        nn.init.normal_(self.scores.weight, std=_SHARPNESS / num_features**0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Average tokens [B, L, F] to [B, H F]."""
        weights = self.scores(tokens).softmax(dim=1)
        return torch.einsum("blh,blf->bhf", weights, tokens).flatten(1)


class _Upsample(nn.Module):
    def __init__(self, size: Sequence[int]) -> None:
        super().__init__()
        self.size = tuple(size)

    def forward(self, maps: Tensor) -> Tensor:
        """Enlarge [B, 2, C, h, w] to [B, 2, C, H, W]."""
        large = interpolate(maps.flatten(1, 2), self.size, mode="bilinear")
        return large.view(*maps.shape[:3], *self.size)


class _Combine(nn.Module):
    def __init__(self, rank: int, shape: Sequence[int]) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.randn(2, rank, *shape) / rank**0.5)

    def forward(self, coefficients: Tensor) -> Tensor:
        """Sum the maps weighted with [B, 2 * rank] into [B, 2, *shape]."""
        weights = coefficients.view(-1, *self.basis.shape[:2])
        return torch.einsum("bkr,kr...->bk...", weights, self.basis)


def bounded(features: Tensor) -> Tensor:
    """Scale features [..., F] to a size below 1; unlike a layer norm it keeps a single number."""
    return features / (1 + features.square().mean(dim=-1, keepdim=True).sqrt())


def _zero_linear(width: int, size: int) -> nn.Linear:
    layer = nn.Linear(width, size)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
