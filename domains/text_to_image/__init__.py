"""Text-to-image generation: captioned pictures, pipelines and rewards."""

from pathlib import Path

__all__ = ["EMBEDDED"]

EMBEDDED = Path(__file__).parent / "assets"
"""Folder of the models that ship with the domain, reachable by their bare names."""
