"""Classes and configs by their names alone."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_rlft.cli import main
from lit_rlft.cli.names import with_class_paths
from lit_rlft.cli.old_arguments import without_old_arguments
from lit_rlft.cli.paths import CONFIGS, config_file
from lit_rlft.core.checks import UsageError
from lit_rlft.core.reward import Reward

T2I, GAUSSIAN = "domains.text_to_image", "domains.gaussian_mixture"


class OwnReward(Reward):
    def forward(self, samples: Any, condition: Any) -> torch.Tensor:
        return torch.zeros(len(condition))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as raised:
        main(["fit", *words, "--print_config"])
    assert raised.value.code == 0, raised.value.code
    return capsys.readouterr().out


def classes(text: str) -> set[str]:
    """Return the names of all classes of a config."""

    def below(node: Any) -> set[str]:
        if isinstance(node, list):
            return {name for one in node for name in below(one)}
        if not isinstance(node, dict):
            return set()
        own = {node["class_path"].rpartition(".")[2]} if "class_path" in node else set()
        return own | below([*node.values()])

    return below(yaml.safe_load(text))


def refusal(*words: str) -> str:
    with pytest.raises(UsageError) as raised:
        with_class_paths(["fit", *words])
    assert "\n" not in str(raised.value)
    return str(raised.value)


MIXTURE = [
    *("--pipeline", "GaussianMixturePipeline", "--reward", "Coordinate", "--model=PGRAFT"),
    *("--pipeline.weights=[1.0]", "--pipeline.means=[[0.0, 0.0]]", "--pipeline.stds=[1.0]"),
    *("--data", "MixtureData", "--data.weights=[1.0]", "--data.means=[[0.0, 0.0]]"),
    "--data.stds=[1.0]",
]


def test_a_run_by_short_names_alone(capsys: pytest.CaptureFixture[str]) -> None:
    selection = ["--model.init_args.selection", "RandomK", "--trainer.callbacks+=EMA"]
    metric = ["--metrics.parts+=Quadratic"]
    found = classes(printed(capsys, *MIXTURE, *selection, *metric))
    assert {"PGRAFT", "Coordinate", "MixtureData", "RandomK", "EMA", "Quadratic"} <= found


def test_nested_classes_and_optimisers(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", "gaussian_mixture", "--config", "drtune"]
    words += ["--model.init_args.method", "DRaFT", "--model.init_args.optimizer", "MuonAdamW"]
    assert {"DRaFT", "MuonAdamW"} <= classes(printed(capsys, *words))


def test_short_names_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.yaml").write_text(
        "# einfach: prüfen\n"
        "reward: {class_path: WeightedSum, init_args: {rewards: {x: {class_path: Coordinate}}}}\n"
        "metrics:\n  parts: [Quadratic]\n"
        "model:\n  class_path: 'GRAFT'  # a comment\n  init_args:\n"
        "    selection: {class_path: TopK, init_args: {k: 2}}\n"
    )
    before = Path("own.yaml").read_bytes()
    text = printed(capsys, "--config=gaussian_mixture", "--config=own.yaml")
    assert {"WeightedSum", "Coordinate", "Quadratic", "GRAFT", "TopK"} <= classes(text)
    assert yaml.safe_load(text)["model"]["init_args"]["selection"]["init_args"] == {"k": 2}
    assert Path("own.yaml").read_bytes() == before


def test_full_paths_and_other_words_are_left_alone() -> None:
    words = ["fit", "--name", "PGRAFT", "--config", str(CONFIGS / "domains/shapes.yaml")]
    words += ["--reward=domains.text_to_image.rewards.CLIPScore", "--trainer.max_epochs", "3"]
    assert with_class_paths(words) == words


def test_the_pipelines_domain_decides_between_classes_of_one_name() -> None:
    for pipeline, domain in (("ImagePipeline", "image"), (f"{T2I}.pipeline.X", "text_to_image")):
        words = ["fit", "--pipeline", pipeline, "--reward", "Brightness"]
        words += ["--metrics.parts", "[{class_path: Diversity}]"]
        *_, reward, _, parts = with_class_paths(words)
        assert reward.startswith(f"domains.{domain}.") and reward.endswith(".Brightness")
        assert f"domains.{domain}." in parts and ".Diversity" in parts


def test_the_pipeline_of_a_config_decides_too_and_the_last_one_wins() -> None:
    shapes, layout = (str(CONFIGS / f"domains/{name}.yaml") for name in ("shapes", "layout"))
    for last, domain in ((shapes, "text_to_image"), (layout, "layout")):
        first = layout if last == shapes else shapes
        words = ["fit", "--config", first, "--config", last, "--metrics.parts+=Diversity"]
        assert with_class_paths(words)[-1].startswith(f"--metrics.parts+=domains.{domain}.")


def test_a_reward_and_a_metric_of_one_name_are_told_apart_by_where_they_stand() -> None:
    words = ["fit", "--pipeline=MoleculePipeline", "--reward=Novelty", "--metrics.parts+=Novelty"]
    *_, reward, metric = with_class_paths(words)
    assert "domains.molecule.rewards" in reward and "domains.molecule.metrics" in metric


def test_an_ambiguous_name_is_refused_with_the_full_paths() -> None:
    message = refusal("--metrics.parts+=SetDistances")
    for domain in ("image", "layout", "molecule"):
        assert f"domains.{domain}." in message
    assert message.startswith("--metrics.parts: SetDistances may be any of ")


@pytest.mark.parametrize(
    ("words", "sentences"),
    [
        (["--model", "PGRAFTT"], ["there is no algorithm PGRAFTT", "PGRAFT", "list algorithms"]),
        (["--reward=ClipScore"], ["there is no reward ClipScore", "CLIPScore"]),
        (["--reward", "TopK"], ["there is no reward TopK"]),
        (["--pipeline", "LayoutPipe"], ["there is no pipeline", "LayoutPipeline", "list domains"]),
        (["--data", "ShapePrompts"], ["there is no DataModule", "ShapesPrompts"]),
        (["--metrics.parts+=MDM"], ["there is no metric MDM", "MMD"]),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(words: list[str], sentences: list[str]) -> None:
    message = refusal(*words)
    assert all(sentence in message for sentence in sentences), message


def test_a_class_that_the_program_itself_defines_needs_no_path() -> None:
    assert with_class_paths(["fit", "--reward", "OwnReward"])[-1] == "OwnReward"
    assert "there is no reward Path" in refusal("--reward", "Path")


@pytest.mark.parametrize("name", ["p_graft", "p_graft.yaml", "algorithms/p_graft"])
def test_configs_are_found_by_name(name: str) -> None:
    assert config_file(name) == str(CONFIGS / "algorithms/p_graft.yaml")


def test_every_config_is_found_by_its_bare_name() -> None:
    for path in CONFIGS.glob("*/*.yaml"):
        assert config_file(path.stem) == str(path)


def test_a_file_here_wins() -> None:
    Path("shapes.yaml").write_text("{}")
    assert config_file("shapes") == "shapes.yaml"
    Path("p_graft").write_text("{}")
    assert config_file("p_graft") == "p_graft"


@pytest.mark.parametrize("value", ["own/nowhere.yaml", "{a: 1}", "configs/nowhere.yaml", "a\nb"])
def test_what_is_no_bare_name_is_left_to_the_parser(value: str) -> None:
    if value != "own/nowhere.yaml":
        assert config_file(value) == value


def test_unknown_and_ambiguous_configs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"did you mean .*p_graft"):
        config_file("pgraft")
    folder = Path("packaged/configs").resolve()
    for kind in ("algorithms", "domains"):
        (folder / kind).mkdir(parents=True)
        (folder / kind / "same.yaml").write_text("{}")
    monkeypatch.setattr("lit_rlft.cli.paths.CONFIGS", folder)
    monkeypatch.setattr("lit_rlft.cli.paths._ROOT", folder.parent)
    message = "configs/algorithms/same.yaml and configs/domains/same.yaml"
    with pytest.raises(UsageError, match=message):
        config_file("same")


@pytest.mark.parametrize(
    "configs", [("gaussian_mixture", "p_graft"), ("layout", "inverse_noise_correction")]
)
def test_a_printed_config_can_be_fed_back(
    configs: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = printed(capsys, *(f"--config={name}" for name in configs))
    Path("printed.yaml").write_text(first)
    assert printed(capsys, "--config", "printed.yaml") == first


@pytest.mark.parametrize("later", ["option", "config"])
def test_another_reward_takes_no_arguments_of_the_first(
    later: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both have a `pretrained`, which means another kind of model."""
    (tmp_path / "other.yaml").write_text("reward: {class_path: PickScore}\n")
    given = {"option": ["--reward", "PickScore"], "config": ["--config", "other.yaml"]}[later]
    words = ["--config", "sd15", "--config", "p_graft", "--data.source", "prompts.txt", *given]
    reward = yaml.safe_load(printed(capsys, *words))["reward"]
    assert reward["class_path"] == f"{T2I}.rewards.PickScore"
    assert reward["init_args"]["pretrained"] == "yuvalkirstain/PickScore_v1"
    # An argument of its own counts, and the class that a config has already keeps its own.
    own = yaml.safe_load(printed(capsys, *words, "--reward.pretrained", "a/b"))["reward"]
    assert own["init_args"]["pretrained"] == "a/b"
    same = [*words[:6], "--reward", "CLIPScore"]
    clip = yaml.safe_load(printed(capsys, *same))["reward"]["init_args"]["pretrained"]
    assert clip == "openai/clip-vit-large-patch14"


