"""Molecule files: real ones, written ones, broken ones."""

import bz2
import io
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rdkit import Chem

from domains.molecule.chemistry.batch import Chemistry
from domains.molecule.chemistry.elements import EXPLICIT, HEAVY
from domains.molecule.samples import EMPTY
from domains.molecule.sources import QM9, MoleculeFile, SmilesFile, Source, edm_split
from domains.molecule.sources.formats import (
    read_arrays,
    read_qm9,
    read_sdf,
    read_smiles,
    read_uncharacterized,
    read_xyz,
)
from domains.molecule.sources.packed import Structure, molecules_of, pack
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.bad_entries import BadEntry, Report
from tests.domains.molecule.known import geometry, real

SMILES = ("C", "N", "O", "C#C", "C#N")


def xyz(smiles: str, *, qm9: bool = False) -> str:
    """Return a molecule as an .xyz frame, or as one of QM9's files."""
    symbols, positions = geometry(smiles)
    lines = [str(len(symbols)), f"gdb 1 {smiles}" if qm9 else smiles]
    for symbol, (x, y, z) in zip(symbols, positions, strict=True):
        # Mathematica's way to write small numbers, and a charge in the fifth column.
        small = f"{1e6 * x:.4f}*^-6" if qm9 else f"{x:.8f}"
        lines.append(f"{symbol}\t{small}\t{y:.8f}\t{z:.8f}" + ("\t-0.1*^-3" if qm9 else ""))
    if qm9:
        lines += ["1341.3 1341.3", f"{smiles}\t{smiles}", "InChI=1S\tInChI=1S"]
    return "\n".join(lines) + "\n"


OF_MACOS = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X"
"""What macOS keeps in a file of its own, beside another, on disks of other systems."""


def archive(path: Path, texts: dict[int, str]) -> Path:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for number, text in texts.items():
            name = f"dsgdb9nsd_{number:06d}.xyz"
            for own, content in ((name, text.encode()), (f"._{name}", OF_MACOS)):
                entry = tarfile.TarInfo(own)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    path.write_bytes(bz2.compress(packed.getvalue()))
    return path


def block(smiles: str, title: str = "") -> str:
    symbols, positions = geometry(smiles)
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert tuple(atom.GetSymbol() for atom in mol.GetAtoms()) == symbols
    conformer = Chem.Conformer(len(symbols))
    conformer.SetPositions(positions.astype(np.float64))
    mol.AddConformer(conformer)
    mol.SetProp("_Name", title)
    return Chem.MolToMolBlock(mol) + "$$$$\n"


def settings(tmp_path: Path) -> dict[str, Any]:
    return {"cache_dir": str(tmp_path / "cache")}


def good(entries: Any) -> list[Structure]:
    found = list(entries)
    assert all(isinstance(entry, Structure) for entry in found), found
    return found


def same(entry: Structure, smiles: str, decimals: int = 4) -> None:
    symbols, positions = geometry(smiles)
    assert tuple(entry.symbols) == symbols
    np.testing.assert_allclose(entry.positions, positions, atol=10**-decimals)


def test_qm9_archive_and_folder(tmp_path: Path) -> None:
    texts = {i: xyz(smiles, qm9=True) for i, smiles in enumerate(SMILES, 1)}
    path, folder = archive(tmp_path / "dsgdb9nsd.xyz.tar.bz2", texts), tmp_path / "raw"
    folder.mkdir()
    (folder / "readme.xyz").write_text("not one of them")
    for number, text in texts.items():
        (folder / f"dsgdb9nsd_{number:06d}.xyz").write_text(text)
        (folder / f"._dsgdb9nsd_{number:06d}.xyz").write_bytes(OF_MACOS)
    for place in (path, folder):
        entries = good(read_qm9(place))
        assert [entry.number for entry in entries] == [1, 2, 3, 4, 5]
        for entry, smiles in zip(entries, SMILES, strict=True):
            same(entry, smiles, decimals=6)
        assert [entry.number for entry in good(read_qm9(place, frozenset({2, 5})))] == [1, 3, 4]
    source = QM9(str(path), **settings(tmp_path))
    assert Chemistry(molecules_of(source.load(), EXPLICIT)).smiles == [*SMILES]


