"""Logs what a test measured, so that `trainer.test` returns it."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

__all__ = ["LoggedTest"]

_TESTED = {"tuned": "test", "reference": "test_reference", "gain": "test_gain"}
"""Names of the log by arm."""


class LoggedTest(Callback):
    """Logs the means of a test: test/ of the tuned model, test_reference/ and test_gain/."""

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means, for which all processes are needed."""
        tuner: Any = pl_module
        summary = tuner.evaluator.known or tuner.evaluator.summary()
        for arm, prefix in _TESTED.items():
            for name, values in summary[arm].items():
                tuner.log(f"{prefix}/{name}", values["mean"], sync_dist=True)
