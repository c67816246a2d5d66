"""Which checkpoint a command takes, what it may say, and whose results are in a run's folder."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rlft.cli import main
from tests.support import TINY_MIXTURE, arguments, checkpoint, report, weights, working_directory

CONFIGS = ("gaussian_mixture", "p_graft")


def command(stage: str, **settings: Any) -> None:
    main(
        arguments(
            stage, CONFIGS, TINY_MIXTURE, {k.replace("__", "."): v for k, v in settings.items()}
        )
    )


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("which")
    with working_directory(folder):
        command("fit", checkpoint__monitor="val/Coordinate", checkpoint__mode="max")
    return folder / "runs"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """Work beside a copy of the finished run; return its folder."""
    shutil.copytree(finished, tmp_path / "runs")
    with working_directory(tmp_path):
        yield Path("runs/run")


def test_a_test_takes_the_last_checkpoint_and_keeps_results_of_another(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("test")
    assert "checkpoint: runs/run/checkpoints/last.ckpt" in capsys.readouterr().out.splitlines()
    tuned = report(run)
    counters = checkpoint("run")["lit_rlft"]
    assert tuned["checkpoint"] == {
        "path": "checkpoints/last.ckpt",
        **{name: counters[name] for name in ("num_rounds", "num_samples", "num_updates")},
    }
    assert tuned["tuned"] != tuned["reference"]
    picture = (run / "comparison.png").read_bytes()

    command("test", ckpt_path="none")
    said = capsys.readouterr().out
    assert "checkpoint: none, the model is untuned (as --ckpt_path none asks)" in said
    assert "that of checkpoints/last.ckpt (round 2) is kept as metrics.2.json" in said
    assert report(run)["checkpoint"] is None
    assert report(run)["tuned"] == report(run)["reference"] == tuned["reference"]
    assert json.loads((run / "metrics.2.json").read_text()) == tuned
    assert (run / "comparison.2.png").read_bytes() == picture

    command("test", ckpt_path=str(run / "checkpoints/last.ckpt"))
    assert report(run)["tuned"] == tuned["tuned"]
    assert json.loads((run / "metrics.untuned.json").read_text())["checkpoint"] is None


def test_samples_of_another_checkpoint_are_kept(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("predict")
    written = (run / "samples.jsonl").read_text()
    first = json.loads(written.splitlines()[0])
    assert first["checkpoint"]["path"] == "checkpoints/last.ckpt"
    files = sorted(path.name for path in (run / "samples").iterdir())
    command("predict")  # of the same one: in the same place
    assert not list(run.glob("samples.2*"))
    command("predict", ckpt_path="none")
    assert "is kept as samples.2.jsonl" in capsys.readouterr().out
    assert (run / "samples.2.jsonl").read_text() == written
    assert sorted(path.name for path in (run / "samples.2").iterdir()) == files
    assert json.loads((run / "samples.jsonl").read_text().splitlines()[0])["checkpoint"] is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"name": "new"},
            "checkpoint: none, the model is untuned (there is none in runs/new/checkpoints)",
        ),
        ({"name": None}, "checkpoint: none, the model is untuned (give a run's --name"),
        ({"ckpt_path": "last"}, "checkpoint: runs/run/checkpoints/last.ckpt"),
        ({"ckpt_path": "best"}, "checkpoint: runs/run/checkpoints/epoch=0-step="),
    ],
)
def test_what_a_command_takes_is_said(
    run: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], said: str
) -> None:
    command("validate", **settings)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(said) for line in lines), lines


@pytest.mark.parametrize("name", ["last", "best", "hpc"])
def test_a_name_without_a_file_is_refused(run: Path, name: str) -> None:
    with pytest.raises(SystemExit, match=f"ckpt_path {name}: there is no such checkpoint in runs/"):
        command("test", name="new", ckpt_path=name)
    assert not Path("runs/new").exists()


@pytest.mark.parametrize("name", ["..", ".", "", " ", "a/b", "../b", "/tmp/b", "a\\b", "a\nb"])
def test_a_name_is_that_of_one_folder(run: Path, name: str) -> None:
    with pytest.raises(SystemExit, match="error: name must be that of a folder in root"):
        command("validate", name=name)


ROUTES = {
    "file": ("test", {"ckpt_path": "bomb.ckpt"}),
    "fit": ("fit", {"ckpt_path": "bomb.ckpt", "weights_only": False}),
    "weights_only": ("predict", {"ckpt_path": "bomb.ckpt", "weights_only": False}),
    "last": ("test", {"ckpt_path": "last"}),
    "best": ("test", {"ckpt_path": "best", "weights_only": False}),
    "hpc": ("test", {"ckpt_path": "hpc", "weights_only": False}),
    "default": ("validate", {"weights_only": False}),
}


@pytest.mark.parametrize("route", ROUTES)
def test_code_in_a_checkpoint_is_never_run(run: Path, route: str) -> None:
    trap = Path("trap").resolve()
    content = checkpoint("run")
    content["callbacks"]["bomb"] = Bomb(trap)
    for path in ("bomb.ckpt", run / "checkpoints/last.ckpt", run / "hpc_ckpt_3.ckpt"):
        torch.save(content, path)
    stage, settings = ROUTES[route]
    with pytest.raises(SystemExit, match="never loaded"):
        command(stage, **settings)
    assert not trap.exists()
    torch.load("bomb.ckpt", weights_only=False)
    assert trap.exists()  # it would have gone off


def test_hyper_parameters_of_a_checkpoint_change_and_import_nothing(run: Path) -> None:
    Path("trap.py").write_text("open('sprung', 'w').close()")
    content = checkpoint("run")
    content["hyper_parameters"] = {
        "_class_path": "trap.Model",
        "_instantiator": "trap.make",
        "sampler": {"num_steps": 17},
    }
    torch.save(content, "file.ckpt")
    command("test", ckpt_path="file.ckpt")
    assert not Path("sprung").exists()
    # 2 conditions, 2 samples, 3 steps, of both models
    assert report(run)["cost"]["test_denoiser_calls"] == 2 * 2 * 2 * 3
    assert report(run)["checkpoint"]["path"] == str(Path("file.ckpt").resolve())


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _replace_with_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_cut, "cut off or damaged"),
        (lambda path: path.write_text(""), "is no checkpoint of lit-rlft"),
        (lambda path: path.write_text("weights"), "is no checkpoint of lit-rlft"),
        (_replace_with_folder, "is a folder"),
        (lambda path: path.unlink(), "there is no file"),
        (lambda path: torch.save({"lit_rlft": {}, "state_dict": {}}, path), "is damaged"),
        (lambda path: torch.save({"state_dict": {}}, path), "is no checkpoint of lit-rlft"),
    ],
)
def test_what_is_no_checkpoint_is_refused_first(run: Path, damage: Any, reason: str) -> None:
    path = run / "checkpoints/odd.ckpt"
    shutil.copy(run / "checkpoints/last.ckpt", path)
    damage(path)
    with pytest.raises(SystemExit, match=f"^lit-rlft: error: [^\n]*{reason}") as exit_:
        command("test", ckpt_path=str(path))
    assert "odd.ckpt" in str(exit_.value)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_a_fast_dev_run_leaves_nothing(tmp_path: Path, stage: str) -> None:
    with working_directory(tmp_path):
        command(stage, trainer__fast_dev_run=True)
        assert list(tmp_path.iterdir()) == []


LOGGER = "lightning.pytorch.loggers."


@pytest.mark.parametrize(
    "logger",
    [
        False,
        pytest.param(
            [{"class_path": f"{LOGGER}CSVLogger", "init_args": {"save_dir": "logs"}}],
            marks=pytest.mark.slow,
        ),
        [
            {"class_path": f"{LOGGER}CSVLogger", "init_args": {"save_dir": "logs"}},
            {"class_path": f"{LOGGER}TensorBoardLogger", "init_args": {"save_dir": "logs"}},
        ],
    ],
)
def test_all_that_is_ours_is_in_the_run_folder_with_any_logger(tmp_path: Path, logger: Any) -> None:
    with working_directory(tmp_path):
        for stage in ("fit", "test", "predict"):
            command(stage, trainer__logger=logger)
        found = {path.name for path in Path("runs/run").iterdir()}
        assert {"checkpoints", "config.yaml", "tuned", "panels", "metrics.json"} <= found
        assert {"comparison.png", "samples", "samples.jsonl", "config_test.yaml"} <= found
        assert report()["checkpoint"]["path"] == "checkpoints/last.ckpt"
        if logger:
            logged = next(Path("logs").rglob("metrics.csv")).read_text()
            assert "train/reward" in logged
        assert len(list(Path("logs").rglob("events.out*"))) == (3 if len(logger or []) == 2 else 0)


def test_the_last_checkpoint_is_the_end_of_the_last_fit(run: Path) -> None:
    last = run / "checkpoints/last.ckpt"
    others = {p.name: p.read_bytes() for p in last.parent.iterdir() if p != last}
    command("fit", ckpt_path=str(last), trainer__max_epochs=2, checkpoint__every_n_epochs=2)
    assert not list(last.parent.glob("last-*"))
    assert checkpoint("run")["lit_rlft"]["num_rounds"] == 4
    for name, content in others.items():
        assert (last.parent / name).read_bytes() == content


def test_the_newest_of_several_last_checkpoints_is_taken(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = run / "checkpoints/last.ckpt"
    newer = shutil.copy(last, last.with_name("last-v1.ckpt"))  # as 0.2.0 named it
    os.utime(last, (1, 1))
    command("validate")
    assert f"checkpoint: {newer}" in capsys.readouterr().out


def test_checkpoints_elsewhere_are_found_and_not_overwritten(run: Path) -> None:
    before = weights("run")
    (run / "checkpoints").rename("kept")
    with pytest.raises(SystemExit, match=r"checkpoint.dirpath kept already holds a run"):
        command("fit", name="other", checkpoint__dirpath="kept")
    command("validate", checkpoint__dirpath="kept")
    after = torch.load("kept/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(before[name], after[name]) for name in before)