def test_uncharacterized_molecules_are_left_out(tmp_path: Path) -> None:
    header = ["=" * 30, "3054 molecules", "", "", "Index  SMILES", "", "", "", "=" * 30]
    lines = [*header, "     2   N  N", "     5   C#N   CN", "=" * 30]
    listing = tmp_path / "uncharacterized.txt"
    listing.write_text("\n".join(lines) + "\n")
    assert read_uncharacterized(listing) == {2, 5}
    path = archive(tmp_path / "dsgdb9nsd.xyz.tar.bz2", {i: xyz(s) for i, s in enumerate(SMILES, 1)})
    source = QM9(str(path), str(listing), **settings(tmp_path))
    assert source.load().numbers.tolist() == [1, 3, 4]
    listing.write_text("\n".join(header))
    with pytest.raises(UsageError, match="holds no numbers"):
        read_uncharacterized(listing)


def test_sdf_with_its_table(tmp_path: Path) -> None:
    path, table = tmp_path / "gdb9.sdf", tmp_path / "gdb9.sdf.csv"
    path.write_text("".join(block(s, f"gdb_{i}") for i, s in enumerate(SMILES, 1)))
    entries = good(read_sdf(path))
    assert [entry.number for entry in entries] == [1, 2, 3, 4, 5]
    for entry, smiles in zip(entries, SMILES, strict=True):
        same(entry, smiles)
    table.write_text("mol_id,gap\ngdb_1,1\ngdb_2,1\ngdb_4,1\ngdb_3,1\ngdb_5,1\n")
    found = list(read_sdf(path, table))
    assert [type(entry) for entry in found].count(BadEntry) == 2
    assert "'gdb_3', but the table has 'gdb_4'" in str(found[2])
    listing = tmp_path / "uncharacterized.txt"
    listing.write_text("\n" * 9 + "1 C\n")
    source = QM9(str(path), str(listing), **settings(tmp_path))
    assert source.load().numbers.tolist() == [2, 5]


def test_xyz_frames_and_arrays(tmp_path: Path) -> None:
    path = tmp_path / "molecules.xyz"
    path.write_text("\n".join(xyz(smiles) for smiles in SMILES))
    for entry, smiles in zip(good(read_xyz(path)), SMILES, strict=True):
        same(entry, smiles)
    source = MoleculeFile(str(path), **settings(tmp_path))
    packed = source.load()
    np.testing.assert_allclose(packed.positions.sum(axis=1), 0, atol=1e-5)
    numbers = np.zeros((2, 5), np.uint8)
    numbers[0], numbers[1, :4] = (6, 1, 1, 1, 1), (7, 1, 1, 1)
    positions = np.zeros((2, 5, 3), np.float32)
    positions[0], positions[1, :4] = geometry("C")[1], geometry("N")[1]
    for more in ({}, {"n_atoms": np.array([5, 4])}):
        np.savez(tmp_path / "arrays.npz", positions=positions, atomic_numbers=numbers, **more)
        for entry, smiles in zip(good(read_arrays(tmp_path / "arrays.npz")), "CN", strict=True):
            same(entry, smiles)


def test_smiles_in_lines_and_columns(tmp_path: Path) -> None:
    path = tmp_path / "some.smi"
    path.write_text("CCO ethanol\n\nCC\n")
    assert [*read_smiles(path)] == [("line 1", 1, "CCO"), ("line 3", 3, "CC")]
    path = tmp_path / "some.csv"
    path.write_text('name,smiles\n"a, b",CCO\nc,CC\n')
    assert [*read_smiles(path)] == [("line 2", 2, "CCO"), ("line 3", 3, "CC")]
    path.write_bytes("\ufeffsmiles\nCCO\n".encode())
    assert [*read_smiles(path)] == [("line 2", 2, "CCO")]
    path.write_text("name,smiles\n")
    with pytest.raises(UsageError, match=r"no column 'SMILES' but \['name', 'smiles'\]"):
        list(read_smiles(path, "SMILES"))


