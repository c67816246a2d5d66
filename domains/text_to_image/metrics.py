"""Measurements of pictures that no reward sees."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from domains.text_to_image.networks.clip import CLIPEncoder
from lit_rlft.core.checks import UsageError
from lit_rlft.core.guard import LARGE_FALL, Guard
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Metric
from lit_rlft.kit.images import check_pictures
from lit_rlft.kit.set_metrics import sums_over_others

__all__ = ["Diversity"]

_POOLED = 16  # pixels a side that pictures are pooled to, so that fine noise is no diversity


class Diversity(Metric):
    """Mean distance of a sample to the others of the same condition; 0 when all look the same.

    A fall below the reference's diversity is the first sign that a reward is being exploited.

    Args:
        features: "clip" takes 1 - cosine of CLIP's picture embeddings, in [0, 2]; "pixels" takes
            the root mean square difference of pictures pooled to 16 x 16, in [0, 1].
        pretrained: The CLIP for "clip": a folder, a hub id or "shapes_clip"; unused otherwise.

    Raises:
        UsageError: `features` is unknown or `pretrained` is no CLIP.
    """

    def __init__(
        self, features: Literal["clip", "pixels"] = "clip", pretrained: str = "shapes_clip"
    ) -> None:
        super().__init__()
        if features not in ("clip", "pixels"):
            raise UsageError(f"Diversity: features is {features!r}; use 'clip' or 'pixels'")
        self.encoder = CLIPEncoder(pretrained) if features == "clip" else None

    @torch.no_grad()
    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return {"diversity": [B]}, NaN for a sample that is the only one of its condition."""
        pictures = check_pictures(samples, condition)
        distances = self._distances(pictures).to(pictures.device)
        totals, counts = sums_over_others(distances, condition.rows.to(pictures.device))
        return {"diversity": totals / counts}

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
