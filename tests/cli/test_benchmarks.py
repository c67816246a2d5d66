"""Every published benchmark from the command line: its config, tiny models, its own numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from domains.text_to_image.rewards import CLIPScore
from lit_rlft.cli import main
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Metric
from lit_rlft.evaluation.measurements import Measurements
from lit_rlft.evaluation.win_rate import win_rates
from lit_rlft.kit.by_column import ByColumn
from tests.domains.text_to_image.benchmarks.tiny import (
    NAMES,
    blip_folder,
    mask2former_folder,
    owl_folder,
)

TINY = {"model.sampler.num_steps": "2", "trainer.accelerator": "cpu", "name": "bench"}
PART = "metrics.parts[0].init_args"


def geneval(folder: Path) -> dict[str, str]:
    records = [
        {"tag": "two_object", "include": [{"class": name, "count": 1} for name in NAMES[:2]]},
        {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": []},
    ]
    lines = [json.dumps({**record, "prompt": "a photo"}) for record in records]
    (folder / "evaluation_metadata.jsonl").write_text("\n".join(lines))
    parts = {
        "class_path": "GenEval",
        "init_args": {
            "clip": "shapes_clip",
            "detector": {
                "class_path": "Mask2Former",
                "init_args": {"pretrained": str(mask2former_folder(folder / "m"))},
            },
        },
    }
    return {"metrics.parts": json.dumps([parts])}


def compbench(folder: Path) -> dict[str, str]:
    for category in ("color", "spatial", "numeracy", "non_spatial", "complex", "3d_spatial"):
        for split in ("train", "val"):
            (folder / f"{category}_{split}.txt").write_text("a red cup next to two blue bowls\n")
    parts = {
        "class_path": "T2ICompBench",
        "init_args": {
            "clip": "shapes_clip",
            "attributes": {
                "class_path": "BLIPVQA",
                "init_args": {"pretrained": str(blip_folder(folder / "b"))},
            },
            "detector": {
                "class_path": "OWLv2",
                "init_args": {"pretrained": str(owl_folder(folder / "o"))},
            },
        },
    }
    return {
        "metrics.parts": json.dumps([parts]),
        "data.source": "*_train.txt",
        "data.val_source": "*_val.txt",
    }


def by_column(name: str, text: str, column: str) -> Callable[[Path], dict[str, str]]:
    def made(folder: Path) -> dict[str, str]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        clip = {"class_path": "CLIPScore", "init_args": {"pretrained": "shapes_clip"}}
        parts = {"class_path": "ByColumn", "init_args": {"metric": clip, "column": column}}
        return {"metrics.parts": json.dumps([parts])}

    return made


PARTI = "Prompt\tCategory\tChallenge\tNote\na cat\tAnimals\tBasic\t\na car\tVehicles\tBasic\t\n"
BENCHMARKS: dict[str, tuple[Callable[[Path], dict[str, str]], set[str]]] = {
    "geneval": (geneval, {"geneval_hf", "geneval_hf/two_object", "geneval_hf/counting"}),
    "t2i_compbench": (
        compbench,
        {f"t2i_compbench/{c}" for c in ("color", "spatial", "numeracy", "non_spatial", "complex")},
    ),
    "parti": (
        by_column("PartiPrompts.tsv", PARTI, "Category"),
        {"CLIPScore/Animals", "CLIPScore/Vehicles"},
    ),
    "drawbench": (
        by_column("DrawBench.csv", "Prompts,Category\na cat,Colors\na car,Text\n", "Category"),
        {"CLIPScore/Colors", "CLIPScore/Text"},
    ),
    "hpdv2": (
        by_column("benchmark/anime.json", '["a cat", "a girl"]', "category"),
        {"CLIPScore/anime"},
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "geneval" else pytest.mark.slow)
        for name in BENCHMARKS
    ],
)
def test_each_benchmark_runs_by_its_config(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made, numbers = BENCHMARKS[name]
    for part in ("m", "b", "o"):
        (tmp_path / part).mkdir()
    settings = TINY | made(tmp_path)
    configs = ["--config=shapes", "--config=p_graft", f"--config={name}", "--reward=Brightness"]
    main(["test", *configs, *(f"--{key}={value}" for key, value in settings.items())])
    metrics = json.loads(Path("runs/bench/metrics.json").read_text())
    assert numbers <= set(metrics["tuned"]) == set(metrics["reference"])
    if "CLIPScore" in str(numbers):
        assert numbers <= set(metrics["win_rate"])
        assert all(metrics["win_rate"][one]["mean"] == 0.5 for one in numbers)  # untuned: all ties


def condition(*categories: str) -> Condition:
    entries = [{"prompt": "red", "category": category} for category in categories]
    return Condition(entries=entries, tables={}, rows=torch.arange(len(entries)))


class Mean(Metric):
    def evaluate(self, samples: Any, condition: Condition) -> dict[str, torch.Tensor]:
        return {"mean": samples.mean(dim=(1, 2, 3))}


def test_values_by_column() -> None:
    pictures = torch.stack([torch.full((3, 4, 4), v) for v in (0.0, 0.5, 1.0)])
    values = ByColumn(Mean()).evaluate(pictures, condition("a", "b", "a"))
    assert values["mean"].tolist() == [0, 0.5, 1]
    assert values["mean/a"].nanmean() == 0.5 and values["mean/a"].isnan().tolist() == [0, 1, 0]
    assert values["mean/b"].nanmean() == 0.5 and values["mean/b"].isnan().tolist() == [1, 0, 1]
    assert ByColumn(CLIPScore()).guards().keys() == {"CLIPScore"}


def test_win_rates_count_ties_as_halves() -> None:
    measurements = Measurements()
    nan = float("nan")
    for arm, values in (("tuned", [1, 2, 3, 4, nan]), ("reference", [0, 2, 5, 3, 1])):
        columns = {"reward": torch.tensor(values), "kl": torch.tensor(values)}
        columns["reward/a"] = torch.tensor([values[0], values[1], nan, nan, nan])
        measurements.add(arm, 0, columns, None, ["x"] * 5)
    found = win_rates(measurements, ["reward"], 1)
    assert set(found) == {"reward", "reward/a"}
    assert found["reward"]["mean"] == pytest.approx(2.5 / 4)
    assert found["reward/a"]["mean"] == pytest.approx(0.75)
    spread = torch.tensor([1, 0.5, 0, 1]).std() / 2
    assert found["reward"]["sem"] == pytest.approx(float(spread))
