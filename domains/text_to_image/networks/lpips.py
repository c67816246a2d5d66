"""LPIPS: distances of pictures by the features of AlexNet, weighted as people see differences."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from domains.text_to_image.networks.state_dicts import load_all
from lit_rlft.kit.frozen import Frozen, frozen

__all__ = ["LPIPS", "alexnet_of", "heads_of"]

_LAYERS = (0, 3, 6, 8, 10)
"""Places of the convolutions in torchvision's AlexNet; a ReLU follows each."""
_WIDTHS = (64, 192, 384, 256, 256)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""What pictures in [-1, 1] are normalised with."""
_EPSILON = 1e-10


class LPIPS(Frozen):
    """LPIPS 0.1 with AlexNet, for pictures of at least 31 pixels a side.

    d(x, y) = sum over layers l of the mean over places of w_l . (f_l(x) - f_l(y))^2, where f_l is
    a layer's features at a place, divided by their norm, and w_l are the weights of LPIPS.

    Args:
        features: The layers of AlexNet before its classifier, without the last pooling.
        heads: The weights of each layer's channels.

    Attributes:
        smallest: Pixels a side that pictures need at least.

    References:
        The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (Zhang et al., 2018),
        https://arxiv.org/abs/1801.03924
    """

    smallest = 31

    def __init__(self, features: nn.Sequential, heads: nn.ModuleList) -> None:
        super().__init__()
        self.features, self.heads = frozen(features), frozen(heads)

    def embed(self, pictures: Tensor) -> list[Tensor]:
        """Return the unit features of each layer, [B, C, H, W] each.

        Args:
            pictures: [B, 3, H, W] in [0, 1].
        """
        x = pictures.to(next(self.parameters()))
        shift, scale = (x.new_tensor(values)[:, None, None] for values in (_SHIFT, _SCALE))
        x = (2 * x - 1 - shift) / scale
        found = []
        for place, layer in enumerate(self.features):
            x = layer(x)
            if place - 1 in _LAYERS:
                found.append(x / (x.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON))
        return found

    def distances(self, pictures: Tensor, batch_size: int = 32) -> Tensor:
        """Return the distance of every two pictures, [B, B].

        Args:
            pictures: [B, 3, H, W] in [0, 1].
            batch_size: Pictures embedded at a time.
        """
        parts = [self.embed(part) for part in torch.split(pictures, batch_size)]
        layers = [torch.cat(layer) for layer in zip(*parts, strict=True)]
        rows = []
        for i in range(len(pictures)):
            apart = [
                cast(nn.Conv2d, head)((layer - layer[i]).square()).mean(dim=(1, 2, 3))
                for layer, head in zip(layers, self.heads, strict=True)
            ]
            rows.append(torch.stack(apart).sum(dim=0))
        return torch.stack(rows)


def alexnet_of(state: Mapping[str, Tensor]) -> nn.Sequential:
    """Return the layers that LPIPS needs of torchvision's AlexNet.

    Args:
        state: torchvision's state dict; the classifier is not needed.

    Raises:
        ValueError: Keys are missing, or others are there; the first of each is named.
    """
    first, second, third, fourth, fifth = _WIDTHS
    with torch.device("meta"):
        made = nn.Sequential(
            *(nn.Conv2d(3, first, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(first, second, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(second, third, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(third, fourth, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(fourth, fifth, 3, padding=1), nn.ReLU()),
        )
    kept = {n.removeprefix("features."): v for n, v in state.items() if n[:11] != "classifier."}
    load_all(made, kept, {name: f"features.{name}" for name in made.state_dict()})
    return made


def heads_of(state: Mapping[str, Tensor]) -> nn.ModuleList:
    """Return the weights of LPIPS for AlexNet.

    Args:
        state: LPIPS's state dict.

    Raises:
        ValueError: Keys are missing, or others are there; the first of each is named.
    """
    with torch.device("meta"):
        made = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in _WIDTHS)
    named = {f"{i}.weight": f"lin{i}.model.1.weight" for i in range(len(_WIDTHS))}
    own = {theirs: name for name, theirs in named.items()}
    load_all(made, {own.get(name, name): value for name, value in state.items()}, named)
    return made
