"""The part of a tuner that writes and reads its checkpoints, with a trainer and without one."""

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lit_rlft.core import gradient_plan
from lit_rlft.core.batch_size import AUTO
from lit_rlft.core.checks import UsageError, told
from lit_rlft.core.moments import RunningMoments
from lit_rlft.core.pipeline import Pipeline
from lit_rlft.core.reward import Reward, WeightedSum
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.settings import HIDDEN, Plain, arguments, settings
from lit_rlft.core.window import SlidingWindow
from lit_rlft.cost.meter import Meter
from lit_rlft.loop import checkpoint as contents
from lit_rlft.loop import resume
from lit_rlft.loop.batch_sizes import BatchSizes
from lit_rlft.loop.checkpoint_file import COUNTERS, check_resumable, load
from lit_rlft.loop.export import write_tuned
from lit_rlft.loop.learning_rate import optimizer_of
from lit_rlft.loop.precision import check_weights
from lit_rlft.loop.reference import LoRA, Reference, continued
from lit_rlft.loop.settings import changes
from lit_rlft.loop.sharded import whole_weights
from lit_rlft.runs.folder import run_folder, writes_nothing
from lit_rlft.runs.readme import readme

__all__ = ["Checkpointed"]

_PARTS = ("pipeline", "reward", "metrics")
_WITH_THE_WEIGHTS = "pretrained"
_MOMENTS = "reward_moments"
_AVERAGE = "EMA"
"""How the states of callbacks are called that average the weights."""
_TOLD = "the weights are the run's average (EMA)"
T = TypeVar("T")
_TAKEN = {bool, int, float, type(None)}
_GROUPS: dict[str, type] = {"sampler": Sampler, "lora": LoRA, "sliding": SlidingWindow}
"""Arguments that are plain values together."""


