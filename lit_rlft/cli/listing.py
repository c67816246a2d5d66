"""`lit-rlft list`: what there is, read from the sources without importing them."""

import ast
import re
import shutil
import sys
import textwrap
from argparse import ArgumentError, ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from lit_rlft.cli.index import Entry, index, sentence_of
from lit_rlft.cli.packages import domain_packages, modules
from lit_rlft.cli.paths import packaged_configs
from lit_rlft.cli.words import nearest
from lit_rlft.core.checks import UsageError

__all__ = ["is_of", "listing", "run"]

Row = tuple[str, ...]
_CLASS_PATH = re.compile(r"class_path:\s*([\w.]+)")
_GAP = 2
_MAX_CELL = 16
_MIN_TEXT = 24
"""Columns that descriptions have at least."""


def run(words: Sequence[str]) -> None:
    """Print what `lit-rlft list` was asked for.

    Raises:
        UsageError: There is no such kind of thing, or no such domain.
    """
    about = "Show what there is to choose from: a name, a line, and the configs that use it."
    parser = ArgumentParser("lit-rlft list", description=about, exit_on_error=False)
    parser.add_argument("what", nargs="?", metavar=" | ".join(_SECTIONS), help="all unless given")
    parser.add_argument("--domain", help="only what belongs to a domain, e.g. molecule")
    try:
        asked, odd = parser.parse_known_args(words)
    except ArgumentError as error:
        raise UsageError(f"lit-rlft list: {error}; `lit-rlft list --help` shows how") from error
    if odd:
        raise UsageError(
            f"lit-rlft list: {' '.join(odd)} is one too many; give one of {', '.join(_SECTIONS)}, "
            "and --domain NAME"
        )
    print(listing(asked.what, asked.domain))


def listing(what: str | None = None, domain: str | None = None) -> str:
    """Return tables of what there is, as wide as the terminal.

    Args:
        what: Kind of thing, as the command takes it; None for all kinds.
        domain: Name of the domain that it belongs to; None for all.

    Raises:
        UsageError: Either is unknown.
    """
    _check("list of", what, _SECTIONS)
    _check("domain", domain, domain_packages())
    sections = [what] if what else list(_SECTIONS)
    tables = []
    for section in sections:
        with_any = what in ("algorithms", "selections")  # which go with any domain
        header, rows = _SECTIONS[section](None if with_any else domain)
        if rows or what:
            title = "" if what else f"{section.upper()}\n"
            tables.append(title + _table(header, rows))
    return "\n\n".join(tables)


def _check(what: str, name: str | None, known: Iterable[str]) -> None:
    if name is None or name in known:
        return
    close = nearest(name, known)
    hint = f"did you mean {close}? " if close else ""
    raise UsageError(f"there is no {what} {name!r}; {hint}there are {', '.join(known)}")


def _algorithms(domain: str | None) -> tuple[Row, Sequence[Row]]:
    return ("name", "configs", ""), [
        (one.name, ", ".join(_users(one, "algorithms")), one.summary)
        for one in _entries("algorithm", None)
        if domain is None
    ]


def _domains(domain: str | None) -> tuple[Row, Sequence[Row]]:
    rows = []
    for name, package in domain_packages().items():
        if domain in (None, name):
            pipelines = _entries("pipeline", name)
            configs = [config for one in pipelines for config in _users(one, "domains")]
            summary = _summary(package)
            data = [one.name for one in _entries("data", name)]
            classes = ", ".join([*(one.name for one in pipelines), *data])
            rows.append((name, ", ".join(configs), f"{summary} ({classes})"))
    return ("name", "configs", "(pipelines, data)"), rows


def _rewards(domain: str | None) -> tuple[Row, Sequence[Row]]:
    rows = []
    for one in _entries("reward", domain):
        configs = ", ".join(_users(one, "domains"))
        text = f"{one.summary} [{configs}]" if configs else one.summary
        rows.append((one.name, one.gradient, one.domain or "any", text))
    return ("name", "gradient", "domain", "[configs that use it]"), rows


