"""Small parts of networks that are modulated by the time (adaLN-zero)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["NUM_FREQUENCIES", "frequencies", "normed", "zero"]

NUM_FREQUENCIES = 32


def normed(x: Tensor) -> Tensor:
    """Return x [..., D] with mean 0 and variance 1 over D."""
    return functional.layer_norm(x, x.shape[-1:])


def frequencies(t: Tensor) -> Tensor:
    """Return cosines and sines of t [B] at periods from 4 down to about 1/100, [B, 64]."""
    octaves = torch.linspace(0, math.log(400), NUM_FREQUENCIES, device=t.device)
    angles = t.float().unsqueeze(1) * (octaves.exp() * (math.pi / 2))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zero(layer: nn.Linear) -> nn.Linear:
    """Return the layer with all its parameters set to 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
