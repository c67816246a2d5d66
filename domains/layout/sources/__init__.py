"""Where layouts come from: the page grammar, PubLayNet, RICO, and files of one's own."""

from domains.layout.sources.base import LayoutFile, Source
from domains.layout.sources.files import JSONLayouts, PubLayNet, RicoArrays, RicoJSON
from domains.layout.sources.generated import Grammar

__all__ = [
    "Grammar",
    "JSONLayouts",
    "LayoutFile",
    "PubLayNet",
    "RicoArrays",
    "RicoJSON",
    "Source",
]
