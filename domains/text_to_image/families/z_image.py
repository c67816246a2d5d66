"""Z-Image: a transformer of one stream, which reads text and latents as one sequence of tokens."""

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from domains.text_to_image.families.base import Family, Tables
from domains.text_to_image.families.chat import chat_problems, chat_reader
from domains.text_to_image.families.checks import latent_problems, missing, text_problems
from domains.text_to_image.networks.texts import Reader
from lit_rlft.core.checks import UsageError
from lit_rlft.core.process import GaussianProcess
from lit_rlft.kit.captions import filled
from lit_rlft.kit.flow_schedulers import flow_process

__all__ = ["ZImage"]

_PATCH = 2
_MULTIPLE = 32
"""Captions are filled up to a multiple of this in the transformer."""


class ZImage(Family):
    """Z-Image: captions of their own lengths from Qwen3, and a transformer on a rectified flow.

    An encoding has one column more than the text features: 1 for a token of the caption, 0 for the
    zeros after its end. Guidance is c + w (c - u), as in its pipeline, which has none at w = 0.

    Options:
        max_sequence_length: Most tokens of a caption with the chat around it; 512 unless given.
        cfg_normalization: The guided prediction is at most this times as long as c; 0 is no bound.
        cfg_truncation: No guidance where 1 - t is above this.

    References:
        Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion
        Transformer (2025), https://arxiv.org/abs/2511.22699
    """

    name = "Z-Image"
    pipeline_class = "ZImagePipeline"
    guidance_scale = 5.0
    guided_above = "guidance_scale above 0"
    option_names: ClassVar[tuple[str, ...]] = (
        "max_sequence_length",
        "cfg_normalization",
        "cfg_truncation",
    )

    def problems(self) -> Iterator[str]:
        parts, config = self.parts, self.denoiser.config
        yield from missing(parts, self.needed())
        yield from text_problems(parts.text_encoder, parts.tokenizer, config["cap_feat_dim"])
        yield from chat_problems(parts.tokenizer)
        patches = zip(config["all_patch_size"], config["all_f_patch_size"], strict=False)
        if (_PATCH, 1) not in patches:
            yield f"its transformer has no patches of {_PATCH} x {_PATCH} latents (all_patch_size)"
        yield from latent_problems(
            parts.vae, config["in_channels"], config["in_channels"], "transformer"
        )

    @property
    def _length(self) -> int:
        return self.options.get("max_sequence_length", 512)

    def call_settings(self) -> dict[str, Any]:
        names = ("cfg_normalization", "cfg_truncation")
        given = {name: self.options.get(name) for name in names}
        return {"max_sequence_length": self._length, **given}

    def encoded_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"embedding": (self._length, self.denoiser.config["cap_feat_dim"] + 1)}

    @property
    def multiple(self) -> int:
        return _PATCH * self.factor

    def native(self) -> tuple[int, int] | None:
        return 1024 // self.factor, 1024 // self.factor

    def _pixels(self, given: tuple[int | None, int | None]) -> tuple[int, int]:
        """Return the size, where the transformer has places for it and for the captions."""
        sizes = super()._pixels(given)
        tokens, *edges = self.denoiser.config["axes_lens"]
        most = (tokens - 2) // _MULTIPLE * _MULTIPLE
        if self._length > most:
            raise UsageError(
                f"pipeline.init_args.max_sequence_length is {self._length}, but this model has "
                f"places for {most} tokens; give at most that"
            )
        for key, size, edge in zip(("height", "width"), sizes, edges, strict=True):
            if size > edge * self.multiple:
                raise UsageError(
                    f"pipeline.init_args.{key} is {size}, but this model has places for "
                    f"{edge * self.multiple} pixels; give at most that"
                )
        return sizes

    def cfg_scale(self, guidance: float) -> float:
        return guidance + 1

    def guided(self, u: Tensor, c: Tensor, t: Tensor, guidance: float) -> Tensor:
        prediction = super().guided(u, c, t, guidance)
        if bound := self.options.get("cfg_normalization"):
            share = bound * _length_of(c) / _length_of(prediction).clamp(min=1e-20)
            prediction = prediction * share.clamp(max=1)
        if (last := self.options.get("cfg_truncation")) is not None:
            done = (1000 - (t * 1000).float()) / 1000  # compared as diffusers rounds it
            prediction = c.where((done.double() > last).view(-1, 1, 1, 1), prediction)
        return prediction

    def make_process(self) -> GaussianProcess:
        height, width = self.latent_size
        tokens = (height // _PATCH) * (width // _PATCH)
        return flow_process(self.parts.scheduler, self.name, tokens, own_grid=False)

    def readers(self) -> list[Reader]:
        return chat_reader(self.parts.tokenizer, self._length)

    def encode_some(self, prompts: list[str]) -> dict[str, Tensor]:
        encoder = self.parts.text_encoder
        if encoder.device.type == "meta":
            return self.without_numbers(len(prompts), encoder.dtype)
        captions, _ = self.parts.encode_prompt(  # writes into the list
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self._length
        )
        return {"embedding": filled(captions, self._length)}

    def denoise(
        self, network: Any, x_t: Tensor, t: Tensor, tables: Tables, guidance: float
    ) -> Tensor:
        latents = list(x_t.unsqueeze(2).unbind())
        captions = _captions(tables["embedding"].to(x_t.dtype))
        outputs = network(latents, (1 - t).float(), captions, return_dict=False)[0]
        if x_t.is_meta:  # the network keeps its table of places, here one without numbers
            network.rope_embedder.freqs_cis = None
        return -torch.stack(outputs).squeeze(2)


def _length_of(x: Tensor) -> Tensor:
    """Return the Euclidean norm of each row, [B, 1, 1, 1]."""
    return x.flatten(start_dim=1).norm(dim=1).view(-1, 1, 1, 1)


def _captions(rows: Tensor) -> list[Tensor]:
    """Return each caption's own features, [L', F], of rows [B, L, F + 1]."""
    lengths = [rows.shape[1]] * len(rows)
    if not rows.is_meta:
        lengths = rows[..., -1].sum(dim=1, dtype=torch.int64).tolist()
    return [row[:length, :-1] for row, length in zip(rows, lengths, strict=True)]
