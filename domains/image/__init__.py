"""Unconditional images: a U-Net in pixel space, any folder of pictures, set distances."""

from pathlib import Path

__all__ = ["EMBEDDED"]

EMBEDDED = Path(__file__).parent / "assets"
"""Folder of the models that ship with the domain, reachable by their bare names."""
