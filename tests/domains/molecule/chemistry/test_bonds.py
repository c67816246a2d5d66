"""Bond tables and stability: entry by entry, on known molecules, against a slow twin."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from domains.molecule.chemistry import bonds
from domains.molecule.chemistry.elements import EXPLICIT, HEAVY, VALENCES, check_elements
from domains.molecule.samples import EMPTY, Molecules, check_molecules
from lit_rlft.core.checks import UsageError
from tests.domains.molecule.known import conditions, from_atoms, from_smiles, geometry, pair, real

# As published, in pm: single, double, triple bonds, 0 where there is none.
TABLE = {
    "HH": (74, 0, 0),
    "HC": (109, 0, 0),
    "HN": (101, 0, 0),
    "HO": (96, 0, 0),
    "HF": (92, 0, 0),
    "CC": (154, 134, 120),
    "CN": (147, 129, 116),
    "CO": (143, 120, 113),
    "CF": (135, 0, 0),
    "NN": (145, 125, 110),
    "NO": (140, 121, 0),
    "NF": (136, 0, 0),
    "OO": (148, 121, 0),
    "OF": (142, 0, 0),
    "FF": (142, 0, 0),
}


def slow_order(first: str, second: str, distance: float) -> int:
    lengths = TABLE.get(first + second) or TABLE[second + first]
    order = 0
    for k, (length, margin) in enumerate(zip(lengths, (10, 5, 3), strict=True), 1):
        if length and 100 * distance < length + margin:
            order = k
        else:
            break
    return order


def test_every_pair_is_in_the_table() -> None:
    pairs = itertools.combinations_with_replacement(EXPLICIT, 2)
    assert {"".join(pair) for pair in pairs} == set(TABLE)


@pytest.mark.parametrize("names", TABLE)
def test_orders_of_diatomics(names: str) -> None:
    for first, second in {(names[0], names[1]), (names[1], names[0])}:
        limits = [
            (order, (length + margin) / 100)
            for order, (length, margin) in enumerate(zip(TABLE[names], (10, 5, 3), strict=True), 1)
            if length
        ]
        for order, limit in limits:
            for distance, expected in ((limit - 1e-3, order), (limit + 1e-3, order - 1)):
                found = bonds.bond_orders(pair(first, second, distance))[0]
                assert found.tolist() == [[0, expected], [expected, 0]], (first, second, distance)


@pytest.mark.parametrize(
    ("smiles", "expected"),
    [
        ("C", True),
        ("C#N", True),
        ("OC=O", True),
        ("C=C", True),
        ("C#C", True),
        ("N", True),
        ("O", True),
        ("CF", True),
        ("CC(=O)N", True),
        ("C1CC1", True),
        # 139.5 pm are a hair above what passes for a double bond of carbon.
        ("c1ccccc1", False),
        # Its nitrogen and oxygen carry charges, which valences here do not.
        ("C[N+](=O)[O-]", False),
    ],
)
def test_stability_of_known_molecules(smiles: str, expected: bool) -> None:
    molecules = from_smiles(smiles)
    assert bonds.molecule_stability(molecules).tolist() == [expected]
    # Only the atoms of odd bonds are not stable.
    assert bool(bonds.atom_stability(molecules)[molecules.valid].all()) is expected


def test_orders_of_known_molecules() -> None:
    # MMFF94 has carbon dioxide's bonds a quarter too long: these are experiment's.
    dioxide = (("O", "C", "O"), [(-1.162, 0, 0), (0, 0, 0), (1.162, 0, 0)])
    molecules = from_atoms([geometry("C#N"), dioxide, geometry("c1ccccc1")])
    assert bonds.molecule_stability(molecules).tolist() == [True, True, False]
    orders = bonds.bond_orders(molecules)
    assert orders[0, :3, :3].tolist() == [[0, 3, 1], [3, 0, 0], [1, 0, 0]]  # C, N, H
    assert orders[1, :3, :3].tolist() == [[0, 2, 0], [2, 0, 2], [0, 2, 0]]
    assert not orders[1, 3:].any() and not orders[1, :, 3:].any()
    ring = orders[2, :6, :6]
    assert ring.sum(dim=1).tolist() == [2] * 6 and ring.max() == 1


def test_benzene_is_not_stable_by_one_bond_length() -> None:
    molecules = from_smiles("c1ccccc1")
    stable = bonds.atom_stability(molecules)[0]
    assert stable[molecules.types[0] == EXPLICIT.index("H")].all()
    assert not stable[molecules.types[0] == EXPLICIT.index("C")].any()


def random_molecules(num: int = 40, size: int = 9, seed: int = 0) -> Molecules:
    generator = torch.Generator().manual_seed(seed)
    positions = 1.2 * torch.randn(num, size, 3, generator=generator)
    types = torch.randint(-1, len(EXPLICIT), (num, size), generator=generator)
    return Molecules.of(positions, types, EXPLICIT)


@pytest.mark.parametrize("chunk", [1, 1 << 8, 1 << 17])
def test_against_a_slow_twin(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bonds, "_CHUNK", chunk)
    molecules = random_molecules()
    orders = bonds.bond_orders(molecules)
    stable = bonds.atom_stability(molecules, orders)
    whole = bonds.molecule_stability(molecules)
    seen = set()
    for b, row in enumerate(molecules.types.tolist()):
        atoms = [(i, EXPLICIT[t]) for i, t in enumerate(row) if t != EMPTY]
        fine = []
        for i, first in atoms:
            total = 0
            for j, second in atoms:
                distance = float((molecules.positions[b, i] - molecules.positions[b, j]).norm())
                order = slow_order(first, second, distance) if i != j else 0
                assert orders[b, i, j] == order
                total += order
                seen.add(order)
            assert bool(stable[b, i]) == (total == VALENCES[first])
            fine.append(total == VALENCES[first])
        assert bool(whole[b]) == (bool(fine) and all(fine))
    assert seen == {0, 1, 2, 3}


def test_no_atoms_and_no_numbers_are_not_stable() -> None:
    empty = Molecules.of(torch.zeros(1, 4, 3), torch.full((1, 4), EMPTY), EXPLICIT)
    assert not bonds.molecule_stability(empty).any() and not bonds.fitting_valences(empty).any()
    methane = from_smiles("C")
    methane.positions[0, 0] = torch.nan
    assert not bonds.bond_orders(methane).any() and not bonds.molecule_stability(methane).any()
    none = from_smiles("C").index(slice(0, 0))
    assert bonds.molecule_stability(none).shape == (0,)


def test_heavy_atoms_may_have_bonds_to_spare() -> None:
    ethane, overfull = from_smiles("CC", heavy=True), [(0.0, 0.0, 0.0)]
    overfull += [(1.4, 0, 0), (-1.4, 0, 0), (0, 1.4, 0), (0, -1.4, 0), (0, 0, 1.4)]
    assert bonds.fitting_valences(ethane).all()
    assert not bonds.fitting_valences(from_atoms([("CFFFFF", overfull)], heavy=True)).any()


def test_soft_orders_of_a_pair_by_hand() -> None:
    molecules = pair("C", "N", 1.3)
    sigma = [1 / (1 + np.exp(-(limit - 1.3) / 0.05)) for limit in (1.57, 1.34, 1.19)]
    found = bonds.soft_bond_orders(molecules, 0.05)[0]
    np.testing.assert_allclose(found, [[0, sum(sigma)], [sum(sigma), 0]], atol=1e-5)


def test_soft_orders_of_a_mixture_by_hand() -> None:
    molecules = pair("C", "O", 1.25)
    weights = torch.zeros_like(molecules.probabilities)
    weights[0, 0, 1], weights[0, 0, 2], weights[0, 1, 3] = 0.6, 0.4, 1.0
    mixed = Molecules(molecules.positions, molecules.types, weights, EXPLICIT)

    def step(limit: float) -> float:
        return float(1 / (1 + np.exp(-(limit - 1.25) / 0.03)))

    carbon = step(1.53) + step(1.25) + step(1.16)
    nitrogen = step(1.50) + step(1.26)
    expected = 0.6 * carbon + 0.4 * nitrogen
    found = bonds.soft_bond_orders(mixed)[0, 0, 1]
    assert float(found) == pytest.approx(expected, abs=1e-5)


def test_soft_orders_become_the_orders_as_the_steps_sharpen() -> None:
    molecules = random_molecules(seed=1)
    soft = bonds.soft_bond_orders(molecules, 1e-5)
    difference = (soft - bonds.bond_orders(molecules)).abs()
    assert (difference > 0.01).double().mean() < 1e-3


def test_soft_orders_have_the_gradient_of_their_differences() -> None:
    base = random_molecules(num=2, size=4, seed=2)
    positions = base.positions.double().requires_grad_()
    weights = torch.rand(base.probabilities.shape, dtype=torch.float64).softmax(dim=-1)
    weights.requires_grad_()

    def total(positions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        molecules = Molecules(positions, base.types, weights, EXPLICIT)
        return bonds.soft_bond_orders(molecules, 0.2)

    assert torch.autograd.gradcheck(total, (positions, weights))


def firmest(orders: torch.Tensor, i: int, j: int) -> float:
    """Return the largest product over all simple paths, looked at one by one."""
    others = [k for k in range(len(orders)) if k not in (i, j)]
    paths = (
        (i, *between, j)
        for num in range(len(others) + 1)
        for between in itertools.permutations(others, num)
    )
    products = (
        np.prod([min(float(orders[a, b]), 1.0) for a, b in itertools.pairwise(path)])
        for path in paths
    )
    return float(max(products))


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_soft_links_are_the_firmest_of_all_paths(size: int) -> None:
    orders = 1.2 * torch.rand(3, size, size, dtype=torch.float64) ** 3
    orders[:, 0, -1] = 0.0  # only by way of others
    orders = orders.triu(diagonal=1)
    orders = orders + orders.mT
    links = bonds.soft_links(orders)
    for row, i, j in itertools.product(range(3), range(size), range(size)):
        expected = 1.0 if i == j else firmest(orders[row], i, j)
        assert float(links[row, i, j]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("size", [1, 2, 9, 20])
def test_soft_links_reach_along_the_longest_chain(size: int) -> None:
    orders = torch.zeros(1, size, size, dtype=torch.float64)
    for i in range(size - 1):
        orders[0, i, i + 1] = orders[0, i + 1, i] = 0.9
    apart = (torch.arange(size).unsqueeze(0) - torch.arange(size).unsqueeze(1)).abs()
    torch.testing.assert_close(bonds.soft_links(orders)[0], 0.9 ** apart.double())


def test_less_noise_is_more_stable_by_both_measures() -> None:
    """Soft and exact orders agree on which of many disturbed molecules are better."""
    molecules = from_smiles("CCO", "CC(C)=O", "C1CC1N", "C#CCO")
    generator = torch.Generator().manual_seed(0)
    soft, hard = [], []
    for scale in (0.0, 0.02, 0.05, 0.1, 0.2, 0.4):
        noise = scale * torch.randn(molecules.positions.shape, generator=generator)
        moved = Molecules.of(molecules.positions + noise, molecules.types, EXPLICIT)
        used = bonds.soft_bond_orders(moved).sum(dim=2)
        wanted = moved.probabilities @ torch.tensor([1.0, 4.0, 3.0, 2.0, 1.0])
        errors = ((used - wanted) ** 2 * moved.valid).sum(dim=1)
        soft += (-errors / moved.num_atoms).tolist()
        stable = bonds.atom_stability(moved).sum(dim=1)
        hard += (stable / moved.num_atoms).tolist()
    assert spearmanr(soft, hard).statistic > 0.8


def test_vocabularies() -> None:
    assert check_elements(["C", "H"]) == ("C", "H") and set(HEAVY) < set(EXPLICIT)
    for wrong in ([], ["C", "C"], ["C", "S"]):
        with pytest.raises(UsageError, match="elements must be some of"):
            check_elements(wrong)


def test_molecules_as_samples() -> None:
    molecules = from_smiles("C", "CC", "O")
    assert len(molecules) == 3 and molecules.num_atoms.tolist() == [5, 8, 3]
    assert torch.equal(molecules.valid.sum(dim=1), molecules.probabilities.sum(dim=(1, 2)).long())
    assert molecules.index(torch.tensor([2, 0])).num_atoms.tolist() == [3, 5]
    assert not molecules.to("cpu").implicit_hydrogens
    soft = Molecules(
        molecules.positions.requires_grad_(),
        molecules.types,
        molecules.probabilities * 0.5,
        EXPLICIT,
    )
    plain = soft.detach()
    assert not plain.positions.requires_grad and plain.probabilities.max() == 1
    assert check_molecules(soft, conditions(3)) is soft
    with pytest.raises(UsageError, match="takes molecules, got Tensor"):
        check_molecules(torch.zeros(3), conditions(3))
    with pytest.raises(UsageError, match="3 molecules were given for 2 conditions"):
        check_molecules(molecules, conditions(2))


def test_real_molecules_are_stable() -> None:
    with np.load(real("qm7_xyz.npz")) as file:
        positions, numbers = file["positions"], file["atomic_numbers"]
    table = np.full(17, EMPTY - 1)
    table[[0, 1, 6, 7, 8, 9]] = [EMPTY, *range(5)]
    types = table[numbers]
    kept = (types >= EMPTY).all(axis=1)
    molecules = Molecules.of(
        torch.from_numpy(positions[kept]), torch.from_numpy(types[kept]), EXPLICIT
    )
    assert float(bonds.molecule_stability(molecules).double().mean()) == pytest.approx(
        0.983, abs=0.003
    )


def test_stability_is_that_of_another_program() -> None:
    with np.load(real("qm9_mmff_20k.npz")) as file:
        positions, numbers, stable = (
            file[name] for name in ("positions", "atomic_numbers", "edm_stable")
        )
    table = np.full(10, EMPTY)
    table[[1, 6, 7, 8, 9]] = range(5)
    types = torch.from_numpy(table[numbers])
    molecules = Molecules.of(torch.from_numpy(positions), types, EXPLICIT)
    found = bonds.molecule_stability(molecules).numpy()
    assert (found != stable).sum() == 0
