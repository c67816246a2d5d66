"""The shared parts of the domain's networks: interface, inputs, files.

B: batch, n: atoms, K: types, C: channels of a continuous state beside positions, W: width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from domains.molecule.networks.architecture import Architecture
from lit_rlft.core.block_checkpointing import BlockCheckpointing
from lit_rlft.kit.network_folder import load_weights, read_settings
from lit_rlft.kit.time_layers import NUM_FREQUENCIES, frequencies

__all__ = ["Inputs", "MoleculeNetwork", "centred", "load_network"]


class MoleculeNetwork(nn.Module, BlockCheckpointing, ABC):
    """A network from noisy atoms to predictions of the same shapes.

    Args:
        architecture: Sizes of the layers.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture

    @property
    def like(self) -> Tensor:
        """An empty tensor of the network's device and precision."""
        weight = next(self.parameters())  # which may be split among processes
        return torch.empty(0, dtype=weight.dtype, device=weight.device)

    @abstractmethod
    def forward(
        self, positions: Tensor, features: Tensor, t: Tensor, full: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the predictions for positions [B, n, 3] and for types [B, n, C].

        Args:
            positions: [B, n, 3], in units in which bonds are about as long as in Angstrom.
            features: [B, n, C] scores, or int64 types [B, n] in [0, K], K for hidden ones.
            t: [B] in [0, 1].
            full: bool [B, n], which slots hold an atom; None is all.
        """


class Inputs(nn.Module):
    """First features of atoms: their types, the time, the number of atoms."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        if a.split:
            self.types: nn.Module = nn.Embedding(len(a.symbols) + 1, a.width)
        else:
            self.types = nn.Linear(a.num_channels, a.width)
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
    folder: Path, networks: Mapping[str, Callable[[Architecture], MoleculeNetwork]]
) -> MoleculeNetwork:
    """Return the network that `save_network` wrote, in single precision."""
    architecture = Architecture(**read_settings(folder))
    with torch.device("meta"):
        network = networks[architecture.network](architecture)
    return load_weights(network, folder)


def centred(moves: Tensor, full: Tensor | None) -> Tensor:
    """Return moves [B, n, 3] without their mean over atoms."""
    if full is None:
        return moves - moves.mean(dim=1, keepdim=True)
    weights = full.unsqueeze(-1).to(moves.dtype)
    return moves - (moves * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)
