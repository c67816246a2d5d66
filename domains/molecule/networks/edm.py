r"""EDM's network, and its published checkpoints: a folder with args.pickle and a state dict.

One block takes distances once, updates features S times and then positions:

.. math::
    m_{ij} = \phi_e(h_i, h_j, d_{ij}^2, (d^0_{ij})^2), \qquad
    h_i \leftarrow h_i + \phi_h\big(h_i, \tfrac1Z \textstyle\sum_{j \ne i} \sigma(\phi_a(m_{ij}))
    m_{ij}\big), \qquad
    x_i \leftarrow x_i + \tfrac1Z \textstyle\sum_{j \ne i} \frac{x_i - x_j}{d_{ij} + c}\,
    15 \tanh \phi_x(h_i, h_j, d_{ij}^2, (d^0_{ij})^2).

The network predicts noise, without further scaling, from features with t as one more number. The
first layer of each MLP on pairs is kept in parts, for i, j and the distances, so that two of its
three products are taken per atom and not per pair.

References:
    Equivariant Diffusion for Molecule Generation in 3D (Hoogeboom et al., 2022), Appendix B,
    https://arxiv.org/abs/2203.17003
"""

import argparse
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from domains.molecule.networks.architecture import Architecture
from domains.molecule.networks.base import MoleculeNetwork
from lit_rlft.core.checks import UsageError
from lit_rlft.core.schedule import PolynomialVP

__all__ = ["ARGS", "EDM", "load_edm"]

ARGS, WEIGHTS = "args.pickle", ("generative_model_ema.npy", "generative_model.npy")
_RANGE = 15.0  # of one block's move along one pair, before 1 / Z
_TINY = 1e-8
_SINES, _LONGEST = 6, 15.0  # of the embedding of distances
_SAFE = {
    ("argparse", "Namespace"): argparse.Namespace,
    ("torch", "device"): torch.device,
    ("torch", "float32"): torch.float32,
    ("torch", "float64"): torch.float64,
}
_SUPPORTED = {
    "probabilistic_model": "diffusion",
    "model": "egnn_dynamics",
    "diffusion_noise_schedule": "polynomial_2",
    "aggregation_method": "sum",
    "condition_time": True,
    "context_node_nf": 0,
}
"""Settings with a single value that can be loaded."""


