"""Tiny random models in the formats of the published rewards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from domains.text_to_image.networks.blip import BLIP
from domains.text_to_image.networks.open_clip import open_clip_names
from tests.conftest import TOKENIZER

__all__ = [
    "CLIP_WIDTH",
    "aesthetic_head",
    "all_weights",
    "clip_flan_t5_folder",
    "clip_folder",
    "hps_file",
    "hps_v3_file",
    "image_reward_file",
    "in_two_files",
    "llava_folder",
    "pil_processor",
    "qwen_folder",
    "tokens",
]

CLIP_WIDTH = 16
"""Numbers in an embedding of the tiny CLIP."""
_PIXELS = 28
_CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}USER: <image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)

_QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _draw(network: nn.Module, seed: int = 0) -> None:
    """Draw all weights, so that none is zero or one, as new norms and biases are."""
    generator = _seeded(seed)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = centre + noise * (0.5 / max(parameter.shape[-1:], default=1) ** 0.5)


def tokens() -> CLIPTokenizer:
    """Return the tokenizer of all tiny models that read."""
    return CLIPTokenizer.from_pretrained(TOKENIZER)


def clip_folder(folder: Path, **settings: int) -> Path:
    """Write a CLIPModel with its tokenizer and its preprocessor_config.json."""
    words = tokens()
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2, "hidden_act": "gelu"}
    text = {"vocab_size": len(words), "max_position_embeddings": 16}
    text |= {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    vision = {"image_size": _PIXELS, "patch_size": 7}
    config = CLIPConfig(
        text_config=tower | text, vision_config=tower | vision, projection_dim=CLIP_WIDTH
    )
    model = CLIPModel(config)
    _draw(model)
    model.logit_scale.data.fill_(4.6052)
    model.save_pretrained(folder)
    for path in TOKENIZER.iterdir():
        shutil.copy(path, folder)
    sizes = {"size": {"shortest_edge": _PIXELS}, "crop_size": _PIXELS}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes))
    return folder


def aesthetic_head(path: Path, width: int = CLIP_WIDTH) -> dict[str, Tensor]:
    """Write a head as improved-aesthetic-predictor has it: five linear layers."""
    sizes = (width, 24, 12, 8, 4, 1)
    state = {}
    for place, size, out in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        state[f"layers.{place}.weight"] = torch.randn(out, size, generator=_seeded(place))
        state[f"layers.{place}.bias"] = torch.randn(out, generator=_seeded(place + 9))
    torch.save(state, path)
    return state


def hps_file(path: Path) -> dict[str, Tensor]:
    """Write a state dict as HPSv2's: open_clip's keys; heads are as wide as ViT-H/14's."""
    words = tokens()
    tower = {"intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower |= {"hidden_act": "gelu"}
    text = {"vocab_size": len(words), "max_position_embeddings": 16, "hidden_size": 128}
    text |= {"eos_token_id": words.eos_token_id}
    vision = {"image_size": _PIXELS, "patch_size": 7, "hidden_size": 160}
    config = CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=16)
    model = CLIPModel(config)
    _draw(model)
    own = model.state_dict()
    state: dict[str, Tensor] = {}
    for name, (theirs, part) in open_clip_names(config).items():
        value = own[name].T.contiguous() if part == "T" else own[name]
        state[theirs] = torch.cat([state[theirs], value]) if part in ("k", "v") else value.clone()
    torch.save({"epoch": 1, "state_dict": state}, path)
    return state


