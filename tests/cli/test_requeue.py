"""Jobs that SLURM starts again: one saved file, and the furthest checkpoint goes on."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback

from lit_rlft.cli import main
from tests.support import TINY_MIXTURE, arguments, checkpoint, report

JOB = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NAME": "fit",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_NODELIST": "127.0.0.1",
    **dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0"),
}
SAVED = Path("runs/run/hpc_ckpt_2.ckpt")
LAST = Path("runs/run/checkpoints/last.ckpt")


class Preempted(Callback):
    """Gets the signal to save and requeue in the second and the third round."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.num_rounds in (1, 2):
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.fixture(autouse=True)
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/asked\n")
    program.chmod(0o755)
    for name, value in {**JOB, "PATH": f"{program.parent}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)


def command(stage: str, *words: str, **settings: Any) -> None:
    more = {key.replace("__", "."): value for key, value in settings.items()}
    main([*arguments(stage, ("gaussian_mixture", "p_graft"), TINY_MIXTURE, more), *words])


def rounds_of(file: Path) -> int:
    return int(checkpoint(file=os.path.relpath(file, LAST.parent))["lit_rlft"]["num_rounds"])


def test_a_requeued_fit_goes_on_from_the_furthest_checkpoint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command("fit", f"--trainer.callbacks+={__name__}.Preempted", trainer__max_epochs=2)
    assert Path("asked").read_text().splitlines() == ["requeue 12"] * 2
    assert list(SAVED.parent.glob("hpc_ckpt_*")) == [SAVED]
    assert (rounds_of(SAVED), rounds_of(LAST)) == (3, 4)

    command("fit", trainer__max_epochs=3)
    assert f"checkpoint: {LAST}" in capsys.readouterr().out
    assert rounds_of(LAST) == 6
    older = SAVED.read_bytes()
    SAVED.write_bytes(LAST.read_bytes())
    LAST.write_bytes(older)  # the file of the requeue is the further one
    command("fit", trainer__max_epochs=3)
    assert f"checkpoint: {SAVED}" in capsys.readouterr().out


def test_a_test_of_the_untuned_model_takes_no_file_of_a_requeue() -> None:
    command("fit", f"--trainer.callbacks+={__name__}.Preempted", trainer__max_epochs=2)
    command("test", ckpt_path="none")
    found = report()
    assert found["checkpoint"] is None and found["tuned"] == found["reference"]


def test_a_job_that_was_killed_without_a_signal_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command("fit")
    with pytest.raises(SystemExit, match=f"resume it with --ckpt_path {LAST}"):
        command("fit", trainer__max_epochs=2)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    command("fit", trainer__max_epochs=2)
    assert f"checkpoint: {LAST}" in capsys.readouterr().out
    assert rounds_of(LAST) == 4
    command("fit", name="new")  # requeued before its first checkpoint
    assert checkpoint("new")["lit_rlft"]["num_rounds"] == 2


def test_a_job_that_began_from_another_runs_file_goes_on_from_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command("fit")
    command("fit", trainer__max_epochs=2, name="second", ckpt_path=str(LAST))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    capsys.readouterr()
    command("fit", trainer__max_epochs=3, name="second", ckpt_path=str(LAST))
    assert "checkpoint: runs/second/checkpoints/last.ckpt" in capsys.readouterr().out
    assert checkpoint("second")["lit_rlft"]["num_rounds"] == 6
    command("fit", trainer__max_epochs=3, name="third", ckpt_path=str(LAST))
    assert "checkpoint: " not in capsys.readouterr().out
