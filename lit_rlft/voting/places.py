"""Where votes, samples and pictures lie in a run's folder, and which files a page can show."""

import hashlib
from pathlib import Path

__all__ = ["BLIND", "FOLDER", "PAIRS", "SAMPLES", "SUFFIXES", "content_name", "drawing_of"]

FOLDER = "votes"
"""The votes' folder in a run's."""
SAMPLES = "samples"
"""Samples in the votes' folder; those of `predict` in a run's."""
BLIND, PAIRS = "blind", "pairs.jsonl"
"""Pictures of two models in a run's folder, and the list of them."""
SUFFIXES = (".svg", ".png", ".jpg", ".jpeg", ".webp")
"""Of pictures that a page can show, the sharpest first."""


def drawing_of(sample: Path) -> Path | None:
    """Return the picture of a sample's file: itself, or the one of its name; None without one."""
    if sample.suffix.lower() in SUFFIXES:
        return sample
    found = [path for suffix in SUFFIXES if (path := sample.with_suffix(suffix)).is_file()]
    return found[0] if found else None


def content_name(content: bytes) -> str:
    """Return a name that files of equal content have alone."""
    return hashlib.blake2b(content, digest_size=10).hexdigest()
