"""Callbacks of Lightning that cannot do here what they are for, and what takes their place."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlft.core.checks import UsageError

__all__ = ["check_callbacks"]

_EMA = "take lit_rlft.callbacks.ema.EMA, which averages what is trained"
_LAST = "lit_rlft.callbacks.last_checkpoint.LastCheckpoint"
_REFUSED = {
    "BackboneFinetuning": "model.init_args.lora says what is trained",
    "BatchSizeFinder": "set model.init_args.microbatch_size and sampling_batch_size to auto",
    "GradientAccumulationScheduler": "set model.init_args.minibatch_size and microbatch_size",
    "LearningRateFinder": "set model.init_args.optimizer.init_args.lr",
    "ModelPruning": "leave it out, since it would prune the reference too",
    "OnExceptionCheckpoint": f"take {_LAST}, which keeps the last whole round after an error",
    "SpikeDetection": "leave it out: a loss that is not finite ends the run",
    "StochasticWeightAveraging": _EMA,
    "WeightAveraging": _EMA,
    "EMAWeightAveraging": _EMA,
}
"""They need Lightning's automatic optimisation, or one network that is all trained."""

_MISSED = {
    "every_n_train_steps": "sees the last update of a round alone",
    "train_time_interval": "knows no time in manual optimisation",
    "save_on_exception": "would save the middle of a round",
}
"""Options of Lightning's `ModelCheckpoint` that `LastCheckpoint` does right."""


def check_callbacks(given: Iterable[Any]) -> None:
    """Check that a trainer's callbacks can do what they are for.

    Args:
        given: Callbacks, or their class paths and arguments in a config.

    Raises:
        UsageError: One of them cannot.
    """
    for callback in given:
        names, options = _described(callback)
        for name in names:
            if instead := _REFUSED.get(name):
                raise UsageError(f"trainer.callbacks: {name} does not apply here; {instead}")
        for option, why in _MISSED.items() if "ModelCheckpoint" in names else ():
            often = option == "every_n_train_steps" and options.get(option) == 1  # all rounds
            if options.get(option) and not often:
                raise UsageError(
                    f"trainer.callbacks: {option} of ModelCheckpoint does not apply here, since it "
                    f"{why}; take {_LAST}, which has the same options"
                )


def _described(callback: Any) -> tuple[list[str], Mapping[str, Any]]:
    """Return the names of a callback's classes that are Lightning's, and its options."""
    if not hasattr(callback, "on_train_batch_end"):  # of a config
        paths, options = [callback["class_path"]], callback.get("init_args") or {}
    else:
        kinds, own = type(callback).__mro__, vars(callback)
        if type(callback).on_train_batch_end is not ModelCheckpoint.on_train_batch_end:
            kinds = tuple(kind for kind in kinds if kind is not ModelCheckpoint)
        paths = [f"{kind.__module__}.{kind.__name__}" for kind in kinds]
        options = {name: own.get(f"_{name}", own.get(name)) for name in _MISSED}
    known = [path for path in paths if "lightning" in path.partition(".")[0]]
    return [path.rpartition(".")[2] for path in known], options
