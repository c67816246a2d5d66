"""Rewards of molecules, higher is better; a molecule that is not valid gets a stated number.

A molecule's graph follows from its atoms' distances (`domains.molecule.chemistry.bonds`). "Valid
and connected" means: RDKit sanitises the graph, and the graph is in one part. Policies that choose
sizes drift to small molecules, so sizes are conditions. Hydrocarbons and fragments are the next
ways to game a reward: measure what the molecules are made of, and whether they are connected.
"""

import importlib.util
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from rdkit import Chem
from torch import Tensor

from domains.molecule.chemistry import bonds
from domains.molecule.chemistry.batch import Chemistry, chemistry_of
from domains.molecule.chemistry.elements import VALENCES, valences
from domains.molecule.chemistry.smiles import plain_smiles
from domains.molecule.samples import Molecules, check_molecules
from domains.molecule.sources import Source
from domains.molecule.sources.formats import read_smiles
from domains.molecule.sources.packed import known_smiles
from lit_rlft.core.checks import UsageError, at_least, finite, one_of, positive, require
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.reward import Reward
from lit_rlft.kit.called import name_of, numbers_of
from lit_rlft.kit.sources import prepare

__all__ = [
    "QED",
    "TPSA",
    "XTB",
    "AtomCount",
    "FunctionReward",
    "LogP",
    "Novelty",
    "RingCount",
    "SoftConnected",
    "SoftValence",
    "Stability",
    "Strain",
    "Substructures",
    "SyntheticAccessibility",
    "ValidConnected",
]

Electronic = Literal["dipole", "gap"]


class _Chemical(Reward):
    """A function of RDKit's view of a batch, in [0, 1] for valid and connected molecules.

    Args:
        invalid: Reward of all others, and of those whose quantity cannot be computed; below 1.
    """

    most = 1.0
    """What a valid molecule gets at most."""

    def __init__(self, invalid: float = 0.0) -> None:
        super().__init__()
        finite(self, invalid=invalid)
        require(
            invalid < self.most, self, "invalid", "below 1, the most that a valid molecule gets"
        )
        self.invalid = invalid

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the reward of each molecule, float32 [B]."""
        return self._scored(samples, condition)[0]

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the reward and "<name>/invalid", [B] each.

        The latter is 1 unless the molecule is valid and connected and the quantity is known.
        """
        rewards, invalid = self._scored(samples, condition)
        return {self.name: rewards, f"{self.name}/invalid": invalid}

    def _scored(self, samples: Any, condition: Condition) -> tuple[Tensor, Tensor]:
        molecules = check_molecules(samples, condition)
        chemistry = chemistry_of(molecules)
        values = self.values(chemistry)
        unknown = np.isnan(values)
        rewards = np.where(unknown, self.invalid, values).astype(np.float32)
        invalid = (unknown | ~chemistry.connected).astype(np.float32)
        device = molecules.types.device
        return torch.from_numpy(rewards).to(device), torch.from_numpy(invalid).to(device)

    @abstractmethod
    def values(self, chemistry: Chemistry) -> NDArray[np.float64]:
        """Return the reward of each molecule, [B]; NaN where it is `invalid`."""


class Stability(_Chemical):
    """1 if every atom has exactly the bonds of its valence, else 0; or graded, in [0, 1].

    Args:
        graded: Return (share of stable atoms) ** power instead.
        power: The larger, the more the last unstable atoms count; with `graded` alone.
        connected: Count a molecule in several parts as not stable.

    Raises:
        UsageError: In `check`, or when called: hydrogens are implicit, so valences always filled.
    """

    def __init__(self, graded: bool = False, power: float = 1.0, connected: bool = False) -> None:
        super().__init__()
        positive(self, power=power)
        require(graded or power == 1, self, "power", f"1 unless graded is true, got {power}")
        self.graded, self.power, self.connected = graded, power, connected

    def check(self, pipeline: Pipeline) -> None:
        self._check_hydrogens(getattr(pipeline, "implicit_hydrogens", False))

    def values(self, chemistry: Chemistry) -> NDArray[np.float64]:
        self._check_hydrogens(chemistry.molecules.implicit_hydrogens)
        values = chemistry.molecule_stability.double()
        if self.graded:
            num_atoms = chemistry.molecules.num_atoms.clamp(min=1)
            values = (chemistry.atom_stability.sum(dim=1).double() / num_atoms) ** self.power
        if self.connected:
            values = values * torch.from_numpy(chemistry.connected)
        return values.numpy()

    def _check_hydrogens(self, implicit: bool) -> None:
        if implicit:
            raise UsageError(
                "reward: Stability needs explicit hydrogens, which this model does not generate; "
                "use domains.molecule.rewards.ValidConnected"
            )


