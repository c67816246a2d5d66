"""Numbers that are not finite: which part of a text-to-image model made them, and the remedy."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from domains.text_to_image.precision import dtype_name
from lit_rlft.core.checks import UsageError

__all__ = ["autocast_dtype", "check_latents", "check_vae", "kept_single"]

_WEIGHTS = "pipeline.init_args.frozen_dtype"
_VAE = "pipeline.init_args.vae"
_OTHER_VAE = "madebyollin/sdxl-vae-fp16-fix"


def check_latents(
    latents: Tensor, denoiser: nn.Module, encoder: nn.Module | None, encodings: Iterable[Tensor]
) -> None:
    """Check that the latents of some pictures are finite, before they are decoded.

    Args:
        latents: What sampling returned.
        denoiser: The network that made them.
        encoder: The text encoders.
        encodings: The encoded prompts that the denoiser was given.

    Raises:
        UsageError: They are not; it names the text encoder or the denoiser, and the remedy.
    """
    if _finite(latents):
        return
    if not all(map(_finite, encodings)):
        there = encoder is not None and any(True for _ in encoder.parameters())
        own = encoder if encoder is not None and there else denoiser  # encoders may be dropped
        raise UsageError(_sentence("encodings of the prompts", "text encoder", own))
    raise UsageError(_sentence("latents", "denoiser", denoiser))


def check_vae(values: Tensor, vae: nn.Module, what: str) -> None:
    """Check what a VAE made of finite numbers.

    Args:
        values: Its pictures or latents.
        vae: The VAE.
        what: What they are: "pictures" or "latents of the given pictures".

    Raises:
        UsageError: They are not finite; it names the remedy.
    """
    if not _finite(values):
        raise UsageError(_sentence(what, "VAE", vae))


def kept_single(vae: Any, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a VAE that overflows in float16 runs in the single of its weights.

    Without one, autocast of a trainer's 16-mixed would run it in half.

    Args:
        vae: The VAE.
        device: Where it runs.
    """
    half = autocast_dtype(device) == torch.float16
    if half and vae.dtype == torch.float32 and vae.config.get("force_upcast"):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the precision that autocast has on a device; None where it is off."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _finite(values: Tensor) -> bool:
    return bool(values.detach().isfinite().all())


def _sentence(what: str, part: str, network: nn.Module) -> str:
    start = f"{what} are not finite (NaN or infinite)"
    first = next(network.parameters())
    if not all(map(_finite, network.parameters())):
        cause = "its files are damaged, or training diverged (lower the learning rate)"
        return f"{start}: so are weights of the {part}: {cause}"
    by_trainer = autocast_dtype(first.device)
    used = by_trainer or first.dtype
    name = dtype_name(used)
    if used != torch.float16:
        return f"{start}: the {part} overflows even in {name}; take another model or sampler"
    remedy = "trainer.precision to bf16-mixed" if by_trainer else f"{_WEIGHTS} to bfloat16"
    other = f", or {_VAE} to {_OTHER_VAE} for Stable Diffusion XL" if part == "VAE" else ""
    return f"{start}: the {part} overflows in {name}; set {remedy}{other}"