def _metrics(domain: str | None) -> tuple[Row, Sequence[Row]]:
    rows = [(m.name, m.domain or "any", m.summary) for m in _entries("metric", domain)]
    return ("name", "domain", "(every reward is a metric too)"), rows


def _selections(domain: str | None) -> tuple[Row, Sequence[Row]]:
    found = _entries("selection", None) if domain is None else []
    return ("name", ""), [(one.name, one.summary) for one in found]


def _configs(domain: str | None) -> tuple[Row, Sequence[Row]]:
    rows, package = [], domain_packages()[domain] if domain else ""
    for path in packaged_configs():
        named = _class_paths(path)
        if any(name.startswith(package) for name in named or [""]):
            rows.append((path.stem, path.parent.name, _comment(path) or _classes(named)))
    return ("name", "folder", ""), rows


_SECTIONS: dict[str, Callable[[str | None], tuple[Row, Sequence[Row]]]] = {
    "algorithms": _algorithms,
    "domains": _domains,
    "rewards": _rewards,
    "metrics": _metrics,
    "selections": _selections,
    "configs": _configs,
}


def _entries(kind: str, domain: str | None) -> list[Entry]:
    found = [one for one in index() if one.kind == kind and domain in (None, one.domain)]
    # A container of the other metrics, which every run has.
    return [one for one in found if one.name != "Metrics"]


def _users(entry: Entry, folder: str) -> list[str]:
    """Return the configs of a folder that use a class, by name."""
    paths = [path for path in packaged_configs() if path.parent.name == folder]
    return [path.stem for path in paths if any(is_of(one, entry) for one in _class_paths(path))]


def is_of(path: str, entry: Entry) -> bool:
    """Return whether a dotted path is that of a class, where it is defined or re-exported."""
    package, _, name = path.rpartition(".")
    return name == entry.name and f"{entry.module}.".startswith(f"{package}.")


@cache
def _class_paths(config: Path) -> frozenset[str]:
    return frozenset(_CLASS_PATH.findall(config.read_text(encoding="utf-8")))


def _classes(paths: Iterable[str]) -> str:
    return ", ".join(sorted(path.rpartition(".")[2] for path in paths))


def _comment(config: Path) -> str:
    """Return the comment that describes a config, below the command in its first line."""
    lines = config.read_text(encoding="utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    first = 1 if lines[0].startswith("# lit-rlft ") else 0
    return sentence_of(" ".join(line[1:].strip() for line in lines[first:end]))


def _summary(package: str) -> str:
    path = modules(package).get(package)
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path else None
    return sentence_of(docstring or "")


def _table(header: Row, rows: Sequence[Row]) -> str:
    """Return aligned columns; the last one's text goes on below itself."""
    name, *others = zip(header, *rows, strict=True)
    widths = [max(map(len, name)), *map(_width, others[:-1])]
    total = shutil.get_terminal_size().columns if sys.stdout.isatty() else 80
    rest = max(_MIN_TEXT, total - sum(widths) - _GAP * len(widths))
    lines = [line for row in [header, *rows] for line in _lines(row, [*widths, rest])]
    return "\n".join(lines)


def _width(cells: Iterable[str]) -> int:
    """Return the width of a column in which names stay whole."""
    cells = list(cells)
    longest = max(len(word) for cell in cells for word in [*cell.split(), ""])
    return max(longest, min(_MAX_CELL, max(map(len, cells))))


def _lines(row: Row, widths: Sequence[int]) -> Iterator[str]:
    cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, widths, strict=True)]
    for i in range(max(map(len, cells))):
        parts = [cell[i] if i < len(cell) else "" for cell in cells]
        padded = [part.ljust(width + _GAP) for part, width in zip(parts, widths, strict=True)]
        yield "".join(padded).rstrip()
