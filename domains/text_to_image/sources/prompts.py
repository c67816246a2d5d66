"""Files of prompts: `.txt`, `.json`, `.jsonl`, `.csv` and `.tsv`.

Records are kept as bytes, of which a table says where each one is. Those of a large file are
written to the user's cache folder once, and mapped into memory by every process from then on.
"""

import csv
import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TextIO, overload

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import PAIR
from lit_rlft.kit.cache import cached_folder, user_cache
from lit_rlft.kit.data import Record
from lit_rlft.kit.distinct import text_number
from lit_rlft.kit.files import encoding, stamps
from lit_rlft.kit.sources import Source

__all__ = ["PromptFile", "Records", "read_prompts"]

_LARGE = 1 << 22
"""Bytes of a file from which on its records are kept on disk."""
_FORMAT = "lit-rlft prompts 2"
_OURS = frozenset({"index", PAIR})
"""Columns that batches have of their own."""


class Records(Sequence[Record]):
    """Records that are read from bytes when they are asked for; all have the same columns.

    Args:
        text: uint8, the records as JSON.
        spans: int64 [n, 2], where each record begins and ends.
        columns: Names of the columns; what a record lacks is None.
        column: That of the prompt, which is also found under "prompt".
    """

    def __init__(
        self,
        text: NDArray[np.uint8],
        spans: NDArray[np.int64],
        columns: Sequence[str],
        column: str,
    ) -> None:
        self.text, self.spans, self.column = text, spans, column
        self.columns: Record = dict.fromkeys(columns)

    def __len__(self) -> int:
        return len(self.spans)

    @overload
    def __getitem__(self, i: int) -> Record: ...

    @overload
    def __getitem__(self, i: slice) -> Sequence[Record]: ...

    def __getitem__(self, i: int | slice) -> Record | Sequence[Record]:
        if isinstance(i, slice):
            return Records(self.text, self.spans[i], list(self.columns), self.column)
        start, end = self.spans[i]
        record = json.loads(self.text[start:end].tobytes())
        return {**self.columns, **record, "prompt": _prompt(record[self.column])}


