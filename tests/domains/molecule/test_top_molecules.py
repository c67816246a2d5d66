"""The best molecules, by hand and against RDKit's own similarities."""

import json
import os
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rdkit import Chem, DataStructs
from rdkit.Chem import rdFingerprintGenerator

from domains.molecule.rewards import AtomCount, FunctionReward
from domains.molecule.samples import Molecules
from domains.molecule.top_molecules import TopMolecules
from lit_rlft.cli import main
from lit_rlft.core.checks import BadArgument, UsageError
from lit_rlft.evaluation.exploitation import exploitation
from lit_rlft.evaluation.jackknife import compared
from tests.domains.molecule.known import conditions, from_atoms, geometry

SMILES = ["CCO", "CCC", "CCO", "CCCN", "CCCCO"]


def molecules() -> Molecules:
    return from_atoms([geometry(smiles) for smiles in SMILES])


def heavy(mols: list[Chem.Mol]) -> list[float]:
    return [float(mol.GetNumHeavyAtoms()) for mol in mols]


def test_different_molecules_count_once() -> None:
    metric = TopMolecules(FunctionReward(heavy), k=[1, 3, 4, 5])
    values = metric.compare(metric.features(molecules(), conditions(5)))
    # 5, 4, 3, 3 heavy atoms; ethanol occurs twice.
    assert values["top_1"] == 5 and values["top_3"] == 4 and values["top_4"] == 3.75
    assert values["top_5"] != values["top_5"] and values["top_diversity"] != values["top_diversity"]


def test_diversity_is_rdkits() -> None:
    metric = TopMolecules(FunctionReward(heavy), k=[4])
    found = metric.compare(metric.features(molecules(), conditions(5)))["top_diversity"]
    generator = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    prints = [generator.GetFingerprint(Chem.MolFromSmiles(s)) for s in sorted(set(SMILES))]
    alike = [DataStructs.TanimotoSimilarity(a, b) for a, b in combinations(prints, 2)]
    assert found == pytest.approx(1 - sum(alike) / len(alike), abs=1e-6)


def families(num: int, seed: int, num_families: int = 6) -> dict[str, torch.Tensor]:
    """Return features of molecules whose fingerprints are of some families, later ones better."""
    bits = torch.rand(6, 256, generator=torch.Generator().manual_seed(9)) < 0.3
    draws = torch.Generator().manual_seed(seed)
    family = torch.randint(0, num_families, (num,), generator=draws)
    own = bits[family] ^ (torch.rand(num, 256, generator=draws) < 0.1)
    return {
        "score": (0.3 * family + torch.randn(num, generator=draws)).double(),
        "identity": torch.arange(num),
        "fingerprint": torch.from_numpy(np.packbits(own.numpy(), axis=1)),
        "counted": torch.ones(num, dtype=torch.bool),
    }


def test_the_error_of_diversity_is_about_the_true_deviation() -> None:
    metric = TopMolecules(AtomCount("O", 1), k=[1, 60])
    drawn = [families(240, seed) for seed in range(150)]
    found = [compared(metric, {"tuned": own}, metric.num_draws)["tuned"] for own in drawn]
    true = np.std([one["top_diversity"]["mean"] for one in found], ddof=1)
    reported = np.mean([one["top_diversity"]["sem"] ** 2 for one in found]) ** 0.5
    assert reported == pytest.approx(true, rel=0.2)  # 150 runs know it to 6 %
    assert all(np.isnan(one["top_60"]["sem"]) for one in found)  # a maximum has none
    few = compared(metric, {"tuned": families(50, 0)}, metric.num_draws)["tuned"]
    assert np.isnan(few["top_diversity"]["sem"])


