"""Descriptors of molecules, each a function of a sanitised RDKit molecule.

References:
    Quantifying the chemical beauty of drugs (Bickerton et al., 2012; QED),
    https://doi.org/10.1038/nchem.1243
    Prediction of Physicochemical Parameters by Atomic Contributions (Wildman & Crippen, 1999;
    logP), https://doi.org/10.1021/ci990307l
    Estimation of synthetic accessibility score of drug-like molecules (Ertl & Schuffenhauer,
    2009; SA), https://doi.org/10.1186/1758-2946-1-8
"""

from collections.abc import Callable

from rdkit import Chem
from rdkit.Chem import QED, rdMolDescriptors
from rdkit.Contrib.SA_Score import sascorer

__all__ = ["DESCRIPTORS", "synthetic_accessibility"]


def synthetic_accessibility(mol: Chem.Mol) -> float:
    """Return the SA score, 1 (easy to make) to 10."""
    return float(sascorer.calculateScore(mol))


def _logp(mol: Chem.Mol) -> float:
    return float(rdMolDescriptors.CalcCrippenDescriptors(mol)[0])


def _num_rings(mol: Chem.Mol) -> float:
    return float(mol.GetRingInfo().NumRings())


DESCRIPTORS: dict[str, Callable[[Chem.Mol], float]] = {
    "qed": QED.qed,
    "logp": _logp,
    "sa": synthetic_accessibility,
    "tpsa": rdMolDescriptors.CalcTPSA,
    "num_rings": _num_rings,
}
"""QED in [0, 1], logP, SA in [1, 10], TPSA in square Angstrom, number of rings."""
