"""Mistakes end in one sentence that names the key and the remedy, and overwrite nothing."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_rlft.cli import main

GAUSSIAN = {
    "config": ["configs/domains/gaussian_mixture.yaml", "configs/algorithms/p_graft.yaml"],
    "data.init_args.num_train": 8,
    "data.init_args.batch_size": 8,
    "data.init_args.num_val": 2,
    "data.init_args.num_test": 2,
    "model.init_args.sampler.num_steps": 4,
}
QUIET = {"trainer.enable_progress_bar": False, "trainer.enable_model_summary": False}

REWARDS = """
import torch
from lit_rlft.core.reward import Reward

class Failing(Reward):
    def forward(self, samples, condition):
        return torch.full((len(condition),), float("nan"))

class Wide(Reward):
    def forward(self, samples, condition):
        return samples

class Number(Reward):
    def forward(self, samples, condition):
        return 1.0

class Listed(Reward):
    def forward(self, samples, condition):
        return [1.0] * len(condition)

class Untyped(Reward):
    def __init__(self, scale):
        super().__init__()

    def forward(self, samples, condition):
        return samples[:, 0]
"""


def command(stage: str, settings: dict[str, Any]) -> list[str]:
    flags = []
    for key, value in {**settings, **QUIET}.items():
        for each in value if key == "config" else [value]:
            flags.append(f"--{key}={each if isinstance(each, str | Path) else json.dumps(each)}")
    return [stage, *flags]


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error(settings: dict[str, Any], stage: str = "fit") -> str:
    """Run a command that must fail; return its message."""
    with pytest.raises(SystemExit) as raised:
        main(command(stage, settings))
    message = raised.value.code
    assert isinstance(message, str) and message.startswith("lit-rlft: error: ")
    assert "\n" not in message and len(message) < 600
    return message


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mistaken_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture(scope="module")
def pictures(
    tiny_stable_diffusion: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Return settings of a run of a tiny diffusion model; its data lack a source."""
    text_to_image = "domains.text_to_image"
    config = {
        "pipeline": {
            "class_path": f"{text_to_image}.pipeline.TextToImagePipeline",
            "init_args": {"pretrained": str(tiny_stable_diffusion()), "guidance_scale": 1.0},
        },
        "reward": {"class_path": f"{text_to_image}.rewards.Symmetry"},
        "data": {"class_path": f"{text_to_image}.data.PromptData", "init_args": {"batch_size": 1}},
    }
    path = tmp_path_factory.mktemp("domain") / "pictures.yaml"
    path.write_text(yaml.safe_dump(config))
    return {
        "config": [path, "configs/algorithms/p_graft.yaml"],
        "model.init_args.sampler.num_steps": 2,
        "model.init_args.num_eval_samples": 1,
        "model.init_args.num_candidates": 1,
        "model.init_args.cut": 0.5,
    }


