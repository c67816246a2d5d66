"""ImageReward: a BLIP tuned on how people rank pictures of the same prompt."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer

from domains.text_to_image.networks.blip import BLIP, blip_of_image_reward
from domains.text_to_image.networks.clip import Preprocessing
from domains.text_to_image.networks.state_dicts import read_state_dict, weight_file
from domains.text_to_image.networks.texts import TextReader
from domains.text_to_image.networks.weightless import NoTokenizer
from domains.text_to_image.precision import Precision, precision
from domains.text_to_image.rewards.published import check_vocabulary, read_tokenizer, reading
from domains.text_to_image.samples import check_pictures, prompts_of
from lit_rlft.core.checks import BadArgument, at_least, loading
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.reward import Reward
from lit_rlft.kit.frozen import Frozen, frozen
from lit_rlft.kit.weightless import weightless

__all__ = ["ImageReward"]

_FILE = "ImageReward.pt"
_LENGTH = 35
"""Tokens of a text, as published."""
_PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
_EXAMPLES = (0.5812, 0.2745, -1.4132, -2.0296)
"""Published scores of four pictures for that prompt."""
_CLOSE = 0.05
"""Room for how a tensor's resizing differs from PIL's; the pictures differ by more."""
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw score over ImageReward's test set."""


class ImageReward(Frozen, Reward):
    """ImageReward v1: how well people like a picture for its prompt, mean 0 and deviation 1.

    Mostly -2 to 2. A BLIP (ViT-L/16) reads the prompt while it looks at the picture; a linear head
    scores the first token, and the published mean and deviation standardise the score. The head's
    five layers have no activations between them and are multiplied into one. Preprocessing is
    CLIP's: shortest side to 224, bicubic, centre crop. Texts are cut at 35 tokens. They are not
    embedded apart from pictures, so each pair takes a pass of the text encoder. Differentiable.

    Published: the four examples at https://github.com/THUDM/ImageReward score 0.5812, 0.2745,
    -1.4132 and -2.0296. Licence: Apache-2.0.

    Args:
        pretrained: State dict: a file, a folder that holds ImageReward.pt, or a hub id. It is read
            without running code.
        tokenizer: Folder or hub id of BERT's tokenizer.
        batch_size: Pictures scored at a time, which bounds the memory.
        dtype: Precision of the encoders' weights; the head's is single.
        self_test: Folder of the four examples' pictures, 1.webp to 4.webp: before a run they have
            to score within 0.05 of what is published. None tests nothing.

    Raises:
        UsageError: `pretrained` is no such state dict, whose first missing or unknown key is named,
            or the self-test fails.

    References:
        ImageReward: Learning and Evaluating Human Preferences for Text-to-Image Generation (Xu et
        al., 2023), https://arxiv.org/abs/2304.05977
    """

    differentiable = distinguishes = True

    def __init__(
        self,
        pretrained: str = "THUDM/ImageReward",
        *,
        tokenizer: str = "google-bert/bert-base-uncased",
        batch_size: int = 32,
        dtype: Precision = "float32",
        self_test: str | None = None,
    ) -> None:
        super().__init__()
        at_least(1, self, batch_size=batch_size)
        kind = precision(self, dtype)
        network, words = _load(pretrained, tokenizer)
        self.network = frozen(network)
        for part in (network.vision, network.text):
            part.to(kind)
        size = network.vision.config.image_size
        self.preprocess = Preprocessing.from_config({"size": size, "crop_size": size})
        length = min(_LENGTH, network.text.config.max_position_embeddings)
        self.reader = TextReader(words, length, self.name, padding="max_length")
        self.batch_size, self.self_test = batch_size, self_test

    def check(self, pipeline: Pipeline) -> None:
        if self.self_test is None or weightless():
            return
        found = [self._score_of(Path(self.self_test) / f"{i + 1}.webp") for i in range(4)]
        if any(abs(a - b) > _CLOSE for a, b in zip(found, _EXAMPLES, strict=True)):
            scores = ", ".join(f"{score:.4f}" for score in found)
            published = ", ".join(map(str, _EXAMPLES))
            raise BadArgument(
                self,
                "self_test",
                f"fails: the pictures score {scores} where {published} are published; give "
                "pretrained the published weights, tokenizer google-bert/bert-base-uncased and "
                "dtype float32",
            )

    @torch.no_grad()
    def _score_of(self, path: Path) -> float:
        with loading(f"reward.init_args.self_test: {path} is no picture; give the folder of the 4"):
            image = Image.open(path).convert("RGB")
        bytes_ = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        picture = bytes_.view(image.height, image.width, 3).permute(2, 0, 1).float() / 255
        prompt = Condition([{"prompt": _PROMPT}], {}, torch.zeros(1, dtype=torch.int64))
        return float(self(picture[None], prompt))

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the score of each picture, [B]."""
        pictures = check_pictures(samples, condition)
        tokens = self.reader(prompts_of(condition))
        given = (pictures, tokens["input_ids"], tokens["attention_mask"])
        parts = zip(*(torch.split(each, self.batch_size) for each in given), strict=True)
        raw = torch.cat([self._score(*part) for part in parts])
        return ((raw - _MEAN) / _STD).to(pictures.device)

    def _score(self, pictures: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        device, dtype = self.network.head.weight.device, self.network.vision.dtype
        with torch.autocast(device.type, enabled=False):
            pixels = self.preprocess(pictures.to(device)).to(dtype)
            raw = self.network(pixels, input_ids.to(device), attention_mask.to(device))
        return raw.to(torch.promote_types(raw.dtype, torch.float32))


def _load(pretrained: str, tokenizer: str) -> tuple[BLIP, Any]:
    """Return network and tokenizer."""
    if weightless():
        with torch.device("meta"):
            network = BLIP()
        return network, NoTokenizer(network.text.config.vocab_size, _LENGTH)
    give = "the folder or hub id of BERT's tokenizer, google-bert/bert-base-uncased"
    words = read_tokenizer(AutoTokenizer, tokenizer, "a tokenizer", give)
    give = f"the file {_FILE}, a folder that holds it, or the hub id THUDM/ImageReward"
    with reading("pretrained", pretrained, "an ImageReward", give):
        network = blip_of_image_reward(read_state_dict(weight_file(pretrained, _FILE)))
        check_vocabulary(network.text.config.vocab_size, words, tokenizer)
    return network, words
