"""One answer for all processes that a launcher started, before they are a process group."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from lit_rlft.core.checks import UsageError

__all__ = ["agreed", "is_first"]

_PATIENCE = timedelta(minutes=10)
_FAREWELL = 60.0
"""Seconds that the first process waits for the others to hear that it gives up."""
_ERROR, _GOOD = "error:", "good:"
_numbers = count()


def agreed(choose: Callable[[], str]) -> str:
    """Return what the first process chooses, in all that torchrun or srun started.

    The processes meet where their process group will: at MASTER_ADDR and MASTER_PORT, whose store
    torchrun already runs. Elsewhere the first process opens it, and the group shares it later.
    Alone, and in processes that Lightning starts, it is what `choose` returns.

    Args:
        choose: Called in the first process alone.

    Raises:
        UsageError: The first process raised it, or cannot be reached.
    """
    launched = _launcher()
    if launched is None or launched.world_size() == 1:
        return choose()
    rank, size = launched.global_rank(), launched.world_size()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"lit_rlft/{attempt}/{next(_numbers)}"
    store = _store(launched.main_address, launched.main_port, rank == 0)
    if rank == 0:
        return _choose(store, key, choose, size)
    try:
        answer = store.get(key).decode()
    except RuntimeError as error:
        raise UsageError(
            f"process {rank} has not heard from the first one at {launched.main_address}:"
            f"{launched.main_port}; see its output"
        ) from error
    with suppress(RuntimeError):  # the first process may be gone, having failed
        store.add(f"{key}/heard", 1)
    if answer.startswith(_ERROR):
        raise UsageError(answer.removeprefix(_ERROR))
    return answer.removeprefix(_GOOD)


def is_first() -> bool:
    """Return whether this is the process that makes the folder of a run."""
    launched = _launcher()
    if launched is not None:
        return launched.global_rank() == 0
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("NODE_RANK", "0") == "0"


def _choose(store: Any, key: str, choose: Callable[[], str], size: int) -> str:
    """Choose, and stay until all have heard: the store may end with this process."""
    try:
        answer = choose()
    except Exception as error:
        store.set(key, f"{_ERROR}{error}")
        _wait(store, key, size, _FAREWELL)
        raise
    store.set(key, f"{_GOOD}{answer}")
    heard = _wait(store, key, size, _PATIENCE.total_seconds())
    if heard < size:
        raise UsageError(
            f"{heard} of {size} processes have come; start all of them, with torchrun or srun"
        )
    return answer


def _wait(store: Any, key: str, size: int, seconds: float) -> int:
    """Wait until all processes have heard; return how many have, with this one."""
    end = time.monotonic() + seconds
    heard = 1
    with suppress(RuntimeError):
        while (heard := 1 + store.add(f"{key}/heard", 0)) < size and time.monotonic() < end:
            time.sleep(0.05)
    return heard


def _launcher() -> ClusterEnvironment | None:
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    try:
        return SLURMEnvironment() if SLURMEnvironment.detect() else None
    except RuntimeError as error:  # it says which setting of the batch script is at fault
        raise UsageError(" ".join(str(error).split())) from error


@cache
def _store(address: str, port: int, first: bool) -> Any:
    """Return a client of the store; kept open, for the process group meets there too."""
    opens = first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    settings: dict[str, Any] = {"wait_for_workers": False, "multi_tenant": True}
    try:
        return vars(torch.distributed)["TCPStore"](
            address, port, is_master=opens, timeout=_PATIENCE, **settings
        )
    except RuntimeError as error:
        raise UsageError(
            f"the first process cannot be reached at {address}:{port} ({error}); set MASTER_ADDR "
            "and MASTER_PORT to a free port of its machine"
        ) from error
