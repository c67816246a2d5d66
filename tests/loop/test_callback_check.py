"""Callbacks of Lightning that do not apply are refused, with what takes their place."""

from datetime import timedelta
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.callbacks.ema import EMA
from lit_rlft.callbacks.last_checkpoint import LastCheckpoint
from lit_rlft.core.checks import UsageError
from lit_rlft.loop.callback_check import check_callbacks
from tests.support import trainer_of

LAST = "lit_rlft.callbacks.last_checkpoint.LastCheckpoint"
NAMES = {
    "BackboneFinetuning": "lora",
    "BatchSizeFinder": "microbatch_size and sampling_batch_size to auto",
    "GradientAccumulationScheduler": "minibatch_size and microbatch_size",
    "LearningRateFinder": "optimizer.init_args.lr",
    "ModelPruning": "would prune the reference",
    "OnExceptionCheckpoint": LAST,
    "SpikeDetection": "ends the run",
    "StochasticWeightAveraging": "lit_rlft.callbacks.ema.EMA",
    "WeightAveraging": "lit_rlft.callbacks.ema.EMA",
    "EMAWeightAveraging": "lit_rlft.callbacks.ema.EMA",
}
PATH = "lightning.pytorch.callbacks"
HOUR = timedelta(hours=1)


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_apply_is_refused_by_its_path(name: str) -> None:
    with pytest.raises(
        UsageError, match=f"trainer.callbacks: {name} does not apply.*{NAMES[name]}"
    ):
        check_callbacks([{"class_path": f"{PATH}.{name}", "init_args": {}}])
    check_callbacks([{"class_path": f"mine.{name}"}])


def test_a_fit_is_refused_before_anything_is_drawn() -> None:
    class Own(callbacks.StochasticWeightAveraging):
        pass

    class Never(Coordinate):
        def forward(self, samples: Any, condition: Any) -> Any:
            raise AssertionError

    tuner, trainer = GRAFT(GaussianMixturePipeline(), Never()), trainer_of(callbacks=[Own(0.1)])
    with pytest.raises(UsageError, match="StochasticWeightAveraging does not apply here; take"):
        trainer.fit(tuner, MixtureData(num_train=8, batch_size=8))


@pytest.mark.parametrize(
    ("option", "value"),
    [("every_n_train_steps", 5), ("train_time_interval", HOUR), ("save_on_exception", True)],
)
def test_options_that_lightnings_checkpoints_would_miss(option: str, value: Any) -> None:
    own = ModelCheckpoint()
    vars(own)[option if option == "save_on_exception" else f"_{option}"] = value
    config = {"class_path": f"{PATH}.ModelCheckpoint", "init_args": {option: value}}
    for given in (own, config):
        with pytest.raises(UsageError, match=f"{option} of ModelCheckpoint.* take {LAST}"):
            check_callbacks([given])


def test_all_others_are_taken() -> None:
    class Own(Callback):
        pass

    check_callbacks([Own(), EMA(), callbacks.EarlyStopping("val/kl"), callbacks.Timer()])
    check_callbacks([ModelCheckpoint(), ModelCheckpoint(every_n_train_steps=1)])
    check_callbacks(
        [LastCheckpoint(every_n_train_steps=5), LastCheckpoint(train_time_interval=HOUR)]
    )
    check_callbacks([{"class_path": f"{PATH}.ModelCheckpoint", "init_args": {"save_top_k": 2}}])
    check_callbacks([{"class_path": f"{PATH}.RichProgressBar"}])


def test_a_callback_of_another_base_is_taken() -> None:
    """Lightning takes what has the hooks, such as a callback of `pytorch_lightning`."""
    check_callbacks([type("Alike", (), {"on_train_batch_end": None})()])


def test_optimisers_of_ones_own_are_arguments() -> None:
    class Own(GRAFT):
        def configure_optimizers(self) -> Any:
            raise AssertionError

    tuner = Own(GaussianMixturePipeline(), Coordinate())
    with pytest.raises(UsageError, match=r"Own\.configure_optimizers: .* the arguments optimizer"):
        trainer_of().fit(tuner, MixtureData(num_train=8, batch_size=8))


def test_a_compiled_tuner_is_refused_before_anything_is_compiled() -> None:
    tuner: Any = torch.compile(GRAFT(GaussianMixturePipeline(), Coordinate()))
    with pytest.raises(UsageError, match=r"torch\.compile\(GRAFT\) .* compile='whole'"):
        trainer_of().fit(tuner, MixtureData(num_train=8, batch_size=8))


def test_a_trainer_that_is_used_again_has_each_watcher_once() -> None:
    tuner, names = GRAFT(GaussianMixturePipeline(), Coordinate()), []
    trainer: Any = trainer_of(max_epochs=0)
    for _ in range(2):
        trainer.fit(tuner, MixtureData(num_train=8, batch_size=8))
        names.append([type(callback).__name__ for callback in trainer.callbacks])
        assert tuner.configure_callbacks() == []  # nothing for Lightning to say it replaces
    assert names[0] == names[1] and {"BatchCheck", "LoggedTest"} <= {*names[0]}
