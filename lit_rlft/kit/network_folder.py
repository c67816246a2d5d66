"""Pretrained networks: found by name, folder or hub id; kept as JSON and safetensors."""

import copy
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import load_file, save_file
from torch import nn

from lit_rlft.core.checks import UsageError, loading
from lit_rlft.kit.hub import hub_errors

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "WEIGHT_FILE",
    "SaveDtype",
    "check_one_given",
    "forget_source",
    "found_variant",
    "load_pretrained",
    "load_weights",
    "merged",
    "read_settings",
    "save_network",
]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_CONFIGS = (CONFIG, "model_index.json", "scheduler_config.json")

_ADAPTED = ".base_layer"
"""How peft names the layer within an adapted one."""
_PIECE = r"-\d{5}-of-\d{5}"
WEIGHT_FILE = re.compile(
    rf"(?:diffusion_pytorch_model|pytorch_model|model)(?:{_PIECE})?"
    rf"(?:\.(?P<variant>[A-Za-z0-9_]+)(?:{_PIECE})?)?\.(?:safetensors|bin)"
)
"""A file of weights as diffusers and transformers name it, whole or in pieces."""

N = TypeVar("N", bound=nn.Module)
T = TypeVar("T")


def load_pretrained(
    pretrained: str,
    embedded: Path,
    read: Callable[[str], T],
    *,
    kind: str,
    give: str,
    key: str = "pipeline.init_args.pretrained",
) -> T:
    """Load a network from a folder or file, by an embedded model's name, or by a hub id.

    Args:
        pretrained: What the user gave. A path that exists comes before an embedded model.
        embedded: Folder of the models that ship with the domain, by their names.
        read: Reads a path; gets `pretrained` itself where neither of the two exists.
        kind: What is read, with its article, e.g. "a layout model".
        give: What to give instead, for the message.
        key: The setting, for the message.

    Raises:
        UsageError: Reading failed.
    """
    source = source_of(pretrained, embedded)
    try:
        sentence = f"{key}: {pretrained!r} could not be loaded as {kind}; give {give}"
        with loading(sentence), hub_errors(source, key):
            return read(source)
    except UsageError as error:
        other = str(error).startswith("pipeline.") and not str(error).startswith(key)
        if other or pretrained in str(error):
            raise
        raise UsageError(f"{key}: {pretrained!r} is damaged: {error}") from None


def source_of(pretrained: str, embedded: Path) -> str:
    """Return the path of an embedded model by its name; a path that exists comes before it.

    Args:
        pretrained: A path, an embedded model's name or a hub id.
        embedded: Folder of the models that ship with a domain, by their names.

    Returns:
        The path, or `pretrained` itself where there is none.
    """
    shipped = embedded / pretrained
    return str(shipped) if not Path(pretrained).exists() and shipped.exists() else pretrained


def check_one_given(pretrained: str | None, architecture: object | None) -> None:
    """Raise UsageError where a pretrained network and sizes of a new one are both given."""
    if pretrained is not None and architecture is not None:
        raise UsageError(
            "pipeline.init_args: pretrained and architecture exclude each other; set pretrained "
            "to null to train a network of your own"
        )


SaveDtype = Literal["float32", "float16", "bfloat16"]
"""Precisions in which weights are written."""


def save_network(network: nn.Module, folder: Path, dtype: torch.dtype) -> list[Path]:
    """Write a network into a folder; a LoRA is merged into the weights.

    Args:
        network: Made of its `architecture` alone, a dataclass of settings.
        folder: Created where missing.
        dtype: Precision of the file.

    Returns:
        The files.
    """
    architecture: Any = network.architecture
    with torch.device("meta"):
        plain = type(network)(architecture)
    weights = merged(network).state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: weights[name].to("cpu", dtype).contiguous() for name in plain.state_dict()},
        folder / WEIGHTS,
    )
    config = json.dumps(asdict(architecture), indent=2)
    (folder / CONFIG).write_text(f"{config}\n", encoding="utf-8")
    return [folder / CONFIG, folder / WEIGHTS]


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the network in a folder."""
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def load_weights(network: N, folder: Path) -> N:
    """Load a folder's weights into a network, in single precision; it may be on the meta device."""
    network.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    return network.float()


def merged(network: N) -> N:
    """Return a copy of a network with its LoRA, if it has one, added to the weights."""
    plain = copy.deepcopy(network)
    inner = [name for name, _ in plain.named_modules() if name.endswith(_ADAPTED)]
    for name in [name.removesuffix(_ADAPTED) for name in inner]:
        layer: Any = plain.get_submodule(name)  # one of peft's
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(plain.get_submodule(parent), own, layer.get_base_layer())
    return plain


def forget_source(folder: Path) -> None:
    """Take out of a folder that diffusers wrote where on this machine its parts came from."""
    for path in sorted(folder.rglob("*.json")):
        if path.name in _CONFIGS:
            config = json.loads(path.read_text(encoding="utf-8"))
            if config.pop("_name_or_path", None) is not None:
                path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def found_variant(folder: Path, parts: Sequence[str] = ("",), *, quiet: bool = False) -> str | None:
    """Return which variant of its weights, such as "fp16", to load from a diffusers folder.

    Args:
        folder: Holds files such as `unet/diffusion_pytorch_model.fp16.safetensors`.
        parts: Sub-folders with weights, "" for the folder itself; those that are missing count
            for nothing.
        quiet: Do not say which one is loaded.

    Returns:
        None where no part lacks plain weights, or where there are none at all.

    Raises:
        UsageError: A part without plain weights has several variants.
    """
    common: set[str] | None = None
    for part in parts:
        names = [path.name for path in (folder / part).glob("*") if path.is_file()]
        variants = {match["variant"] for name in names if (match := WEIGHT_FILE.fullmatch(name))}
        if variants and None not in variants:
            common = variants if common is None else common & variants
    if not common:
        return None
    if len(common) > 1:
        raise UsageError(
            f"pipeline.init_args.pretrained: {folder} has no plain weights but the variants "
            f"{', '.join(sorted(common))}; set pipeline.init_args.variant to one of them"
        )
    (variant,) = common
    if not quiet:
        rank_zero_info(f"{folder} holds the variant {variant} of its weights alone: loading it")
    return variant