def test_a_fall_of_diversity_is_a_sign() -> None:
    metric = TopMolecules(AtomCount("O", 1), k=[60])
    arms = {"reference": families(240, 0), "tuned": families(240, 1, num_families=1)}
    arms["tuned"]["score"] += 1
    summary = compared(metric, arms, metric.num_draws)
    error = np.hypot(*(summary[arm]["top_diversity"]["sem"] for arm in arms))
    assert summary["gain"]["top_diversity"]["sem"] == pytest.approx(error)
    summary["gain"]["reward"] = {"mean": 1.0, "sem": 0.1}
    found = exploitation(summary, "reward", metric.guards())
    assert found is not None and set(found.signs) == {"top_diversity"}


def test_what_failed_or_is_not_valid_does_not_count() -> None:
    metric = TopMolecules(AtomCount("O", 1), k=[1])
    features = metric.features(molecules(), conditions(5))
    features["counted"][:] = False
    assert metric.compare(features)["top_1"] != metric.compare(features)["top_1"]


def test_a_function_gets_molecules_with_positions() -> None:
    seen: list[Chem.Mol] = []

    def extent(mols: list[Chem.Mol]) -> list[float | None]:
        seen.extend(mols)
        return [None, *(float(m.GetConformer().GetPositions().std()) for m in mols[1:])]

    batch = from_atoms([geometry("CCO"), geometry("C"), (("C", "H"), geometry("C")[1][:2] * 50)])
    values = FunctionReward(extent, invalid=-1.0)(batch, conditions(3))
    assert [Chem.MolToSmiles(Chem.RemoveHs(mol)) for mol in seen] == ["CCO", "C"]
    assert values[0] == -1 and values[2] == -1 and 0 < values[1] < 2


def test_a_number_for_invalid_molecules_that_is_no_worst_is_warned_of() -> None:
    reward, batch = FunctionReward(lambda mols: [-5.0] * len(mols)), from_atoms([geometry("C")])
    with pytest.warns(UserWarning, match="returned -5 for a valid molecule, less than the 0 of"):
        reward(batch, conditions(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward(batch, conditions(1))  # said once
        FunctionReward(lambda mols: [-5.0] * len(mols), invalid=-9.0)(batch, conditions(1))


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda mols, prompts: [0.0], "it is called with 1 list, of molecules first"),
        (lambda mols: "1", "returned a str; return one number, or None, for each"),
        (lambda mols: {1.0: "a"}, "returned a dict; return one number"),
    ],
)
def test_a_function_that_fits_nothing_is_told(function: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        FunctionReward(function)(from_atoms([geometry("C")]), conditions(1))


def test_another_program_scores_as_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[3] / "docs/how_to/own_reward.md").read_text()
    names: dict[str, Any] = {}
    exec(page.split("# my_docking.py\n")[1].split("```")[0], names)
    program = tmp_path / "dock"  # prints minus the file's lines; knows no molecules with nitrogen
    program.write_text('#!/bin/sh\ngrep -q " N " "$1" && exit 1\nprintf -- -; wc -l < "$1"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    reward = FunctionReward(names["affinity"], invalid=-5.0)
    assert reward.name == "affinity"
    values = reward(from_atoms([geometry("C"), geometry("N")]), conditions(2))
    assert values.tolist() == [4 + 5 + 4 + 1, -5.0]  # header, atoms, bonds, end


def test_k_is_checked() -> None:
    with pytest.raises(BadArgument, match="k"):
        TopMolecules(AtomCount("O", 1), k=[0])


@pytest.mark.slow
def test_the_trained_reward_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("top.yaml").write_text(
        "metrics:\n  parts:\n    - class_path: TopMolecules\n"
        "      init_args: {reward: '${reward}', k: [1, 2]}\n"
    )
    words = ["--config=molecule", "--config=p_graft", "--config=top.yaml", "--name=top"]
    words += ["--data.num_test=8", "--model.sampler.num_steps=2", "--trainer.accelerator=cpu"]
    main(["test", *words])
    metrics = json.loads(Path("runs/top/metrics.json").read_text())
    assert set(metrics["tuned"]) >= {"top_1", "top_2", "top_diversity"}
    assert torch.isfinite(torch.tensor(metrics["cost"]["seconds"]))
