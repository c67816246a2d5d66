"""Workers that hold a reward: a process or a thread that answers calls one after the other."""

import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.reward import Reward
from lit_rlft.kit.offloaded import Offloaded
from lit_rlft.loop.side.call import Answer, Call, answer

__all__ = ["Hangs", "Lost", "SideProcess", "SideThread", "Worker", "packed", "serve"]

_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from lit_rlft.loop.side.worker import serve
serve(*map(int, sys.argv[2:]))
"""
"""What a side process runs: `multiprocessing` would run the main script once more."""

_ASKED = "samples and conditions"


class Lost(Exception):
    """A worker is gone; the message is how."""


class Hangs(Lost):
    """A worker did not answer in time and was given up."""


class Worker(ABC):
    """Holds a reward and answers calls."""

    @abstractmethod
    def ask(self, call: Call, timeout: float) -> Answer:
        """Return the answer to a call.

        Args:
            call: The question.
            timeout: Seconds that it may take.

        Raises:
            Lost: There is no answer, and never will be; make another worker.
            Exception: The reward's own error.
        """

    @abstractmethod
    def stop(self) -> None:
        """End it at once, also in the middle of a call, which is then `Lost`."""


@dataclass(frozen=True)
class _Failure:
    """An error of the reward, as it travels: classes of errors need not be picklable."""

    usage: bool
    name: str
    text: str
    trace: str

    @classmethod
    def of(cls, error: Exception) -> "_Failure":
        """Take an error down."""
        trace = "".join(traceback.format_exception(error))
        return cls(isinstance(error, UsageError), type(error).__name__, str(error), trace)

    def error(self) -> Exception:
        """Return an error to raise in the main process."""
        if self.usage:
            return UsageError(self.text)
        error = RuntimeError(f"{self.name}: {self.text}")
        error.add_note(f"in a side process:\n{self.trace}")
        return error


def packed(reward: Reward) -> bytes:
    """Return a reward as bytes that a side process can read.

    Raises:
        UsageError: It cannot be sent: it holds a function without a name, or is of the main script.
    """
    parts = [*reward.modules()]
    parts += [part for one in parts if isinstance(one, Offloaded) for part in one.reward.modules()]
    if any(type(part).__module__ == "__main__" for part in parts):
        raise _unsendable(reward.name, "a class of the main script; move it to a module")
    with _sending(reward.name):
        return pickle.dumps(reward)


@contextmanager
def _sending(name: str) -> Iterator[None]:
    """Raise UsageError for what cannot be packed, or cannot be read on the other side."""
    try:
        yield
    except Exception as error:  # every class has its own reasons
        raise _unsendable(name, f"{type(error).__name__}: {error}") from error


def _unsendable(name: str, reason: str) -> UsageError:
    return UsageError(
        f"{name} cannot be sent to a side process ({reason}); set "
        "model.init_args.reward_workers.kind to thread"
    )


def _searched() -> list[str]:
    """Return where modules are found; `import` passes over entries that are no text, as a Path."""
    return [entry for entry in sys.path if isinstance(entry, str)]


class SideProcess(Worker):
    """A process of its own, started afresh; it ends when this one does.

    Args:
        name: The reward's.
        reward: As `packed` returns it.
        start_timeout: Seconds until it must be ready.
    """

    def __init__(self, name: str, reward: bytes, start_timeout: float) -> None:
        self._connection, theirs = Pipe()
        # Its other end closes when this process ends, however it does.
        watched, self._alive = os.pipe()
        self._tables: Mapping[str, Tensor] | None = None
        handles = (theirs.fileno(), watched)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(_searched()), *map(str, handles)],
            stdin=subprocess.DEVNULL,
            pass_fds=handles,
            # Ctrl-C reaches all processes of a terminal's group: the main one decides.
            start_new_session=True,
        )
        theirs.close()
        os.close(watched)
        ready = self._exchange(pickle.dumps((_Settings.here(), reward)), start_timeout)
        if isinstance(ready, _Failure):
            self.stop()
            raise _unsendable(name, f"{ready.name}: {ready.text}")

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def ask(self, call: Call, timeout: float) -> Answer:
        tables = call.condition.tables
        new, self._tables = tables is not self._tables, tables
        sent = call.to("cpu", with_tables=new)
        with _sending(_ASKED):
            packed_call = pickle.dumps((new, sent))
        said = self._exchange(packed_call, timeout)
        if isinstance(said, _Failure):
            raise said.error()
        found, warned = said
        for text, kind in warned:
            warnings.warn(text, kind, stacklevel=2)
        assert isinstance(found, Answer)
        return found

    def stop(self) -> None:
        self._kill()
        self._process.wait()
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1

    def _kill(self) -> None:
        """Kill the process and those that it started: it leads a group of its own."""
        if self._process.returncode is None:  # until it is waited for, its number is its own
            self._kill_group()

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # macOS: those that have ended
            os.killpg(self._process.pid, signal.SIGKILL)

    def _exchange(self, sent: bytes, timeout: float) -> Any:
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._kill()

        timer = threading.Timer(timeout, give_up)
        timer.daemon = True
        timer.start()
        try:
            self._connection.send_bytes(sent)
            return pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            if late.is_set():
                raise Hangs(f"gave no answer within {timeout:g} s") from error
            status = self._process.wait()
            self._kill_group()  # those that it started keep its number as their group's
            self.stop()
            raise Lost(f"ended with status {status}") from error
        finally:
            timer.cancel()


@dataclass(frozen=True)
class _Settings:
    """Settings of torch that change how numbers are rounded."""

    num_threads: int
    matmul_precision: str
    convolutions_tf32: bool
    deterministic: bool

    @classmethod
    def here(cls) -> "_Settings":
        """Return those of this process."""
        return cls(
            torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
            torch.backends.cudnn.allow_tf32,
            torch.are_deterministic_algorithms_enabled(),
        )

    def apply(self) -> None:
        """Take them on."""
        torch.set_num_threads(self.num_threads)
        torch.set_float32_matmul_precision(self.matmul_precision)
        torch.backends.cudnn.allow_tf32 = self.convolutions_tf32
        torch.use_deterministic_algorithms(self.deterministic)


def serve(calls: int, watched: int) -> None:
    """Answer calls until the main process is gone.

    Args:
        calls: Handle of the connection.
        watched: Handle of a pipe whose other end the main process holds.
    """
    connection: Connection[Any, Any] = Connection(calls)
    threading.Thread(target=_end_with, args=(watched,), daemon=True).start()
    with suppress(EOFError, OSError):
        settings, sent = pickle.loads(connection.recv_bytes())
        settings.apply()
        try:
            reward = pickle.loads(sent)
        except Exception as error:
            connection.send_bytes(pickle.dumps(_Failure.of(error)))
            return
        connection.send_bytes(pickle.dumps("ready"))
        tables: Mapping[str, Tensor] = {}
        warned: list[tuple[str, type[Warning]]] = []
        warnings.showwarning = lambda text, kind, *_, **__: warned.append((str(text), kind))
        while True:
            received = connection.recv_bytes()
            try:
                with _sending(_ASKED):  # classes of the main script are found only there
                    new, call = pickle.loads(received)
            except UsageError as error:
                connection.send_bytes(pickle.dumps(_Failure.of(error)))
                continue
            tables = call.condition.tables if new else tables
            call = replace(call, condition=replace(call.condition, tables=tables))
            torch.set_default_dtype(call.surroundings.default_dtype)
            try:
                said = _placed_answer(reward, call), list(warned)
                connection.send_bytes(pickle.dumps(said))
            except (EOFError, OSError):
                raise
            except Exception as error:  # all errors of the reward are its asker's
                connection.send_bytes(pickle.dumps(_Failure.of(error)))
            warned.clear()


def _placed_answer(reward: Reward, call: Call) -> Answer:
    reward.to(call.device)
    if call.dtype is not None:
        reward.to(call.dtype)
    return answer(reward, call)


def _end_with(watched: int) -> None:
    os.read(watched, 1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


class SideThread(Worker):
    """A thread of this process, for rewards that wait more than they compute.

    One that hangs cannot be ended: it is left alone, and does not keep the process from ending.

    Args:
        name: The reward's.
        reward: The reward itself.
    """

    def __init__(self, name: str, reward: Reward) -> None:
        self._asked: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._said: queue.SimpleQueue[Answer | Exception | None] = queue.SimpleQueue()
        self._reward = reward
        threading.Thread(target=self._serve, daemon=True, name=f"reward {name}").start()

    def ask(self, call: Call, timeout: float) -> Answer:
        self._asked.put(call)
        try:
            said = self._said.get(timeout=timeout)
        except queue.Empty:
            raise Hangs(f"gave no answer within {timeout:g} s") from None
        if said is None:
            raise Lost("was stopped")
        if isinstance(said, Exception):
            raise said
        return said

    def stop(self) -> None:
        self._asked.put(None)
        self._said.put(None)

    def _serve(self) -> None:
        while (call := self._asked.get()) is not None:
            try:
                self._said.put(_placed_answer(self._reward, call))
            except Exception as error:  # all errors of the reward are its asker's
                self._said.put(error)
