"""The input of Qwen's vision-language models: pictures of any size, in patches.

transformers' own processor of these models also reads videos, and so needs torchvision. This one
reads pictures alone, with gradients.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, ImageProcessingMixin

from domains.text_to_image.networks.automatic import read_auto
from domains.text_to_image.networks.clip import Preprocessing
from lit_rlft.kit.images import to_image

__all__ = ["ROUNDING", "PatchReader", "probe", "reads_patches"]

_KIND = "Qwen2VLImageProcessor"
_PLACE = "<|image_pad|>"
"""Stands for a picture in a chat template."""
ROUNDING = 2.6 / 255
"""How far bytes, rounded in each pass of a resizing, may be from their differentiable twin."""


def reads_patches(source: str, **loading: Any) -> bool:
    """Return whether a model's pictures are read as Qwen2-VL's are.

    Args:
        source: Folder or hub id of the model.
        **loading: Arguments of transformers' loading.
    """
    try:
        config, _ = ImageProcessingMixin.get_image_processor_dict(source, **loading)
    except (OSError, ValueError):
        return False
    return str(config.get("image_processor_type", "")).startswith(_KIND)


def probe(height: int, width: int) -> Tensor:
    """Return a picture of slopes in bytes / 255, [1, 3, H, W], to compare readings of."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    channels = (rows * 5 + 0 * columns, columns * 4 + 0 * rows, (rows + columns) * 2)
    return torch.stack(channels).clamp(max=255).float()[None] / 255


class PatchReader:
    """Reads pictures and questions of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and their kin.

    A picture is resized, bicubic, so that both sides are whole numbers of groups of patches and its
    number of pixels is within the model's limits; then normalised and cut into patches, each
    repeated as a film of as many equal pictures as the model's films have per patch.

    Args:
        source: Folder or hub id of the model.
        pixels: Number of pixels that every picture is resized to; None takes the model's limits.
        **loading: Arguments of transformers' loading.

    Attributes:
        tokenizer: The model's.

    Raises:
        ValueError: The model has no chat template, or its pictures are read in another way.
    """

    differentiable = True

    def __init__(self, source: str, pixels: int | None = None, **loading: Any) -> None:
        limits = {} if pixels is None else {"min_pixels": pixels, "max_pixels": pixels}
        self.images: Any = read_auto(AutoImageProcessor, source, **limits, **loading)
        self.tokenizer: Any = read_auto(AutoTokenizer, source, **loading)
        if not self.tokenizer.chat_template:
            raise ValueError("its tokenizer has no chat template")
        # So that the last token is the same place of all texts.
        self.tokenizer.padding_side = "left"
        self.place = self.tokenizer.convert_tokens_to_ids(_PLACE)
        self._grids: dict[tuple[int, int], Tensor] = {}
        self._check()

    def __call__(self, pictures: Tensor, questions: Sequence[str]) -> dict[str, Tensor]:
        """Return the model's inputs, on the pictures' device.

        Args:
            pictures: [B, 3, H, W] in [0, 1].
            questions: One for each picture.
        """
        grid = self.grid(pictures)
        inputs = self._tokens(questions, int(grid.prod()) // self.images.merge_size**2)
        inputs["image_grid_thw"] = grid.expand(len(pictures), 3)
        device = pictures.device
        return {
            **{name: value.to(device) for name, value in inputs.items()},
            "pixel_values": self.patches(pictures),
        }

    def grid(self, pictures: Tensor) -> Tensor:
        """Return frames, rows and columns of the patches of pictures [B, 3, H, W], int64 [3]."""
        height, width = pictures.shape[-2:]
        if (height, width) not in self._grids:
            blank = to_image(torch.zeros(3, height, width))
            read = self.images(images=[blank], return_tensors="pt")
            self._grids[height, width] = read["image_grid_thw"][0]
        return self._grids[height, width]

    def patches(self, pictures: Tensor) -> Tensor:
        """Return the patches of pictures [B, 3, H, W] in [0, 1], [B * patches, pixels of each]."""
        _, rows, columns = self.grid(pictures).tolist()
        side, merged = self.images.patch_size, self.images.merge_size
        size = {"height": rows * side, "width": columns * side}
        settings = {**self.images.to_dict(), "size": size, "do_center_crop": False}
        resized = Preprocessing.from_config(settings)(pictures)
        # Patches of a group are neighbours, and groups follow each other row by row.
        groups = (rows // merged, merged, side, columns // merged, merged, side)
        parts = resized.reshape(len(pictures), 3, *groups).permute(0, 2, 5, 3, 6, 1, 4, 7)
        film = parts.unsqueeze(6).expand(*parts.shape[:6], self.images.temporal_patch_size, -1, -1)
        return film.reshape(len(pictures) * rows * columns, -1)

    def _tokens(self, questions: Sequence[str], num_places: int) -> dict[str, Tensor]:
        texts = [
            self._text(question).replace(_PLACE, _PLACE * num_places) for question in questions
        ]
        read = self.tokenizer(texts, padding=True, return_tensors="pt")
        ids = read["input_ids"]
        types = (ids == self.place).long()
        return {
            "input_ids": ids,
            "attention_mask": read["attention_mask"],
            "mm_token_type_ids": types,
        }

    def _text(self, question: str) -> str:
        # A question must not hold the place of a picture.
        content = [{"type": "image"}, {"type": "text", "text": question.replace(_PLACE, "")}]
        messages = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )

    def _check(self) -> None:
        """Compare with the model's own reading of one picture."""
        side = self.images.patch_size * self.images.merge_size
        picture = probe(2 * side + 3, 3 * side - 5)
        own = self.patches(picture)
        read = self.images(images=[to_image(picture[0])], return_tensors="pt")["pixel_values"]
        tolerance = ROUNDING / min(self.images.image_std)
        if own.shape != read.shape or (own - read).abs().max() > tolerance:
            raise ValueError("its preprocessor_config.json has settings that are not known here")
