"""Whether a diffusers folder is whole: nothing half-downloaded, before anything is loaded."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lit_rlft.core.checks import UsageError
from lit_rlft.kit.network_folder import WEIGHT_FILE

__all__ = ["check_whole"]

_POINTER = b"version https://git-lfs"
_INDEX = re.compile(r".*\.index(?:\.(?P<variant>\w+))?\.json")
"""A list of the files that weights in pieces are in."""
_REMEDY = "copy the folder again, or download the model again"


def check_whole(folder: Path, parts: Sequence[str], variant: str | None, key: str) -> None:
    """Raise UsageError where a file of a pipeline's networks is missing or cut off.

    Args:
        folder: A pipeline as `save_pretrained` writes it, with its model_index.json.
        parts: Networks; those that the index does not name, or names as null, are left out.
        variant: Which files of weights are to be loaded; None are the plain ones.
        key: The setting that names the folder.

    Raises:
        UsageError: With the file and what to do.
    """
    index = _json(folder / "model_index.json", key)
    for part in parts:
        if index.get(part) not in (None, [None, None]):
            _check_part(folder / part, variant, key)


def _check_part(folder: Path, variant: str | None, key: str) -> None:
    if not (folder / "config.json").is_file():
        raise UsageError(f"{key}: there is no {folder / 'config.json'}; {_REMEDY}")
    _json(folder / "config.json", key)
    # diffusers takes plain files where a part has none of the variant.
    chosen = _of(folder, WEIGHT_FILE, variant) or _of(folder, WEIGHT_FILE, None)
    chosen = [path for path in chosen if path.suffix == ".safetensors"] or chosen
    indices = _of(folder, _INDEX, variant) or _of(folder, _INDEX, None)
    listed = {folder / name for path in indices for name in _pieces(path, key)}
    if chosen and listed.isdisjoint(chosen):
        listed = set()  # whole files beside an index of others
    if not chosen and not listed:
        kind = "weights" if variant is None else f"weights of the variant {variant}"
        raise UsageError(f"{key}: {folder} has no {kind}; {_REMEDY}")
    for path in sorted({*chosen, *listed}):
        if (problem := next(_file_problems(path), None)) is not None:
            raise UsageError(f"{key}: {path} {problem}; {_REMEDY}")


def _of(folder: Path, kind: re.Pattern[str], variant: str | None) -> list[Path]:
    """Return the files of a kind that are of a variant."""
    matches = {path: kind.fullmatch(path.name) for path in sorted(folder.iterdir())}
    return [path for path, match in matches.items() if match and match["variant"] == variant]


def _json(path: Path, key: str) -> dict[str, Any]:
    """Return what a JSON file holds."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = next(_file_problems(path), "is no JSON file")
        raise UsageError(f"{key}: {path} {problem}; {_REMEDY}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{key}: {path} holds no JSON object; {_REMEDY}")
    return found


def _pieces(index: Path, key: str) -> list[str]:
    """Return the names of the files that an index lists."""
    return sorted(set(_json(index, key).get("weight_map", {}).values()))


def _file_problems(path: Path) -> Iterator[str]:
    """Iterate over what shows that a file did not arrive as a whole."""
    if not path.is_file():
        yield "is missing"
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(len(_POINTER))
        if not size:
            yield "is empty"
        elif head == _POINTER:
            yield "is a Git LFS pointer, not the file itself: `git lfs pull` fetches it"
        elif path.suffix == ".safetensors":
            file.seek(0)
            if (expected := _safetensors_size(file.read(8), file, size)) != size:
                yield f"has {size} of {expected or 'more'} bytes, so its download was cut off"


def _safetensors_size(start: bytes, file: Any, size: int) -> int | None:
    """Return how many bytes a safetensors file should have; None where its header is cut off."""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        return None
    try:
        header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for n, entry in header.items() if n != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None
    return 8 + length + max(ends, default=0)
