"""Positions of atoms by RDKit's distance geometry and force field, and energies at them.

Functions of one molecule, without torch: worker processes start fast.

References:
    Improving Conformer Generation for Small Rings and Macrocycles Based on Distance Geometry and
    Experimental Torsional-Angle Preferences (Wang et al., 2020; ETKDGv3),
    https://doi.org/10.1021/acs.jcim.0c00025
    Merck molecular force field. I (Halgren, 1996; MMFF94),
    https://doi.org/10.1002/(SICI)1096-987X(199604)17:5/6<490::AID-JCC1>3.0.CO;2-P
    GFN2-xTB (Bannwarth et al., 2019), https://doi.org/10.1021/acs.jctc.8b01176
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Chem import rdDistGeom
from rdkit.Chem import rdForceFieldHelpers as force_fields
from rdkit.ForceField.rdForceField import ForceField

from domains.molecule.chemistry.smiles import plain_smiles

__all__ = ["Embedded", "electronic_of", "embed", "strain_of", "with_hydrogens"]

_SEED = 0
_MAX_TRIES = 10
_MAX_STEPS = 200
_DEBYE = 2.541746  # of one atomic unit of dipole moment
_ELECTRONVOLT = 27.211386  # of one Hartree
_BOHR = 0.52917721  # Angstrom


@dataclass(frozen=True)
class Embedded:
    """A molecule's atoms, hydrogens among them, or what is wrong with its SMILES.

    Attributes:
        symbols: [n] elements.
        positions: float32 [n, 3] in Angstrom.
        smiles: The canonical SMILES; empty where an atom has a formal charge, which the bond tables
            do not know.
        charge: Sum of the formal charges.
        fault: What is wrong, in a phrase; empty where nothing is.
        detail: Where exactly.
    """

    symbols: tuple[str, ...] = ()
    positions: NDArray[np.float32] | None = None
    smiles: str = ""
    charge: int = 0
    fault: str = ""
    detail: str = ""


def embed(job: tuple[str, frozenset[str], int, bool]) -> Embedded:
    """Place the atoms of a SMILES by ETKDGv3, then minimise by MMFF94; a function of the SMILES.

    Args:
        job: The SMILES, the elements it may have, the most atoms it may have (hydrogens counted
            where "H" is among the elements), and whether atoms may have formal charges.
    """
    smiles, elements, max_atoms, charged = job
    mol = Chem.MolFromSmiles(smiles)
    if mol is None or not mol.GetNumAtoms():
        comma = "a comma, which no SMILES has; values apart by commas are read from a .csv file"
        return Embedded(fault=comma if "," in smiles else "an unparsable SMILES", detail=smiles)
    whole = Chem.AddHs(mol)
    fault, detail = _fault(whole, elements, max_atoms, charged)
    if fault:
        return Embedded(fault=fault, detail=detail or smiles)
    settings = rdDistGeom.ETKDGv3()
    settings.randomSeed = _SEED  # type: ignore[assignment]  # wrong in RDKit's stubs
    settings.maxIterations = _MAX_TRIES  # type: ignore[assignment]
    if rdDistGeom.EmbedMolecule(whole, settings) != 0:
        return Embedded(fault="no conformer (ETKDG found none)", detail=smiles)
    field = _field(whole)
    if field is None:
        return Embedded(fault="no MMFF94 parameters", detail=smiles)
    field.Minimize(maxIts=_MAX_STEPS)
    positions = whole.GetConformer().GetPositions().astype(np.float32)
    if not np.isfinite(positions).all():
        return Embedded(fault="no conformer (positions are not finite)", detail=smiles)
    symbols = tuple(atom.GetSymbol() for atom in whole.GetAtoms())
    neutral = not any(atom.GetFormalCharge() for atom in mol.GetAtoms())
    known = plain_smiles(mol) if neutral else ""
    return Embedded(symbols, positions, known, Chem.GetFormalCharge(mol))


def with_hydrogens(mol: Chem.Mol) -> Chem.Mol | None:
    """Return a molecule with the hydrogens that its valences lack, placed around fixed atoms.

    They are minimised by MMFF94; None where it lacks parameters or RDKit refuses the molecule.

    Args:
        mol: A molecule with positions, which need not be sanitised.
    """
    if Chem.SanitizeMol(mol, catchErrors=True):
        return None
    num_atoms = mol.GetNumAtoms()
    whole = Chem.AddHs(mol, addCoords=True)
    field = _field(whole)
    if field is None:
        return None
    if whole.GetNumAtoms() > num_atoms:
        for atom in range(num_atoms):
            field.AddFixedPoint(atom)
        field.Minimize(maxIts=_MAX_STEPS)
    return whole


def strain_of(mol: Chem.Mol) -> float:
    """Return the MMFF94 energy before minus after minimisation in kcal/mol, or NaN.

    NaN for radicals too: the force field takes their atoms for those of other molecules.

    Args:
        mol: A molecule with positions, as for `with_hydrogens`.
    """
    whole = with_hydrogens(mol)
    if whole is None or any(atom.GetNumRadicalElectrons() for atom in whole.GetAtoms()):
        return math.nan
    field = _field(whole)
    if field is None:
        return math.nan
    before = field.CalcEnergy()
    field.Minimize(maxIts=_MAX_STEPS)
    return float(before - field.CalcEnergy())


def electronic_of(mol: Chem.Mol) -> tuple[float, float]:
    """Return the dipole moment in Debye and the HOMO-LUMO gap in eV by GFN2-xTB, or NaN twice.

    Needs tblite.

    Args:
        mol: A molecule with positions, as for `with_hydrogens`.
    """
    from tblite.interface import Calculator

    whole = with_hydrogens(mol)
    if whole is None:
        return math.nan, math.nan
    numbers = np.array([atom.GetAtomicNum() for atom in whole.GetAtoms()])
    radicals = sum(atom.GetNumRadicalElectrons() for atom in whole.GetAtoms())
    positions = whole.GetConformer().GetPositions() / _BOHR
    try:
        calculator = Calculator("GFN2-xTB", numbers, positions, uhf=radicals)
        calculator.set("verbosity", 0)
        result = calculator.singlepoint()
    except (RuntimeError, ValueError):
        return math.nan, math.nan
    levels, filled = result.get("orbital-energies"), result.get("orbital-occupations") > 0.5
    gap = levels[~filled].min(initial=math.inf) - levels[filled].max(initial=-math.inf)
    return float(np.linalg.norm(result.get("dipole")) * _DEBYE), float(gap * _ELECTRONVOLT)


def _fault(
    mol: Chem.Mol, elements: frozenset[str], max_atoms: int, charged: bool
) -> tuple[str, str]:
    """Return why the model cannot have a molecule, with details; two empty strings if it can."""
    atoms = list(mol.GetAtoms())
    unknown = {atom.GetSymbol() for atom in atoms} - elements - {"H"}
    if unknown:
        return f"elements other than {', '.join(sorted(elements))}", ", ".join(sorted(unknown))
    # Distance geometry knows no distances between parts, and lays them over each other.
    num_parts = len(Chem.GetMolFrags(mol))
    if num_parts > 1:
        return "more than one part", f"{num_parts} parts"
    if any(atom.GetNumRadicalElectrons() for atom in atoms):
        return "a radical", ""
    if not charged and any(atom.GetFormalCharge() for atom in atoms):
        return "a formal charge", ""
    count = sum(atom.GetSymbol() in elements for atom in atoms)
    if count > max_atoms:
        return f"more atoms than {max_atoms}", f"{count} atoms"
    return "", ""


def _field(mol: Chem.Mol) -> ForceField | None:
    properties = force_fields.MMFFGetMoleculeProperties(mol)
    if properties is None:
        return None
    return force_fields.MMFFGetMoleculeForceField(mol, properties)