PROMPT_FILES = {
    "prompts.xml": ("<a/>", "unknown file type"),
    "empty.txt": ("", "holds no prompts"),
    "blank.jsonl": ("\n\n", "holds no prompts"),
    "empty.csv": ("", "holds no prompts"),
    "columns.csv": ("text,size\na ring,2\n", r"no 'prompt'.*'text'.*set data\.init_args\.column"),
    "columns.jsonl": (
        '{"caption": "a ring"}\n',
        r"only \['caption'\]; set data\.init_args\.column",
    ),
    "broken.json": ('[{"prompt": "a ring"}', "cannot be read"),
    "object.json": ('{"prompt": "a ring"}', "must hold a list"),
    "numbers.json": ("[1, 2]", "must hold a list"),
    "short.txt": ("a ring\na star", "too few"),
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_prompt_file(pictures: dict[str, Any], name: str) -> None:
    text, sentence = PROMPT_FILES[name]
    Path(name).write_text(text)
    message = error({**pictures, "data.init_args.source": name})
    assert re.search(sentence, message), message
    assert "data.init_args." in message and name in message


def test_missing_prompt_file(pictures: dict[str, Any]) -> None:
    message = error({**pictures, "data.init_args.source": "nowhere.txt"})
    assert "data.init_args.source cannot be used: there is no file nowhere.txt" in message


@pytest.mark.parametrize("split", ["val", "test"])
def test_missing_file_of_a_split(pictures: dict[str, Any], split: str) -> None:
    Path("rings.txt").write_text("a ring\na star")
    files = {"source": "rings.txt", f"{split}_source": "nowhere.txt"}
    message = error({**pictures, **{f"data.init_args.{key}": path for key, path in files.items()}})
    assert f"data.init_args.{split}_source cannot be used: there is no file nowhere" in message


def test_a_folder_that_is_no_pipeline(pictures: dict[str, Any]) -> None:
    Path("prompts.txt").write_text("a ring\na star\na cross")
    Path("model").mkdir()
    settings = {**pictures, "data.init_args.source": "prompts.txt"}
    message = error({**settings, "pipeline.init_args.pretrained": "model"})
    assert "pipeline.init_args.pretrained: model has no model_index.json" in message
    message = error({**settings, "pipeline.init_args.pretrained": "nobody/nothing"})
    assert "'nobody/nothing' is not in the hub's cache" in message


SETTINGS = {
    "more accepted than drawn": (
        {"model.init_args.num_candidates": 2, "model.init_args.selection.init_args.k": 3},
        "k is 3, more than the 2 candidates of a condition; lower it or raise num_candidates",
    ),
    "cut of all": ({"model.init_args.cut": 1.0}, "must be in [0, 1)"),
    "negative cut": ({"model.init_args.cut": -0.25}, "must be in [0, 1)"),
    "cut that leaves no step": ({"model.init_args.cut": 0.9}, "at least one of the sampler's 4"),
    "no steps": ({"model.init_args.sampler.num_steps": 0}, "sampler.num_steps must be at least 1"),
    "too much noise": ({"model.init_args.sampler.eta": 2.0}, "sampler.eta must be in [0, 1]"),
    "rank": ({"model.init_args.lora.rank": 0}, "lora.rank must be at least 1"),
    "targets": ({"model.init_args.lora.targets": ["nothing"]}, "model.init_args.lora.targets"),
    "saved LoRA": (
        {"model.init_args.lora.pretrained": "runs/run/tuned"},
        "model.init_args.lora.pretrained must be null: GaussianMixturePipeline has no file format",
    ),
    "minibatch": ({"model.init_args.minibatch_size": 0}, "model.init_args.minibatch_size"),
    "clipping": ({"trainer.gradient_clip_val": 1.0}, "set model.init_args.max_grad_norm"),
    "accumulation": ({"trainer.accumulate_grad_batches": 2}, "set model.init_args.minibatch_size"),
    "no checkpoints": (
        {"trainer.enable_checkpointing": False},
        "does not apply here; set checkpoint.save_last to false and checkpoint.save_top_k to 0",
    ),
    "bare bones": (
        {"trainer.barebones": True},
        "trainer.barebones does not apply here; set checkpoint.save_last to false and",
    ),
    "half precision": ({"trainer.precision": "bf16-true"}, "trainer.precision bf16-true keeps the"),
    "eight bits": (
        {"trainer.precision": "transformer-engine"},
        "trainer.precision transformer-engine keeps the trained weights in 16 bits",
    ),
    "average of weights": (
        {"trainer.callbacks": "EMAWeightAveraging"},
        "EMAWeightAveraging does not apply here; take lit_rlft.callbacks.ema.EMA",
    ),
    "checkpoints that would be missed": (
        {
            "trainer.callbacks": {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"every_n_train_steps": 100},
            }
        },
        "every_n_train_steps of ModelCheckpoint does not apply here",
    ),
    "two callbacks of one state": (
        {
            "trainer.callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"},
            ],
        },
        "Found more than one stateful callback of type `ModelCheckpoint`",
    ),
    "processes": (
        {
            "data.init_args.batch_size": 3,
            "trainer.accelerator": "cpu",
            "trainer.strategy": "ddp",
            "trainer.devices": 2,
        },
        "data.init_args.batch_size (3) is not divisible by the 2 processes",
    ),
    "unknown key": (
        {"model.init_args.candidates": 2},
        "model.init_args.candidates: PGRAFT has no such argument; did you mean num_candidates",
    ),
    "wrong type": (
        {"model.init_args.num_candidates": "few"},
        "model.init_args.num_candidates is 'few', but must",
    ),
    "unknown class": ({"reward": "nowhere.Nothing"}, "there is no module nowhere; put nowhere.py"),
    "missing config": ({"config": ["configs/nowhere.yaml"]}, "does not exist"),
    "NaN reward": ({"reward": "mistaken_rewards.Failing"}, "Failing failed for all 32 samples"),
    "wide reward": ({"reward": "mistaken_rewards.Wide"}, "Wide returned shape (32, 2) for 32"),
    "list of rewards": (
        {"reward": "mistaken_rewards.Listed"},
        "Listed returned a list; a reward returns a tensor with one number per sample, shape (32,),"
        " as torch.as_tensor makes",
    ),
    "untyped argument": (
        {"reward": "mistaken_rewards.Untyped"},
        "reward: its argument scale has no type; write scale: float",
    ),
    "file of a class": (
        {"reward": "mistaken_rewards.py"},
        "mistaken_rewards.py is a file; give the class in it, as mistaken_rewards.ClassName",
    ),
    "path of a class": (
        {"reward": "own/rewards"},
        "own/rewards is a file; give the class in it, as own.rewards.ClassName",
    ),
    "bare reward": ({"reward": "mistaken_rewards.Number"}, "Number returned a float"),
}