@pytest.mark.parametrize("workers", [0, 2])
def test_smiles_are_embedded_and_the_rest_is_listed(tmp_path: Path, workers: int) -> None:
    lines = ["CCO", "C1CC", "CCl", "[CH3]", "C[N+](=O)[O-]", "CCCCCC", "c1ccccc1", "CC"]
    path = tmp_path / "some.smi"
    path.write_text("\n".join(lines))
    cache = tmp_path / f"cache{workers}"
    source = SmilesFile(str(path), max_atoms=12, num_workers=workers, cache_dir=str(cache))
    packed = source.load()
    assert packed.numbers.tolist() == [1, 8]
    assert Chemistry(molecules_of(packed, EXPLICIT)).smiles == ["CCO", "CC"]
    (folder,) = cache.iterdir()
    report = (folder / "report.txt").read_text()
    assert "2 of 8 molecules used" in report and "an unparsable SMILES (line 2)" in report
    listing = (folder / "left_out.txt").read_text()
    for number, fault in (
        (2, r"an unparsable SMILES \(C1CC\)"),
        (3, r"elements other than C, F, H, N, O \(Cl\)"),
        (4, r"a radical \(\[CH3\]\)"),
        (5, r"a formal charge"),
        (6, r"more atoms than 12 \(20 atoms\)"),
    ):
        assert re.search(rf"line {number} has {fault}", listing), listing
    assert "line 7 has bonds that are not its valences" in listing


@pytest.mark.parametrize("elements", [EXPLICIT, HEAVY])
def test_smiles_of_several_parts_are_left_out(tmp_path: Path, elements: tuple[str, ...]) -> None:
    """Laid over each other they were one molecule: C.C became ethane."""
    path = tmp_path / "some.smi"
    path.write_text("C.C\nCO.CC\nCCO\n")
    source = SmilesFile(str(path), elements=elements, only_stable=False, **settings(tmp_path))
    packed = source.load()
    assert packed.numbers.tolist() == [3]
    assert Chemistry(molecules_of(packed, elements)).smiles == ["CCO"]
    assert "line 1 has more than one part (2 parts)" in source.left_out()
    path.write_text("C.C\n")
    with pytest.raises(UsageError, match="nothing is left to use: write each part on a line"):
        source.load()


def test_smiles_that_positions_are_not_read_as_are_left_out(tmp_path: Path) -> None:
    """Bonds of 139.5 pm are single ones to the tables: benzene becomes cyclohexane."""
    path = tmp_path / "some.smi"
    path.write_text("c1ccccc1\nCc1ccncc1\nCC=O\n[13CH3]O\nCC#N\n")
    source = SmilesFile(str(path), elements=HEAVY, **settings(tmp_path))
    packed = source.load()
    assert packed.numbers.tolist() == [3, 4, 5]
    found = Chemistry(molecules_of(packed, HEAVY)).smiles
    assert found == [Chem.CanonSmiles(smiles) for smiles in ("CC=O", "CO", "CC#N")]
    fault = "line 1 has bonds that are read as another molecule's (c1ccccc1 as C1CCCCC1)"
    assert fault in source.left_out()
    path.write_text("c1ccccc1\n")
    with pytest.raises(UsageError, match="nothing is left to use: set only_stable to false"):
        source.load()
    every = SmilesFile(str(path), elements=HEAVY, only_stable=False, **settings(tmp_path))
    assert len(every.load()) == 1


def test_ions_are_kept_where_charges_may_be(tmp_path: Path) -> None:
    path = tmp_path / "some.smi"
    path.write_text("C[NH3+]\nCC(=O)[O-]\nC[N+](=O)[O-]\nCC\n")
    kept: dict[str, Any] = {"only_stable": False, **settings(tmp_path)}
    packed = SmilesFile(str(path), charged=True, **kept).load()
    assert packed.numbers.tolist() == [1, 2, 3, 4]
    assert SmilesFile(str(path), **kept).load().numbers.tolist() == [4]
    # A radical cation has an odd number of electrons, counted with its charge.
    symbols, places = geometry("C[NH3+]")
    ion = Structure("a", 1, symbols, places, charge=1)
    radical = Structure("b", 2, symbols, places)
    packed, report = pack([ion, radical], EXPLICIT, 9, source="a file")
    assert packed.numbers.tolist() == [1] and "an odd number of electrons (b)" in str(report)


