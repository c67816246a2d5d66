"""The commands that need a model: LightningCLI with a pipeline, a reward and metrics."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import jsonargparse
import lightning
import yaml
from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]
from lightning import LightningDataModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_warn

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.callbacks.blind_pairs import BlindPairs
from lit_rlft.callbacks.charts import Charts
from lit_rlft.callbacks.cost_meter import CostMeter
from lit_rlft.callbacks.exploitation_watch import ExploitationWatch
from lit_rlft.callbacks.facts import Facts
from lit_rlft.callbacks.last_checkpoint import AUTO, LastCheckpoint
from lit_rlft.callbacks.left_out import LeftOut
from lit_rlft.callbacks.logged import check_loggers
from lit_rlft.callbacks.monitored import Monitored
from lit_rlft.callbacks.progress import progress
from lit_rlft.callbacks.report_files import ReportFiles
from lit_rlft.callbacks.run_files import RunFiles, SaveConfig
from lit_rlft.callbacks.sample_panel import SamplePanel
from lit_rlft.callbacks.self_check import SelfCheck
from lit_rlft.callbacks.signals import ended_by_signals
from lit_rlft.callbacks.tf32 import TF32
from lit_rlft.callbacks.training_metrics import TrainingMetrics
from lit_rlft.callbacks.voting import Voting
from lit_rlft.cli.collector import resume
from lit_rlft.cli.errors import own_frames, sentence
from lit_rlft.cli.same_domain import check_domains
from lit_rlft.cli.which import NONE, choose
from lit_rlft.cli.whole_numbers import try_whole_numbers_first
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Pipeline
from lit_rlft.core.reward import Metrics, Reward
from lit_rlft.kit.data import SplitData
from lit_rlft.loop.callback_check import check_callbacks
from lit_rlft.loop.checkpointed import Checkpointed
from lit_rlft.loop.precision import check_precision
from lit_rlft.loop.strategy import check_strategy, usable_accelerator
from lit_rlft.runs.checkpoint_file import WholeCheckpoints
from lit_rlft.runs.events import quiet_event_writer
from lit_rlft.runs.files import disk_trouble
from lit_rlft.runs.folder import give_folder, make_folder, spelled_out, trainer_settings
from lit_rlft.runs.warned import Heard, hearing_warnings

__all__ = ["Command", "own_callbacks", "run"]

_ABOUT = {
    "fit": "Tune a pretrained model with a reward.",
    "validate": "Measure the tuned model beside the pretrained one on the validation data.",
    "test": "Measure both on the test data; write metrics.json and a picture, before and after.",
    "predict": "Draw samples from the tuned model and write them, with their rewards.",
}
_HOW = """
Give a domain's config (pipeline, reward, metrics, data) and an algorithm's (model), by file or by
name: `lit-rlft list` shows them. The options of a class: --model.help PGRAFT, --reward.help
CLIPScore, and likewise --pipeline.help, --data.help. The whole config of a run: --print_config.
The options below are those that every run has."""


_PARTS = {"pipeline": "--pipeline", "reward": "--reward", "metrics": "--metrics.parts+"}
"""Arguments of every algorithm that a run makes for itself, and the options that say of what."""

_CALLBACKS = (
    *("checkpoint", "run_files", "sample_panel", "self_check", "exploitation", "cost_meter"),
    *("tf32", "report"),
)
"""Groups of the callbacks that every run has."""

_FURTHER = (Facts, LeftOut, Monitored, TrainingMetrics, Charts, Voting, BlindPairs)
"""Those that every run has too, without settings."""


def own_callbacks(trainer: Namespace) -> list[Any]:
    """Return the callbacks that a config gives to its trainer: a list, one alone, or none."""
    given = trainer["callbacks"] or []
    return given if isinstance(given, list) else [given]


class _Parser(LightningArgumentParser):
    """Takes whole names alone: what a half of one stands for changes with the options there are."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)


