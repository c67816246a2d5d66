r"""The denoisers of molecules: an equivariant graph network (EGNN) and a plain transformer.

The EGNN works on all pairs of atoms, dense. With features :math:`h_i`, positions :math:`x_i`,
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
    Scalable Diffusion Models with Transformers (Peebles & Xie, 2022; adaLN-zero),
    https://arxiv.org/abs/2212.09748
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from domains.molecule.chemistry.elements import EXPLICIT, HEAVY, check_elements
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.network_folder import load_weights, read_settings
from lit_rlft.kit.time_layers import NUM_FREQUENCIES, frequencies, normed, zero

__all__ = ["EGNN", "Architecture", "Denoiser", "Transformer", "load_network"]

_NUM_RADIAL = 16
_RADIAL_LENGTH = 2.0  # Angstrom
_FAINTEST = -30.0  # logarithm of the height of a bump
_TINY = 1e-8


@dataclass(frozen=True)
class Architecture:
    """Sizes of the network and what its molecules are, what config.json holds.

    Attributes:
        state: "continuous", positions and scores of the types in one tensor [B, N, 3 + K], or
            "mixed", positions [B, N, 3] beside integer types [B, N].
        network: "egnn", "transformer" (trained on random rotations) or "edm" (EDM's EGNN).
        noise: "flow" (rectified flow, the network predicts velocities) or "polynomial" (EDM's
            variance-preserving schedule, the network predicts noise).
        implicit_hydrogens: Whether atoms are heavy atoms only, hydrogens filled in by valence.
        elements: Symbols of the types; unless given H, C, N, O, F, without H where it is implicit.
        max_atoms: N, the most atoms that a molecule has.
        width: W.
        depth: Number of layers.
        num_heads: Attention heads of the transformer; divides `width`.
        position_scale: Angstrom per unit of the state.
        position_std: Spread of the data's coordinates in Angstrom, by which inputs and outputs are
            scaled to unit size; no limit of any kind.
        type_scale: Height of the one-hot types in the state: the lower, the later types are decided
            (EDM: 1 / 4).
        charge_scale: Height of the atomic number per unit in a channel of its own, as EDM has it
            (1 / 10); 0 has none.
        type_power: How late the types of mixed states are decided (`MaskedProcess`).
        logit_normal: Mean and standard deviation of the logits of a flow's training times, before
            the shift; None has uniform times.
        shift: Time shift of the flow, of training times and of the sampler's grid: below 1 more of
            both lie near the data, where bond lengths are decided.
        coupled: Whether a flow is trained on noise that was reordered and rotated to be near the
            data (see `coupling`): better with few deterministic steps, but worse with samplers that
            add noise (eta above 0), which take noise and data for independent.
        num_sublayers: EDM's "inv_sublayers", updates of features per layer.
        tanh: EDM's bound on moves of positions.
        attention: EDM's gate on messages.
        norm_constant: EDM's length added to distances.
        normalization_factor: EDM's divisor of sums over atoms.
        sin_embedding: EDM's sines of distances instead of squares.
    """

    state: Literal["continuous", "mixed"] = "continuous"
    network: Literal["egnn", "transformer", "edm"] = "egnn"
    noise: Literal["flow", "polynomial"] = "flow"
    implicit_hydrogens: bool = False
    elements: Sequence[str] | None = None
    max_atoms: int = 20
    width: int = 64
    depth: int = 4
    num_heads: int = 4
    position_scale: float = 1.0
    position_std: float = 1.4
    type_scale: float = 0.5
    charge_scale: float = 0.0
    type_power: float = 3.0
    logit_normal: tuple[float, float] | None = None
    shift: float = 1.0
    coupled: bool = False
    num_sublayers: int = 1
    tanh: bool = True
    attention: bool = True
    norm_constant: float = 1.0
    normalization_factor: float = 1.0
    sin_embedding: bool = False

    def __post_init__(self) -> None:
        for name in ("max_atoms", "width", "depth", "num_heads", "num_sublayers"):
            if getattr(self, name) < 1:
                raise UsageError(f"architecture.{name} must be at least 1")
        for name in ("position_scale", "position_std", "type_scale", "type_power", "shift"):
            if getattr(self, name) <= 0:
                raise UsageError(f"architecture.{name} must be above 0")
        choices: dict[str, tuple[str, ...]] = {
            "state": ("continuous", "mixed"),
            "network": ("egnn", "transformer", "edm"),
            "noise": ("flow", "polynomial"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UsageError(
                    f"architecture.{name} must be {' or '.join(known)}, got {getattr(self, name)!r}"
                )
        if self.network == "transformer" and self.width % (2 * self.num_heads):
            raise UsageError(
                f"architecture.width ({self.width}) must be even and a multiple of num_heads "
                f"({self.num_heads})"
            )
        if self.coupled and self.noise != "flow":
            raise UsageError("architecture.coupled is for flows; set noise to flow, or it to false")
        if self.network == "edm" and self.state == "mixed":
            raise UsageError("architecture.network edm has continuous states; set state to that")
        if self.implicit_hydrogens == ("H" in check_elements(self.symbols)):
            raise UsageError(
                f"architecture.elements is {list(self.symbols)}, but implicit_hydrogens "
                f"{str(self.implicit_hydrogens).lower()}: hydrogens are either atoms of the model "
                "or implied; change one of the two"
            )

    @property
    def symbols(self) -> tuple[str, ...]:
        """The elements of the types."""
        if self.elements is not None:
            return tuple(self.elements)
        return HEAVY if self.implicit_hydrogens else EXPLICIT

    @property
    def num_channels(self) -> int:
        """C, the numbers of an atom in a continuous state beside its position."""
        return len(self.symbols) + (self.charge_scale > 0)


class Denoiser(nn.Module, ABC):
    """A network from noisy atoms to predictions of the same shapes.

    Args:
        architecture: Sizes of the layers.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture

    @property
    def like(self) -> Tensor:
        """A tensor of the network's device and precision."""
        return next(self.parameters())

    @abstractmethod
    def forward(
        self, positions: Tensor, features: Tensor, t: Tensor, full: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return what is predicted for positions [B, n, 3] and for types [B, n, C].

        Args:
            positions: [B, n, 3], in units in which bonds are about as long as in Angstrom.
            features: [B, n, C] scores, or int64 types [B, n] in [0, K], K for hidden ones.
            t: [B] in [0, 1].
            full: bool [B, n], which slots hold an atom; None is all.
        """


class EGNN(Denoiser):
    """The equivariant network."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        a = architecture
        self.inputs = _Inputs(a)
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
            hidden, moved, edges = layer(hidden, moved, edges, first, pairs, time)
        return _centred(moved - start, full), self.out(normed(hidden))


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


class Transformer(Denoiser):
    """Attention among atoms without regard for symmetry, modulated by the time (adaLN-zero)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        a = architecture
        self.inputs = _Inputs(a)
        self.position_in = nn.Linear(3, a.width, bias=False)
        self.blocks = nn.ModuleList(_Block(a.width, a.num_heads) for _ in range(a.depth))
        self.modulate = zero(nn.Linear(a.width, 2 * a.width))
        self.out = zero(nn.Linear(a.width, 3 + a.num_channels))

    def forward(
        self, positions: Tensor, features: Tensor, t: Tensor, full: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        hidden, time = self.inputs(features, t, full)
        hidden = hidden + self.position_in(positions.to(hidden.dtype))
        seen = None if full is None else full[:, None, None, :]
        for block in self.blocks:
            hidden = block(hidden, time, seen)
        scale, shift = self.modulate(time).unsqueeze(1).chunk(2, dim=-1)
        prediction = self.out(normed(hidden) * (1 + scale) + shift)
        return _centred(prediction[..., :3], full), prediction[..., 3:]


class _Block(nn.Module):
    """Attention among atoms and an MLP on each, scaled, shifted and gated by the time."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.modulate = zero(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, time: Tensor, seen: Tensor | None) -> Tensor:
        """Return [B, n, W] for atoms [B, n, W], the time's embedding [B, W] and who is seen."""
        scale1, shift1, gate1, scale2, shift2, gate2 = (
            self.modulate(time).unsqueeze(1).chunk(6, dim=-1)
        )
        modulated = normed(x) * (1 + scale1) + shift1
        queries, keys, values = (
            self.qkv(modulated).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        )
        mixed = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        x = x + gate1 * self.proj(mixed.transpose(1, 2).flatten(2))
        hidden = functional.gelu(self.fc1(normed(x) * (1 + scale2) + shift2))
        return x + gate2 * self.fc2(hidden)


class _Inputs(nn.Module):
    """First features of atoms: their types, the time, the number of atoms."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        if a.state == "continuous":
            self.types: nn.Module = nn.Linear(a.num_channels, a.width)
        else:
            self.types = nn.Embedding(len(a.symbols) + 1, a.width)
        self.count = nn.Linear(1, a.width)
        self.time = nn.Sequential(
            nn.Linear(2 * NUM_FREQUENCIES, a.width), nn.SiLU(), nn.Linear(a.width, a.width)
        )

    def forward(self, features: Tensor, t: Tensor, full: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return features [B, n, W] and the time's embedding [B, W]."""
        dtype = self.count.weight.dtype
        # Integer types in empty slots are out of the table's range; what they embed is not used.
        known = features.to(dtype) if features.dim() == 3 else features.clamp(max=self._last)
        size = features.shape[1]
        num = t.new_full((len(t), 1), size) if full is None else full.sum(dim=1, keepdim=True)
        count = self.count(num.to(dtype).log())
        time = self.time(frequencies(t).to(dtype))
        return self.types(known) + (count + time).unsqueeze(1), functional.silu(time)

    @property
    def _last(self) -> int:
        assert isinstance(self.types, nn.Embedding)
        return self.types.num_embeddings - 1


def load_network(
    folder: Path, networks: Mapping[str, Callable[[Architecture], Denoiser]]
) -> Denoiser:
    """Return the network that `save_network` wrote, in single precision."""
    architecture = Architecture(**read_settings(folder))
    with torch.device("meta"):
        network = networks[architecture.network](architecture)
    return load_weights(network, folder)


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


def _centred(moves: Tensor, full: Tensor | None) -> Tensor:
    if full is None:
        return moves - moves.mean(dim=1, keepdim=True)
    weights = full.unsqueeze(-1).to(moves.dtype)
    return moves - (moves * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)
