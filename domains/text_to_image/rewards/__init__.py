"""Rewards of pictures, [B, 3, H, W] in [0, 1], some of them given the prompt."""

from domains.text_to_image.rewards.clip import CLIPScore
from domains.text_to_image.rewards.function import FunctionReward
from domains.text_to_image.rewards.jpeg import (
    JPEGCompressibility,
    JPEGIncompressibility,
    SmoothJPEGCompressibility,
)
from domains.text_to_image.rewards.pixels import Brightness, Colourfulness, Symmetry
from domains.text_to_image.rewards.shapes import ShapesClassifier, ShapesEval
from domains.text_to_image.samples import check_pictures, prompts_of

__all__ = [
    "Brightness",
    "CLIPScore",
    "Colourfulness",
    "FunctionReward",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "ShapesClassifier",
    "ShapesEval",
    "SmoothJPEGCompressibility",
    "Symmetry",
    "check_pictures",
    "prompts_of",
]