class Command(LightningCLI):
    """A command that needs a model; made of its words, it runs."""

    parsed: ClassVar[Namespace | None] = None
    """The latest command's config, for errors to name its keys."""
    command: ClassVar[str] = ""
    """The command asked for: a parser for each of the others would take as long to build."""

    called: ClassVar[str] = ""
    """Name and own options in the help of a command that runs as another one."""
    about: ClassVar[str] = ""
    """What such a command does, in one sentence."""
    lock: ClassVar[ExitStack] = ExitStack()
    """Holds the lock of a fit's folder until the command is over."""
    written: ClassVar[Path] = Path()
    """The run's folder, for errors of a disk that takes no more."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        known = LightningCLI.subcommands()
        return {name: own for name, own in known.items() if Command.command in (name, "")}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = _Parser(
            **{"dump_header": [f"lightning.pytorch=={lightning.__version__}"], **kwargs}
        )
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="a config, in YAML")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_subclass_arguments(Pipeline, "pipeline", required=True)
        parser.add_subclass_arguments(Reward, "reward", required=True)
        parser.add_class_arguments(Metrics, "metrics")
        for group in _PARTS:
            parser.link_arguments(group, f"model.init_args.{group}", apply_on="instantiate")
        parser.add_argument("--name", type=str | None, default=None, help="folder of this run")
        parser.add_argument("--root", type=str, default="runs", help="folder of all runs")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.monitor": AUTO})
        parser.add_lightning_class_args(RunFiles, "run_files")
        parser.add_lightning_class_args(SamplePanel, "sample_panel")
        parser.add_lightning_class_args(SelfCheck, "self_check")
        parser.add_lightning_class_args(ExploitationWatch, "exploitation")
        parser.add_lightning_class_args(CostMeter, "cost_meter")
        parser.add_lightning_class_args(TF32, "tf32")
        parser.add_lightning_class_args(ReportFiles, "report")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # The base class warns wherever arguments are given, which here they always are.
        self.config = parser.parse_args(args)
        own = Command.parsed = self.config[self.config.subcommand]
        for group in ("trainer", "metrics", *_CALLBACKS):
            if group in own and not isinstance(own[group], Namespace):
                raise UsageError(f"{group} is {own[group]!r}, but must hold keys with values")
        _check_parts(own)
        check_domains(own.as_dict())
        given = own.trainer.strategy
        check_strategy(given if isinstance(given, str) else given.class_path)
        check_loggers(own.trainer.logger)
        check_callbacks(own_callbacks(own.trainer))
        if self.config.subcommand == "fit":
            check_precision(own.trainer.precision)
        _check_seeds(own)
        if own.trainer.max_epochs is None:
            other = own.trainer.max_steps >= 0 or own.trainer.max_time is not None
            own.trainer.max_epochs = -1 if other else 1  # Lightning's own is 1,000
        own.root = spelled_out(own.root)
        own.ckpt_path = choose(own, self.config.subcommand)

    def _parse_ckpt_path(self) -> None:
        """Leave the settings to the user: the base class takes a checkpoint's over them."""

    def _dump_config(self) -> None:
        # The base class checks all settings again, which takes five times as long as writing them.
        if not hasattr(self, "config_dump"):
            written = self.parser.dump(
                self.config,
                format="yaml",
                skip_unset=False,
                skip_validation=True,
                skip_link_targets=False,
            )
            self.config_dump = yaml.safe_load(written)[self.config.subcommand]

    def before_instantiate_classes(self) -> None:
        config = self.config[str(self.subcommand)]
        self.folder = make_folder(config, str(self.subcommand), Command.lock)
        Command.written = self.folder
        if Heard.latest is not None and not config.trainer["fast_dev_run"]:
            Heard.latest.keep_in(self.folder, str(self.subcommand))
        if self.subcommand == "predict":
            config.return_predictions = False  # they are written as they come
        elif self.subcommand in ("validate", "test"):
            config.verbose = False  # a table of our own shows the reference too

    def instantiate_classes(self) -> None:
        resume()  # networks may leave cycles behind, which take memory until they are found
        super().instantiate_classes()

    def after_instantiate_classes(self) -> None:
        path = self.config[str(self.subcommand)].get("ckpt_path")
        if path not in (None, NONE) and isinstance(self.model, Checkpointed):
            self.model.expect(path)
        if self.subcommand == "fit" and isinstance(self.datamodule, SplitData):
            # Before further processes are started.
            self.datamodule.check_batch_size(self.trainer.num_devices * self.trainer.num_nodes)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        given = self.config_init[str(self.subcommand)].trainer
        own = own_callbacks(given)
        shown, bars = progress(own, given["enable_progress_bar"])
        settings = trainer_settings(given, self.folder) | {
            "accelerator": usable_accelerator(given["accelerator"]),
            "callbacks": [*own, *shown, *(further() for further in _FURTHER)],
            "enable_progress_bar": bars,
        }
        trainer = super().instantiate_trainer(**settings, **kwargs)
        check_strategy(trainer.strategy)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        give_folder(trainer, self.folder)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                # Else it would be the first logger's, wherever that writes.
                callback.dirpath = callback.dirpath or str(self.folder / "checkpoints")
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        settings = super()._prepare_subcommand_kwargs(subcommand)
        path = None if settings["ckpt_path"] == NONE else settings["ckpt_path"]
        if path is None:  # in a job of SLURM, Lightning would look for one of its own
            self.trainer._checkpoint_connector._user_managed = True
        return settings | {"ckpt_path": path}


