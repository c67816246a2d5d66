"""Structures of SMILES: atoms placed by distance geometry and a force field."""

from collections.abc import Iterable, Sequence

from domains.molecule.chemistry.geometry import embed
from domains.molecule.chemistry.workers import in_processes
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
) -> Iterable[Entry]:
    """Iterate over the structures of SMILES with names and numbers."""
    allowed = frozenset(elements)
    jobs = [(smiles, allowed, max_atoms, charged) for _, _, smiles in lines]
    results = in_processes(embed, jobs, num_workers)
    for (name, number, _), result in zip(lines, results, strict=True):
        if result.positions is None:
            yield BadEntry(name, result.fault, result.detail)
        else:
            yield Structure(name, number, result.symbols, result.positions)
