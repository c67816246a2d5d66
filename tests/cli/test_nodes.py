"""Two nodes of one process each, started by torchrun or srun, on this machine: as one process."""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from lit_rlft.cli import main
from tests.cli.test_world_size import QUICK, Record, assert_trained_alike, words
from tests.crash.harness import fork, free_port, wait
from tests.support import ROOT, working_directory

__all__ = ["Record"]

TWO_NODES = {"trainer.devices": 1, "trainer.num_nodes": 2, "trainer.strategy": "ddp", "name": "2"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path) -> Iterator[None]:
    """Run from an empty folder."""
    with working_directory(tmp_path):
        yield


def place(launcher: str, node: int, port: int) -> dict[str, str]:
    """Return what a launcher tells the one process of a node."""
    told: dict[str, object] = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if launcher == "torchrun":
        told |= {"RANK": node, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "GROUP_RANK": node}
        told |= {"LOCAL_WORLD_SIZE": 1, "TORCHELASTIC_RUN_ID": "none"}
    else:
        told |= {"SLURM_PROCID": node, "SLURM_LOCALID": 0, "SLURM_NTASKS": 2, "SLURM_NNODES": 2}
        told |= {"SLURM_NODEID": node, "SLURM_NTASKS_PER_NODE": 1, "SLURM_JOB_ID": 7}
        told |= {"SLURM_JOB_NAME": "fit", "SLURM_NODELIST": "127.0.0.1"}
    return {name: str(value) for name, value in told.items()}


def fit_on_two_nodes(launcher: str) -> None:
    port, log = free_port(), Path("log").absolute()

    def work(node: int) -> None:
        os.environ |= place(launcher, node, port)
        main(words("fit", QUICK, 2, TWO_NODES))

    children = [fork(partial(work, node), log) for node in (0, 1)]
    assert wait(children) == 0, log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_two_nodes_train_like_one_process(launcher: str) -> None:
    main(words("fit", QUICK, 1))
    fit_on_two_nodes(launcher)
    assert_trained_alike(2)


@pytest.mark.slow
def test_the_command_of_the_documentation_starts_two_nodes() -> None:
    main(words("fit", QUICK, 1))
    port = free_port()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    nodes = []
    for node in (0, 1):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        launcher += [f"--node_rank={node}", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
        launcher += [f"--master_port={port}", "-m", "lit_rlft.cli"]
        command = [*launcher, *words("fit", QUICK, 2, TWO_NODES)]
        nodes.append(
            subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    said = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "".join(said)
    assert_trained_alike(2)
