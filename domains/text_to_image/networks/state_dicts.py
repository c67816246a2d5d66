"""Published state dicts: found, read without running code, and loaded with every key named."""

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import cached_file

__all__ = [
    "check_has",
    "collapsed",
    "load_all",
    "model_of",
    "read_checkpoint",
    "read_state_dict",
    "weight_file",
]

_CHECKPOINTS = ("model.safetensors", "pytorch_model.bin")
"""Names under which transformers saves weights, whole or, with an index, in several files."""


def weight_file(source: str, name: str) -> Path:
    """Return the path of a file of weights, downloaded from the hub where it is not here.

    Args:
        source: The file, a folder that holds it, a hub id, or a hub id with the path of the file
            behind it ("owner/model/weights.pt").
        name: The file's name in a folder or in the hub's repository.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return path / name
    owner, model, *inside = source.split("/", 2) if source.count("/") else ("", source)
    if not owner or path.is_absolute() or source.startswith("."):
        raise FileNotFoundError(f"there is no file {source}")
    return Path(hf_hub_download(f"{owner}/{model}", inside[0] if inside else name))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by their names, on the CPU.

    Reads safetensors, and what torch.save wrote, of which no code is run; tensors under the key
    "state_dict" are taken from there.

    Raises:
        ValueError: The file holds anything else.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        read = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            "the file is damaged or holds Python objects, whose code is never run; save the "
            "tensors alone: torch.save(model.state_dict(), path)"
        ) from error
    if isinstance(read, Mapping) and isinstance(read.get("state_dict"), Mapping):
        read = read["state_dict"]
    if not isinstance(read, Mapping) or not all(isinstance(v, Tensor) for v in read.values()):
        raise ValueError("it is no state dict: a mapping from names to tensors")
    return dict(read)


def read_checkpoint(source: str) -> dict[str, Tensor]:
    """Return all tensors of a model of transformers, whose weights may be in several files.

    Args:
        source: A folder or a hub id.

    Raises:
        FileNotFoundError: It has no weights.
        ValueError: A file holds anything else.
    """
    for name in _CHECKPOINTS:
        if whole := _find(source, name):
            return read_state_dict(whole)
        if index := _find(source, f"{name}.index.json"):
            state: dict[str, Tensor] = {}
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            for part in sorted(set(places.values())):
                if (path := _find(source, part)) is None:
                    raise FileNotFoundError(f"{part}, which its {index.name} names, is not there")
                state |= read_state_dict(path)
            return state
    raise FileNotFoundError(f"it has neither {' nor '.join(_CHECKPOINTS)}")


def _find(source: str, name: str) -> Path | None:
    found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def check_has(state: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Raise ValueError, naming the first one, unless a state dict has all of some keys."""
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"it lacks {missing[0]}, so it is of another model")


def load_all(
    network: nn.Module, weights: Mapping[str, Tensor], named: Mapping[str, str] | None = None
) -> None:
    """Load weights into a network that may be on the meta device; all have to be given and used.

    Args:
        network: Whose weights they become, in single precision.
        weights: By the network's own names.
        named: The names in the file by the network's own, for messages.

    Raises:
        ValueError: Keys are missing, or others are there; the first of each is named.
    """
    _check(network.state_dict(), weights, named or {})
    network.load_state_dict({n: v.float() for n, v in weights.items()}, assign=True)


def model_of(
    kind: Any,
    config: Any,
    weights: Mapping[str, Tensor],
    named: Mapping[str, str],
    dtype: torch.dtype,
) -> Any:
    """Return a model of transformers with given weights; all have to be given and used.

    Args:
        kind: Its class.
        config: Its sizes.
        weights: By the model's own names.
        named: The names in the file by the model's own, for messages.
        dtype: Precision of the weights.

    Raises:
        ValueError: Keys are missing, or others are there; the first of each is named.
    """
    with torch.device("meta"):
        wanted = kind(config).state_dict()
    _check(wanted, weights, named)
    return kind.from_pretrained(None, config=config, state_dict=dict(weights), dtype=dtype)


def _check(
    wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor], named: Mapping[str, str]
) -> None:
    """Raise ValueError unless the weights are those that are wanted."""
    problems = [
        f"{verb} {named.get(names[0], names[0])}" + (f" and {more} more" if more else "")
        for verb, names in (
            ("lacks", [name for name in wanted if name not in weights]),
            ("has an unknown", [name for name in weights if name not in wanted]),
        )
        if names
        for more in [len(names) - 1]
    ]
    problems += [
        f"has {named.get(name, name)} of shape {tuple(weights[name].shape)} instead of "
        f"{tuple(value.shape)}"
        for name, value in wanted.items()
        if name in weights and weights[name].shape != value.shape
    ][:1]
    if problems:
        raise ValueError("it " + ", and it ".join(problems))


def collapsed(layers: list[tuple[Tensor, Tensor]]) -> nn.Linear:
    """Return the one layer that a chain of linear layers without activations amounts to.

    Args:
        layers: Weight [out, in] and bias [out] of each, the first first; the last has one output.

    Raises:
        ValueError: The layers do not fit each other.
    """
    weight, bias = (value.double() for value in layers[0])
    for w, b in layers[1:]:
        if w.shape[1] != weight.shape[0]:
            raise ValueError(f"a layer takes {w.shape[1]} numbers where {weight.shape[0]} come")
        weight, bias = w.double() @ weight, w.double() @ bias + b.double()
    if weight.shape[0] != 1:
        raise ValueError(f"its last layer gives {weight.shape[0]} numbers instead of one score")
    head = nn.Linear(weight.shape[1], 1, device="meta")
    head.load_state_dict({"weight": weight.float(), "bias": bias.float()}, assign=True)
    return head
