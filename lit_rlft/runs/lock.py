"""A lock in a run's folder: two fits never write to it at the same time."""

import json
import os
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import psutil

from lit_rlft.core.checks import UsageError, from_json

__all__ = ["LOCK", "RunLock"]

LOCK = "run.lock"
"""Its name in the folder."""
_TRIES, _PAUSE = 100, 0.05
_WRITTEN_WITHIN = 2.0
"""Seconds; a lock that cannot be read is a damaged one after that."""


class RunLock:
    """Says in a file which process writes to a folder.

    The file appears under its name whole or not at all, by a hard link, on network file systems
    too. A run that was killed leaves it behind: the next one notices that the process is gone, or
    that another process has its number now, and takes over.

    Args:
        folder: The run's, or another that it writes to, which exists.
        setting: What chooses the folder, for the sentence of a refusal.
    """

    def __init__(self, folder: Path, setting: str = "--name") -> None:
        self.path, self.setting = folder / LOCK, setting
        self._own: dict[str, Any] | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UsageError: Another process holds it, or may do so on another machine.
        """
        own = {**_identity(os.getpid()), "key": uuid.uuid4().hex}
        own["since"] = time.strftime("%Y-%m-%d %H:%M:%S")
        for _ in range(_TRIES):
            if self._create(self.path, own):
                self._own = own
                return
            held = _read(self.path)
            if held is not None and (reason := _alive(held)):
                raise UsageError(_refusal(self.path, held, reason, self.setting))
            if (held is not None or _is_old(self.path)) and self._take_over(held, own):
                self._own = own
                return
            time.sleep(_PAUSE)
        raise UsageError(f"{self.path} cannot be taken; delete it if no other fit writes there")

    def release(self) -> None:
        """Give the lock back, where this very process holds it."""
        own, self._own = self._own, None
        if own is not None and own["pid"] == os.getpid() and _read(self.path) == own:
            self.path.unlink(missing_ok=True)

    def _create(self, path: Path, own: dict[str, Any]) -> bool:
        """Write a file that says who made it; return False where there is one."""
        draft = self._draft(own)
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        except OSError:  # no hard links here
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(json.dumps(own))
            except FileExistsError:
                return False
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _take_over(self, stale: dict[str, Any] | None, own: dict[str, Any]) -> bool:
        """Put an own lock in a stale one's place, as the only one of those who try."""
        name = "damaged" if stale is None else stale.get("key")
        heir = self.path.with_name(f".{LOCK}-after-{name}")
        if not self._create(heir, own):
            other = _read(heir)
            if other is None or not _alive(other):  # killed within these lines
                heir.unlink(missing_ok=True)
            return False
        try:
            if _read(self.path) != stale or not self.path.exists():
                return False
            self._draft(own).replace(self.path)
            return True
        finally:
            heir.unlink(missing_ok=True)

    def _draft(self, own: dict[str, Any]) -> Path:
        draft = self.path.with_name(f".{LOCK}-{own['key']}")
        draft.write_text(json.dumps(own), encoding="utf-8")
        return draft


def _identity(pid: int) -> dict[str, Any]:
    """Return what tells a process from all others, also of other machines and later ones."""
    return {
        "pid": pid,
        "host": socket.gethostname(),
        "boot": _boot(),
        "process_start": _process_start(pid),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": _restarts(),
    }


def _alive(held: dict[str, Any]) -> str:
    """Return why the holder of a lock may be at work, "" where it is not."""
    job = os.environ.get("SLURM_JOB_ID")
    own = held.get("host") == socket.gethostname()
    again = held.get("restarts") != _restarts()
    if job is not None and job == held.get("job") and again and not own:
        return ""  # the same job, started anew on another machine
    if not own:
        return "elsewhere"
    pid = held.get("pid")
    if not isinstance(pid, int) or held.get("boot") != _boot() or not psutil.pid_exists(pid):
        return ""
    return "here" if held.get("process_start") == _process_start(pid) else ""


def _refusal(path: Path, held: dict[str, Any], reason: str, setting: str) -> str:
    who = f"process {held.get('pid')} on {held.get('host')}, since {held.get('since')}"
    if reason == "here":
        return (
            f"another fit writes to {path.parent} ({who}); choose another {setting} or wait for it"
        )
    return (
        f"another fit may be writing to {path.parent} ({who}); choose another {setting}, or "
        f"delete {path} if that process has ended"
    )


def _read(path: Path) -> dict[str, Any] | None:
    try:
        held = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return held if isinstance(held, dict) else None


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _WRITTEN_WITHIN
    except OSError:
        return False


def _restarts() -> str:
    """Return how often SLURM has started this job again."""
    return os.environ.get("SLURM_RESTART_COUNT", "0")


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _process_start(pid: int) -> str | None:
    """Return when a process started, in the kernel's ticks on Linux; None where nobody can tell.

    A process that has ended and waits for its parent to notice has the state Z.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _process_start_elsewhere(pid)
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def _process_start_elsewhere(pid: int) -> str | None:
    """Return when a process started, in seconds, where there is no /proc."""
    try:
        process = psutil.Process(pid)
        ended = process.status() == psutil.STATUS_ZOMBIE
        return None if ended else str(process.create_time())
    except psutil.Error:
        return None
