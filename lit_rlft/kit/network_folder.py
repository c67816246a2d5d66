"""Pretrained networks: found by name, folder or hub id; kept as JSON and safetensors."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_rlft.core.checks import UsageError, loading

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "check_one_given",
    "load_pretrained",
    "load_weights",
    "read_settings",
    "save_network",
]

CONFIG, WEIGHTS = "config.json", "model.safetensors"

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
    shipped = embedded / pretrained
    source = str(shipped) if not Path(pretrained).exists() and shipped.exists() else pretrained
    with loading(f"{key}: {pretrained!r} could not be loaded as {kind}; give {give}"):
        return read(source)


def check_one_given(pretrained: str | None, architecture: object | None) -> None:
    """Raise UsageError where a pretrained network and sizes of a new one are both given."""
    if pretrained is not None and architecture is not None:
        raise UsageError(
            "pipeline.init_args: pretrained and architecture exclude each other; set pretrained "
            "to null to train a network of your own"
        )


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
    weights = network.state_dict()
    merged = {name: _merged(network, name, weights) for name in plain.state_dict()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.to("cpu", dtype).contiguous() for name, value in merged.items()},
        folder / WEIGHTS,
    )
    (folder / CONFIG).write_text(json.dumps(asdict(architecture), indent=2) + "\n")
    return [folder / CONFIG, folder / WEIGHTS]


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the network in a folder."""
    return json.loads((folder / CONFIG).read_text())


def load_weights(network: N, folder: Path) -> N:
    """Load a folder's weights into a network, in single precision; it may be on the meta device."""
    network.load_state_dict(load_file(folder / WEIGHTS), assign=True)
    return network.float()


def _merged(network: nn.Module, name: str, weights: dict[str, Tensor]) -> Tensor:
    if name in weights:
        return weights[name].detach()
    # An adapted layer is linear, whatever it is made of: its values give its weight.
    layer_name, _, kind = name.rpartition(".")
    layer = network.get_submodule(layer_name)
    weight = next(iter(layer.parameters()))
    eye = torch.eye(_num_inputs(layer), dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        offset = layer(torch.zeros_like(eye[:1]))[0]
        return offset if kind == "bias" else (layer(eye) - offset).T


def _num_inputs(layer: nn.Module) -> int:
    (inner,) = (m for n, m in layer.named_modules() if n.endswith("base_layer"))
    assert isinstance(inner, nn.Linear)
    return inner.in_features
