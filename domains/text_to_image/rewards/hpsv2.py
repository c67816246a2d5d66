"""Human preference score v2 and v2.1: a CLIP tuned on which pictures people prefer."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from domains.text_to_image.networks.clip import CLIPEncoder, CLIPParts
from domains.text_to_image.networks.open_clip import VIT_H_14, BlackBars, clip_of_open_clip
from domains.text_to_image.networks.state_dicts import read_state_dict, weight_file
from domains.text_to_image.networks.weightless import NoTokenizer
from domains.text_to_image.precision import Precision, precision
from domains.text_to_image.rewards.published import check_vocabulary, read_tokenizer, reading
from domains.text_to_image.samples import check_pictures, prompts_of
from lit_rlft.core.checks import at_least, one_of
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.kit.weightless import weightless

__all__ = ["HPSv2"]

Version = Literal["2.0", "2.1"]
_FILES: dict[str, str] = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}


class HPSv2(Reward):
    """Human preference score v2 or v2.1: how well people like a picture for its prompt.

    r(x, c) = cos(e(x), e(c)) of a CLIP ViT-H/14 tuned on HPDv2, without the logit scale: mostly
    0.2 to 0.35; tables print 100 times that. Preprocessing is HPSv2's: longest side to 224,
    bicubic, black bars before normalising. Texts are cut at 77 tokens. Differentiable.

    Published: right on 83.3 % (v2) and 84.1 % (v2.1) of HPDv2's test pairs, 65.7 % and 66.8 % of
    ImageReward's. Means of v2.1 on its four styles, times 100: SD 1.4 25.35, SD 2.0 26.38, SDXL
    0.9 30.63, its refiner 31.34. torchvision resized tensors without antialiasing before version
    0.17, so published means may be without. Licence: Apache-2.0.

    Args:
        pretrained: open_clip's state dict: a file, a folder that holds it, or a hub id. It is
            read without running code.
        version: Which file to take from a folder or hub id.
        tokenizer: Folder or hub id of CLIP's tokenizer.
        antialias: Resize with an antialiasing filter, as PIL and newer torchvisions do.
        batch_size: Pictures embedded at a time, which bounds the memory.
        dtype: Precision of the weights.

    Raises:
        UsageError: `pretrained` is no such state dict; the first missing or unknown key is named.

    References:
        Human Preference Score v2 (Wu et al., 2023), https://arxiv.org/abs/2306.09341
    """

    differentiable = distinguishes = True

    def __init__(
        self,
        pretrained: str = "xswu/HPSv2",
        version: Version = "2.1",
        *,
        tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        antialias: bool = True,
        batch_size: int = 32,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__()
        at_least(1, self, batch_size=batch_size)
        one_of(self, "version", get_args(Version), version)
        precision(self, dtype)  # before anything is loaded
        model, words = _load(pretrained, _FILES[version], tokenizer)
        preprocess = BlackBars(model.config.vision_config.image_size, antialias)
        parts = CLIPParts(model, words, preprocess)
        self.encoder = CLIPEncoder(parts, batch_size=batch_size, dtype=dtype)

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the score of each picture, [B], in [-1, 1]."""
        pictures = check_pictures(samples, condition)
        texts = self.encoder.embed_texts(prompts_of(condition))
        images = self.encoder.embed_pictures(pictures)
        return (images * texts).sum(dim=-1).to(pictures.device)


def _load(pretrained: str, file: str, tokenizer: str) -> tuple[Any, Any]:
    """Return model and tokenizer."""
    if weightless():
        with torch.device("meta"):
            model = CLIPModel(CLIPConfig(**VIT_H_14))
        sizes = VIT_H_14["text_config"]
        return model, NoTokenizer(sizes["vocab_size"], sizes["max_position_embeddings"])
    give = "the folder or hub id of CLIP's tokenizer, such as openai/clip-vit-large-patch14"
    words = read_tokenizer(CLIPTokenizer, tokenizer, "a tokenizer of CLIP", give)
    give = f"the file {file}, a folder that holds it, or the hub id xswu/HPSv2"
    with reading("pretrained", pretrained, "an HPSv2", give):
        model = clip_of_open_clip(
            read_state_dict(weight_file(pretrained, file)), words.eos_token_id
        )
        check_vocabulary(model.config.text_config.vocab_size, words, tokenizer)
    return model, words
