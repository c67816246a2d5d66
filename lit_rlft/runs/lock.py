"""A lock in a run's folder: two fits never write to it at the same time."""

import contextlib
import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

from lit_rlft.core.checks import UsageError

__all__ = ["LOCK", "RunLock"]

LOCK = "run.lock"
"""Its name in the folder."""


class RunLock:
    """Says in a file which process writes to a folder.

    The file appears under its name whole or not at all, by a hard link, on network file systems
    too. A run that was killed leaves it behind: the next one notices that the process is gone, or
    that another process has its number now, and takes over.

    Args:
        folder: The run's, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._own: dict[str, Any] | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UsageError: Another process holds it, or may do so on another machine.
        """
        own = {**_identity(os.getpid()), "key": uuid.uuid4().hex}
        own["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
        for _ in range(100):
            if self._create(own):
                self._own = own
                return
            held = _read(self.path)
            if held is not None and (reason := _alive(held)):
                raise UsageError(_refusal(self.path, held, reason))
            self._remove(held)
        raise UsageError(f"{self.path} cannot be taken; delete it if no other fit writes there")

    def release(self) -> None:
        """Give the lock back, where this very process holds it."""
        own, self._own = self._own, None
        if own is not None and own["pid"] == os.getpid() and _read(self.path) == own:
            self.path.unlink(missing_ok=True)

    def _create(self, own: dict[str, Any]) -> bool:
        """Write the file; return False where there is one."""
        text = json.dumps(own)
        draft = self.path.with_name(f".{LOCK}-{own['key']}")
        try:
            draft.write_text(text)
            try:
                os.link(draft, self.path)
            except FileExistsError:
                return False
            except OSError:  # no hard links here
                return self._create_exclusively(text)
            return True
        finally:
            draft.unlink(missing_ok=True)

    def _create_exclusively(self, text: str) -> bool:
        try:
            with self.path.open("x") as file:
                file.write(text)
        except FileExistsError:
            return False
        return True

    def _remove(self, stale: dict[str, Any] | None) -> None:
        """Remove a stale lock, and no other that has just taken its place."""
        aside = self.path.with_name(f".{LOCK}-{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            self.path.replace(aside)
            if _read(aside) != stale:
                with contextlib.suppress(OSError):
                    os.link(aside, self.path)
            aside.unlink(missing_ok=True)


def _identity(pid: int) -> dict[str, Any]:
    """Return what tells a process from all others, also of other machines and later ones."""
    return {
        "pid": pid,
        "host": socket.gethostname(),
        "boot": _boot(),
        "process_start": _process_start(pid),
        "job": os.environ.get("SLURM_JOB_ID"),
    }


def _alive(held: dict[str, Any]) -> str:
    """Return why the holder of a lock may be at work, "" where it is not."""
    job = os.environ.get("SLURM_JOB_ID")
    own = held.get("host") == socket.gethostname()
    if job is not None and job == held.get("job") and not own:
        return ""  # the same job, started anew on another machine
    if not own:
        return "elsewhere"
    pid = held.get("pid")
    if not isinstance(pid, int) or held.get("boot") != _boot():
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass  # another user's, alive
    return "here" if held.get("process_start") == _process_start(pid) else ""


def _refusal(path: Path, held: dict[str, Any], reason: str) -> str:
    who = f"process {held.get('pid')} on {held.get('host')}, since {held.get('since')}"
    if reason == "here":
        return f"another fit writes to {path.parent} ({who}); choose another --name or wait for it"
    return (
        f"another fit may be writing to {path.parent} ({who}); choose another --name, or delete "
        f"{path} if that process has ended"
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        held = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) else None


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _process_start(pid: int) -> str | None:
    """Return when a process started, in the kernel's ticks; None where nobody can tell.

    A process that has ended and waits for its parent to notice has the state Z.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
