"""The configs of benchmarks, each on a tiny family with tiny models of the real classes."""

import copy
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import lit_rlft
from domains.text_to_image.benchmarks.prompts import CATEGORIES, STYLES
from lit_rlft.cli import main
from tests.domains.text_to_image.benchmarks.tiny_models import benchmark_models
from tests.domains.text_to_image.families.tiny import tiny

BENCHMARKS = Path(lit_rlft.__file__).parents[1] / "configs/benchmarks"
RUN: dict[str, Any] = {
    "pipeline": {
        "class_path": "domains.text_to_image.pipeline.TextToImagePipeline",
        "init_args": {"pretrained": "sd", "guidance_scale": 1.0, "frozen_dtype": "float32"},
    },
    "reward": {"class_path": "domains.text_to_image.rewards.Brightness"},
    "model": {
        "class_path": "lit_rlft.algorithms.graft.GRAFT",
        "init_args": {"sampler": {"num_steps": 2}, "num_eval_samples": 1},
    },
    "trainer": {"accelerator": "cpu", "devices": 1},
}
"""What a user tunes with; the benchmark stands after it."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = benchmark_models(tmp_path_factory.mktemp("models"))
    tiny("sd").save_pretrained(folder / "sd")
    return folder


def geneval(folder: Path) -> str:
    cow = {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "two cows"}
    red = {"class": "cow", "count": 1, "color": "red"}
    dog = {"class": "dog", "count": 1, "position": ["left of", 0]}
    other = {"tag": "position", "include": [red, dog], "prompt": "a dog left of a red cow"}
    path = folder / "geneval.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (cow, other)))
    return str(path)


def geneval2(folder: Path) -> str:
    cats = {"prompt": "two cats", "atom_count": 2, "vqa_list": [["How many cats are there?", "No"]]}
    red = {"prompt": "a red dog", "atom_count": 3, "vqa_list": [["Is it red?", "Yes"]] * 2}
    cats["skills"], red["skills"] = ["count"], ["object", "attribute"]
    path = folder / "geneval2.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (cats, red)))
    return str(path)


def t2i_compbench(folder: Path) -> str:
    prompts = {
        "color": "a red car",
        "shape": "a round hat",
        "texture": "a glass cup",
        "spatial": "a cat near a dog",
        "3d_spatial": "a dog behind a cat",
        "numeracy": "two dogs",
        "non_spatial": "a man looks at a map",
        "complex": "the red hat was next to the bag",
    }
    for category, prompt in prompts.items():
        (folder / f"{category}_val.txt").write_text(prompt + "\n")
    return str(folder)


def parti(folder: Path) -> str:
    path = folder / "parti.tsv"
    path.write_text(
        "Prompt\tCategory\tChallenge\tNote\nbond\tArts\tBasic\t\na cat\tAnimals\tBasic\t"
    )
    return str(path)


def drawbench(folder: Path) -> str:
    path = folder / "drawbench.csv"
    path.write_text("Prompts,Category\nA red car.,Colors\nTwo cats.,Counting\n")
    return str(path)


def hpdv2(folder: Path) -> str:
    for style in STYLES:
        (folder / f"{style}.json").write_text(json.dumps([f"a cat, {style}"]))
    return str(folder)


FILES: dict[str, Callable[[Path], str]] = {
    "geneval": geneval,
    "geneval2": geneval2,
    "t2i_compbench": t2i_compbench,
    "parti": parti,
    "drawbench": drawbench,
    "hpdv2": hpdv2,
}
WEIGHTS: dict[str, dict[str, str]] = {
    "GenEvalHF": {"detector": "mask2former", "clip": "clip"},
    "T2ICompBench": {"blip": "blip", "clip": "clip", "detector": "owl", "depth": "depth"},
    "SoftTIFA": {"pretrained": "llava"},
    "PickScore": {"pretrained": "clip", "processor": "clip"},
    "ImageReward": {"pretrained": "ImageReward.pt", "tokenizer": "clip"},
    "HPSv2": {"pretrained": "HPS_v2.1_compressed.pt", "tokenizer": "clip"},
}
"""The tiny model for each argument of a metric or reward."""
MEASURED = {
    "geneval": {"GenEvalHF", "GenEvalHF/counting", "GenEvalHF/position"},
    "geneval2": {"SoftTIFA/groups", "SoftTIFA/2", "SoftTIFA/3", "win_rate/SoftTIFA"}
    | {"SoftTIFA/count", "SoftTIFA/object", "SoftTIFA/attribute", "SoftTIFA/questions"},
    "t2i_compbench": {"T2ICompBench", *(f"T2ICompBench/{name}" for name in CATEGORIES)},
    "parti": {"PickScore/arts", "win_rate/PickScore", "win_rate/PickScore/animals"},
    "drawbench": {"ImageReward/groups", "win_rate/ImageReward", "win_rate/ImageReward/colors"},
    "hpdv2": {"HPSv2/groups", "HPSv2/anime", "HPSv2/concept_art", "HPSv2/paintings", "HPSv2/photo"},
}
PROMPTS = {"geneval": 2, "geneval2": 2, "t2i_compbench": 8, "parti": 2, "drawbench": 2, "hpdv2": 4}
DEFAULT = {"parti"}
SOME = [pytest.param(n, marks=[] if n in DEFAULT else pytest.mark.slow) for n in FILES]


def small(name: str, models: Path, folder: Path) -> dict[str, Any]:
    """Return a benchmark's config with tiny models; all else is as it ships."""
    config = yaml.safe_load((BENCHMARKS / f"{name}.yaml").read_text())
    for part in config["metrics"]["parts"]:
        made = part["init_args"].get("reward", part)
        own = WEIGHTS[made["class_path"].rpartition(".")[2]]
        made["init_args"] |= {key: str(models / value) for key, value in own.items()}
    config["data"]["init_args"] |= {"source": FILES[name](folder), "eval_batch_size": 4}
    return config