class ValidConnected(_Chemical):
    """1 for valid and connected molecules, 0 for others."""

    def __init__(self) -> None:
        super().__init__()

    def values(self, chemistry: Chemistry) -> NDArray[np.float64]:
        return chemistry.connected.astype(np.float64)


class QED(_Chemical):
    """How drug-like a molecule is: QED / scale, in [0, 1].

    Args:
        scale: QED of the reward 1: molecules of nine heavy atoms hardly reach more than 0.55.
        invalid: Reward of molecules that are not valid and connected.
    """

    distinguishes = True

    def __init__(self, scale: float = 1.0, invalid: float = 0.0) -> None:
        super().__init__(invalid)
        positive(self, scale=scale)
        self.scale = scale

    def values(self, chemistry: Chemistry) -> NDArray[np.float64]:
        return np.minimum(chemistry.values("qed") / self.scale, 1.0)


class SyntheticAccessibility(_Chemical):
    """How easily a molecule can be made, (10 - SA) / 9 in [0, 1].

    Args:
        invalid: Reward of molecules that are not valid and connected.
    """

    distinguishes = True

    def values(self, chemistry: Chemistry) -> NDArray[np.float64]:
        return (10 - chemistry.values("sa")) / 9


class _Target(_Chemical):
    r"""How close a quantity x is to a target, in (0, 1].

    .. math:: r = \exp(-(x - x^*)^2 / (2 w^2))

    Args:
        target: :math:`x^*`.
        width: w, the distance from it at which the reward is 0.61; None takes the class's own.
        invalid: Reward of molecules that are not valid and connected.
    """

    default_width = 0.5

    def __init__(self, target: float, width: float | None = None, invalid: float = 0.0) -> None:
        super().__init__(invalid)
        width = self.default_width if width is None else width
        finite(self, target=target)
        positive(self, width=width)
        self.target, self.width = target, width

    def values(self, chemistry: Chemistry) -> NDArray[np.float64]:
        return np.exp(-((self.quantity(chemistry) - self.target) ** 2) / (2 * self.width**2))

    @abstractmethod
    def quantity(self, chemistry: Chemistry) -> NDArray[np.float64]:
        """Return x of each molecule, [B]; NaN where it is not valid and connected."""


class LogP(_Target):
    """How close Crippen's logP is to a target, in (0, 1]; of width 0.5 unless given."""

    def quantity(self, chemistry: Chemistry) -> NDArray[np.float64]:
        return chemistry.values("logp")


class TPSA(_Target):
    """How close the polar surface in square Angstrom is to a target, in (0, 1].

    Of width 10 unless given.
    """

    default_width = 10.0

    def quantity(self, chemistry: Chemistry) -> NDArray[np.float64]:
        return chemistry.values("tpsa")


class RingCount(_Target):
    """How close the number of rings is to a target, in (0, 1]; of width 0.5 unless given."""

    def quantity(self, chemistry: Chemistry) -> NDArray[np.float64]:
        return chemistry.values("num_rings")


class AtomCount(_Target):
    """How close the number of atoms of an element is to a target, in (0, 1].

    Args:
        symbol: The element.
        target: Wanted number.
        **rest: width (0.5 unless given) and invalid, as of `LogP`.
    """

    def __init__(self, symbol: str, target: float, **rest: Any) -> None:
        super().__init__(target, **rest)
        if symbol not in VALENCES:
            raise UsageError(
                f"reward.init_args.symbol must be one of {list(VALENCES)}, got {symbol!r}"
            )
        self.symbol = symbol

    def check(self, pipeline: Pipeline) -> None:
        self._check_symbol(getattr(pipeline, "elements", (self.symbol,)))

    def quantity(self, chemistry: Chemistry) -> NDArray[np.float64]:
        molecules = chemistry.molecules
        self._check_symbol(molecules.elements)
        number = molecules.elements.index(self.symbol)
        counts = (molecules.types == number).sum(dim=1).double().numpy()
        return np.where(chemistry.connected, counts, np.nan)

    def _check_symbol(self, elements: Sequence[str]) -> None:
        if self.symbol not in elements:
            raise UsageError(
                f"reward.init_args.symbol is {self.symbol!r}, but the model's elements are "
                f"{list(elements)}"
            )


