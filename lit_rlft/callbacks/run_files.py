"""The files that a run writes into its folder."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image
from torch import Tensor

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.callbacks.dial_file import DIAL, write_dial
from lit_rlft.callbacks.exploitation_watch import signs_of
from lit_rlft.callbacks.facts import say
from lit_rlft.callbacks.logged import log_settings
from lit_rlft.callbacks.report_files import OF_A_TEST
from lit_rlft.callbacks.result_table import result_table
from lit_rlft.callbacks.training_metrics import training_values
from lit_rlft.core.checks import UsageError, at_least
from lit_rlft.core.pipeline import Pipeline
from lit_rlft.core.settings import without_secrets
from lit_rlft.distributed import gather, together
from lit_rlft.evaluation.dial import dial_rows
from lit_rlft.evaluation.exploitation import Exploitation
from lit_rlft.evaluation.kept import first_of_all
from lit_rlft.evaluation.measurements import Measurements
from lit_rlft.loop.checkpoint_file import COUNTERS
from lit_rlft.loop.experience import Draw
from lit_rlft.runs.before_after import comparison, png
from lit_rlft.runs.files import no_paths, write_whole, writing
from lit_rlft.runs.folder import run_folder, summary_writer, writes_nothing
from lit_rlft.runs.lines import without_nan
from lit_rlft.runs.plain import flat
from lit_rlft.runs.readme import add_results
from lit_rlft.runs.results import Measured, keep_others, measured

Summary = dict[str, dict[str, dict[str, float]]]

_GROUPS = ("model", "reward", "pipeline", "data")
_OF_TRAINER = ("max_epochs", "max_steps", "limit_train_batches", "precision")
_SAMPLE = re.compile(r"\d{5,}_\d{19,}")
"""The name of a sample's file: its row and its seed."""

__all__ = ["RunFiles", "SaveConfig"]