class Checkpointed(LightningModule):
    """A tuner whose checkpoints hold what was trained and the settings it was trained with.

    Attributes:
        counted: What a round counts and learns before its first update, for the checkpoints that
            are written from now on; empty for that of the present.
        as_trained: Whether samples are drawn and judged with the settings of the fit.
    """

    counted: Mapping[str, Any] = MappingProxyType({})
    as_trained = True
    pipeline: Pipeline
    reward: Reward
    meter: Meter
    sizes: BatchSizes
    reference: Reference
    pretrained: str
    num_updates: int
    make_optimizer: Any
    make_lr_scheduler: Any

    @abstractmethod
    def _listen(self, trainer: Trainer | None) -> None:
        """Make what draws, measures and reports, for a trainer or for none."""

    @property
    @abstractmethod
    def algorithm(self) -> str:
        """The name under which results are reported."""

    @abstractmethod
    def trainable(self) -> nn.Module:
        """Return what is trained, checkpointed and exported."""

    @abstractmethod
    def statistics(self) -> Mapping[str, contents.Kept]:
        """Return what else has a state that a resumed run needs, by its name in the checkpoint."""

    def __getstate__(self) -> dict[str, Any]:
        """Copies do not take the trainer along."""
        held = {"audience", "round_log", "rollouts", "evaluator"}
        return {name: value for name, value in super().__getstate__().items() if name not in held}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.pretrained:
            self._listen(None)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **init_args: Any,
    ) -> Self:
        """Return the tuned model of a checkpoint, ready to sample from, without a trainer.

        Numbers, sampler, LoRA, sliding window and reward-gradient method that are not given are
        those that the checkpoint names. Nothing else of the checkpoint's settings is used, and none
        of its code is run. Of a run with an average of its weights (`EMA`) the model has the
        average.

        Args:
            checkpoint_path: The file.
            map_location: Device of the model; None leaves it where the pipeline is.
            hparams_file: Not used: settings are given by name.
            strict: Not used: a checkpoint that does not fit is refused.
            weights_only: Not used: only weights and plain values are ever loaded.
            **init_args: Arguments of the class: `pipeline` and `reward` at least.

        Raises:
            UsageError: The file is no checkpoint of lit-rlft, or belongs to another model.
        """
        for name in ("pipeline", "reward"):
            if name not in init_args:
                raise UsageError(f"{cls.__name__}.load_from_checkpoint needs {name}=...")
        checkpoint = load(checkpoint_path)
        recorded: dict[str, Plain] = checkpoint["lit_rlft"].get("settings", {})
        module = _made(cls, _plain_arguments(cls, recorded), init_args)
        module._continue_lora(recorded)
        module.setup(TrainerFn.PREDICTING.value)
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=False)
        module._take_average(checkpoint.get("callbacks", {}))
        given = (*(f"model.{name}" for name in init_args), "model.lora.pretrained")
        module._tell_other_settings(recorded, given)
        if map_location is not None:
            module = module.to(map_location)
        return module.eval()

    def expect(self, checkpoint_path: str | Path) -> None:
        """Prepare, before `setup`, for a checkpoint that the trainer will load.

        The checkpoint holds all of a LoRA: the file that the run once started from
        (`lora.pretrained`) is not needed.

        Args:
            checkpoint_path: The file.

        Raises:
            UsageError: It is no checkpoint of lit-rlft.
        """
        if getattr(getattr(self, "lora", None), "pretrained", None) is not None:
            self._continue_lora(load(checkpoint_path)["lit_rlft"].get("settings", {}))

    def _continue_lora(self, recorded: Mapping[str, Plain]) -> None:
        lora = getattr(self, "lora", None)
        if isinstance(lora, LoRA):
            vars(self)["lora"] = continued(lora, recorded)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, counters, statistics, settings, and the pretrained model's name."""
        check_weights(trained := self._trained(), self.num_updates)
        ours = {
            "pretrained": self.pretrained,
            "pipeline": self.pipeline.name,
            "algorithm": self.algorithm,
            "settings": self._settings() | self._optimizer_settings(),
            "batch_sizes": self.sizes.state(),
            "num_train_rows": resume.num_train_rows(self._trainer),
            **(self.counted or self._counts()),
        }
        contents.reduce(checkpoint, contents.trained_shapes(self, trained.values()), ours)
        if "callbacks" not in checkpoint:  # weights alone, without the average beside them
            known = _averaging(getattr(self._trainer, "callbacks", ()))
            states = {callback.state_key: callback.state_dict() for callback in known}
            checkpoint["state_dict"] |= self._average_by_name(states)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore all but the weights; raise UsageError for a checkpoint of another model."""
        trainer = self._trainer
        fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        shapes = contents.trained_shapes(self, self._trained().values())
        self.as_trained = True
        if fitting:
            resume.check_same_run(checkpoint["lit_rlft"], self.algorithm)
        ours = contents.read(checkpoint, self.pretrained, self.pipeline.name, shapes)
        resume.check_adapter(ours.get("settings", {}), self._settings())
        if trainer is not None and not fitting:
            self._load_average(checkpoint, getattr(trainer, "callbacks", ()))
            recorded = ours.get("settings", {})
            self.as_trained = not resume.list_of_samples(recorded, self._settings())
        if fitting:
            self._check_resume(checkpoint, ours.get("settings"))
        vars(self).update({name: ours[name] for name in COUNTERS})
        self.sizes.load(ours.get("batch_sizes", {}))
        for name, part in self._kept().items():
            part.load_state_dict(ours.get(name, {}))
        for name, moments in self._moments().items():
            if name in (known := ours.get(_MOMENTS, {})):
                moments.load_state_dict(known[name])
        self.meter.restore(ours["cost"], first=trainer is None or self.global_rank == 0)

    def on_fit_start(self) -> None:
        """Check what checkpoints will hold, before anything is drawn."""
        self._kept()
        self.as_trained = True

    def _kept(self) -> Mapping[str, contents.Kept]:
        """Return what `statistics` does; raise UsageError where it has no state."""
        found: Any = self.statistics()
        method = f"{type(self).__name__}.statistics()"
        if not isinstance(found, Mapping):
            what = "a dict of what has a state, by name"
            raise UsageError(f"{method} returned {told(found)}; it returns {what}")
        for name, part in found.items():
            if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
                raise UsageError(
                    f"{method}[{name!r}] is {told(part)}; give what has state_dict and "
                    "load_state_dict"
                )
        return found

    def _counts(self) -> dict[str, Any]:
        """Return counters, costs, statistics and moments, for a checkpoint."""
        return {
            "cost": self.meter.as_dict(),
            **{name: getattr(self, name) for name in COUNTERS},
            **{name: part.state_dict() for name, part in self._kept().items()},
            _MOMENTS: {name: part.state_dict() for name, part in self._moments().items()},
        }

    def counts(self) -> dict[str, Any]:
        """Return a copy of what a round counts and learns, in the processor's memory."""
        return tree_map_only(Tensor, lambda v: v.detach().to("cpu", copy=True), self._counts())

    def _moments(self) -> Mapping[str, RunningMoments]:
        """Return the moments of the parts of a reward that are normalised, by name."""
        return self.reward.moments if isinstance(self.reward, WeightedSum) else {}

    def _check_resume(self, checkpoint: dict[str, Any], old: dict[str, Plain] | None) -> None:
        check_resumable(checkpoint)
        epochs, limit = checkpoint.get("epoch", 0), self.trainer.max_epochs
        if limit is not None and 0 <= limit < epochs:
            # Lightning's is an error; this is a run that has nothing left to do.
            self.trainer.fit_loop.max_epochs = epochs
        # The trainer makes its own after this; these show what they will be.
        trained = list(self._trained().values())
        optimizer = optimizer_of(trained, self.make_optimizer, None, self.trainer)
        scheduler = self.make_lr_scheduler and self.make_lr_scheduler(optimizer)
        resume.check_optimizer(checkpoint, old or {}, optimizer, scheduler)
        makers = (optimizer, scheduler, self.make_lr_scheduler)
        new = self._settings() | resume.optimizer_settings(*makers)
        data = getattr(self.trainer, "datamodule", None)
        resume.check_same_batches(checkpoint, old or {}, new, data)
        resume.list_changes(checkpoint, old, new, optimizer, scheduler)

    def _settings(self) -> dict[str, Plain]:
        """Return the settings of the model, its reward, its pipeline and its data."""
        found = settings(self, "model", _PARTS)
        found |= settings(self.reward, "reward")
        found |= settings(self.pipeline, "pipeline", (_WITH_THE_WEIGHTS,))
        data = getattr(self._trainer, "datamodule", None)
        return found if data is None else found | settings(data, "data")

    def _optimizer_settings(self) -> dict[str, Plain]:
        trainer = self._trainer
        if trainer is None or not trainer.optimizers:
            return {}
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        scheduler = schedulers[0] if schedulers else None
        optimizer, made = trainer.optimizers[0], self.make_lr_scheduler
        return resume.optimizer_settings(optimizer, scheduler, made)

    def _facts(self) -> dict[str, Any]:
        """Return what the folder of the tuned model says of it."""
        counters = {name: getattr(self, name) for name in COUNTERS}
        names = {"pipeline": self.pipeline.name, "reward": self.reward.name}
        average = _average_told(self.trainer.callbacks)  # type: ignore[attr-defined]
        return {"algorithm": self.algorithm, **names, **counters, **average}

    def _model_card(self, files: list[str], facts: Mapping[str, Any]) -> str:
        """Return the model card of the tuned model, given its files and facts."""
        return readme(
            facts,
            self._settings() | self._optimizer_settings(),
            self.pipeline.hub_header(files),
            self.pipeline.name,
            self.pipeline.usage(files, facts),
        )

    def _write_tuned(self, export: Callable[[Path], list[Path]], **steps: Any) -> None:
        """Write the tuned model into the run's folder; it must be finite."""
        check_weights(self._trained(), self.num_updates)
        trainer = self.trainer
        writes = trainer.is_global_zero and self.num_updates and not writes_nothing(trainer)
        folder = run_folder(trainer) / "tuned"
        facts = {**self._facts(), **self.pipeline.tuned_facts(steps), **steps}
        own = export if writes else None
        with whole_weights(self.pipeline.denoiser):
            write_tuned(folder, own, trainer.world_size, facts, self._model_card, self._exporter())

    def _exporter(self) -> str:
        """Return the name of the method that exports: the pipeline's, or the algorithm's own."""
        own = next(kind for kind in type(self).__mro__ if "export" in vars(kind))
        if own.__name__ == "RewardFineTuner":
            return f"{type(self.pipeline).__name__}.save"
        return f"{own.__name__}.export"

    def _take_average(self, callbacks: Mapping[str, Any]) -> None:
        """Take the average of the weights, where the run kept one."""
        trained = list(self._trained().values())
        average = _average_in(callbacks, trained)
        if average is None:
            return
        with torch.no_grad():
            for parameter, value in zip(trained, average, strict=True):
                parameter.copy_(value)
        rank_zero_info(_TOLD)

    def _load_average(self, checkpoint: dict[str, Any], callbacks: Sequence[Any]) -> None:
        """Make the average the weights that are loaded, where no callback is there to do so.

        The average is what a run exports, so it is what is to be measured.
        """
        if _averaging(callbacks):
            return
        if average := self._average_by_name(checkpoint.get("callbacks", {})):
            checkpoint["state_dict"] |= average
            rank_zero_info(_TOLD)

    def _average_by_name(self, callbacks: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the average in callbacks' states by the weights' names; without one, nothing."""
        trained = list(self._trained().values())
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        average = _average_in(callbacks, trained)
        if average is None:
            return {}
        return {names[id(p)]: value for p, value in zip(trained, average, strict=True)}

    def _tell_other_settings(self, recorded: Mapping[str, Plain], given: tuple[str, ...]) -> None:
        """Say which settings could not be taken from the checkpoint and differ from it."""
        own = {k: v for k, v in self._settings().items() if k.startswith("model.")}
        rest = [
            f"{key} {now} instead of {before}"
            for key, before, now in changes(recorded, own)
            if not any(key == name or key.startswith(f"{name}.") for name in given)
        ]
        if rest:
            rank_zero_info(f"loaded with other settings than the run's: {', '.join(rest)}")

    def _trained(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.trainable().named_parameters() if p.requires_grad}


def _averaging(callbacks: Sequence[Any]) -> list[Any]:
    """Return the callbacks that average the weights."""
    return [callback for callback in callbacks if callback.state_key.startswith(_AVERAGE)]


def _average_told(callbacks: Sequence[Any]) -> dict[str, float]:
    """Return what a card says of the average of the weights that callbacks leave in the model."""
    kept = [own for own in _averaging(callbacks) if getattr(own, "average", None) is not None]
    return {"ema_decay": kept[0].decay} if kept else {}


def _average_in(
    callbacks: Mapping[str, Any], trained: Sequence[nn.Parameter]
) -> list[Tensor] | None:
    """Return the average of the weights in a checkpoint's states of callbacks, if it has one."""
    averages = [state for name, state in callbacks.items() if name.startswith(_AVERAGE)]
    average = averages[0].get("average") if averages else None
    if not average or [a.shape for a in average] != [p.shape for p in trained]:
        return None
    return list(average)


def _made(cls: type[T], recorded: dict[str, Any], given: Mapping[str, Any]) -> T:
    """Return a tuner with recorded arguments, but for those that its class gives to its base."""
    taken = {name: value for name, value in recorded.items() if name not in given}
    while True:
        try:
            return cls(**taken, **given)
        except TypeError as error:
            twice = re.search(r"multiple values for keyword argument '(\w+)'", str(error))
            if twice is None or twice.group(1) not in taken:
                raise
            del taken[twice.group(1)]


def _plain_arguments(cls: type, recorded: Mapping[str, Plain]) -> dict[str, Any]:
    """Return the recorded arguments of a tuner that are plain values, alone or in groups."""
    found: dict[str, Any] = {}
    for name, parameter in arguments(cls).items():
        value = recorded.get(f"model.{name}", parameter.empty)
        if HIDDEN in str(value):
            continue
        # Text can be the class of an object, or a path of somebody else's.
        if value == AUTO or type(value) in _TAKEN | {type(parameter.default)}:
            found[name] = value
    for name, kind in _GROUPS.items():
        if isinstance(recorded.get(f"model.{name}"), str):
            found[name] = kind(**_fields(kind, recorded, f"model.{name}"))
    module, _, name = str(recorded.get("model.method")).rpartition(".")
    if module == gradient_plan.__name__ and name in gradient_plan.__all__:
        own = getattr(gradient_plan, name)
        found["method"] = own(**_fields(own, recorded, "model.method"))
    return found


def _fields(kind: type, recorded: Mapping[str, Plain], key: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, parameter in arguments(kind).items():
        taken = _TAKEN | {type(parameter.default)}
        length = recorded.get(f"{key}.{name}.length")
        if isinstance(length, int):
            found[name] = [recorded[f"{key}.{name}.{i}"] for i in range(length)]
        elif type(recorded.get(f"{key}.{name}", parameter.empty)) in taken:
            found[name] = recorded[f"{key}.{name}"]
    return found
