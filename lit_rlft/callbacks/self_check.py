"""Says what is wrong while it can still be mended: ratios, rewards, losses, gradients."""

import math
from collections.abc import Mapping

from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lit_rlft.algorithms.base import Experience, RewardFineTuner
from lit_rlft.core.checks import UsageError
from lit_rlft.core.state import tensor_of
from lit_rlft.loop.hooks import Observer

__all__ = ["SelfCheck"]

_MAX_TOLERANCE = 0.01
_FEW_GROUPS = 0.9
"""Share of groups without differences above which a round teaches next to nothing."""


class SelfCheck(Observer):
    """Stops a run that cannot learn what it should, before weights change; warns of the rest.

    It stops where a probability ratio is not 1 before the first update of a round, where a loss or
    a gradient is not finite, and where the loss has no gradient. It warns, once each, of rewards
    that failed or are all the same, of groups without differences, of parameters that the loss
    does not reach, and of gradients that are zero.

    Args:
        enabled: Whether to check.
        ratio_tolerance: How far from 1 the first ratios may be; half the clip range, and 0.01 at
            most, unless given: from there on clipping, not the reward, would decide the gradient.
    """

    def __init__(self, enabled: bool = True, ratio_tolerance: float | None = None) -> None:
        self.enabled, self.ratio_tolerance = enabled, ratio_tolerance
        self._said: set[str] = set()

    def on_experience(self, tuner: RewardFineTuner, experience: Experience) -> None:
        """Check the rewards of a round."""
        metrics = experience.metrics
        if failed := metrics.get("failed_rewards", 0):
            self._warn(
                "failed rewards",
                f"{tuner.reward.name} failed for {failed:.1%} of the samples of round "
                f"{tuner.num_rounds}; they are left out (train/failed_rewards)",
            )
        if (share := metrics.get("zero_variance_groups", 0)) > _FEW_GROUPS:
            self._warn(
                "equal groups",
                f"in {share:.0%} of the groups of round {tuner.num_rounds} all rewards are the "
                "same, so they teach nothing; raise model.init_args.num_candidates, or choose a "
                "finer reward or other conditions",
            )
        self._check_constant(tuner, experience.histograms.get("reward"))

    def on_losses(
        self,
        tuner: RewardFineTuner,
        part: Experience,
        losses: Tensor,
        values: Mapping[str, Tensor],
    ) -> None:
        """Check ratios, and that losses are finite and have a gradient."""
        if not losses.requires_grad:
            raise UsageError(
                f"the loss of {tuner.algorithm} has no gradient: nothing it depends on is "
                "trainable; look for torch.no_grad, detach or .item() in a reward or pipeline of "
                "yours, and for trainable parameters (model.init_args.lora)"
            )
        if not losses.isfinite().all():
            wrong = int((~losses.isfinite()).sum())
            raise _not_finite(tuner, f"{wrong} of {len(losses)} losses")
        if "first_ratio_deviation_max" in values:
            self._check_ratios(tuner, part, values["first_ratio_deviation_max"])
        self._check_constant(tuner, values.get("reward"))

    def on_gradients(self, tuner: RewardFineTuner, norm: float) -> None:
        """Check that gradients are finite and that there are any."""
        named = [(n, p) for n, p in tuner.trainable().named_parameters() if p.requires_grad]
        precision = tuner.trainer.precision_plugin
        scaled = isinstance(precision, MixedPrecision) and precision.scaler is not None
        if not math.isfinite(norm) and not scaled:  # a scaler skips such updates and goes on
            wrong = [n for n, p in named if p.grad is not None and not p.grad.isfinite().all()]
            raise _not_finite(tuner, "gradients", f" (first in {wrong[0]})")
        if unreached := [n for n, p in named if p.grad is None]:
            self._warn(
                "unreached",
                f"the loss does not reach {len(unreached)} of {len(named)} trainable parameters "
                f"(first {unreached[0]}), so they stay as they are",
            )
        if norm == 0:
            self._warn(
                "zero gradients",
                f"all gradients of update {tuner.num_updates} are zero: the loss reaches the "
                "parameters but does not depend on them there",
            )

    def _check_ratios(self, tuner: RewardFineTuner, part: Experience, deviation: Tensor) -> None:
        """Raise UsageError where a ratio is not 1 though policy and samples belong together."""
        clip = getattr(tuner, "clip_range", 2 * _MAX_TOLERANCE)
        tolerance = self.ratio_tolerance
        if tolerance is None:
            tolerance = min(_MAX_TOLERANCE, clip / 2)
        worst = int(deviation.argmax())
        if deviation[worst] <= tolerance:
            return
        where = ""
        if "t" in part.states:
            t = float(tensor_of(part.states["t"])[worst])
            step = int((tuner.pipeline.process.times(tuner.sampler.num_steps) - t).abs().argmin())
            where = f" at step {step} (t = {t:.4g})"
        raise UsageError(
            f"before the first update of round {tuner.num_rounds} a probability ratio{where} is "
            f"off 1 by {float(deviation[worst]):.2g}, more than {tolerance:.2g}, in "
            f"{_dtype(tuner)}: {_cause(tuner)}"
        )

    def _check_constant(self, tuner: RewardFineTuner, rewards: Tensor | None) -> None:
        if rewards is not None and rewards.numel() > 1 and rewards.min() == rewards.max():
            self._warn(
                "constant rewards",
                f"all {rewards.numel()} rewards of a batch in round {tuner.num_rounds} are "
                f"{float(rewards.flatten()[0]):.4g}: {tuner.reward.name} does not tell samples "
                "apart there, and nothing can be learned from them",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            rank_zero_warn(text)


def _not_finite(tuner: RewardFineTuner, what: str, where: str = "") -> UsageError:
    return UsageError(
        f"{what} of update {tuner.num_updates} are not finite{where}; the weights are those "
        "before it. Lower the learning rate, or compute in trainer.precision 32-true"
    )


def _dtype(tuner: RewardFineTuner) -> str:
    weights = next(tuner.pipeline.denoiser.parameters()).dtype
    return f"{str(weights).removeprefix('torch.')} (trainer.precision {tuner.trainer.precision})"


def _cause(tuner: RewardFineTuner) -> str:
    """Return the likely cause of ratios that are not 1, and what to do about it."""
    denoiser: nn.Module = tuner.pipeline.denoiser
    if any(isinstance(m, _DropoutNd) and m.p > 0 for m in denoiser.modules()):
        return (
            "the denoiser has dropout, which is active in training and not while sampling; set it "
            "to 0"
        )
    if "32" not in str(tuner.trainer.precision) and "64" not in str(tuner.trainer.precision):
        return (
            "in half precision the denoiser rounds differently in batches of another size; give "
            "model.init_args.sampling_batch_size and microbatch_size the same value, or set "
            "trainer.precision to 32-true"
        )
    return (
        "the denoiser does not return the same for the same input; look for noise, state or "
        "batch statistics in it"
    )
