"""How many pictures go through the VAE at a time."""

from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_rlft.core.batch_size import BatchSize

__all__ = ["DecodeSize", "room_for"]

_KEY = "pipeline.decode_batch_size"
_PLAIN = 32
"""Pictures at a time where nothing tells how much memory there is, and the most to begin with."""
_BYTES = {False: 3 * 2**10, True: 20 * 2**10}
"""Memory per pixel at its peak, in single precision, without a graph and with one."""
_SHARE = 0.5
"""Share of the free memory to begin with."""


class DecodeSize:
    """The number of pictures at a time, without a graph and with one.

    Args:
        given: A number, or "auto": what half of the GPU's free memory has room for, 32 at most,
            and fewer where memory runs out nevertheless.
    """

    def __init__(self, given: int | Literal["auto"]) -> None:
        self.given = given
        self._sizes = {
            graph: BatchSize(key, given, _PLAIN, rank_zero_info)
            for graph, key in ((False, _KEY), (True, f"{_KEY} with gradients"))
        }

    def by_key(self) -> dict[str, BatchSize]:
        """Return both sizes by key."""
        return {size.key: size for size in self._sizes.values()}

    def at(
        self, pixels: tuple[int, int], device: torch.device, dtype: torch.dtype, *, graph: bool
    ) -> BatchSize:
        """Return the size to decode with.

        Args:
            pixels: Height and width of a picture.
            device: Where the VAE is.
            dtype: Its precision.
            graph: Whether gradients will flow through it.
        """
        size = self._sizes[graph]
        if size.automatic and not size.begun and device.type == "cuda":
            single = pixels[0] * pixels[1] * _BYTES[graph]
            size.begin(room_for(single * dtype.itemsize // 4, _free(device)))
        return size


def room_for(each: int, free: int) -> int:
    """Return the power of two of pictures, 32 at most, that half of the free bytes has room for.

    Args:
        each: Bytes for a picture.
        free: Free bytes.
    """
    number = max(int(_SHARE * free) // each, 1)
    return min(1 << number.bit_length() - 1, _PLAIN)


def _free(device: torch.device) -> int:
    """Return the bytes of a GPU that are free, with those that torch holds in reserve."""
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + held)
