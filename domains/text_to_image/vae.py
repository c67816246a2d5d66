"""Pictures from latents and latents from pictures: a frozen VAE that takes some at a time."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from domains.text_to_image.overflow import check_vae, kept_single
from lit_rlft.core.batch_size import BatchSize
from lit_rlft.kit.idle import at_work

__all__ = ["decoded", "encoded"]


def decoded(vae: Any, latents: Tensor, at_a_time: BatchSize, *, idle: bool, again: bool) -> Tensor:
    """Return pictures [B, 3, H, W], in [-1, 1] up to the VAE's error.

    Args:
        vae: The VAE.
        latents: In its units and precision, [B, C, H / f, W / f].
        at_a_time: How many are decoded at a time.
        idle: Whether the VAE is elsewhere, and comes to the latents' device for its work.
        again: Where gradients flow, decode again in the backward pass and keep the latents alone,
            or the inputs of the VAE's blocks where all go at a time and it computes these again.

    Raises:
        UsageError: Numbers are not finite.
    """
    graph = latents.requires_grad and torch.is_grad_enabled()
    parts = []
    with at_work(vae if idle else None, latents.device, stays=graph):
        for part in at_a_time.parts(len(latents)):
            with part:
                own = latents[part.rows]
                # What blocks that are computed again keep is little, but not that of many pictures.
                by_blocks = len(own) == len(latents) and vae.is_gradient_checkpointing
                parts.append(_decoded(vae, own, again=again and graph and not by_blocks))
    return torch.cat(parts)


def _decoded(vae: Any, latents: Tensor, *, again: bool) -> Tensor:
    def decode(x: Tensor) -> Tensor:
        return vae.decode(x).sample

    with kept_single(vae, latents.device):
        pictures = checkpoint(decode, latents, use_reentrant=False) if again else decode(latents)
        check_vae(pictures, vae, "pictures")
    return pictures


@torch.no_grad()
def encoded(vae: Any, pictures: Tensor, at_a_time: BatchSize, *, idle: bool) -> Tensor:
    """Return the latents that a VAE gives pictures: the mode of each.

    Args:
        vae: The VAE.
        pictures: In its precision, [B, 3, H, W] in [-1, 1].
        at_a_time: How many are encoded at a time.
        idle: Whether the VAE is elsewhere, and comes to the pictures' device for its work.

    Raises:
        UsageError: Numbers are not finite.
    """
    parts = []
    with at_work(vae if idle else None, pictures.device), kept_single(vae, pictures.device):
        for part in at_a_time.parts(len(pictures)):
            with part:
                parts.append(_mode(vae.encode(pictures[part.rows])))
        latents = torch.cat(parts)
        check_vae(latents, vae, "latents of the given pictures")
    return latents


def _mode(given: Any) -> Tensor:
    """Return the mode of what a VAE returned; an AutoencoderDC has no posterior, but latents."""
    latent = getattr(given, "latent", None)
    return given.latent_dist.mode() if latent is None else latent
