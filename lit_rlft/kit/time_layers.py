r"""Parts of transformers that the time modulates (adaLN-zero).

With :math:`\gamma, \beta, g` linear in an embedding of t, and 0 at the start, a block is

.. math::
    h \leftarrow h + g_1\, \mathrm{attention}((1 + \gamma_1)\,\mathrm{LN}(h) + \beta_1), \qquad
    h \leftarrow h + g_2\, \mathrm{MLP}((1 + \gamma_2)\,\mathrm{LN}(h) + \beta_2).

References:
    Scalable Diffusion Models with Transformers (Peebles & Xie, 2022),
    https://arxiv.org/abs/2212.09748
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["NUM_FREQUENCIES", "TimedBlock", "frequencies", "normed", "zero"]

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


class TimedBlock(nn.Module):
    """Attention among tokens and an MLP on each, scaled, shifted and gated by the time.

    Args:
        width: Size of a token.
        num_heads: Attention heads; divides `width`.
        num_hidden: Hidden units of the MLP.
    """

    def __init__(self, width: int, num_heads: int, num_hidden: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, num_hidden)
        self.fc2 = nn.Linear(num_hidden, width)
        self.modulate = zero(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, time: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return tokens, [B, N, D].

        Args:
            x: Tokens [B, N, D].
            time: The time's embedding [B, D].
            seen: bool [B, 1, 1, N], which tokens are attended to; None is all.
        """
        scale1, shift1, gate1, scale2, shift2, gate2 = (
            self.modulate(time).unsqueeze(1).chunk(6, dim=-1)
        )
        x = x + gate1 * self._attend(normed(x) * (1 + scale1) + shift1, seen)
        hidden = functional.gelu(self.fc1(normed(x) * (1 + scale2) + shift2))
        return x + gate2 * self.fc2(hidden)

    def _attend(self, x: Tensor, seen: Tensor | None) -> Tensor:
        queries, keys, values = (
            self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        return self.proj(mixed.transpose(1, 2).flatten(2))
