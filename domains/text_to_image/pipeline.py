"""The text-to-image pipeline on diffusers' models, of all families."""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import AutoencoderTiny
from lightning.pytorch.utilities import rank_zero_info
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from domains.text_to_image import EMBEDDED, card
from domains.text_to_image.conditions import encode_prompts
from domains.text_to_image.decode_size import DecodeSize
from domains.text_to_image.embeddings import EmbeddingCache, identity
from domains.text_to_image.families import family_of
from domains.text_to_image.loading import Files, load_parts, text_encoder_reader
from domains.text_to_image.networks.lora import Home, lora_weights, read_lora, save_lora
from domains.text_to_image.networks.web_lora import WEB_LORA, check_layers, save_web_lora
from domains.text_to_image.overflow import check_latents
from domains.text_to_image.precision import (
    FrozenDtype,
    Precision,
    dtype_name,
    precision,
    precisions,
)
from domains.text_to_image.stand_ins import scheduler_facts
from domains.text_to_image.vae import decoded, encoded
from lit_rlft.core.batch_size import AUTO, BatchSize
from lit_rlft.core.checks import UsageError, at_least, one_of, require
from lit_rlft.core.pipeline import (
    Batch,
    Condition,
    Pipeline,
    column,
    tokens_of,
)
from lit_rlft.core.process import GaussianProcess
from lit_rlft.core.state import State, tensor_of
from lit_rlft.kit.compiled import Compiled, compile_network
from lit_rlft.kit.frozen import cast_frozen, frozen
from lit_rlft.kit.idle import put_away
from lit_rlft.kit.images import save_pictures
from lit_rlft.kit.network_folder import forget_source, found_variant, source_of
from lit_rlft.kit.picture_folder import read_picture
from lit_rlft.kit.probe_pictures import probe_pictures
from lit_rlft.kit.weightless import weightless

__all__ = ["EMBEDDED", "TextToImagePipeline"]

GuidanceGradient = Literal["both", "conditional"]
TextEncoders = Literal["keep", "cpu", "drop"]


