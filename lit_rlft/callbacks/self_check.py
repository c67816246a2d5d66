"""Finds errors while they can still be fixed: in ratios, rewards, losses, gradients."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.callbacks.reward_probes import check_on_probes
from lit_rlft.core.checks import UsageError, at_least
from lit_rlft.core.process import Process
from lit_rlft.core.reward import check_rewards
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import tensor_of
from lit_rlft.distributed import gather, whole
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.hooks import Hooks
from lit_rlft.loop.precision import check_weights, loss_scaler

__all__ = ["SelfCheck"]

_MAX_TOLERANCE = 0.01
_FEW_GROUPS = 0.9
"""Share of groups without differences above which a round teaches next to nothing."""


class _Seen(NamedTuple):
    """What is kept of some terms of an update until their gradients are there.

    Attributes:
        losses: [n].
        deviation: [n], of ratios that should be 1; None where there are none.
        levels: [n], the times of their transitions; None without any.
        rewards: [n], where the loss computes them; None elsewhere.
    """

    losses: Tensor
    deviation: Tensor | None
    levels: Tensor | None
    rewards: Tensor | None

    def bad(self, tolerance: float) -> Tensor:
        """Return whether the update must not be made, a bool on the device."""
        fine = self.losses.abs().max() < math.inf  # in fewer operations than `isfinite`
        return ~(fine if self.deviation is None else fine & (self.deviation.max() <= tolerance))


class SelfCheck(Hooks):
    """Stops a run that cannot learn, before its weights change; warns of lesser faults.

    It stops where a probability ratio is not 1 before the first update of a round, where a loss or
    a gradient is not finite, and where the loss has no gradient. It warns, once each, of rewards
    that failed or are all the same, of groups without differences, of parameters that the loss
    does not reach, and of gradients that are zero.

    Before anything is drawn, in `fit` and `test`, rewards that never give much different samples
    the same number have to tell the domain's known samples apart (`Pipeline.probes`).

    Args:
        enabled: Whether to check.
        reward_probes: Whether to check rewards before anything is drawn.
        ratio_tolerance: How far from 1 the first ratios may be; half the clip range, and 0.01 at
            most, unless given: from there on clipping, not the reward, would decide the gradient.
    """

    def __init__(
        self,
        enabled: bool = True,
        ratio_tolerance: float | None = None,
        reward_probes: bool = True,
    ) -> None:
        at_least(0, self, ratio_tolerance=ratio_tolerance)
        self.enabled, self.ratio_tolerance = enabled, ratio_tolerance
        self.reward_probes = reward_probes
        self._said: set[str] = set()
        self._seen: list[_Seen] = []
        self._rewards: list[Tensor] = []
        self._judged = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the reward."""
        if self.enabled and self.reward_probes and isinstance(pl_module, RewardFineTuner):
            precision = trainer.precision_plugin.forward_context()
            check_on_probes(pl_module.reward, pl_module.pipeline, precision)

    on_test_start = on_fit_start

    def on_experience(self, module: LightningModule, experience: Experience) -> None:
        """Check the rewards of a round."""
        assert isinstance(module, RewardFineTuner)
        metrics, source, number = experience.metrics, module.reward.name, module.num_rounds + 1
        if failed := metrics.get("failed_rewards", 0):
            self._warn(
                "failed rewards",
                f"{source} failed for {failed:.1%} of the samples of round {number}; they are left "
                "out (train/failed_rewards)",
            )
        if (share := metrics.get("zero_variance_groups", 0)) > _FEW_GROUPS:
            self._warn(
                "equal groups",
                f"in {share:.0%} of the groups of round {number} all rewards are the same, so they "
                "teach nothing; raise model.init_args.num_candidates, or choose a finer reward or "
                "other conditions",
            )
        self._rewards = []
        self._judged = "reward" in experience.histograms
        if self._judged:
            self._check_constant([experience.histograms["reward"]], module, number)

    def on_losses(
        self,
        module: LightningModule,
        part: Experience,
        losses: Tensor,
        values: Mapping[str, Tensor],
    ) -> None:
        """Check ratios, and that losses are finite and have a gradient."""
        assert isinstance(module, RewardFineTuner)
        if not losses.requires_grad:
            raise UsageError(
                f"the loss of {module.algorithm} has no gradient: nothing it depends on is "
                "trainable; look for torch.no_grad, detach or .item() in a reward or pipeline of "
                "yours, and for trainable parameters (model.init_args.lora)"
            )
        deviation, levels = values.get("first_ratio_deviation_max"), part.states.get("t")
        level = None if levels is None else tensor_of(levels)
        seen = _Seen(losses.detach(), deviation, level, values.get("reward"))
        bad = seen.bad(self._tolerance(module))
        # Nothing waits for the device here: the gradients of all processes become NaN instead.
        losses.register_hook(lambda grad: grad.masked_fill(bad, math.nan))  # type: ignore[no-untyped-call]
        self._seen.append(seen)
        if "reward" in values and "constant rewards" not in self._said:
            self._rewards.append(values["reward"].detach())

    def on_phase_end(self, module: LightningModule, name: str, num_samples: int) -> None:
        """Forget the updates of a round."""
        if name == "update":
            self._seen = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check the rewards that the updates of a round have seen, where its draws had none."""
        assert isinstance(pl_module, RewardFineTuner)
        if self.enabled and not self._judged:
            rewards, self._rewards = self._rewards, []
            self._check_constant(rewards, pl_module, pl_module.num_rounds)

    def on_gradients(self, module: LightningModule, norm: float) -> None:
        """Check losses and ratios, that gradients are finite and that there are any."""
        assert isinstance(module, RewardFineTuner)
        all_seen, self._seen = self._seen, []
        if not math.isfinite(norm):
            for seen in all_seen:
                self._check_seen(module, seen)
            gather(None, module.trainer.world_size)  # another process says what it has found
        named = [(n, p) for n, p in module.trainable().named_parameters() if p.requires_grad]
        scaled = loss_scaler(module.trainer.precision_plugin) is not None
        if not math.isfinite(norm) and not scaled:  # a scaler skips such updates and goes on
            grads = [(n, whole(p.grad)) for n, p in named if p.grad is not None]
            wrong = [n for n, grad in grads if not grad.isfinite().all()]
            # Finite ones can have a norm that is not.
            raise _not_finite(module, "gradients", f" (first in {wrong[0]})" if wrong else "")
        if unreached := [n for n, p in named if p.grad is None]:
            self._warn(
                "unreached",
                f"the loss does not reach {len(unreached)} of {len(named)} trainable parameters "
                f"(first {unreached[0]}), so they stay as they are",
            )
        if norm == 0:
            self._warn(
                "zero gradients",
                f"all gradients of update {module.num_updates} are zero: the loss reaches the "
                "parameters but does not depend on them there",
            )

    def _tolerance(self, module: RewardFineTuner) -> float:
        """Return how far from 1 the first ratios may be."""
        if self.ratio_tolerance is not None:
            return self.ratio_tolerance
        return min(_MAX_TOLERANCE, getattr(module, "clip_range", 2 * _MAX_TOLERANCE) / 2)

    def _check_seen(self, module: RewardFineTuner, seen: "_Seen") -> None:
        """Raise UsageError where losses are not finite, or a ratio of the policy's own is not 1."""
        losses, deviation, tolerance = seen.losses, seen.deviation, self._tolerance(module)
        if seen.rewards is not None:
            check_rewards(module.reward, seen.rewards.cpu(), len(losses))
        if not losses.isfinite().all():
            wrong = int((~losses.isfinite()).sum())
            raise _not_finite(module, f"{wrong} of {len(losses)} losses")
        if deviation is None or deviation.max() <= tolerance:
            return
        worst, where = int(deviation.argmax()), ""
        if seen.levels is not None:
            level = float(seen.levels[worst])
            where = _step_of(level, module.pipeline.process, module.sampler)
        precision, denoiser = module.trainer.precision, module.pipeline.denoiser
        weights = str(next(denoiser.parameters()).dtype).removeprefix("torch.")
        raise UsageError(
            f"before the first update of round {module.num_rounds + 1} a probability ratio{where} "
            f"is off 1 by {float(deviation[worst]):.2g}, more than {tolerance:.2g}, in {weights} "
            f"(trainer.precision {precision}): "
            + _cause(denoiser, str(precision), sized=module.sizes.microbatch.rows is not None)
        )

    def _check_constant(
        self, rewards: Sequence[Tensor], module: RewardFineTuner, number: int
    ) -> None:
        """Warn where the rewards of all processes are the same; all of them must call this."""
        if "constant rewards" in self._said:
            return
        known = torch.cat([own.double().flatten().cpu() for own in rewards] or [torch.zeros(0)])
        known = known[known.isfinite()]
        own = (len(known), float(known.min()), float(known.max())) if len(known) else None
        parts = [part for part in gather(own, module.trainer.world_size) if part is not None]
        total, values = sum(part[0] for part in parts), {end for part in parts for end in part[1:]}
        if total > 1 and len(values) == 1:
            self._warn(
                "constant rewards",
                f"all {total} rewards of round {number} are {values.pop():.4g}: "
                f"{module.reward.name} does not tell samples apart there, and nothing can be "
                "learned from them",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            rank_zero_warn(text)


def _not_finite(module: RewardFineTuner, what: str, where: str = "") -> UsageError:
    """Return the error that ends the run, or raise that of weights that were not finite before."""
    named = module.trainable().named_parameters()
    check_weights({n: p for n, p in named if p.requires_grad}, module.num_updates)
    return UsageError(
        f"{what} of update {module.num_updates} are not finite{where}; the weights are those "
        "before it. Lower the learning rate, or compute in trainer.precision 32-true"
    )


def _step_of(level: float, process: Process, sampler: Sampler) -> str:
    """Name the sampler's step that starts at a noise level."""
    step = int((process.times(sampler.num_steps) - level).abs().argmin())
    return f" at step {step} (t = {level:.4g})"


def _cause(denoiser: nn.Module, precision: str, *, sized: bool) -> str:
    """Return the likely cause of ratios that are not 1, and what to do about it.

    Args:
        denoiser: The network.
        precision: The trainer's.
        sized: Whether all microbatches have one size in half precision.
    """
    if any(isinstance(m, _DropoutNd) and m.p > 0 for m in denoiser.modules()):
        return (
            "the denoiser has dropout, which is active in training and not while sampling; set it "
            "to 0"
        )
    mixed = "32" not in precision and "64" not in precision
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in denoiser.parameters())
    if mixed or half:
        exact = ["trainer.precision to 32-true"] if mixed else []
        exact += ["pipeline.init_args.frozen_dtype to auto"] if half else []
        return (
            "in half precision the denoiser rounds differently in batches of another size; set "
            + ("" if sized else "model.init_args.microbatch_size, which gives them one size, or ")
            + " and ".join(exact)
        )
    return (
        "the denoiser does not return the same for the same input; look for noise, state or "
        "batch statistics in it"
    )