def test_heavy_atoms_only(tmp_path: Path) -> None:
    path = tmp_path / "some.smi"
    path.write_text("CCO\nCCCCCC\n")
    packed = SmilesFile(str(path), elements=HEAVY, max_atoms=5, **settings(tmp_path)).load()
    assert packed.types.tolist() == [[0, 0, 2, EMPTY, EMPTY]]
    assert molecules_of(packed, HEAVY).implicit_hydrogens


def cut_sdf(path: Path) -> str:
    text = block("C") + block("CC")
    path.write_text(text[: text.rindex("M  END")])
    return str(path)


def flat_sdf(path: Path) -> str:
    lines = block("O").splitlines()
    lines[1] = "     RDKit          2D"
    flat = [re.sub(r"^(.{20}).{10}", r"\g<1>    0.0000", line) for line in lines[4:7]]
    path.write_text("\n".join([*lines[:4], *flat, *lines[7:]]) + "\n" + block("C"))
    return str(path)


def zero_sdf(path: Path) -> str:
    lines = block("O").splitlines()
    zero = [f"{'    0.0000' * 3}{line[30:]}" for line in lines[4:7]]
    path.write_text("\n".join([*lines[:4], *zero, *lines[7:]]) + "\n" + block("C"))
    return str(path)


def nan_sdf(path: Path) -> str:
    lines = block("O").splitlines()
    lines[4] = "       nan" + lines[4][10:]
    path.write_text("\n".join(lines) + "\n" + block("C"))
    return str(path)


def radical_sdf(path: Path) -> str:
    text = block("O").replace("M  END", "M  RAD  1   1   2\nM  END")
    path.write_text(text + block("C"))
    return str(path)


def bare_sdf(smiles: str) -> Callable[[Path], str]:
    def make(path: Path) -> str:
        bare = Chem.MolFromMolBlock(block(smiles), removeHs=True)
        path.write_text(Chem.MolToMolBlock(bare) + "$$$$\n" + block("C"))
        return str(path)

    return make


def after_methane(frame: str) -> Callable[[Path], str]:
    def make(path: Path) -> str:
        path.write_text(xyz("C") + frame)
        return str(path)

    return make


def before_methane(entry: str) -> Callable[[Path], str]:
    def make(path: Path) -> str:
        path.write_text(entry + block("C"))
        return str(path)

    return make


@pytest.mark.parametrize(
    ("suffix", "make", "message"),
    [
        (
            ".xyz",
            after_methane("2\n\nO 0 0 0\nH 1.09\n"),
            r"frame 2 at line 8 has an unreadable atom \(atom 2: 'H 1.09'",
        ),
        (
            ".xyz",
            after_methane("-2\n\nO 0 0 0\n"),
            r"frame 2 at line 8 has no number of atoms \(-2\)",
        ),
        (
            ".xyz",
            after_methane("4\n\nC 0 0 0\nH 1 0 0\nH -0.5 0.9 0\nH -0.5 -0.9 0\n"),
            r"frame 2 at line 8 has an odd number of electrons",
        ),
        (".sdf", bare_sdf("CCO"), r"entry 1 at line 1 has missing hydrogens \(6 of them\)"),
        (".sdf", bare_sdf("O"), r"entry 1 at line 1 has missing hydrogens \(2 of them\)"),
        (".sdf", before_methane("a\nb\n$$$$\n"), r"entry 1 at line 1 has no end"),
        (".sdf", cut_sdf, r"entry 2 at line 16 has no end \(no line M  END: it is cut off\)"),
        (".sdf", flat_sdf, r"entry 1 at line 1 has no conformer \(its positions are those"),
        (".sdf", zero_sdf, r"entry 1 at line 1 has no conformer"),
        (".sdf", nan_sdf, r"entry 1 at line 1 has a position that is not finite"),
        (".sdf", radical_sdf, r"entry 1 at line 1 has a radical"),
        (
            ".sdf",
            before_methane("a\nb\nc\nno counts\nM  END\n$$$$\n"),
            r"entry 1 at line 1 has an unreadable structure",
        ),
        (
            ".xyz",
            after_methane("3\n\nS 0 0 0\nH 1 0 0\nH 0 1 0\n"),
            r"frame 2 at line 8 has elements other than H, C, N, O, F \(S\)",
        ),
        (
            ".xyz",
            after_methane("2\n\nO 0 0 0\nH nan 0 0\n"),
            r"frame 2 at line 8 has a position that is not finite \(atom 2: H",
        ),
        (
            ".xyz",
            after_methane("3\n\nO 0 0 0\n"),
            r"frame 2 at line 8 has fewer atoms than it says \(1 of 3\)",
        ),
        (
            ".xyz",
            after_methane("2\n\nO 0 0 0\nH 1 zero 0\n"),
            r"frame 2 at line 8 has an unreadable atom \(atom 2: 'H 1 zero 0'",
        ),
        (
            ".xyz",
            after_methane("what is this\n"),
            r"frame 2 at line 8 has no number of atoms \(what is this\)",
        ),
    ],
)
def test_faults_are_left_out_or_stop(
    tmp_path: Path, suffix: str, make: Callable[[Path], str], message: str
) -> None:
    path = make(tmp_path / f"bad{suffix}")
    with pytest.raises(UsageError, match=message + ".*set strict to false"):
        MoleculeFile(path, strict=True, **settings(tmp_path)).load()
    packed = MoleculeFile(path, **settings(tmp_path)).load()
    assert Chemistry(molecules_of(packed, EXPLICIT)).smiles == ["C"]