class Substructures(_Chemical):
    """Share of SMARTS patterns that are present or absent as wanted, in [0, 1].

    Args:
        present: Patterns that a molecule shall have. On the command line with quotes within the
            list, '["[F,Cl,Br]"]': without them SMARTS' own brackets are a list's.
        absent: Patterns that it shall not have.
        all_or_nothing: Give 1 only where every wish is met, 0 otherwise.
        invalid: Reward of molecules that are not valid and connected.

    Raises:
        UsageError: A text is no pattern; in `check`: a wanted one needs an element that the model
            does not generate.
    """

    def __init__(
        self,
        present: Sequence[str] = (),
        absent: Sequence[str] = (),
        all_or_nothing: bool = False,
        invalid: float = 0.0,
    ) -> None:
        super().__init__(invalid)
        if isinstance(present, str) or isinstance(absent, str):
            raise UsageError(
                "reward.init_args: present and absent are lists of patterns, such as ['C=O']"
            )
        if not (present or absent):
            raise UsageError("reward.init_args: Substructures needs patterns in present or absent")
        self.wishes = [(_pattern(smarts), True) for smarts in present]
        self.wishes += [(_pattern(smarts), False) for smarts in absent]
        self.all_or_nothing = all_or_nothing
        self._key = f"substructures {[*present]} {[*absent]}"

    def check(self, pipeline: Pipeline) -> None:
        elements = getattr(pipeline, "elements", None)
        if elements is None:
            return
        for pattern, wanted in self.wishes:
            if wanted and (foreign := _foreign(pattern, elements)):
                raise UsageError(
                    f"reward.init_args.present: {Chem.MolToSmarts(pattern)!r} needs "
                    f"{', '.join(foreign)}, which no molecule here has; the model's elements are "
                    f"{list(elements)}"
                )

    def values(self, chemistry: Chemistry) -> NDArray[np.float64]:
        shares = chemistry.computed(self._key, self._share)
        return np.where(np.isnan(shares), np.nan, shares == 1) if self.all_or_nothing else shares

    def _share(self, mol: Chem.Mol) -> float:
        met = [mol.HasSubstructMatch(pattern) == wanted for pattern, wanted in self.wishes]
        return sum(met) / len(met)


class Strain(_Chemical):
    r"""How relaxed a geometry is, in (0, 1].

    The reward is :math:`\exp(-\Delta E / s)`, with :math:`\Delta E` the MMFF94 energy before minus
    after minimisation. DFT geometries of small molecules have about 1 kcal/mol. Radicals have none.

    Args:
        scale: s in kcal/mol.
        num_workers: Worker processes; 0 works in this one.
        invalid: Reward of molecules that are not valid and connected, radicals, or unknown to
            MMFF94.
    """

    def __init__(self, scale: float = 10.0, num_workers: int = 0, invalid: float = 0.0) -> None:
        super().__init__(invalid)
        positive(self, scale=scale)
        at_least(0, self, num_workers=num_workers)
        self.scale, self.num_workers = scale, num_workers

    def values(self, chemistry: Chemistry) -> NDArray[np.float64]:
        return np.exp(-np.maximum(chemistry.strain(self.num_workers), 0) / self.scale)


class Novelty(_Chemical):
    """1 for valid and connected molecules whose graph is not in a file of SMILES, 0 for others.

    Stereochemistry, isotopes and atom maps of the file do not count.

    Args:
        path: A .csv file with a header, or one with a SMILES a line.
        column: Name of the SMILES' column in a .csv file.
        source: The molecules that were trained on: what their positions are read as is known
            beside the file. None suffices where they are a SmilesFile's that leaves out what is
            read as another molecule, as it does unless `only_stable` is false.

    Raises:
        UsageError: The file is missing or holds no readable SMILES.
    """

    def __init__(self, path: str, column: str = "smiles", source: Source | None = None) -> None:
        super().__init__()
        self.source = source
        self._trained_on: frozenset[str] | None = None
        parsed = (Chem.MolFromSmiles(text) for _, _, text in read_smiles(Path(path), column))
        self.known = frozenset(plain_smiles(mol) for mol in parsed if mol is not None)
        if not self.known:
            raise UsageError(f"reward.init_args.path: {path} holds no SMILES that RDKit can read")

    def check(self, pipeline: Pipeline) -> None:
        if self.source is not None:
            prepare(self, "source", self.source)

    def values(self, chemistry: Chemistry) -> NDArray[np.float64]:
        if self.source is not None and self._trained_on is None:
            self._trained_on = known_smiles(self.source.load(), self.source.elements)
        known = self.known | (self._trained_on or frozenset())
        new = [smiles not in known for smiles in chemistry.smiles]
        return (np.array(new, bool) & chemistry.connected).astype(np.float64)