def test_what_stands_around_the_old_arguments_stays(tmp_path: Path) -> None:
    text = """\
reward:
  # of the molecule
  init_args:
    rewards: {a: 1}
    file: part.yaml

  class_path: a.First
data:
  file: part.yaml
"""
    (tmp_path / "part.yaml").write_text("{}")
    (tmp_path / "one.yaml").write_text(text)
    words = without_old_arguments(["fit", "--config", "one.yaml", "--reward", "b.Second"])
    found = yaml.safe_load(words[2])
    assert found == {
        "reward": {"init_args": {}, "class_path": "a.First"},
        "data": {"file": str(tmp_path / "part.yaml")},
    }
    assert words[3:] == ["--reward", "b.Second"]
    for kept in (["--reward", "a.First"], ["--reward", "a.b.First"], ["--reward.file", "x"], []):
        words = ["fit", "--config", "one.yaml", *kept]
        assert without_old_arguments(words) == words
    flow = ["fit", "--config", "reward: {class_path: A, init_args: {b: 1}}\nname: x", "--reward=B"]
    assert yaml.safe_load(without_old_arguments(flow)[2]) == {
        "reward": {"class_path": "A", "init_args": {}},
        "name": "x",
    }


SOURCES = {
    "molecule_pretrain": ("mols.csv", "MoleculeData", r"MoleculeFile, QM9, SmilesFile$"),
    "layout_pretrain": ("coco.json", "LayoutData", r"JSONLayouts.*PubLayNet"),
    "digits_pretrain": ("flowers", "ImageData", r"Arrays, ImageFolder"),
}


