"""How a run shows its progress: bars on a terminal, a line a round in a log."""

import sys

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from tqdm import tqdm

from lit_rlft.callbacks.facts import RoundLines

__all__ = ["Bars", "progress"]


class Bars(TQDMProgressBar):
    """Progress bars that let an error begin on a line of its own."""

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close all bars, the inner ones first."""
        for bar in sorted(tqdm._instances, key=lambda bar: bar.pos):
            bar.close()


def progress(callbacks: list[Callback], enabled: bool | None) -> tuple[list[Callback], bool]:
    """Return the callbacks that show progress, and whether the trainer may show bars.

    Args:
        callbacks: The user's, one of which may be a bar.
        enabled: The trainer's `enable_progress_bar`; None shows bars on a terminal alone.
    """
    if enabled is False:
        return [], False
    if any(isinstance(callback, ProgressBar) for callback in callbacks):
        return [], True
    if enabled or sys.stderr.isatty():
        # Lightning prefers rich where it is installed, whose live display fights nested bars.
        return [Bars()], True
    return [RoundLines()], False
