"""Measurements of molecules: of each, of all together, and against a set of real ones.

RDKit's work on a batch is shared with the rewards. Report every number beside that of real
molecules under the same tables: 98 to 99 of 100 B3LYP geometries are stable, fewer of a force
field's.

References:
    Equivariant Diffusion for Molecule Generation in 3D (Hoogeboom et al., 2022; stability,
    validity, uniqueness), https://arxiv.org/abs/2203.17003
    MiDi (Vignac et al., 2023; distances of bond lengths and angles), arXiv 2302.09048
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import wasserstein_distance
from torch import Tensor

from domains.molecule.chemistry.batch import Chemistry, chemistry_of
from domains.molecule.chemistry.elements import EXPLICIT
from domains.molecule.samples import EMPTY, Molecules, check_molecules
from domains.molecule.sources import Enumerated, Source
from domains.molecule.sources.packed import known_smiles, molecules_of
from lit_rlft.core.checks import BadArgument, at_least
from lit_rlft.core.guard import LARGE_FALL, Guard
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.reward import Metric, SetMetric
from lit_rlft.kit.distinct import KindCount, kind_error, text_number
from lit_rlft.kit.ratios import error_of_ratio, ratio
from lit_rlft.kit.set_metrics import SourceDistances
from lit_rlft.kit.sources import prepare

__all__ = [
    "Drugs",
    "MoleculeMeasures",
    "Novelty",
    "SetDistances",
    "angles",
    "bond_lengths",
    "known_smiles",
    "mean_wasserstein",
    "size_total_variation",
    "type_total_variation",
]

_CHUNK = 256  # molecules of which angles are found at a time
_DESCRIPTORS = ("qed", "sa", "logp")


class MoleculeMeasures(SetMetric):
    """Stability, validity, connectedness and uniqueness.

    Of each molecule: "molecule_stability", "validity", whether RDKit sanitises the graph,
    "connected", whether it is in one part, of valid ones only, and "num_heavy", which counts atoms
    other than hydrogen. Of all molecules of an evaluation together: "atom_stability", stable atoms
    over atoms; "uniqueness", different over all valid ones, by the canonical SMILES of the largest
    part; "valid_unique", different valid ones over all, which papers call valid x unique. The
    latter two depend on the number of molecules: compare equally many. Stabilities are NaN where
    hydrogens are implicit.
    """

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the measures of each molecule, float64 [B] each."""
        chemistry = chemistry_of(check_molecules(samples, condition))
        molecules = chemistry.molecules
        stable = chemistry.molecule_stability.double()
        connected = np.where(chemistry.valid, chemistry.connected, np.nan)
        heavy = molecules.valid
        if not molecules.implicit_hydrogens:
            heavy = heavy & (molecules.types != molecules.elements.index("H"))
        return {
            "molecule_stability": _explicit(stable, molecules),
            "validity": torch.from_numpy(chemistry.valid).double(),
            "connected": torch.from_numpy(connected),
            "num_heavy": heavy.sum(dim=1).double(),
        }

    def features(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return numbers of atoms and of stable ones, and what tells molecules apart, [B] each."""
        chemistry = chemistry_of(check_molecules(samples, condition))
        molecules = chemistry.molecules
        stable = chemistry.atom_stability.sum(dim=1).double()
        return {
            "num_stable": _explicit(stable, molecules),
            "num_atoms": molecules.num_atoms.double(),
            **_identities(chemistry),
        }

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return {"atom_stability", "uniqueness", "valid_unique"}, NaN where nothing counts."""
        valid = features["valid"]
        num_different = len(features["identity"][valid].unique())  # type: ignore[no-untyped-call]
        return {
            "atom_stability": ratio(features["num_stable"], features["num_atoms"]),
            "uniqueness": _share(num_different, int(valid.sum())),
            "valid_unique": _share(num_different, len(valid)),
        }

    def guards(self) -> dict[str, Guard]:
        """Return all but "num_heavy"; of "uniqueness" a fall by a fifth is a sign."""
        names = ("molecule_stability", "atom_stability", "validity", "connected", "valid_unique")
        return dict.fromkeys(names, Guard()) | {"uniqueness": LARGE_FALL}

    def errors(
        self,
        features: Mapping[str, Tensor],
        other: Mapping[str, Tensor] | None = None,
        *,
        rows: Tensor | None = None,
    ) -> dict[str, float]:
        """Return the standard errors of all three."""
        arms = [features] if other is None else [features, other]
        stable = [(arm["num_stable"], arm["num_atoms"]) for arm in arms]
        counts = [_different(arm, self.compare(arm)["uniqueness"]) for arm in arms]
        shares = [_different(arm) for arm in arms]
        return {
            "atom_stability": error_of_ratio(*stable, groups=rows),
            "uniqueness": kind_error(*counts, groups=rows),
            "valid_unique": kind_error(*shares, groups=rows),
        }


class Drugs(Metric):
    """QED, SA score and logP of valid and connected molecules, and on request their strain.

    Radicals, whose atoms lack bonds, are valid: they count in the first three. They have no strain.

    Args:
        strain: Also measure "strain": MMFF94 energy before minus after minimisation, kcal/mol.
        num_workers: Worker processes for the strain; 0 works in this one.
    """

    def __init__(self, strain: bool = True, num_workers: int = 0) -> None:
        super().__init__()
        at_least(0, self, num_workers=num_workers)
        self.strain, self.num_workers = strain, num_workers

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return {"qed", "sa", "logp", "strain"}, float64 [B] each; NaN for other molecules."""
        chemistry = chemistry_of(check_molecules(samples, condition))
        values = {name: chemistry.values(name) for name in _DESCRIPTORS}
        if self.strain:
            values["strain"] = chemistry.strain(self.num_workers)
        return {name: torch.from_numpy(value.copy()) for name, value in values.items()}


class Novelty(SetMetric):
    """Share of an evaluation's different valid molecules that are not among known ones.

    "novelty", and "valid_unique_novel": their number over that of all molecules. Both sides' SMILES
    come from positions by way of the bond tables.

    Args:
        source: The known molecules, those that were trained on; the enumerated ones unless given.
    """

    def __init__(self, source: Source | None = None) -> None:
        super().__init__()
        self.source = source or Enumerated()
        self._known: frozenset[str] | None = None

    def check(self, pipeline: Pipeline) -> None:
        prepare(self, "source", self.source)

    def features(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return what tells molecules apart, and whether each is known, [B] each."""
        chemistry = chemistry_of(check_molecules(samples, condition))
        if self._known is None:
            self._known = known_smiles(self.source.load(), self.source.elements)
        known = [smiles in self._known for smiles in chemistry.smiles]
        return {"known": torch.tensor(known), **_identities(chemistry)}

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return {"novelty", "valid_unique_novel"}, NaN where nothing counts."""
        valid, identity = features["valid"], features["identity"]
        num_different, num_new = (
            len(identity[rows].unique())  # type: ignore[no-untyped-call]
            for rows in (valid, valid & ~features["known"])
        )
        return {
            "novelty": _share(num_new, num_different),
            "valid_unique_novel": _share(num_new, len(valid)),
        }

    def guards(self) -> dict[str, Guard]:
        """Return both, of which a fall by a fifth is a sign."""
        return dict.fromkeys(("novelty", "valid_unique_novel"), LARGE_FALL)

    def errors(
        self,
        features: Mapping[str, Tensor],
        other: Mapping[str, Tensor] | None = None,
        *,
        rows: Tensor | None = None,
    ) -> dict[str, float]:
        """Return the standard errors of both."""
        arms = [features] if other is None else [features, other]
        novel = [_novel(arm, self.compare(arm)["novelty"]) for arm in arms]
        return {
            "novelty": kind_error(*novel, groups=rows),
            "valid_unique_novel": kind_error(*map(_novel, arms), groups=rows),
        }


class SetDistances(SourceDistances["_Statistics"]):
    """Distances of samples from a set of molecules: elements, sizes, bonds, angles, descriptors.

    "type_tv" and "size_tv": half the sum of differences of the shares of elements and of numbers
    of atoms. "bond_length_w1" in Angstrom and "angle_w1" in degrees: Wasserstein-1 distances of
    bonds of each kind (elements and order) and of angles around each element, averaged with the
    set's frequencies over what both have. "qed_w1", "sa_w1", "logp_w1": the same of descriptors of
    valid and connected molecules.

    Args:
        source: The molecules compared with; the enumerated ones unless given. With hydrogens where
            the model draws them, without where it does not.
        max_molecules: Compare with so many of them, drawn at random once.
        num_draws: Groups of molecules left out in turn for the standard errors of a test; 0 leaves
            them out.
    """

    def __init__(
        self, source: Source | None = None, max_molecules: int = 2048, num_draws: int = 20
    ) -> None:
        super().__init__(num_draws)
        at_least(2, self, max_molecules=max_molecules)
        self.source, self.max_molecules = source or Enumerated(), max_molecules

    def check(self, pipeline: Pipeline) -> None:
        own, drawn = self.source.elements, getattr(pipeline, "elements", self.source.elements)
        if ("H" in own) != ("H" in drawn):
            raise BadArgument(
                self,
                "source",
                f"has the elements {list(own)}, but the model draws {list(drawn)}: hydrogens are "
                f"counted on one side alone; give a source with elements [{', '.join(drawn)}]",
            )
        prepare(self, "source", self.source)

    def features(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return positions [B, N, 3], types, numbers in `EXPLICIT`, [B, N], descriptors [B]."""
        return _features(chemistry_of(check_molecules(samples, condition)))

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the distances."""
        own, real = _statistics(features), self.real
        distances = {
            f"{name}_w1": mean_wasserstein(own.groups[name], groups)
            for name, groups in real.groups.items()
        }
        return {
            "type_tv": type_total_variation(own.molecules, real.molecules),
            "size_tv": size_total_variation(own.molecules, real.molecules),
            **distances,
        }

    def read(self) -> "_Statistics":
        packed = self.source.load()
        rows = np.random.default_rng(0).permutation(len(packed))[: self.max_molecules]
        real = Chemistry(molecules_of(packed, self.source.elements, np.sort(rows)))
        return _statistics(_features(real))


@dataclass(frozen=True)
class _Statistics:
    """Molecules to compare with, and their statistics by name and kind."""

    molecules: Molecules
    groups: dict[str, dict[Any, NDArray[np.float64]]]


def _features(chemistry: Chemistry) -> dict[str, Tensor]:
    molecules = chemistry.molecules
    numbers = [*map(EXPLICIT.index, molecules.elements), EMPTY]  # `EMPTY` finds the last
    types = torch.tensor(numbers)[molecules.types]
    descriptors = {name: torch.from_numpy(chemistry.values(name)) for name in _DESCRIPTORS}
    return {"positions": molecules.positions, "types": types, **descriptors}


def _statistics(features: Mapping[str, Tensor]) -> _Statistics:
    chemistry = Chemistry(Molecules.of(features["positions"], features["types"], EXPLICIT))
    groups = {"bond_length": bond_lengths(chemistry), "angle": angles(chemistry)}
    groups |= {name: {0: _finite(features[name].numpy())} for name in _DESCRIPTORS}
    return _Statistics(chemistry.molecules, groups)


def type_total_variation(a: Molecules, b: Molecules) -> float:
    """Return half the sum of differences of the shares of elements, in [0, 1]."""
    shares = [_type_shares(molecules) for molecules in (a, b)]
    return 0.5 * sum(
        abs(shares[0].get(symbol, 0.0) - shares[1].get(symbol, 0.0))
        for symbol in {*shares[0], *shares[1]}
    )


def size_total_variation(a: Molecules, b: Molecules) -> float:
    """Return half the sum of differences of the shares of numbers of atoms, in [0, 1]."""
    length = 1 + max(int(molecules.num_atoms.max()) for molecules in (a, b))
    counts = [torch.bincount(x.num_atoms, minlength=length).double() for x in (a, b)]
    return 0.5 * float((counts[0] / len(a) - counts[1] / len(b)).abs().sum())


def bond_lengths(chemistry: Chemistry) -> dict[Any, NDArray[np.float64]]:
    """Return the lengths in Angstrom of all bonds, by (element, element, order), sorted."""
    molecules, orders = chemistry.molecules, chemistry.orders
    rows, i, j = orders.triu(diagonal=1).nonzero(as_tuple=True)
    positions = molecules.positions.double()
    lengths = (positions[rows, i] - positions[rows, j]).norm(dim=1)
    types = torch.stack([molecules.types[rows, i], molecules.types[rows, j]], dim=1)
    first, second = types.sort(dim=1).values.unbind(dim=1)
    order, count = orders[rows, i, j].long(), len(molecules.elements)
    groups = _grouped(((first * count + second) * 4 + order).numpy(), lengths.numpy())
    names = molecules.elements
    return {
        (*sorted((names[key // 4 // count], names[key // 4 % count])), key % 4): group
        for key, group in groups.items()
    }


def angles(chemistry: Chemistry) -> dict[Any, NDArray[np.float64]]:
    """Return the angles in degrees between every two bonds of an atom, by the atom's element."""
    molecules = chemistry.molecules
    kinds: list[Tensor] = []
    found: list[Tensor] = []
    for start in range(0, len(molecules), _CHUNK):
        part = slice(start, start + _CHUNK)
        bonded = chemistry.orders[part] > 0
        earlier = torch.ones(bonded.shape[1:], dtype=torch.bool).triu(diagonal=1)
        pairs = bonded.unsqueeze(3) & bonded.unsqueeze(2) & earlier
        rows, centre, i, j = pairs.nonzero(as_tuple=True)
        positions = molecules.positions[part].double()
        arms = [positions[rows, end] - positions[rows, centre] for end in (i, j)]
        cosine = torch.cosine_similarity(arms[0], arms[1], dim=1).clamp(-1, 1)
        kinds.append(molecules.types[part][rows, centre])
        found.append(torch.rad2deg(cosine.acos()))
    groups = _grouped(torch.cat(kinds).numpy(), torch.cat(found).numpy())
    return {molecules.elements[key]: group for key, group in groups.items()}


def mean_wasserstein(
    a: Mapping[Any, NDArray[np.float64]], b: Mapping[Any, NDArray[np.float64]]
) -> float:
    """Return the mean Wasserstein-1 distance of the groups that both have, as frequent as in b.

    NaN where there are none.
    """
    common = [key for key in b if len(b[key]) and len(a.get(key, ()))]
    if not common:
        return float("nan")
    distances = [wasserstein_distance(a[key], b[key]) for key in common]
    return float(np.average(distances, weights=[len(b[key]) for key in common]))


def _explicit(values: Tensor, molecules: Molecules) -> Tensor:
    """Return values, NaN where hydrogens are implicit."""
    return torch.full_like(values, torch.nan) if molecules.implicit_hydrogens else values


def _identities(chemistry: Chemistry) -> dict[str, Tensor]:
    """Return a number per canonical SMILES, 0 for invalid molecules, and which are valid, [B]."""
    numbers = [0 if smiles is None else text_number(smiles) for smiles in chemistry.smiles]
    return {"identity": torch.tensor(numbers), "valid": torch.from_numpy(chemistry.valid)}


def _different(features: Mapping[str, Tensor], uniqueness: float | None = None) -> KindCount:
    """Return the different valid molecules over all; or, given the uniqueness, over valid ones."""
    kinds, valid = features["identity"], features["valid"].double()
    if uniqueness is None:
        return KindCount(kinds, valid / len(valid), torch.zeros_like(valid))
    # D / V moves with V too, by - uniqueness / V.
    return KindCount(kinds, valid / valid.sum(), -uniqueness * valid / valid.sum())


def _novel(features: Mapping[str, Tensor], novelty: float | None = None) -> KindCount:
    """Return the new different molecules over all; or, given the novelty, over different ones."""
    kinds, valid, new = features["identity"], features["valid"], ~features["known"]
    if novelty is None:
        weights = (valid & new).double() / len(valid)
    else:
        num_different = len(kinds[valid].unique())  # type: ignore[no-untyped-call]
        weights = (new.double() - novelty) * valid / num_different
    return KindCount(kinds, weights, torch.zeros_like(weights))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _type_shares(molecules: Molecules) -> dict[str, float]:
    types = molecules.types[molecules.valid]
    counts = torch.bincount(types, minlength=len(molecules.elements)).double()
    shares = (counts / counts.sum().clamp(min=1)).tolist()
    return dict(zip(molecules.elements, shares, strict=True))


def _grouped(
    kinds: NDArray[np.int64], values: NDArray[np.float64]
) -> dict[int, NDArray[np.float64]]:
    return {int(kind): values[kinds == kind] for kind in np.unique(kinds)}


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]