class PromptFile(Source[Records]):
    """The records of a prompt file.

    Args:
        path: The file.
        column: Key or column of the prompt.
        once: Keep the first record of each prompt alone.
        cache_dir: Where the records of a large file are kept; None takes `lit-rlft/prompts` in the
            user's cache folder.
    """

    noun = "prompts"

    def __init__(
        self,
        path: str,
        column: str = "prompt",
        *,
        once: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        self.path, self.column, self.once = Path(path), column, once
        self.cache_dir = user_cache("prompts", cache_dir)

    @property
    def label(self) -> str:
        return str(self.path)

    def prepare(self) -> None:
        if self._large:
            self._folder()

    def load(self) -> Records:
        if not self._large:
            return _read(self.path, self.column, once=self.once)
        folder = self._folder()
        told = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        for line in told["said"]:
            rank_zero_info(line)
        text = np.memmap(folder / "text", mode="r")
        spans = np.load(folder / "spans.npy", mmap_mode="r")
        return Records(text, spans, told["columns"], self.column)

    def kind(self) -> str:
        return self.noun  # columns may differ from file to file

    @property
    def _large(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size >= _LARGE

    def _folder(self) -> Path:
        """Return the folder of the packed records, which is made where there is none."""
        facts = [_FORMAT, str(self.path.resolve()), stamps([self.path]), self.column, self.once]
        digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()

        def fill(partial: Path) -> None:
            with (partial / "text").open("wb") as file:
                packed = _pack(self.path, self.column, file, once=self.once)
            np.save(partial / "spans.npy", packed.spans)
            about = {"columns": packed.columns, "said": packed.said}
            (partial / "about.json").write_text(json.dumps(about), encoding="utf-8")

        return cached_folder(self.cache_dir / f"{self.path.stem}-{digest}", fill)


def read_prompts(path: Path, column: str = "prompt") -> list[Record]:
    """Return the records of a prompt file, all with the same columns, the prompt under "prompt".

    Raises:
        UsageError: The file is missing, empty, of an unknown type, or lacks the column.
    """
    return list(_read(path, column, once=False))


def _read(path: Path, column: str, *, once: bool) -> Records:
    file = BytesIO()
    packed = _pack(path, column, file, once=once)
    for line in packed.said:
        rank_zero_info(line)
    text = np.frombuffer(file.getvalue(), dtype=np.uint8)
    return Records(text, packed.spans, packed.columns, column)


@dataclass(frozen=True)
class _Packed:
    """What is known of records that were written as bytes.

    Attributes:
        spans: int64 [n, 2], where each record begins and ends.
        columns: Names of the columns of all of them.
        said: What to tell of those that were left out.
    """

    spans: NDArray[np.int64]
    columns: list[str]
    said: list[str]


def _pack(path: Path, column: str, file: BinaryIO, *, once: bool) -> _Packed:
    """Write the records of a prompt file one after the other, without those that are empty."""
    columns: dict[str, None] = {}
    spans, numbers, empty, total = array("q"), array("q"), array("q"), 0
    for total, record in enumerate(_records(path, column), start=1):
        columns.update(dict.fromkeys(record))
        for name in _OURS - {column}:
            record.pop(name, None)
        if not (prompt := _prompt(record[column])):
            empty.append(total)
            continue
        start = spans[-1] if spans else 0
        spans.extend((start, start + file.write(json.dumps(record).encode())))
        if once:
            numbers.append(text_number(prompt))
    found = np.array(spans, dtype=np.int64).reshape(-1, 2)
    if not len(found):
        raise UsageError(f"{path} holds no prompts")
    ours = sorted(_OURS & columns.keys() - {column})
    said = [f"{path}: the column {name!r} is left out, a name that batches use" for name in ours]
    # The lines of a .txt that are empty part its prompts; an empty record is a hole.
    if empty and path.suffix.lower() != ".txt":
        said.append(
            f"{path}: {len(found)} of {total} prompts used; {len(empty)} left out as "
            f"empty (record {', '.join(map(str, empty[:5]))}{', ...' if len(empty) > 5 else ''})"
        )
    kept = found
    if once:
        _, first = np.unique(np.array(numbers, dtype=np.int64), return_index=True)
        kept = found[np.sort(first)]
    if repeats := len(found) - len(kept):
        said.append(
            f"{path}: {len(kept)} prompts used; {repeats} left out that repeat another, "
            "so that no split sees another's"
        )
    return _Packed(kept, [name for name in columns if name not in ours], said)


def _prompt(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _records(path: Path, column: str) -> Iterator[Any]:
    """Iterate over the records of a prompt file as they are, each with the column."""
    # Lines end at "\n" alone: JSON strings may hold other characters that part lines.
    readers: dict[str, Callable[[TextIO], Iterable[Any]]] = {
        ".txt": lambda file: (line.removesuffix("\n") for line in file),
        ".jsonl": lambda file: (json.loads(line) for line in file if line.strip()),
        ".json": _listed,
        ".csv": csv.DictReader,
        # Without quoting, as the format has it: PartiPrompts begin with quotation marks.
        ".tsv": lambda file: csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE),
    }
    if path.suffix.lower() not in readers:
        raise UsageError(f"{path} has an unknown file type; use one of {sorted(readers)}")
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        with path.open(encoding=encoding(path)) as file:
            for i, record in enumerate(readers[path.suffix.lower()](file)):
                yield _checked(record, i, path, column)
    except UnicodeError as error:
        raise UsageError(f"{path} cannot be read as text ({error}); save it as UTF-8") from error
    except UsageError:
        raise
    except (ValueError, csv.Error, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({error})") from error


def _listed(file: TextIO) -> list[Any]:
    records = json.load(file)
    return records if isinstance(records, list) else [None]


def _checked(record: Any, i: int, path: Path, column: str) -> dict[str, Any]:
    if not isinstance(record, str | dict):
        raise UsageError(f"{path} must hold a list of texts or of records")
    if isinstance(record, str):
        return {column: record}
    if any(record.pop(None, ())):  # where `csv` puts fields beyond the header
        tabs = path.suffix.lower() == ".tsv"
        remedy = "texts cannot hold tabs" if tabs else "put texts with commas in quotes"
        raise UsageError(f"record {i + 1} of {path} has more fields than its header; {remedy}")
    if column not in record:
        raise UsageError(
            f"record {i + 1} of {path} has no {column!r}, only {sorted(map(str, record))}; set "
            "data.init_args.column to the one that holds the prompt"
        )
    return record