@pytest.mark.parametrize("mistake", SETTINGS)
def test_setting(mistake: str) -> None:
    settings, sentence = SETTINGS[mistake]
    assert sentence in error({**GAUSSIAN, **settings})
    assert not list(Path().rglob("*.ckpt"))


@pytest.mark.parametrize("root", ["file/runs", "/proc/runs"])
def test_a_folder_that_cannot_be_written(root: str) -> None:
    Path("file").write_text("in the way")
    message = error({**GAUSSIAN, "root": root, "name": "run"})
    assert f"the run folder {root}/run cannot be written; choose another --root" in message


@pytest.mark.parametrize("name", ["checkpoints", "panels", "report", "samples", "tuned"])
def test_a_file_in_the_place_of_a_folder(name: str) -> None:
    path = Path("runs/run") / name
    path.parent.mkdir(parents=True)
    path.write_text("in the way")
    message = error({**GAUSSIAN, "name": "run"})
    assert f"{path} is no folder, but the run writes one there; move it away" in message
    assert path.read_text() == "in the way" and [*path.parent.iterdir()] == [path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the root folder of a finished run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        main(command("fit", {**GAUSSIAN, "name": "run"}))
        return Path("runs").resolve()


def assert_refused(finished: Path, settings: dict[str, Any], stage: str, *words: str) -> None:
    before = files(finished)
    message = error({**GAUSSIAN, "root": str(finished), "name": "run", **settings}, stage)
    assert all(word in message for word in words), message
    after = files(finished)
    written = {path for path in after if after[path] != before.get(path)}
    assert before.keys() <= after.keys()
    assert not any(path.suffix in (".ckpt", ".json", ".png") for path in written)


def test_a_run_is_not_mixed_into_another(finished: Path) -> None:
    before = files(finished)
    message = error({**GAUSSIAN, "root": str(finished), "name": "run"})
    assert "already holds a run; choose another --name" in message
    assert f"--ckpt_path {finished}/run/checkpoints/last.ckpt" in message
    assert files(finished) == before


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_checkpoint_of_something_else(finished: Path, stage: str) -> None:
    last = {"ckpt_path": str(finished / "run/checkpoints/last.ckpt")}
    other = {**last, "pipeline.init_args.stds": [0.1, 0.2, 0.3, 0.4, 0.5]}
    assert_refused(finished, other, stage, "tuned from other weights", "pipeline.init_args")
    rank = {**last, "model.init_args.lora.rank": 3}
    assert_refused(finished, rank, stage, "holds other trained weights", "rank")
    full = {**last, "model.init_args.lora": None}
    assert_refused(finished, full, stage, "holds other trained weights", "lora")


def test_a_file_that_is_no_checkpoint_of_ours(finished: Path) -> None:
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, "foreign.ckpt")
    Path("text.ckpt").write_text("nothing")
    for path in ("foreign.ckpt", "text.ckpt"):
        words = (path, "is no checkpoint of lit-rlft")
        assert_refused(finished, {"ckpt_path": path}, "test", *words)
    assert_refused(finished, {"ckpt_path": "nowhere.ckpt"}, "fit", "there is no file nowhere.ckpt")


def test_a_checkpoint_of_another_diffusion_model(
    pictures: dict[str, Any], tiny_stable_diffusion: Callable[..., Path]
) -> None:
    Path("prompts.txt").write_text("a ring\na star\na cross")
    settings = {**pictures, "data.init_args.source": "prompts.txt", "name": "run"}
    main(command("fit", settings))
    other = {
        "pipeline.init_args.pretrained": str(tiny_stable_diffusion(seed=1)),
        "ckpt_path": "runs/run/checkpoints/last.ckpt",
    }
    assert "tuned from other weights ('tiny')" in error({**settings, **other}, "test")