def test_frames_after_a_spoilt_one_are_read(tmp_path: Path) -> None:
    path = tmp_path / "some.xyz"
    lines = xyz("CC").splitlines()
    spoilt = "\n".join(lines[:5] + lines[6:]) + "\n"
    path.write_text(xyz("C") + spoilt + xyz("N") + xyz("O"))
    found = list(read_xyz(path))
    assert [type(entry) for entry in found] == [Structure, BadEntry, Structure, Structure]
    same(found[2], "N")
    path.write_bytes(b"1\nHelium, \xb0C\nHe 0 0 0\n")
    assert [entry.symbols for entry in good(read_xyz(path))] == [["He"]]


def test_too_many_atoms_and_unstable_ones(tmp_path: Path) -> None:
    path = tmp_path / "some.xyz"
    path.write_text(xyz("C") + xyz("CCC") + xyz("c1ccccc1"))
    packed = MoleculeFile(str(path), max_atoms=11, **settings(tmp_path)).load()
    assert packed.num_atoms.tolist() == [5, 11]
    with pytest.raises(UsageError, match="more atoms than 11"):
        MoleculeFile(str(path), max_atoms=11, strict=True, **settings(tmp_path)).load()
    stable = MoleculeFile(str(path), only_stable=True, **settings(tmp_path)).load()
    assert stable.num_atoms.tolist() == [5, 11]
    assert len(MoleculeFile(str(path), **settings(tmp_path)).load()) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: MoleculeFile(str(p / "none.sdf"), **settings(p)).load(), "there is no"),
        (lambda p: MoleculeFile(str(p / "none.mol2")), r"ends in none of"),
        (lambda p: MoleculeFile(str(p / "none.sdf"), max_atoms=0), "max_atoms must be at least"),
        (lambda p: SmilesFile(str(p / "none.smi"), elements=["P"]), "elements must be some of"),
        (lambda p: list(read_qm9(p)), "holds no files dsgdb9nsd_"),
        (lambda p: list(read_qm9(p / "none.tar.bz2")), "there is no file"),
        (lambda p: list(read_arrays(p / "none.npz")), "there is no file"),
    ],
)
def test_what_is_not_there(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(tmp_path)


def test_broken_archives_and_arrays(tmp_path: Path) -> None:
    path = archive(tmp_path / "cut.tar.bz2", {i: xyz(s) for i, s in enumerate(SMILES, 1)})
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UsageError, match="no whole tar archive"):
        list(read_qm9(path))
    path = tmp_path / "wrong.npz"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match=r"no \.npz file with arrays"):
        list(read_arrays(path))
    np.savez(path, positions=np.zeros((2, 3)), atomic_numbers=np.zeros((2, 3)))
    with pytest.raises(UsageError, match=r"must be \[n, N, 3\]"):
        list(read_arrays(path))
    np.savez(path, positions=np.zeros((1, 2, 3)), atomic_numbers=np.array([[6, 200]], np.uint8))
    (entry,) = good(read_arrays(path))
    assert entry.symbols == ["C", "element 200"]
    np.savez(path, positions=np.zeros((1, 2, 3)), atomic_numbers=np.array([[6.0, -1.0]]))
    (entry,) = good(read_arrays(path))
    assert entry.symbols == ["C"]


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "some.smi"
    path.write_text("C1CC\nCCl\n")
    with pytest.raises(UsageError, match=r"0 of 2 molecules used.*nothing is left to use"):
        SmilesFile(str(path), **settings(tmp_path)).load()
    # The list of what was left out is all that stays: no arrays, whole or in part.
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.name.endswith(".left_out.txt") and kept.read_text().count("\n") == 2


