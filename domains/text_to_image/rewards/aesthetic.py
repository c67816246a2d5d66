"""How pleasing a picture is to look at, by LAION's linear scores of CLIP embeddings."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from domains.text_to_image.networks.clip import CLIPEncoder, load_clip
from domains.text_to_image.networks.state_dicts import (
    check_has,
    collapsed,
    read_state_dict,
    weight_file,
)
from domains.text_to_image.precision import Precision, precision
from domains.text_to_image.rewards.published import reading
from domains.text_to_image.samples import check_pictures
from lit_rlft.core.checks import UsageError, at_least
from lit_rlft.core.checks import reading as reading_argument
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.kit.frozen import frozen
from lit_rlft.kit.weightless import weightless

__all__ = ["LAIONAesthetic"]

_FILE = "aesthetic-model.pth"
_WEIGHT = re.compile(r"(?:(?P<chain>.*\.)?(?P<place>\d+)\.)?weight")


class LAIONAesthetic(Reward):
    """LAION's aesthetic score of a picture, for any prompt: about 1 to 10, mostly 5 to 6.5.

    r(x) = w . e(x) + b of the unit image embedding e of CLIP ViT-L/14. Version 1 is one linear
    layer; version 2 is five without activations between them, which are multiplied into one.
    Preprocessing is CLIP's: shortest side to 224, bicubic, centre crop. Differentiable.

    Published: version 2 agrees with people on 76.8 % of HPDv2's test pairs. Its collapsed weights
    have |w| = 17.995625 and b = 5.236646, version 1's |w| = 28.444397 and b = 3.529372. Licences:
    Apache-2.0 (version 2), MIT (version 1 and CLIP).

    Args:
        head: State dict of the linear layers: a file (`sac+logos+ava1-l14-linearMSE.pth` of
            version 2, `sa_0_4_vit_l_14_linear.pth` of version 1), or a hub id.
        clip: The CLIP that the head belongs to: a folder or hub id.
        batch_size: Pictures embedded at a time, which bounds the memory.
        dtype: Precision of CLIP's weights.

    Raises:
        UsageError: `head` holds no linear layers for the embeddings of `clip`, or either is
            missing.

    References:
        LAION-5B (Schuhmann et al., 2022), https://arxiv.org/abs/2210.08402
        https://github.com/christophschuhmann/improved-aesthetic-predictor
        https://github.com/LAION-AI/aesthetic-predictor
    """

    differentiable = distinguishes = True

    def __init__(
        self,
        head: str = "trl-lib/ddpo-aesthetic-predictor",
        clip: str = "openai/clip-vit-large-patch14",
        *,
        batch_size: int = 64,
        dtype: Precision = "float32",
    ) -> None:
        super().__init__()
        at_least(1, self, batch_size=batch_size)
        precision(self, dtype)  # before anything is loaded
        with reading_argument(self, "clip"):
            parts = load_clip(clip, key="clip")
        self.encoder = CLIPEncoder(parts, batch_size=batch_size, dtype=dtype)
        self.encoder.clip.text_model = None  # no text is ever embedded
        width = self.encoder.clip.visual_projection.out_features
        self.head = frozen(_head(head, width))

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the score of each picture, [B]."""
        pictures = check_pictures(samples, condition)
        embeddings = self.encoder.embed_pictures(pictures)
        weight = self.head.weight
        with torch.autocast(weight.device.type, enabled=False):
            return self.head(embeddings.to(weight)).squeeze(1).to(pictures.device)


def _head(head: str, width: int) -> nn.Linear:
    if weightless():
        return nn.Linear(width, 1, device="meta")
    give = (
        "the file sac+logos+ava1-l14-linearMSE.pth, one with the keys 'weight' and 'bias', or the "
        "hub id trl-lib/ddpo-aesthetic-predictor"
    )
    with reading("head", head, "an aesthetic head", give):
        layer = collapsed(_layers(read_state_dict(weight_file(head, _FILE))))
    if layer.in_features != width:
        raise UsageError(
            f"head: {head!r} takes embeddings of {layer.in_features} numbers, but those of `clip` "
            f"have {width}; LAION's heads belong to openai/clip-vit-large-patch14"
        )
    return layer


def _layers(state: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return weights and biases of a chain of linear layers, in order."""
    found = {name: match for name in state if (match := _WEIGHT.fullmatch(name))}
    if not found:
        raise ValueError(f"it has no weight of a linear layer, but {sorted(state)[:3]}")
    names = sorted(found, key=lambda name: int(found[name]["place"] or 0))
    pairs = [(name, name.removesuffix("weight") + "bias") for name in names]
    check_has(state, [bias for _, bias in pairs])
    other = sorted(set(state) - {name for pair in pairs for name in pair})
    if other:
        raise ValueError(f"it has an unknown {other[0]}")
    return [(state[weight], state[bias]) for weight, bias in pairs]
