"""Sana: a transformer with linear attention on latents of 32 x 32 pixels each, and Gemma2."""

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderDC
from torch import Tensor

from domains.text_to_image.families.base import Family, Tables
from domains.text_to_image.families.checks import latent_problems, missing, text_problems
from domains.text_to_image.networks.texts import Reader
from lit_rlft.core.process import GaussianProcess
from lit_rlft.kit.captions import masked
from lit_rlft.kit.flow_schedulers import flow_process, flow_timestep

__all__ = ["Sana"]

_MULTIPLE = 32
"""Its pipeline takes sizes in multiples of this, whatever the VAE's factor."""
_NEGATIVE = "\0"
"""Begins a text that is read without the instruction; no prompt begins so."""


class Sana(Family):
    """Sana: Gemma2 reads the prompt after an instruction to enrich it, on a rectified flow.

    The instruction is that of diffusers' pipeline (`complex_human_instruction`); negative prompts
    are read without it. An encoding has one column more than the text features: 1 for a token of
    the text, 0 for the zeros after its end.

    Options:
        max_sequence_length: Most tokens of a prompt, with the first and last before it; 300 unless
            given.

    References:
        SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers (Xie et
        al., 2024), https://arxiv.org/abs/2410.10629
    """

    name = "Sana"
    pipeline_class = "SanaPipeline"
    lora_targets = ("to_q", "to_k", "to_v")
    guidance_scale = 4.5
    option_names: ClassVar[tuple[str, ...]] = ("max_sequence_length",)
    overflows_in_half = ("text encoder", "VAE")

    def problems(self) -> Iterator[str]:
        parts, config = self.parts, self.denoiser.config
        yield from missing(parts, self.needed())
        yield from text_problems(parts.text_encoder, parts.tokenizer, config["caption_channels"])
        if config.get("guidance_embeds"):
            yield "its transformer is given the guidance scale, as SANA-Sprint's is"
        read = config["in_channels"]
        returned = config["out_channels"] or read
        if returned == 2 * read:  # learned variances, which its pipeline leaves out
            returned = read
        yield from latent_problems(parts.vae, read, returned, "transformer", kinds=(AutoencoderDC,))

    @property
    def _length(self) -> int:
        return self.options.get("max_sequence_length", 300)

    @property
    def _instruction(self) -> list[str]:
        call = inspect.signature(type(self.parts).__call__).parameters
        return call["complex_human_instruction"].default

    def encoding_settings(self) -> dict[str, Any]:
        return {"instruction": self._instruction}

    def call_settings(self) -> dict[str, Any]:
        # Binning draws another size of the same shape, and cuts the picture to the given one.
        return {"max_sequence_length": self._length, "use_resolution_binning": False}

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"embedding": (self._length, self.denoiser.config["caption_channels"] + 1)}

    @property
    def multiple(self) -> int:
        return math.lcm(_MULTIPLE, self.factor * self.denoiser.config["patch_size"])

    def native(self) -> tuple[int, int] | None:
        size = self.denoiser.config["sample_size"]
        return size, size

    def make_process(self) -> GaussianProcess:
        return flow_process(self.parts.scheduler, self.name, None, own_grid=True)

    def readers(self) -> list[Reader]:
        """Return Gemma2's: its start and the instruction's last token come before the prompt."""
        remedy = "raise pipeline.init_args.max_sequence_length, or shorten it"
        return [Reader(self.parts.tokenizer, self._length - 1, "Gemma2", remedy)]

    def tables(self, prompts: Sequence[str], negative: str | None) -> dict[str, Tensor]:
        return self.encode([*prompts, _NEGATIVE + (negative or "")])

    def encode_some(self, prompts: list[str]) -> dict[str, Tensor]:
        encoder = self.parts.text_encoder
        if encoder.device.type == "meta":
            return self.without_numbers(len(prompts), encoder.dtype)
        rows: list[Tensor | None] = [None] * len(prompts)
        for plain, instruction in ((False, self._instruction), (True, None)):
            chosen = [i for i, text in enumerate(prompts) if text.startswith(_NEGATIVE) == plain]
            if not chosen:
                continue
            embedding, mask, _, _ = self.parts.encode_prompt(
                [prompts[i].removeprefix(_NEGATIVE) for i in chosen],
                do_classifier_free_guidance=False,
                max_sequence_length=self._length,
                complex_human_instruction=instruction,
            )
            for i, row in zip(chosen, masked(embedding, mask), strict=True):
                rows[i] = row
        return {"embedding": torch.stack([row for row in rows if row is not None])}

    def denoise(
        self, network: Any, x_t: Tensor, t: Tensor, tables: Tables, guidance: float
    ) -> Tensor:
        config, rows = self.denoiser.config, tables["embedding"].to(x_t.dtype)
        output = network(
            x_t,
            encoder_hidden_states=rows[..., :-1],
            encoder_attention_mask=rows[..., -1],
            timestep=flow_timestep(self.process, t) * config["timestep_scale"],
            return_dict=False,
        )[0]
        return output[:, : config["in_channels"]]
