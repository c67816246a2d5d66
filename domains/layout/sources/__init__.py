"""Where layouts come from: the page grammar, PubLayNet, RICO, and files of one's own."""

from domains.layout.sources.base import (
    Grammar,
    JSONLayouts,
    PubLayNet,
    RicoArrays,
    RicoJSON,
    Source,
)

__all__ = ["Grammar", "JSONLayouts", "PubLayNet", "RicoArrays", "RicoJSON", "Source"]
