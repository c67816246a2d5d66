"""What a run does with the workers of its rewards: starts them, reports them, ends them."""

from typing import Any

from lightning import LightningModule, Trainer

from lit_rlft.core.reward import Reward
from lit_rlft.kit.weightless import weightless
from lit_rlft.loop.hooks import Hooks
from lit_rlft.loop.side.rewards import RewardWorkers, SideReward, SideTimes, side_rewards

__all__ = ["SideWatch", "beside"]


def beside(reward: Reward, workers: RewardWorkers | None, trainer: Trainer | None) -> Reward:
    """Return a reward whose workers are started, if it is to have any and there is a run.

    Args:
        reward: Changed in place where it is a combined one.
        workers: The setting; None for no workers.
        trainer: Of the run; None where there is none.
    """
    if workers is None or trainer is None or weightless():
        return reward
    return workers.beside(reward, trainer.global_rank)


class SideWatch(Hooks):
    """Logs what workers of rewards took of a round's time, and leaves no worker behind.

    `time/reward_waited` is how long sampling stood still for rewards, `time/reward_hidden` how much
    more time workers spent on rewards than that. Both are of this process and its workers.
    """

    def __init__(self) -> None:
        self._before = SideTimes()
        self._module: LightningModule | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember whose rewards they are; the module gives them workers after this."""
        self._module = pl_module

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the times before this round."""
        self._before = self._times()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the round's."""
        now, before = self._times(), self._before
        spent = SideTimes(now.busy - before.busy, now.waited - before.waited)
        pl_module.log("time/reward_waited", spent.waited)
        pl_module.log("time/reward_hidden", spent.hidden)

    def report(self) -> dict[str, Any]:
        """Return the seconds and the restarts so far, for metrics.json."""
        times = self._times()
        restarts = sum(side.num_restarts for side in self._sides)
        return {
            "reward_workers": {
                "busy_seconds": times.busy,
                "waited_seconds": times.waited,
                "restarts": restarts,
            }
        }

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """End the workers."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the workers."""
        self._stop()

    @property
    def _sides(self) -> list[SideReward]:
        reward = getattr(self._module, "reward", None)
        return side_rewards(reward) if isinstance(reward, Reward) else []

    def _stop(self) -> None:
        for side in self._sides:
            side.stop()

    def _times(self) -> SideTimes:
        return SideTimes(
            sum(side.times.busy for side in self._sides),
            sum(side.times.waited for side in self._sides),
        )