class SaveConfig(SaveConfigCallback):
    """Writes the whole config into the run's folder, and its settings to the loggers.

    TensorBoard has them as text too. Its page HParams, like the hyperparameters of other loggers,
    has all plain settings of the model, the reward, the pipeline and the data. Loggers are told no
    secrets; the file has what was given, since it is to be run again. That of a fit starts anew: it
    does not hold the checkpoint that the fit went on from.
    """

    _last: tuple[Path, str] | None = None

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config.yaml` for a fit, `config_<stage>.yaml` otherwise."""
        stage, config = TrainerFn(stage).value, self.config
        if stage == "fit":
            config = config.clone()
            config.ckpt_path = None
        text = self.parser.dump(config, skip_unset=False, skip_validation=True)
        name = "config.yaml" if stage == "fit" else f"config_{stage}.yaml"
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        self._last = (folder / name, text) if stage == "test" else None
        if self._last is None:
            _write(folder / name, text)
        given = without_secrets(yaml.safe_load(text))
        log_settings(pl_module, _settings(given))
        writer = summary_writer(pl_module)
        if writer is not None:
            shown = yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=1000)
            writer.add_text(f"config/{stage}", f"```yaml\n{shown}\n```")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the config of a test beside its results: until then it is that of older ones."""
        if self._last is not None:
            _write(*self._last)


class RunFiles(Callback):
    """Writes metrics.json and comparison.png after a test, samples and samples.jsonl in predict.

    Args:
        num_conditions: Conditions shown side by side in the picture.
    """

    def __init__(self, num_conditions: int = 12) -> None:
        at_least(1, self, num_conditions=num_conditions)
        self.num_conditions = num_conditions
        self._result = ""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask for the pictures."""
        assert isinstance(pl_module, RewardFineTuner)
        pl_module.evaluator.show(self.num_conditions * pl_module.num_eval_samples)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where everything is."""
        if writes_nothing(trainer):
            say("fast_dev_run: nothing was written")
            return
        say(f"run folder: {run_folder(trainer)}")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                say(f"TensorBoard log: tensorboard --logdir {Path(logger.log_dir)}")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the metrics and the picture."""
        assert isinstance(pl_module, RewardFineTuner)
        summary = pl_module.evaluator.summary(errors=True)
        labels = pl_module.evaluator.measurements.tuned.labels.values()
        num_samples = sum(gather(sum(map(len, labels)), trainer.world_size))
        cost = _cost(pl_module, trainer.world_size)
        first = self._first(pl_module, trainer.world_size)
        if not trainer.is_global_zero:
            return
        folder = run_folder(trainer)
        newer = _measured(trainer, pl_module)
        reward = pl_module.reward
        found = signs_of(pl_module, summary)
        training = training_values(pl_module.metrics)
        rows = dial_rows(summary)
        report: dict[str, Any] = {
            "algorithm": pl_module.algorithm,
            "domain": pl_module.pipeline.name,
            "num_samples": num_samples,
            "reward": reward.name,
            "seed": pl_module.seed,
            "checkpoint": newer,
            **{arm: without_nan(own) for arm, own in summary.items() if "=" not in arm},
            "exploitation": _signs(found),
            "cost": cost,
        } | ({"training": training} if training else {})
        report |= _dialled(rows)
        path, shown = folder / "metrics.json", folder / "comparison.png"
        picture = self._picture(pl_module, first, summary, num_samples)
        with writing(path):
            others = [shown, *(folder / name for name in OF_A_TEST)]
            kept = keep_others(path, others, newer)
            write_whole(path, json.dumps(report, indent=2) + "\n")
            write_dial(folder, summary, rows, summary_writer(pl_module))
            if pl_module.as_trained:  # the card has the settings of the fit
                add_results(folder / "tuned", report, pl_module.num_updates)
        with writing(shown):
            write_whole(shown, png(picture))
        title = f"{pl_module.algorithm} on {pl_module.pipeline.name}, {num_samples} samples each"
        paths = f"picture  {shown}\nmetrics  {path}"
        paths += f"\ndial     {folder / DIAL}" if rows else ""
        paths = "fast_dev_run: nothing was written" if writes_nothing(trainer) else paths
        rest = (_told(training), kept, found.sentence() if found else "")
        parts = ("", title, "", result_table(summary), "", paths, *(line for line in rest if line))
        self._result = "\n".join(parts)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the result that `validate` shows; validations within a fit are not shown."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            summary = _validation_summary(trainer.callback_metrics)
            panels = f"panels   {run_folder(trainer) / 'panels'}"
            if writes_nothing(trainer):
                panels = "fast_dev_run: nothing was written"
            self._result = f"\n{result_table(summary)}\n\n{panels}"

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Show the result, when no progress bar is open any more."""
        if self._result:
            say(self._result)
            self._result = ""

    def _first(self, module: RewardFineTuner, world_size: int) -> Measurements:
        """Return the samples to show, of all processes, which must all call this."""
        number = self.num_conditions * module.num_eval_samples
        return first_of_all(module.evaluator.measurements, number, world_size)

    def _picture(
        self, module: RewardFineTuner, first: Measurements, summary: Summary, num_samples: int
    ) -> Image.Image:
        reference, tuned = first.reference, first.tuned
        labels, size = tuned.all_labels(), module.num_eval_samples
        starts = list(range(0, len(labels), size))[: self.num_conditions]
        name = module.reward.name
        before, after = (summary[arm][name] for arm in ("reference", "tuned"))
        title = (
            f"{module.algorithm} on {module.pipeline.name}: {name} "
            f"{before['mean']:.3f} -> {after['mean']:.3f} (n = {num_samples}, same noise)"
        )
        arms = reference.all_pictures(), tuned.all_pictures()
        return comparison(*arms, labels, [*starts, min(size, 4)], title)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the samples of another checkpoint before the first new one is written.

        Raises:
            UsageError: The pipeline cannot write samples.
        """
        assert isinstance(pl_module, RewardFineTuner)
        if type(pl_module.pipeline).save_samples is Pipeline.save_samples:
            raise UsageError(
                f"{type(pl_module.pipeline).__name__} has no file format for samples; define "
                "save_samples(samples, condition, folder, names), which writes a file of each and "
                "returns their paths, or predict without RunFiles"
            )
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            newer = _measured(trainer, pl_module)
            kept = keep_others(folder / "samples.jsonl", [folder / "samples"], newer)
            if kept:
                say(kept)
        trainer.strategy.barrier()

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the samples of a batch and a line each in samples.jsonl."""
        assert isinstance(pl_module, RewardFineTuner) and isinstance(outputs, Draw)
        folder = run_folder(trainer) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        indices = batch["index"].repeat_interleave(pl_module.num_eval_samples).tolist()
        names = [f"{i:05d}_{seed:019d}" for i, seed in zip(indices, outputs.seeds, strict=True)]
        with writing(folder):
            paths = _saved(pl_module.pipeline, outputs, folder, names)
        # NaN, where nobody gave a reward, is no JSON.
        rewards = [r if math.isfinite(r) else None for r in outputs.rewards.tolist()]
        name, checkpoint = pl_module.reward.name, _measured(trainer, pl_module)
        facts = pl_module.pipeline.sample_facts(outputs.samples)
        said = [{}] * len(paths) if facts is None else [{"facts": dict(fact)} for fact in facts]
        lines = [
            json.dumps(
                {**entry, "seed": seed, "rewards": {name: r}, **fact, "file": p.name}
                | {"checkpoint": checkpoint}
            )
            for entry, seed, r, fact, p in zip(
                outputs.condition.each(), outputs.seeds, rewards, said, paths, strict=True
            )
        ]
        path = folder.parent / f"samples_{trainer.global_rank}.jsonl"
        with writing(path), path.open("w" if batch_idx == 0 else "a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the lines of all processes; say where the samples are.

        samples.jsonl is that of an earlier command until it is whole.
        """
        folder = run_folder(trainer)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            paths = [folder / f"samples_{rank}.jsonl" for rank in range(trainer.world_size)]
            parts = [path for path in paths if path.is_file()]
            texts = [part.read_text(encoding="utf-8") for part in parts]
            lines = [line for text in texts for line in text.splitlines()]
            if trainer.world_size > 1:
                lines.sort(key=lambda line: json.loads(line)["file"])
            _write(folder / "samples.jsonl", "".join(f"{line}\n" for line in lines))
            _clear(folder / "samples", {Path(json.loads(line)["file"]).stem for line in lines})
            for part in parts:
                part.unlink()
        if writes_nothing(trainer):
            say("fast_dev_run: nothing was written")
            return
        say(f"samples: {folder / 'samples'}\nsamples.jsonl: {folder / 'samples.jsonl'}")


def _saved(pipeline: Pipeline, drawn: Draw, folder: Path, names: Sequence[str]) -> list[Path]:
    """Write samples; return a path of each."""
    found: Any = pipeline.save_samples(drawn.samples, drawn.condition, folder, names)
    method = f"{type(pipeline).__name__}.save_samples"
    if problem := no_paths(found, method):
        raise UsageError(problem)
    if len(found) != len(names):
        raise UsageError(
            f"{method} returned {len(found)} paths for {len(names)} samples; it returns one of each"
        )
    return list(found)


def _cost(module: RewardFineTuner, world_size: int) -> dict[str, Any]:
    """Return what was spent, on the first process that of all, which must all call this."""
    cost = module.meter.report(gather(module.meter.counts(), world_size))
    with together(world_size):
        for hooks in module.audience:
            cost |= hooks.report()
    return cost


def _write(path: Path, text: str) -> None:
    with writing(path):
        write_whole(path, text)


def _clear(folder: Path, named: set[str]) -> None:
    """Delete samples of a folder that earlier commands with other settings left there."""
    for path in folder.glob("*"):
        if _SAMPLE.fullmatch(path.stem) and path.stem not in named:
            path.unlink()


def _settings(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Return the plain settings that runs are told apart by."""
    groups = {name: config.get(name) for name in _GROUPS}
    trainer = {name: config.get("trainer", {}).get(name) for name in _OF_TRAINER}
    every = flat({**groups, "trainer": trainer, "seed_everything": config.get("seed_everything")})
    return {key: value for key, value in every.items() if value is not None}


def _dialled(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a report has of a dial, nothing where there was none."""
    own = [{**row, "metrics": without_nan(row["metrics"])} for row in rows]
    return {"dial": own} if own else {}


def _told(training: Mapping[str, float]) -> str:
    """Return the line of values that belong to a whole training, empty without any."""
    values = " ".join(f"{name} {value:.6g}" for name, value in training.items())
    return f"training {values}" if values else ""


def _measured(trainer: Trainer, module: RewardFineTuner) -> Measured:
    """Return which checkpoint the model is of."""
    counters = {name: getattr(module, name) for name in COUNTERS}
    return measured(trainer.ckpt_path, counters, run_folder(trainer))


def _signs(found: Exploitation | None) -> list[str]:
    """Return the names of what became worse while the reward rose."""
    return [] if found is None else list(found.signs)


def _validation_summary(logged: Mapping[str, Tensor]) -> Summary:
    """Return the logged means of a validation by arm and metric."""
    summary: Summary = {}
    for arm, prefix in (("reference", "val_reference/"), ("tuned", "val/"), ("gain", "val_gain/")):
        summary[arm] = {
            key.removeprefix(prefix): {"mean": float(value), "sem": math.nan}
            for key, value in logged.items()
            if key.startswith(prefix)
        }
    return summary
