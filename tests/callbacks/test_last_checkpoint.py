"""Which further checkpoints are kept, and who obeys signals."""

import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning import Callback, Trainer

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.callbacks.last_checkpoint import LastCheckpoint
from lit_rlft.callbacks.signals import Signals, Stopped
from lit_rlft.core.sampling import Sampler
from tests.support import trainer_of

_EVERY_THREE: dict[str, Any] = {
    "filename": "{step}",
    "monitor": "val/Coordinate",
    "mode": "max",
    "every_n_train_steps": 3,
    "save_top_k": -1,
    "save_last": False,
}


def fit(tmp_path: Path, *callbacks: Callback, **settings: Any) -> set[str]:
    """Run four rounds of three updates; return the names of what was kept."""
    tuner = GRAFT(
        GaussianMixturePipeline(), Coordinate(), sampler=Sampler(2), minibatch_size=2, seed=1
    )
    data = MixtureData(num_train=24, num_val=2, batch_size=6, eval_batch_size=2)
    own = {"callbacks": [*callbacks], "default_root_dir": tmp_path, "enable_checkpointing": True}
    trainer_of(**own, **settings).fit(tuner, data)
    assert tuner.num_updates == 12
    return {path.stem for path in tmp_path.glob("*.ckpt")}


@pytest.mark.parametrize(
    ("every", "kept"), [(1, {3, 6, 9, 12}), (3, {3, 6, 9, 12}), (5, {6, 12}), (7, {9}), (9, {9})]
)
def test_a_round_that_passes_a_multiple_of_the_steps_is_saved(
    every: int, kept: set[int], tmp_path: Path
) -> None:
    save = LastCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=every, save_top_k=-1, save_last=False
    )
    assert fit(tmp_path, save) == {f"step={step}" for step in kept}


@pytest.mark.parametrize(("interval", "kept"), [(timedelta(0), 4), (timedelta(hours=1), 0)])
def test_time_keeps_further_checkpoints(interval: timedelta, kept: int, tmp_path: Path) -> None:
    save = LastCheckpoint(
        tmp_path, filename="{step}", train_time_interval=interval, save_top_k=-1, save_last=True
    )
    assert len(fit(tmp_path, save) - {"last"}) == kept


def test_what_is_monitored_is_waited_for(tmp_path: Path) -> None:
    """The first validation comes after six updates."""
    save = LastCheckpoint(tmp_path, **_EVERY_THREE)
    kept = fit(tmp_path, save, limit_val_batches=1, val_check_interval=2)
    assert kept == {"step=6", "step=9", "step=12"}


def test_what_a_validation_measures_is_that_of_the_weights_that_are_saved(tmp_path: Path) -> None:
    """It ends each epoch of two rounds."""
    measured: dict[str, float] = {}

    class Measured(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                value = trainer.callback_metrics["val/Coordinate"]
                measured[f"step={trainer.global_step}"] = float(value)

    save = LastCheckpoint(tmp_path, **_EVERY_THREE)
    epochs = {"limit_train_batches": 2, "max_epochs": 2, "limit_val_batches": 1}
    assert fit(tmp_path, save, Measured(), **epochs) == {"step=6", "step=9", "step=12"}
    scores = {Path(path).stem: float(score) for path, score in save.best_k_models.items()}
    assert {step: scores[step] for step in measured} == measured


@pytest.mark.parametrize("first", [True, False])
def test_of_several_the_one_that_keeps_the_last_obeys_signals(
    first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    obeying: list[Signals] = []
    monkeypatch.setattr(Signals, "install", lambda self, trainer, saves: obeying.append(self))
    lasts = [
        LastCheckpoint(tmp_path, save_last=last, filename="{step}", every_n_epochs=epochs)
        for epochs, last in ((1, first), (2, not first))
    ]
    fit(tmp_path, *lasts)
    assert obeying == [own.signals for own in lasts if own.save_last]


@pytest.mark.parametrize(
    ("given", "kept"),
    [([None], True), ([False], False), ([None, None], True), ([False, None], False)],
)
def test_last_is_kept_unless_it_is_refused(
    given: list[bool | None], kept: bool, tmp_path: Path
) -> None:
    lasts = [
        LastCheckpoint(tmp_path, save_last=last, save_top_k=0, every_n_epochs=1 + place)
        for place, last in enumerate(given)
    ]
    assert fit(tmp_path, *lasts) == ({"last"} if kept else set())
    assert sum(bool(one.save_last) for one in lasts) == kept


@pytest.mark.parametrize(("last", "said"), [(True, "is saved and ends"), (False, "ends")])
def test_a_signal_says_whether_the_fit_is_saved(
    last: bool, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupts(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 0:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped):
        fit(tmp_path, LastCheckpoint(tmp_path, save_last=last, save_top_k=0), Interrupts())
    assert f"SIGINT: the run {said} after this round" in capsys.readouterr().out
    assert (tmp_path / "last.ckpt").is_file() == last
