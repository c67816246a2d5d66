"""Molecules as pictures and files: 2-D depictions, SDF and SMILES."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rdkit import Chem
from rdkit.Chem import rdDepictor
from torch import Tensor

from domains.molecule.chemistry.batch import Chemistry, chemistry_of
from domains.molecule.samples import Molecules
from lit_rlft.core.figure import Body, Figure

try:
    from rdkit.Chem.Draw import rdMolDraw2D
except ImportError as error:  # RDKit's wheel lacks them, and so do slim containers
    raise ImportError(
        f"{error}: RDKit draws with libraries of the system; on Debian and Ubuntu: "
        "apt-get install libxrender1 libxext6"
    ) from error

__all__ = ["draw", "figures_of", "save_molecule", "to_image"]

_PANEL = 160  # pixels of a side in panels
_PICTURE = 400  # pixels of a side in files
_REFUSED = (1.0, 0.93, 0.93)  # background of molecules that are not valid
_COLORS = {"H": "#e8e8e8", "C": "#505050", "N": "#3050f8", "O": "#e02020", "F": "#60b030"}
_BALL = 0.45  # of the covalent radius


def draw(molecules: Molecules, size: int = _PANEL) -> Tensor:
    """Return 2-D depictions, [B, 3, size, size] in [0, 1]; on light red where not valid."""
    chemistry = chemistry_of(molecules)
    pictures = [np.asarray(to_image(chemistry, row, size)) for row in range(len(chemistry))]
    if not pictures:
        return torch.empty(0, 3, size, size)
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def to_image(chemistry: Chemistry, row: int, size: int = _PICTURE) -> Image.Image:
    """Return the depiction of one molecule of a batch, with what is wrong with it below.

    Args:
        chemistry: The view of the batch.
        row: The molecule's place in it.
        size: Pixels of a side.
    """
    canvas = _drawn(rdMolDraw2D.MolDraw2DCairo, chemistry, row, size)
    return Image.open(io.BytesIO(canvas.GetDrawingText())).convert("RGB")


def figures_of(molecules: Molecules, size: int = _PANEL) -> list[Figure]:
    """Return each molecule's depiction as SVG, and its atoms and bonds in space."""
    chemistry = chemistry_of(molecules)
    return [
        Figure(
            _drawn(rdMolDraw2D.MolDraw2DSVG, chemistry, row, size).GetDrawingText(),
            _body(chemistry, row),
        )
        for row in range(len(chemistry))
    ]


def save_molecule(molecules: Molecules, path: Path) -> Path:
    """Write the one molecule as `<path>.sdf`, `.smi` and `.png`; return the first.

    The .sdf holds all atoms in their order with the positions and the bonds of the tables; .smi
    has the canonical SMILES of the largest part, or a comment where RDKit refuses the molecule.
    """
    chemistry = chemistry_of(molecules)
    assert len(chemistry) == 1
    mol = chemistry.graphs.full(0)
    smiles = chemistry.smiles[0]
    mol.UpdatePropertyCache(strict=False)
    mol.SetProp("_Name", path.name)
    block = Chem.MolToMolBlock(mol, kekulize=False)
    written = path.with_name(f"{path.name}.sdf")
    written.write_text(f"{block}$$$$\n", encoding="utf-8")
    line = f"{smiles} {path.name}\n" if smiles else f"# {path.name} is not valid\n"
    path.with_name(f"{path.name}.smi").write_text(line, encoding="utf-8")
    to_image(chemistry, 0).save(path.with_name(f"{path.name}.png"))
    return written


def _drawn(kind: Callable[[int, int], Any], chemistry: Chemistry, row: int, size: int) -> Any:
    """Return one of RDKit's canvases with a depiction, a plain paper where it cannot draw one."""
    mol = chemistry.mols[row]
    shown = Chem.Mol(mol) if mol is not None else _unchecked(chemistry, row)
    rdDepictor.Compute2DCoords(shown)
    draw = partial(_draw_on, legend=_legend(chemistry, row), valid=mol is not None)
    try:
        return draw(kind(size, size), shown)
    except RuntimeError:  # two bonded atoms of a dense clump at one place of the plane
        return draw(kind(size, size), Chem.Mol())


def _draw_on(canvas: Any, mol: Chem.Mol, *, legend: str, valid: bool) -> Any:
    options = canvas.drawOptions()
    options.prepareMolsBeforeDrawing = valid
    if not valid:
        options.setBackgroundColour(_REFUSED)
    canvas.DrawMolecule(mol, legend=legend)
    canvas.FinishDrawing()
    return canvas


def _body(chemistry: Chemistry, row: int) -> Body | None:
    """Return a molecule's atoms and bonds; None where positions are no numbers."""
    kept = chemistry.molecules.valid[row]
    points = chemistry.molecules.positions[row][kept]
    if not len(points) or not points.isfinite().all():
        return None
    names = [chemistry.molecules.elements[i] for i in chemistry.molecules.types[row][kept]]
    bonds = chemistry.orders[row][kept][:, kept].triu(diagonal=1).nonzero().tolist()
    table = Chem.GetPeriodicTable()
    return Body(
        [[round(x, 3) for x in point] for point in points.tolist()],
        names,
        [_COLORS[name] for name in names],
        [round(_BALL * table.GetRcovalent(name), 3) for name in names],
        [(first, second) for first, second in bonds],
    )


def _unchecked(chemistry: Chemistry, row: int) -> Chem.Mol:
    """Return a molecule that RDKit refuses, such that it can be drawn."""
    mol = chemistry.graphs.full(row)
    mol.RemoveAllConformers()
    mol.UpdatePropertyCache(strict=False)
    Chem.FastFindRings(mol)
    return mol


def _legend(chemistry: Chemistry, row: int) -> str:
    if chemistry.mols[row] is None:
        return "not valid"
    if chemistry.num_fragments[row] > 1:
        return f"{chemistry.num_fragments[row]} parts"
    if not (chemistry.molecules.implicit_hydrogens or chemistry.molecule_stability[row]):
        return "not stable"
    return ""
