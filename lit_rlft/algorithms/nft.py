r"""DiffusionNFT: policy improvement on the forward process, from good and bad samples alike.

Each round draws M samples per condition from a policy f_old with any sampler. A sample's reward
becomes the probability :math:`r` of being good. Its :math:`x_0` is noised to a random t, and

.. math::
    r \, \ell(f_+, x_0) + (1 - r) \, \ell(f_-, x_0), \qquad
    f_\pm = f_{old} \pm \beta (f - f_{old}),

is minimised with the model's own denoising loss :math:`\ell`. For squared errors the minimiser is,
where f_old is the exact denoiser of its own samples,

.. math::
    f^* = f_{old} + \frac{2}{\beta} E[r \mid x_t] \,
          \big(E[target \mid x_t, good] - f_{old}\big) .

No likelihood of a path and no stored trajectory is needed. After each round f_old follows f. The
squared distance to the reference's prediction may be added, `kl_coef` times.

References:
    DiffusionNFT (Zheng et al., 2025), https://arxiv.org/abs/2509.16117
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.core.checks import at_least, below_one, one_of, positive, require
from lit_rlft.core.divergence import prediction_distance
from lit_rlft.core.implicit import centred, group_probabilities, implicit
from lit_rlft.core.pipeline import Batch, Condition
from lit_rlft.core.process import GaussianProcess, Process
from lit_rlft.core.randomness import Generators
from lit_rlft.core.state import State, index, leaves, tensor_of
from lit_rlft.distributed import gather
from lit_rlft.loop.candidates import draw_candidates
from lit_rlft.loop.checkpoint import Kept
from lit_rlft.loop.differentiable import check_guidance
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.old_policy import OldPolicy
from lit_rlft.loop.relay import Relay
from lit_rlft.loop.route import Route
from lit_rlft.loop.sharded import split_again, split_meanwhile

__all__ = ["DiffusionNFT", "contrastive_loss"]

Weighting = Literal["native", "self_normalized"]

_SMALLEST = 1e-5
"""Of the error that a self-normalised loss is divided by."""


class DiffusionNFT(RewardFineTuner):
    """DiffusionNFT: for any reward, any sampler, and any process.

    Categorical parts of a state draw f_+ and f_- in logits, a choice of ours: the paper has
    Gaussian states alone. Sampling without guidance is the published way: the contrast replaces it.
    Under guidance the guided prediction is trained, since it is what is sampled from.

    Args:
        *args: Pipeline and reward.
        num_candidates: M, samples drawn per condition and round.
        beta: Strength of the guidance that f_+ and f_- stand for; smaller steps further.
        reward_clip: A reward counts as far from its condition's mean as so many standard
            deviations, those of all such differences in the round.
        max_decay: Largest share of its own weights that f_old keeps after a round, in [0, 1).
        decay_rate: After round i it keeps min(decay_rate (i - decay_after), max_decay); 0 samples
            from the policy that is trained.
        decay_after: Rounds of which it keeps nothing.
        kl_coef: Weight of the squared distance of prediction and reference prediction, per free
            dimension; 0 never runs the reference. The published code multiplies the rest of the
            loss by reward_clip / beta: its 1e-4 is 1e-4 beta / reward_clip here.
        weighting: Of the levels t: the model's "native" loss, or the published "self_normalized"
            one, the squared error of x_0 divided by its mean absolute error; for Gaussian states.
        start: Share of the sampler's steps that the reference runs first, in [0, 1). The levels
            above are not trained.
        cut: Share of the steps that it runs last, in [0, 1), likewise.
        **base: Arguments of `RewardFineTuner`.
    """

    def __init__(
        self,
        *args: Any,
        num_candidates: int = 4,
        beta: float = 1.0,
        reward_clip: float = 1.0,
        max_decay: float = 0.5,
        decay_rate: float = 0.001,
        decay_after: int = 0,
        kl_coef: float = 0.0,
        weighting: Weighting = "native",
        start: float = 0.0,
        cut: float = 0.0,
        **base: Any,
    ) -> None:
        super().__init__(*args, **base)
        self.start, self.cut = start, cut
        self.num_candidates = num_candidates
        self.beta, self.reward_clip = beta, reward_clip
        self.max_decay, self.decay_rate, self.decay_after = max_decay, decay_rate, decay_after
        self.kl_coef = kl_coef
        self.weighting: Weighting = weighting
        self.old_policy = OldPolicy()

    @property
    def relay(self) -> Relay:
        """Who runs which of the sampler's steps, as `start` and `cut` have it."""
        return Relay(self.start, self.cut)

    def check(self) -> None:
        check_guidance(self.pipeline, self.algorithm)
        at_least(2, self, "num_candidates")
        self.relay.check(self, self.sampler.num_steps)
        positive(self, "beta", "reward_clip")
        at_least(0, self, "max_decay", "decay_rate", "decay_after", "kl_coef")
        below_one(self, "max_decay")
        one_of(self, "weighting", get_args(Weighting))
        name = type(self.pipeline.process).__name__
        rule = f"0 for a {name}: predictions of its categorical parts have no distance"
        apart = not self.kl_coef or self.pipeline.process.differentiable
        require(apart, self, "kl_coef", rule)
        if self.weighting == "native":
            return
        gaussian = isinstance(self.pipeline.process, GaussianProcess)
        rule = f"'native' for a {name}: parts of its states have no squared error of x_0"
        require(gaussian, self, "weighting", rule)

    def statistics(self) -> Mapping[str, Kept]:
        return {"old_policy": self.old_policy}

    def route(self) -> Route:
        return self.relay.of(super().route(), self.reference)

    def collect(self, batch: Batch, condition: Condition) -> Experience:
        """Draw M samples per condition from f_old; keep x_0 and how likely it counts as good.

        Raises:
            UsageError: All rewards failed.
        """
        world_size = self.trainer.world_size
        with self._sampling_policy():
            drawn = draw_candidates(
                self.rollouts,
                self.route(),
                batch,
                condition,
                self.num_candidates,
                round_index=self.num_rounds,
                keep=[self.sampler.num_steps],
                world_size=world_size,
            )
        self.num_samples += len(drawn.seeds) * world_size
        (x_0,), candidates, seeds = drawn.states, drawn.condition, drawn.seeds
        groups = drawn.rewards.double().cpu().view(-1, self.num_candidates)
        good = self._probabilities(groups)
        known = good.isfinite()
        rows = known.flatten().nonzero().flatten()
        return Experience(
            states={
                "x_0": index(x_0, rows.to(leaves(x_0)[0].device)),
                "good": good.flatten()[rows].to(leaves(x_0)[0].device, torch.float32),
            },
            condition=candidates.index(rows),
            seeds=[seeds[i] for i in rows.tolist()],
            metrics={
                "reward": drawn.reward,
                "failed_rewards": drawn.failed_rewards,
            },
            histograms={"reward": groups[known], "good": good[known]},
            counts=known.sum(dim=1).tolist(),
        )

    @contextmanager
    def _sampling_policy(self) -> Iterator[None]:
        """Let f_old follow the last round's updates, and draw from it within the block."""
        denoiser, lent = self.pipeline.denoiser, ExitStack()
        with split_meanwhile(denoiser):
            trained = self._trained()
            if self.num_rounds:
                self.old_policy.follow(trained, self._decay)
            lent.enter_context(self.old_policy.active(trained))
        try:
            yield
        except BaseException:
            split_again(denoiser)
            lent.close()
            raise
        with split_meanwhile(denoiser):
            lent.close()

    @property
    def _decay(self) -> float:
        """The share of its own weights that f_old keeps after the rounds so far."""
        return min(self.decay_rate * max(self.num_rounds - self.decay_after, 0), self.max_decay)

    def _probabilities(self, groups: Tensor) -> Tensor:
        """Return how likely each sample of this process counts as good, [G, M]."""
        apart = centred(groups)
        parts = gather(apart[apart.isfinite()], self.trainer.world_size)
        # Sorted, so that the sum does not depend on the number of processes.
        every = torch.cat(parts).sort().values
        return group_probabilities(groups, _deviation(every), self.reward_clip)

    def loss(self, experience: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the contrastive loss of the samples at random levels, plus the penalty, [n]."""
        process, x_0 = self.pipeline.process, experience.states["x_0"]
        t = self.relay.random_times(process, self.sampler.num_steps, x_0, noise)
        x_t = process.noised(x_0, torch.zeros_like(t), t, noise)
        with self.old_policy.active(self._trained()):
            old = self.pipeline(x_t, t, experience.condition)
        prediction = self.pipeline(x_t, t, experience.condition)
        good = tensor_of(experience.states["good"])
        losses = contrastive_loss(
            process, prediction, old, x_0, x_t, t, good, self.beta, self.weighting
        )
        if not self.kl_coef:
            return losses, {}
        with torch.no_grad():
            reference = self.reference(x_t, t, experience.condition)
        distance = prediction_distance(process, prediction, reference, x_t)
        return losses + self.kl_coef * distance, {"reference_distance": distance.detach()}


def _deviation(values: Tensor) -> float:
    return float(values.std(correction=0)) if len(values) else 0.0


def contrastive_loss(
    process: Process,
    prediction: State,
    old: State,
    x_0: State,
    x_t: State,
    t: Tensor,
    good: Tensor,
    beta: float,
    weighting: Weighting = "native",
) -> Tensor:
    """Return r l(f_+) + (1 - r) l(f_-) of each sample, [B].

    Args:
        process: Its denoising loss is l.
        prediction: f, [B, ...].
        old: f_old.
        x_0: The samples.
        x_t: The same, noised.
        t: Levels, [B].
        good: r, [B] in [0, 1].
        beta: f_+ and f_- lie at f_old + beta (f - f_old) and f_old - beta (f - f_old).
        weighting: As of `DiffusionNFT`.
    """
    losses = []
    for side in (beta, -beta):
        own = implicit(prediction, old, torch.full_like(t, side))
        if weighting == "native":
            losses.append(process.loss(own, x_0, x_t, torch.zeros_like(t), t))
            continue
        error = (tensor_of(process.denoised(own, x_t, t)) - tensor_of(x_0)).flatten(start_dim=1)
        size = error.detach().abs().mean(dim=1).clamp(min=_SMALLEST)
        losses.append(error.square().mean(dim=1) / size)
    return good * losses[0] + (1 - good) * losses[1]
