"""The enumerated molecules: valid, different, accepted by the rules, the same every time."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rdkit import Chem

from domains.molecule.chemistry import bonds
from domains.molecule.chemistry.batch import Chemistry
from domains.molecule.chemistry.elements import EXPLICIT, HEAVY, VALENCES
from domains.molecule.sources import Enumerated, SmilesFile
from domains.molecule.sources import enumerated as sources
from domains.molecule.sources.enumeration import REJECTED, enumerate_smiles, grow
from domains.molecule.sources.packed import Packed, molecules_of
from domains.molecule.train import make_data
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.files import stamps

SMALL: dict[str, Any] = {"max_heavy": 3, "num_attempts": 300}


def test_growth_keeps_valences() -> None:
    rng = random.Random(0)
    rings = double = triple = 0
    for _ in range(300):
        mol = grow(6, rng)
        used = {atom.GetIdx(): 0 for atom in mol.GetAtoms()}
        for bond in mol.GetBonds():
            order = int(bond.GetBondTypeAsDouble())
            used[bond.GetBeginAtomIdx()] += order
            used[bond.GetEndAtomIdx()] += order
            double, triple = double + (order == 2), triple + (order == 3)
        assert all(used[a.GetIdx()] <= VALENCES[a.GetSymbol()] for a in mol.GetAtoms())
        assert Chem.SanitizeMol(mol, catchErrors=True) == 0
        assert len(Chem.GetMolFrags(mol)) == 1
        rings += mol.GetRingInfo().NumRings() > 0
    assert rings > 50 and double > 50 and triple > 5


def test_two_heavy_atoms_by_hand() -> None:
    """Every molecule of one or two heavy atoms that valence and the rules allow."""
    found = set(enumerate_smiles(2, 6000))
    one = {"C", "N", "O", "F"}
    carbon = {"CC", "C=C", "C#C", "CN", "C=N", "C#N", "CO", "C=O", "CF"}
    nitrogen = {"NN", "N=N", "N#N", "NO", "N=O"}  # hydroxylamine is one of an amine's hydroxyls
    assert found == one | carbon | nitrogen - {"NO"}


def test_rules_match_what_they_are_about() -> None:
    examples = {
        "bonds among oxygen and fluorine": "OO",
        "bonds of nitrogen and fluorine": "NF",
        "three nitrogen or oxygen atoms in a row": "NNN",
        "cumulated double bonds": "C=C=C",
        "triple bonds in rings": "C1CCCC#C1",
        "double bonds in rings of three": "C1=CC1",
        "rings of three that share a bond": "C1C2C1C2",
        "cages": "C12C3C1C23",
        "geminal hydroxyls, amines or fluorides": "OCO",
        "enols": "C=CO",
        "enamines with hydrogens": "C=CN",
        "hetero atoms at triple bonds of carbon": "C#CO",
        "carbonic acids": "OC(=O)O",
        "acyl fluorides": "CC(=O)F",
        "hydroxyls at amines": "CNO",
    }
    assert examples.keys() == REJECTED.keys()
    for name, smiles in examples.items():
        mol = Chem.MolFromSmiles(smiles)
        assert mol.HasSubstructMatch(Chem.MolFromSmarts(REJECTED[name])), name
    kept = ("CCO", "CC(=O)O", "CC(N)=O", "C1CC1", "c1ccoc1", "c1cn[nH]n1", "CC#N", "CON", "COC=O")
    patterns = [Chem.MolFromSmarts(smarts) for smarts in REJECTED.values()]
    for smiles in kept:
        mol = Chem.MolFromSmiles(smiles)
        assert not any(mol.HasSubstructMatch(pattern) for pattern in patterns), smiles


@pytest.mark.slow
def test_smiles_depend_on_the_seed_alone() -> None:
    first = enumerate_smiles(4, 5500)
    assert len(set(first)) == len(first) > 100
    assert enumerate_smiles(4, 5500, num_workers=2) == first
    # More chunks of attempts add molecules and move none.
    less = enumerate_smiles(4, 4096)
    assert 0 < len(less) < len(first) and first[: len(less)] == less
    assert enumerate_smiles(4, 4096, seed=1) != less


@pytest.mark.parametrize("elements", [EXPLICIT, HEAVY])
def test_the_source_keeps_stable_molecules(tmp_path: Path, elements: tuple[str, ...]) -> None:
    source = Enumerated(**SMALL, elements=elements, cache_dir=str(tmp_path))
    packed = source.load()
    molecules = molecules_of(packed, elements)
    view = Chemistry(molecules)
    assert view.connected.all() and len(set(view.smiles)) == len(packed) > 20
    if elements == EXPLICIT:
        assert bonds.molecule_stability(molecules).all()
    again = Enumerated(**SMALL, elements=elements, cache_dir=str(tmp_path / "other")).load()
    for name, values in vars(packed).items():
        np.testing.assert_array_equal(values, getattr(again, name))


def test_the_command_makes_and_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "ASSET", tmp_path / "assets" / "enumerated.safetensors")
    options = ["--max-heavy", "3", "--num-attempts", "300", "--cache-dir", str(tmp_path / "c")]
    make_data.main([*options, "--asset"])
    assert "5: " in capsys.readouterr().out.splitlines()[-1]  # methane has five atoms
    made = Enumerated(**SMALL, cache_dir=str(tmp_path / "c"))
    shipped = made.load()
    whole = super(Enumerated, made).load()
    assert isinstance(whole.positions, np.memmap) and not isinstance(shipped.positions, np.memmap)
    assert len(whole) - 2 <= len(shipped) <= len(whole)
    kept = np.isin(whole.numbers, shipped.numbers)
    np.testing.assert_array_equal(whole.types[kept], shipped.types)
    # Rounding, and the mean that it moves.
    np.testing.assert_allclose(whole.positions[kept], shipped.positions, atol=2.1e-4)
    assert bonds.molecule_stability(molecules_of(shipped, EXPLICIT)).all()
    with pytest.raises(UsageError, match="holds the molecules of other settings"):
        make_data.main([*options, "--heavy", "--asset"])
    # Other settings do not take these molecules.
    other = Enumerated(2, 200, cache_dir=str(tmp_path / "c")).load()
    assert isinstance(other.positions, np.memmap)


def test_the_molecules_that_ship(tmp_path: Path) -> None:
    source = Enumerated(cache_dir=str(tmp_path))
    source.prepare()
    packed: Packed = source.load()
    assert not [*tmp_path.iterdir()], "the file that ships has other settings than the defaults"
    molecules = molecules_of(packed, source.elements)
    heavy = (molecules.valid & (molecules.types != 0)).sum(dim=1)
    assert heavy.max() == 6 and bonds.molecule_stability(molecules).all()
    smiles = Chemistry(molecules).smiles
    assert len(set(smiles)) == len(smiles) > 5000 and None not in smiles
    np.testing.assert_allclose(packed.positions.sum(axis=1), 0, atol=1e-4)


def test_caches_that_were_made_before_are_used(tmp_path: Path) -> None:
    """The enumerated are those of 0.2.0, whose folder had this name; SMILES are read anew."""
    assert Enumerated(3, 300).digest() == "25fd188c34efb51a"
    path = tmp_path / "a.smi"
    path.write_text("C\n")
    source = SmilesFile(str(path))
    settings = [2, "SmilesFile", EXPLICIT, 29, False, True]
    assert source.identity() == [*settings, str(path.resolve()), stamps([path]), "smiles", False]


def test_settings_that_cannot_work() -> None:
    with pytest.raises(UsageError, match="must be at least 1"):
        Enumerated(0)
