"""Tiny random detectors and a tiny BLIP, of the real classes and in the real formats."""

import json
import shutil
from pathlib import Path

import torch
from transformers import (
    BlipConfig,
    BlipForQuestionAnswering,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Owlv2Config,
    Owlv2ForObjectDetection,
    SwinConfig,
)

from tests.conftest import TOKENIZER
from tests.domains.text_to_image.rewards.published import _draw, tokens

__all__ = ["NAMES", "blip_folder", "mask2former_folder", "owl_folder"]

NAMES = ("person", "dog", "mouse", "bench", "clock")


def mask2former_folder(folder: Path) -> Path:
    """Write a Mask2Former of a few classes, for pictures of 64 pixels."""
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2],
        window_size=2, out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, hidden_dim=32, feature_size=32, mask_feature_size=32,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16,
        encoder_feedforward_dim=16, num_queries=8,
        id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)},
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    settings = {"image_processor_type": "Mask2FormerImageProcessor"}
    settings |= {"size": {"shortest_edge": 64, "longest_edge": 96}, "size_divisor": 32}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def owl_folder(folder: Path) -> Path:
    """Write an OWLv2 that sees 32 pixels in 4 patches."""
    words = tokens()
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 16}
    vision = {"image_size": 32, "patch_size": 8}
    model = Owlv2ForObjectDetection(
        Owlv2Config(text_config=tower | text, vision_config=tower | vision, projection_dim=32)
    )
    _draw(model)
    model.save_pretrained(folder)
    for path in TOKENIZER.iterdir():
        shutil.copy(path, folder)
    settings = {"image_processor_type": "Owlv2ImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


_WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "yes", "no", "a", "the", "green", "red", "blue"),
    *("bench", "bowl", "car", "and", "?", "##s"),
]


def blip_folder(folder: Path) -> Path:
    """Write a BlipForQuestionAnswering that sees 32 pixels, with a tokenizer of a few words."""
    count = len(_WORDS)
    text = {"vocab_size": count + 2, "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 40}
    # Beside the words there are the marks of an answer's and of a question's beginning.
    text |= {"bos_token_id": count, "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3}
    text |= {"encoder_hidden_size": 32, "is_decoder": True}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision))
    _draw(model)
    model.tie_weights()
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(_WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    settings = {"size": {"height": 32, "width": 32}, "do_center_crop": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder
