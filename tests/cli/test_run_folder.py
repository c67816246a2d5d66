"""What a run's folder holds after a second command: its own config, its own samples, its logs."""

import json
from pathlib import Path

import pytest
import yaml

from lit_rlft.cli import main

TINY = [
    "--config=gaussian_mixture", "--config=p_graft", "--data.num_train=8", "--data.batch_size=4",
    "--data.num_val=2", "--data.num_test=2", "--model.sampler.num_steps=4",
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    "--trainer.limit_val_batches=0",
]  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def lit_rlft(stage: str, name: str, *words: str) -> Path:
    main([stage, *TINY, f"--name={name}", *words])
    return Path("runs") / name


def test_the_config_of_a_fit_starts_anew_and_tests_the_runs_own_model() -> None:
    """Not from the checkpoint that it went on from."""
    first = lit_rlft("fit", "first", "--trainer.max_epochs=1")
    last = first / "checkpoints" / "last.ckpt"
    second = lit_rlft("fit", "second", "--trainer.max_epochs=2", f"--ckpt_path={last}")
    assert yaml.safe_load((second / "config.yaml").read_text())["ckpt_path"] is None
    main(["test", "--config", str(second / "config.yaml")])
    tested = json.loads((second / "metrics.json").read_text())["checkpoint"]
    assert tested["path"] == "checkpoints/last.ckpt"  # within its own folder


def test_a_test_that_fails_leaves_the_config_of_the_older_one() -> None:
    folder = lit_rlft("fit", "run")
    lit_rlft("test", "run")
    config = (folder / "config_test.yaml").read_text()
    with pytest.raises(SystemExit, match="no picture"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_rlft.callbacks.run_files.comparison", _fails)
        lit_rlft("test", "run", "--model.num_eval_samples=3")
    assert (folder / "config_test.yaml").read_text() == config
    lit_rlft("test", "run", "--model.num_eval_samples=3")
    own = yaml.safe_load((folder / "config_test.yaml").read_text())
    assert own["model"]["init_args"]["num_eval_samples"] == 3


def test_a_name_that_was_never_fitted_gets_its_report() -> None:
    folder = lit_rlft("test", "untuned")
    assert (folder / "report.html").is_file() and (folder / "config_test.yaml").is_file()


def _fails(*args: object) -> None:
    raise RuntimeError("no picture")


def test_samples_of_other_settings_do_not_stay() -> None:
    folder = lit_rlft("fit", "run")
    for seed in ("0", "3"):
        lit_rlft("predict", "run", f"--model.seed={seed}")
        lines = (folder / "samples.jsonl").read_text().splitlines()
        named = {json.loads(line)["file"] for line in lines}
        assert {path.name for path in (folder / "samples").iterdir()} == named


def test_a_run_without_checkpoints_is_not_written_over() -> None:
    none = ("--checkpoint.save_last=false", "--checkpoint.save_top_k=0")
    folder = lit_rlft("fit", "run", *none)
    tuned = {path.name: path.read_bytes() for path in (folder / "tuned").iterdir()}
    with pytest.raises(SystemExit, match="already holds a run that kept no checkpoint"):
        lit_rlft("fit", "run", *none, "--model.seed=5")
    assert {path.name: path.read_bytes() for path in (folder / "tuned").iterdir()} == tuned


def test_a_home_or_a_variable_in_the_root_is_one_folder_for_all_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PLACE", str(tmp_path / "place"))
    for root, folder in (("~/x", tmp_path / "home" / "x"), ("$PLACE", tmp_path / "place")):
        lit_rlft("fit", "run", f"--root={root}")
        names = {path.name.partition(".")[0] for path in (folder / "run").iterdir()}
        assert {"checkpoints", "config", "events", "tuned"} <= names
    assert {path.name for path in tmp_path.iterdir()} == {"home", "place"}
    with pytest.raises(SystemExit, match="without separators and"):
        lit_rlft("fit", "a$PLACE")


def test_clipping_by_value_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"gradient_clip_algorithm does not apply.*max_grad_norm"):
        lit_rlft("fit", "run", "--trainer.gradient_clip_algorithm=value")
