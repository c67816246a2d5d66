"""Every family of text-to-image models with every algorithm, on tiny random models."""

import json
from pathlib import Path

import pytest
import torch

import lit_rlft
from lit_rlft.cli import main
from tests.domains.text_to_image.families.tiny import tiny

CONFIGS = Path(lit_rlft.__file__).parents[1] / "configs"
FAMILIES = {"sd15": "sd", "sd2": "sd2", "sdxl": "sdxl", "sd35": "sd3"}
FAMILIES |= {"flux": "flux_dev", "flux2_klein": "klein", "zimage": "zimage", "sana": "sana"}
"""Tiny models by the configs that they stand in for."""
ALGORITHMS = ("graft", "p_graft", "drtune", "draft", "ddpo", "grpo", "noise_ppo", "nft", "dpo")
ALGORITHMS += ("flow_grpo", "flow_grpo_fast", "mix_grpo", "grpo_guard", "adjoint_matching")
DEFAULT = {("sdxl", "drtune")}
SIZE = 32
COMMON = [
    "--reward=Brightness",
    "--pipeline.frozen_dtype=float32",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--model.sampler.num_steps=3",
    "--model.num_eval_samples=1",
    "--run_files.num_conditions=2",
    "--name=run",
]
SETTINGS = {
    "drtune": ["--model.method.k=1", "--model.method.m=1"],
    "mix_grpo": ["--model.sliding.size=1"],
    "flow_grpo_fast": ["--model.sliding.size=1"],
    "inverse_noise_correction": ["--model.solver.max_iterations=3"],
}
PROMPTS = ["--data.source=prompts.txt", "--data.batch_size=2", "--data.eval_batch_size=2"]
PICTURES = [
    "--data=ShapesPictures",
    "--data.num_pictures=8",
    "--data.batch_size=2",
    "--data.eval_batch_size=2",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds the tiny models."""
    folder = tmp_path_factory.mktemp("models")
    for name in FAMILIES.values():
        tiny(name).save_pretrained(folder / name)
    return folder


def words(family: str, algorithm: str, models: Path) -> list[str]:
    """Return the words after the command that run a tiny model with an algorithm."""
    data = PICTURES if algorithm == "inverse_noise_correction" else PROMPTS
    size = 64 if algorithm == "inverse_noise_correction" else SIZE
    return [
        f"--config={CONFIGS}/domains/{family}.yaml",
        f"--config={CONFIGS}/algorithms/{algorithm}.yaml",
        f"--pipeline.pretrained={models / FAMILIES[family]}",
        f"--pipeline.height={size}",
        f"--pipeline.width={size}",
        *COMMON,
        *SETTINGS.get(algorithm, []),
        *data,
    ]


@pytest.mark.parametrize(
    ("family", "algorithm"),
    [
        pytest.param(
            family,
            algorithm,
            marks=[] if (family, algorithm) in DEFAULT else pytest.mark.slow,
        )
        for family in FAMILIES
        for algorithm in (*ALGORITHMS, "inverse_noise_correction")
    ],
)
def test_fits_tests_resumes_and_exports(
    family: str,
    algorithm: str,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("".join(f"a red ring, number {i}\n" for i in range(20)))
    given, last = words(family, algorithm, models), "runs/run/checkpoints/last.ckpt"
    main(["fit", *given, "--trainer.max_epochs=1"])
    first = torch.load(last, weights_only=True)
    main(["fit", *given, "--trainer.max_epochs=2", f"--ckpt_path={last}"])
    second = torch.load(last, weights_only=True)
    assert second["lit_rlft"]["num_rounds"] == 2 * first["lit_rlft"]["num_rounds"]
    assert second["lit_rlft"]["num_updates"] > first["lit_rlft"]["num_updates"] > 0
    assert all(value.isfinite().all() for value in second["state_dict"].values())
    assert any(
        not torch.equal(value, first["state_dict"][name])
        for name, value in second["state_dict"].items()
    )
    main(["test", *given, f"--ckpt_path={last}"])
    assert json.loads(Path("runs/run/metrics.json").read_text())["tuned"]["Brightness"]["mean"] > 0
    if algorithm != "inverse_noise_correction":  # its corrector is in the checkpoint alone
        card = json.loads(Path("runs/run/tuned/lit_rlft.json").read_text())
        assert 0 <= card["tuned_steps"] <= card["num_steps"] == 3
        assert (card["tuned_steps"] > 0) == (algorithm != "noise_ppo")  # it tunes the noise alone
