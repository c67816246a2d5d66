"""What one family of text-to-image models adds to the pipeline: text, sizes, the network's call."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from domains.text_to_image.embeddings import EmbeddingCache
from domains.text_to_image.families.cuts import CutPrompts
from domains.text_to_image.networks.texts import Reader, quiet
from domains.text_to_image.networks.weightless import NoTokenizer
from domains.text_to_image.overflow import autocast_dtype
from lit_rlft.core.checks import UsageError
from lit_rlft.core.process import GaussianProcess
from lit_rlft.kit.frozen import frozen
from lit_rlft.kit.idle import at_work
from lit_rlft.kit.shapes import output_shape

__all__ = ["Family", "Tables"]

_KEY = "pipeline.init_args.pretrained"

Tables = Mapping[str, Tensor]
"""Encodings by name, one row per prompt or one per sample."""


class Family(ABC):
    """One family of latent models, around a pipeline that diffusers has loaded.

    Latents are [B, C, H / f, W / f], never packed; a family that packs them does so inside
    `denoise`.

    Args:
        parts: The loaded pipeline: its networks, tokenizers and scheduler.
        pixels: Height and width of the pictures; None for either takes the model's own.
        encode_batch_size: Prompts encoded at a time.
        options: Settings that only some families have, by name; those that are None are not set.

    Attributes:
        name: What users call the family.
        pipeline_class: Its pipeline in diffusers, by name.
        denoiser_name: The denoiser's attribute there, and the prefix of a LoRA's keys.
        encoder_names: Attributes of the text encoders; a model may come without some of them.
        lora_targets: Name endings of the layers that get a LoRA unless a config says otherwise.
        guidance_scale: Guidance unless a config says otherwise: diffusers' own default.
        guided_above: When there is classifier-free guidance, in words.
        option_names: The settings that this family has beside the common ones.
        overflows_in_half: Parts that cannot be in float16, in words.
        cache: Encodings on disk, which come before those of the text encoders; None without them.
        idle_encoders: The text encoders where they stay on the CPU between encodings, else None.
        read_encoder: Reads a text encoder by its name where they are read for encodings alone.
        max_table_bytes: Tables that take more stay in the processor's memory.
        tell_cuts: Warns once of prompts that are cut at a tokenizer's limit.

    Raises:
        UsageError: The model needs something that this family cannot supply, or the picture size
            does not fit.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    denoiser_name: ClassVar[str] = "transformer"
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    guidance_scale: float
    guided_above: ClassVar[str] = "guidance_scale above 1"
    option_names: ClassVar[tuple[str, ...]] = ()
    overflows_in_half: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        parts: DiffusionPipeline,
        pixels: tuple[int | None, int | None] = (None, None),
        encode_batch_size: int = 128,
        **options: Any,
    ) -> None:
        self.parts: Any = parts
        self.encode_batch_size = encode_batch_size
        self.cache: EmbeddingCache | None = None
        self.idle_encoders: nn.Module | None = None
        self.read_encoder: Callable[[str], nn.Module] | None = None
        self.max_table_bytes = float("inf")
        given = {name: value for name, value in options.items() if value is not None}
        for name in given.keys() - set(self.option_names):
            raise UsageError(f"pipeline.init_args.{name} does not apply to {self.name}; leave it")
        self.options = given
        if problem := next(self.problems(), None):
            raise UsageError(
                f"{_KEY}: {parts.name_or_path!r} is not supported: {problem}; give a text-to-image "
                f"model of the kind of {self.name}"
            )
        self.pixels = self._pixels(pixels)
        self.process = self.make_process()
        self._rehearse()
        convert = getattr(parts, "maybe_convert_prompt", None)
        self.tell_cuts = CutPrompts([] if self._bare else self.readers(), convert)

    @classmethod
    def weighed(cls) -> tuple[str, ...]:
        """Return the folders that hold weights."""
        return (cls.denoiser_name, "vae", *cls.encoder_names)

    @classmethod
    def needed(cls) -> tuple[str, ...]:
        """Return the parts that a model of this family cannot come without."""
        tokenizers = (name.replace("text_encoder", "tokenizer") for name in cls.encoder_names)
        return (*cls.weighed(), *tokenizers, "scheduler")

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
        return self.parts.vae_scale_factor

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

    @abstractmethod
    def problems(self) -> Iterator[str]:
        """Iterate over what this family cannot supply to the loaded model, in words."""

    @abstractmethod
    def native(self) -> tuple[int, int] | None:
        """Return the model's own height and width in latents; None where its config has none."""

    @abstractmethod
    def make_process(self) -> GaussianProcess:
        """Return the noising process that the folder's scheduler describes."""

    @abstractmethod
    def encode_some(self, prompts: list[str]) -> dict[str, Tensor]:
        """Return the encodings of a few prompts, one row each, by name."""

    @abstractmethod
    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one prompt's encodings, by name, without the row."""

    def without_numbers(self, num: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return encodings of so many prompts by text encoders on "meta", which have no numbers."""
        shapes = self.encoded_shapes().items()
        return {
            name: torch.empty((num, *shape), dtype=dtype, device="meta") for name, shape in shapes
        }

    def encoding_settings(self) -> dict[str, Any]:
        """Return what encodings depend on beside the text encoders and the encodings' shapes."""
        return {}

    def call_settings(self) -> dict[str, Any]:
        """Return arguments of the call of the family's pipeline that draw as `denoise` does.

        They are those of one family alone; sizes and what all have come beside them.
        """
        return {}

    def call(self, guidance: float, negative: str | None) -> dict[str, Any]:
        """Return arguments of the family's pipeline in diffusers: guidance, sizes and prompts.

        With them, and a scheduler that takes the sampler's steps, it draws the same pictures. Its
        own defaults are left out, but guidance is always told.

        Args:
            guidance: The pipeline's guidance scale.
            negative: The negative prompt.
        """
        sizes = zip(("height", "width"), self.pixels, strict=True)
        given = {"guidance_scale": guidance, **dict(sizes), **self.call_settings()}
        parameters = inspect.signature(type(self.parts).__call__).parameters
        if self.cfg_scale(guidance) > 1 and "negative_prompt" in parameters:
            given["negative_prompt"] = negative
        usual = {name: parameters[name].default for name in given} | {"guidance_scale": None}
        if (native := self.native()) is not None:
            for name, size in zip(("height", "width"), native, strict=True):
                usual[name] = usual[name] or size * self.factor
        return {k: v for k, v in given.items() if v is not None and v != usual[k]}

    def readers(self) -> list[Reader]:
        """Return the tokenizers at which a prompt's words are lost to the model: all of CLIP."""
        named = [name.replace("text_encoder", "tokenizer") for name in self.encoder_names]
        tokenizers = [getattr(self.parts, name) for name in named]
        return [Reader(own, own.model_max_length, "CLIP") for own in tokenizers if own is not None]

    @property
    def _bare(self) -> bool:
        """Whether files of a tokenizer are not there, as `lit-rlft plan` allows."""
        names = [name.replace("text_encoder", "tokenizer") for name in self.encoder_names]
        return any(isinstance(getattr(self.parts, name), NoTokenizer) for name in names)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the encodings of prompts, one row each, by name."""
        if self._bare:
            like = next(self.denoiser.parameters())  # without weights there are shapes alone
            shapes = self.encoded_shapes().items()
            one = {name: like.new_empty(1, *shape) for name, shape in shapes}
            device = self._place(one, len(prompts), like.device)
            # Zeros: the processor's memory is not taken for them before they are written to.
            return {
                name: torch.zeros(len(prompts), *row.shape[1:], dtype=row.dtype, device=device)
                for name, row in one.items()
            }
        return self._run(prompts) if self.cache is None else self._cached(prompts, self.cache)

    def _run(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return what the text encoders make of prompts, in chunks."""
        size = self.encode_batch_size
        device = next(self.denoiser.parameters()).device
        with quiet(), self.encoders_here(device), at_work(self.idle_encoders, device):
            parts: list[Tables] = []
            for i in range(0, len(prompts), size):
                part = self.encode_some(list(prompts[i : i + size]))
                own = next(iter(part.values())).device
                device = self._place(part, len(prompts) / len(prompts[i : i + size]), own)
                parts.append({name: table.to(device) for name, table in part.items()})
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @contextmanager
    def encoders_here(self, device: torch.device) -> Iterator[None]:
        """Have the text encoders with their weights within the block, where they have none else."""
        if self.read_encoder is None:
            yield
            return
        names = [name for name in self.encoder_names if getattr(self.parts, name, None) is not None]
        kept = {name: getattr(self.parts, name) for name in names}
        try:
            for name in kept:
                setattr(self.parts, name, frozen(self.read_encoder(name)).to(device))
            yield
        finally:
            for name, network in kept.items():
                setattr(self.parts, name, network)

    def _place(self, tables: Tables, times: float, device: torch.device) -> torch.device:
        """Return where tables belong that are so many times as large: the CPU if too large."""
        size = sum(table.numel() * table.element_size() for table in tables.values()) * times
        return torch.device("cpu") if size > self.max_table_bytes else device

    def _cached(self, prompts: Sequence[str], cache: EmbeddingCache) -> dict[str, Tensor]:
        """Return the encodings of prompts; those that are not on disk are made and kept there."""
        networks = [getattr(self.parts, name, None) for name in self.encoder_names]
        if any(p.requires_grad for net in networks if net is not None for p in net.parameters()):
            raise UsageError(
                "pipeline.init_args.embedding_cache is for text encoders that stay as they are; "
                "set it to null, or model.init_args.train_encoder to false"
            )
        own_device = next(self.denoiser.parameters()).device
        cache = cache.under(autocast_dtype(own_device))
        unique = dict.fromkeys(prompts)
        found = {prompt: cache.read(prompt) for prompt in unique}
        absent = [prompt for prompt, tables in found.items() if tables is None]
        made = self._run(absent) if absent else {}
        for i, prompt in enumerate(absent):
            own = {name: table[i].cpu() for name, table in made.items()}
            cache.write(prompt, own)
            found[prompt] = own
        rows = [tables for prompt in prompts if (tables := found[prompt]) is not None]
        device = self._place(rows[0], len(rows), own_device)
        return {name: torch.stack([row[name] for row in rows]).to(device) for name in cache.shapes}

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

    def check_guidance(self, guidance: float, negative: str | None) -> None:
        """Warn of guidance that changes no picture, such as a negative prompt without a scale.

        Args:
            guidance: The pipeline's guidance scale.
            negative: The negative prompt.
        """
        if negative is not None and self.cfg_scale(guidance) <= 1:
            rank_zero_warn(
                "pipeline.init_args.negative_prompt changes no picture where guidance is off; set "
                f"pipeline.init_args.{self.guided_above}, or leave it out"
            )

    def guided(self, u: Tensor, c: Tensor, t: Tensor, guidance: float) -> Tensor:
        """Return what classifier-free guidance makes of two predictions.

        Args:
            u: [B, C, h, w], the unconditional prediction.
            c: The conditional one.
            t: [B] times in [0, 1].
            guidance: The pipeline's guidance scale.
        """
        return u + self.cfg_scale(guidance) * (c - u)

    def to_vae(self, latents: Tensor) -> Tensor:
        """Return latents in the units that the VAE decodes."""
        config = self.parts.vae.config
        return latents / config["scaling_factor"] + (config.get("shift_factor") or 0.0)

    def from_vae(self, encoded: Tensor) -> Tensor:
        """Return what the VAE encoded in the units of the latents."""
        config = self.parts.vae.config
        return (encoded - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]

    def _rehearse(self) -> None:
        """Predict and decode once, shapes alone; raise UsageError where parts do not fit."""
        latents, encoded = (1, self.channels, *self.latent_size), self.encoded_shapes()
        shapes = [(1, *shape) for shape in encoded.values()]
        checks: list[tuple[str, nn.Module, list[Any], tuple[int, ...]]] = [
            (
                "denoiser",
                _Denoiser(self, list(encoded)),
                [latents, torch.ones(1), *shapes],
                latents,
            ),
            ("VAE", _Decoder(self), [latents], (1, 3, *self.pixels)),
        ]
        for part, network, inputs, expected in checks:
            sentence = (
                f"{_KEY}: the {part} of {self.parts.name_or_path!r} does not fit its other parts"
            )
            shape = output_shape(network, *inputs, sentence=sentence)
            if shape is not None and tuple(shape) != expected:
                raise UsageError(
                    f"{sentence}: it returns {list(shape)} where {list(expected)} are needed"
                )

    def _pixels(self, given: tuple[int | None, int | None]) -> tuple[int, int]:
        native = self.native()
        sizes = []
        for i, key in enumerate(("height", "width")):
            pixels = given[i]
            if pixels is None:
                if native is None:
                    raise UsageError(
                        f"pipeline.init_args: the denoiser of {self.parts.name_or_path!r} has no "
                        "sample_size; set height and width, in pixels"
                    )
                pixels = native[i] * self.factor
            if pixels < 1 or pixels % self.multiple:
                raise UsageError(
                    f"pipeline.init_args.{key} is {pixels}, but this model needs a positive "
                    f"multiple of {self.multiple}"
                )
            sizes.append(pixels)
        return sizes[0], sizes[1]


class _Denoiser(nn.Module):
    """The denoiser as a family calls it, of tensors alone."""

    def __init__(self, family: Family, names: list[str]) -> None:
        super().__init__()
        self.network = family.denoiser
        self._family, self._names = (family,), names

    def forward(self, x_t: Tensor, t: Tensor, *tables: Tensor) -> Tensor:
        """Return the prediction."""
        (family,) = self._family
        named = dict(zip(self._names, tables, strict=True))
        return family.denoise(self.network, x_t.to(family.denoiser.dtype), t, named, 1.0)


class _Decoder(nn.Module):
    """What a VAE does in `TextToImagePipeline.decode`."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.vae = family.parts.vae
        self._family = (family,)

    def forward(self, latents: Tensor) -> Tensor:
        """Return pictures [B, 3, H, W]."""
        (family,) = self._family
        return self.vae.decode(family.to_vae(latents).to(self.vae.dtype)).sample
