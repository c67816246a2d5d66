"""Whether a diffusers folder is whole and holds no code, before anything is loaded."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_rlft.core.checks import UsageError, from_json
from lit_rlft.kit.network_folder import WEIGHT_FILE
from lit_rlft.kit.weight_file import check_file, start_problem

__all__ = ["check_whole", "refuse_code", "refuse_pickles"]

_INDEX = re.compile(r".*\.index(?:\.(?P<variant>\w+))?\.json")
"""A list of the files that weights in pieces are in."""
_LIBRARIES = ("diffusers", "transformers", None)
"""What a pipeline's parts are of; those of None are left out."""
_NOT_LOADED = ("safety_checker", "_ignore_files")
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


def refuse_code(index: Mapping[str, Any], source: str, key: str) -> None:
    """Raise UsageError where a pipeline's parts are not of diffusers and transformers.

    Classes of other modules may be code that lies beside the model; transformers' Auto classes ask
    whether they may run such code.

    Args:
        index: What model_index.json holds.
        source: The folder or hub id that it is of.
        key: The setting that names it.
    """
    for name, part in index.items():
        if not isinstance(part, list | tuple) or name in _NOT_LOADED:
            continue
        library, kind = (*part, None, None)[:2]
        automatic = library == "transformers" and str(kind).startswith("Auto")
        if library not in _LIBRARIES or automatic:
            raise UsageError(
                f"{key}: {source!r} has as its {name} the class {kind} of {library}, but code that "
                "comes with a model is never run; give a model whose parts are classes of "
                f"{' and '.join(filter(None, _LIBRARIES))}"
            )


def refuse_pickles(folder: Path, kind: str, key: str) -> None:
    """Raise UsageError, with the line that converts them, where weights are pickles alone.

    Args:
        folder: A folder with weights as diffusers and transformers name them.
        kind: Class of diffusers that reads them, such as "AutoencoderKL".
        key: The setting that names the folder.
    """
    names = sorted(path.name for path in folder.glob("*") if WEIGHT_FILE.fullmatch(path.name))
    if names and not any(name.endswith(".safetensors") for name in names):
        raise _pickled(folder / names[0], folder, kind, key)


def _pickled(path: Path, whole: Path, kind: str, key: str) -> UsageError:
    return UsageError(
        f"{key}: {path} is a pickle, which can run code, and there is no safetensors file beside "
        f'it; convert the folder: python -c "from diffusers import {kind} as p;'
        f"p.from_pretrained('{whole}').save_pretrained('{whole.name}-safetensors')\""
    )


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
        if path.suffix != ".safetensors" and path.is_file() and start_problem(path) is None:
            raise _pickled(path, folder.parent, "DiffusionPipeline", key)
        _check_weights(path, key)


def _of(folder: Path, kind: re.Pattern[str], variant: str | None) -> list[Path]:
    """Return the files of a kind that are of a variant."""
    matches = {path: kind.fullmatch(path.name) for path in sorted(folder.iterdir())}
    return [path for path, match in matches.items() if match and match["variant"] == variant]


def _json(path: Path, key: str) -> dict[str, Any]:
    """Return what a JSON file holds."""
    try:
        found = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = path.is_file() and start_problem(path)
        what = problem or f"{'is no JSON file' if path.is_file() else 'is missing'}; {_REMEDY}"
        raise UsageError(f"{key}: {path} {what}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{key}: {path} holds no JSON object; {_REMEDY}")
    return found


def _pieces(index: Path, key: str) -> list[str]:
    """Return the names of the files that an index lists."""
    return sorted(set(_json(index, key).get("weight_map", {}).values()))


def _check_weights(path: Path, key: str) -> None:
    if not path.is_file():
        raise UsageError(f"{key}: {path} is missing; {_REMEDY}")
    if path.suffix == ".safetensors":
        check_file(path, key)
    elif problem := start_problem(path):
        raise UsageError(f"{key}: {path} {problem}")
