"""The plain transformer over atoms."""

from torch import Tensor, nn

from domains.molecule.networks.architecture import Architecture
from domains.molecule.networks.base import Inputs, MoleculeNetwork, centred
from lit_rlft.kit.time_layers import TimedBlock, normed, zero

__all__ = ["Transformer"]


class Transformer(MoleculeNetwork):
    """Attention among atoms without regard for symmetry, modulated by the time (adaLN-zero)."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        a = architecture
        self.inputs = Inputs(a)
        self.position_in = nn.Linear(3, a.width, bias=False)
        self.blocks = nn.ModuleList(
            TimedBlock(a.width, a.num_heads, 4 * a.width) for _ in range(a.depth)
        )
        self.modulate = zero(nn.Linear(a.width, 2 * a.width))
        self.out = zero(nn.Linear(a.width, 3 + a.num_channels))

    def forward(
        self, positions: Tensor, features: Tensor, t: Tensor, full: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        hidden, time = self.inputs(features, t, full)
        hidden = hidden + self.position_in(positions.to(hidden.dtype))
        seen = None if full is None else full[:, None, None, :]
        for block in self.blocks:
            hidden = self.run(block, hidden, time, seen)
        scale, shift = self.modulate(time).unsqueeze(1).chunk(2, dim=-1)
        prediction = self.out(normed(hidden) * (1 + scale) + shift)
        return centred(prediction[..., :3], full), prediction[..., 3:]
