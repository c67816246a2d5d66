"""Tiny random models of the classes that benchmarks score with."""

from pathlib import Path

import torch
import transformers
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from tests.domains.text_to_image.rewards.published import clip_folder

__all__ = ["COCO", "benchmark_models", "mask2former_folder"]

COCO = [
    *("person", "bicycle", "car", "motorbike", "aeroplane", "bus", "train", "truck", "boat"),
    *("traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat"),
    *("dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack"),
    *("umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard"),
    *("sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl"),
    *("banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza"),
    *("donut", "cake", "chair", "sofa", "pottedplant", "bed", "diningtable", "toilet"),
    *("tvmonitor", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave"),
    *("oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors"),
    *("teddy bear", "hair drier", "toothbrush"),
]
"""COCO's classes in the spelling that differs most from GenEval's."""


def processor(name: str) -> type:
    """Return an image processor on PIL, which has a name of its own in newer releases."""
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


def mask2former_folder(folder: Path, labels: list[str] = COCO) -> Path:
    """Write a tiny Mask2Former of some classes with its processor."""
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        dim_feedforward=16,
        num_attention_heads=2,
        num_queries=8,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    sizes = {"size": {"shortest_edge": 64, "longest_edge": 128}, "size_divisor": 32}
    processor("Mask2FormerImageProcessor")(**sizes).save_pretrained(folder)
    return folder


def benchmark_models(folder: Path) -> Path:
    """Write the tiny models of all benchmarks into a folder; return it."""
    mask2former_folder(folder / "mask2former")
    clip_folder(folder / "clip")
    return folder
