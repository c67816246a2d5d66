"""What runs leave for reports, through the command line: files, loggers, warnings."""

import csv
import json
import sys
import warnings
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from lit_rlft.cli import main
from lit_rlft.report import write_report
from lit_rlft.report.curves import read_curves
from lit_rlft.report.run import read_run
from lit_rlft.runs.warned import WARNINGS, hearing_warnings
from tests.report.test_page import parts
from tests.support import TINY_MIXTURE, arguments, report, working_directory

CONFIGS = ("configs/domains/gaussian_mixture.yaml", "configs/algorithms/graft.yaml")
TINY = {**TINY_MIXTURE, "data.init_args.num_test": 6, "report.num_samples": 2}
LENGTHS = {"short": 3, "long": 5}
"""Sampler steps by run."""


class Warner(Callback):
    """Warns twice of the same, with a path."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for _ in range(2):
            warnings.warn(f"{Path.home()}/odd.txt is odd", RuntimeWarning, stacklevel=1)


class Wandb(ModuleType):
    """Stands in for the package wandb: what Lightning's logger hands over is noted."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.logged: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self.run = None
        self.Image = lambda data, caption=None: ("image", caption)
        self.Table = lambda columns, data, dataframe: ("table", data)

    def init(self, **settings: Any) -> Any:
        config = SimpleNamespace(update=lambda new, **_: self.settings.update(new))
        return SimpleNamespace(log=self.logged.append, config=config, id="x", name="x")

    def require(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def wandb() -> Iterator[Wandb]:
    """Put a stand-in below Lightning's WandbLogger."""
    package, run = Wandb(), ModuleType("wandb.wandb_run")
    library, disabled = ModuleType("wandb.sdk"), ModuleType("wandb.sdk.lib")
    disabled.RunDisabled = run.Run = type("Run", (), {})  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for module in (package, library, disabled, run):
            patch.setitem(sys.modules, module.__name__, module)
        patch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", True)
        yield package


@pytest.fixture(scope="module")
def runs(wandb: Wandb, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of two tested runs, whose samplers are of other lengths.

    The one has TensorBoard's log alone, as by default; the other all kinds of loggers.
    """
    folder = tmp_path_factory.mktemp("runs")
    board = {"save_dir": "runs", "name": "short", "version": ""}
    every = [
        {"class_path": "TensorBoardLogger", "init_args": board},
        {"class_path": "CSVLogger", "init_args": {"save_dir": "csv"}},
        {"class_path": "WandbLogger", "init_args": {"offline": True, "save_dir": "."}},
    ]
    with working_directory(folder):
        for name, steps in LENGTHS.items():
            own = {"name": name, "model.init_args.sampler.num_steps": steps}
            extra = {"trainer.callbacks": f"{__name__}.Warner"}
            extra |= {"trainer.logger": every} if name == "short" else {}
            main(arguments("fit", CONFIGS, TINY, own, extra))
            main(arguments("test", CONFIGS, TINY, own))
    return folder / "runs"


def lines(run: Path) -> list[dict[str, str]]:
    with (run / "test_samples.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_sample_of_a_test_is_written(runs: Path) -> None:
    run, found = runs / "short", lines(runs / "short")
    assert [(line["row"], line["sample"]) for line in found] == [
        (str(row), str(i)) for row in range(6) for i in range(2)
    ]
    metrics = report(run)
    for arm in ("tuned", "reference"):
        values = torch.tensor([float(line[f"{arm}/Coordinate"]) for line in found]).double()
        assert float(values.mean()) == pytest.approx(metrics[arm]["Coordinate"]["mean"], rel=1e-5)
        rows = values.view(6, 2).mean(dim=1)  # whose two samples share a condition
        assert float(rows.std() / len(rows) ** 0.5) == pytest.approx(
            metrics[arm]["Coordinate"]["sem"], rel=1e-5
        )
    assert metrics["reward"] == "Coordinate"


def test_the_extremes_are_those_of_all_samples(runs: Path) -> None:
    found = {}
    for line in lines(runs / "short"):
        pair = [float(line[f"{arm}/Coordinate"]) for arm in ("tuned", "reference")]
        found[int(line["row"]), int(line["sample"])] = pair
    expected = {
        "best": sorted(found, key=lambda key: -found[key][0])[:2],
        "worst": sorted(found, key=lambda key: found[key][0])[:2],
        "changed": sorted(found, key=lambda key: -abs(found[key][0] - found[key][1]))[:2],
    }
    entries = read_run(runs / "short").extremes
    for kind, keys in expected.items():
        own = [entry for entry in entries if entry["kind"] == kind]
        assert [(entry["row"], entry["sample"]) for entry in own] == keys
        for entry, key in zip(own, keys, strict=True):
            values = [entry[arm]["values"]["Coordinate"] for arm in ("tuned", "reference")]
            assert values == pytest.approx(found[key], rel=1e-6)
            assert entry["tuned"]["image"].startswith("data:image/png;base64,")


def test_the_test_writes_a_report(runs: Path) -> None:
    text, data = parts(runs / "short" / "report.html")
    assert "GRAFT on gaussian_mixture for Coordinate" in text and str(runs) not in text
    places = data["checkpoints"]["places"]
    (record,) = read_run(runs / "short").checkpoints
    assert places == [0, record["reward_calls"]] == [0, 64]
    assert record["summary"]["gain"]["Coordinate"]["sem"] > 0 and record["guards"] == {}
    titles = [chart["title"] for chart in data["charts"]]
    assert titles[0] == "reward" and {"kl", "loss"} <= set(titles)
    loss = next(chart for chart in data["charts"] if chart["title"] == "loss")
    (series,) = loss["series"]
    assert series["reward_calls"] == [32, 64] and series["seconds"][0] > 0
    both = write_report([runs / "short", runs / "long"], runs / "both.html")
    text, data = parts(both)
    assert "model.sampler.num_steps" in text.partition("all settings")[0]
    assert len(data["checkpoints"]["runs"]) == 1  # other samplers share no samples


def test_warnings_are_kept_once_and_told_without_paths(runs: Path) -> None:
    kept = (runs / "short" / WARNINGS).read_text().splitlines()
    odd = [line for line in map(json.loads, kept) if "odd.txt" in line["message"]]
    assert odd == [{"stage": "fit", "message": f"{Path.home()}/odd.txt is odd"}]
    text, _ = parts(runs / "short" / "report.html")
    assert "<li>fit: odd.txt is odd</li>" in text
    mux = multiplexer(runs)
    (event,) = mux.Tensors("short", "warnings/text_summary")
    assert b"odd.txt is odd" in event.tensor_proto.string_val[0]


def multiplexer(runs: Path) -> EventMultiplexer:
    mux = EventMultiplexer(tensor_size_guidance={"tensors": 0})
    return mux.AddRunsFromDirectory(str(runs)).Reload()


def test_hparams_sorts_runs_by_their_final_metrics(runs: Path) -> None:
    provider = MultiplexerDataProvider(multiplexer(runs), str(runs))
    context = backend_context.Context(TBContext(data_provider=provider))
    request = RequestContext()
    experiment = context.experiment_from_metadata(
        request, "", True, context.hparams_metadata(request, ""), []
    )
    differ = {info.name for info in experiment.hparam_infos if info.differs}
    assert differ == {"model.sampler.num_steps"}
    assert {"model", "model.num_candidates", "data.batch_size"} <= {
        info.name for info in experiment.hparam_infos
    }
    gain = api_pb2.MetricName(tag="test_gain/Coordinate", group="")
    asked = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=api_pb2.Status.values(),
        col_params=[api_pb2.ColParams(metric=gain, order=api_pb2.ORDER_DESC)],
        slice_size=9,
    )
    found = list_session_groups.Handler(request, context, "", asked).run().session_groups
    shown = {
        LENGTHS_BY_STEPS[group.hparams["model.sampler.num_steps"].number_value]: next(
            value.value for value in group.metric_values if value.name.tag == gain.tag
        )
        for group in found
    }
    expected = {name: report(runs / name)["gain"]["Coordinate"]["mean"] for name in LENGTHS}
    assert shown == pytest.approx(expected, rel=1e-5)
    assert list(shown) == sorted(expected, key=lambda name: -expected[name])


LENGTHS_BY_STEPS = {float(steps): name for name, steps in LENGTHS.items()}


def test_tensorboard_puts_tuned_and_reference_together(runs: Path) -> None:
    mux = multiplexer(runs)
    (event,) = mux.Tensors("short", "custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    charts = {
        (category.title, chart.title): list(chart.multiline.tag)
        for category in layout.category
        for chart in category.chart
    }
    assert charts["exploitation", "Coordinate"] == ["^val(_reference)?/Coordinate$"]
    assert {category for category, _ in charts} == {"exploitation", "tuned and reference"}
    for end in ("", "_reference"):
        (by_calls,) = mux.Tensors("short", f"val{end}_by_reward_calls/Coordinate")
        (by_steps,) = mux.Tensors("short", f"val{end}/Coordinate")
        assert by_calls.step == 64 and by_calls.tensor_proto == by_steps.tensor_proto


def names(values: Iterable[str]) -> set[str]:
    """Return the names that all loggers share: TensorBoard alone has curves over other axes."""
    groups = ("train", "val", "val_reference", "val_gain", "cost", "time")
    return {
        name
        for name in values
        if name.split("/")[0] in groups and not name.endswith(("by_samples", "by_reward_calls"))
    }


def test_csv_has_the_same_names(runs: Path) -> None:
    found, same = read_curves(runs.parent / "csv"), read_curves(runs / "short")
    assert names(found.points) == names(same.points) and not found.notes
    for name in ("train/reward", "val/Coordinate", "cost/reward_calls", "time/elapsed"):
        steps, expected = ([step for step, _ in c.points[name]] for c in (found, same))
        assert steps == expected
        values = [[value for _, value in curves.points[name]] for curves in (found, same)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    (settings,) = runs.parent.rglob("lightning_logs/version_0/hparams.yaml")
    assert "model.num_candidates: 4" in settings.read_text()


def test_wandb_gets_the_same_names_with_pictures_and_texts(runs: Path, wandb: Wandb) -> None:
    """Lightning's WandbLogger does the logging; the package below it is a stand-in."""
    found = {name: value for one in wandb.logged for name, value in one.items()}
    assert names(found) - {"val/before_after"} == names(read_curves(runs / "short").points)
    kind, caption = found["val/before_after"][0]
    assert kind == "image" and caption.startswith("GRAFT after 4 updates, Coordinate ")
    assert found["warnings"][1][0][1].endswith("odd.txt is odd")
    assert wandb.settings["model.sampler.num_steps"] == 3


def test_wandb_that_is_not_installed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.chdir(tmp_path)
    logger = {"class_path": "WandbLogger", "init_args": {"offline": True}}
    with pytest.raises(
        SystemExit, match=r"trainer\.logger: WandbLogger needs .* pip install wandb"
    ):
        main(arguments("fit", CONFIGS, TINY, {"trainer.logger": logger}))


def test_warnings_before_the_folder_is_known_are_kept(tmp_path: Path) -> None:
    with pytest.warns(UserWarning), hearing_warnings() as heard:
        warnings.warn("early  and\nlate", stacklevel=1)
        heard.keep_in(tmp_path, "fit")
        warnings.warn("later", stacklevel=1)
        warnings.warn("later", stacklevel=1)
    kept = [json.loads(line)["message"] for line in (tmp_path / WARNINGS).read_text().splitlines()]
    assert kept == ["early and late", "later"]