@pytest.mark.parametrize("config", SOURCES)
@pytest.mark.parametrize("exists", [True, False])
def test_a_file_is_no_source(config: str, exists: bool, tmp_path: Path) -> None:
    name, data, classes = SOURCES[config]
    if exists:
        (tmp_path / name).write_text("smiles\n") if "." in name else (tmp_path / name).mkdir()
    elif "." not in name:
        return  # a word without a dot may be a class of one's own
    with pytest.raises(SystemExit) as raised:
        main(["fit", "--config", config, "--data.source", name])
    sentence = f"--data.source {name}: {data} takes the class that reads the file, as in "
    assert sentence in str(raised.value.code)
    assert re.search(classes, str(raised.value.code))


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("prefix", ["model", "model.init_args"])
def test_null_in_a_dataclass_is_none(
    capsys: pytest.CaptureFixture[str], prefix: str, joined: bool
) -> None:
    """The parser alone takes it for the text "None", a file or a wrong number."""
    nulls = [("lora.rank", "null"), ("lora.pretrained", "~"), ("lora.targets", "null")]
    given = [("lora.alpha", "4"), ("lora.rank", "2"), ("dial.cut", "[0.5]"), *nulls]
    words = [
        word
        for key, value in [*given, ("reward_workers.devices", "null")]
        for word in ([f"--{prefix}.{key}={value}"] if joined else [f"--{prefix}.{key}", value])
    ]
    text = printed(capsys, "--config", "gaussian_mixture", "--config", "graft", *words)
    found = yaml.safe_load(text)["model"]["init_args"]
    assert found["lora"]["alpha"] == 4 and found["dial"]["cut"] == [0.5]
    assert {found["lora"][name] for name in ("rank", "pretrained", "targets")} == {None}
    assert found["reward_workers"]["devices"] is None