def test_reports_name_the_first_few() -> None:
    faults = [BadEntry(f"line {i}", "a fault") for i in range(1, 8)]
    report = Report("a file", "molecules", num_kept=3, faults=faults)
    text = "7 left out with a fault (line 1, line 2, line 3, line 4, line 5, ...)"
    assert str(report) == f"a file: 3 of 10 molecules used; {text}"
    assert report.listing().count("\n") == 7
    assert report.listing().startswith("a file: line 1 has a fault.\n")


def test_arrays_are_cached_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "some.xyz"
    path.write_text(xyz("C"))
    source = MoleculeFile(str(path), **settings(tmp_path))
    assert len(source.load()) == 1
    (folder,) = source.cache_dir.iterdir()
    stamp = (folder / "types.npy").stat().st_mtime_ns
    assert isinstance(source.load().positions, np.memmap)
    assert (folder / "types.npy").stat().st_mtime_ns == stamp
    path.write_text(xyz("C") + xyz("N"))
    assert len(source.load()) == 2


UNCHARACTERIZED = range(1, 133_885, 43)[:3054]


def test_edm_split_of_the_real_size() -> None:
    numbers = np.setdiff1d(np.arange(1, 133_886, dtype=np.int32), UNCHARACTERIZED)
    split = edm_split(numbers, UNCHARACTERIZED)
    assert {name: len(rows) for name, rows in split.items()} == {
        "train": 100_000,
        "val": 17_748,
        "test": 13_083,
    }
    assert len(np.unique(np.concatenate([*split.values()]))) == 130_831
    # numpy's legacy generator, seeded with 0, as EDM has it.
    np.random.seed(0)
    assert split["train"][:5].tolist() == np.random.permutation(130_831)[:5].tolist()


def test_edm_split_is_a_matter_of_numbers_not_of_what_else_is_there() -> None:
    rng = np.random.default_rng(0)
    numbers = rng.permutation(np.arange(1, 133_886, dtype=np.int32))
    whole = edm_split(numbers, UNCHARACTERIZED)
    some = numbers[rng.random(len(numbers)) < 0.9]
    for name, rows in edm_split(some, UNCHARACTERIZED).items():
        assert set(some[rows]) == set(numbers[whole[name]]) & set(some)
    with pytest.raises(UsageError, match=r"from 1 to 133885, but the file has 7 to 133886"):
        edm_split(np.array([7, 133_886], np.int32))


def test_real_molecules_load(tmp_path: Path) -> None:
    source: Source = MoleculeFile(
        str(real("qm7_xyz.npz")), only_stable=True, max_atoms=23, **settings(tmp_path)
    )
    packed = source.load()
    report = next(source.cache_dir.iterdir()).joinpath("report.txt").read_text()
    assert "elements other than H, C, N, O, F" in report
    assert len(packed) > 6500


