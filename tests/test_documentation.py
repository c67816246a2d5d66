"""The documentation tells the truth: its commands and code run, its links lead somewhere.

Code and commands of the README, the first steps and the how-tos are run at a tiny size, page by
page and in order; those of the other pages are parsed. What cannot run here is listed with its
reason.
"""

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from lit_rlft.cli import main
from tests.support import TINY_RUN, TINY_SPLITS

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FIRST_STEPS = ("start", "how_to")
DOCUMENTS = [*(ROOT / n for n in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")), *PAGES]
RUN = [
    page
    for page in DOCUMENTS
    if page.name == "README.md" or page.parent.name in ("start", "how_to")
]
PARSED = [page for page in PAGES if page not in RUN]
NOT_RUN = {
    "pip install": "installs the package, as this environment has it",
    "make ": "each target is run by continuous integration or takes minutes",
    "tensorboard": "serves until it is stopped",
    "lit-rlft vote": "serves until it is stopped; tests/voting starts and ends it",
    "--name taste": "its fit waits for a person; tests/voting votes in such runs",
    "--config sd15": "needs models of the hub; test_families.py runs tiny ones in their places",
    "--config sdxl": "needs models of the hub; test_recipes.py runs tiny ones in their places",
    "qm9_pretrain": "needs QM9's archive; test_configs.py runs it on a made one",
    "publaynet_pretrain": "needs PubLayNet; test_configs.py runs it on a made one",
    "my_docking.affinity": "needs a program; test_top_molecules.py runs one in its place",
    "--config ddp": "takes all GPUs; two processes are run by the next",
    "--trainer.devices 2": "starts processes; the tests of two processes run the same",
}
"""Parts of commands that are not run here, and why; they are parsed where they are ours."""
CODE_NOT_RUN = (
    "stable-diffusion-v1-5",
    "runs/sd15/tuned",
    "pipe.load_lora_weights",
    "pipe.encode_prompt",
)
"""Parts of code that needs a model of the hub; tests/inference runs the same on tiny ones."""
SAME_KIND = (
    "--name darker",
    "--name longer",
    "--name pairs",
    "--name both",
    "--name late",
    " runs/late",
)
"""Commands that run only among slow tests: others of the same page are of their kind."""

READERS = ("list", "report", "compare", "vote")
"""Commands that need no model and take no configs."""

TINY = [
    *TINY_RUN,
    "--trainer.limit_val_batches=0",
    "--trainer.limit_test_batches=1",
    "--trainer.limit_predict_batches=1",
]
TINY_PYTHON = {
    "batch_size=96": "batch_size=2",
    "batch_size=64": "batch_size=2",
    "num_steps=20": "num_steps=2",
    "Trainer(max_epochs=1": "Trainer(max_epochs=1, accelerator='cpu', limit_train_batches=1, "
    "limit_val_batches=1, limit_test_batches=1, enable_progress_bar=False",
}
"""What makes Python code quick."""


class Block(NamedTuple):
    """A fenced block of a page: its language and its lines."""

    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The name of the file that the block's first line says it is."""
        named = re.match(r"# (\w+\.(?:py|yaml))\b", self.text)
        return named[1] if named else None

    @property
    def commands(self) -> list[str]:
        if self.language not in ("bash", "console", "sh"):
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.split("  #")[0].strip() for line in lines if line.strip()]


def blocks(page: Path) -> list[Block]:
    fenced = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [Block(*block) for block in fenced]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT).with_suffix(""))


def has_same_kind(page: Path) -> bool:
    return any(command.endswith(SAME_KIND) for block in blocks(page) for command in block.commands)


def config_files(args: Sequence[str]) -> Iterator[Path]:
    """Return the files that a command's --config options name."""
    for option, value in pairwise(args):
        if option != "--config" or Path(value).is_file():
            continue
        found = [ROOT / value] if value.startswith("configs/") else CONFIGS.rglob(f"{value}.yaml")
        found = [path for path in found if path.is_file()]
        assert len(found) == 1, f"no config is named {value}"
        yield from found


def tiny(args: Sequence[str]) -> list[str]:
    """Return what makes a command quick."""
    loaded = [yaml.safe_load(path.read_text()) for path in config_files(args)]
    own = [value for option, value in pairwise(args) if option == "--data"]
    kinds = own or [config["data"]["class_path"] for config in loaded if "data" in config]
    splits = TINY_SPLITS.get(kinds[-1].rpartition(".")[2], ())
    flags = [*TINY, *(f"--data.init_args.{split}" for split in splits)]
    if "--trainer.max_epochs" not in args:
        flags.append("--trainer.max_epochs=1")
    if kinds[-1].endswith("LayoutData") and "--data.source" not in args:
        flags.append("--data.init_args.source.init_args.num_pages=64")
    if "drtune" in args:
        flags += [f"--model.init_args.method.init_args.{s}" for s in ("k=1", "m=1")]
    if "--model.window" in args:
        flags += ["--model.init_args.window=[0,2]", "--model.init_args.num_train_steps=1"]
    return flags


