"""What the parser, Lightning and one's own code say, as one sentence with key and remedy."""

import re
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import jsonargparse
import pytest
import torch

from lit_rlft.cli import main
from lit_rlft.cli.parsing import is_users
from lit_rlft.cli.words import configs_first
from tests.support import checkpoint, scalars

TINY = [
    "--config=gaussian_mixture", "--config=p_graft", "--data.num_train=8", "--data.batch_size=4",
    "--data.num_val=2", "--data.num_test=2", "--model.sampler.num_steps=4", "--name=run",
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
]  # fmt: skip
OWN = """
import torch
from lightning import Callback, LightningModule
from lit_rlft import GRAFT, Reward

class Fails(Reward):
    calls = 0

    def forward(self, samples, condition):
        Fails.calls += 1
        if Fails.calls > 1:
            return self.inner(samples)
        return samples[:, 0] > 0

    def inner(self, samples):
        return {}["score"]

class Unborn(Reward):
    def __init__(self):
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, samples, condition):
        return samples[:, 0]

class Unfinished(Reward):
    pass

class Named(Reward):
    def __init__(self):
        super().__init__()
        self.name = "mine"

    def forward(self, samples, condition):
        return samples[:, 0]

class Tables(Reward):
    def __init__(self, name: str = "a"):
        super().__init__()
        self.table = {}[name]

    def forward(self, samples, condition):
        return samples[:, 0]

class UnbornTuner(GRAFT):
    def __init__(self, *parts, **base):
        self.parts = parts

class Detached(Callback):
    def on_train_start(self, trainer, module):
        LightningModule().trainer
"""
FILES = {
    "list.yaml": (b"- 1\n", "holds a list"),
    "empty.yaml": (b"", "is empty"),
    "tab.yaml": (b"model:\n\tx: 1\n", "line 2 is indented with a tab"),
    "latin.yaml": (b"model:\n  x: caf\xe9\n", "is no text in UTF-8"),
    "binary.yaml": (bytes(range(32)), "is no YAML"),
    "twice.yaml": (b"data:\n  a: 1\n  a: 2\n", "line 3: a stands twice"),
    "broken.yaml": (b"data: {a: [1", "line 1 is no YAML"),
    "deep.json": (b"[" * 5000 + b"]" * 5000, "nested too deeply"),
    "circle.yaml": (
        b"root: ${seed_everything}\nseed_everything: ${root}\n",
        ".*ecursive interpolation",
    ),
    "nowhere.yaml": (b"model: {init_args: {cut: '${no.where}'}}", r"model.init_args.cut: .*no\.w"),
    "space.yaml": (b"data:\n$  cut: 0.5\n", r"there is no key '\$ +cut': keys have no spaces"),
    "typo.yaml": (b"modle: {init_args: {cut: 1}}", "there is no key modle.init_args.cut"),
}  # fmt: skip
FUNCTION = "reward=domains.layout.rewards.FunctionReward"
MISTAKES = {
    "model.cutt=1": "model.init_args.cutt: PGRAFT has no such argument; did you mean cut",
    "model.learning_rate=1e-4": "PGRAFT has no such argument; did you mean model.optimizer.lr",
    "model.optimizer.learning_rate=1": "its class has no .*; did you mean model.optimizer.lr",
    "model.optimizer.weight_decy=1": "optimizer.init_args.weight_decy: its class has no such arg",
    "model.guidance_scale=4": "did you mean pipeline.guidance_scale",
    "model.lora.foo=3": "lora.init_args.foo: LoRA has no such argument; it has rank, alpha",
    f"{FUNCTION} --reward.function=own.nothing": "own has no nothing",
    f"{FUNCTION} --reward.function=owm.score": "there is no module owm; put owm.py into",
    "reward=own.Failss": "own has no Failss; did you mean Fails",
    "model.cut=[1]": r"model.init_args.cut is '\[1\]', but must be float",
    "model.sampler.num_st=3": r"model: it has no argument sampler.num_st; see --model.help",
    "trainer.max_ep=1": "there is no option --trainer.max_ep=1",
    "model.selection=TopKK": "selection: there is no class TopKK; did you mean TopK",
    "model.selection.k=x": "model.init_args.selection.init_args.k is 'x', but must be int",
    "model.lora.rank=x": "model.init_args.lora.rank is 'x', but must be int or null",
    "trainer.max_epochs=many": "trainer.max_epochs is 'many', but must be int or null",
    "trainer.accelerator=quantum": "trainer.accelerator: .*'quantum'",
    "trainer.strategy=warp": "trainer.strategy warp has not been tested; use ddp, or --config fsdp",
    "trainer.val_check_interval=99": "trainer.val_check_interval: .*99",
    "seed_everything=-1": "seed_everything: -1",
    "model.optimizer.lr=-1": "model.init_args.optimizer.init_args.lr: .*-1",
    "data=LayoutData": "data: LayoutData is of the domain layout, but .* such as MixtureData",
    "reward=Symmetry": "reward: Symmetry is of the domain text_to_image, but .* such as Coordinate",
    "metrics.parts=[LayoutMeasures]": "metrics.parts.0: LayoutMeasures is of the domain layout",
    "reward=LayoutPipeline": "reward",
    "reward=own.Unborn": r"Unborn: its __init__ must begin with super\(\)",
    "reward=own.Named": (
        r"reward.init_args: Named cannot be .* \(AttributeError: property 'name' .* no setter "
        r"\(own.py, line \d+\)\)"
    ),
    "reward=own.Tables": (
        r"reward.init_args: Tables cannot be made .* \(KeyError: 'a' \(own.py, line \d+\)\)"
    ),
    "model=own.UnbornTuner": r"UnbornTuner: its __init__ must begin with super\(\)",
    "model.reward=Coordinate": "model.init_args.reward would be ignored: .*; give --reward",
    "model.init_args.metrics=MMD": r"model.init_args.metrics would .* give --metrics.parts\+",
    "reward=own.Unfinished": "reward: the class is abstract",
    "model.optimizer=bits_of_bytes.optim.AdamW8bit": (
        "model.init_args.optimizer: bits_of_bytes.optim.AdamW8bit cannot be imported: "
        "there is no module bits_of_bytes; put bits_of_bytes.py into this folder .*pip install"
    ),
    "reward=raises.Any": r"reward: raises.Any cannot be imported: ZeroDivision.*raises.py, line 2",
    "trainer=3": "trainer",
    "metrics=3": "metrics",
    "nothing=1": "there is no option --nothing=1",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "raises.py").write_text("import torch\nx = 1 / 0\n")


