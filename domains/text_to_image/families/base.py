"""What one family of text-to-image models adds to the pipeline: text, sizes, the network's call."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from lit_rlft.core.checks import UsageError
from lit_rlft.core.process import GaussianProcess
from lit_rlft.kit.frozen import frozen

__all__ = ["Family", "Tables"]

Tables = Mapping[str, Tensor]
"""Encodings by name, one row per prompt or one per sample."""


class Family(ABC):
    """One family of latent models, around a pipeline that diffusers has loaded.

    Latents are [B, C, H / f, W / f], never packed; a family that packs them does so inside
    `denoise`.

    Args:
        parts: The loaded pipeline: its networks, tokenizers and scheduler.
        pixels: Height and width of the pictures; None for either takes the model's own.
        options: Settings that only some families have, by name; those that are None are not set.

    Attributes:
        name: What users call the family.
        pipeline_class: Its pipeline in diffusers, by name.
        denoiser_name: The denoiser's attribute there, and the prefix of a LoRA's keys.
        encoder_names: Attributes of the text encoders; a model may come without some of them.
        lora_targets: Name endings of the layers that get a LoRA unless a config says otherwise.
        guidance_scale: Guidance unless a config says otherwise: diffusers' own default.
        option_names: The settings that this family has beside the common ones.

    Raises:
        UsageError: The model needs something that this family cannot supply, or the picture size
            does not fit.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    denoiser_name: ClassVar[str] = "transformer"
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    guidance_scale: ClassVar[float]
    option_names: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        parts: DiffusionPipeline,
        pixels: tuple[int | None, int | None] = (None, None),
        **options: Any,
    ) -> None:
        self.parts = parts
        given = {name: value for name, value in options.items() if value is not None}
        for name in given.keys() - set(self.option_names):
            raise UsageError(f"pipeline.init_args.{name} does not apply to {self.name}; leave it")
        self.options = given
        self.check()
        self.pixels = self._pixels(pixels)

    @property
    def denoiser(self) -> Any:
        """The network that is trained."""
        return getattr(self.parts, self.denoiser_name)

    @property
    def encoders(self) -> nn.Module:
        """The frozen text encoders: the one there is, or a list."""
        found = [getattr(self.parts, name, None) for name in self.encoder_names]
        there = [frozen(network) for network in found if network is not None]
        return there[0] if len(there) == 1 else nn.ModuleList(there)

    @property
    def factor(self) -> int:
        """Pixels per latent, in each direction."""
        return 2 ** (len(self.parts.vae.config["block_out_channels"]) - 1)

    @property
    def multiple(self) -> int:
        """Height and width in pixels are multiples of this."""
        return self.factor

    @property
    def channels(self) -> int:
        """C, channels of the latents."""
        return self.denoiser.config["in_channels"]

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.pixels[0] // self.factor, self.pixels[1] // self.factor

    def check(self) -> None:
        """Raise UsageError where the denoiser needs an input that this family does not give it."""

    @abstractmethod
    def native(self) -> tuple[int, int] | None:
        """Return the model's own height and width in latents; None where its config has none."""

    @abstractmethod
    def process(self) -> GaussianProcess:
        """Return the noising process that the folder's scheduler describes."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the encodings of prompts, one row each, by name."""

    def tables(self, prompts: Sequence[str], negative: str | None) -> dict[str, Tensor]:
        """Return the encodings of prompts and, last, what unconditional predictions are given.

        Args:
            prompts: U texts.
            negative: The negative prompt; None takes what the family's pipeline takes by itself.

        Returns:
            [U + 1, ...] by name.
        """
        return self.encode([*prompts, negative or ""])

    @abstractmethod
    def denoise(
        self, network: nn.Module, x_t: Tensor, t: Tensor, tables: Tables, guidance: float
    ) -> Tensor:
        """Return a denoiser's prediction [B, C, h, w].

        Args:
            network: The denoiser, or a frozen copy of it.
            x_t: [B, C, h, w] in the network's precision.
            t: [B] times in [0, 1].
            tables: As `encode` gives them, a row per sample.
            guidance: The pipeline's guidance scale, for denoisers that have it as an input.
        """

    def cfg_scale(self, guidance: float) -> float:
        """Return w of classifier-free guidance, which costs a second prediction above 1."""
        return guidance

    def to_vae(self, latents: Tensor) -> Tensor:
        """Return latents in the units that the VAE decodes."""
        config = self.parts.vae.config
        return latents / config["scaling_factor"] + (config.get("shift_factor") or 0.0)

    def from_vae(self, encoded: Tensor) -> Tensor:
        """Return what the VAE encoded in the units of the latents."""
        config = self.parts.vae.config
        return (encoded - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]

    def _pixels(self, given: tuple[int | None, int | None]) -> tuple[int, int]:
        native = self.native()
        sizes = []
        for i, key in enumerate(("height", "width")):
            pixels = given[i]
            if pixels is None:
                if native is None:
                    raise UsageError(
                        f"pipeline.init_args.{key} must be given: this {self.name} model does not "
                        "say which size it was trained for"
                    )
                pixels = native[i] * self.factor
            if pixels < 1 or pixels % self.multiple:
                raise UsageError(
                    f"pipeline.init_args.{key} is {pixels}, but this model needs a positive "
                    f"multiple of {self.multiple}"
                )
            sizes.append(pixels)
        return sizes[0], sizes[1]
