"""Rewards of molecules: by hand on known ones, stated numbers for those that are not valid."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import QED as RDKitQED
from rdkit.Chem import Crippen, rdMolDescriptors
from rdkit.Contrib.SA_Score import sascorer
from scipy.stats import spearmanr

from domains.molecule import rewards
from domains.molecule.chemistry import bonds
from domains.molecule.chemistry.batch import chemistry_of
from domains.molecule.chemistry.elements import EXPLICIT, HEAVY
from domains.molecule.networks import Architecture
from domains.molecule.pipeline import MoleculePipeline
from domains.molecule.samples import EMPTY, Molecules
from domains.molecule.sources import SmilesFile
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.core.checks import UsageError
from lit_rlft.core.reward import Reward, WeightedSum, check_rewards
from lit_rlft.core.selection import Threshold, Unique
from tests.domains.molecule.chemistry.test_batch import overfull
from tests.domains.molecule.known import conditions, from_atoms, from_smiles, geometry, pair


def reward_of(reward: Reward, molecules: Molecules) -> list[float]:
    values = reward(molecules, conditions(len(molecules)))
    return check_rewards(reward, values, len(molecules)).tolist()


def broken() -> Molecules:
    """Return ethane, an over-full carbon, two parts, and atoms at no place."""
    (a, first), (b, second) = geometry("CC"), geometry("O")
    parts = (a + b, np.concatenate([first, second + 20]))
    lost = (("C", "H"), np.full((2, 3), np.nan))
    return from_atoms([geometry("CC"), overfull(), parts, lost])


ALL: list[Reward] = [
    rewards.Stability(),
    rewards.Stability(graded=True, power=4),
    rewards.ValidConnected(),
    rewards.QED(),
    rewards.LogP(1.0),
    rewards.SyntheticAccessibility(),
    rewards.TPSA(20.0),
    rewards.RingCount(1),
    rewards.AtomCount("O", 1),
    rewards.Substructures(["[OX2H]"], ["F"]),
    rewards.Strain(),
    rewards.SoftValence(),
    rewards.SoftConnected(),
]


@pytest.mark.parametrize("reward", ALL, ids=lambda reward: type(reward).__name__)
def test_no_reward_is_nan(reward: Reward) -> None:
    values = reward_of(reward, broken())
    assert np.isfinite(values).all()
    nothing = Molecules.of(torch.zeros(1, 3, 3), torch.full((1, 3), EMPTY), EXPLICIT)
    assert np.isfinite(reward_of(reward, nothing)).all()
    assert reward_of(reward, broken().index(slice(0, 0))) == []


def test_stability() -> None:
    symbols, places = geometry("C")
    molecules = from_atoms([(symbols, places), (symbols[:4], places[:4]), overfull()])
    assert reward_of(rewards.Stability(), molecules) == [1, 0, 0]
    graded = reward_of(rewards.Stability(graded=True), molecules)
    assert graded == pytest.approx([1, 3 / 4, 5 / 6])
    fourth = reward_of(rewards.Stability(graded=True, power=4), molecules)
    assert fourth == pytest.approx([1, (3 / 4) ** 4, (5 / 6) ** 4])
    assert reward_of(rewards.Stability(), broken()) == [1, 0, 1, 0]
    assert reward_of(rewards.Stability(connected=True), broken()) == [1, 0, 0, 0]
    with pytest.raises(UsageError, match=r"use domains.molecule.rewards.ValidConnected"):
        reward_of(rewards.Stability(), from_smiles("C", heavy=True))


def test_valid_and_connected() -> None:
    # The last one's two atoms are at no place.
    assert reward_of(rewards.ValidConnected(), broken()) == [1, 0, 0, 0]
    assert reward_of(rewards.ValidConnected(), from_smiles("CCO", heavy=True)) == [1]


@pytest.mark.parametrize("heavy", [False, True])
def test_rewards_of_descriptors(heavy: bool) -> None:
    smiles = ("CCO", "C1CC1N", "CC(=O)NC")
    molecules = from_smiles(*smiles, heavy=heavy)
    mols = [Chem.MolFromSmiles(text) for text in smiles]
    qed = [RDKitQED.qed(mol) for mol in mols]
    assert reward_of(rewards.QED(), molecules) == pytest.approx(qed, abs=1e-6)
    assert reward_of(rewards.QED(scale=0.01), molecules) == [1, 1, 1]
    logp = [np.exp(-((Crippen.MolLogP(mol) - 0.4) ** 2) / 0.5) for mol in mols]
    assert reward_of(rewards.LogP(0.4), molecules) == pytest.approx(logp, abs=1e-6)
    tpsa = [np.exp(-((rdMolDescriptors.CalcTPSA(mol) - 20) ** 2) / 200) for mol in mols]
    assert reward_of(rewards.TPSA(20), molecules) == pytest.approx(tpsa, abs=1e-6)
    rings = [np.exp(-2), 1, np.exp(-2)]
    assert reward_of(rewards.RingCount(1), molecules) == pytest.approx(rings, abs=1e-6)
    nitrogen = [np.exp(-0.5), 1, 1]
    found = reward_of(rewards.AtomCount("N", 1, width=1), molecules)
    assert found == pytest.approx(nitrogen, abs=1e-6)


def test_synthetic_accessibility_prefers_simple_molecules() -> None:
    simple, odd = reward_of(rewards.SyntheticAccessibility(), from_smiles("CCO", "C1OC12CN2"))
    assert 1 >= simple > odd >= 0
    score = sascorer.calculateScore(Chem.MolFromSmiles("CCO"))
    assert simple == pytest.approx((10 - score) / 9, abs=1e-6)


def test_substructures() -> None:
    molecules = from_smiles("CCO", "CCF", "CC")
    wishes: dict[str, Any] = {"present": ["[OX2H]", "C"], "absent": ["F"]}
    shares = reward_of(rewards.Substructures(**wishes), molecules)
    assert shares == pytest.approx([1, 1 / 3, 2 / 3])
    whole = reward_of(rewards.Substructures(**wishes, all_or_nothing=True), molecules)
    assert whole == [1, 0, 0]
    # Two of the kind on one batch do not share what they found.
    assert reward_of(rewards.Substructures(["F"]), molecules) == [0, 1, 0]


def test_strain_and_novelty(tmp_path: Path) -> None:
    symbols, places = geometry("CCO")
    generator = np.random.default_rng(0)
    shaken = places + 0.04 * generator.normal(size=places.shape)
    calm, shaken_value = reward_of(
        rewards.Strain(), from_atoms([(symbols, places), (symbols, shaken)])
    )
    assert calm > 0.97 > 0.9 > shaken_value > 0
    energy = float(chemistry_of(from_atoms([(symbols, shaken)])).strain()[0])
    assert shaken_value == pytest.approx(np.exp(-energy / 10), rel=1e-6)
    path = tmp_path / "known.smi"
    path.write_text("OCC ethanol\nnot-a-molecule\n")
    novelty = rewards.Novelty(str(path))
    assert reward_of(novelty, from_smiles("CCO", "COC")) == [0, 1]
    assert reward_of(novelty, broken()) == [1, 0, 0, 0]
    path.write_text("not-a-molecule\n")
    with pytest.raises(UsageError, match="holds no SMILES"):
        rewards.Novelty(str(path))


def test_molecules_that_were_trained_on_are_not_new(tmp_path: Path) -> None:
    """What the bond tables read benzene as without hydrogens is known where the source is."""
    path = tmp_path / "known.smi"
    path.write_text("c1ccccc1\nCO\n")
    benzene = from_smiles("c1ccccc1", heavy=True)
    assert chemistry_of(benzene).smiles == ["C1CCCCC1"]
    assert reward_of(rewards.Novelty(str(path)), benzene) == [1]
    source = SmilesFile(
        str(path), elements=HEAVY, only_stable=False, cache_dir=str(tmp_path / "cache")
    )
    novelty = rewards.Novelty(str(path), source=source)
    assert reward_of(novelty, benzene) == [0]
    assert reward_of(novelty, from_smiles("CO", "CN", heavy=True)) == [0, 1]


def test_labels_of_atoms_make_no_molecule_new(tmp_path: Path) -> None:
    labelled = (
        "[CH3:1][OH:2]",
        "[2H]C([2H])([2H])O",
        "[13CH3]O",
        "[H]OC([H])([H])[H]",
        "[CH3]O[2H]",
    )
    path = tmp_path / "known.smi"
    for smiles in labelled:
        path.write_text(f"{smiles}\n")
        assert reward_of(rewards.Novelty(str(path)), from_smiles("CO", "CN")) == [0, 1], smiles


def test_invalid_molecules_get_the_number_that_is_stated() -> None:
    assert reward_of(rewards.QED(invalid=-0.5), broken())[1:] == [-0.5] * 3
    with pytest.raises(UsageError, match="invalid must be a finite number"):
        rewards.QED(invalid=float("nan"))


def test_invalid_molecules_are_counted() -> None:
    found = rewards.QED().evaluate(broken(), conditions(4))
    assert found.keys() == {"QED", "QED/invalid"} and found["QED"][0] > 0
    assert found["QED/invalid"].tolist() == [0, 1, 1, 1]
    lone = pair("H", "F", 0.92)  # valid, but unknown to the force field
    found = rewards.Strain().evaluate(lone, conditions(1))
    assert found["Strain"].item() == 0 and found["Strain/invalid"].item() == 1
    found = rewards.SoftValence().evaluate(broken(), conditions(4))
    assert found["SoftValence/invalid"].tolist() == [0, 0, 0, 1]
    total = WeightedSum({"drug": rewards.QED(), "soft": rewards.SoftValence()})
    found = total.evaluate(broken(), conditions(4))
    assert found["drug/invalid"].tolist() == [0, 1, 1, 1]
    assert [*found] == ["WeightedSum", "drug", "drug/invalid", "soft", "soft/invalid"]


def test_weighted_sums_share_the_view() -> None:
    total = WeightedSum({"a": rewards.QED(), "b": rewards.ValidConnected()}, {"b": 2.0})
    (value,) = reward_of(total, from_smiles("CCO"))
    assert value == pytest.approx(2 + RDKitQED.qed(Chem.MolFromSmiles("CCO")), abs=1e-6)


def test_xtb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tblite", None)
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install lit-rlft\[xtb\]"):
        rewards.XTB()


def test_xtb_of_known_molecules() -> None:
    pytest.importorskip("tblite")
    molecules = from_atoms([geometry("O"), geometry("C"), overfull()])
    dipole = reward_of(rewards.XTB("dipole", target=2.0, width=1.0), molecules)
    assert dipole[0] > 0.9 and dipole[1] < 0.2 and dipole[2] == 0
    with pytest.raises(UsageError, match=r"quantity is .*; use 'dipole' or 'gap'"):
        rewards.XTB("energy")  # type: ignore[arg-type]


def test_hydrogens_of_patterns_are_those_of_their_neighbours() -> None:
    """Molecules have none as atoms: "[O][H]" matched nothing, and stood in `absent` for all."""
    molecules = from_smiles("CCO", "COC")
    for smarts in ("[OX2H]", "[O][H]", "[H]O"):
        assert reward_of(rewards.Substructures([smarts]), molecules) == [1, 0]


@pytest.mark.parametrize(
    ("present", "foreign"),
    [("CS", "S"), ("[Br]C", "Br"), ("[#17]", "Cl"), ("sP", "P, S"), ("[S,O]", ""), ("*[SX2]", "")],
)
def test_patterns_of_elements_that_the_model_lacks(present: str, foreign: str) -> None:
    pipeline = MoleculePipeline(None, architecture=Architecture(width=8, depth=1, max_atoms=3))
    reward = rewards.Substructures([present], ["S"])  # that it lacks it is no obstacle
    if foreign:
        with pytest.raises(UsageError, match=f"present: .* needs {foreign}, which no molecule"):
            reward.check(pipeline)
    else:
        reward.check(pipeline)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rewards.QED(scale=0), "scale must be positive"),
        (lambda: rewards.LogP(1, width=-1), "width must be positive"),
        (lambda: rewards.AtomCount("S", 1), "symbol must be one of"),
        (lambda: rewards.QED(invalid=1.0), "QED: invalid must be below 1, the most that"),
        (lambda: rewards.AtomCount("C", 3, invalid=2.0), "AtomCount: invalid must be below 1"),
        (lambda: rewards.Substructures(), "needs patterns"),
        (lambda: rewards.Substructures(["[C"]), "is no SMARTS pattern"),
        (lambda: rewards.Substructures([""]), "is no SMARTS pattern"),
        (lambda: rewards.Substructures("CO"), "are lists of patterns"),
        (lambda: rewards.Substructures(["[H]"]), "a hydrogen that is an atom of its own"),
        (lambda: rewards.Substructures(["C"], ["[#1]"]), "a hydrogen that is an atom of its own"),
        (lambda: rewards.SoftValence(temperature=0), "temperature must be positive"),
    ],
)
def test_settings_that_cannot_work(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (rewards.AtomCount("H", 4), "symbol is 'H'"),
        (rewards.Stability(), "needs explicit hydrogens"),
    ],
)
def test_what_the_model_does_not_make_is_refused_before_anything_is_sampled(
    reward: Reward, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        reward_of(reward, from_smiles("C", heavy=True))
    architecture = Architecture(implicit_hydrogens=True, width=8, depth=1, max_atoms=3)
    pipeline = MoleculePipeline(None, architecture=architecture)
    for total in (reward, WeightedSum({"a": rewards.QED(), "b": reward})):
        with pytest.raises(UsageError, match=message):
            GRAFT(pipeline, total, num_candidates=2).setup("fit")
    GRAFT(pipeline, rewards.QED(), num_candidates=2).setup("fit")


def test_soft_valence_by_hand() -> None:
    molecules = pair("C", "H", 1.19)  # at the limit: half a bond
    (value,) = reward_of(rewards.SoftValence(), molecules)
    assert value == pytest.approx(-((0.5 - 4) ** 2 + (0.5 - 1) ** 2) / 2, abs=1e-5)
    heavy = from_atoms([(("C", "O"), [(0, 0, 0), (1.25, 0, 0)])], heavy=True)
    (value,) = reward_of(rewards.SoftValence(), heavy)
    assert value == 0  # nothing exceeds a valence


def test_soft_valence_agrees_with_stability() -> None:
    base = from_smiles("CCO", "CC(C)=O", "C1CC1N", "C#CCO", "CC(N)=O")
    generator = torch.Generator().manual_seed(1)
    scales = torch.linspace(0, 0.3, 12).view(-1, 1, 1, 1)
    noise = torch.randn(12, *base.positions.shape, generator=generator)
    moved = (base.positions + scales * noise).flatten(0, 1)
    molecules = Molecules.of(moved, base.types.repeat(12, 1), EXPLICIT)
    soft = reward_of(rewards.SoftValence(), molecules)
    graded = reward_of(rewards.Stability(graded=True), molecules)
    assert spearmanr(soft, graded).statistic > 0.85


def test_soft_valence_mends_a_molecule() -> None:
    """Its gradient leads from a disturbed ethanol back to a stable one."""
    base = from_smiles("CCO")
    generator = torch.Generator().manual_seed(3)
    noise = 0.08 * torch.randn(base.positions.shape, generator=generator)
    positions = (base.positions + noise).requires_grad_()
    reward = rewards.SoftValence(temperature=0.06)
    assert not bonds.molecule_stability(Molecules.of(positions, base.types, EXPLICIT)).any()
    optimizer = torch.optim.Adam([positions], lr=0.03)
    for _ in range(40):
        molecules = Molecules.of(positions, base.types, EXPLICIT)
        loss = -reward(molecules, conditions(1)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert bonds.molecule_stability(Molecules.of(positions, base.types, EXPLICIT)).all()


def test_soft_connected_by_hand() -> None:
    # At 0.84 Angstrom, the limit of a bond, there is half a bond.
    chain = ("HHH", [(0, 0, 0), (0.84, 0, 0), (1.68, 0, 0)])
    pieces = ("HHH", [(0, 0, 0), (0.84, 0, 0), (20, 0, 0)])
    values = reward_of(rewards.SoftConnected(), from_atoms([chain, pieces]))
    assert values == pytest.approx([(3 + 2 * (0.5 + 0.5 + 0.25)) / 9, (3 + 2 * 0.5) / 9], abs=1e-4)


def test_soft_connected_is_the_share_of_pairs_in_one_piece() -> None:
    values = reward_of(rewards.SoftConnected(temperature=1e-3), from_smiles("CCO", "C1CC1N", "C"))
    assert values == pytest.approx([1, 1, 1], abs=1e-4)
    parts = [("CC", "O"), ("C", "C"), ("C1CC1N", "N")]
    atoms, shares = [], []
    for (a, first), (b, second) in ((geometry(x), geometry(y)) for x, y in parts):
        atoms.append((a + b, np.concatenate([first, second + 20])))
        shares.append((len(a) ** 2 + len(b) ** 2) / (len(a) + len(b)) ** 2)
    values = reward_of(rewards.SoftConnected(temperature=1e-3), from_atoms(atoms))
    assert values == pytest.approx(shares, abs=1e-4)


@pytest.mark.parametrize(
    ("soft", "invalid"), [(rewards.SoftValence(), -16.0), (rewards.SoftConnected(), 0.0)]
)
def test_soft_rewards_have_a_finite_gradient_everywhere(soft: Reward, invalid: float) -> None:
    base = broken()
    positions, weights = base.positions.clone(), base.probabilities.clone()
    positions[~base.valid] = torch.nan  # anything may be in empty slots
    positions.requires_grad_()
    weights.requires_grad_()
    molecules = Molecules(positions, base.types, weights, EXPLICIT)
    reward = soft(molecules, conditions(len(base)))
    assert reward[3] == invalid
    lost = torch.full_like(base.probabilities, torch.nan)
    nowhere = Molecules(base.positions, base.types, lost, EXPLICIT)
    assert soft(nowhere, conditions(len(base))).tolist() == [invalid] * 4
    reward.sum().backward()
    assert positions.grad is not None and positions.grad.isfinite().all()
    assert weights.grad is not None and weights.grad.isfinite().all()
    assert weights.grad[:3].abs().sum() > 0 and positions.grad[:3].abs().sum() > 0


def test_duplicates_are_left_out_by_their_keys() -> None:
    from domains.molecule.chemistry.batch import keys

    molecules = from_smiles("CCO", "OCC", "COC", "C")
    found = keys(molecules)
    accepted = Unique(Threshold(1.0))(torch.ones(1, 4), [found])
    assert accepted.sum() == 3 and accepted[0, 2] and accepted[0, 3]
