"""Families with a transformer on a rectified flow: Stable Diffusion 3 and 3.5, FLUX.1."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from domains.text_to_image.families.base import Family, Tables
from domains.text_to_image.families.checks import clip_problems, latent_problems, missing
from domains.text_to_image.networks.texts import Reader
from lit_rlft.core.checks import UsageError
from lit_rlft.core.process import GaussianProcess
from lit_rlft.kit.flow_schedulers import flow_process, flow_timestep

__all__ = ["JOINT_ATTENTION", "Flux", "StableDiffusion3"]

_JOINT = ("to_q", "to_k", "to_v", "to_out.0")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_MOST_TOKENS = 512
"""Diffusers' pipelines refuse more tokens of T5."""
JOINT_ATTENTION = tuple(f"attn.{name}" for name in (*_JOINT, *_ADDED))
"""Layers of attention in blocks with a stream of text beside that of the picture."""


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5: two CLIP encoders and, where the folder has it, T5.

    Training times are logit-normal before the shift, as the model's own were (section 3.1).

    Options:
        max_sequence_length: Tokens of T5, at most 512; 256 unless given.

    References:
        Scaling Rectified Flow Transformers (Esser et al., 2024), https://arxiv.org/abs/2403.03206
    """

    name = "Stable Diffusion 3"
    pipeline_class = "StableDiffusion3Pipeline"
    encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    lora_targets = JOINT_ATTENTION
    guidance_scale = 7.0
    option_names: ClassVar[tuple[str, ...]] = ("max_sequence_length",)

    @classmethod
    def needed(cls) -> tuple[str, ...]:
        return tuple(name for name in super().needed() if not name.endswith("_3"))

    def problems(self) -> Iterator[str]:
        parts, config = self.parts, self.denoiser.config
        yield from missing(parts, self.needed())
        yield from clip_problems(parts.text_encoder, parts.tokenizer, "first ")
        yield from clip_problems(parts.text_encoder_2, parts.tokenizer_2, "second ")
        own = sum(
            encoder.config.projection_dim for encoder in (parts.text_encoder, parts.text_encoder_2)
        )
        if config["pooled_projection_dim"] != own:
            yield (
                f"its transformer takes pooled text features of {config['pooled_projection_dim']} "
                f"numbers, its CLIPs make {own}"
            )
        if parts.text_encoder_3 is not None:
            yield from _t5_problems(parts.text_encoder_3, config)
        channels = (config["in_channels"], config["out_channels"])
        yield from latent_problems(parts.vae, *channels, "transformer")

    @property
    def _length(self) -> int:
        return _t5_length(self.options.get("max_sequence_length", 256))

    def call_settings(self) -> dict[str, Any]:
        return {"max_sequence_length": self._length}

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        config, clip = self.denoiser.config, self.parts.tokenizer.model_max_length
        return {  # without T5 its tokens are zeros
            "embedding": (clip + self._length, config["joint_attention_dim"]),
            "pooled": (config["pooled_projection_dim"],),
        }

    @property
    def multiple(self) -> int:
        return self.factor * self.denoiser.config["patch_size"]

    def native(self) -> tuple[int, int] | None:
        size = self.denoiser.config["sample_size"]
        return None if size is None else (size, size)

    def make_process(self) -> GaussianProcess:
        patch = self.denoiser.config["patch_size"]
        height, width = self.latent_size
        tokens = (height // patch) * (width // patch)
        scheduler, trained_at = self.parts.scheduler, (0.0, 1.0)
        return flow_process(scheduler, self.name, tokens, own_grid=True, logit_normal=trained_at)

    def readers(self) -> list[Reader]:
        """Return T5's, which reads on where the CLIPs end; theirs where there is no T5."""
        parts = self.parts
        if parts.text_encoder_3 is not None:
            return [_t5_reader(parts.tokenizer_3, self._length)]
        return [
            Reader(own, own.model_max_length, "CLIP")
            for own in (parts.tokenizer, parts.tokenizer_2)
        ]

    def encode_some(self, prompts: list[str]) -> dict[str, Tensor]:
        embedding, _, pooled, _ = self.parts.encode_prompt(
            prompts,
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=self._length,
        )
        return {"embedding": embedding, "pooled": pooled}

    def denoise(
        self, network: nn.Module, x_t: Tensor, t: Tensor, tables: Tables, guidance: float
    ) -> Tensor:
        return network(
            x_t,
            timestep=flow_timestep(self.process, t),
            encoder_hidden_states=tables["embedding"].to(x_t.dtype),
            pooled_projections=tables["pooled"].to(x_t.dtype),
            return_dict=False,
        )[0]


