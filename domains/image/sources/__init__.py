"""Where images come from: the embedded digits, a painter, array files, folders of pictures."""

from domains.image.sources.base import (
    DIGITS,
    Arrays,
    Digits,
    Generated,
    ImageFolder,
    Images,
    Source,
)

__all__ = ["DIGITS", "Arrays", "Digits", "Generated", "ImageFolder", "Images", "Source"]
