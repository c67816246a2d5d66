"""Rewards of pictures, [B, 3, H, W] in [0, 1], some of them given the prompt."""

from domains.text_to_image.rewards.aesthetic import LAIONAesthetic
from domains.text_to_image.rewards.clip import CLIPScore
from domains.text_to_image.rewards.function import FunctionReward
from domains.text_to_image.rewards.hpsv2 import HPSv2
from domains.text_to_image.rewards.hpsv3 import HPSv3
from domains.text_to_image.rewards.image_reward import ImageReward
from domains.text_to_image.rewards.jpeg import (
    JPEGCompressibility,
    JPEGIncompressibility,
    SmoothJPEGCompressibility,
)
from domains.text_to_image.rewards.ocr import OCRAccuracy
from domains.text_to_image.rewards.pick_score import PickScore
from domains.text_to_image.rewards.pixels import Brightness, Colourfulness, Symmetry
from domains.text_to_image.rewards.shapes import ShapesClassifier, ShapesEval
from domains.text_to_image.rewards.soft_tifa import SoftTIFA
from domains.text_to_image.rewards.vlm_judge import VLMJudge
from domains.text_to_image.rewards.vqa_score import VQAScore
from domains.text_to_image.samples import check_pictures, prompts_of

__all__ = [
    "Brightness",
    "CLIPScore",
    "Colourfulness",
    "FunctionReward",
    "HPSv2",
    "HPSv3",
    "ImageReward",
    "JPEGCompressibility",
    "JPEGIncompressibility",
    "LAIONAesthetic",
    "OCRAccuracy",
    "PickScore",
    "ShapesClassifier",
    "ShapesEval",
    "SmoothJPEGCompressibility",
    "SoftTIFA",
    "Symmetry",
    "VLMJudge",
    "VQAScore",
    "check_pictures",
    "prompts_of",
]
