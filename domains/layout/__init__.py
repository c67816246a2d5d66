"""Layouts: labelled boxes on a page or screen, from a page grammar to PubLayNet and RICO."""

from pathlib import Path

__all__ = ["EMBEDDED"]

EMBEDDED = Path(__file__).parent / "assets"
"""Folder of the models that ship with the domain, reachable by their bare names."""
