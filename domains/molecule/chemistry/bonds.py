r"""Bonds by distance: which atoms are bonded, how often, and whether every valence is right.

A pair of atoms at distance d has a single bond where :math:`d < T_1`, a double one where
:math:`d < T_2` and a triple one where :math:`d < T_3`, with a table of lengths for every two
elements and margins of 10, 5 and 3 pm. Lengths are those of experiment and of B3LYP geometries;
there are no aromatic bonds, so that benzene's, of 139.5 pm, count as single ones.

References:
    Equivariant Diffusion for Molecule Generation in 3D (Hoogeboom et al., 2022), appendix C,
    https://arxiv.org/abs/2203.17003
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from domains.molecule.chemistry.elements import check_elements, valences
from domains.molecule.samples import Molecules

__all__ = [
    "LENGTHS",
    "MARGINS",
    "atom_stability",
    "bond_limits",
    "bond_orders",
    "fitting_valences",
    "molecule_stability",
    "soft_bond_orders",
    "soft_links",
]

LENGTHS: tuple[dict[str, int], ...] = (
    {
        **{"HH": 74, "HC": 109, "HN": 101, "HO": 96, "HF": 92},
        **{"CC": 154, "CN": 147, "CO": 143, "CF": 135},
        **{"NN": 145, "NO": 140, "NF": 136, "OO": 148, "OF": 142, "FF": 142},
    },
    {"CC": 134, "CN": 129, "CO": 120, "NN": 125, "NO": 121, "OO": 121},
    {"CC": 120, "CN": 116, "CO": 113, "NN": 110},
)
"""Lengths of single, double and triple bonds by the elements' symbols, in pm."""

MARGINS: tuple[int, int, int] = (10, 5, 3)
"""How much longer a bond of each order may be, in pm."""

_CHUNK = 1 << 17  # pairs of atoms at a time: what stays in a core's cache


@lru_cache
def bond_limits(elements: tuple[str, ...]) -> Tensor:
    """Return the distance in Angstrom below which a pair has at least each order.

    [E + 1, E + 1, 3] float32 for E elements; -1 where there is no such bond, as in the last row
    and column, which `EMPTY` finds.
    """
    count = len(check_elements(elements))
    limits = torch.full((count + 1, count + 1, 3), -1.0)
    for order, (lengths, margin) in enumerate(zip(LENGTHS, MARGINS, strict=True)):
        for i, first in enumerate(elements):
            for j, second in enumerate(elements):
                length = lengths.get(first + second, lengths.get(second + first))
                if length is not None:
                    limits[i, j, order] = (length + margin) / 100
    return limits


def bond_orders(molecules: Molecules) -> Tensor:
    """Return the order of the bond of every two atoms, int8 [B, N, N]; 0 where there is none.

    Atoms at positions that are not finite have no bonds.
    """
    positions, types = molecules.positions.detach(), molecules.types
    num_molecules, num_slots = types.shape
    orders = torch.zeros(num_molecules, num_slots, num_slots, dtype=torch.int8, device=types.device)
    limits = bond_limits(molecules.elements).to(positions)
    # Squares of distances are compared with squares of limits: no root of every pair.
    tables = (limits.abs() * limits).flatten(0, 1).unbind(dim=-1)
    for rows in _chunks(num_molecules, num_slots):
        pairs = _pair_numbers(types[rows], len(molecules.elements) + 1)
        squares = _squared_distances(positions[rows])
        part = orders[rows]
        for table in tables:
            part += squares < table[pairs]
        part.diagonal(dim1=1, dim2=2).zero_()
    return orders


def atom_stability(molecules: Molecules, orders: Tensor | None = None) -> Tensor:
    """Return which atoms' orders sum to their valence, bool [B, N]; false in empty slots.

    Args:
        molecules: B molecules.
        orders: Their bond orders, where they are known.
    """
    used, wanted = _used_and_wanted(molecules, orders)
    return (used == wanted) & molecules.valid


def molecule_stability(molecules: Molecules, orders: Tensor | None = None) -> Tensor:
    """Return which molecules have stable atoms only, and at least one, bool [B].

    Args:
        molecules: B molecules.
        orders: Their bond orders, where they are known.
    """
    stable = atom_stability(molecules, orders) | ~molecules.valid
    return stable.all(dim=1) & molecules.valid.any(dim=1)


