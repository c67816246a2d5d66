"""Where images come from: the embedded digits, a painter, array files, folders of pictures."""

from domains.image.sources.arrays import Arrays
from domains.image.sources.base import Images, Source
from domains.image.sources.folders import ImageFolder
from domains.image.sources.generated import DIGITS, Digits, Generated

__all__ = ["DIGITS", "Arrays", "Digits", "Generated", "ImageFolder", "Images", "Source"]