def call(args: Sequence[str]) -> None:
    """Run the command line; leaving with status 0 is success."""
    try:
        main(list(args))
    except SystemExit as end:
        if end.code:
            raise


def parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Parse one of our commands; of others check that the script is there."""
    args = shlex.split(command)
    if args[0] == "python":
        assert (ROOT / args[1]).is_file(), command
    if args[0] != "lit-rlft" or args[1] in READERS or args[1].startswith("-"):
        return
    list(config_files(args))
    call([*args[1:], "--print_config"])
    assert "model:" in capsys.readouterr().out


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory with the files that pages take for granted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na red ring\na red cross\n")
    smiles = ["C", "CC", "CCC", "CO", "CCO", "CN", "CCN", "COC", "CC=O", "C=O", "C#N", "CC#N"]
    (tmp_path / "my.csv").write_text("\n".join(["smiles", *smiles]) + "\n")
    boxes = [{"label": "text", "box": [50, 50 + 90 * i, 400, 80]} for i in range(4)]
    pages = [{"canvas": [600, 800], "elements": boxes[: 1 + i % 4]} for i in range(20)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, pages)))
    (tmp_path / "flowers").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 255, (9, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"flowers/{i}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("page", "every"),
    [
        pytest.param(page, every, id=name(page) + every * "-all", marks=[pytest.mark.slow] * every)
        for page in RUN
        if blocks(page)
        for every in ((False, True) if has_same_kind(page) else (False,))
    ],
)
def test_code_and_commands_run(
    page: Path, every: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for block in blocks(page):
        if block.file:
            (folder / block.file).write_text(block.text)
        elif block.language == "python" and any(part in block.text for part in CODE_NOT_RUN):
            compile(block.text, str(page), "exec")
        elif block.language == "python":
            run_python(block.text)
        for command in block.commands:
            skipped = any(part in command for part in NOT_RUN)
            if skipped or (command.endswith(SAME_KIND) and not every):
                parse(command, capsys)
            elif command.startswith("lit-rlft"):
                args = shlex.split(command)[1:]
                runs = args[0] in ("fit", "validate", "test", "predict")
                call([*args, *(tiny(args) if runs and "--print_config" not in args else ())])
            else:
                raise AssertionError(f"neither run nor listed in NOT_RUN: {command}")


def run_python(text: str) -> dict[str, Any]:
    for usual, quick in TINY_PYTHON.items():
        text = text.replace(usual, quick)
    names: dict[str, Any] = {"__name__": "block"}
    exec(compile(text, "block", "exec"), names)
    return names


@pytest.mark.parametrize("page", [page for page in PARSED if blocks(page)], ids=name)
def test_commands_of_other_pages_are_understood(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for block in blocks(page):
        for command in block.commands:
            parse(command, capsys)
        if block.language == "python":
            compile(block.text, str(page), "exec")


@pytest.mark.parametrize("page", DOCUMENTS, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name(page)} links to {target}"
        assert not anchor or anchor in anchors(found), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", DOCUMENTS, ids=name)
def test_named_configs_exist(page: Path) -> None:
    for path in re.findall(r"\bconfigs/[\w/]+\.yaml", page.read_text()):
        assert (ROOT / path).is_file(), f"{name(page)} names {path}"


def without_code(text: str) -> str:
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as Python-Markdown and GitHub make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title).strip().lower() for title in titles]
    return {re.sub(r"[-\s]+", "-", title) for title in plain}


def test_every_config_is_documented() -> None:
    words = " ".join(page.read_text() for page in PAGES)
    for folder in ("algorithms", "domains"):
        for path in (CONFIGS / folder).glob("*.yaml"):
            assert f"`{path.stem}`" in words or f"--config {path.stem}" in words, path.stem


def test_tables_name_what_is_there() -> None:
    assert all(reason for reason in NOT_RUN.values())
    commands = [c for page in RUN for b in blocks(page) for c in b.commands]
    for part in [*NOT_RUN, *SAME_KIND]:
        assert any(part in command for command in commands), f"{part} is in no page"
