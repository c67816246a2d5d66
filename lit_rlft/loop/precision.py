"""Numbers that training can rely on: its precision, and weights that are finite."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from lightning import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_warn
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Pipeline
from lit_rlft.distributed import of_all, own_part

__all__ = [
    "check_precision",
    "check_weights",
    "fresh_casts",
    "frozen_dtype",
    "in_single",
    "loss_scale",
    "loss_scaler",
    "settle",
    "stepped",
    "tell_skipped",
]

_HALF = (torch.float16, torch.bfloat16)
_LEAST_SCALE = 2.0**-10
_REFUSED = {
    "16-true": "16-mixed",
    "bf16-true": "bf16-mixed",
    "transformer-engine": "bf16-mixed",
    "transformer-engine-float16": "16-mixed",
}
"""Precisions in which weights themselves are too coarse to be trained, and what to use instead.

In fp16, Adam's 1e-8 is 0, and 0 / 0 ends the run. In bf16, at a learning rate of 1e-4, weights move
half as far as they should: what is below 1/256 of a weight rounds to nothing.
"""


def frozen_dtype(device: torch.device, precision: object) -> torch.dtype:
    """Return the precision of frozen weights that suits a run: the one it computes in, on a GPU.

    Autocast would cast weights in single precision again in every call, and the graph would keep
    a copy of them for each.

    Args:
        device: Where the networks run.
        precision: The trainer's, such as "bf16-mixed".
    """
    low = device.type == "cuda" and str(precision) == "bf16-mixed"
    return torch.bfloat16 if low else torch.float32


@contextmanager
def fresh_casts(device: torch.device) -> Iterator[None]:
    """Within the block autocast casts weights anew in each call, since updates change them.

    It would keep its copies to the end of a round, as Lightning has it: a round's updates
    would all see the weights of the first one, and ratios stay at 1.
    """
    before = torch.is_autocast_cache_enabled()
    # Where nothing is cast a change would have compiled networks compiled again.
    torch.set_autocast_cache_enabled(before and not torch.is_autocast_enabled(device.type))
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def in_single(network: nn.Module) -> None:
    """Give a network in half precision single precision if it is trained without an adapter."""
    half = [p for p in network.parameters() if p.requires_grad and p.dtype in _HALF]
    if not half or any(isinstance(part, BaseTunerLayer) for part in network.modules()):
        return
    name = str(half[0].dtype).removeprefix("torch.")
    rank_zero_warn(
        f"the {type(network).__name__} was loaded in {name} and is trained in float32 from there; "
        "set pipeline.init_args.frozen_dtype to auto to start from its weights as they are"
    )
    network.float()


def settle(pipeline: Pipeline, trained: nn.Module, trainer: Trainer | None) -> None:
    """Give trained weights single precision, and frozen ones the precision that suits the run.

    Args:
        pipeline: With its adapter.
        trained: What is trained.
        trainer: The run's; without one everything stays where the pipeline is.
    """
    in_single(trained)
    if trainer is not None:
        device = trainer.strategy.root_device
        computes_in = trainer.precision if device.type == "cuda" else "32-true"
        pipeline.settle(device, frozen_dtype(device, computes_in))


def check_precision(precision: object) -> None:
    """Check that weights can be trained in a precision.

    Args:
        precision: The trainer's, such as "bf16-mixed".

    Raises:
        UsageError: They would be kept in 16 bits.
    """
    if instead := _REFUSED.get(str(precision)):
        raise UsageError(
            f"trainer.precision {precision} keeps the trained weights in 16 bits, where updates "
            f"overflow or round to nothing; set it to {instead}, or to 32-true"
        )


def check_weights(weights: Mapping[str, Tensor], num_updates: int) -> None:
    """Check that trained weights are finite, before they are saved; waits for the device once.

    Args:
        weights: By name; the same on all processes.
        num_updates: Updates so far.

    Raises:
        UsageError: One is NaN or infinite.
    """
    if not weights:
        return
    with torch.no_grad():
        parts = [own_part(weight) for weight in weights.values()]
        # The largest size of each is NaN where a number is: one wait for all of them together.
        sizes = iter(torch._foreach_norm([p for p in parts if p.numel()], torch.inf))
        none = parts[0].new_zeros(())  # of a weight with fewer rows than processes
        finite = torch.stack([(next(sizes) if p.numel() else none).float() for p in parts])
        finite = of_all(finite.isfinite(), weights.values())
    if finite.all():
        return
    first = list(weights)[int(finite.int().argmin())]
    raise UsageError(
        f"the weights are not finite after update {num_updates - 1} (first in {first}), so they "
        "are neither saved nor exported; checkpoints from before are as they were. Lower the "
        "learning rate, or compute in trainer.precision 32-true, and resume with --ckpt_path"
    )


def loss_scaler(precision: object) -> torch.amp.GradScaler | None:
    """Return what scales losses in a trainer's plugin, as 16-mixed has it; None of others."""
    return precision.scaler if isinstance(precision, MixedPrecision) else None


def loss_scale(precision: object) -> float:
    """Return what losses are multiplied by, so that gradients in float16 do not vanish.

    The trainer divides gradients by it in the optimiser's step. It skips the step and halves the
    scale where they are too large for float16.

    Args:
        precision: The trainer's plugin.
    """
    scaler = loss_scaler(precision)
    return 1.0 if scaler is None else float(scaler.get_scale())


def stepped(optimizer: LightningOptimizer, precision: object) -> bool:
    """Take a step; return whether it was made, which gradients too large for float16 prevent.

    Args:
        optimizer: Takes it.
        precision: The trainer's plugin.

    Raises:
        UsageError: No scale of the loss is small enough.
    """
    before = loss_scale(precision)
    optimizer.step()
    after = loss_scale(precision)
    if after < before:
        tell_skipped(after)
    return after >= before


def tell_skipped(scale: float) -> None:
    """Say once that an update was skipped.

    Args:
        scale: What losses are multiplied by from now on.

    Raises:
        UsageError: It is so small that no scale will do.
    """
    if scale < _LEAST_SCALE:
        raise UsageError(
            "gradients are too large for float16 at any scale of the loss; set trainer.precision "
            "to bf16-mixed or 32-true"
        )
    rank_zero_warn(
        "gradients of an update were too large for float16: it was skipped and the loss's scale "
        "halved. A few are usual at the start of 16-mixed; bf16-mixed has none"
    )