def test_packing_moves_molecules_to_their_mean() -> None:
    entry = Structure("a", 4, ["O", "H", "H"], np.array([[1.0, 0, 0], [2, 0, 0], [0, 3, 0]]))
    packed, report = pack([entry], EXPLICIT, 4, source="a file")
    np.testing.assert_allclose(packed.positions[0, :3].mean(axis=0), 0, atol=1e-6)
    assert packed.types[0].tolist() == [3, 0, 0, EMPTY] and packed.numbers.tolist() == [4]
    assert str(report) == "a file: 1 of 1 molecules used"


def single_bonds_sdf(text: str) -> str:
    """Return an SDF entry with all its bonds written as single ones."""
    lines = text.splitlines()
    num_atoms, num_bonds = int(lines[3][:3]), int(lines[3][3:6])
    for i in range(4 + num_atoms, 4 + num_atoms + num_bonds):
        lines[i] = lines[i][:6] + "  1" + lines[i][9:]
    return "\n".join(lines) + "\n"


def without_bonds_sdf(text: str) -> str:
    """Return an SDF entry without its bonds."""
    lines = text.splitlines()
    num_atoms, num_bonds = int(lines[3][:3]), int(lines[3][3:6])
    lines[3] = lines[3][:3] + "  0" + lines[3][6:]
    del lines[4 + num_atoms : 4 + num_atoms + num_bonds]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("change", [single_bonds_sdf, without_bonds_sdf])
def test_bonds_that_a_file_has_wrong_cost_no_molecule(
    tmp_path: Path, change: Callable[[str], str]
) -> None:
    path = tmp_path / "a.sdf"
    path.write_text(change(block("CC=O")) + block("C"))
    packed = MoleculeFile(str(path), strict=True, **settings(tmp_path)).load()
    assert packed.num_atoms.tolist() == [7, 5]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", [".xyz", ".sdf", ".smi", ".csv"])
def test_byte_order_marks_and_windows_lines(tmp_path: Path, suffix: str, encoding: str) -> None:
    texts = {
        ".xyz": "5\n\n" + "".join(block("C").splitlines(True)[4:9]),
        ".sdf": block("C"),
        ".smi": "C\nCC\n",
        ".csv": "smiles\nC\nCC\n",
    }
    text = texts[suffix]
    if suffix == ".xyz":
        rows = [line.split() for line in text.splitlines()[2:]]
        text = "5\n\n" + "".join(f"{row[3]} {' '.join(row[:3])}\n" for row in rows)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(text.replace("\n", "\r\n").encode(encoding))
    reader = SmilesFile if suffix in (".smi", ".csv") else MoleculeFile
    assert len(reader(str(path), strict=True, **settings(tmp_path)).load()) >= 1


def test_a_number_of_atoms_beyond_the_atoms_costs_nothing(tmp_path: Path) -> None:
    positions, numbers = np.zeros((2, 6, 3)), np.zeros((2, 6), np.int64)
    positions[:, :5], numbers[:, :5] = geometry("C")[1], (6, 1, 1, 1, 1)
    path = tmp_path / "a.npz"
    np.savez(path, positions=positions, atomic_numbers=numbers, n_atoms=np.array([6, 5]))
    assert len(MoleculeFile(str(path), strict=True, **settings(tmp_path)).load()) == 2
    np.savez(path, positions=positions, atomic_numbers=numbers, n_atoms=np.array([[1], [2]]))
    with pytest.raises(UsageError, match=r"n_atoms \(2, 1\)"):
        MoleculeFile(str(path), **settings(tmp_path)).load()


def test_a_number_of_atoms_beyond_the_arrays_is_a_fault(tmp_path: Path) -> None:
    positions, numbers = np.zeros((2, 5, 3)), np.tile([6, 1, 1, 1, 1], (2, 1))
    positions[:] = geometry("C")[1]
    path = tmp_path / "a.npz"
    np.savez(path, positions=positions, atomic_numbers=numbers, n_atoms=np.array([6, 5]))
    source = MoleculeFile(str(path), **settings(tmp_path))
    assert source.load().numbers.tolist() == [1]
    assert "row 0 has more atoms than its arrays (n_atoms is 6, the arrays" in source.left_out()


