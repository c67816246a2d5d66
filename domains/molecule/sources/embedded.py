"""Structures of SMILES: atoms placed by distance geometry and a force field."""

from collections.abc import Iterable, Sequence

from domains.molecule.chemistry.geometry import embed
from domains.molecule.chemistry.workers import in_workers
from domains.molecule.sources.formats import Entry
from domains.molecule.sources.packed import Structure
from lit_rlft.kit.bad_entries import BadEntry

__all__ = ["embedded"]


def embedded(
    lines: Sequence[tuple[str, int, str]],
    elements: Sequence[str],
    max_atoms: int,
    charged: bool,
    num_workers: int,
    *,
    compared: bool = True,
) -> Iterable[Entry]:
    """Iterate over the structures of SMILES with names and numbers.

    Args:
        lines: Name, number and SMILES of each.
        elements: Elements that it may have.
        max_atoms: The most atoms that it may have.
        charged: Whether its atoms may have formal charges.
        num_workers: Worker processes that embed; 0 works in this one.
        compared: Whether a structure's bonds shall be read as its SMILES.
    """
    allowed = frozenset(elements)
    jobs = [(smiles, allowed, max_atoms, charged) for _, _, smiles in lines]
    results = in_workers(embed, jobs, num_workers)
    for (name, number, _), result in zip(lines, results, strict=True):
        if result.positions is None:
            yield BadEntry(name, result.fault, result.detail)
        else:
            yield Structure(
                name,
                number,
                result.symbols,
                result.positions,
                charge=result.charge,
                smiles=result.smiles if compared else "",
            )
