"""The layout encoder: features for FID and KID, and a critic of real and jittered pages.

A transformer reads a token of its own and then a layout's elements, in any order. The token's
output is the layout's feature vector. The network learns two tasks: to tell real layouts from
jittered ones, which makes it a critic, and to reconstruct each element from the features, so that
they keep more than the first task needs.

The architecture is that of the layout networks of the literature: their files of weights load.

References:
    Constrained Graphic Layout Generation via Latent Optimization (Kikuchi et al., 2021),
    https://arxiv.org/abs/2108.00871
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from domains.layout import EMBEDDED
from domains.layout.page.classes import class_list
from domains.layout.samples import EMPTY, Layouts
from lit_rlft.core.checks import UsageError, at_least, loading, one_of
from lit_rlft.core.randomness import own_rng
from lit_rlft.kit.frozen import frozen
from lit_rlft.kit.network_folder import (
    load_pretrained,
    load_weights,
    read_settings,
    save_network,
)

__all__ = ["EncoderArchitecture", "LayoutEncoder", "load_encoder", "load_published"]

_PUBLISHED = {
    "emb_label": "label_in",
    "fc_bbox": "box_in",
    "enc_fc_in": "element_in",
    "enc_transformer.token": "token",
    "enc_transformer.core": "encoder",
    "fc_out_disc": "critic",
    "pos_token": "places",
    "dec_fc_in": "place_in",
    "dec_transformer": "decoder",
    "fc_out_cls": "class_out",
    "fc_out_bbox": "box_out",
}
"""Our names of the parts of a published network."""


Boxes = Literal["ltrb", "xywh"]


@dataclass(frozen=True)
class EncoderArchitecture:
    """Sizes of the network, as config.json holds them.

    Attributes:
        classes: A known class list, or names.
        max_elements: Most elements that can be reconstructed.
        width: Size of the features.
        depth: Number of layers of encoder and decoder.
        num_heads: Attention heads.
        boxes: How the network reads a box: "ltrb" edges or "xywh" centre and size.
        num_octaves: Number of periods 1, 1/2, ... at which sines and cosines of each box value are
            inputs too: attention multiplies them, which resolves small distances. The literature
            has 0.
    """

    classes: str | Sequence[str] = "publaynet"
    max_elements: int = 12
    width: int = 64
    depth: int = 2
    num_heads: int = 4
    boxes: Boxes = "ltrb"
    num_octaves: int = 7

    def __post_init__(self) -> None:
        one_of(self, "boxes", get_args(Boxes))
        at_least(1, self, "max_elements", "width", "depth", "num_heads")
        at_least(0, self, "num_octaves")


class LayoutEncoder(nn.Module):
    """From layouts to features [B, D], to the logit of "real", and back to elements.

    Args:
        architecture: Sizes of the layers.
    """

    def __init__(self, architecture: EncoderArchitecture | None = None) -> None:
        super().__init__()
        self.architecture = a = architecture or EncoderArchitecture()
        self.classes = class_list(a.classes)
        num_labels = len(self.classes) + 1  # 0 for an empty slot
        self.label_in = nn.Embedding(num_labels, a.width)
        self.box_in = nn.Linear(4 * (1 + 2 * a.num_octaves), a.width)
        self.element_in = nn.Linear(2 * a.width, a.width)
        self.token = nn.Parameter(torch.randn(1, 1, a.width))
        self.encoder = _transformer(a)
        self.critic = nn.Linear(a.width, 1)
        self.places = nn.Parameter(torch.rand(a.max_elements, 1, a.width))
        self.place_in = nn.Linear(2 * a.width, a.width)
        self.decoder = _transformer(a)
        self.class_out = nn.Linear(a.width, num_labels)
        self.box_out = nn.Linear(a.width, 4)

    def forward(self, layouts: Layouts) -> Tensor:
        """Return features, [B, D], differentiable with respect to boxes.

        Raises:
            UsageError: The layouts have other classes.
        """
        self.check_classes(layouts.classes)
        empty = ~layouts.valid
        boxes = self.boxes_of(layouts).masked_fill(empty.unsqueeze(-1), 0)
        labels = (layouts.labels + 1).clamp(min=0)
        parts = torch.cat([self.box_in(self._waves(boxes)), self.label_in(labels)], dim=-1)
        elements = torch.relu(self.element_in(parts))
        tokens = torch.cat([self.token.expand(len(boxes), -1, -1), elements], dim=1)
        hidden = torch.nn.functional.pad(empty, (1, 0))  # the token is never hidden
        return self.encoder(tokens, src_key_padding_mask=hidden)[:, 0]

    def check_classes(self, classes: tuple[str, ...]) -> None:
        """Raise UsageError unless layouts have the classes that it was trained for."""
        if classes != self.classes:
            raise UsageError(
                f"this encoder was trained for the classes {list(self.classes)}, the layouts have "
                f"{list(classes)}; train or load one for these"
            )

    def logits(self, features: Tensor) -> Tensor:
        """Return the logit of "real" of each layout, [B]."""
        return self.critic(features).squeeze(-1)

    def reconstruct(self, features: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of each element's label [B, N, C + 1] and its box [B, N, 4].

        Args:
            features: [B, D].
            empty: [B, N] bool, slots without an element.
        """
        num_slots = empty.shape[1]
        places = self.places[:num_slots, 0].expand(len(features), -1, -1)
        both = torch.cat([features.unsqueeze(1).expand_as(places), places], dim=-1)
        hidden = torch.relu(self.place_in(both))
        hidden = self.decoder(hidden, src_key_padding_mask=empty)
        return self.class_out(hidden), torch.sigmoid(self.box_out(hidden))

    def boxes_of(self, layouts: Layouts) -> Tensor:
        """Return boxes as the network takes them, [B, N, 4]."""
        return layouts.edges if self.architecture.boxes == "ltrb" else layouts.boxes

    def _waves(self, boxes: Tensor) -> Tensor:
        """Return box values with their sines and cosines, [B, N, 4 (1 + 2 octaves)]."""
        octaves = 2.0 ** torch.arange(self.architecture.num_octaves, device=boxes.device)
        angles = (boxes.unsqueeze(-1) * (2 * math.pi * octaves).to(boxes)).flatten(-2)
        return torch.cat([boxes, angles.sin(), angles.cos()], dim=-1)

    def save(self, folder: Path) -> None:
        """Write architecture and fp16 weights."""
        save_network(self, folder, torch.float16)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote, in single precision."""
        return load_weights(cls(EncoderArchitecture(**read_settings(folder))), folder)


def load_encoder(pretrained: str, classes: str | Sequence[str] = "publaynet") -> LayoutEncoder:
    """Return a frozen encoder.

    Args:
        pretrained: A folder that `save` wrote, "encoder" or "critic", which are embedded, or the
            file of a published network (`load_published`).
        classes: Classes of a published network, whose file does not name them.

    Raises:
        UsageError: `pretrained` is none of these.
    """
    if Path(pretrained).is_file():
        return load_published(pretrained, classes)
    with own_rng():
        network = load_pretrained(
            pretrained,
            EMBEDDED,
            lambda source: LayoutEncoder.load(Path(source)),
            kind="a layout encoder",
            give="'encoder', 'critic', a folder that LayoutEncoder.save wrote or a published "
            "network's file",
            key="pretrained",
        )
    return frozen(network)


def load_published(path: str, classes: str | Sequence[str]) -> LayoutEncoder:
    """Return a frozen published network, such as LayoutFlow and LACE use, from its weights.

    All sizes but the number of heads, 4 in the literature, follow from the weights.

    Args:
        path: The file, a state dict written by `torch.save`; the names may have the prefix
            "module." and lie under the key "state_dict".
        classes: A known list or names of the labels 1, 2, ...

    Raises:
        UsageError: The file is missing, or is no such network for so many classes.
    """
    failed = (
        f"{path} could not be loaded as a published layout network for "
        f"{len(class_list(classes))} classes"
    )
    with loading(failed):
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = {
            _our_name(name.removeprefix("module.")): value
            for name, value in state.get("state_dict", state).items()
        }
        state = {name: value for name, value in state.items() if name}
        layers = {int(n.split(".")[2]) for n in state if n.startswith("encoder.layers.")}
        architecture = EncoderArchitecture(
            classes=classes,
            max_elements=len(state["places"]),
            width=state["token"].shape[-1],
            depth=len(layers),
            num_octaves=0,
        )
        network = LayoutEncoder(architecture)
        network.load_state_dict(state)
    return frozen(network)


def _our_name(name: str) -> str:
    """Return our name of a published weight, empty for what we do not need."""
    for theirs, ours in _PUBLISHED.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return ours + name.removeprefix(theirs)
    return ""


def _transformer(a: EncoderArchitecture) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        a.width, a.num_heads, a.width // 2, dropout=0.0, batch_first=True
    )
    return nn.TransformerEncoder(layer, a.depth, enable_nested_tensor=False)


def jittered(layouts: Layouts, std: Tensor, generator: torch.Generator) -> Layouts:
    """Return layouts whose box values have noise of a standard deviation [B] each.

    Args:
        layouts: B layouts.
        std: [B], in pages.
        generator: Draws the noise, on the CPU.
    """
    noise = torch.randn(layouts.boxes.shape, generator=generator).to(layouts.boxes)
    boxes = layouts.boxes + std.view(-1, 1, 1) * noise
    boxes = torch.cat([boxes[..., :2].clamp(0, 1), boxes[..., 2:].clamp(1e-3, 1)], dim=-1)
    labels = layouts.labels.where(layouts.valid, EMPTY)
    return Layouts.of(boxes, labels, layouts.classes)
