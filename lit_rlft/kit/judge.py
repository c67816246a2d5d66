"""Rewards from a frozen network that answers yes or no: how sure it is of "yes"."""

from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional

from lit_rlft.core.checks import one_of
from lit_rlft.core.reward import Reward
from lit_rlft.kit.frozen import Frozen

__all__ = ["Judge", "Output"]

Output = Literal["log_probability", "probability", "logit"]


class Judge(Frozen, Reward):
    """A differentiable reward from a network's logit of "yes"; always in evaluation mode.

    Args:
        output: "log_probability" is in (-inf, 0], "probability" in [0, 1], and "logit", their
            log-odds, has no bounds.

    Raises:
        UsageError: `output` is unknown.
    """

    differentiable = True

    def __init__(self, output: Output = "log_probability") -> None:
        super().__init__()
        one_of(self, "output", get_args(Output), output)
        self.output = output

    def verdict(self, logits: Tensor) -> Tensor:
        """Return what `output` says of logits [B], [B]."""
        if self.output == "logit":
            return logits
        if self.output == "probability":
            return logits.sigmoid()
        return functional.logsigmoid(logits)
