"""RDKit's view of a batch: against RDKit on the SMILES that the geometries were made of."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import QED, Crippen, rdMolDescriptors
from rdkit.Contrib.SA_Score import sascorer

from domains.molecule.chemistry import batch as module
from domains.molecule.chemistry.batch import INVALID, Chemistry, chemistry_of, keys
from domains.molecule.chemistry.elements import EXPLICIT
from domains.molecule.chemistry.geometry import electronic_of, embed, strain_of, with_hydrogens
from domains.molecule.chemistry.workers import in_workers
from domains.molecule.samples import Molecules
from lit_rlft.core.checks import UsageError
from tests.domains.molecule.known import from_atoms, from_smiles, geometry

STABLE = ("C", "C#N", "C=O", "O=CO", "CCO", "CC(N)=O", "C1CC1", "CC#CC", "FC(F)F", "N", "O", "CF")
HYDROGEN = (("H", "H"), [(0, 0, 0), (0.74, 0, 0)])


def canonical(smiles: str) -> str:
    return Chem.MolToSmiles(Chem.MolFromSmiles(smiles))


def overfull() -> tuple[str, list]:
    around = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1)]
    return "CHHHHH", [(0, 0, 0), *[tuple(1.05 * x for x in place) for place in around]]


@pytest.mark.parametrize("heavy", [False, True])
def test_smiles_of_known_molecules(heavy: bool) -> None:
    view = Chemistry(from_smiles(*STABLE, heavy=heavy))
    assert view.smiles == [canonical(smiles) for smiles in STABLE]
    assert view.valid.all() and view.connected.all()


def test_descriptors_are_those_of_the_smiles() -> None:
    view = Chemistry(from_smiles(*STABLE))
    functions = {
        "qed": QED.qed,
        "logp": Crippen.MolLogP,
        "tpsa": rdMolDescriptors.CalcTPSA,
        "sa": sascorer.calculateScore,
        "num_rings": rdMolDescriptors.CalcNumRings,
    }
    for name, function in functions.items():
        expected = [function(Chem.MolFromSmiles(smiles)) for smiles in STABLE]
        np.testing.assert_allclose(view.values(name), expected, atol=1e-9, err_msg=name)


def test_lone_hydrogens_stay_atoms() -> None:
    view = Chemistry(from_atoms([HYDROGEN, (("H",), [(0, 0, 0)]), (("C",), [(0, 0, 0)])]))
    assert view.smiles == ["[H][H]", "[H]", "[C]"] and view.connected.all()


def test_missing_bonds_are_radicals_and_too_many_are_invalid() -> None:
    symbols, places = geometry("C")
    methyl = (symbols[:4], places[:4])
    view = Chemistry(from_atoms([methyl, overfull(), geometry("C")]))
    assert view.smiles == ["[CH3]", None, "C"]
    assert view.valid.tolist() == [True, False, True]
    assert view.molecule_stability.tolist() == [False, False, True]
    assert view.num_fragments.tolist() == [1, 0, 1]
    assert np.isnan(view.values("qed")).tolist() == [False, True, False]


def test_parts_are_counted_and_the_largest_is_named() -> None:
    (a, first), (b, second) = geometry("CC"), geometry("O")
    both = (a + b, np.concatenate([first, second + 20]))
    view = Chemistry(from_atoms([both, geometry("CC")]))
    assert view.num_fragments.tolist() == [2, 1] and view.smiles == ["CC", "CC"]
    # Stable and valid, but descriptors are those of molecules in one part.
    assert view.molecule_stability.all() and view.valid.all()
    assert view.connected.tolist() == [False, True]
    assert np.isnan(view.values("logp")).tolist() == [True, False]


def test_the_largest_part_counts_hydrogens() -> None:
    (a, first), (b, second) = geometry("CC"), geometry("O=CC=O")
    # Eight atoms are more than six, although more of these are heavy.
    for order in (1, -1):
        parts = [(a, first), (b, second + 20)][::order]
        both = (parts[0][0] + parts[1][0], np.concatenate([parts[0][1], parts[1][1]]))
        assert Chemistry(from_atoms([both])).smiles == ["CC"]


def test_one_view_is_made_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(
        module, "Chemistry", lambda molecules: made.append(1) or Chemistry(molecules)
    )
    monkeypatch.setattr(module, "_VIEWS", type(module._VIEWS)())
    batch = from_smiles("C", "CC")
    first = chemistry_of(batch)
    copies = (
        batch.detach(),
        batch.index(slice(None)),
        Molecules.of(batch.positions.clone(), batch.types.clone(), EXPLICIT),
    )
    assert all(chemistry_of(copy) is first for copy in copies) and len(made) == 1
    moved = Molecules.of(batch.positions + 1e-3, batch.types, EXPLICIT)
    retyped = Molecules.of(batch.positions, batch.types.clamp(max=1), EXPLICIT)
    heavy = from_smiles("C", "CC", heavy=True)
    assert chemistry_of(moved) is not first and chemistry_of(heavy) is not first
    assert chemistry_of(retyped) is first and len(made) == 3
    for shift in range(10):
        chemistry_of(Molecules.of(batch.positions + shift, batch.types, EXPLICIT))
    assert len(module._VIEWS) <= module._NUM_KEPT and chemistry_of(batch) is not first


def test_descriptors_are_computed_once() -> None:
    view = Chemistry(from_smiles("CCO", "CC"))
    calls = []
    for _ in range(2):
        values = view.computed("count", lambda mol: calls.append(1) or float(mol.GetNumAtoms()))
    assert values.tolist() == [3, 2] and len(calls) == 2


def test_keys_are_the_same_for_the_same_graph() -> None:
    symbols, places = geometry("CCO")
    turn = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]], float)
    order = np.random.default_rng(0).permutation(len(symbols))
    moved = ([symbols[i] for i in order], (places @ turn.T + 3)[order])
    found = keys(from_atoms([(symbols, places), moved, geometry("COC"), overfull()]))
    assert found[0] == found[1] == "CCO" and found[2:] == ["COC", INVALID]


def test_strain_of_a_minimum_and_of_a_stretched_bond() -> None:
    symbols, places = geometry("CCO")
    stretched = places.copy()
    stretched[symbols.index("O")] += (
        0.08 * (places[2] - places[1]) / np.linalg.norm(places[2] - places[1])
    )
    view = Chemistry(from_atoms([(symbols, places), (symbols, stretched), overfull()]))
    values = view.strain()
    assert 0 <= values[0] < 0.2 and values[1] > 1 and math.isnan(values[2])


def test_radicals_have_no_strain() -> None:
    """MMFF94 has no types of theirs: RDKit gives a methyl radical the carbon of methane."""
    symbols, places = geometry("C")
    ethane = geometry("CC")
    ethyl = (ethane[0][:-1], ethane[1][:-1])
    view = Chemistry(from_atoms([(symbols[:4], places[:4]), ethyl, (symbols, places)]))
    assert view.smiles == ["[CH3]", "[CH2]C", "C"] and view.connected.all()
    assert np.isnan(view.strain()).tolist() == [True, True, False]


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_molecules_with_an_atom_at_no_place_are_invalid(heavy: bool, lost: float) -> None:
    whole = from_smiles("C", "CCO", heavy=heavy)
    positions = whole.positions.clone()
    positions[0, 0, 1] = lost
    positions[1, -1] = lost if heavy is False else positions[1, -1]
    positions[0, 1:][~whole.valid[0, 1:]] = lost  # anything may be in empty slots
    view = Chemistry(Molecules.of(positions, whole.types, whole.elements, heavy))
    assert view.valid.tolist() == view.connected.tolist() == [False, heavy]
    assert view.smiles == [None, "CCO" if heavy else None]
    assert np.isnan(view.values("qed")).tolist() == [True, not heavy]


def test_strain_with_implicit_hydrogens_places_them_first() -> None:
    values = Chemistry(from_smiles("CCO", "CC(C)=O", heavy=True)).strain()
    assert (values >= 0).all() and (values < 2).all()


def test_hydrogens_are_added_around_atoms_that_stay() -> None:
    molecules = from_smiles("CCO", heavy=True)
    mol = Chemistry(molecules).graphs.full(0)
    whole = with_hydrogens(mol)
    assert whole is not None and whole.GetNumAtoms() == 9
    np.testing.assert_allclose(
        whole.GetConformer().GetPositions()[:3], molecules.positions[0, :3], atol=1e-6
    )


def test_processes_give_what_one_does() -> None:
    mols = [Chemistry(from_smiles(s)).graphs.full(0) for s in ("CCO", "CC", "C#N", "O")]
    here, there = (list(in_workers(strain_of, mols, n)) for n in (0, 2))
    np.testing.assert_allclose(here, there, atol=1e-9)
    with pytest.raises(UsageError, match="num_workers must be 0 or more"):
        list(in_workers(strain_of, mols, -1))


@pytest.mark.parametrize(
    ("smiles", "fault"),
    [
        ("C1CC", "an unparsable SMILES"),
        ("C(C)(C)(C)(C)C", "an unparsable SMILES"),
        ("", "an unparsable SMILES"),
        (
            "CCO,46.1",
            "a comma, which no SMILES has; values apart by commas are read from a .csv file",
        ),
        ("CCl", "elements other than C, F, H, N, O"),
        ("C[CH2]", "a radical"),
        ("C[N+](=O)[O-]", "a formal charge"),
        ("C.C", "more than one part"),
        ("[NH4+].[O-]C=O", "more than one part"),
        ("CCCCCC", "more atoms than 9"),
        ("C1#CC1", "no conformer (ETKDG found none)"),
    ],
)
def test_smiles_that_cannot_be_used(smiles: str, fault: str) -> None:
    made = embed((smiles, frozenset(EXPLICIT), 9, False))
    assert made.positions is None
    if smiles != "C1#CC1":  # some versions find one
        assert made.fault == fault


def test_embedding_is_a_function_of_the_smiles() -> None:
    job = ("CCO", frozenset("CNOF"), 3, False)
    first, second = embed(job), embed(job)
    assert first.symbols[:3] == ("C", "C", "O") and len(first.symbols) == 9
    np.testing.assert_array_equal(first.positions, second.positions)
    # Limits count what is kept: three heavy atoms here.
    assert embed(("CCCO", frozenset("CNOF"), 3, False)).fault == "more atoms than 3"


def test_gap_and_dipole_of_known_molecules() -> None:
    pytest.importorskip("tblite")
    view = Chemistry(from_smiles("O", "C", "CC(=O)C"))
    dipole, gap = view.electronic().T
    # Experiment: 1.85, 0 and 2.88 Debye.
    np.testing.assert_allclose(dipole, [1.85, 0, 2.88], atol=0.7)
    assert gap[1] > gap[0] > gap[2] > 0
    assert math.isnan(electronic_of(Chemistry(from_atoms([overfull()])).graphs.full(0))[0])


def test_nothing_reaches_the_terminal() -> None:
    code = (
        "from domains.molecule.chemistry.geometry import embed\n"
        "from rdkit import Chem\n"
        "for s in ('C1CC', 'C(C)(C)(C)(C)C', 'not a SMILES'):\n"
        "    embed((s, frozenset('HCNOF'), 9, False)), Chem.MolFromSmarts('[')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout and not done.stderr


def test_empty_batches() -> None:
    view = Chemistry(from_smiles("C").index(slice(0, 0)))
    assert len(view) == 0 and view.smiles == [] and view.values("qed").shape == (0,)
    alone = Chemistry(Molecules.of(torch.zeros(1, 2, 3), torch.full((1, 2), -1), EXPLICIT))
    assert alone.smiles == [None] and not alone.valid.any()
