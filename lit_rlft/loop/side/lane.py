"""A worker that is replaced when it is lost, with a thread that watches over it."""

import queue
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from lit_rlft.core.checks import UsageError
from lit_rlft.loop.side.call import Answer, Call
from lit_rlft.loop.side.worker import Hangs, Lost, Worker

__all__ = ["Lane"]


class _Asked(NamedTuple):
    call: Call
    answer: "Future[Answer | None]"


class Lane:
    """Asks a worker one call after the other, in order, beside the main thread.

    A worker that dies is made again and asked once more. What it dies of twice, and what it does
    not answer in time, has no answer: None.

    Args:
        name: The reward's.
        make: Makes a worker.
        timeout: Seconds that a call may take.
        restarts: How often a worker may be made again.

    Attributes:
        worker: The worker of this moment; None before there is one.
        num_restarts: How often a worker was made again.
    """

    def __init__(
        self, name: str, make: Callable[[], Worker], *, timeout: float, restarts: int
    ) -> None:
        self.name, self.timeout, self.restarts = name, timeout, restarts
        self.num_restarts = 0
        self.worker: Worker | None = None
        self._make = make
        self._stopped, self._lock = False, threading.Lock()
        self._queue: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name=f"lane {name}").start()

    def submit(self, call: Call) -> "Future[Answer | None]":
        """Return the answer to come: None where there will be none."""
        asked = _Asked(call, Future())
        self._queue.put(asked)
        return asked.answer

    def stop(self) -> None:
        """End the worker at once, and everything that waits for it."""
        with self._lock:
            self._stopped = True
            worker = self.worker
        self._queue.put(None)
        if worker is not None:
            worker.stop()

    def _run(self) -> None:
        try:
            self._ready()
        except Exception:  # the first call meets it again and says it
            self.worker = None
        while (asked := self._queue.get()) is not None:
            if self._stopped:
                asked.answer.cancel()
                continue
            try:
                asked.answer.set_result(self._ask(asked.call))
            except Exception as error:
                asked.answer.set_exception(error)

    def _ask(self, call: Call) -> Answer | None:
        for attempt in range(2):
            try:
                return self._ready().ask(call, self.timeout)
            except Lost as loss:
                again = attempt == 0 and not isinstance(loss, Hangs)
                self._lose(loss, len(call.condition), again=again)
                if not again:
                    return None
        raise AssertionError

    def _ready(self) -> Worker:
        if self.worker is None:
            worker = self._make()
            with self._lock:
                self.worker = worker
                stopped = self._stopped
            if stopped:
                worker.stop()
                raise Lost("was stopped")
        return self.worker

    def _lose(self, loss: Lost, num_samples: int, *, again: bool) -> None:
        """Give a worker up, and say so; raise UsageError where that was one too many."""
        if self.worker is not None:
            self.worker.stop()
            self.worker = None
        if self._stopped:
            return
        self.num_restarts += 1
        what = f"the side worker of {self.name} {loss}"
        if self.num_restarts > self.restarts:
            raise UsageError(
                f"{what}, and was started again {self.restarts} times already; fix the reward, or "
                "set model.init_args.reward_workers to null to see it fail in this process"
            ) from loss
        fate = "are scored once more" if again else "are left out"
        warnings.warn(
            f"{what}; {num_samples} samples {fate}, and it is started again "
            f"({self.num_restarts} of {self.restarts} times)",
            stacklevel=2,
        )