def image_reward_file(path: Path) -> dict[str, Tensor]:
    """Write a state dict as ImageReward's."""
    vision = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": _PIXELS, "patch_size": 7}
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 1, "vocab_size": len(tokens()), "max_position_embeddings": 40}
    network = BLIP(vision, text)
    _draw(network)
    theirs = {
        "vision.embeddings.class_embedding": "blip.visual_encoder.cls_token",
        "vision.embeddings.position_embedding": "blip.visual_encoder.pos_embed",
        "vision.embeddings.patch_embedding": "blip.visual_encoder.patch_embed.proj",
        "vision.post_layernorm": "blip.visual_encoder.norm",
        "vision.encoder.layers": "blip.visual_encoder.blocks",
        "text": "blip.text_encoder",
    }
    inner = {"layer_norm1": "norm1", "layer_norm2": "norm2"}
    inner |= {"self_attn.qkv": "attn.qkv", "self_attn.projection": "attn.proj"}
    state = {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    for name, value in network.state_dict().items():
        if name.startswith("head"):
            continue
        start = max((s for s in theirs if name.startswith(s)), key=len)
        new = theirs[start] + name.removeprefix(start)
        if start == "vision.encoder.layers":
            for one, other in inner.items():
                new = new.replace(one, other)
        state[new] = value.clone()
    sizes = (64, 32, 16, 8, 4, 1)
    for place, size, out in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        drawn = torch.randn(out, size + 1, generator=_seeded(place)) / size**0.5
        state[f"mlp.layers.{place}.weight"] = drawn[:, 1:].clone()
        state[f"mlp.layers.{place}.bias"] = drawn[:, 0].clone()
    torch.save(state, path)
    return state


def llava_folder(folder: Path, answers: tuple[str, ...] = ("Yes", "No")) -> Path:
    """Write a tiny LLaVA 1.5 whose tokenizer has single tokens for some answers."""
    words = _words(answers, "<image>")
    text = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": _PIXELS, "patch_size": 7}
    config = LlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=CLIPVisionConfig(**vision),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    _draw(model)
    model.save_pretrained(folder)
    sizes = {"size": {"shortest_edge": _PIXELS}, "crop_size": _PIXELS}
    LlavaProcessor(
        image_processor=pil_processor()(**sizes),
        tokenizer=words,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT,
    ).save_pretrained(folder)
    return folder


def clip_flan_t5_folder(folder: Path) -> dict[str, Tensor]:
    """Write a tiny CLIP-FlanT5 as its authors': weights in two files, CLIP's among them.

    CLIP itself is in openai/tiny beside it, without weights.
    """
    clip_folder(folder / "openai/tiny")
    seen = CLIPModel.from_pretrained(folder / "openai/tiny").vision_model.state_dict()
    (folder / "openai/tiny/model.safetensors").unlink()
    letters = [*"abcdefghijklmnopqrstuvwxyzADTUSERINYo.:,?'\""]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    pieces = [("▁Yes", -1.0), ("▁N", -2.0), *((letter, -3.0) for letter in letters)]
    words = T5Tokenizer(vocab=special + pieces, extra_ids=0, model_max_length=2048)
    words.save_pretrained(folder)
    sizes = {"vocab_size": len(words), "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2}
    sizes |= {"num_heads": 3, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    network = T5ForConditionalGeneration(T5Config(**sizes, tie_word_embeddings=False))
    _draw(network)
    state = {n: v for n, v in network.state_dict().items() if "embed_tokens" not in n}
    state["lm_head.weight"] = torch.randn(len(words), 24, generator=_seeded(1)) / 5
    for place, size in ((0, 32), (2, 24)):
        drawn = torch.randn(24, size + 1, generator=_seeded(place)) / size**0.5
        state[f"mm_projector.{place}.weight"] = drawn[:, 1:].clone()
        state[f"mm_projector.{place}.bias"] = drawn[:, 0].clone()
    start = "vision_tower.vision_tower.vision_model."
    state |= {start + n.removeprefix("vision_model."): v for n, v in seen.items()}
    config = {"model_type": "clip_t5", "architectures": ["CLIPT5ForConditionalGeneration"]}
    config |= {"mm_vision_tower": "openai/tiny", "mm_projector_type": "mlp2x_gelu"}
    config |= {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    config |= {**sizes, "tie_word_embeddings": False, "mm_hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    in_two_files(folder, state)
    return state


def in_two_files(folder: Path, state: dict[str, Tensor]) -> None:
    """Write weights as older releases of transformers did, with an index."""
    places = {}
    for i in range(2):
        part = dict(list(state.items())[i::2])
        torch.save(part, folder / f"pytorch_model-0000{i + 1}-of-00002.bin")
        places |= dict.fromkeys(part, f"pytorch_model-0000{i + 1}-of-00002.bin")
    index = {"metadata": {}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _words(answers: tuple[str, ...], *special: str) -> Qwen2Tokenizer:
    """Return a tokenizer of bytes, with a token for some answers and for some marks."""
    alphabet = list(bytes_to_unicode().values())
    known = {"Yes": (("Y", "e"), ("Ye", "s")), "No": (("N", "o"),)}
    merges = [pair for answer in answers for pair in known[answer]]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(m) for m in merges)])}
    words = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    words.add_special_tokens({"additional_special_tokens": list(special)})
    return words


def qwen_folder(folder: Path) -> Path:
    """Write a tiny Qwen2-VL: patches of 4 pixels, 2 x 2 to a group, 2 to 36 groups a picture."""
    marks = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
    words = _words(("Yes", "No"), *marks, "<|image_pad|>", "<|video_pad|>")
    words.pad_token = words.eos_token = "<|im_end|>"
    words.chat_template = _QWEN_CHAT
    number = words.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    text = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    text |= {"bos_token_id": None, "eos_token_id": None, "rope_parameters": rope}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    model = Qwen2VLForConditionalGeneration(config)
    _draw(model)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    sizes |= {"size": {"shortest_edge": 2 * 64, "longest_edge": 36 * 64}}
    sizes |= {"image_processor_type": "Qwen2VLImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes))
    return folder


def hps_v3_file(path: Path, qwen: Path, earlier: bool = True) -> dict[str, Tensor]:
    """Write a state dict as HPSv3's, with names as of its release of transformers or of today's.

    Args:
        path: Where.
        qwen: Folder of the tiny Qwen2-VL, whose weights it has, and one token more.
        earlier: Take the names of transformers 4.45.
    """
    state = dict(Qwen2VLForConditionalGeneration.from_pretrained(qwen).state_dict())
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.randn(1, 32, generator=_seeded(1)) / 5])
    if earlier:
        state = {
            n.replace("model.visual.", "visual.").replace("model.language_model.", "model."): v
            for n, v in state.items()
        }
    widths = (32, 12, 6, 2)
    for place, size, out in zip((0, 3, 5), widths, widths[1:], strict=False):
        drawn = torch.randn(out, size + 1, generator=_seeded(place)) / size**0.5
        state[f"rm_head.{place}.weight"] = drawn[:, 1:].clone()
        state[f"rm_head.{place}.bias"] = drawn[:, 0].clone()
    save_file({n: v.contiguous() for n, v in state.items()}, path)
    return state


def pil_processor() -> Callable[..., Any]:
    """Return CLIP's image processor on PIL, which has a name of its own in newer releases."""
    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


def all_weights(folder: Path) -> Path:
    """Write the tiny weights of all rewards into a folder; return it."""
    clip_folder(folder / "clip")
    aesthetic_head(folder / "head.pth")
    hps_file(folder / "HPS_v2.1_compressed.pt")
    image_reward_file(folder / "ImageReward.pt")
    llava_folder(folder / "llava")
    qwen_folder(folder / "qwen")
    return folder
