"""What a checkpoint holds: trained weights, counters, and which pretrained model they belong to."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_rlft.core.checks import UsageError

if TYPE_CHECKING:
    from lit_rlft.algorithms.base import RewardFineTuner

__all__ = ["check_file", "fingerprint", "reduce", "restore"]

_LIGHTNING_NAMES = ("last", "best", "hpc")
"""What Lightning looks up by itself."""
_COUNTERS = ("num_rounds", "num_samples", "num_updates")


def check_file(path: str | None) -> None:
    """Check a checkpoint before anything else is loaded.

    Raises:
        UsageError: The file is missing, or it was not written by lit-rlft.
    """
    if path is None or path in _LIGHTNING_NAMES:
        return
    if not Path(path).is_file():
        raise UsageError(f"--ckpt_path: there is no file {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(f"--ckpt_path: {path} is no checkpoint of lit-rlft") from error
    if not isinstance(checkpoint, dict) or "lit_rlft" not in checkpoint:
        raise UsageError(f"--ckpt_path: {path} is no checkpoint of lit-rlft; it names no pipeline")


def fingerprint(module: nn.Module) -> str:
    """Hash the names, shapes and first numbers of a network's weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in module.named_parameters():
        head = parameter.detach().flatten()[:16].double().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}{head.tolist()}".encode())
    return digest.hexdigest()


def reduce(checkpoint: dict[str, Any], tuner: RewardFineTuner) -> None:
    """Drop the frozen weights; add counters, running statistics and the fingerprint."""
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: state[name] for name in _trained_names(tuner)}
    checkpoint["lit_rlft"] = {
        "pretrained": tuner.pretrained,
        "pipeline": tuner.pipeline.name,
        "cost": tuner.cost.as_dict(),
        **{name: getattr(tuner, name) for name in _COUNTERS},
        **{name: part.state_dict() for name, part in tuner.statistics().items()},
    }


def restore(checkpoint: dict[str, Any], tuner: RewardFineTuner) -> None:
    """Restore the counters and the running statistics.

    Raises:
        UsageError: The checkpoint belongs to another pretrained model or another adapter.
    """
    ours = checkpoint.get("lit_rlft")
    if ours is None:
        raise UsageError("--ckpt_path is no checkpoint of lit-rlft: it names no pipeline")
    if ours["pretrained"] != tuner.pretrained:
        raise UsageError(
            f"--ckpt_path was tuned from other weights ({ours['pipeline']!r}) than this pipeline "
            f"has ({tuner.pipeline.name!r}); set pipeline.init_args to what it was tuned from"
        )
    own = tuner.state_dict()
    expected = {name: own[name].shape for name in _trained_names(tuner)}
    if {name: value.shape for name, value in checkpoint["state_dict"].items()} != expected:
        raise UsageError(
            "--ckpt_path holds other trained weights than this model has; use the algorithm and "
            "the lora settings (rank, targets) it was trained with"
        )
    for name in _COUNTERS:
        setattr(tuner, name, ours[name])
    for name, part in tuner.statistics().items():
        part.load_state_dict(ours.get(name, {}))
    vars(tuner.cost).update(ours["cost"])


def _trained_names(tuner: RewardFineTuner) -> list[str]:
    trained = {id(p) for p in tuner.trainable().parameters() if p.requires_grad}
    return [name for name, p in tuner.named_parameters() if id(p) in trained]