class XTB(_Target):
    """How close a GFN2-xTB quantity at the generated geometry is to a target, in (0, 1].

    `exp(-(x - target)^2 / (2 width^2))`; about a hundred molecules a second.

    Args:
        quantity: "dipole" in Debye or "gap", HOMO-LUMO, in eV.
        target: Wanted value.
        width: Distance from it at which the reward is 0.61; None takes 0.5.
        num_workers: Worker processes; 0 works in this one.
        invalid: Reward of molecules that are not valid and connected or do not converge.

    Raises:
        UsageError: tblite is not installed.
    """

    def __init__(
        self,
        quantity: Electronic = "dipole",
        target: float = 3.0,
        width: float | None = None,
        num_workers: int = 0,
        invalid: float = 0.0,
    ) -> None:
        super().__init__(target, width, invalid)
        at_least(0, self, num_workers=num_workers)
        if importlib.util.find_spec("tblite") is None:
            raise UsageError("reward: XTB needs tblite; install it with pip install lit-rlft[xtb]")
        one_of(self, "quantity", _ELECTRONIC, quantity)
        self.column, self.num_workers = _ELECTRONIC.index(quantity), num_workers

    def quantity(self, chemistry: Chemistry) -> NDArray[np.float64]:
        return chemistry.electronic(self.num_workers)[:, self.column]


class FunctionReward(_Chemical):
    """Scores molecules by any Python function: docking, a property predictor of another package.

    Args:
        function: Takes a list of sanitised RDKit molecules, each valid, in one part and with the
            generated positions, and returns a number per molecule, or None for one that it could
            not score. On the command line its path, such as my_scores.docking.
        invalid: Reward of molecules that are not valid and connected, and of those without a
            number; a number that is worse than what the function returns.

    Raises:
        UsageError: The function returns something else.
    """

    most = math.inf

    # Not list[Chem.Mol]: the command line's parser cannot read RDKit's types.
    def __init__(
        self, function: Callable[[list[Any]], Sequence[float | None]], invalid: float = 0.0
    ) -> None:
        super().__init__(invalid)
        self.function = function
        self._said = False

    @property
    def name(self) -> str:
        return name_of(self.function, type(self).__name__)

    def values(self, chemistry: Chemistry) -> NDArray[np.float64]:
        values = np.full(len(chemistry), np.nan)
        rows = chemistry.connected.nonzero()[0].tolist()
        if rows:
            mols = [chemistry.graphs.full(row) for row in rows]
            for mol in mols:
                Chem.SanitizeMol(mol)
            values[rows] = numbers_of(self.function, "molecules", mols)
            self._compare_with_invalid(values)
        return values

    def _compare_with_invalid(self, values: NDArray[np.float64]) -> None:
        """Say once where `invalid` is better than what the function returned."""
        lowest = np.fmin.reduce(values, initial=np.inf)
        if lowest < self.invalid and not self._said:
            self._said = True
            rank_zero_warn(
                f"{self.name} returned {lowest:g} for a valid molecule, less than the "
                f"{self.invalid:g} of those that are not valid: training will seek the latter; "
                "set reward.init_args.invalid to a number below all that it returns"
            )


