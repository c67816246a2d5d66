"""Measurements of pictures that no reward sees."""

from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from domains.text_to_image.networks.clip import CLIPEncoder
from domains.text_to_image.networks.lpips import LPIPS, alexnet_of, heads_of
from domains.text_to_image.networks.state_dicts import read_state_dict
from lit_rlft.core.checks import UsageError, at_least, loading, one_of
from lit_rlft.core.guard import LARGE_FALL, Guard
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Metric
from lit_rlft.kit.images import check_pictures
from lit_rlft.kit.set_metrics import pseudo_values, sums_over_others

__all__ = ["Diversity", "LPIPSDiversity"]

Features = Literal["clip", "pixels"]

_POOLED = 16  # pixels a side that pictures are pooled to, so that fine noise is no diversity


class Diversity(Metric):
    """Mean distance of two samples of the same condition; 0 when all look the same.

    A fall below the reference's diversity is the first sign that a reward is being exploited. A
    sample's own value says how much it moves the mean, so that the mean has the right error: it is
    not the sample's distance, and may be negative.

    Args:
        features: "clip" takes 1 - cosine of CLIP's picture embeddings, in [0, 2]; "pixels" takes
            the root mean square difference of pictures pooled to 16 x 16, in [0, 1].
        pretrained: The CLIP for "clip": a folder, a hub id or "shapes_clip"; unused otherwise.

    Raises:
        UsageError: `features` is unknown or `pretrained` is no CLIP.
    """

    def __init__(self, features: Features = "clip", pretrained: str = "shapes_clip") -> None:
        super().__init__()
        one_of(self, "features", get_args(Features), features)
        self.encoder = CLIPEncoder(pretrained) if features == "clip" else None

    @torch.no_grad()
    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return {"diversity": [B]}, `pseudo_values`; NaN for a sample alone in its condition."""
        pictures = check_pictures(samples, condition)
        distances = self._distances(pictures).to(pictures.device)
        return {"diversity": _moves_of_mean(distances, condition)}

    def guards(self) -> dict[str, Guard]:
        """Return {"diversity"}, of which a fall by a fifth is a sign."""
        return {"diversity": LARGE_FALL}

    def _distances(self, pictures: Tensor) -> Tensor:
        """Return the distance of every two pictures, [B, B]."""
        if self.encoder is None:
            flat = F.interpolate(pictures, (_POOLED, _POOLED), mode="area").float().flatten(1)
            # The faster way by a matrix product makes equal pictures differ.
            exact = "donot_use_mm_for_euclid_dist"
            return torch.cdist(flat, flat, compute_mode=exact).div(flat.shape[1] ** 0.5)
        embeddings = self.encoder.embed_pictures(pictures)
        with torch.autocast(embeddings.device.type, enabled=False):
            return 1 - embeddings @ embeddings.T


class LPIPSDiversity(Metric):
    """Mean LPIPS distance of two samples of the same condition; 0 when all are equal.

    A sample's own value says how much it moves the mean, as that of `Diversity`.

    LPIPS 0.1 with AlexNet, on pictures as they are, without resizing. Licences: BSD-3-Clause
    (torchvision's weights), BSD-2-Clause (LPIPS's).

    Args:
        network: File of torchvision's AlexNet, alexnet-owt-7be5be79.pth, from
            https://download.pytorch.org/models.
        heads: File of LPIPS's weights for AlexNet, lpips/weights/v0.1/alex.pth of the package lpips
            (`pip download --no-deps lpips`).
        batch_size: Pictures that pass the network at a time, which bounds the memory.

    Raises:
        UsageError: A file is none of these; the first missing or unknown key is named.

    References:
        The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (Zhang et al., 2018),
        https://arxiv.org/abs/1801.03924
    """

    def __init__(self, network: str, heads: str, *, batch_size: int = 32) -> None:
        super().__init__()
        at_least(1, self, batch_size=batch_size)
        with loading(f"network: {network!r} could not be loaded as torchvision's AlexNet"):
            features = alexnet_of(read_state_dict(Path(network).expanduser()))
        with loading(f"heads: {heads!r} could not be loaded as LPIPS's weights for AlexNet"):
            weights = heads_of(read_state_dict(Path(heads).expanduser()))
        self.network = LPIPS(features, weights)
        self.batch_size = batch_size

    @torch.no_grad()
    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return {"lpips_diversity": [B]}, NaN for a sample alone in its condition.

        Raises:
            UsageError: Pictures are too small for AlexNet.
        """
        pictures = check_pictures(samples, condition)
        smallest = self.network.smallest
        if min(pictures.shape[-2:]) < smallest:
            raise UsageError(
                f"LPIPSDiversity takes pictures of at least {smallest} pixels a side, got "
                f"{tuple(pictures.shape[-2:])}; raise pipeline.init_args.height and width, or take "
                "Diversity"
            )
        distances = self.network.distances(pictures, self.batch_size).to(pictures.device)
        return {"lpips_diversity": _moves_of_mean(distances, condition)}

    def guards(self) -> dict[str, Guard]:
        """Return {"lpips_diversity"}, of which a fall by a fifth is a sign."""
        return {"lpips_diversity": LARGE_FALL}


def _moves_of_mean(distances: Tensor, condition: Condition) -> Tensor:
    """Return how much each sample moves the mean of distances [B, B] within conditions, [B]."""
    rows = condition.rows.to(distances.device)
    totals, counts = sums_over_others(distances, rows)
    return pseudo_values(totals / counts, rows)
