"""Processes of torchrun and srun agree before they are a process group."""

import os
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch

from lit_rlft.core.checks import UsageError
from lit_rlft.runs.agreement import agreed
from tests.crash.harness import fork, free_port, wait


def place(launcher: str, rank: int, size: int, port: int) -> dict[str, str]:
    """Return the variables by which a launcher tells a process its place."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if launcher == "torchrun":
        named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "GROUP_RANK": 0}
        return meeting | {k: str(v) for k, v in named.items()} | {"TORCHELASTIC_RUN_ID": "none"}
    named = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": size, "SLURM_NODEID": 0}
    named["SLURM_NTASKS_PER_NODE"] = size
    more = {"SLURM_JOB_ID": "1234", "SLURM_JOB_NAME": "fit", "SLURM_NODELIST": "127.0.0.1"}
    return meeting | more | {k: str(v) for k, v in named.items()}


def answers(folder: Path, launcher: str, size: int, *, refuse: bool = False) -> list[str]:
    """Return what processes hear in two questions; each would choose its own number."""
    port = free_port()

    def ask(rank: int) -> None:
        os.environ |= place(launcher, rank, size, port)

        def choose() -> str:
            time.sleep(0.2)
            if refuse:
                raise UsageError("the folder already holds a run")
            return f"{launcher}-{rank}"

        try:
            heard = agreed(choose) + agreed(lambda: f"again-{rank}")
            if launcher == "torchrun":  # the group meets at the same place
                torch.distributed.init_process_group("gloo")
                torch.distributed.barrier()
        except UsageError as error:
            heard = str(error)
        (folder / str(rank)).write_text(heard)

    children = [fork(partial(ask, rank), folder / "log") for rank in reversed(range(size))]
    assert wait(children) == 0, (folder / "log").read_text()
    return [(folder / str(rank)).read_text() for rank in range(size)]


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
@pytest.mark.parametrize("size", [1, 3])
def test_the_first_process_chooses_for_all(tmp_path: Path, launcher: str, size: int) -> None:
    assert answers(tmp_path, launcher, size) == [f"{launcher}-0again-0"] * size


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_all_end_with_the_first_ones_sentence(tmp_path: Path, launcher: str) -> None:
    sentences = answers(tmp_path, launcher, 3, refuse=True)
    assert sentences == ["the folder already holds a run"] * 3


def test_processes_that_never_come_are_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in place("torchrun", 0, 3, free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("lit_rlft.runs.agreement._PATIENCE", timedelta(seconds=0.2))
    with pytest.raises(UsageError, match="1 of 3 processes have come; start all of them"):
        agreed(lambda: "own")


def test_alone_it_is_what_is_chosen() -> None:
    assert agreed(lambda: "own") == "own"
