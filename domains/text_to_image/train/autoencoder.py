"""Trains the autoencoder of the shapes model: 64 x 64 pictures to 8 x 8 x 4 latents and back.

    python -m domains.text_to_image.train.autoencoder --steps 7000 --seed 0

The objective is L1, MSE on several scales and a light KL term. L1 gives crisp edges and flat areas,
MSE keeps the early network from painting the ground only and teaches colours first, and the KL term
(with the posterior's noise that comes with it) makes the decoder tolerate a diffusion model's small
errors.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022),
    https://arxiv.org/abs/2112.10752
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional
from tqdm import trange

from domains.text_to_image import EMBEDDED
from domains.text_to_image.shapes.world import split_prompts
from domains.text_to_image.train.common import (
    arguments,
    draw,
    save_half,
    update_average,
    warm_up_cosine,
)

# On the mean over latent numbers, beside a mean over pixels: about 1e-6 in the sum over both.
KL_WEIGHT = 2e-4
LEARNING_RATE = 2e-3
CHECKPOINT_INTERVAL = 300


def build_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder, narrow where pictures are large: every sample gets decoded."""
    channels = (16, 16, 32, 64)
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )
    _initialise(autoencoder)
    return autoencoder


@torch.no_grad()
def _initialise(autoencoder: AutoencoderKL) -> None:
    """Keep the signal's size through the depth: torch's default shrinks it and learns late."""
    for name, module in autoencoder.named_modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            gain = 0.5 if name.endswith("conv2") else 1.0
            nn.init.normal_(module.weight, std=gain / math.sqrt(module.weight[0].numel()))
            nn.init.zeros_(module.bias)
    # Nearly no posterior noise at first: noise as large as the latents would drown them.
    autoencoder.quant_conv.weight[4:] = 0
    autoencoder.quant_conv.bias[4:] = -6


def autoencoder_loss(autoencoder: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The objective, and its L1 part in units of pictures in [0, 1]."""
    x = 2 * pictures - 1
    posterior = autoencoder.encode(x).latent_dist
    reconstruction = autoencoder.decode(posterior.sample()).sample
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    l1 = functional.l1_loss(reconstruction, x)
    mse = 2 * functional.mse_loss(reconstruction, x)
    for size in (2, 4, 8):
        blurred = functional.avg_pool2d(reconstruction, size), functional.avg_pool2d(x, size)
        mse = mse + 4 * functional.mse_loss(*blurred)
    return l1 + mse + KL_WEIGHT * kl, l1.detach() / 2


@torch.no_grad()
def reconstruct(autoencoder: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Encode and decode without noise.

    Returns:
        Pictures `[B, 3, 64, 64]` in [0, 1], and their unscaled latents `[B, 4, 8, 8]`.
    """
    pairs = []
    for chunk in torch.split(pictures, 64):
        latents = autoencoder.encode(2 * chunk - 1).latent_dist.mode()
        pairs.append((autoencoder.decode(latents).sample / 2 + 0.5, latents))
    decoded, encoded = zip(*pairs, strict=True)
    return torch.cat(decoded).clamp(0, 1), torch.cat(encoded)


def finish(autoencoder: AutoencoderKL, out: Path, num_pictures: int) -> None:
    """Measure the scaling factor, report held-out error, write fp16 weights."""
    autoencoder.eval()
    _, latents = reconstruct(
        autoencoder, draw(np.random.default_rng(1), split_prompts("train"), num_pictures)[1]
    )
    autoencoder.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    save_half(autoencoder, out)
    _, pictures = draw(np.random.default_rng(2), split_prompts("test"), num_pictures)
    error = (reconstruct(autoencoder, pictures)[0] - pictures).abs().mean()
    means = ", ".join(f"{mean:.2f}" for mean in latents.mean((0, 2, 3)).tolist())
    print(f"held-out L1 {error:.4f}, latent std {latents.std():.3f}, means ({means})", flush=True)


def train(out: Path, num_steps: int, batch_size: int, seed: int) -> None:
    """Train and write the average of the weights, and preliminary ones on the way."""
    torch.manual_seed(seed)
    rng, prompts = np.random.default_rng(seed), split_prompts("train")
    # Channels-last convolutions are a fifth faster here; bf16 is not.
    autoencoder = build_autoencoder().to(memory_format=torch.channels_last)
    average = copy.deepcopy(autoencoder)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = warm_up_cosine(optimizer, num_steps)
    progress = trange(num_steps, mininterval=5)
    for step in progress:
        _, pictures = draw(rng, prompts, batch_size)
        loss, error = autoencoder_loss(autoencoder, pictures)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        update_average(average, autoencoder)
        progress.set_postfix(error=f"{error:.4f}", refresh=False)
        if (step + 1) % CHECKPOINT_INTERVAL == 0 and step + 1 < num_steps:
            finish(average, out, num_pictures=256)
    finish(average, out, num_pictures=2048)


if __name__ == "__main__":
    options = arguments(
        "Train the shapes model's autoencoder.",
        out=EMBEDDED / "shapes" / "vae",
        num_steps=7000,
        batch_size=8,
    )
    train(options.out, options.steps, options.batch_size, options.seed)