class EDM(MoleculeNetwork):
    """EDM's equivariant network."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        a = architecture
        self.inputs = nn.Linear(a.num_channels + 1, a.width)
        self.blocks = nn.ModuleList(_Block(a) for _ in range(a.depth))
        self.out = nn.Linear(a.width, a.num_channels + 1)

    def forward(
        self, positions: Tensor, features: Tensor, t: Tensor, full: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        dtype = self.inputs.weight.dtype
        if full is None:
            full = torch.ones_like(positions[..., 0], dtype=torch.bool)
        atoms = full.unsqueeze(-1).to(dtype)
        others = 1 - torch.eye(full.shape[1], dtype=dtype, device=full.device)
        pairs = (others * atoms * atoms.transpose(1, 2)).unsqueeze(-1)
        time = t.to(dtype).view(-1, 1, 1).expand_as(atoms)
        x = start = positions.to(dtype)
        first = self._embedded(_squares(start))
        hidden = self.inputs(torch.cat([features.to(dtype), time], dim=-1))
        for block in self.blocks:
            hidden, x = self.run(self._through, block, hidden, x, first, pairs)
        moves = (x - start) * atoms
        moves = moves - atoms * moves.sum(dim=1, keepdim=True) / atoms.sum(dim=1, keepdim=True)
        return moves, (self.out(hidden) * atoms)[..., :-1]

    def _through(
        self, block: nn.Module, hidden: Tensor, x: Tensor, first: Tensor, pairs: Tensor
    ) -> tuple[Tensor, Tensor]:
        distances = torch.cat([self._embedded(_squares(x)), first], dim=-1)
        moved: tuple[Tensor, Tensor] = block(hidden, x, distances, pairs)
        return moved

    def _embedded(self, squares: Tensor) -> Tensor:
        if not self.architecture.sin_embedding:
            return squares
        powers = 4.0 ** torch.arange(_SINES, device=squares.device, dtype=squares.dtype)
        angles = (squares + _TINY).sqrt() * (2 * math.pi * powers / _LONGEST)
        return torch.cat([angles.sin(), angles.cos()], dim=-1).detach()


class _PairMLP(nn.Module):
    """The first two layers of an MLP on (h_i, h_j, distances)."""

    def __init__(self, width: int, num_distances: int) -> None:
        super().__init__()
        self.source = nn.Linear(width, width)
        self.target = nn.Linear(width, width, bias=False)
        self.radial = nn.Linear(num_distances, width, bias=False)
        self.message = nn.Linear(width, width)

    def forward(self, hidden: Tensor, distances: Tensor) -> Tensor:
        """Return [B, n, n, W]."""
        edges = self.source(hidden).unsqueeze(2) + self.target(hidden).unsqueeze(1)
        return functional.silu(self.message(functional.silu(edges + self.radial(distances))))


class _Update(nn.Module):
    """One update of the features."""

    def __init__(self, a: Architecture, num_distances: int) -> None:
        super().__init__()
        self.pairs = _PairMLP(a.width, num_distances)
        self.gate = nn.Linear(a.width, 1) if a.attention else None
        self.node_in = nn.Linear(2 * a.width, a.width)
        self.node_out = nn.Linear(a.width, a.width)
        self.divisor = a.normalization_factor

    def forward(self, hidden: Tensor, distances: Tensor, pairs: Tensor) -> Tensor:
        messages = self.pairs(hidden, distances)
        weights = pairs if self.gate is None else pairs * torch.sigmoid(self.gate(messages))
        gathered = torch.matmul(weights.transpose(2, 3), messages).squeeze(2) / self.divisor
        inner = functional.silu(self.node_in(torch.cat([hidden, gathered], dim=-1)))
        return hidden + self.node_out(inner)


class _Block(nn.Module):
    """Updates of the features, then one of the positions."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        num_distances = 4 * _SINES if a.sin_embedding else 2
        self.updates = nn.ModuleList(_Update(a, num_distances) for _ in range(a.num_sublayers))
        self.pairs = _PairMLP(a.width, num_distances)
        self.heads = nn.Linear(a.width, 1, bias=False)
        nn.init.xavier_uniform_(self.heads.weight, gain=0.001)
        self.tanh, self.constant, self.divisor = a.tanh, a.norm_constant, a.normalization_factor

    def forward(
        self, hidden: Tensor, x: Tensor, distances: Tensor, pairs: Tensor
    ) -> tuple[Tensor, Tensor]:
        for update in self.updates:
            hidden = update(hidden, distances, pairs)
        move = self.heads(self.pairs(hidden, distances))
        if self.tanh:
            move = _RANGE * move.tanh()
        lengths = (_squares(x) + _TINY).sqrt() + self.constant
        weights = (move * pairs / lengths).squeeze(-1) / self.divisor
        total = weights.sum(dim=2, keepdim=True)
        return hidden, x + total * x - torch.matmul(weights, x)


def load_edm(folder: Path) -> EDM:
    """Return the network of a published checkpoint, in single precision.

    Unpickling the arguments allows nothing but plain values; reading the weights runs no code.
    Averaged weights ("ema") are preferred.

    Raises:
        UsageError: A file is missing or damaged, or this network cannot represent the model.
    """
    args = _read_args(folder / ARGS)
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise UsageError(
            f"pipeline.init_args.pretrained: {folder} has {ARGS} but neither {WEIGHTS[0]} nor "
            f"{WEIGHTS[1]}; copy the weights next to it"
        )
    architecture = _architecture(args, folder)
    try:
        published = torch.load(path, map_location="cpu", weights_only=True)
        weights = _renamed(published, architecture)
        with torch.device("meta"):
            network = EDM(architecture)
        network.load_state_dict(weights, assign=True)
    except (RuntimeError, KeyError, AttributeError, pickle.UnpicklingError, EOFError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"pipeline.init_args.pretrained: the weights {path} do not fit the arguments beside "
            f"them; give a folder as EDM's training wrote it ({reason})"
        ) from error
    _check_schedule(published, folder)
    return network.float()


