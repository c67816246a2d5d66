"""Canonical SMILES: of samples, and of the molecules of files as those of samples are written.

Functions of one molecule, without torch: worker processes start fast.
"""

from rdkit import Chem

__all__ = ["plain_smiles", "to_smiles"]


def to_smiles(mol: Chem.Mol) -> str:
    """Return the canonical SMILES without stereochemistry, which graphs by distance do not have."""
    return Chem.MolToSmiles(mol, isomericSmiles=False)


def plain_smiles(mol: Chem.Mol) -> str:
    """Return the canonical SMILES of a file's molecule, as that of a sample is written.

    Atom maps, isotopes, stereochemistry and hydrogens that are atoms of their own are no part of
    it.
    """
    plain = Chem.Mol(mol)
    for atom in plain.GetAtoms():
        atom.SetIsotope(0)
        atom.SetAtomMapNum(0)
    return to_smiles(Chem.RemoveHs(plain))
