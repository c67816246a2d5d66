"""Files of prompts: `.txt`, `.json`, `.jsonl`, `.csv` and `.tsv`."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_rlft.core.checks import UsageError
from lit_rlft.kit.data import Record
from lit_rlft.kit.files import encoding
from lit_rlft.kit.sources import Source

__all__ = ["PromptFile", "read_prompts"]


class PromptFile(Source[list[Record]]):
    """The records of a prompt file.

    Args:
        path: The file.
        column: Key or column of the prompt.
        once: Keep the first record of each prompt alone.
    """

    noun = "prompts"

    def __init__(self, path: str, column: str = "prompt", *, once: bool = False) -> None:
        self.path, self.column, self.once = Path(path), column, once

    @property
    def label(self) -> str:
        return str(self.path)

    def load(self) -> list[Record]:
        records = read_prompts(self.path, self.column)
        kept = _once(records) if self.once else records
        if len(kept) < len(records):
            repeats = len(records) - len(kept)
            rank_zero_info(
                f"{self.path}: {len(kept)} prompts used; {repeats} left out that repeat another, "
                "so that no split sees another's"
            )
        return kept

    def kind(self) -> str:
        return self.noun  # columns may differ from file to file


def read_prompts(path: Path, column: str = "prompt") -> list[Record]:
    """Return the records of a prompt file, all with the same columns, the prompt under "prompt".

    Raises:
        UsageError: The file is missing, empty, of an unknown type, or lacks the column.
    """
    records = _records(path, column)
    columns = dict.fromkeys(name for record in records for name in record)
    texts = ["" if record[column] is None else str(record[column]).strip() for record in records]
    prompts: list[Record] = [
        {**columns, **record, "prompt": text}
        for record, text in zip(records, texts, strict=True)
        if text
    ]
    if not prompts:
        raise UsageError(f"data.init_args.source: {path} holds no prompts")
    # The lines of a .txt that are empty part its prompts; an empty record is a hole.
    if len(prompts) < len(records) and path.suffix.lower() != ".txt":
        empty = [i + 1 for i, text in enumerate(texts) if not text]
        rank_zero_info(
            f"{path}: {len(prompts)} of {len(records)} prompts used; {len(empty)} left out as "
            f"empty (record {', '.join(map(str, empty[:5]))}{', ...' if len(empty) > 5 else ''})"
        )
    return prompts


def _records(path: Path, column: str) -> list[Record]:
    """Return the records of a prompt file as they are, each with the column."""
    # Not splitlines(), which also splits at characters that JSON strings may hold.
    readers: dict[str, Callable[[str], Sequence[Any]]] = {
        ".txt": lambda text: text.split("\n"),
        ".jsonl": lambda text: [json.loads(line) for line in text.split("\n") if line.strip()],
        ".json": json.loads,
        ".csv": lambda text: list(csv.DictReader(io.StringIO(text, newline=""))),
        ".tsv": _tab_separated,
    }
    if path.suffix.lower() not in readers:
        raise UsageError(
            f"data.init_args.source: {path} has an unknown file type; use one of {sorted(readers)}"
        )
    if not path.is_file():
        raise UsageError(f"data.init_args.source: there is no file {path}")
    try:
        records = readers[path.suffix.lower()](path.read_text(encoding=encoding(path)))
    except UnicodeError as error:
        raise UsageError(
            f"data.init_args.source: {path} cannot be read as text ({error}); save it as UTF-8"
        ) from error
    except (ValueError, csv.Error, RecursionError) as error:
        raise UsageError(f"data.init_args.source: {path} cannot be read ({error})") from error
    if not isinstance(records, list) or not all(isinstance(r, (str, dict)) for r in records):
        raise UsageError(f"data.init_args.source: {path} must hold a list of texts or of records")
    records = [{column: r} if isinstance(r, str) else r for r in records]
    missing = next((i for i, record in enumerate(records) if column not in record), None)
    if missing is not None:
        raise UsageError(
            f"data.init_args.column: record {missing + 1} of {path} has no {column!r}, only "
            f"{sorted(map(str, records[missing]))}; set column to the one that holds the prompt"
        )
    return records


def _once(records: list[Record]) -> list[Record]:
    first: dict[str, Record] = {}
    for record in records:
        first.setdefault(record["prompt"], record)
    return list(first.values())


def _tab_separated(text: str) -> list[dict[str, str]]:
    # Without quoting, as the format has it: PartiPrompts begin with quotation marks of their own.
    lines = io.StringIO(text, newline="")
    return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
