"""Encodings of prompts on disk, so that a later run need not run the text encoders."""

import contextlib
import copy
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from domains.text_to_image import EMBEDDED
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.network_folder import source_of

__all__ = ["EmbeddingCache", "identity"]

_KEY = "pipeline.init_args.embedding_cache"
_FORMAT = "lit-rlft prompt embedding 1"


class EmbeddingCache:
    """One safetensors file per model and prompt in a folder; several runs may share it.

    A file that is damaged, or is of something else, counts as absent.

    Args:
        folder: Created where missing.
        model: All that the encodings depend on beside the prompt; it can be written as JSON.
        shapes: Shapes of one prompt's encodings, by name.

    Raises:
        UsageError: The folder is a file.
    """

    def __init__(
        self, folder: Path, model: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{_KEY}: {folder} is a file; give a folder, or null for no cache")
        self.folder, self.shapes = folder, dict(shapes)
        self.model = _digest(json.dumps([_FORMAT, model, self.shapes], sort_keys=True))

    def under(self, autocast: torch.dtype | None) -> "EmbeddingCache":
        """Return the cache of what the same text encoders make under autocast; None is none."""
        if autocast is None:
            return self
        other = copy.copy(self)
        other.model = _digest(json.dumps([self.model, f"autocast {autocast}"]))
        return other

    def path(self, prompt: str) -> Path:
        """Return where a prompt's encodings are or would be."""
        key = _digest(json.dumps([self.model, prompt]))
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, prompt: str) -> dict[str, Tensor] | None:
        """Return a prompt's encodings by name, without a row; None where there are none."""
        path = self.path(prompt)
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata() or {}
                tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        if {name: tuple(table.shape) for name, table in tables.items()} != self.shapes:
            return None
        return tables if told == self._metadata(prompt, tables) else None

    def write(self, prompt: str, tables: Mapping[str, Tensor]) -> None:
        """Keep a prompt's encodings.

        Raises:
            UsageError: The folder cannot be written, or the disk is full.
        """
        own = {name: table.detach().cpu().clone() for name, table in tables.items()}
        path = self.path(prompt)
        content = save(own, self._metadata(prompt, own))
        # A name of its own: another process may be writing the same prompt. What a power failure
        # leaves half written does not match its checksum.
        draft = path.with_name(f"{path.stem}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(content)
            os.replace(draft, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            raise UsageError(
                f"{_KEY}: {self.folder} cannot be written ({error.strerror or error}); make room "
                "there, give another folder, or null for no cache"
            ) from error

    def _metadata(self, prompt: str, tables: Mapping[str, Tensor]) -> dict[str, str]:
        digest = hashlib.sha256()
        for name in sorted(tables):
            digest.update(name.encode())
            digest.update(tables[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return {
            "format": _FORMAT,
            "model": self.model,
            "prompt": prompt,
            "sha256": digest.hexdigest(),
        }


def identity(source: str, folders: Sequence[str]) -> list[Any]:
    """Return what tells a model's text encoders from others: its files, or its commit of the hub.

    Args:
        source: A folder, a file, an embedded model's name or a hub id.
        folders: In a folder, where the text encoders and their tokenizers are.

    Raises:
        UsageError: A hub id whose commit is not known.
    """
    path = Path(source_of(source, EMBEDDED))
    if path.exists():
        return [str(path.resolve()), *(list(_facts(file)) for file in _files(path, folders))]
    found = try_to_load_from_cache(source, "model_index.json")
    if not isinstance(found, str):
        raise UsageError(
            f"{_KEY}: the hub's commit of {source!r} is not known, so its encodings cannot be told "
            "from another version's; give a folder of the model, or null for no cache"
        )
    return [source, Path(found).parent.name]


def _files(path: Path, folders: Sequence[str]) -> Iterator[Path]:
    if path.is_file():
        yield path
    for folder in folders:
        yield from sorted(file for file in (path / folder).rglob("*") if file.is_file())


def _facts(file: Path) -> tuple[str, str, int, int]:
    told = file.stat()
    return file.parent.name, file.name, told.st_size, told.st_mtime_ns


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
