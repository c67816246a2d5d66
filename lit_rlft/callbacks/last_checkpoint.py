"""Keeps last.ckpt: never older than some minutes, never torn, and the end of the last fit."""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import proxy

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.callbacks.facts import say
from lit_rlft.callbacks.signals import Signals, Stopped
from lit_rlft.core.checks import UsageError, require
from lit_rlft.core.reward import WeightedSum
from lit_rlft.distributed import together
from lit_rlft.evaluation.exploitation import held_out
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.hooks import Hooks
from lit_rlft.runs.files import PARTIAL, DiskError, whole, writing
from lit_rlft.runs.folder import run_folder, writes_nothing
from lit_rlft.runs.save_clock import SaveClock

__all__ = ["AUTO", "LastCheckpoint", "called", "monitored"]

AUTO = "auto"
"""The value of `monitor` that leaves the choice to the run."""
_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")
"""In the state of a checkpoint callback."""


class LastCheckpoint(Hooks, ModelCheckpoint):
    """`ModelCheckpoint` whose last.ckpt is written every few minutes as well.

    last.ckpt is written between two rounds: where `every_minutes` have passed since the last time,
    after each validation, at the end of each epoch and of the fit, before a signal ends the run,
    and after an error that came before the round's experience was complete. All of Lightning's
    options say which further checkpoints are kept. A round that makes several updates is saved once
    where it makes or passes the next multiple of `every_n_train_steps`. `train_time_interval` takes
    the place of `every_minutes`, too. `save_last: false` writes no last.ckpt; where it is not
    given, the first of several writes it, unless another one has `save_last: true`.

    With `monitor: auto`, as `lit-rlft fit` has it, the further checkpoint is the best by what a
    validation measures and the run does not train on: the first reward that is held out, else the
    first reward among the metrics. Where there is none it is the trained reward, or its gain where
    `normalize` changes the reward's unit during the run; without a validation the newest checkpoint
    is kept, and so it is where `every_n_train_steps`, `train_time_interval` or `save_top_k` asks
    for others. `--ckpt_path best` takes it.

    Args:
        dirpath: Where to; `checkpoints` in the run's folder unless given.
        every_minutes: Minutes of training after which last.ckpt is written again; null writes it
            at the other moments alone. Of several processes the first one's clock counts.
        max_share: Of the time that these further saves may take: where saving is slow, they are
            rarer.
        **kwargs: Of `ModelCheckpoint`.

    Attributes:
        chooses: Whether what is monitored was left to the run.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        *,
        every_minutes: float | None = 5.0,
        max_share: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(dirpath=dirpath, **kwargs)
        self.chooses = self.monitor == AUTO
        minutes = every_minutes
        require(minutes is None or minutes > 0, self, "every_minutes", "above 0, or null for never")
        require(0 < max_share <= 1, self, "max_share", "in (0, 1]")
        if self.save_last == "link":
            raise UsageError(
                "checkpoint.save_last must be true or false: a link would go to one of the further "
                "checkpoints, which may be older than the last round"
            )
        given = self._train_time_interval
        seconds = None if minutes is None else 60 * minutes
        self.clock = SaveClock(given.total_seconds() if given else seconds, max_share)
        self.signals = Signals()
        self._saved_round = self._step = 0
        self._counts: dict[str, Any] = {}
        self._training = self._untouched = self._validated = self._held = self._waits = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose what to monitor; remove what a run that was killed while it saved has left."""
        super().setup(trainer, pl_module, stage)
        if self.save_last is None and self.leads(trainer):
            self.save_last = True  # Lightning's own callback takes None for False
        if self.chooses:
            self._choose(trainer, pl_module)
        if stage == "fit" and trainer.is_global_zero and not writes_nothing(trainer):
            for partial in Path(str(self.dirpath)).glob(f"*.ckpt{PARTIAL}"):
                partial.unlink(missing_ok=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over which checkpoints were kept, also where the folder was moved since.

        For Lightning another path is another folder: the best one would be forgotten and stay.
        """
        super().load_state_dict(_moved(state_dict, str(self.dirpath)))

    def _choose(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Monitor what is held out; it is never the lower the better.

        Checkpoints between two validations, and all of them, are kept for themselves.
        """
        self.monitor = None
        validates = trainer.state.fn != TrainerFn.FITTING or trainer.enable_validation
        between = self._every_n_train_steps or self._train_time_interval or self.save_top_k < 1
        if isinstance(pl_module, RewardFineTuner) and validates and not between:
            reward = pl_module.reward
            name = held_out(reward, pl_module.metrics)
            moves = isinstance(reward, WeightedSum) and reward.moments and name == reward.name
            self.monitor = None if name is None else f"val{'_gain' if moves else ''}/{name}"
        self.mode, self.kth_value = "max", torch.tensor(-torch.inf)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        """Wait for the first validation where the monitor was chosen here."""
        if not self.chooses or self.monitor is None or self.monitor in monitor_candidates:
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget earlier fits."""
        self._training = self._waits = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and listen to signals."""
        super().on_train_start(trainer, pl_module)
        self.clock.start()
        if self.leads(trainer):
            self.signals.install(trainer, saves=self._saves(trainer))
        self._training = True
        self._step = trainer.global_step
        self._finished(trainer, pl_module)
        # What a run was resumed from may lie elsewhere; before the first round there is nothing.
        self._saved_round = -1 if _rounds(pl_module) else 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save between two rounds, with all that was logged of the last one."""
        if batch_idx:  # an epoch's end has its own
            with _as_after_the_last_batch(trainer):
                self._between_rounds(trainer, pl_module)

    def on_experience(self, module: LightningModule, experience: Experience) -> None:
        """Note that the round has changed what a checkpoint holds."""
        self._untouched = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save what Lightning's options ask for, and before a validation that may end the fit."""
        self._finished(trainer, pl_module)
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        follows = fetcher is not None and loop._should_check_val_fx(fetcher)
        if self._is_asked_for(trainer):
            self._save_further(trainer, follows)
        unknown = monitored(trainer).keys() - trainer.callback_metrics.keys()
        if unknown and follows and self._saves(trainer):
            step = self._last_global_step_saved
            self.save(trainer, pl_module)
            # The validation saves at this step, too: the best one, and last.ckpt once more.
            self._last_global_step_saved, self._saved_round = step, -1

    def _is_asked_for(self, trainer: Trainer) -> bool:
        """Return whether updates or time ask for a further checkpoint at the end of this round."""
        before, self._step = self._step, trainer.global_step
        if every := self._every_n_train_steps:
            return before // every < self._step // every
        if self._train_time_interval is None:
            return False
        waited = time.monotonic() - (self._last_time_checked or 0.0)
        due = waited >= self._train_time_interval.total_seconds()
        return bool(trainer.strategy.broadcast(due))

    def _save_further(self, trainer: Trainer, follows: bool) -> None:
        """Save, after a validation that follows: the monitor has no value yet, or an older one."""
        self._last_time_checked = time.monotonic()
        candidates = self._monitor_candidates(trainer)
        self._waits = self.monitor is not None and (follows or self.monitor not in candidates)
        if not self._waits and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the weights may be others until it ends."""
        self._untouched = False
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.signals.end_at_once(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals."""
        self.signals.end_at_once(trainer)

    on_predict_start = on_test_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what Lightning's options ask for; last.ckpt follows when all is logged."""
        self._held = True
        with _as_cut(trainer, before_logging=True):
            super().on_validation_end(trainer, pl_module)
            if self._waits and not self._should_skip_saving_checkpoint(trainer):
                self._waits = False
                self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self._held = False
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._untouched = self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what Lightning's options ask for, and last.ckpt; of a cut epoch, to go on in it."""
        with _as_cut(trainer):
            self._held = True
            super().on_train_epoch_end(trainer, pl_module)
            self._held = False
            self._between_rounds(trainer, pl_module, epoch_end=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what came after the last save."""
        if self._saves(trainer) and self._saved_round != _rounds(pl_module):
            self.save(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the checkpoint of a fit that has nothing left to train, in a new folder."""
        source = trainer.ckpt_path
        if self._training or source is None or not self._saves(trainer):
            return
        with together(trainer.world_size):
            path = self._last_path(trainer)
            if trainer.is_global_zero and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                with Path(source).open("rb") as old, writing(path), whole(path) as new:
                    shutil.copyfileobj(old, new)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save if the state is that of the end of a round; say how to go on."""
        if not self._training or not self._saves(trainer):
            return
        if self._untouched and trainer.world_size == 1:
            # Of several processes the others would not come.
            self._try_to_save(trainer, pl_module, exception)
        path = self._last_path(trainer)
        if path.is_file() and not isinstance(exception, Stopped | DiskError):
            say(self._how_to_resume(trainer, path))

    def save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write last.ckpt; all processes must call it.

        Raises:
            DiskError: It cannot be written; the one before it is intact.
        """
        with self.clock.saving():
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
        self._validated = False

    def _between_rounds(
        self, trainer: Trainer, pl_module: LightningModule, *, epoch_end: bool = False
    ) -> None:
        """Save if it is time; then do what a signal asked for."""
        due = self.signals.agree(trainer, self.clock.due())
        lacking = self._saved_round != _rounds(pl_module)
        stop = self.signals.stop
        wanted = self._validated or (lacking and (due or epoch_end or bool(stop)))
        if wanted and self._saves(trainer):
            self.save(trainer, pl_module)
        self.signals.obey_requeue(trainer)
        if stop:
            error, path = Stopped(stop, trainer), self._last_path(trainer)
            say(f"stopped by {error.signal.name}; {self._how_to_resume(trainer, path)}")
            raise error

    def leads(self, trainer: Trainer) -> bool:
        """Return whether it obeys signals: of several, the one that keeps last.ckpt."""
        own = [one for one in trainer.checkpoint_callbacks if isinstance(one, LastCheckpoint)]
        return self is max(own, key=lambda one: bool(one.save_last))

    def _saves(self, trainer: Trainer) -> bool:
        fitting = trainer.state.fn == TrainerFn.FITTING
        return bool(self.save_last) and fitting and not writes_nothing(trainer)

    def _finished(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the end of a round has counted: a next one that fails has counted more."""
        self._untouched = True
        if isinstance(pl_module, RewardFineTuner) and trainer.world_size == 1:
            self._counts = pl_module.counts()

    def _try_to_save(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._saved_round == _rounds(pl_module):
            return
        try:
            with _as_after_the_last_batch(trainer):
                if isinstance(pl_module, RewardFineTuner):
                    pl_module.counted = self._counts
                self.save(trainer, pl_module)
        except Exception as error:  # the first error is the one to see
            say(f"the last rounds could not be saved ({error})")
        finally:
            if isinstance(pl_module, RewardFineTuner):
                pl_module.counted = {}

    def _how_to_resume(self, trainer: Trainer, path: Path) -> str:
        folder = run_folder(trainer)
        if not path.is_file():
            return "nothing is saved yet: run the same command again"
        if self.save_weights_only:
            return (
                f"{path} holds weights alone, from which test and predict work and no fit goes on "
                "(checkpoint.save_weights_only)"
            )
        relative = folder / "checkpoints" / path.name
        shown = relative if relative.is_file() else path
        return f"to go on, run the same command with --name {folder.name} --ckpt_path {shown}"

    def _last_path(self, trainer: Trainer) -> Path:
        name = self.format_checkpoint_name(
            self._monitor_candidates(trainer), self.CHECKPOINT_NAME_LAST
        )
        return Path(name)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        if self._held:
            return
        # Another fit's last.ckpt is replaced: no last-v1.ckpt beside it.
        self.last_model_path = self.format_checkpoint_name(
            monitor_candidates, self.CHECKPOINT_NAME_LAST
        )
        super()._save_last_checkpoint(trainer, monitor_candidates)
        self._saved_round = _rounds(trainer.lightning_module)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Save; where the first process cannot write, all of them end with its sentence."""
        with together(trainer.world_size):
            for logger in trainer.loggers if trainer.is_global_zero else []:
                if isinstance(logger, TensorBoardLogger):
                    with writing(logger.log_dir):
                        logger.experiment.flush()  # what a resumed run would not log again
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(self.save_weights_only)
            trainer.strategy.save_checkpoint(checkpoint, filepath)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(proxy(self))


@contextmanager
def _as_after_the_last_batch(trainer: Trainer) -> Iterator[None]:
    """Count the batches as Lightning does between two of them, with none begun.

    What it restores at the start of a batch would count that batch as begun. Where a validation
    follows a batch, it counts the batch as logged after it: a resumed run does so again.
    """
    loop = trainer.fit_loop.epoch_loop
    progress: Any = loop.batch_progress
    counters, logged = (progress.total, progress.current), loop._batches_that_stepped
    held = [(one.ready, one.started, one.completed) for one in counters]
    last = progress.is_last_batch
    progress.is_last_batch = last and progress.total.ready == progress.total.processed
    for one in counters:
        one.ready = one.started = one.completed = one.processed
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None and loop._should_check_val_fx(fetcher):
        loop._batches_that_stepped -= 1
    try:
        yield
    finally:
        progress.is_last_batch, loop._batches_that_stepped = last, logged
        for one, before in zip(counters, held, strict=True):
            one.ready, one.started, one.completed = before


@contextmanager
def _as_cut(trainer: Trainer, *, before_logging: bool = False) -> Iterator[None]:
    """Count an epoch that a limit ends before its last batch as begun, not as done.

    Lightning counts it as a whole one, and a resumed run would go on in the next.

    Args:
        trainer: In a validation of a fit, or at the end of an epoch; otherwise nothing changes.
        before_logging: Whether Lightning has yet to count the last batch as logged.
    """
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    limited = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
    if trainer.state.fn != TrainerFn.FITTING or not limited or loop._num_ready_batches_reached():
        yield
        return
    stop, logged = trainer.should_stop, loop._batches_that_stepped
    epochs: Any = fit.epoch_progress
    counters = (epochs.total, epochs.current)
    held = [one.processed for one in counters]
    trainer.should_stop = False  # a resumed run would not validate for the sake of a stop
    loop._batches_that_stepped += before_logging
    for one in counters:
        one.processed = one.completed
    try:
        with _as_after_the_last_batch(trainer):
            yield
    finally:
        trainer.should_stop, loop._batches_that_stepped = stop, logged
        for one, processed in zip(counters, held, strict=True):
            one.processed = processed


def _moved(state: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Return a checkpoint callback's state as of a folder, where its checkpoints are there now."""

    def here(path: str) -> str:
        return str(Path(folder) / Path(path).name) if path else ""

    paths = {key: here(state.get(key, "")) for key in _PATHS}
    models = {here(path): score for path, score in state.get("best_k_models", {}).items()}
    kept = {*models, paths["best_model_path"]} - {""}
    if not kept or not all(Path(path).is_file() for path in kept):
        return dict(state)
    return {**state, **paths, "best_k_models": models, "dirpath": folder}


def monitored(trainer: Trainer) -> dict[str, str]:
    """Return the settings of a fit's callbacks that monitor a name, by the name that they have."""
    if writes_nothing(trainer) or trainer.state.fn != TrainerFn.FITTING:
        return {}
    found = {}
    for callback in vars(trainer).get("callbacks", []):
        name, own = getattr(callback, "monitor", None), isinstance(callback, LastCheckpoint)
        chosen = own and callback.chooses  # nobody has asked for that name
        if isinstance(name, str) and name not in ("epoch", "step") and not chosen:
            found[name] = f"{called(callback, trainer)}.monitor"
    return found


def called(waiting: object, trainer: Trainer) -> str:
    """Return the name of a callback or schedule in messages: its class, or a command's key."""
    own = isinstance(waiting, LastCheckpoint) and waiting.leads(trainer)
    return "checkpoint" if own else type(waiting).__name__


def _rounds(module: LightningModule) -> int:
    return module.num_rounds if isinstance(module, RewardFineTuner) else module.global_step
