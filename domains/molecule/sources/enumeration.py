"""Small molecules grown at random, as SMILES: the default data set is made of them."""

import random
from collections.abc import Sequence

from rdkit import Chem

from domains.molecule.chemistry.elements import VALENCES
from domains.molecule.chemistry.graphs import BOND_TYPES
from domains.molecule.chemistry.workers import in_workers

__all__ = ["REJECTED", "enumerate_smiles", "grow"]

_WEIGHTS = {"C": 0.70, "N": 0.14, "O": 0.14, "F": 0.02}
_GROWTH = 3.0  # how many times as often a molecule has one heavy atom more
_MAX_CLOSURES, _MAX_PROMOTIONS = 3, 4
_ATTEMPTS_PER_CHUNK = 4096

REJECTED: dict[str, str] = {
    "bonds among oxygen and fluorine": "[#8,#9]~[#8,#9]",
    "bonds of nitrogen and fluorine": "[#7]~[#9]",
    "three nitrogen or oxygen atoms in a row": "[#7,#8;!a]~[#7,#8;!a]~[#7,#8;!a]",
    "cumulated double bonds": "*=*=*",
    "triple bonds in rings": "*#@*",
    "double bonds in rings of three": "[r3]=@[r3]",
    "rings of three that share a bond": "[r3;R2]~[r3;R2]",
    "cages": "[R3]",
    "geminal hydroxyls, amines or fluorides": ("[CX4]([OX2H,NX3;!$(N=*),F])[OX2H,NX3H2,F]"),
    "enols": "[CX3;!a]=[CX3;!a][OX2H]",
    "enamines with hydrogens": "[CX3;!a]=[CX3;!a][NX3H2]",
    "hetero atoms at triple bonds of carbon": "C#C[O,N,F]",
    "carbonic acids": "[OX2H]C(=O)[O,N,F]",
    "acyl fluorides": "C(=O)F",
    "hydroxyls at amines": "[NX3][OX2H]",
}
"""SMARTS of molecules that are left out: unstable groups and impossible rings."""

_PATTERNS = [Chem.MolFromSmarts(smarts) for smarts in REJECTED.values()]


def enumerate_smiles(
    max_heavy: int, num_attempts: int, seed: int = 0, num_workers: int = 0
) -> list[str]:
    """Return canonical SMILES of different molecules, in the order in which they were grown.

    Args:
        max_heavy: Most heavy atoms.
        num_attempts: Molecules grown.
        seed: Seed of the growth; the result does not depend on `num_workers`.
        num_workers: Worker processes that grow; 0 works in this one.
    """
    starts = range(0, num_attempts, _ATTEMPTS_PER_CHUNK)
    jobs = [
        (seed, chunk, min(_ATTEMPTS_PER_CHUNK, num_attempts - start), max_heavy)
        for chunk, start in enumerate(starts)
    ]
    found: dict[str, None] = {}
    for chunk in in_workers(_grow_chunk, jobs, num_workers):
        found.update(dict.fromkeys(chunk))
    return list(found)


def grow(num_heavy: int, rng: random.Random) -> Chem.RWMol:
    """Grow a molecule: a random tree, then ring closures and bonds promoted, all under valence.

    Args:
        num_heavy: Number of its heavy atoms.
        rng: The randomness.
    """
    symbols = rng.choices([*_WEIGHTS], [*_WEIGHTS.values()], k=num_heavy)
    free = [VALENCES[symbol] for symbol in symbols]
    orders: dict[tuple[int, int], int] = {}

    def bond(a: int, b: int) -> None:
        pair = (min(a, b), max(a, b))
        orders[pair] = orders.get(pair, 0) + 1
        free[a] -= 1
        free[b] -= 1

    for atom in range(1, num_heavy):
        open_ones = [other for other in range(atom) if free[other]]
        if not open_ones:
            return _build(symbols[:atom], orders)
        bond(atom, rng.choice(open_ones))
    for _ in range(rng.randint(0, _MAX_CLOSURES)):
        open_ones = [atom for atom in range(num_heavy) if free[atom]]
        if len(open_ones) >= 2:
            a, b = rng.sample(open_ones, 2)
            if (min(a, b), max(a, b)) not in orders:
                bond(a, b)
    for _ in range(rng.randint(0, _MAX_PROMOTIONS)):
        pairs = [(a, b) for (a, b), n in orders.items() if free[a] and free[b] and n < 3]
        if pairs:
            bond(*rng.choice(pairs))
    return _build(symbols, orders)


def _build(symbols: Sequence[str], orders: dict[tuple[int, int], int]) -> Chem.RWMol:
    mol = Chem.RWMol()
    for symbol in symbols:
        mol.AddAtom(Chem.Atom(symbol))
    for (a, b), order in orders.items():
        mol.AddBond(a, b, BOND_TYPES[order])
    return mol


def _grow_chunk(job: tuple[int, int, int, int]) -> list[str]:
    """Return the SMILES of a chunk's accepted molecules, each once."""
    seed, chunk, num_attempts, max_heavy = job
    rng = random.Random(f"{seed},{chunk}")
    sizes = range(1, max_heavy + 1)
    drawn = rng.choices(sizes, [_GROWTH**size for size in sizes], k=num_attempts)
    found: dict[str, None] = {}
    seen: set[str] = set()
    for size in drawn:
        mol = grow(size, rng)
        if Chem.SanitizeMol(mol, catchErrors=True):
            continue
        smiles = Chem.MolToSmiles(mol)
        if smiles in seen:
            continue
        seen.add(smiles)
        if not any(mol.HasSubstructMatch(pattern) for pattern in _PATTERNS):
            found[smiles] = None
    return list(found)