def test_all_benchmarks_are_here() -> None:
    assert {path.stem for path in BENCHMARKS.glob("*.yaml")} == set(FILES) == set(MEASURED)


@pytest.mark.parametrize("name", SOME)
def test_a_benchmark_is_one_config(
    name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = copy.deepcopy(RUN)
    run["pipeline"]["init_args"]["pretrained"] = str(models / "sd")
    Path("run.yaml").write_text(yaml.safe_dump(run))
    config = small(name, models, tmp_path)
    Path("benchmark.yaml").write_text(yaml.safe_dump(config))
    main(["test", "--config=run.yaml", "--config=benchmark.yaml", "--name=run"])
    report = json.loads(Path("runs/run/metrics.json").read_text())
    assert set(report["tuned"]) >= MEASURED[name] | {"Brightness"}
    # Nothing was trained: both models are one.
    for key in MEASURED[name]:
        if key in report["gain"]:
            assert report["gain"][key]["mean"] == 0
        if key.startswith("win_rate"):
            assert report["tuned"][key]["mean"] == 0.5
    assert report["num_samples"] == PROMPTS[name] * config["model"]["init_args"]["num_eval_samples"]


@pytest.mark.parametrize("name", SOME)
def test_every_key_of_a_benchmark_is_used(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """After the domain and the algorithm that its first line names."""
    path = BENCHMARKS / f"{name}.yaml"
    words = shlex.split(path.read_text().splitlines()[0].removeprefix("# lit-rlft "))
    assert f"configs/benchmarks/{name}.yaml" in words
    files = [word for word in words if word.startswith("configs/")]
    flags = [f"--config={BENCHMARKS.parents[1] / file}" for file in files]
    with pytest.raises(SystemExit) as raised:
        main(["test", *flags, "--print_config"])
    assert raised.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    config = yaml.safe_load(path.read_text())
    assert shown["data"]["class_path"] == config["data"]["class_path"]
    assert shown["data"]["init_args"]["source"] == config["data"]["init_args"]["source"]
    assert shown["model"]["class_path"].endswith("GRAFT")
    wanted = config["model"]["init_args"]["num_eval_samples"]
    assert shown["model"]["init_args"]["num_eval_samples"] == wanted
    (part,) = shown["metrics"]["parts"]
    assert part["class_path"] == config["metrics"]["parts"][0]["class_path"]
