"""FLUX.2-klein: a transformer on patches of 2 x 2 latents, which Qwen3's inner layers describe."""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKLFlux2, DiffusionPipeline
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from domains.text_to_image.families.base import Family, Tables
from domains.text_to_image.families.chat import chat_problems, chat_reader
from domains.text_to_image.families.checks import latent_problems, missing, text_problems
from domains.text_to_image.families.transformers import JOINT_ATTENTION
from domains.text_to_image.networks.texts import Reader
from lit_rlft.core.checks import UsageError
from lit_rlft.core.process import GaussianProcess
from lit_rlft.kit.flow_schedulers import empirical_mu, flow_process

__all__ = ["Flux2Klein"]

_PATCH = 2
_TRAINED_AT = (0.0, 1.0)


class Flux2Klein(Family):
    """FLUX.2-klein: base models with classifier-free guidance, and distilled ones without.

    A state has the latents of a patch as channels, [B, 4 C, H / 2f, W / 2f], in units of the VAE's
    own statistics. An encoding is that of three layers of Qwen3 side by side, of all tokens up to
    `max_sequence_length`, padding too.

    The sampler's shift depends on the number of its steps, as in diffusers. What the model was
    trained at is not published; training times are those of kohya's trainer: logit-normal before a
    shift that is linear in the number of tokens.

    Options:
        max_sequence_length: Tokens of a prompt with the chat around it; 512 unless given.

    References:
        https://github.com/black-forest-labs/flux2
        https://github.com/kohya-ss/musubi-tuner ("flux2_shift")
    """

    name = "FLUX.2-klein"
    pipeline_class = "Flux2KleinPipeline"
    guidance_scale = 4.0
    option_names: ClassVar[tuple[str, ...]] = ("max_sequence_length",)

    def __init__(self, parts: DiffusionPipeline, *args: Any, **options: Any) -> None:
        super().__init__(parts, *args, **options)
        if self._distilled:
            self.guidance_scale = 1.0
        single = range(len(self.denoiser.single_transformer_blocks))
        # In full: what is called attn.to_out in the other blocks is a list of layers.
        self.lora_targets = (
            *JOINT_ATTENTION,
            "attn.to_qkv_mlp_proj",
            *(f"single_transformer_blocks.{i}.attn.to_out" for i in single),
        )

    @property
    def _distilled(self) -> bool:
        return bool(self.parts.config.get("is_distilled"))

    @property
    def _layers(self) -> tuple[int, ...]:
        """The layers of Qwen3 that are read: those that its pipeline reads unless told others."""
        parameters = inspect.signature(type(self.parts).encode_prompt).parameters
        return tuple(parameters["text_encoder_out_layers"].default)

    @property
    def _length(self) -> int:
        return self.options.get("max_sequence_length", 512)

    def problems(self) -> Iterator[str]:
        parts, config = self.parts, self.denoiser.config
        yield from missing(parts, self.needed())
        width = config["joint_attention_dim"]
        yield from text_problems(parts.text_encoder, parts.tokenizer, width, self._layers)
        yield from chat_problems(parts.tokenizer)
        if config["guidance_embeds"]:
            yield "its transformer is given the guidance scale, as FLUX.2-dev's is"
        area = _PATCH**2
        read, returned = config["in_channels"], config["out_channels"] or config["in_channels"]
        kinds = (AutoencoderKLFlux2,)
        yield from latent_problems(
            parts.vae, read // area, returned // area, "transformer", kinds=kinds
        )

    def call_settings(self) -> dict[str, Any]:
        return {"max_sequence_length": self._length}

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"embedding": (self._length, self.denoiser.config["joint_attention_dim"])}

    @property
    def factor(self) -> int:
        return _PATCH * super().factor

    def native(self) -> tuple[int, int] | None:
        size = self.parts.default_sample_size // _PATCH
        return size, size

    def make_process(self) -> GaussianProcess:
        height, width = self.latent_size
        return flow_process(
            self.parts.scheduler,
            self.name,
            height * width,
            own_grid=False,
            logit_normal=_TRAINED_AT,
            mu_of=partial(empirical_mu, height * width),
        )

    def readers(self) -> list[Reader]:
        return chat_reader(self.parts.tokenizer, self._length)

    def encode_some(self, prompts: list[str]) -> dict[str, Tensor]:
        encoder = self.parts.text_encoder
        if encoder.device.type == "meta":
            return self.without_numbers(len(prompts), encoder.dtype)
        embedding, _ = self.parts.encode_prompt(prompts, max_sequence_length=self._length)
        return {"embedding": embedding}

    def denoise(
        self, network: Any, x_t: Tensor, t: Tensor, tables: Tables, guidance: float
    ) -> Tensor:
        height, width = x_t.shape[-2:]
        embedding = tables["embedding"].to(x_t.dtype)
        velocity = network(
            x_t.flatten(2).transpose(1, 2),
            timestep=t.float(),
            guidance=None,
            encoder_hidden_states=embedding,
            txt_ids=_places(1, 1, embedding.shape[1], x_t.device),
            img_ids=_places(height, width, 1, x_t.device),
            return_dict=False,
        )[0]
        return velocity.transpose(1, 2).unflatten(2, (height, width))

    def cfg_scale(self, guidance: float) -> float:
        return 1.0 if self._distilled else guidance

    def check_guidance(self, guidance: float, negative: str | None) -> None:
        """Raise UsageError for a negative prompt, which diffusers' pipeline has no place for."""
        if negative:
            raise UsageError(
                "pipeline.init_args.negative_prompt does not apply to FLUX.2-klein, which is "
                "guided away from the empty text alone; leave it"
            )
        super().check_guidance(guidance, negative)
        if self._distilled and guidance > 1:
            rank_zero_warn(
                f"pipeline.init_args.guidance_scale {guidance:g} changes no picture: this model is "
                "distilled, and has none; leave it out, or give a base model, such as "
                "black-forest-labs/FLUX.2-klein-base-4B"
            )

    def to_vae(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return nn.functional.pixel_shuffle(latents * std + mean, _PATCH)

    def from_vae(self, encoded: Tensor) -> Tensor:
        patches = nn.functional.pixel_unshuffle(encoded, _PATCH)
        mean, std = self._statistics(patches)
        return (patches - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents of patches, [1, 4 C, 1, 1]."""
        vae = self.parts.vae
        mean, var = (
            own.to(like).view(1, -1, 1, 1) for own in (vae.bn.running_mean, vae.bn.running_var)
        )
        return mean, (var + vae.config["batch_norm_eps"]).sqrt()


def _places(height: int, width: int, length: int, device: torch.device) -> Tensor:
    """Return (0, row, column, word) of every token, [height width length, 4]."""
    axes = [torch.arange(size, device=device) for size in (1, height, width, length)]
    return torch.cartesian_prod(*axes)
