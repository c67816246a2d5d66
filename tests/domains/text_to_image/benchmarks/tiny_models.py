"""Tiny random models of the classes that benchmarks score with."""

from pathlib import Path

import torch
import transformers
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    CLIPTokenizer,
    DPTConfig,
    DPTForDepthEstimation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2Processor,
    SwinConfig,
)

from tests.conftest import TOKENIZER
from tests.domains.text_to_image.rewards.published import (
    clip_folder,
    hps_file,
    image_reward_file,
    llava_folder,
)

__all__ = [
    "COCO",
    "benchmark_models",
    "blip_folder",
    "depth_folder",
    "mask2former_folder",
    "owl_folder",
]

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


def blip_folder(folder: Path) -> Path:
    """Write a tiny BLIP that answers questions, with a tokenizer of letters, "yes" and "no"."""
    torch.manual_seed(0)
    folder.mkdir()
    letters = [start + letter for start in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, "yes", "no", "?"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2}
    text = tower | {"vocab_size": len(words) + 2, "bos_token_id": len(words)}
    text |= {"encoder_hidden_size": 32, "max_position_embeddings": 40, "pad_token_id": 0}
    vision = tower | {"image_size": 28, "patch_size": 7}
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = BlipForQuestionAnswering(config)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.3
    model.save_pretrained(folder)
    processor("BlipImageProcessor")(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def owl_folder(folder: Path) -> Path:
    """Write a tiny OWLv2 with its processor."""
    torch.manual_seed(0)
    words = CLIPTokenizer.from_pretrained(TOKENIZER)
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 16}
    text |= {"eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id}
    text |= {"pad_token_id": words.pad_token_id}
    vision = {"image_size": 32, "patch_size": 8}
    config = Owlv2Config(text_config=tower | text, vision_config=tower | vision, projection_dim=32)
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    words.model_max_length = 16
    made = processor("Owlv2ImageProcessor")(size={"height": 32, "width": 32})
    Owlv2Processor(image_processor=made, tokenizer=words).save_pretrained(folder)
    return folder


def depth_folder(folder: Path) -> Path:
    """Write a tiny DPT with its processor."""
    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        reassemble_factors=[4, 2, 1, 0.5],
        fusion_hidden_size=16,
    )
    DPTForDepthEstimation(config).save_pretrained(folder)
    processor("DPTImageProcessor")(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def benchmark_models(folder: Path) -> Path:
    """Write the tiny models of all benchmarks into a folder; return it."""
    mask2former_folder(folder / "mask2former")
    clip_folder(folder / "clip")
    hps_file(folder / "HPS_v2.1_compressed.pt")
    image_reward_file(folder / "ImageReward.pt")
    blip_folder(folder / "blip")
    owl_folder(folder / "owl")
    depth_folder(folder / "depth")
    llava_folder(folder / "llava")
    return folder
