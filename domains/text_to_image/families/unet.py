"""Families with a U-Net: Stable Diffusion 1.x and 2.x, and Stable Diffusion XL."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from domains.text_to_image.families.base import Family, Tables
from domains.text_to_image.families.checks import (
    clip_problems,
    latent_problems,
    missing,
    unet_problems,
)
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.schedule import DiscreteVP
from lit_rlft.kit.schedulers import saved_process

__all__ = ["StableDiffusion", "StableDiffusionXL"]


class _UNetFamily(Family):
    denoiser_name = "unet"

    def native(self) -> tuple[int, int] | None:
        size = self.denoiser.config["sample_size"]
        if size is None:
            return None
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def make_process(self) -> GaussianProcess:
        return saved_process(self.parts.scheduler)

    def timestep(self, t: Tensor) -> Tensor:
        """Return what the network is told of times."""
        schedule = self.process.schedule
        assert isinstance(schedule, DiscreteVP)
        return schedule.timestep(t)


class StableDiffusion(_UNetFamily):
    """Stable Diffusion 1.x and 2.x: one CLIP text encoder, cross-attention alone."""

    name = "Stable Diffusion 1.x/2.x"
    pipeline_class = "StableDiffusionPipeline"
    guidance_scale = 7.5

    def problems(self) -> Iterator[str]:
        parts, config = self.parts, self.denoiser.config
        yield from missing(parts, self.needed())
        yield from unet_problems(self.denoiser, (None, "text"))
        yield from clip_problems(parts.text_encoder, parts.tokenizer)
        own = parts.text_encoder.config.hidden_size
        by_text = config["encoder_hid_dim_type"] == "text_proj"
        widths = config["encoder_hid_dim" if by_text else "cross_attention_dim"]
        for width in widths if isinstance(widths, list | tuple) else [widths]:
            if width != own:
                yield (
                    f"its U-Net attends to text features of {width} numbers, its text encoder "
                    f"makes {own}"
                )
        unused = ("shift_factor", "latents_mean", "latents_std")
        channels = (config["in_channels"], config["out_channels"])
        yield from latent_problems(parts.vae, *channels, "U-Net", unused)

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.parts.tokenizer.model_max_length
        return {"embedding": (tokens, self.parts.text_encoder.config.hidden_size)}

    def encode_some(self, prompts: list[str]) -> dict[str, Tensor]:
        device = self.parts.text_encoder.device
        return {"embedding": self.parts.encode_prompt(prompts, device, 1, False)[0]}

    def denoise(
        self, network: nn.Module, x_t: Tensor, t: Tensor, tables: Tables, guidance: float
    ) -> Tensor:
        embedding = tables["embedding"].to(x_t.dtype)
        return network(x_t, self.timestep(t), embedding, return_dict=False)[0]


class StableDiffusionXL(_UNetFamily):
    """Stable Diffusion XL: two CLIP text encoders, a pooled one, and the picture's size.

    Options:
        original_size: Height and width that the model is told the picture had before cropping.
        crop: Top and left corner that it is told of.

    References:
        SDXL (Podell et al., 2023), section 2.2, https://arxiv.org/abs/2307.01952
    """

    name = "Stable Diffusion XL"
    pipeline_class = "StableDiffusionXLPipeline"
    encoder_names = ("text_encoder", "text_encoder_2")
    guidance_scale = 5.0
    option_names: ClassVar[tuple[str, ...]] = ("original_size", "crop")

    def problems(self) -> Iterator[str]:
        parts, config = self.parts, self.denoiser.config
        tokenizers = ("tokenizer", "tokenizer_2")
        yield from missing(parts, self.needed())
        yield from unet_problems(self.denoiser, ("text_time",))
        for which, encoder, tokenizer in zip(
            ("first ", "second "), self.encoder_names, tokenizers, strict=True
        ):
            yield from clip_problems(getattr(parts, encoder), getattr(parts, tokenizer), which)
        own = sum(self._widths)
        if config["cross_attention_dim"] != own:
            yield (
                f"its U-Net attends to text features of {config['cross_attention_dim']} numbers, "
                f"its text encoders make {own}"
            )
        channels = (config["in_channels"], config["out_channels"])
        yield from latent_problems(parts.vae, *channels, "U-Net", ("shift_factor",))

    @property
    def _widths(self) -> list[int]:
        return [getattr(self.parts, name).config.hidden_size for name in self.encoder_names]

    def call_settings(self) -> dict[str, Any]:
        original, crop = (self.options.get(name) for name in ("original_size", "crop"))
        return {"original_size": original, "crops_coords_top_left": crop}

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.parts.tokenizer.model_max_length
        pooled = self.parts.text_encoder_2.config.projection_dim
        return {"embedding": (tokens, sum(self._widths)), "pooled": (pooled,)}

    def encode_some(self, prompts: list[str]) -> dict[str, Tensor]:
        embedding, _, pooled, _ = self.parts.encode_prompt(
            prompts, do_classifier_free_guidance=False
        )
        return {"embedding": embedding, "pooled": pooled}

    def tables(self, prompts: Sequence[str], negative: str | None) -> dict[str, Tensor]:
        """Return zeros for no negative prompt where the model was trained so."""
        tables = super().tables(prompts, negative)
        if negative is None and self.parts.config["force_zeros_for_empty_prompt"]:
            for table in tables.values():
                table[-1] = 0
        return tables

    def denoise(
        self, network: nn.Module, x_t: Tensor, t: Tensor, tables: Tables, guidance: float
    ) -> Tensor:
        embedding, pooled = (tables[name].to(x_t.dtype) for name in ("embedding", "pooled"))
        original = self.options.get("original_size", self.pixels)
        numbers = [*original, *self.options.get("crop", (0, 0)), *self.pixels]
        sizes = torch.tensor([numbers], dtype=x_t.dtype, device=x_t.device)
        added = {"text_embeds": pooled, "time_ids": sizes.expand(len(x_t), -1)}
        return network(
            x_t, self.timestep(t), embedding, added_cond_kwargs=added, return_dict=False
        )[0]

    def to_vae(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std / self.parts.vae.config["scaling_factor"] + mean

    def from_vae(self, encoded: Tensor) -> Tensor:
        mean, std = self._statistics(encoded)
        return (encoded - mean) * self.parts.vae.config["scaling_factor"] / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents, which some VAEs have per channel."""
        config = self.parts.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return like.new_zeros(()), like.new_ones(())
        per_channel = [like.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std)]
        return per_channel[0], per_channel[1]
