"""The printed commands of the benchmarks start: their modules are found, their options exist."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(BENCHMARKS.rglob("*.md")),
    *sorted(BENCHMARKS.rglob("*.py")),
]
COMMAND = re.compile(r"python3? ((?:-m benchmarks\.|benchmarks/)(?:[^\n`#]*\\\n)*[^\n`#]*)")


class Command(NamedTuple):
    """A printed command: by "-m" or by its path, of which file, with what options."""

    as_module: bool
    path: Path
    options: tuple[str, ...]


def commands() -> Iterator[Command]:
    for document in DOCUMENTS:
        for text in COMMAND.findall(document.read_text(encoding="utf-8")):
            words = shlex.split(text.replace("\\\n", " "))
            as_module = words[0] == "-m"
            name = words[1].replace(".", "/") if as_module else words[0].removesuffix(".py")
            path = ROOT / name / "__main__.py" if (ROOT / name).is_dir() else ROOT / f"{name}.py"
            options = [word.split("=")[0] for word in words if word.startswith("--")]
            yield Command(as_module, path, tuple(options))


PRINTED = sorted(set(commands()))


def imported(path: Path) -> set[str]:
    """Return the names of all modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # "from benchmarks import name" imports a module of that name, if there is one.
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def siblings(path: Path) -> dict[str, Path]:
    """Return the benchmarks that a file imports, by the names it has for them."""
    found = {}
    for name in imported(path):
        place = BENCHMARKS.joinpath(*name.removeprefix("benchmarks.").split("."))
        for candidate in (place.with_suffix(".py"), place / "__init__.py"):
            if candidate.is_file():
                found[name] = candidate
    return found


def reached(path: Path) -> dict[Path, set[str]]:
    """Return a file and all benchmarks that it imports, with the names used for each."""
    found: dict[Path, set[str]] = {path: set()}
    left = [path]
    while left:
        for name, sibling in siblings(left.pop()).items():
            if sibling not in found:
                left.append(sibling)
            found.setdefault(sibling, set()).add(name)
    return found


def test_all_are_found() -> None:
    assert {path.stem for _, path, _ in PRINTED} >= {"fair_comparison", "step_inverse", "__main__"}
    options = {option for command in PRINTED for option in command.options}
    assert {"--base-only", "--data.batch_size"} <= options, "options after a line's end"


@pytest.mark.parametrize("command", PRINTED, ids=lambda c: f"{c.path.stem}{' '.join(c.options)}")
def test_printed_command_starts(command: Command) -> None:
    """Python puts a script's own folder on the path; with "-m" the folder it is started in."""
    assert command.path.is_file()
    files = reached(command.path)
    names = set().union(*files.values())
    packaged = {name for name in names if name.startswith("benchmarks.")}
    wrong = names - packaged if command.as_module else packaged
    assert not wrong, f"{command.path.name}, started in that way, does not find {sorted(wrong)}"
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    own = [option for option in command.options if "." not in option]
    assert not [option for option in own if f'"{option}"' not in source]