class _PlainUnpickler(pickle.Unpickler):
    """Reads values and namespaces; anything that could run code is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"{module}.{name} is not a plain value")
        return _SAFE[module, name]


def _read_args(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            return vars(_PlainUnpickler(file).load())
    except (OSError, pickle.UnpicklingError, EOFError, TypeError, AttributeError) as error:
        raise UsageError(
            f"pipeline.init_args.pretrained: {path} could not be read as EDM's arguments; give a "
            f"folder as its training wrote it ({error})"
        ) from error


def _architecture(args: Mapping[str, Any], folder: Path) -> Architecture:
    """Return the sizes that the arguments describe; those that old files lack have defaults."""
    args = {"aggregation_method": "sum", "normalization_factor": 1, "remove_h": False, **args}
    for name, value in _SUPPORTED.items():
        if args.get(name, value) != value:
            raise UsageError(
                f"pipeline.init_args.pretrained: {folder} was trained with {name} "
                f"{args[name]!r}; only models with {value!r} can be loaded"
            )
    scales = args["normalize_factors"]
    return Architecture(
        network="edm",
        noise="polynomial",
        implicit_hydrogens=bool(args["remove_h"]),
        max_atoms=9 if args["remove_h"] else 29,
        width=args["nf"],
        depth=args["n_layers"],
        position_scale=float(scales[0]),
        type_scale=1 / scales[1],
        charge_scale=1 / scales[2] if args["include_charges"] else 0.0,
        num_sublayers=args["inv_sublayers"],
        tanh=args["tanh"],
        attention=args["attention"],
        norm_constant=float(args["norm_constant"]),
        normalization_factor=float(args["normalization_factor"]),
        sin_embedding=args["sin_embedding"],
    )


def _renamed(published: Mapping[str, Tensor], a: Architecture) -> dict[str, Tensor]:
    """Return the weights by this module's names."""
    egnn = "dynamics.egnn"
    weights: dict[str, Tensor] = {}

    def take(theirs: str, ours: str, *kinds: str) -> None:
        for kind in kinds or ("weight", "bias"):
            weights[f"{ours}.{kind}"] = published[f"{egnn}.{theirs}.{kind}"]

    def take_pairs(theirs: str, ours: str) -> None:
        whole = published[f"{egnn}.{theirs}.0.weight"]
        parts = (whole[:, : a.width], whole[:, a.width : 2 * a.width], whole[:, 2 * a.width :])
        for name, part in zip(("source", "target", "radial"), parts, strict=True):
            weights[f"{ours}.{name}.weight"] = part.contiguous()
        take(f"{theirs}.0", f"{ours}.source", "bias")
        take(f"{theirs}.2", f"{ours}.message")

    take("embedding", "inputs")
    take("embedding_out", "out")
    for i in range(a.depth):
        for j in range(a.num_sublayers):
            theirs, ours = f"e_block_{i}.gcl_{j}", f"blocks.{i}.updates.{j}"
            take_pairs(f"{theirs}.edge_mlp", f"{ours}.pairs")
            take(f"{theirs}.node_mlp.0", f"{ours}.node_in")
            take(f"{theirs}.node_mlp.2", f"{ours}.node_out")
            if a.attention:
                take(f"{theirs}.att_mlp.0", f"{ours}.gate")
        theirs = f"e_block_{i}.gcl_equiv.coord_mlp"
        take_pairs(theirs, f"blocks.{i}.pairs")
        take(f"{theirs}.4", f"blocks.{i}.heads", "weight")
    return weights


def _check_schedule(published: Mapping[str, Tensor], folder: Path) -> None:
    """Compare the checkpoint's own table of noise levels with the schedule it is sampled with."""
    table = published.get("gamma.gamma")
    if table is None:
        return
    levels = torch.arange(1, len(table), dtype=torch.float64) / (len(table) - 1)
    alpha = PolynomialVP().alpha(levels)
    gap = (torch.sigmoid(-table[1:].double()) - alpha**2).abs().max()
    if gap > 1e-6:
        raise UsageError(
            f"pipeline.init_args.pretrained: {folder} was trained with other noise levels than "
            "polynomial_2 with precision 1e-5, which alone can be loaded"
        )


def _squares(x: Tensor) -> Tensor:
    """Return squared distances, [B, n, n, 1]."""
    return (x.unsqueeze(2) - x.unsqueeze(1)).square().sum(dim=-1, keepdim=True)
