"""Worker processes that end with the one that started them."""

import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import multiprocessing, os, signal
from domains.molecule.chemistry.workers import in_workers
assert list(in_workers(abs, [-1, -2, -3], 2)) == [1, 2, 3]
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_worker_outlives_a_process_that_was_killed(tmp_path: Path) -> None:
    said = tmp_path / "workers"  # no pipe, which they would hold open
    with said.open("w") as file:
        subprocess.run([sys.executable, "-c", PROGRAM], stdout=file, timeout=120)
    workers = [Path("/proc", number, "stat") for number in said.read_text().split()]
    assert len(workers) == 2
    end = time.monotonic() + 20
    while any(map(_alive, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(_alive, workers))


def _alive(status: Path) -> bool:
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