def fitting_valences(molecules: Molecules, orders: Tensor | None = None) -> Tensor:
    """Return which molecules have no atom with more bonds than its valence, bool [B].

    It replaces stability where hydrogens are implicit and fill the remaining valences.

    Args:
        molecules: B molecules.
        orders: Their bond orders, where they are known.
    """
    used, wanted = _used_and_wanted(molecules, orders)
    return ((used <= wanted) | ~molecules.valid).all(dim=1) & molecules.valid.any(dim=1)


def soft_bond_orders(molecules: Molecules, temperature: float = 0.03) -> Tensor:
    r"""Return bond orders with gradient in positions and probabilities, [B, N, N].

    .. math:: o_{ij} = \sum_{ab} p_i(a)\, p_j(b) \sum_{k=1}^3 \sigma((T^k_{ab} - d_{ij}) / \tau)

    Args:
        molecules: B molecules.
        temperature: :math:`\tau` in Angstrom.
    """
    positions, weights = molecules.positions, molecules.probabilities
    limits = bond_limits(molecules.elements)[:-1, :-1]
    lengths = limits[limits > 0].unique()  # type: ignore[no-untyped-call]
    # [K, E, E]: the bonds that share a limit are softened together.
    shares = (limits.unsqueeze(0) == lengths.view(-1, 1, 1, 1)).sum(dim=-1).to(weights)
    lengths = lengths.to(positions)
    apart = positions.unsqueeze(2) - positions.unsqueeze(1)
    # The root's slope at 0 is not finite, and the diagonal lies there.
    distances = (apart.square().sum(dim=-1) + 1e-12).sqrt()
    steps = torch.sigmoid((lengths - distances.unsqueeze(-1)) / temperature)
    likely = torch.einsum("bia,kac,bjc->bijk", weights, shares, weights)
    orders = (steps * likely).sum(dim=-1)
    same = torch.eye(orders.shape[1], dtype=torch.bool, device=orders.device)
    return orders.masked_fill(same, 0.0)


def soft_links(orders: Tensor) -> Tensor:
    """Return how firmly every two atoms are linked by bonds, [B, N, N] in [0, 1].

    A bond is as firm as its order, at most 1, a path as the product of its bonds, and two atoms are
    linked by the firmest path between them; an atom to itself by 1.

    Args:
        orders: Soft bond orders, [B, N, N], symmetric.
    """
    num_slots = orders.shape[1]
    same = torch.eye(num_slots, dtype=torch.bool, device=orders.device)
    links = orders.clamp(max=1).masked_fill(same, 1.0)
    # Each turn doubles the longest path that is covered; none has more than N - 1 bonds.
    for _ in range(max(0, num_slots - 2).bit_length()):
        links = (links.unsqueeze(3) * links.unsqueeze(1)).amax(dim=2)
    return links


def _used_and_wanted(molecules: Molecules, orders: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sum of each atom's orders and its valence, int [B, N]."""
    orders = bond_orders(molecules) if orders is None else orders
    used = orders.sum(dim=2, dtype=torch.int16)
    table = torch.tensor([*valences(molecules.elements), 0], dtype=torch.int16)
    return used, table.to(used.device)[molecules.types]


def _chunks(num_molecules: int, num_slots: int) -> Iterator[slice]:
    size = max(1, _CHUNK // max(1, num_slots**2))
    return (slice(i, i + size) for i in range(0, num_molecules, size))


def _pair_numbers(types: Tensor, count: int) -> Tensor:
    """Return the row of a flattened table of count x count for every two atoms, [B, N, N]."""
    rows = types % count  # EMPTY, -1, becomes the last
    return rows.unsqueeze(2) * count + rows.unsqueeze(1)


def _squared_distances(positions: Tensor) -> Tensor:
    """Return [B, N, N] without the cancellation of |x|^2 + |y|^2 - 2 x.y."""
    x, y, z = positions.unbind(dim=-1)
    total = (x.unsqueeze(2) - x.unsqueeze(1)).square()
    total += (y.unsqueeze(2) - y.unsqueeze(1)).square()
    return total.add_((z.unsqueeze(2) - z.unsqueeze(1)).square())