def error(*words: str) -> str:
    with pytest.raises(SystemExit) as raised:
        main(["fit", *TINY, *words])
    message = raised.value.code
    assert isinstance(message, str)
    return message


@pytest.mark.parametrize("name", FILES)
def test_configs_that_are_none(name: str) -> None:
    content, sentence = FILES[name]
    Path(name).write_bytes(content)
    message = error(f"--config={name}")
    assert re.match(f"lit-rlft: error: .*{sentence}", message) and len(message) < 300, message


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_sentence_with_the_key(mistake: str) -> None:
    message = error(*f"--{mistake}".split())
    assert re.fullmatch(f"lit-rlft: error: .*{MISTAKES[mistake]}.*", message), message
    assert len(message) < 300 and not list(Path().rglob("*.ckpt"))


def test_an_error_in_ones_own_reward_shows_its_place_and_keeps_the_state() -> None:
    message = error("--reward=own.Fails", "--trainer.limit_val_batches=0")
    *frames, last = message.splitlines()
    assert re.fullmatch(r"lit-rlft: error: KeyError: 'score' \(own.py, line \d+, in inner\)", last)
    assert 'return {}["score"]' in message and all("site-packages" not in line for line in frames)
    assert checkpoint()["lit_rlft"]["num_rounds"] == 1


def test_a_mistake_in_ones_own_callback_shows_its_place_though_lightning_names_it() -> None:
    message = error("--trainer.callbacks+=own.Detached")
    assert re.search(r"error: RuntimeError: .* not attached .*\(own.py, line \d+, in on_", message)


def test_configs_come_before_options() -> None:
    words = ["fit", "--a", "1", "--config", "x", "--b=2", "-c=y", "--flag", "--config=z"]
    expected = ["fit", "--config", "x", "-c=y", "--config=z", "--a", "1", "--b=2", "--flag"]
    assert configs_first(words) == expected
    assert configs_first(["fit", "--config"]) == ["fit", "--config"]


TORCHS, LIGHTNINGS = (
    "torch.optim.lr_scheduler.ReduceLROnPlateau",
    "lightning.pytorch.cli.ReduceLROnPlateau",
)