class TextToImagePipeline(Pipeline):
    """A latent diffusion or flow model: text encoders, a denoiser and a VAE.

    The family is that of the folder: Stable Diffusion 1.x and 2.x, XL, 3 and 3.5, FLUX.1,
    FLUX.2-klein, Z-Image, Sana. States are latents [B, C, H / f, W / f] in single precision;
    samples are pictures [B, 3, H, W] in [0, 1]. Text encoders and VAE are frozen.

    Args:
        pretrained: A folder saved by diffusers, a hub id, the name of an embedded model ("shapes"),
            or a safetensors file of a whole model; of FLUX.1 the file is of the transformer.
        config: For a safetensors file: folder or hub id of a model of its kind, for the configs,
            tokenizers and scheduler, and for parts that the file lacks. None takes the hub's.
        vae: Folder, hub id or safetensors file of a VAE that takes the place of the model's own.
        textual_inversions: Files of safetensors with further tokens for prompts, each called as its
            file is; for Stable Diffusion 1.x, 2.x and XL.
        variant: Which files of weights to load, such as "fp16"; None takes plain ones, and of a
            folder without them its only variant.
        guidance_scale: w of classifier-free guidance, u + w (c - u); no guidance at 1 or below.
            In FLUX.1-dev it is an input of the network instead; in Z-Image, as in diffusers, the
            prediction is c + w (c - u), without guidance at 0. None takes what diffusers takes.
        guidance_gradient: Where reward gradients go under guidance: "both" predictions, or the
            "conditional" one alone; u is then computed without a graph, at half the memory. Losses
            of the guided prediction itself, as DDPO's and GRAFT's, need both.
        negative_prompt: What the unconditional prediction u is conditioned on; None takes what
            diffusers takes, an empty text or, for Stable Diffusion XL, zeros.
        height: Picture height in pixels; None takes the model's own size.
        width: Picture width in pixels; None takes the model's own size.
        original_size: For Stable Diffusion XL: height and width in pixels that the model is told
            the picture had before it was cropped; None is the size of the picture.
        crop: For Stable Diffusion XL: top and left edge in pixels that it is told of.
        max_sequence_length: For Stable Diffusion 3 and FLUX.1: tokens of the T5 encoder, at most
            512. For FLUX.2-klein, Z-Image and Sana: most tokens of a prompt.
        true_cfg_scale: For FLUX.1: w of classifier-free guidance beside its own, for which there
            has to be a negative prompt.
        cfg_normalization: For Z-Image: the guided prediction is at most this times as long as the
            conditional one; diffusers' true is 1. None bounds nothing.
        cfg_truncation: For Z-Image: no guidance where 1 - t, from 0 at noise to 1 at data, is above
            this. None guides all steps.
        frozen_dtype: Precision of the frozen weights; states and what is trained have single
            precision in any case (of a LoRA: `lora.dtype`). "auto" loads them in float32, and makes
            them bfloat16 on a GPU under the trainer's bf16-mixed, unless all of the denoiser is
            trained and exported with them.
        checkpoint_denoiser: Keep only the inputs of the denoiser's blocks for the backward pass
            and compute the blocks again there: less memory, about a third more time.
        channels_last: Keep weights and activations of U-Net and VAE with channels last in memory,
            which convolutions on GPUs prefer; for Stable Diffusion 1.x, 2.x and XL.
        compile: Have torch compile the denoiser's "blocks", each kind once, or the "whole" of it:
            a slower start and faster calls. It works with a LoRA on and off. None compiles nothing.
        decode_batch_size: Pictures decoded at a time, which bounds the VAE's memory. "auto" takes
            what half of the GPU's free memory has room for, and fewer where it runs out; on a CPU,
            and at most, 32.
        checkpoint_decoder: Where gradients flow through the VAE, decode again in the backward pass,
            block by block where the VAE can, and keep only the blocks' inputs, or the latents
            where there are more than `decode_batch_size`.
        encode_batch_size: Prompts encoded at a time, which bounds the text encoders' memory.
        embedding_cache: Folder that keeps the encodings of prompts, one file each; a later run of
            the same text encoders reads them there. Several runs may share it. None keeps none.
        text_encoders: "keep" them on the device; "cpu", where they come to the device for each
            encoding alone and cannot be trained; or "drop" them: they are read from disk for
            prompts that `embedding_cache` lacks, and not at all where it has every prompt.
        offload: Parts that stay in the processor's memory while they have nothing to do: "vae".
            It comes to the device to decode, and stays there for a backward pass.
        max_table_gb: Encodings of a batch's prompts that take more GB (2^30 bytes) stay in the
            processor's memory, and only the rows of each call go to the device.
        tile_decoder: Decode large pictures in overlapping tiles: less memory, and faint seams.
        from_scratch: Keep the architecture and draw new weights for U-Net and text encoder, to
            pretrain them; for Stable Diffusion 1.x and 2.x.
        save_dtype: Precision in which a fully trained pipeline is written.
        web_lora: Write a trained LoRA a second time, for web interfaces: web_lora.safetensors.
        dtype: The old name of `frozen_dtype`.

    Raises:
        UsageError: `pretrained` is neither a pipeline folder nor a loadable hub id, is of a family
            that is not known, or a setting does not apply to its family.
    """

    denoiser: Any
    vae: Any
    process: GaussianProcess
    pretrained: str

    def __init__(
        self,
        pretrained: str = "shapes",
        *,
        config: str | None = None,
        vae: str | None = None,
        textual_inversions: list[str] | None = None,
        variant: str | None = None,
        guidance_scale: float | None = None,
        guidance_gradient: GuidanceGradient = "both",
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] | None = None,
        max_sequence_length: int | None = None,
        true_cfg_scale: float | None = None,
        cfg_normalization: float | None = None,
        cfg_truncation: float | None = None,
        frozen_dtype: FrozenDtype = "auto",
        checkpoint_denoiser: bool = False,
        channels_last: bool = False,
        compile: Compiled | None = None,
        decode_batch_size: int | Literal["auto"] = "auto",
        checkpoint_decoder: bool = True,
        encode_batch_size: int = 128,
        embedding_cache: str | None = None,
        text_encoders: TextEncoders = "keep",
        offload: list[Literal["vae"]] | None = None,
        max_table_gb: float = 1.0,
        tile_decoder: bool = False,
        from_scratch: bool = False,
        save_dtype: Precision = "float32",
        web_lora: bool = False,
        dtype: Precision | None = None,
    ) -> None:
        super().__init__()
        self.pretrained, self.variant, self.from_scratch = pretrained, variant, from_scratch
        self.guidance_gradient, self.negative_prompt = guidance_gradient, negative_prompt
        self.decode_batch_size, self.checkpoint_decoder = decode_batch_size, checkpoint_decoder
        self.encode_batch_size, self.max_table_gb = encode_batch_size, max_table_gb
        self.frozen_dtype, self.save_dtype = precisions(self, frozen_dtype, dtype, save_dtype)
        self.web_lora, self.compile_how, self._cached_in = web_lora, compile, embedding_cache
        self._text_encoders, self._offload = text_encoders, offload or []
        self._files = Files(config, vae, textual_inversions or (), text_encoders == "drop")
        options: dict[str, Any] = {"true_cfg_scale": true_cfg_scale, "crop": crop}
        options |= {"cfg_normalization": cfg_normalization, "cfg_truncation": cfg_truncation}
        sizes = {"original_size": original_size, "max_sequence_length": max_sequence_length}
        self._load((height, width), options, sizes, guidance_scale)
        self._adopt(checkpoint_denoiser, tile_decoder, channels_last)

    def _check_choices(self) -> None:
        """Check settings that are one of a few."""
        one_of(self, "guidance_gradient", get_args(GuidanceGradient))
        one_of(self, "decode_batch_size", (AUTO,), others="a whole number")
        one_of(self, "text_encoders", get_args(TextEncoders), self._text_encoders)
        one_of(self, "compile", (*get_args(Compiled), None), self.compile_how)
        for part in self._offload:
            one_of(self, "offload", ("vae",), part)

    def _check_text_encoders(self) -> None:
        """Check that text encoders can be put away, and be read again where they are dropped."""
        cached, files = self._cached_in is not None, self._files
        rule = "with from_scratch, whose text encoder is trained"
        put_off = self._text_encoders != "keep"
        require(not (put_off and self.from_scratch), self, "text_encoders", f"'keep' {rule}")
        require(not (cached and self.from_scratch), self, "embedding_cache", f"null {rule}")
        if not files.hollow_encoders:
            return
        rule = "'keep' or 'cpu' {}: what is dropped is read again from a folder or hub id"
        require(cached, self, "text_encoders", rule.format("without pipeline.embedding_cache"))
        own = files.textual_inversions or Path(self.pretrained).is_file()
        require(not own, self, "text_encoders", rule.format("with single files and inversions"))

    def _load(
        self,
        size: tuple[int | None, int | None],
        options: Mapping[str, Any],
        sizes: Mapping[str, Any],
        guidance_scale: float | None,
    ) -> None:
        """Load the model and find its family; settings from 0 up, and sizes from 1 up."""
        at_least(0, self, "max_table_gb", guidance_scale=guidance_scale, **options)
        at_least(1, self, "decode_batch_size", "encode_batch_size", **sizes)
        self._check_choices()
        self._check_text_encoders()
        self._decode_size = DecodeSize(self.decode_batch_size)
        rows = self.encode_batch_size
        loading: dict[str, Any] = {"variant": self.variant, "from_scratch": self.from_scratch}
        self.diffusers = load_parts(self.pretrained, self._loaded, self._files, **loading)
        self.family = family_of(self.diffusers, size, encode_batch_size=rows, **options, **sizes)
        own = self.family.guidance_scale
        self.guidance_scale = own if guidance_scale is None else guidance_scale
        self.family.check_guidance(self.guidance_scale, self.negative_prompt)
        if self._files.hollow_encoders and not weightless():
            self.family.read_encoder = self._reader(self._loaded)

    def _adopt(self, checkpoint_denoiser: bool, tile_decoder: bool, channels_last: bool) -> None:
        """Take over the parts of the model."""
        family, idle = self.family, self._text_encoders != "keep"
        self.denoiser, self.encoder = family.denoiser, family.encoders
        if idle and not weightless() and family.read_encoder is None:
            family.idle_encoders = self.encoder
        if idle:
            self.encoder = None  # no part of this module, so that it does not move with it
        self.vae = frozen(self.diffusers.vae)
        self.process, self.lora_targets = family.process, family.lora_targets
        if checkpoint_denoiser:
            self.denoiser.enable_gradient_checkpointing()
        if self.checkpoint_decoder and self.vae._supports_gradient_checkpointing:
            self.vae.enable_gradient_checkpointing()
        if channels_last:
            require(
                family.denoiser_name == "unet",
                self,
                "channels_last",
                f"false: {family.name} has a transformer, whose layers have no channels to reorder",
            )
            for network in (self.denoiser, self.vae):
                network.to(memory_format=torch.channels_last)
        if tile_decoder:
            self.vae.enable_tiling()
        self._spare()

    def _spare(self) -> None:
        """Save memory and time as the settings have it."""
        if self._offload:
            put_away(self, "vae")
        self.family.max_table_bytes = self.max_table_gb * 2**30
        self.compile_denoiser(self.denoiser)
        self._keep_encodings(self._loaded)

    @property
    def _loaded(self) -> torch.dtype:
        """Precision in which weights are read."""
        given = self.frozen_dtype
        return precision(self, "float32" if given == "auto" else given, "frozen_dtype")

    def _reader(self, dtype: torch.dtype) -> Callable[[str], nn.Module]:
        return text_encoder_reader(self.pretrained, dtype, self.variant)

    def settle(self, device: torch.device, dtype: torch.dtype) -> None:
        """Give the frozen weights the precision that suits the run where `frozen_dtype` is auto.

        A pipeline that is trained whole is exported whole: nothing of it is rounded.

        Raises:
            UsageError: `web_lora` is asked for, and diffusers could not read its layers.
        """
        if self.web_lora and self._has_lora:
            check_layers(self.denoiser, self._home)
        parts = [getattr(self.diffusers, name) for name in self.family.weighed()]
        parts = [part for part in parts if part is not None]
        whole = not self._has_lora and any(p.requires_grad for n in parts for p in n.parameters())
        fixed = self.frozen_dtype != "auto" or self.from_scratch
        if fixed or whole or self.vae.dtype in (dtype, torch.float64):
            return
        for part in parts:
            cast_frozen(part, dtype)
        if self.family.read_encoder is not None:
            self.family.read_encoder = self._reader(dtype)
        self._keep_encodings(dtype)

    def compile_denoiser(self, denoiser: nn.Module) -> None:
        if self.compile_how is not None and not weightless():
            compile_network(denoiser, self.compile_how)

    def _keep_encodings(self, dtype: torch.dtype) -> None:
        """Keep encodings of prompts in a folder, if one is given, by all that they depend on."""
        folder, files = self._cached_in, self._files
        if folder is None or weightless():
            return
        encoders = self.family.encoder_names
        tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
        sources = [self.pretrained, *filter(None, [files.config]), *files.textual_inversions]
        model = {
            "family": self.family.name,
            "sources": [identity(source, [*encoders, *tokenizers]) for source in sources],
            "loaded": [dtype_name(dtype), self.variant],
            **self.family.encoding_settings(),
        }
        self.family.cache = EmbeddingCache(Path(folder), model, self.family.encoded_shapes())

    @property
    def name(self) -> str:
        return Path(self.pretrained.removesuffix(".safetensors")).name

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def precision(self) -> torch.dtype:
        """Precision of the latents: single at least, also where the weights are in half."""
        return torch.promote_types(self.denoiser.dtype, torch.float32)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self.family.latent_size

    @property
    def cfg_scale(self) -> float:
        """W of classifier-free guidance."""
        return self.family.cfg_scale(self.guidance_scale)

    def encode(self, batch: Batch) -> Condition:
        """Encode `batch["prompt"]`, each unique prompt once, and the negative prompt last.

        Prompts that are the same with other columns beside them are conditions of their own.

        Raises:
            UsageError: The rows have no prompt, or one that is no text.
        """
        return encode_prompts(batch, self.family, self.negative_prompt)

    def example(self) -> Condition:
        # Not the negative prompt, under which guidance has no effect.
        return self.encode({"prompt": ["an example"]})

    def tokens(self, condition: Condition) -> Tensor:
        names, device = sorted(condition.tables), condition.tables["embedding"].device
        rows = condition.rows_on(device)
        return tokens_of([condition.tables[name][rows] for name in names]).to(self.device)

    def blank(self, condition: Condition) -> Tensor:
        shape = (len(condition), self.family.channels, *self.latent_size)
        return torch.empty(shape, dtype=self.precision, device=self.device)

    def predict(self, x_t: State, t: Tensor, condition: Condition) -> Tensor:
        x = tensor_of(x_t)
        tables = {name: _brought(condition.table(name), x.device) for name in condition.tables}
        prediction = self.family.denoise(
            self.denoiser, x.to(self.denoiser.dtype), t, tables, self.guidance_scale
        )
        return prediction.to(x.dtype)

    def forward(self, x_t: State, t: Tensor, condition: Condition) -> Tensor:
        """Return the guided prediction, u + w (c - u); both halves go through in one call.

        Where only c carries gradient there are two calls, u's without a graph.
        """
        if self.cfg_scale <= 1:
            return self.predict(x_t, t, condition)
        both = condition.beside_null()
        if self.guidance_gradient == "conditional" and torch.is_grad_enabled():
            with torch.no_grad():
                u = self.predict(x_t, t, both.index(slice(0, len(condition))))
            c = self.predict(x_t, t, condition)
        else:
            u, c = self.predict(torch.cat([tensor_of(x_t)] * 2), t.repeat(2), both).chunk(2)
        return self.family.guided(u, c, t, self.guidance_scale)

    def decode(self, x_0: State, condition: Condition) -> Tensor:
        x = tensor_of(x_0)
        check_latents(x, self.denoiser, self.encoder, condition.tables.values())
        latents = self.family.to_vae(x).to(self.vae.dtype)
        size = self._at_a_time(graph=latents.requires_grad and torch.is_grad_enabled())
        again = self.checkpoint_decoder
        pictures = decoded(self.vae, latents, size, idle=self._idle_vae, again=again)
        return (pictures.to(self.precision) / 2 + 0.5).clamp(0, 1)

    def probes(self) -> tuple[Tensor, Condition]:
        pictures = probe_pictures(*self.family.pixels).to(self.device, self.precision)
        rows = torch.zeros(len(pictures), dtype=torch.int64)
        return pictures, Condition([{"prompt": "a dark disc, drawn to probe a reward"}], {}, rows)

    def check_states(self) -> None:
        if isinstance(self.vae, AutoencoderTiny):
            raise UsageError(
                f"pipeline.init_args.pretrained: the VAE of {self.name!r} is an AutoencoderTiny, "
                "which approximates another one's latents, so there is nothing to train on "
                "pictures with; give a folder with an AutoencoderKL"
            )

    def batch_sizes(self) -> Mapping[str, BatchSize]:
        return self._decode_size.by_key()

    def _at_a_time(self, *, graph: bool) -> BatchSize:
        """Return how many pictures go through the VAE at a time."""
        if self._decode_size.given != self.decode_batch_size:
            self._decode_size = DecodeSize(self.decode_batch_size)
        device, dtype = self.device, self.vae.dtype
        return self._decode_size.at(self.family.pixels, device, dtype, graph=graph)

    @property
    def _idle_vae(self) -> bool:
        return "vae" not in self._modules

    def states(self, batch: Batch) -> Tensor:
        """Return the latents of `batch["image"]`, uint8 [B, 3, H, W]: the VAE's mode, scaled."""
        self.check_states()
        pictures = column(batch, "image").to(self.device, self.vae.dtype) / 127.5 - 1
        size = self._at_a_time(graph=False)
        modes = encoded(self.vae, pictures, size, idle=self._idle_vae)
        return self.family.from_vae(modes.to(self.precision))

    def condition_row(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        if not isinstance(entry.get("prompt"), str):
            raise UsageError('the condition has no prompt; write {"prompt": "a red fox"}')
        return entry

    def read_sample(self, sample: Any, entry: Mapping[str, Any], folder: Path) -> dict[str, Tensor]:
        """Return the pixels of a picture's file, at the size that is drawn."""
        return {"image": read_picture(sample, folder, self.family.pixels)}

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
        """Write a LoRA that `load_lora_weights` of the family's pipeline reads, or all weights."""
        if self._has_lora:
            return [*save_lora(self.denoiser, self._home, folder), *self._save_web_lora(folder)]
        if self.web_lora:
            rank_zero_info("pipeline.web_lora: no LoRA was trained, so none is written")
        whole = copy.copy(self.diffusers)
        with self.family.encoders_here(torch.device("cpu")):
            for name, part in self.diffusers.components.items():
                if isinstance(part, nn.Module):  # one at a time: a device may have room for no more
                    setattr(whole, name, copy.deepcopy(part).to("cpu", self.save_dtype))
        whole.save_pretrained(folder)
        forget_source(folder)
        return [folder]

    def hub_header(self, files: Sequence[str]) -> Mapping[str, Any]:
        return card.hub_header(self.pretrained, files)

    def tuned_facts(self, steps: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a tuned model's lit_rlft.json says for `load_tuned`.

        `max_sequence_length` is of the prompts, `scheduler` what `scheduler_facts` returns.
        """
        length = self.family.call_settings().get("max_sequence_length")
        facts = {} if length is None else {"max_sequence_length": length}
        return {
            **facts,
            "scheduler": scheduler_facts(self.diffusers.scheduler, self.process, steps),
        }

    def usage(self, files: Sequence[str], facts: Mapping[str, Any]) -> str:
        kind = type(self.diffusers).__name__
        settings = self.family.call(self.guidance_scale, self.negative_prompt)
        text = card.usage(kind, self.pretrained, self._beside(), files, facts, settings)
        if not self._has_lora:
            return text
        config = self.denoiser.peft_config["default"]
        return text + card.strength(config.r, config.lora_alpha, files)

    def _beside(self) -> card.Beside:
        """Return what was loaded beside the model's own files."""
        variant, source = self.variant, source_of(self.pretrained, EMBEDDED)
        if variant is None and Path(source).is_dir():
            variant = found_variant(Path(source), self.family.weighed(), quiet=True)
        vae = self._files.vae
        return card.Beside(
            config=self._files.config,
            variant=variant,
            vae=vae,
            vae_kind=type(self.vae).__name__,
            vae_subfolder=None if vae is None else card.vae_subfolder(vae),
            textual_inversions=self._files.textual_inversions,
            dtype=self._told_dtype,
            vae_dtype=dtype_name(self.vae.dtype),
        )

    @property
    def _told_dtype(self) -> str | None:
        """Precision that a card's code asks for; None where it is that of the files."""
        if self._has_lora:
            return dtype_name(self.denoiser.dtype)
        return None if self.save_dtype == torch.float32 else "float32"

    def _save_web_lora(self, folder: Path) -> list[Path]:
        if not self.web_lora:
            return []
        config, weights = self.denoiser.peft_config["default"], lora_weights(self.denoiser)
        title = f"{self.name} tuned with lit-rlft"
        rank, alpha = config.r, config.lora_alpha
        v_prediction = self.process.prediction_type == "v"
        path = folder / WEB_LORA
        return [save_web_lora(weights, rank, alpha, self._home, path, title, v_prediction)]

    def read_lora(self, path: Path) -> tuple[dict[str, Tensor], float | None]:
        """Read a LoRA that diffusers, peft or kohya wrote, from its file or folder."""
        return read_lora(path, self._home)

    @property
    def _has_lora(self) -> bool:
        return any(isinstance(layer, BaseTunerLayer) for layer in self.denoiser.modules())

    @property
    def _home(self) -> Home:
        return Home(type(self.diffusers), self.family.denoiser_name, self.denoiser.config)


def _brought(table: Tensor, device: torch.device) -> Tensor:
    """Return rows of a table on the device; to a GPU they go through pinned memory."""
    if device.type != "cuda" or table.device == device:
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)
