"""A small classifier of images; sets of images are compared by its features."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from domains.image import EMBEDDED
from domains.image.networks.inception import InceptionV3
from domains.image.samples import luminance
from lit_rlft.core.checks import at_least, one_of
from lit_rlft.core.randomness import own_rng
from lit_rlft.kit.frozen import frozen
from lit_rlft.kit.network_folder import (
    WEIGHTS,
    load_pretrained,
    load_weights,
    read_settings,
    save_network,
)

__all__ = ["EMBEDDED", "FeatureArchitecture", "FeatureNetwork", "features_of", "load_features"]


@dataclass(frozen=True)
class FeatureArchitecture:
    """Sizes and classes of the network, as config.json holds them.

    Attributes:
        size: Height and width that pictures are brought to.
        channels: 1 looks at their luminance, 3 at their colours.
        widths: Channels of the layers; each but the first halves height and width.
        num_features: Length of the feature vectors.
        classes: Names of what the network tells apart.
        exclusive: Whether each picture shows exactly one of the classes.
    """

    size: int
    channels: Literal[1, 3]
    classes: Sequence[str]
    exclusive: bool = True
    widths: Sequence[int] = (32, 48, 64)
    num_features: int = 64

    def __post_init__(self) -> None:
        one_of(self, "channels", (1, 3))
        at_least(1, self, "size", "widths", "num_features")


class FeatureNetwork(nn.Module):
    """A convolutional classifier; its features are those before the last layer.

    Args:
        architecture: Its sizes.
        name: What the features are called in metrics.
    """

    def __init__(self, architecture: FeatureArchitecture, name: str = "own") -> None:
        super().__init__()
        self.architecture, self.name = architecture, name
        layers: list[nn.Module] = []
        channels: int = architecture.channels
        for i, width in enumerate(architecture.widths):
            layers += [
                nn.Conv2d(channels, width, 3, stride=1 if i == 0 else 2, padding=1),
                nn.GroupNorm(width // 8, width),
                nn.SiLU(),
            ]
            channels = width
        self.trunk = nn.Sequential(*layers)
        side = architecture.size
        for _ in architecture.widths[1:]:
            side = -(-side // 2)
        pooled = min(side, 4)
        self.pool = nn.AdaptiveAvgPool2d(pooled)
        self.hidden = nn.Linear(channels * pooled**2, architecture.num_features)
        self.out = nn.Linear(architecture.num_features, len(architecture.classes))

    @property
    def num_features(self) -> int:
        """Length of a feature vector."""
        return self.architecture.num_features

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the features of pictures [B, 3 or C, H, W] in [0, 1], [B, D] before rectifying."""
        size, channels = self.architecture.size, self.architecture.channels
        if pictures.shape[1] != channels:
            pictures = luminance(pictures) if channels == 1 else pictures.expand(-1, 3, -1, -1)
        if tuple(pictures.shape[-2:]) != (size, size):
            pictures = functional.interpolate(
                pictures, (size, size), mode="bilinear", antialias=True
            )
        maps = self.trunk(2 * pictures - 1)
        return self.hidden(self.pool(maps).flatten(1))

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits of the classes, [B, K]."""
        return self.out(functional.silu(features))

    def log_probabilities(self, features: Tensor) -> Tensor:
        """Return the log-probability of each class, [B, K]."""
        logits = self.logits(features)
        if self.architecture.exclusive:
            return functional.log_softmax(logits, dim=1)
        return functional.logsigmoid(logits)

    def save(self, folder: Path) -> None:
        """Write architecture and fp16 weights."""
        save_network(self, folder, torch.float16)

    @classmethod
    def load(cls, folder: Path, name: str) -> Self:
        """Read what `save` wrote, in single precision."""
        return load_weights(cls(FeatureArchitecture(**read_settings(folder)), name), folder)


def load_features(pretrained: str, key: str = "features") -> "FeatureNetwork | InceptionV3":
    """Return a frozen feature network.

    Its `name` is part of every metric's name: "digits_features" and the like for the embedded ones.
    Any other name carries the first digits of the weights' hash, so that no two are confused.

    Args:
        pretrained: "digits_features", "shapes_features" (or the rewards' own, "digits_classifier",
            "shapes_classifier"), which are embedded, a folder that `FeatureNetwork.save` wrote, or
            the file of InceptionV3's weights in torch-fidelity's format.
        key: The setting that gave it, for the message.

    Raises:
        UsageError: `pretrained` is none of these.
    """

    def read(source: str) -> FeatureNetwork | InceptionV3:
        path = Path(source)
        if path.is_file():
            return InceptionV3.load(path)
        if not Path(pretrained).exists():
            return FeatureNetwork.load(path, pretrained)
        digest = hashlib.sha256((path / WEIGHTS).read_bytes()).hexdigest()
        return FeatureNetwork.load(path, f"{path.resolve().name}-{digest[:6]}")

    with own_rng():
        network = load_pretrained(
            pretrained,
            EMBEDDED,
            read,
            kind="a feature network",
            give="'digits_features', 'shapes_features', a folder of train.features or the weights "
            "of torch-fidelity's InceptionV3",
            key=key,
        )
    return frozen(network)


@torch.no_grad()
def features_of(
    network: "FeatureNetwork | InceptionV3", pictures: Tensor, batch_size: int = 256
) -> Tensor:
    """Return the features of many pictures [n, C, H, W], [n, D] float32 on the CPU.

    Args:
        network: The network; the work is done on its device.
        pictures: uint8, or floating point in [0, 1].
        batch_size: Pictures at a time.
    """
    device, parts = next(network.parameters()).device, []
    for part in pictures.split(batch_size):  # type: ignore[no-untyped-call]
        part = part.to(device)
        part = part.float() / 255 if part.dtype == torch.uint8 else part.float()
        with torch.autocast(device.type, enabled=False):
            parts.append(network(part).float().cpu())
    return torch.cat(parts)
