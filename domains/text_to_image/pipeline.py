"""Text-to-image pipelines on diffusers: any SD 1.x / 2.x-style `StableDiffusionPipeline`."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from domains.text_to_image import EMBEDDED
from domains.text_to_image.networks.lora import read_lora, save_lora
from domains.text_to_image.networks.stable_diffusion import check_shapes, load_stable_diffusion
from lit_rlft.core.checks import UsageError, at_least
from lit_rlft.core.pipeline import Batch, Condition, Pipeline, column
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.schedule import DiscreteVP
from lit_rlft.core.state import State, tensor_of
from lit_rlft.kit.frozen import frozen
from lit_rlft.kit.images import save_pictures
from lit_rlft.kit.schedulers import saved_process

__all__ = ["EMBEDDED", "TextToImagePipeline"]


class TextToImagePipeline(Pipeline):
    """A latent diffusion model with a CLIP text encoder, a U-Net and a VAE.

    States are latents [B, 4, H / f, W / f]; samples are pictures [B, 3, H, W] in [0, 1]. The text
    encoder and the VAE are frozen.

    Args:
        pretrained: A folder saved by diffusers, a hub id, or the name of an embedded model
            ("shapes"). The kind of SD 1.x and 2.x is supported: a U-Net that needs noise and the
            text features of a CLIP alone, with an AutoencoderKL or an AutoencoderTiny (TAESD).
        variant: Which files of weights to load, such as "fp16"; None takes plain ones, and of a
            folder without them its only variant. Weights are computed with in single precision.
        guidance_scale: w of classifier-free guidance, u + w (c - u); no guidance at 1 or below.
        guidance_gradient: Where reward gradients go under guidance: "both" predictions, or the
            "conditional" one alone; u is then computed without a graph, at half the memory.
        negative_prompt: What the unconditional prediction u is conditioned on.
        height: Picture height in pixels; None takes the model's own size.
        width: Picture width in pixels; None takes the model's own size.
        decode_batch_size: Pictures decoded at a time, which bounds the VAE's memory.
        checkpoint_decoder: Where gradients flow through the VAE, keep only its input and decode
            again in the backward pass.
        encode_batch_size: Prompts encoded at a time, which bounds the text encoder's memory.
        from_scratch: Keep the architecture and draw new weights for U-Net and text encoder, to
            pretrain them.
        save_dtype: Precision in which a fully trained pipeline is written.

    Raises:
        UsageError: `pretrained` is neither a pipeline folder nor a loadable hub id, or its model
            is not supported.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    denoiser: UNet2DConditionModel
    process: GaussianProcess
    pretrained: str

    def __init__(
        self,
        pretrained: str = "shapes",
        *,
        variant: str | None = None,
        guidance_scale: float = 7.5,
        guidance_gradient: Literal["both", "conditional"] = "both",
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        decode_batch_size: int = 32,
        checkpoint_decoder: bool = True,
        encode_batch_size: int = 128,
        from_scratch: bool = False,
        save_dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        at_least(0, self, guidance_scale=guidance_scale)
        at_least(1, self, decode_batch_size=decode_batch_size, encode_batch_size=encode_batch_size)
        self.pretrained = pretrained
        self.guidance_scale = guidance_scale
        self.guidance_gradient = guidance_gradient
        self.negative_prompt = negative_prompt
        self.decode_batch_size = decode_batch_size
        self.encode_batch_size = encode_batch_size
        self.checkpoint_decoder = checkpoint_decoder
        self.save_dtype = getattr(torch, save_dtype)
        self.diffusers = load_stable_diffusion(
            pretrained, variant=variant, from_scratch=from_scratch
        )
        self.denoiser = self.diffusers.unet
        self.encoder = frozen(self.diffusers.text_encoder)
        self.vae: AutoencoderKL | AutoencoderTiny = frozen(self.diffusers.vae)
        self.process = saved_process(self.diffusers.scheduler)
        factor = self.diffusers.vae_scale_factor
        native = self.denoiser.config["sample_size"]
        if native is None and None in (height, width):
            raise UsageError(
                f"pipeline.init_args: the U-Net of {pretrained!r} has no sample_size; set height "
                "and width, in pixels"
            )
        native = tuple(native) if isinstance(native, list | tuple) else (native, native)
        self.latent_size = (
            _latents(height, factor, "height") or native[0],
            _latents(width, factor, "width") or native[1],
        )
        check_shapes(self.diffusers, self.latent_size)

    @property
    def name(self) -> str:
        return Path(self.pretrained).name

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def encode(self, batch: Batch) -> Condition:
        """Encode `batch["prompt"]`, each unique prompt once, and the negative prompt last."""
        prompts = list(batch["prompt"])
        first: dict[str, int] = {}
        for i, prompt in enumerate(prompts):
            first.setdefault(prompt, i)
        unique = list(first)
        columns = [name for name in batch if name != "index"]
        entries = [{name: batch[name][i] for name in columns} for i in first.values()]
        rows = {prompt: row for row, prompt in enumerate(unique)}
        return Condition(
            entries=entries,
            tables={"embedding": self._embed([*unique, self.negative_prompt])},
            rows=torch.tensor([rows[prompt] for prompt in prompts]),
            null=len(unique),
        )

    def _embed(self, prompts: Sequence[str]) -> Tensor:
        """Return the text features of prompts, [U, tokens, width]."""
        size = self.encode_batch_size
        parts = [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        return torch.cat([self.diffusers.encode_prompt(p, self.device, 1, False)[0] for p in parts])

    def example(self) -> Condition:
        # Not the negative prompt, under which guidance has no effect.
        return self.encode({"prompt": ["an example"]})

    def blank(self, condition: Condition) -> Tensor:
        channels = self.denoiser.config["in_channels"]
        shape = (len(condition), channels, *self.latent_size)
        return torch.empty(shape, dtype=self.denoiser.dtype, device=self.device)

    def predict(self, x_t: State, t: Tensor, condition: Condition) -> Tensor:
        x, schedule = tensor_of(x_t), self.process.schedule
        assert isinstance(schedule, DiscreteVP)
        embedding = condition.table("embedding").to(x.dtype)
        return self.denoiser(x, schedule.timestep(t), embedding, return_dict=False)[0]

    def forward(self, x_t: State, t: Tensor, condition: Condition) -> Tensor:
        """Return the guided prediction u + w (c - u); both halves go through in one call.

        Where only c carries gradient there are two calls, u's without a graph.
        """
        if self.guidance_scale <= 1:
            return self.predict(x_t, t, condition)
        null = condition.dropped(torch.ones_like(condition.rows, dtype=torch.bool))
        if self.guidance_gradient == "conditional" and torch.is_grad_enabled():
            with torch.no_grad():
                u = self.predict(x_t, t, null)
            c = self.predict(x_t, t, condition)
        else:
            both = replace(condition, rows=torch.cat([null.rows, condition.rows]))
            u, c = self.predict(torch.cat([tensor_of(x_t)] * 2), t.repeat(2), both).chunk(2)
        return u + self.guidance_scale * (c - u)

    def decode(self, x_0: State, condition: Condition) -> Tensor:
        latents = tensor_of(x_0) / self.vae.config["scaling_factor"]
        parts = latents.split(self.decode_batch_size)
        pictures = torch.cat([self._decode(part) for part in parts])
        return (pictures.float() / 2 + 0.5).clamp(0, 1)

    def _decode(self, latents: Tensor) -> Tensor:
        if self.checkpoint_decoder and latents.requires_grad and torch.is_grad_enabled():
            return checkpoint(lambda x: self.vae.decode(x).sample, latents, use_reentrant=False)
        return self.vae.decode(latents).sample

    def check_states(self) -> None:
        if isinstance(self.vae, AutoencoderTiny):
            raise UsageError(
                f"pipeline.init_args.pretrained: the VAE of {self.name!r} is an AutoencoderTiny, "
                "which approximates another one's latents, so there is nothing to train on "
                "pictures with; give a folder with an AutoencoderKL"
            )

    def states(self, batch: Batch) -> Tensor:
        """Return the latents of `batch["image"]`, uint8 [B, 3, H, W]: the VAE's mode, scaled."""
        self.check_states()
        pictures = column(batch, "image").to(self.device, self.vae.dtype) / 127.5 - 1
        with torch.no_grad():
            parts = pictures.split(self.decode_batch_size)
            modes = torch.cat([self.vae.encode(part).latent_dist.mode() for part in parts])
        return modes * self.vae.config["scaling_factor"]

    def render(self, samples: Any, condition: Condition) -> Tensor:
        return samples

    def describe(self, entry: Mapping[str, Any]) -> str:
        """Return the prompt."""
        return entry["prompt"]

    def save_samples(
        self, samples: Any, condition: Condition, folder: Path, names: Sequence[str]
    ) -> list[Path]:
        return save_pictures(samples, folder, names)

    def save(self, folder: Path) -> list[Path]:
        """Write a LoRA that `StableDiffusionPipeline.load_lora_weights` reads, or all weights."""
        if not any(isinstance(layer, BaseTunerLayer) for layer in self.denoiser.modules()):
            whole = copy.deepcopy(self.diffusers).to(dtype=self.save_dtype)
            whole.save_pretrained(folder)
            return [folder]
        return save_lora(self.denoiser, folder)

    def read_lora(self, path: Path) -> tuple[dict[str, Tensor], float | None]:
        """Read a LoRA of the U-Net that diffusers, peft or kohya wrote, from its file or folder."""
        return read_lora(path, self.denoiser.config)


def _latents(pixels: int | None, factor: int, key: str) -> int | None:
    if pixels is None:
        return None
    if pixels < 1 or pixels % factor:
        raise UsageError(
            f"pipeline.init_args.{key} is {pixels}, but this VAE needs a positive multiple of "
            f"{factor}"
        )
    return pixels // factor
