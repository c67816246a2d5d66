"""The inverted noise of a data set on disk: shards that are checked, read in place and mended.

A shard is one `.npy` file per field, float32, and a JSON file with their checksums, which is
written last: a shard without it, or whose checksums are others, does not count and is made anew.
"""

import errno
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.state import State

__all__ = ["InvertedNoise"]

_TENSOR = "x_1"
"""Name of the file where the state is a tensor."""
_TOLERANCE = 1e-3


class InvertedNoise:
    """States of the rows of a data set.

    Args:
        folder: Where the shards are; seen by all processes.
        num_rows: Rows of the data set.
        shard_size: Rows of a shard; the last one has fewer.
    """

    def __init__(self, folder: Path, num_rows: int, shard_size: int) -> None:
        self.folder, self.num_rows, self.shard_size = folder, num_rows, shard_size
        self._open: dict[int, dict[str, NDArray[np.float32]]] = {}

    @property
    def num_shards(self) -> int:
        """How many shards there are when all are finished."""
        return math.ceil(self.num_rows / self.shard_size)

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Note what the noise belongs to, or check that it belongs to just that.

        Args:
            identity: Values that JSON can hold; floating-point numbers may differ a little.

        Raises:
            UsageError: The folder holds noise that belongs to something else, or is not writable.
        """
        path = self.folder / "noise.json"
        identity = {**identity, "num_rows": self.num_rows, "shard_size": self.shard_size}
        if not path.is_file():
            self._write(path, json.dumps(identity, indent=2).encode(), finished=0)
            return
        held = json.loads(path.read_text())
        other = [name for name, value in identity.items() if not _same(held.get(name), value)]
        if other:
            raise UsageError(
                f"{self.folder} holds the inverted noise of something else (other {other[0]}); "
                "delete the folder or choose another model.init_args.noise_folder"
            )

    def rows(self, shard: int) -> range:
        """Return the rows of a shard."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.num_rows))

    def finished(self, shard: int) -> bool:
        """Return whether a shard is there, to the last bit as it was written."""
        try:
            sums = self.notes(shard)["checksums"]
            return all(sums[name] == _checksum(self.folder / name) for name in sums)
        except (OSError, ValueError, KeyError):
            return False

    def notes(self, shard: int) -> dict[str, Any]:
        """Return what was noted of a finished shard."""
        return json.loads(self._notes_path(shard).read_text())

    def write(self, shard: int, x_1: State, notes: Mapping[str, Any], finished: int) -> None:
        """Write a shard; whoever reads it before the end does not find it.

        Args:
            shard: Its number.
            x_1: Its rows' states.
            notes: What to note of it, values that JSON can hold.
            finished: Number of shards finished by now, to tell where the disk is full.

        Raises:
            UsageError: The disk is full; what was finished before stays.
        """
        fields = {_TENSOR: x_1} if isinstance(x_1, Tensor) else x_1
        sums = {}
        self._notes_path(shard).unlink(missing_ok=True)
        for field, values in fields.items():
            path = self.folder / f"{shard:05d}.{field}.npy"
            self._write(path, values.detach().float().cpu().numpy(), finished)
            sums[path.name] = _checksum(path)
        text = json.dumps({**notes, "checksums": sums})
        self._write(self._notes_path(shard), text.encode(), finished)
        self._open.pop(shard, None)

    def read(self, rows: Tensor) -> State:
        """Return the states of some rows, [B, ...] float32 on the CPU, in their order."""
        shards, places = (rows // self.shard_size).tolist(), (rows % self.shard_size).tolist()
        picked = [
            {field: values[place] for field, values in self._shard(shard).items()}
            for shard, place in zip(shards, places, strict=True)
        ]
        fields = {
            field: torch.from_numpy(np.stack([row[field] for row in picked])) for field in picked[0]
        }
        return fields[_TENSOR] if list(fields) == [_TENSOR] else fields

    def all_notes(self) -> Iterator[dict[str, Any]]:
        """Iterate over the notes of all shards."""
        yield from map(self.notes, range(self.num_shards))

    def _shard(self, shard: int) -> dict[str, NDArray[np.float32]]:
        if shard not in self._open:
            names = self.notes(shard)["checksums"]
            self._open[shard] = {
                name.split(".")[1]: np.load(self.folder / name, mmap_mode="r") for name in names
            }
        return self._open[shard]

    def _notes_path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.json"

    def _write(self, path: Path, content: bytes | NDArray[Any], finished: int) -> None:
        partial = path.with_name(f"{path.name}.partial")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content if isinstance(content, bytes) else _npy(content))
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            problem = "the disk is full" if full else f"the folder cannot be written ({error})"
            raise UsageError(
                f"{self.folder}: {problem} after {finished} of {self.num_shards} shards of "
                "inverted noise, which are kept; make room and run the same command again, or "
                "choose another model.init_args.noise_folder"
            ) from error


def _npy(values: NDArray[Any]) -> bytes:
    # Not straight into the file: numpy's own error does not say that the disk is full.
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _same(held: Any, value: Any) -> bool:
    if isinstance(value, list):
        return isinstance(held, list) and len(held) == len(value) and all(map(_same, held, value))
    if isinstance(value, float) and isinstance(held, float):
        return math.isclose(held, value, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return bool(held == value)