class _Soft(Reward):
    """A reward with gradient in positions and probabilities, from soft bond orders.

    Args:
        temperature: Width of the steps between bond orders, in Angstrom.
        invalid: Reward of molecules without atoms or with numbers that are not finite.
    """

    differentiable = True

    def __init__(self, temperature: float = 0.03, invalid: float = -16.0) -> None:
        super().__init__()
        positive(self, temperature=temperature)
        finite(self, invalid=invalid)
        self.temperature, self.invalid = temperature, invalid

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the reward of each molecule, [B]."""
        return self._scored(samples, condition)[0]

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return the reward, and "<name>/invalid": 1 where it is `invalid`, [B] each."""
        rewards, whole = self._scored(samples, condition)
        return {self.name: rewards, f"{self.name}/invalid": (~whole).to(rewards)}

    def _scored(self, samples: Any, condition: Condition) -> tuple[Tensor, Tensor]:
        """Return the rewards, and which molecules have atoms and finite numbers, [B] each."""
        molecules = check_molecules(samples, condition)
        numbers = torch.cat([molecules.positions, molecules.probabilities], dim=2)
        finite = numbers.isfinite().all(dim=2) | ~molecules.valid
        whole = finite.all(dim=1) & molecules.valid.any(dim=1)
        # Not finite times 0 is not 0, in gradients neither.
        unused = ~(whole.unsqueeze(1) & molecules.valid).unsqueeze(-1)
        positions = molecules.positions.masked_fill(unused, 0.0)
        weights = molecules.probabilities.masked_fill(unused, 0.0)
        masked = replace(molecules, positions=positions, probabilities=weights)
        orders = bonds.soft_bond_orders(masked, self.temperature)
        return self._value(masked, orders).where(whole, self.invalid), whole

    @abstractmethod
    def _value(self, molecules: Molecules, orders: Tensor) -> Tensor:
        """Return rewards [B] of molecules whose unused slots are 0, with orders [B, N, N]."""


class SoftValence(_Soft):
    r"""Minus the mean squared error of soft valences, in (-inf, 0], with gradient.

    .. math:: r = -\frac1n \sum_i \Big(\sum_j o_{ij} - \sum_a p_i(a) V_a\Big)^2

    with the soft bond orders of `domains.molecule.chemistry.bonds.soft_bond_orders`. Molecules that
    fall into pieces can be as good as whole ones: add `SoftConnected`. With implicit hydrogens only
    bonds beyond a valence count, so an atom without any bond has the best value.

    Args:
        temperature: Width of the steps between bond orders, in Angstrom.
        invalid: Reward of molecules without atoms or with numbers that are not finite.
    """

    def _value(self, molecules: Molecules, orders: Tensor) -> Tensor:
        weights = molecules.probabilities
        wanted = weights @ torch.tensor(valences(molecules.elements)).to(weights)
        errors = orders.sum(dim=2) - wanted
        if molecules.implicit_hydrogens:
            errors = errors.clamp(min=0)
        squares = errors.square().masked_fill(~molecules.valid, 0.0)
        return -squares.sum(dim=1) / molecules.num_atoms.clamp(min=1)


class SoftConnected(_Soft):
    """How firmly bonds hold a molecule together, in [0, 1], with gradient.

    The mean over all n x n pairs of atoms, each with itself among them, of the firmest path between
    them: `bonds.soft_links` of soft bond orders. 1 for molecules in one piece, single atoms too. It
    pulls on bonds that are about to break. Bonds that are too long by more than a few times the
    temperature get no gradient.

    Args:
        temperature: Width of the steps between bond orders, in Angstrom.
        invalid: Reward of molecules without atoms or with numbers that are not finite.
    """

    def __init__(self, temperature: float = 0.03, invalid: float = 0.0) -> None:
        super().__init__(temperature, invalid)

    def _value(self, molecules: Molecules, orders: Tensor) -> Tensor:
        pairs = molecules.valid.unsqueeze(2) & molecules.valid.unsqueeze(1)
        links = bonds.soft_links(orders).masked_fill(~pairs, 0.0)
        return links.sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)


_ELECTRONIC = get_args(Electronic)


def _foreign(pattern: Chem.Mol, elements: Sequence[str]) -> list[str]:
    """Return elements that `elements` lack and an atom of a pattern has to be.

    An atom of several ("[F,Cl]") or with a condition ("[CH3]") is taken to be met.
    """
    named = set()
    for atom in pattern.GetAtoms():
        number, symbol = atom.GetAtomicNum(), atom.GetSymbol()
        if number and atom.GetSmarts().strip("[]").lower() in (symbol.lower(), f"#{number}"):
            named.add(symbol)
    return sorted(named - {*elements})


def _pattern(smarts: str) -> Chem.Mol:
    pattern = Chem.MolFromSmarts(smarts)
    if pattern is None or not pattern.GetNumAtoms():
        raise UsageError(f"reward.init_args: {smarts!r} is no SMARTS pattern")
    # Molecules have hydrogens as numbers of their heavy atoms.
    pattern = Chem.MergeQueryHs(pattern)
    if any(atom.GetAtomicNum() == 1 for atom in pattern.GetAtoms()):
        raise UsageError(
            f"reward.init_args: {smarts!r} has a hydrogen that is an atom of its own, which no "
            "molecule here has; say it of its neighbour, as in [OX2H]"
        )
    return pattern
