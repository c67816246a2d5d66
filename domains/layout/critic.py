"""A learned reward: how real a layout looks to a network that knows real and shaken pages."""

from typing import Any

import torch
from torch import Tensor

from domains.layout.encoder import load_encoder
from domains.layout.layouts import check_layouts
from lit_rlft.core.pipeline import Condition
from lit_rlft.kit.judge import Judge, Output

__all__ = ["Critic"]


class Critic(Judge):
    """What a layout encoder's critic says: the logit of "real", or its log-probability.

    Differentiable with respect to boxes; which slots hold what is taken as it is. The network is
    frozen, always in evaluation mode, and computes in single precision whatever autocast says.

    Args:
        pretrained: A folder that `LayoutEncoder.save` wrote, or "critic", the embedded one.
        output: "logit" has no bounds; "log_probability" is in (-inf, 0], "probability" in [0, 1].

    Raises:
        UsageError: `pretrained` is no such folder, or `output` is unknown.
    """

    def __init__(self, pretrained: str = "critic", output: Output = "log_probability") -> None:
        super().__init__(output)
        self.encoder = load_encoder(pretrained)

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the critic's judgement of each layout, [B]."""
        layouts = check_layouts(samples, condition)
        with torch.autocast(layouts.boxes.device.type, enabled=False):
            logits = self.encoder.logits(self.encoder(layouts))
        return self.verdict(logits)
