r"""Muon for matrices, AdamW for all other parameters, as one optimiser.

A step of a matrix is its momentum, made nearly orthogonal, times :math:`0.2 \sqrt{\max(m, n)}`:
entries as large as AdamW's, so that both share a learning rate.

References:
    Muon: An optimizer for hidden layers in neural networks (Jordan, 2024),
    https://kellerjordan.github.io/posts/muon/
    Muon is Scalable for LLM Training (Liu et al., 2025), Section 2.2 (the scale of the steps),
    https://arxiv.org/abs/2502.16982
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from lit_rlft.core.checks import UsageError, at_least, below_one

__all__ = ["MuonAdamW"]

_NARROW = 16
"""Matrices with a shorter side, of inputs, outputs or heads, have too few directions for Muon."""


class MuonAdamW(Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW`, each for the parameters that it is made for.

    Args:
        params: What is optimised.
        lr: Learning rate of both.
        momentum: Muon's, for the matrices.
        betas: AdamW's, for all other parameters.
        weight_decay: Decoupled weight decay of both.

    Raises:
        UsageError: torch is older than 2.9 and has no Muon.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise UsageError(
                f"optimizer: MuonAdamW needs torch 2.9 or newer, found {torch.__version__}; update "
                "torch, or choose torch.optim.AdamW"
            )
        at_least(0, self, lr=lr, weight_decay=weight_decay)
        below_one(self, momentum=momentum, betas=betas)
        params = list(params)
        wide = [p for p in params if p.dim() == 2 and min(p.shape) >= _NARROW]
        rest = [p for p in params if p.dim() != 2 or min(p.shape) < _NARROW]
        self.parts: list[Optimizer] = []
        if wide:
            self.parts.append(
                torch.optim.Muon(wide, lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw")
            )
        if rest:
            self.parts.append(AdamW(rest, lr, betas, weight_decay=weight_decay))
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of both; return what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Let both work on this optimiser's groups, which schedulers change, and on its state."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
