"""What a checkpoint holds: trained weights, counters, and the pretrained model it belongs to."""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from lit_rlft.core.checks import UsageError
from lit_rlft.loop.checkpoint_file import check_file

__all__ = ["Kept", "check_file", "fingerprint", "read", "reduce", "trained_shapes"]


class Kept(Protocol):
    """What a resumed run needs beside the weights, such as an advantage's statistics."""

    def state_dict(self) -> dict[str, Any]:
        """Return its state: tensors and plain values by name."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; nothing for {}."""


def fingerprint(module: nn.Module) -> str:
    """Hash the names, shapes and first numbers of a network's weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in module.named_parameters():
        head = parameter.detach().flatten()[:16].double().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}{head.tolist()}".encode())
    return digest.hexdigest()


def trained_shapes(module: nn.Module, trained: Iterable[nn.Parameter]) -> dict[str, torch.Size]:
    """Return the shapes of a module's trained parameters by their names in its checkpoints."""
    ids = {id(parameter) for parameter in trained}
    return {name: p.shape for name, p in module.named_parameters() if id(p) in ids}


def reduce(checkpoint: dict[str, Any], trained: Collection[str], ours: Mapping[str, Any]) -> None:
    """Drop the frozen weights from a checkpoint; add what a resumed run needs.

    Args:
        checkpoint: As Lightning made it.
        trained: Names of the weights to keep.
        ours: What to add, plain data: at least "pretrained" and "pipeline", which `read` compares.
    """
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: state[name] for name in trained}
    checkpoint["lit_rlft"] = dict(ours)


def read(
    checkpoint: Mapping[str, Any], pretrained: str, pipeline: str, shapes: Mapping[str, torch.Size]
) -> dict[str, Any]:
    """Return what `reduce` added to a checkpoint that belongs to this model.

    Args:
        checkpoint: As it was loaded.
        pretrained: Fingerprint of the pretrained denoiser.
        pipeline: Name of the pipeline.
        shapes: Shapes of the trained parameters, by name.

    Raises:
        UsageError: The checkpoint belongs to another pretrained model or another adapter.
    """
    ours: dict[str, Any] | None = checkpoint.get("lit_rlft")
    if ours is None:
        raise UsageError("the checkpoint is none of lit-rlft: it names no pipeline")
    if ours["pretrained"] != pretrained:
        # Of one name: the same model with other settings, or a pipeline that was tuned before.
        anew = ", or make a new pipeline if this one was tuned" * (ours["pipeline"] == pipeline)
        raise UsageError(
            f"the checkpoint was tuned from other weights ({ours['pipeline']!r}) than this "
            f"pipeline has ({pipeline!r}); set pipeline.init_args to what it was tuned from{anew}"
        )
    if {name: value.shape for name, value in checkpoint["state_dict"].items()} != shapes:
        raise UsageError(
            "the checkpoint holds other trained weights than this model has; use the algorithm and "
            "the lora settings (rank, targets) it was trained with"
        )
    return ours
