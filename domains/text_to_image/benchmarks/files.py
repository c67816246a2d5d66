"""Readers of benchmarks' files: a damaged one gives one sentence with file and line."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from lit_rlft.core.checks import UsageError
from lit_rlft.kit.data import Record
from lit_rlft.kit.files import encoding

__all__ = ["lines_of", "refused", "table_of"]


def refused(path: Path, line: int, problem: str) -> UsageError:
    """Return the error of a damaged line."""
    return UsageError(f"line {line} of {path} {problem}; download the file again")


def lines_of(path: Path, *, blank: bool = False) -> list[tuple[int, str]]:
    """Return the lines of a text file, with their numbers from 1.

    Args:
        path: The file.
        blank: Return blank lines too.

    Raises:
        UsageError: It is missing, holds no text, or is none.
    """
    if not path.is_file():
        raise UsageError(
            f"there is no file {path}; the benchmark's page in the documentation says where to "
            "download it"
        )
    try:
        text = path.read_text(encoding=encoding(path))
    except (UnicodeError, OSError) as error:
        raise UsageError(f"{path} cannot be read as text ({error}); download it again") from error
    lines = [(i + 1, line) for i, line in enumerate(text.split("\n"))]
    found = [(i, line.rstrip("\r")) for i, line in lines if blank or line.strip()]
    if not any(line.strip() for _, line in found):
        raise UsageError(f"{path} holds no prompts; download it again")
    return found


def table_of(path: Path, wanted: Mapping[str, Sequence[str]], *, tabs: bool) -> list[Record]:
    """Return the rows of a table with a line of names, a record each.

    Args:
        path: The file.
        wanted: Names that a column may have, by what it is called in the record; whether letters
            are large or small makes no difference.
        tabs: Columns are parted by tabs, and quotation marks are text; otherwise a `.csv`.

    Raises:
        UsageError: A column is missing, or a row is not whole.
    """
    text = "\n".join(line for _, line in lines_of(path, blank=True))
    if tabs:
        reader = csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(io.StringIO(text), strict=True)
    records: list[Record] = []
    places: dict[str, int] = {}
    line = 1
    try:
        for row in reader:
            if not places:
                places = _places(path, row, wanted)
            elif any(cell.strip() for cell in row):
                records.append(_row(path, line, row, places))
            line = reader.line_num + 1
    except csv.Error as error:
        raise refused(path, line, f"cannot be read ({error})") from error
    if not records:
        raise UsageError(f"{path} holds no prompts; download it again")
    return records


def _places(path: Path, names: list[str], wanted: Mapping[str, Sequence[str]]) -> dict[str, int]:
    known = [name.strip().lower() for name in names]
    places = {}
    for column, spellings in wanted.items():
        found = [known.index(one) for one in spellings if one in known]
        if not found:
            raise refused(path, 1, f"names no column {spellings[0].capitalize()!r}, only {names}")
        places[column] = found[0]
    return places


def _row(path: Path, line: int, row: list[str], places: Mapping[str, int]) -> Record:
    record = {}
    for column, place in places.items():
        value = row[place].strip() if place < len(row) else ""
        if not value:
            raise refused(path, line, f"has no {column}")
        record[column] = value
    return record
