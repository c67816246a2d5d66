"""The front door: what it says, and that it does not load what only runs need."""

import subprocess
import sys
from pathlib import Path

import pytest

from lit_rlft import __version__
from lit_rlft.cli import main
from lit_rlft.cli.front import HELP
from tests.support import ROOT

HEAVY = ("torch", "lightning", "jsonargparse", "diffusers", "transformers", "numpy", "rdkit")


def refusal(*words: str) -> str:
    with pytest.raises(SystemExit) as raised:
        main(words)
    message = raised.value.code
    assert isinstance(message, str) and message.startswith("lit-rlft: error: ")
    assert "\n" not in message
    return message


def python(code: str) -> str:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["--version"], ["list"], ["list", "rewards", "--domain", "molecule"]]
)
def test_help_version_and_lists_load_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom lit_rlft.cli import main\n"
        f"main({words!r})\nprint(sorted({set(HEAVY)!r} & set(sys.modules)))"
    )
    assert python(code).splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "words", [["fit", "--config", "shapess"], ["fit", "--model", "PGRAFTT"], ["fitt"]]
)
def test_mistakes_are_told_before_anything_heavy_is_loaded(words: list[str]) -> None:
    code = (
        "import sys\nfrom lit_rlft.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit as error:\n    print(error)\n"
        f"print(sorted({set(HEAVY)!r} & set(sys.modules)))"
    )
    message, loaded = python(code).splitlines()
    assert message.startswith("lit-rlft: error: ") and loaded == "[]"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_speaks_of_this_program(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(words)
    out = capsys.readouterr().out
    assert out == HELP
    for word in ("fit", "validate", "test", "predict", "list", "--config shapes", "--model.help"):
        assert word in out
    assert "Lightning Trainer" not in out


def test_the_commands_that_help_shows_name_configs_and_classes_that_exist() -> None:
    from lit_rlft.cli.names import with_class_paths
    from lit_rlft.cli.paths import with_config_files

    text = HELP.partition("Examples\n")[2].replace("\\\n", " ")
    commands = [line.split() for line in text.splitlines() if line.startswith("  lit-rlft fit")]
    assert len(commands) == 2
    for _, *words in commands:
        found = with_class_paths(with_config_files(words))
        files = [found[i + 1] for i, word in enumerate(found) if word == "--config"]
        assert len(files) == 2 and all(Path(file).is_file() for file in files)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"lit-rlft {__version__}\n"


@pytest.mark.parametrize(
    ("word", "close"), [("fti", "fit"), ("tests", "test"), ("ls", None), ("xyzzy", None)]
)
def test_an_unknown_command_is_refused_with_the_nearest(word: str, close: str | None) -> None:
    message = refusal(word, "--config", "shapes")
    assert f"there is no command '{word}'" in message
    assert (f"did you mean {close}?" in message) == (close is not None)
    assert "fit, validate, test, predict, plan, profile, list" in message


@pytest.mark.parametrize("module", ["lit_rlft", "lit_rlft.cli"])
def test_the_module_runs_as_a_program(module: str) -> None:
    command = [sys.executable, "-m", module, "--version"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.stdout == f"lit-rlft {__version__}\n"


@pytest.mark.parametrize(
    ("command", "usage", "about"),
    [
        ("fit", "fit --config DOMAIN --config ALGORITHM", "Tune a pretrained model with a reward."),
        ("plan", "plan [--memory 24GB] [--flops 165e12] [--share 0.3]", "what a fit would take"),
        ("profile", "profile [--conditions 32] [--candidates 8]", "suggest P-GRAFT's cut."),
    ],
)
def test_help_of_a_command_begins_with_what_it_does(
    command: str, usage: str, about: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main([command, "--help"])
    assert raised.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: lit-rlft {usage}")
    top = " ".join(line.strip() for line in lines[:14])
    assert about in top and "--model.help PGRAFT" in top


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--model.help", "PGRAFT"], "--model.num_candidates"),
        (["--config", "graft", "--model.selection.help", "TopK"], "--selection.k"),
        (["--config", "graft", "--model.optimizer.help", "AdamW"], "--optimizer.betas"),
    ],
)
def test_help_of_a_class_by_its_short_name(
    words: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["fit", *words])
    assert raised.value.code == 0
    assert option in capsys.readouterr().out
