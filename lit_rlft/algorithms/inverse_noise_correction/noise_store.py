"""The inverted noise of a data set on disk: shards that are checked, read in place and repaired.

A shard is one `.npy` file per field, float32, and a JSON file with notes and checksums, which is
written last. What the noise belongs to is in `noise.json`. A shard counts where its checksums are
right and its notes name what `noise.json` names; everything else is inverted again.
"""

import errno
import hashlib
import io
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_rlft.algorithms.inverse_noise_correction.fingerprint import alike
from lit_rlft.core.checks import UsageError, from_json
from lit_rlft.core.state import State
from lit_rlft.runs.files import write_whole

__all__ = ["InvertedNoise"]

_TENSOR = "x_1"
"""Name of the file where the state is a tensor."""


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
        """Note what the noise belongs to, or check that earlier noise belongs to the same.

        A damaged note is written again. Shards that were made for just this identity,
        to the last digit, count again then; others are inverted again.

        Args:
            identity: Values that JSON can hold; numbers in lists may differ by rounding.

        Raises:
            UsageError: The folder holds noise that belongs to something else, or is not writable.
        """
        identity = {**identity, "num_rows": self.num_rows, "shard_size": self.shard_size}
        held = _read(self._claim_path)
        if held is None:
            with self._writing(finished=0):
                write_whole(self._claim_path, json.dumps(identity, indent=2).encode())
            return
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
        """Return whether a shard is there, unchanged to the last bit, and belongs to this noise."""
        held = self._held(shard)
        if held is None or held["claim"] != _file_checksum(self._claim_path):
            return False
        sums = held["checksums"].items()
        return all(value == _file_checksum(self.folder / name) for name, value in sums)

    def notes(self, shard: int) -> dict[str, Any]:
        """Return what was noted of a finished shard.

        Raises:
            UsageError: The notes have been damaged since.
        """
        return self._finished(shard)["notes"]

    def write(self, shard: int, x_1: State, notes: Mapping[str, Any], finished: int) -> None:
        """Write a shard; readers find it only once it is complete.

        Args:
            shard: Its number.
            x_1: Its rows' states.
            notes: What to note of it, values that JSON can hold.
            finished: Number of shards finished by now, for the message when the disk is full.

        Raises:
            UsageError: The disk is full; what was finished before stays.
        """
        fields = {_TENSOR: x_1} if isinstance(x_1, Tensor) else x_1
        # Checksums are those of what is to be written: a file read back may be wrong already.
        files = {
            f"{shard:05d}.{field}.npy": _npy(values.detach().float().cpu().numpy())
            for field, values in fields.items()
        }
        sums = {name: _checksum(content) for name, content in files.items()}
        claim = _file_checksum(self._claim_path)
        held = {"notes": dict(notes), "claim": claim, "checksums": sums}
        with self._writing(finished):
            self._notes_path(shard).unlink(missing_ok=True)
            for name, content in files.items():
                write_whole(self.folder / name, content)
            text = json.dumps({**held, "digest": _digest(held)})
            write_whole(self._notes_path(shard), text.encode())
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
            names = self._finished(shard)["checksums"]
            self._open[shard] = {
                name.split(".")[1]: np.load(self.folder / name, mmap_mode="r") for name in names
            }
        return self._open[shard]

    def _finished(self, shard: int) -> dict[str, Any]:
        held = self._held(shard)
        if held is None:
            raise UsageError(f"{self._notes_path(shard)} is damaged; run the same command again")
        return held

    def _held(self, shard: int) -> dict[str, Any] | None:
        """Return the content of a shard's notes, None where they are not as they were written."""
        held = _read(self._notes_path(shard))
        if held is None or held.pop("digest", None) != _digest(held):
            return None
        return held

    @property
    def _claim_path(self) -> Path:
        return self.folder / "noise.json"

    def _notes_path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.json"

    @contextmanager
    def _writing(self, finished: int) -> Iterator[None]:
        """Make the folder; turn the block's errors in writing to it into one sentence."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
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


def _read(path: Path) -> dict[str, Any] | None:
    """Return a JSON object; None where the file is missing, cannot be read or is something else."""
    try:
        content = from_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _digest(content: Any) -> str:
    return _checksum(json.dumps(content, sort_keys=True).encode())


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content).hexdigest()[:32]


def _file_checksum(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    except OSError:
        return None


def _same(held: Any, value: Any) -> bool:
    if isinstance(value, list) and isinstance(held, list):
        return all(isinstance(number, int | float) for number in held) and alike(held, value)
    return bool(held == value)
