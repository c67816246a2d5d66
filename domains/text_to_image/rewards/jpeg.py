"""Rewards of the size that a picture takes as a JPEG file."""

import io
from typing import Any

import torch
from torch import Tensor

from domains.text_to_image.rewards.jpeg_size import coded_bytes, quantisation_tables
from domains.text_to_image.samples import check_pictures
from lit_rlft.core.checks import within
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.kit.images import to_image

__all__ = ["JPEGCompressibility", "JPEGIncompressibility", "SmoothJPEGCompressibility"]


class JPEGCompressibility(Reward):
    """Minus the size of the picture as a JPEG file, in kilobytes of 1000 bytes.

    Encoded by PIL with 4:2:0 chroma subsampling, its default.

    Args:
        quality: JPEG quality, 1 to 100.

    References:
        Training Diffusion Models with Reinforcement Learning (Black et al., 2023),
        https://arxiv.org/abs/2305.13301
    """

    def __init__(self, quality: int = 95) -> None:
        super().__init__()
        within(1, 100, self, quality=quality)
        self.quality = quality

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return minus the file size of each picture, [B], in kilobytes."""
        pictures = check_pictures(samples, condition)
        sizes = [_jpeg_bytes(picture, self.quality) for picture in pictures.detach().cpu()]
        return -torch.tensor(sizes, dtype=torch.float32).to(pictures.device) / 1000


class JPEGIncompressibility(JPEGCompressibility):
    """The size of the picture as a JPEG file, in kilobytes: the negative of JPEGCompressibility.

    Args:
        quality: JPEG quality, 1 to 100.
    """

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the file size of each picture, [B], in kilobytes."""
        return -super().forward(samples, condition)


class SmoothJPEGCompressibility(Reward):
    """Minus the estimated size of the picture as a JPEG file, in kilobytes of 1000 bytes.

    JPEGCompressibility made differentiable: everything up to the quantisation is that of the file,
    and the cost of a coefficient is a smooth function of it; see `jpeg_size`.

    Args:
        quality: JPEG quality, 1 to 100.

    Raises:
        UsageError: The quality is out of range.

    References:
        Training Diffusion Models with Reinforcement Learning (Black et al., 2023),
        https://arxiv.org/abs/2305.13301
        Digital compression and coding of continuous-tone still images (ITU-T T.81, 1992),
        https://www.w3.org/Graphics/JPEG/itu-t81.pdf
    """

    differentiable = True
    tables: Tensor

    def __init__(self, quality: int = 95) -> None:
        super().__init__()
        within(1, 100, self, quality=quality)
        # Integers, so that a module converted to half precision keeps them.
        self.register_buffer("tables", quantisation_tables(quality), persistent=False)

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return minus the estimated size of each picture, [B], in kilobytes, below -0.6."""
        pictures = check_pictures(samples, condition)
        return -coded_bytes(pictures, self.tables) / 1000


def _jpeg_bytes(picture: Tensor, quality: int) -> int:
    buffer = io.BytesIO()
    to_image(picture).save(buffer, format="JPEG", quality=quality, subsampling="4:2:0")
    return buffer.tell()
