"""Signals that end a fit: noted when they come, obeyed between two rounds."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_rlft.callbacks.facts import say

__all__ = ["Signals", "Stopped", "ended_by_signals"]

Handler = Callable[[int, FrameType | None], Any]


class Stopped(SystemExit):
    """A signal ended the run; the exit status is the shell's, 128 and the signal's number.

    Processes that Lightning started end with 0: it kills the first one where any of them fails.

    Args:
        number: The signal's.
        trainer: Of the run.
    """

    def __init__(self, number: int, trainer: Trainer) -> None:
        self.signal = signal.Signals(number)
        environment = trainer._accelerator_connector.cluster_environment
        child = isinstance(environment, LightningEnvironment) and trainer.global_rank > 0
        super().__init__(0 if child else 128 + number)


class Signals:
    """Takes SIGTERM and SIGINT, which ask a fit to end, and SLURM's signal to save and requeue.

    In the middle of a round the weights and the counters do not belong together. What a signal
    asks for waits until the round is finished; a second SIGINT ends the run at once.
    Lightning's handlers, whose place these take, are back when the fit is over.
    """

    def __init__(self) -> None:
        self.stop = self.requeue = 0
        self._saves = True
        self._requeue: Handler | None = None

    def install(self, trainer: Trainer, saves: bool) -> None:
        """Take the place of Lightning's handlers, which it has set by then.

        Args:
            trainer: Of the fit.
            saves: Whether a fit that ends is saved, which is said.
        """
        self.stop, self.requeue, self._saves = 0, 0, saves
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._asked_to_stop)
        environment = trainer._accelerator_connector.cluster_environment
        if not isinstance(environment, SLURMEnvironment) or environment.requeue_signal is None:
            return
        previous = signal.getsignal(environment.requeue_signal)
        if environment.auto_requeue and callable(previous):
            self._requeue = previous
            signal.signal(environment.requeue_signal, self._asked_to_requeue)

    def end_at_once(self, trainer: Trainer) -> None:
        """Let SIGTERM end a command that has nothing to save, in all its processes."""

        def end(number: int, frame: FrameType | None) -> None:
            signal.signal(number, signal.SIG_IGN)
            if trainer.strategy.launcher is not None:
                trainer.strategy.launcher.kill(number)
            raise Stopped(number, trainer)

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, end)

    def agree(self, trainer: Trainer, due: bool) -> bool:
        """Let all processes know the signals of each; return whether the first one's save is due.

        Args:
            trainer: Of the fit.
            due: Whether a save is due by this process's clock.
        """
        if trainer.world_size == 1:
            return due
        first = due and trainer.is_global_zero
        asked = [int(first), self.stop, self.requeue]
        values = torch.tensor(asked, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        decided, self.stop, self.requeue = values.tolist()
        return bool(decided)

    def obey_requeue(self, trainer: Trainer) -> None:
        """Let Lightning save for SLURM and requeue the job, if that was asked for.

        What it saved for earlier requeues is deleted: one file is left, however often they come.
        """
        number, self.requeue = self.requeue, 0
        if number and self._requeue is not None:
            earlier = list(Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"))
            self._requeue(number, None)
            for path in earlier if trainer.is_global_zero else ():
                path.unlink(missing_ok=True)

    def _asked_to_stop(self, number: int, frame: FrameType | None) -> None:
        again, self.stop = self.stop, number
        if again == signal.SIGINT == number:
            raise KeyboardInterrupt
        if not again:
            with suppress(RuntimeError, OSError):  # it interrupted printing, or the disk is full
                more = "; once more stops at once" if number == signal.SIGINT else ""
                name = signal.Signals(number).name
                what = "is saved and ends" if self._saves else "ends"
                say(f"{name}: the run {what} after this round{more}")

    def _asked_to_requeue(self, number: int, frame: FrameType | None) -> None:
        self.requeue = number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Give a command that SIGINT or SIGTERM ends the exit status of the shell, 130 or 143.

    Raises:
        SystemExit: Wherever the signal came, also while the model was loaded.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except SIGTERMException:
        raise SystemExit(128 + signal.SIGTERM) from None
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning's exit with status 1
            raise SystemExit(128 + signal.SIGINT) from None
        raise
