"""Training of the small networks that judge samples."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["minimise"]


def minimise(
    network: nn.Module,
    loss: Callable[[], Tensor],
    num_steps: int,
    *,
    learning_rate: float,
    weight_decay: float,
    num_warm_up: int,
    max_grad_norm: float | None = None,
    print_every: int = 250,
) -> None:
    """Minimise a loss by AdamW; the learning rate rises linearly, then falls along half a cosine.

    Args:
        network: Its parameters are trained.
        loss: Draws its own batch and returns its loss.
        num_steps: Optimiser updates.
        learning_rate: The highest.
        weight_decay: AdamW's.
        num_warm_up: Updates of the rise.
        max_grad_norm: Norm that gradients are clipped to; None does not clip.
        print_every: Updates between two lines of progress.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)

    def rate(step: int) -> float:
        if step < num_warm_up:
            return (step + 1) / num_warm_up
        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / num_steps)))

    schedule = LambdaLR(optimizer, rate)
    for step in range(num_steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm)
        optimizer.step()
        schedule.step()
        if (step + 1) % print_every == 0:
            print(f"step {step + 1}: loss {value.item():.4f}", flush=True)