class Flux(Family):
    """FLUX.1: CLIP's pooled output and T5; patches of 2 x 2 latents are the tokens.

    In FLUX.1-dev `guidance_scale` is an input of the network, so guidance costs no second
    evaluation. FLUX.1-schnell has none. Classifier-free guidance beside it is `true_cfg_scale`.

    Options:
        max_sequence_length: Tokens of T5, at most 512; 512 unless given, 256 for a model without
            guidance.
        true_cfg_scale: w of classifier-free guidance, which needs a negative prompt; 1 is none.
    """

    name = "FLUX.1"
    pipeline_class = "FluxPipeline"
    encoder_names = ("text_encoder", "text_encoder_2")
    lora_targets = JOINT_ATTENTION
    guidance_scale = 3.5
    guided_above = "true_cfg_scale above 1"
    option_names: ClassVar[tuple[str, ...]] = ("max_sequence_length", "true_cfg_scale")

    def problems(self) -> Iterator[str]:
        parts, config = self.parts, self.denoiser.config
        yield from missing(parts, self.needed())
        yield from clip_problems(parts.text_encoder, parts.tokenizer, "first ")
        if config["pooled_projection_dim"] != parts.text_encoder.config.hidden_size:
            yield (
                f"its transformer takes pooled text features of {config['pooled_projection_dim']} "
                f"numbers, its CLIP makes {parts.text_encoder.config.hidden_size}"
            )
        yield from _t5_problems(parts.text_encoder_2, config)
        read, returned = config["in_channels"], config["out_channels"] or config["in_channels"]
        yield from latent_problems(parts.vae, read // 4, returned // 4, "transformer")

    @property
    def _length(self) -> int:
        """Tokens of T5: schnell, without guidance, was trained for half of dev's."""
        length = 512 if self.denoiser.config["guidance_embeds"] else 256
        return _t5_length(self.options.get("max_sequence_length", length))

    def call_settings(self) -> dict[str, Any]:
        true_cfg = self.options.get("true_cfg_scale")
        return {"max_sequence_length": self._length, "true_cfg_scale": true_cfg}

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.denoiser.config
        return {
            "embedding": (self._length, config["joint_attention_dim"]),
            "pooled": (config["pooled_projection_dim"],),
        }

    @property
    def multiple(self) -> int:
        return 2 * self.factor

    @property
    def channels(self) -> int:
        return self.denoiser.config["in_channels"] // 4

    def native(self) -> tuple[int, int] | None:
        return self.parts.default_sample_size, self.parts.default_sample_size

    def cfg_scale(self, guidance: float) -> float:
        return self.options.get("true_cfg_scale", 1.0)

    def check_guidance(self, guidance: float, negative: str | None) -> None:
        """Raise UsageError for `true_cfg_scale` alone, which in diffusers guides nothing."""
        super().check_guidance(guidance, negative)
        if negative is None and self.cfg_scale(guidance) > 1:
            raise UsageError(
                "pipeline.init_args.true_cfg_scale above 1 needs a "
                "pipeline.init_args.negative_prompt to guide away from; give one, or '\"\"' for an "
                "empty text"
            )

    def make_process(self) -> GaussianProcess:
        height, width = self.latent_size
        tokens = (height // 2) * (width // 2)
        return flow_process(self.parts.scheduler, self.name, tokens, own_grid=False)

    def readers(self) -> list[Reader]:
        """Return T5's; CLIP's summary is of the first words by design."""
        return [_t5_reader(self.parts.tokenizer_2, self._length)]

    def encode_some(self, prompts: list[str]) -> dict[str, Tensor]:
        embedding, pooled, _ = self.parts.encode_prompt(prompts, max_sequence_length=self._length)
        return {"embedding": embedding, "pooled": pooled}

    def denoise(
        self, network: nn.Module, x_t: Tensor, t: Tensor, tables: Tables, guidance: float
    ) -> Tensor:
        height, width = x_t.shape[-2:]
        embedding = tables["embedding"].to(x_t.dtype)
        scale = torch.full((len(x_t),), guidance, device=x_t.device)
        velocity = network(
            _packed(x_t),
            timestep=t.float(),
            guidance=scale if self.denoiser.config["guidance_embeds"] else None,
            encoder_hidden_states=embedding,
            pooled_projections=tables["pooled"].to(x_t.dtype),
            txt_ids=embedding.new_zeros(embedding.shape[1], 3),
            img_ids=_places(height // 2, width // 2, x_t),
            return_dict=False,
        )[0]
        return _unpacked(velocity, height, width)


def _t5_length(given: int) -> int:
    """Return a number of tokens of T5 that diffusers' pipelines take."""
    if given > _MOST_TOKENS:
        raise UsageError(
            f"pipeline.init_args.max_sequence_length is {given}, but diffusers' pipelines of T5 "
            f"take {_MOST_TOKENS} tokens; give at most that"
        )
    return given


def _t5_problems(encoder: Any, config: Any) -> Iterator[str]:
    """Iterate over what does not fit in T5 and the transformer's config."""
    if config["joint_attention_dim"] != encoder.config.d_model:
        yield (
            f"its transformer attends to text features of {config['joint_attention_dim']} numbers, "
            f"its T5 makes {encoder.config.d_model}"
        )


def _t5_reader(tokenizer: Any, length: int) -> Reader:
    remedy = "shorten it, or raise pipeline.init_args.max_sequence_length"
    return Reader(tokenizer, length, "T5", "shorten it" if length >= _MOST_TOKENS else remedy)


def _packed(x: Tensor) -> Tensor:
    """Return [B, C, h, w] as tokens [B, h w / 4, 4 C], each a patch of 2 x 2 latents."""
    size, channels, height, width = x.shape
    patches = x.view(size, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(size, height * width // 4, 4 * channels)


def _unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return tokens as [B, C, height, width]."""
    size, _, depth = tokens.shape
    patches = tokens.view(size, height // 2, width // 2, depth // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(size, depth // 4, height, width)


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """Return (0, row, column) of every token, [height width, 3]."""
    grid = torch.zeros(height, width, 3, dtype=like.dtype, device=like.device)
    grid[..., 1] += torch.arange(height, device=like.device)[:, None]
    grid[..., 2] += torch.arange(width, device=like.device)
    return grid.flatten(0, 1)
