r"""The equivariant graph network (EGNN), dense on all pairs of atoms.

With features :math:`h_i`, positions :math:`x_i`,
distances :math:`d_{ij}` now and :math:`d^0_{ij}` at the input, and features of pairs :math:`e_{ij}`
that are 0 at first, each layer is

.. math::
    m_{ij} = \phi_m(h_i, h_j, \mathrm{rbf}(d_{ij}), \mathrm{rbf}(d^0_{ij}), e_{ij}), \qquad
    e_{ij} \leftarrow e_{ij} + m_{ij}, \\
    h_i \leftarrow h_i + \phi_h(h_i, \textstyle\sum_j \sigma(w^\top m_{ij})\, m_{ij}), \qquad
    x_i \leftarrow x_i + \textstyle\sum_j \phi_x(m_{ij}) \frac{x_i - x_j}{d_{ij} + 1},

with h normalised and modulated by the time before it enters a layer. Positions of the prediction
are :math:`x_L - x_0` without their mean: rotations and permutations of the input do the same to the
output, and translations do nothing.

B: batch, n: atoms, K: types, C: channels of a continuous state beside positions, W: width.

References:
    E(n) Equivariant Graph Neural Networks (Satorras et al., 2021), https://arxiv.org/abs/2102.09844
    Equivariant Diffusion for Molecule Generation in 3D (Hoogeboom et al., 2022; EDM),
    https://arxiv.org/abs/2203.17003
    PhysNet (Unke & Meuwly, 2019; radial basis), https://arxiv.org/abs/1902.08408
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from domains.molecule.networks.architecture import Architecture
from domains.molecule.networks.base import Inputs, MoleculeNetwork, centred
from lit_rlft.kit.time_layers import normed, zero

__all__ = ["EGNN"]

_NUM_RADIAL = 16
_RADIAL_LENGTH = 2.0  # Angstrom
_FAINTEST = -30.0  # logarithm of the height of a bump
_TINY = 1e-8


class EGNN(MoleculeNetwork):
    """The equivariant network."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        a = architecture
        self.inputs = Inputs(a)
        self.layers = nn.ModuleList(_Layer(a.width) for _ in range(a.depth))
        self.out = zero(nn.Linear(a.width, a.num_channels))

    def forward(
        self, positions: Tensor, features: Tensor, t: Tensor, full: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        hidden, time = self.inputs(features, t, full)
        start = positions.to(hidden.dtype)
        pairs = _pairs(start, full)
        first = _radial(_distances(start))
        moved, edges = start, None
        for layer in self.layers:
            given = (hidden, moved, edges, first, pairs, time)
            hidden, moved, edges = self.run(layer, *given)
        return centred(moved - start, full), self.out(normed(hidden))


class _Layer(nn.Module):
    """One round of messages between all pairs of atoms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulate = zero(nn.Linear(width, 2 * width))
        # The linear map of the concatenation, in parts: n instead of n^2 products for two of them.
        self.source = nn.Linear(width, width)
        self.target = nn.Linear(width, width, bias=False)
        self.radial = nn.Linear(2 * _NUM_RADIAL, width, bias=False)
        self.message = nn.Linear(width, width)
        self.heads = nn.Linear(width, 2)  # of the gate and of the move
        self.node_in = nn.Linear(2 * width, width)
        self.node_out = zero(nn.Linear(width, width))
        with torch.no_grad():
            self.heads.weight[1] = 0.0
            self.heads.bias[1] = 0.0

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        edges: Tensor | None,
        first: Tensor,
        pairs: Tensor,
        time: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return features [B, n, W], positions [B, n, 3] and features of pairs [B, n, n, W].

        Args:
            hidden: [B, n, W].
            positions: [B, n, 3].
            edges: [B, n, n, W]; None for the first layer.
            first: [B, n, n, R], radial basis of the distances at the network's input.
            pairs: [B, n, n] or [n, n], 1 for pairs of two atoms, else 0.
            time: [B, W].
        """
        scale, shift = self.modulate(time).unsqueeze(1).chunk(2, dim=-1)
        h = normed(hidden) * (1 + scale) + shift
        distances = _distances(positions)
        radial = self.radial(torch.cat([_radial(distances), first], dim=-1))
        inner = self.source(h).unsqueeze(2) + self.target(h).unsqueeze(1) + radial
        inner = inner if edges is None else inner + edges
        messages = functional.silu(self.message(functional.silu(inner)))
        edges = messages if edges is None else edges + messages
        gate, move = self.heads(messages).unbind(dim=-1)
        gate = torch.sigmoid(gate) * pairs
        move = move * pairs / (distances + 1)
        # Sums over neighbours as products of matrices: no further tensor of n^2 rows.
        gathered = torch.matmul(gate.unsqueeze(2), messages).squeeze(2)
        hidden = hidden + self.node_out(
            functional.silu(self.node_in(torch.cat([h, gathered], dim=-1)))
        )
        total = move.sum(dim=2, keepdim=True)
        return hidden, positions + total * positions - torch.matmul(move, positions), edges


def _pairs(like: Tensor, full: Tensor | None) -> Tensor:
    """Return 1 for pairs of two different atoms, else 0, [n, n] or [B, n, n]."""
    size = like.shape[1]
    others = 1 - torch.eye(size, dtype=like.dtype, device=like.device)
    if full is None:
        return others
    return others * (full.unsqueeze(1) & full.unsqueeze(2))


def _distances(positions: Tensor) -> Tensor:
    """Return [B, n, n]; those of an atom to itself are small, not 0, where roots have a slope."""
    offsets = positions.unsqueeze(2) - positions.unsqueeze(1)
    return (offsets.square().sum(dim=-1) + _TINY).sqrt()


def _radial(distances: Tensor) -> Tensor:
    """Return bumps of exp(-d / length), evenly spaced there and so denser at short range."""
    centres = torch.linspace(0, 1, _NUM_RADIAL, dtype=distances.dtype, device=distances.device)
    near = (-distances / _RADIAL_LENGTH).exp().unsqueeze(-1)
    # Bounded: products with denormal numbers would take as long as all others together.
    return (-0.5 * ((near - centres) * _NUM_RADIAL).square()).clamp(min=_FAINTEST).exp()
