"""The models that ship: that they are what the assets' README says."""

import re

import pytest
import torch

from domains.molecule.chemistry import bonds
from domains.molecule.pipeline import EMBEDDED, MoleculePipeline
from lit_rlft.core.sampling import Sampler

MODELS = sorted(path.name for path in EMBEDDED.glob("*") if path.is_dir())


def test_the_readme_names_every_model_and_all_are_small() -> None:
    text = (EMBEDDED / "README.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \| .*parameters", text, re.MULTILINE)) == set(MODELS)
    files = [path for name in MODELS for path in (EMBEDDED / name).iterdir()]
    assert sum(path.stat().st_size for path in files) < 1.5e6


@pytest.mark.parametrize("name", MODELS)
def test_models_sample_molecules_near_their_documented_quality(name: str) -> None:
    """The share of stable atoms (heavy: of fitting molecules) in the README's last column, - 10 %.

    Of molecules of a common size, by the bond tables, from the stochastic sampler: three standard
    errors are less.
    """
    pipeline = MoleculePipeline(name)
    heavy = pipeline.architecture.implicit_hydrogens
    condition = pipeline.encode(
        {"num_atoms": torch.full((256,), 8) if heavy else torch.full((64,), 12)}
    )
    torch.manual_seed(0)
    with torch.no_grad():
        x_1 = pipeline.process.prior(pipeline.blank(condition)).sample()
        x_0 = Sampler(20, 1.0).sample(pipeline, pipeline.process, x_1, condition)
    molecules = pipeline.decode(x_0, condition)
    if heavy:
        share = bonds.fitting_valences(molecules).double().mean()
    else:
        share = bonds.atom_stability(molecules).double().sum() / molecules.num_atoms.sum()
    text = (EMBEDDED / "README.md").read_text()
    documented = re.search(rf"^\| `{name}` \| .* \| ([\d.]+) % \|$", text, re.MULTILINE)
    assert documented is not None
    assert float(share) > float(documented[1]) / 100 - 0.1