@pytest.mark.parametrize(
    ("comment", "order"),
    [
        ("Properties=species:S:1:pos:R:3:forces:R:3", "s p p"),
        ('Lattice="9 0 0 0 9 0 0 0 9" Properties=species:S:1:Z:I:1:pos:R:3 pbc="F F F"', "s Z p"),
        ("Properties=pos:R:3:Z:I:1", "p Z"),
        ('properties="id:I:1:species:S:1:pos:R:3"', "Z s p"),
    ],
)
def test_columns_of_the_extended_format(tmp_path: Path, comment: str, order: str) -> None:
    symbols, positions = geometry("CO")
    numbers = {"H": "1", "C": "6", "O": "8"}
    lines = [str(len(symbols)), comment]
    for symbol, place in zip(symbols, positions, strict=True):
        parts = {"s": symbol, "p": " ".join(f"{x:.8f}" for x in place), "Z": numbers[symbol]}
        lines.append(" ".join(parts[name] for name in order.split()))
    path = tmp_path / "a.xyz"
    path.write_text("\n".join(lines) + "\n")
    (entry,) = good(read_xyz(path))
    same(entry, "CO")


def test_columns_without_positions_are_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_text("1\nProperties=species:S:1:momenta:R:3\nC 0 0 0\n" + xyz("N"))
    first, second = read_xyz(path)
    assert "has Properties without columns species:S:1 and pos:R:3 (Properties=" in str(first)
    assert isinstance(second, Structure)
    same(second, "N")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_separators_in_comments_end_no_line(tmp_path: Path, end: str) -> None:
    frames = "".join(xyz(s).replace(f"\n{s}\n", "\na\u2028b\x0cc\x85\n") for s in "CN")
    path = tmp_path / "a.xyz"
    path.write_bytes(frames.replace("\n", end).encode())
    found = good(read_xyz(path))
    for entry, smiles in zip(found, "CN", strict=True):
        same(entry, smiles)
    folder = tmp_path / "raw"
    folder.mkdir()
    text = xyz("C", qm9=True).replace("gdb 1 C", "gdb\u20281\x0cC").replace("\n", end)
    (folder / "dsgdb9nsd_000001.xyz").write_bytes(text.encode())
    same(*good(read_qm9(folder)), "C", decimals=6)
    listing = tmp_path / "uncharacterized.txt"
    listing.write_bytes(("a\x0cb\n" * 9 + "7 C\n").replace("\n", end).encode())
    assert read_uncharacterized(listing) == {7}


def test_nothing_left_names_the_key_and_keeps_the_list(tmp_path: Path) -> None:
    path = tmp_path / "a.sdf"
    path.write_text(block("CCO") * 7)
    source = MoleculeFile(str(path), max_atoms=3, **settings(tmp_path))
    with pytest.raises(UsageError, match=r"entry 1 at line 1: 9 atoms.*raise max_atoms; every"):
        source.load()
    assert len(source.left_out().splitlines()) == 7


def test_positions_in_other_units_are_doubted() -> None:
    right = [Structure(str(i), i, *geometry("CCO")) for i in range(12)]
    bohr = [replace(one, positions=one.positions * 1.8897) for one in right]
    packed, report = pack(bohr, EXPLICIT, 9, source="a file")
    assert len(packed) == 12
    assert "of these 100% have bonds that are not their valences: are positions in Ang" in str(
        report
    )
    _, report = pack(right, EXPLICIT, 9, source="a file")
    assert "Angstrom" not in str(report)


def test_elements_that_are_not_known_have_a_remedy_that_works() -> None:
    sulphur = Structure("1", 1, ("S", "H", "H"), geometry("O")[1])
    with pytest.raises(UsageError, match="no others than H, C, N, O, F are known here"):
        pack([sulphur], EXPLICIT, 9, source="a file")
    with pytest.raises(UsageError, match="name them in elements, which may be H, C, N, O, F"):
        pack([sulphur], ("H", "C"), 9, source="a file")


@pytest.mark.parametrize("name", ["a.smi.gz", "a.csv.bz2"])
def test_compressed_files_and_folders_are_refused_as_such(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(UsageError, match=r"is compressed; unpack it first"):
        list(read_smiles(tmp_path / name))
    with pytest.raises(UsageError, match="is a folder; give a file"):
        list(read_smiles(tmp_path))
