"""A small network that answers "does this picture show this prompt" in the shapes world.

The prompt is not read by a text encoder but parsed, then handed over as six integers: the network
looks up the maps of just the shapes and colours that are asked for, so what it learns about one
prompt holds for all of them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from domains.text_to_image.shapes.world import COLORS, RELATIONS, SHAPES, Prompt, Requirement
from lit_rlft.core.checks import at_least
from lit_rlft.kit.network_folder import load_weights, read_settings, save_network

__all__ = ["Architecture", "Classifier", "encode"]

_NO_SHAPE, _ANY_COLOR, _NO_RELATION = len(SHAPES), len(COLORS), len(RELATIONS)
_NUM_COUNTS = 4
_NOWHERE = -8.0  # log-probability of an absent shape
_NUM_MAPS, _NUM_FACTS = 9, 9  # what is known of the figures asked for, per place and in all
# To be about as large as the features that they join.
_LOG_SCALE, _AREA_SCALE = 0.25, 10.0


@dataclass(frozen=True)
class Architecture:
    """Widths of the network, as config.json holds them.

    Attributes:
        stem: Channels at 32 x 32.
        middle: Channels after the second stride, at 16 x 16.
        width: Channels of the blocks at 16 x 16; a multiple of 8.
        joint: Channels where picture and prompt meet; a multiple of 8.
        hidden: Width of the answering layer.
    """

    stem: int = 16
    middle: int = 40
    width: int = 48
    joint: int = 32
    hidden: int = 48

    def __post_init__(self) -> None:
        at_least(1, self, "stem", "middle", "width", "joint", "hidden")


def encode(prompt: Prompt) -> Tensor:
    """Return what a prompt demands, int64 [6]: two shapes, two colours, a count, a relation.

    An absent second shape, an open colour and an absent relation have numbers of their own.
    """
    first, *others = prompt.include
    second = others[0] if others else None
    relation = second.position[0] if second is not None and second.position else None
    return torch.tensor(
        [
            SHAPES.index(first.shape),
            _NO_SHAPE if second is None else SHAPES.index(second.shape),
            _color(first),
            _ANY_COLOR if second is None else _color(second),
            first.count - 1,
            _NO_RELATION if relation is None else tuple(RELATIONS).index(relation),
        ]
    )


class Classifier(nn.Module):
    """The logit of "yes" for pictures and prompts of the shapes world.

    Convolutions tell at each of 16 x 16 places which shape and which colour is there, the maps of
    what is asked for join the features, and a small network answers from the pooled features, the
    prompt's code, and the offset between the two shapes along the demanded direction.

    Args:
        architecture: Widths of the layers.
    """

    directions: Tensor

    def __init__(self, architecture: Architecture | None = None) -> None:
        super().__init__()
        self.architecture = a = architecture or Architecture()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, a.stem, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(a.stem, a.middle, 3, stride=2, padding=1),
            *_normalised(a.middle),
            nn.Conv2d(a.middle, a.width, 3, padding=1),
            *_normalised(a.width),
            _Residual(a.width, dilation=2),
            _Residual(a.width, dilation=1),
        )
        self.places = nn.Conv2d(a.width, len(SHAPES) + len(COLORS) + 2, 1)
        self.reduce = nn.Conv2d(a.width + _NUM_MAPS, a.joint, 1)
        self.joint = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(a.joint, a.joint, 3, stride=2, padding=1),
            *_normalised(a.joint),
            nn.Conv2d(a.joint, a.joint, 3, padding=1),
            nn.SiLU(),
        )
        self.gains = nn.Linear(_code_size(), 2 * a.joint)
        self.answer = nn.Sequential(
            nn.Linear(2 * a.joint + _NUM_FACTS + _code_size(), a.hidden),
            nn.SiLU(),
            nn.Linear(a.hidden, 1),
        )
        self.register_buffer("directions", _directions(), persistent=False)

    def forward(self, pictures: Tensor, codes: Tensor) -> Tensor:
        """Return the logit of "yes" of each picture and prompt, [B].

        Args:
            pictures: [B, 3, 64, 64] in [0, 1].
            codes: int64 [B, 6], rows of `encode`.
        """
        return self.answers(*self.look(pictures), codes)

    def look(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [B, C, 16, 16] and the logits of what is at each place, [B, 16, 16, 16].

        The channels of the latter are ground and the shapes, then ground and the colours.
        """
        features = self.trunk((pictures - 0.5) * 2)
        return features, self.places(features)

    def answers(self, features: Tensor, places: Tensor, codes: Tensor) -> Tensor:
        """Return the logit of "yes", [B], from what `look` saw."""
        shapes, colors = places.tensor_split([1 + len(SHAPES)], dim=1)
        shapes, colors = shapes.log_softmax(1), colors.log_softmax(1)
        figure = colors[:, 1:].logsumexp(1)
        # The rows that codes point to: absent shapes are nowhere, open colours at any figure.
        shapes = torch.cat([shapes[:, 1:], torch.full_like(figure, _NOWHERE)[:, None]], dim=1)
        colors = torch.cat([colors[:, 1:], figure[:, None]], dim=1)
        asked = [_pick(shapes, codes[:, i]) for i in (0, 1)]
        asked += [_pick(colors, codes[:, i]) for i in (2, 3)]
        evidence = torch.stack(asked, dim=1)
        # Logarithms have gradients where there is next to nothing, probabilities add up.
        known = [_LOG_SCALE * evidence, evidence.exp(), figure.exp()[:, None]]
        maps = torch.cat([features, *known], dim=1)
        code = _one_hot(codes).to(features.dtype)
        gain, shift = self.gains(code)[:, :, None, None].chunk(2, dim=1)
        joint = self.joint(self.reduce(maps) * (1 + gain) + shift).flatten(2)
        facts = self._facts(evidence, figure, codes)
        pooled = torch.cat([joint.mean(-1), joint.amax(-1), facts, code], dim=1)
        return self.answer(pooled).squeeze(-1)

    def _facts(self, evidence: Tensor, figure: Tensor, codes: Tensor) -> Tensor:
        """Return how much of each asked figure there is and how the two lie, [B, 9]."""
        both = (evidence[:, :2] + evidence[:, 2:]).flatten(2)  # [B, 2, places]
        side = torch.linspace(-1, 1, figure.shape[-1], dtype=both.dtype, device=both.device)
        y, x = torch.meshgrid(side, side, indexing="ij")
        middles = both.softmax(-1) @ torch.stack([x, y]).flatten(1).T  # [B, 2, (x, y)]
        offset = (middles[:, 1] - middles[:, 0])[:, None]
        # Rows: along the demanded direction and across it; zeros without a relation.
        along, across = (offset * self.directions[codes[:, 5]]).sum(-1).unbind(1)
        likeliest = _LOG_SCALE * both.amax(-1)
        areas = _AREA_SCALE * both.exp().mean(-1)
        covered = _AREA_SCALE * figure.exp().flatten(1).mean(1, keepdim=True)
        relation = torch.stack([along, across.abs(), along - across.abs()], dim=1)
        extra = covered - areas.sum(1, keepdim=True)
        return torch.cat([likeliest, areas, covered, extra, relation], dim=1)

    def save(self, folder: Path) -> None:
        """Write architecture and fp16 weights."""
        save_network(self, folder, torch.float16)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote, in single precision under any default dtype."""
        return load_weights(cls(Architecture(**read_settings(folder))), folder)


class _Residual(nn.Module):
    """x + SiLU(GroupNorm(conv(x)))."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation), *_normalised(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _normalised(width: int) -> tuple[nn.Module, nn.Module]:
    return nn.GroupNorm(width // 8, width), nn.SiLU()


def _color(requirement: Requirement) -> int:
    return _ANY_COLOR if requirement.color is None else tuple(COLORS).index(requirement.color)


def _code_size() -> int:
    return _NUM_COUNTS + 4


def _one_hot(codes: Tensor) -> Tensor:
    """Return what is asked apart from which shapes, colours and direction, int64 [B, 8]."""
    count = functional.one_hot(codes[:, 4], _NUM_COUNTS)
    asked = [codes[:, 1] != _NO_SHAPE, codes[:, 5] != _NO_RELATION]
    asked += [codes[:, 2] != _ANY_COLOR, codes[:, 3] != _ANY_COLOR]
    return torch.cat([count, torch.stack(asked, dim=1).long()], dim=1)


def _pick(maps: Tensor, index: Tensor) -> Tensor:
    return maps[torch.arange(len(maps), device=maps.device), index]


def _directions() -> Tensor:
    """Return unit vectors along and across each relation, [relations + 1, 2, (x, y)]."""
    directions = torch.zeros(len(RELATIONS) + 1, 2, 2, dtype=torch.float32)
    for index, (axis, sign) in enumerate(RELATIONS.values()):
        directions[index, 0, axis] = sign
        directions[index, 1, 1 - axis] = 1
    return directions
