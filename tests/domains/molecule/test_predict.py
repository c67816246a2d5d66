"""The command line on molecules: what `predict` writes and says of each can be read by RDKit."""

import json
from pathlib import Path

import pytest
from rdkit import Chem

import lit_rlft
from domains.molecule.chemistry.batch import sample_facts
from domains.molecule.samples import Molecules
from lit_rlft.cli import main
from tests.domains.molecule.chemistry.test_batch import overfull
from tests.domains.molecule.known import from_atoms, from_smiles, geometry

CONFIGS = Path(lit_rlft.__file__).parents[1] / "configs"


def test_facts_of_molecules() -> None:
    (a, first), (b, second) = geometry("CCO"), geometry("O")
    apart = (a + b, [*first.tolist(), *(second + 20).tolist()])
    assert sample_facts(from_atoms([geometry("OCC"), overfull(), apart])) == [
        {"smiles": "CCO", "num_fragments": 1, "stable": True},
        {"smiles": None, "num_fragments": 0, "stable": False},
        {"smiles": "CCO", "num_fragments": 2, "stable": True},
    ]
    heavy: Molecules = from_smiles("CCO", heavy=True)
    assert sample_facts(heavy) == [{"smiles": "CCO", "num_fragments": 1}]


def test_predicted_molecules_come_with_their_smiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = [f"--config={CONFIGS}/domains/molecule.yaml"]
    flags += [f"--config={CONFIGS}/algorithms/p_graft.yaml", "--name=run"]
    flags += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    flags += ["--data.num_test=6", "--model.num_eval_samples=2", "--model.sampler.num_steps=10"]
    main(["predict", *flags])
    lines = [json.loads(line) for line in Path("runs/run/samples.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and any(line["facts"]["smiles"] for line in lines)
    for line in lines:
        facts = line["facts"]
        assert type(facts["stable"]) is bool
        (mol,) = Chem.SDMolSupplier(f"runs/run/samples/{line['file']}", sanitize=False)
        assert mol.GetNumAtoms() == line["num_atoms"]
        written = Path(f"runs/run/samples/{line['file']}").with_suffix(".smi").read_text()
        if facts["smiles"] is None:
            assert facts["num_fragments"] == 0 and written.startswith("#")
        else:
            assert written.split()[0] == facts["smiles"]
            assert Chem.CanonSmiles(facts["smiles"]) == facts["smiles"]
