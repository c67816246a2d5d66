"""Pictures of molecules, and the files that predict writes."""

import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rdkit import Chem

from domains.molecule.chemistry.batch import Chemistry
from domains.molecule.chemistry.elements import EXPLICIT
from domains.molecule.render import draw, figures_of, save_molecule
from domains.molecule.samples import EMPTY, Molecules
from domains.molecule.sources.formats import read_sdf
from domains.molecule.sources.packed import Structure
from tests.domains.molecule.chemistry.test_batch import overfull
from tests.domains.molecule.known import from_atoms, from_smiles, geometry


def test_pictures_of_good_and_bad_molecules() -> None:
    nothing = Molecules.of(torch.zeros(1, 2, 3), torch.full((1, 2), EMPTY), EXPLICIT)
    (a, first), (b, second) = geometry("CC"), geometry("O")
    parts = (a + b, np.concatenate([first, second + 20]))
    pictures = draw(from_atoms([geometry("CCO"), overfull(), parts]), 120)
    assert pictures.shape == (3, 3, 120, 120) and 0 <= pictures.min() < pictures.max() <= 1
    # White paper for valid ones, light red for others; ink on all of them.
    corners = pictures[:, :, 0, 0]
    assert corners[0].min() == corners[2].min() == 1 and corners[1, 1] < 0.98
    assert (pictures.amin(dim=(1, 2, 3)) < 0.6).all()
    assert draw(nothing).shape == (1, 3, 160, 160)
    assert draw(nothing.index(slice(0, 0))).shape == (0, 3, 160, 160)
    assert draw(from_smiles("CCO", heavy=True)).shape[0] == 1


def test_a_clump_that_rdkit_cannot_draw_is_an_empty_picture() -> None:
    """Twelve atoms within a bond length: two that are bonded fall together in the plane."""
    noise = torch.Generator().manual_seed(28)
    positions = 0.5 * torch.randn(1, 12, 3, generator=noise)
    types = torch.randint(0, 5, (1, 12), generator=noise)
    picture = draw(Molecules.of(positions, types, EXPLICIT))
    assert picture.shape == (1, 3, 160, 160)
    assert (picture[0, 1] < 0.98).all()  # the paper of molecules that are not valid


def test_the_same_molecule_looks_the_same_wherever_it_is() -> None:
    symbols, places = geometry("CCO")
    pictures = draw(from_atoms([(symbols, places), (symbols, places + 4), geometry("CCN")]))
    assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])


def test_saved_molecules_can_be_read(tmp_path: Path) -> None:
    molecules = from_smiles("CC(N)=O")
    written = save_molecule(molecules, tmp_path / "a.0")
    assert written == tmp_path / "a.0.sdf"
    (entry,) = read_sdf(written)
    assert isinstance(entry, Structure)
    np.testing.assert_allclose(entry.positions, molecules.positions[0], atol=1e-4)
    assert tuple(entry.symbols) == geometry("CC(N)=O")[0]
    (mol,) = Chem.SDMolSupplier(str(written))
    assert Chem.MolToSmiles(mol) == "CC(N)=O" and mol.GetProp("_Name") == "a.0"
    assert (tmp_path / "a.0.smi").read_text() == "CC(N)=O a.0\n"
    assert Image.open(tmp_path / "a.0.png").size == (400, 400)


def test_molecules_that_are_not_valid_are_saved_too(tmp_path: Path) -> None:
    molecules = from_atoms([overfull()])
    assert Chemistry(molecules).smiles == [None]
    written = save_molecule(molecules, tmp_path / "b")
    (entry,) = read_sdf(written)
    assert isinstance(entry, Structure) and len(entry.symbols) == 6
    assert (tmp_path / "b.smi").read_text() == "# b is not valid\n"
    heavy = save_molecule(from_smiles("CCO", heavy=True), tmp_path / "c")
    (mol,) = Chem.SDMolSupplier(str(heavy))
    assert Chem.MolToSmiles(mol) == "CCO"


def test_reports_show_molecules_as_svg_and_in_space() -> None:
    nowhere = Molecules.of(torch.full((1, 2, 3), torch.nan), torch.ones(1, 2).long(), EXPLICIT)
    symbols, places = geometry("CCO")
    good, bad = figures_of(from_atoms([(symbols, places), overfull()]))
    assert all(ET.fromstring(figure.svg).tag.endswith("svg") for figure in (good, bad))
    body = good.body
    assert body is not None and body.names == list(symbols)
    np.testing.assert_allclose(body.points, places, atol=1e-3)
    # Ethanol: 2 bonds between heavy atoms and 6 to hydrogens, each once.
    pairs = [{body.names[a], body.names[b]} for a, b in body.sticks]
    assert len(pairs) == 8 and pairs.count({"C", "H"}) == 5 and {"O", "H"} in pairs
    assert body.radii[symbols.index("H")] < body.radii[symbols.index("C")]
    (lost,) = figures_of(nowhere)
    assert lost.body is None and lost.svg
