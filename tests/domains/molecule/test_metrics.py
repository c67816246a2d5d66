"""Metrics of molecules, by hand and against scipy."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import QED
from scipy.stats import wasserstein_distance

from domains.molecule import metrics
from domains.molecule.chemistry.batch import Chemistry
from domains.molecule.chemistry.elements import EXPLICIT, HEAVY
from domains.molecule.networks import Architecture
from domains.molecule.pipeline import MoleculePipeline
from domains.molecule.samples import EMPTY, Molecules
from domains.molecule.sources import Enumerated, SmilesFile
from lit_rlft.core.checks import UsageError
from lit_rlft.core.reward import SetMetric
from tests.domains.molecule.chemistry.test_batch import overfull
from tests.domains.molecule.known import conditions, from_atoms, from_smiles, geometry


def evaluate(metric: metrics.Metric, molecules: Molecules) -> dict[str, list[float]]:
    values = metric.evaluate(molecules, conditions(len(molecules)))
    assert all(value.shape == (len(molecules),) for value in values.values())
    return {name: value.tolist() for name, value in values.items()}


def mixture() -> Molecules:
    """Return ethanol twice, an over-full carbon, two parts, and a radical."""
    (a, first), (b, second) = geometry("CC"), geometry("O")
    parts = (a + b, np.concatenate([first, second + 20]))
    symbols, places = geometry("C")
    radical = (symbols[:4], places[:4])
    return from_atoms([geometry("CCO"), geometry("CCO"), overfull(), parts, radical])


def together(metric: SetMetric, *batches: Molecules) -> dict[str, float]:
    """Return the numbers of all batches together."""
    parts = [metric.features(batch, conditions(len(batch))) for batch in batches]
    return metric.compare({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def split(molecules: Molecules, *sizes: int) -> list[Molecules]:
    ends = np.cumsum(sizes).tolist()
    return [molecules.index(slice(e - n, e)) for n, e in zip(sizes, ends, strict=True)]


def test_measures_by_hand() -> None:
    found = evaluate(metrics.MoleculeMeasures(), mixture())
    assert found["molecule_stability"] == [1, 1, 0, 1, 0]
    assert found["validity"] == [1, 1, 0, 1, 1]
    np.testing.assert_equal(found["connected"], [1, 1, math.nan, 0, 1])
    assert found["num_heavy"] == [3, 3, 1, 3, 1]


@pytest.mark.parametrize("sizes", [(5,), (1, 4), (1, 1, 1, 1, 1), (3, 2)])
def test_numbers_of_all_molecules_do_not_depend_on_batches(sizes: tuple[int, ...]) -> None:
    found = together(metrics.MoleculeMeasures(), *split(mixture(), *sizes))
    # Of 9 + 9 + 6 + 11 + 4 atoms all are stable but the two carbons with the wrong valence; the
    # valid molecules are ethanol twice, ethane beside water, and a radical.
    stable = (9 + 9 + 5 + 11 + 3) / 39
    expected = {"atom_stability": stable, "uniqueness": 3 / 4, "valid_unique": 3 / 5}
    assert found == pytest.approx(expected)


def test_numbers_where_nothing_counts() -> None:
    nothing = together(metrics.MoleculeMeasures(), mixture().index(slice(2, 3)))
    assert math.isnan(nothing["uniqueness"]) and nothing["valid_unique"] == 0
    assert nothing["atom_stability"] == pytest.approx(5 / 6)


def test_measures_with_implicit_hydrogens() -> None:
    molecules = from_smiles("CCO", "CC", heavy=True)
    found = evaluate(metrics.MoleculeMeasures(), molecules)
    assert np.isnan(found["molecule_stability"]).all()
    assert found["validity"] == [1, 1] and found["num_heavy"] == [3, 2]
    whole = together(metrics.MoleculeMeasures(), molecules)
    assert math.isnan(whole["atom_stability"]) and whole["uniqueness"] == 1


def test_descriptors_of_valid_molecules() -> None:
    found = evaluate(metrics.Drugs(), mixture())
    expected = QED.qed(Chem.MolFromSmiles("CCO"))
    assert found["qed"][:2] == pytest.approx([expected] * 2)
    for name in ("qed", "sa", "logp", "strain"):
        np.testing.assert_equal(np.isnan(found[name])[:4], [False, False, True, True])
    assert found["strain"][0] < 0.2
    assert "strain" not in evaluate(metrics.Drugs(strain=False), mixture())
    # What is handed out may be changed.
    metrics.Drugs().evaluate(mixture(), conditions(5))["qed"].zero_()
    assert evaluate(metrics.Drugs(), mixture())["qed"][0] == pytest.approx(expected)


def known(path: Path, *smiles: str) -> SmilesFile:
    file = path / "known.smi"
    file.write_text("\n".join(smiles))
    return SmilesFile(str(file), cache_dir=str(path / "cache"))


@pytest.mark.parametrize("sizes", [(5,), (1, 4), (2, 3)])
def test_novelty_of_different_valid_molecules(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    found = together(metrics.Novelty(known(tmp_path, "OCC", "N")), *split(mixture(), *sizes))
    # Ethanol is known; ethane and the radical are not.
    assert found == pytest.approx({"novelty": 2 / 3, "valid_unique_novel": 2 / 5})
    invalid = together(metrics.Novelty(known(tmp_path, "OCC", "N")), mixture().index([2]))
    assert math.isnan(invalid["novelty"]) and invalid["valid_unique_novel"] == 0


def features_of(kinds: torch.Tensor) -> dict[str, torch.Tensor]:
    """Features of molecules that their kind says everything of."""
    num_atoms = 5.0 + kinds % 7
    return {
        "identity": kinds,
        "valid": kinds % 5 > 0,
        "known": kinds % 3 == 0,
        "num_atoms": num_atoms,
        "num_stable": num_atoms - 2 * (kinds % 4 == 0),
    }


NAMES = {
    metrics.MoleculeMeasures: {"atom_stability": 1.0, "uniqueness": 0.5, "valid_unique": 0.5},
    metrics.Novelty: {"novelty": 1.0, "valid_unique_novel": 0.5},
}


@pytest.mark.parametrize("kind", NAMES)
def test_errors_are_those_of_fresh_sets(kind: type[SetMetric]) -> None:
    """Of one model, and of the gain of pairs of which four in five are the same molecule."""
    metric, generator, num = kind(), torch.Generator().manual_seed(0), 300
    pairs = []
    for _ in range(200):
        first, second = torch.randint(0, 300, (2, num), generator=generator)
        same = torch.rand(num, generator=generator) < 0.8
        pairs.append([features_of(first), features_of(first.where(same, second))])
    values = [[metric.compare(arm) for arm in pair] for pair in pairs]
    found = [(metric.errors(pair[0]), metric.errors(*pair)) for pair in pairs[:40]]
    assert found[0][0].keys() == found[0][1].keys() == values[0][0].keys() == NAMES[kind].keys()
    for name in NAMES[kind]:
        alone = np.std([own[name] for own, _ in values])
        gain = np.std([own[name] - other[name] for own, other in values])
        reported = np.sqrt(np.mean([[one[name] ** 2 for one in pair] for pair in found], axis=0))
        # The deviation of 200 sets is itself known within 5 %.
        np.testing.assert_allclose(reported, [alone, gain], rtol=0.2, err_msg=name)


def test_molecules_that_are_all_different_are_so_however_many_are_valid() -> None:
    errors = metrics.MoleculeMeasures().errors(features_of(torch.arange(300)))
    assert errors["uniqueness"] == 0 < errors["valid_unique"]


@pytest.mark.parametrize("kind", NAMES)
def test_second_copies_of_molecules_say_nothing_new(kind: type[SetMetric]) -> None:
    """Samples of a row: shares of different ones among all are halved, and their errors."""
    metric, kinds = kind(), torch.randint(0, 60, (40,), generator=torch.Generator().manual_seed(0))
    arms = [features_of(kinds), features_of(kinds.roll(3))]
    twice = [{n: x.repeat_interleave(2) for n, x in arm.items()} for arm in arms]
    rows = torch.arange(40).repeat_interleave(2)
    for count in (1, 2):
        single, double = metric.errors(*arms[:count]), metric.errors(*twice[:count], rows=rows)
        assert double == pytest.approx({n: single[n] * k for n, k in NAMES[kind].items()})


def test_total_variations_by_hand() -> None:
    a, b = from_smiles("C", "C"), from_smiles("O", "C")
    # Shares of H, C, O: 8/10, 2/10, 0 and 6/8, 1/8, 1/8; of sizes 5 and 3: 1, 0 and 1/2, 1/2.
    expected = 0.5 * (abs(0.8 - 0.75) + abs(0.2 - 0.125) + 0.125)
    assert metrics.type_total_variation(a, b) == pytest.approx(expected)
    assert metrics.size_total_variation(a, b) == pytest.approx(0.5)
    assert metrics.type_total_variation(a, a) == metrics.size_total_variation(b, b) == 0
    nothing = Molecules.of(torch.zeros(1, 2, 3), torch.full((1, 2), EMPTY), EXPLICIT)
    assert metrics.type_total_variation(nothing, a) == pytest.approx(0.5)


def test_bond_lengths_and_angles_by_hand() -> None:
    water = (("O", "H", "H"), [(0, 0, 0), (0.96, 0, 0), (0, 0.95, 0)])
    acid = (("H", "C", "N"), [(-1.07, 0, 0), (0, 0, 0), (1.15, 0, 0)])
    view = Chemistry(from_atoms([water, acid]))
    lengths = metrics.bond_lengths(view)
    assert lengths.keys() == {("H", "O", 1), ("C", "H", 1), ("C", "N", 3)}
    np.testing.assert_allclose(np.sort(lengths["H", "O", 1]), [0.95, 0.96], atol=1e-6)
    np.testing.assert_allclose(lengths["C", "N", 3], [1.15], atol=1e-6)
    found = metrics.angles(view)
    assert found.keys() == {"O", "C"}
    np.testing.assert_allclose(found["O"], [90], atol=1e-4)
    np.testing.assert_allclose(found["C"], [180], atol=1e-4)


def test_angles_against_a_slow_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_CHUNK", 2)
    view = Chemistry(from_smiles("CCO", "CC(C)=O", "C1CC1N"))
    expected: dict[str, list[float]] = {}
    molecules = view.molecules
    for b in range(len(molecules)):
        for centre, kind in enumerate(molecules.types[b].tolist()):
            ends = view.orders[b, centre].nonzero().flatten().tolist()
            for place, i in enumerate(ends):
                for j in ends[place + 1 :]:
                    arms = molecules.positions[b, [i, j]] - molecules.positions[b, centre]
                    cosine = float(arms[0] @ arms[1] / arms.norm(dim=1).prod())
                    angle = math.degrees(math.acos(cosine))
                    expected.setdefault(EXPLICIT[kind], []).append(angle)
    found = metrics.angles(view)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(np.sort(found[name]), np.sort(values), atol=1e-2)


def test_mean_distance_is_weighted_by_the_real_set() -> None:
    a = {"x": np.array([1.0, 2.0]), "y": np.array([0.0]), "z": np.array([9.0])}
    b = {"x": np.array([1.5]), "y": np.array([3.0, 3.0, 3.0]), "w": np.array([1.0] * 5)}
    expected = (wasserstein_distance([1, 2], [1.5]) + 3 * 3.0) / 4
    assert metrics.mean_wasserstein(a, b) == pytest.approx(expected)
    assert math.isnan(metrics.mean_wasserstein({}, b))


def test_set_distances(tmp_path: Path) -> None:
    smiles = ("CCO", "CC(C)=O", "C1CC1N", "CC")
    metric = metrics.SetDistances(known(tmp_path, *smiles))
    whole = from_smiles(*smiles)
    same = together(metric, whole.index(slice(0, 1)), whole.index(slice(1, 4)))
    assert same == pytest.approx(dict.fromkeys(same, 0.0), abs=1e-6)
    whole.positions.mul_(1.01)
    other = together(metric, whole)
    assert other["type_tv"] == other["size_tv"] == 0
    assert 0.005 < other["bond_length_w1"] < 0.02 and other["angle_w1"] < 0.1
    alone = together(metric, from_atoms([(("C", "C"), [(0, 0, 0), (9, 0, 0)])]))
    assert math.isnan(alone["bond_length_w1"]) and math.isnan(alone["qed_w1"])
    assert alone["size_tv"] == 1


@pytest.mark.parametrize("heavy", [False, True])
def test_a_source_with_hydrogens_on_one_side_alone_is_refused(tmp_path: Path, heavy: bool) -> None:
    """Atoms, sizes and bonds of heavy atoms were compared with those of whole molecules."""
    sources = {False: known(tmp_path, "CCO"), True: Enumerated(elements=HEAVY)}
    architecture = Architecture(implicit_hydrogens=heavy, width=8, depth=1, max_atoms=3)
    pipeline = MoleculePipeline(None, architecture=architecture)
    elements = "C, N, O, F" if heavy else "H, C, N, O, F"
    with pytest.raises(UsageError, match=rf"SetDistances: source .* with elements \[{elements}\]"):
        metrics.SetDistances(sources[not heavy]).check(pipeline)
    file = tmp_path / "fitting.smi"
    file.write_text("CCO\n")
    kinds = HEAVY if heavy else EXPLICIT
    source = SmilesFile(str(file), elements=kinds, cache_dir=str(tmp_path / "c"))
    metrics.SetDistances(source).check(pipeline)


def test_heavy_atoms_are_compared_with_heavy_atoms(tmp_path: Path) -> None:
    file = tmp_path / "known.smi"
    file.write_text("CCO\nCC\n")
    source = SmilesFile(str(file), elements=("C", "N", "O", "F"), cache_dir=str(tmp_path / "c"))
    found = together(metrics.SetDistances(source), from_smiles("CCO", "CC", heavy=True))
    assert found["type_tv"] == 0 and found["bond_length_w1"] == pytest.approx(0, abs=1e-6)