@pytest.mark.parametrize(
    ("scheduler", "settings", "monitored", "times"),
    [
        (TORCHS, ["mode=max"], "train/reward", 4),  # two rounds in each of two epochs
        (TORCHS, ["mode=min"], "train/loss", 4),
        (LIGHTNINGS, ["monitor=val/kl", "mode=max"], "val/kl", 2),
    ],
)
def test_a_plateau_lowers_the_learning_rate(
    scheduler: str,
    settings: list[str],
    monitored: str,
    times: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[float] = []
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    taken = plateau.step

    def step(self: Any, value: float) -> None:
        seen.append(value)
        taken(self, 0.0)  # nothing gets better after the first

    monkeypatch.setattr(plateau, "step", step)
    words = ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.001"]
    words += [f"--model.lr_scheduler={scheduler}", "--model.lr_scheduler.patience=0"]
    words += [f"--model.lr_scheduler.{setting}" for setting in settings]
    main(["fit", *words, *TINY, "--trainer.max_epochs=2"])  # options before configs
    assert seen == pytest.approx(scalars()[monitored]) and len(seen) == times
    rate = checkpoint()["optimizer_states"][0]["param_groups"][0]["lr"]
    assert rate == pytest.approx(0.001 * 0.1 ** (times - 1))


def test_a_plateau_of_what_is_never_logged_is_refused() -> None:
    words = [f"--model.lr_scheduler={LIGHTNINGS}", "--model.lr_scheduler.monitor=kl"]
    key = r"model\.init_args\.lr_scheduler\.init_args\.monitor"
    assert re.search(f"{key}: nothing is logged as 'kl'", error(*words))
    words[1] = "--model.lr_scheduler.monitor=val/kl"
    assert re.search(f"{key} is val/kl", error(*words, "--trainer.limit_val_batches=0"))


@pytest.mark.parametrize(
    ("text", "other", "problem"),
    [
        ("pipeline: {pretrained: x}", "graft", "pipeline .* put a domain's config.* --config lay"),
        ("reward: {scale: 2}", "graft", "reward .* put a domain's config"),
        ("data: {batch_size: 4}", "graft", "data .* put a domain's config"),
        ("model: {num_candidates: 4}", "gaussian_mixture", "model .* put an algorithm's config"),
        ("metrics: {parts: [{num_draws: 4}]}", "gaussian_mixture", "metrics.parts .*; give its"),
    ],
)
def test_settings_without_a_class(text: str, other: str, problem: str) -> None:
    Path("own.yaml").write_text(text)
    with pytest.raises(SystemExit, match=problem.replace(" .*", " has settings but no class.*")):
        main(["fit", "--config", "own.yaml", "--config", other])


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("--reward", "HTTPReward", "reward.init_args.url must be given: HTTPReward has no default"),
        ("--data.source", "PubLayNet", "data.init_args.source.init_args.path must be given: PubL"),
    ],
)
def test_arguments_without_default_are_named_by_their_keys(
    option: str, value: str, problem: str
) -> None:
    with pytest.raises(SystemExit, match=re.escape(problem)):
        main(["fit", "--config=layout", "--config=graft", option, value])


@pytest.mark.parametrize("mistake", ["reward=own.Failss", "model.cut=[1]", "reward=raises.Any"])
def test_a_parser_that_is_not_installed_as_a_package_is_quoted_alike(
    mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_rlft.cli.parsing.is_users", lambda _: True)
    test_one_sentence_with_the_key(mistake)


def test_packages_are_known_wherever_they_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, archive, project = (tmp_path / name for name in ("folder", "a.zip", "project"))
    (folder / "made-1.dist-info").mkdir(parents=True)
    (folder / "made-1.dist-info" / "METADATA").write_text("Name: made\n")
    with ZipFile(archive, "w") as file:
        file.writestr("made-1.dist-info/METADATA", "Name: made\n")
    (project / "mine.egg-info").mkdir(parents=True)  # as of an editable package
    (project / "mine.egg-info" / "PKG-INFO").write_text("Name: mine\n")
    for home in (folder, archive, project):
        monkeypatch.syspath_prepend(home)
    for home in (folder, archive):
        assert not is_users(str(home / "made" / "module.py"))
    assert not any(map(is_users, (re.__file__, jsonargparse.__file__, "<string>")))
    assert is_users(str(project / "mine" / "module.py")) and is_users(str(tmp_path / "own.py"))
