"""TensorBoard's charts: tuned beside reference, and validations over samples and reward calls."""

import re

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.callbacks.logged import log_text
from lit_rlft.evaluation.exploitation import guards_of
from lit_rlft.runs.folder import summary_writer
from lit_rlft.runs.warned import Heard

__all__ = ["Charts"]

_AXES = ("samples", "reward_calls")


class Charts(Callback):
    """Lays out TensorBoard's page "Custom scalars", and tells it what its other pages lack.

    A chart per measurement has the tuned model's curve and the reference's; those of the reward and
    of what tells that it is exploited come first. Measurements of validations are also written over
    samples and over reward calls, as `val_by_reward_calls/<name>`. Warnings of the run are texts.
    """

    def __init__(self) -> None:
        self._laid_out, self._told = False, 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Tell what was warned of before and between rounds."""
        self._tell(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the validation over samples and reward calls, and lay out the charts once."""
        assert isinstance(pl_module, RewardFineTuner)
        writer = summary_writer(pl_module)
        if writer is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        latest = pl_module.evaluator.latest
        spent = pl_module.meter.spent(pl_module.num_samples)
        for arm, end in (("tuned", ""), ("reference", "_reference")):
            for name, moments in latest[arm].items():
                for axis in _AXES:
                    writer.add_scalar(f"val{end}_by_{axis}/{name}", moments["mean"], spent[axis])
        if self._laid_out:
            return
        self._laid_out = True
        names, reward = list(latest["tuned"]), pl_module.reward.name
        guards = [name for name in guards_of(pl_module.reward, pl_module.metrics) if name in names]
        watched = [reward, *(["kl"] if "kl" in names else []), *guards]
        writer.add_custom_scalars(
            {
                "exploitation": _charts(watched),
                "tuned and reference": _charts([name for name in names if name not in watched]),
            }
        )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell what was warned of last."""
        self._tell(pl_module)

    on_test_end = on_fit_end

    def _tell(self, module: LightningModule) -> None:
        heard = Heard.latest
        new = [] if heard is None else heard.messages[self._told :]
        if new:
            assert isinstance(module, RewardFineTuner)
            self._told += len(new)
            log_text(module, "warnings", new, module.num_updates)


def _charts(names: list[str]) -> dict[str, list[str | list[str]]]:
    """Return a chart of each measurement, with the curves of both models."""
    return {name: ["Multiline", [f"^val(_reference)?/{re.escape(name)}$"]] for name in names}