def _check_parts(config: Namespace) -> None:
    """Raise UsageError for a part within the model: the parser would take the run's own for it."""
    given = config.as_dict()["model"].get("init_args") or {}
    for name, option in _PARTS.items():
        if isinstance(given.get(name), Mapping):
            raise UsageError(
                f"model.init_args.{name} would be ignored: {name} is a key of its own beside "
                f"model; give {option} instead"
            )


def _check_seeds(config: Namespace) -> None:
    """Warn of a seed for everything that reaches neither the noise nor the data."""
    settings = config.as_dict()
    given = settings.get("seed_everything")
    seeds = [(settings[part].get("init_args") or {}).get("seed", 0) for part in ("model", "data")]
    if type(given) is int and given and not any(seeds):
        rank_zero_warn(
            f"seed_everything {given} seeds new networks alone; for other noise and data set "
            f"--model.seed {given} --data.seed {given}"
        )


def run(words: Sequence[str], kind: type[Command] = Command) -> None:
    """Run a command whose configs are files and whose classes have their full paths.

    Args:
        words: The command and its options.
        kind: What to do with them.

    Raises:
        SystemExit: Something is wrong that the user can change; the message is one sentence.
    """
    Command.parsed, Command.command = None, words[0] if words and words[0] in _ABOUT else ""
    jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    try_whole_numbers_first()
    try:
        with (
            ExitStack() as Command.lock,
            quiet_event_writer(),
            hearing_warnings(),
            ended_by_signals(),
        ):
            _run(list(words), kind)
    except Exception as error:
        reason = disk_trouble(error, Command.written, "then run the same command again")
        reason = sentence(error, Command.parsed) or reason
        message = own_frames(error) if reason is None else f"lit-rlft: error: {reason}"
        if message is None:
            raise
        if Command.parsed is not None and sys.stderr.isatty():
            print(file=sys.stderr)  # below what a progress bar has left
        raise SystemExit(message) from error


def _run(words: list[str], kind: type[Command]) -> None:
    usage = "lit-rlft {} --config DOMAIN --config ALGORITHM [--config TRAINER] [--any.key VALUE]"
    commands = {
        name: {
            "description": (kind.about or about) + _HOW,
            "usage": usage.format(kind.called or name),
        }
        for name, about in _ABOUT.items()
        if Command.command in (name, "")
    }
    shared = {"parser_mode": "omegaconf+", "exit_on_error": False}
    kind(
        RewardFineTuner,
        LightningDataModule,
        trainer_defaults={
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
        },
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=SaveConfig,
        save_config_kwargs={"save_to_log_dir": False, "overwrite": True},
        parser_kwargs={**shared, **{name: own | shared for name, own in commands.items()}},
        args=words,
    )
