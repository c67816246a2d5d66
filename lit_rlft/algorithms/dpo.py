r"""Diffusion-DPO: fine-tuning on pairs of a preferred and a rejected sample.

Each pair has one condition, and is noised alike to one random level. With the model's own denoising
loss :math:`\ell`, averaged over dimensions, and its change from the frozen reference,

.. math::
    d(x) = \ell(f, x) - \ell(f_{ref}, x), \qquad
    loss = -\log \sigma\big(-\beta\, (d(x^w) - d(x^l))\big) .

It bounds the likelihood of the preferences under the model in which the reward is the log-ratio of
policy and reference. The pairs come from candidates of the round, by any reward: the best of M is
preferred to the worst.

References:
    Diffusion Model Alignment Using Direct Preference Optimization (Wallace et al., 2023),
    https://arxiv.org/abs/2311.12908
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.core.checks import at_least, positive
from lit_rlft.core.pipeline import Batch, Condition
from lit_rlft.core.randomness import Generators, paired, rand_like
from lit_rlft.core.reward import all_failed
from lit_rlft.core.sampling import Denoiser
from lit_rlft.core.state import State, cat, index, leaves
from lit_rlft.core.streams import Stream
from lit_rlft.distributed import mean_of_all
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.scoring import Scoring

__all__ = ["DiffusionDPO", "best_and_worst", "preference_loss"]


class DiffusionDPO(RewardFineTuner):
    """Diffusion-DPO on pairs drawn in the run: for any reward, any sampler, and any process.

    The loss of masked and mixed states is the model's own too, a bound on the likelihood like the
    Gaussian one. `minibatch_size` and `microbatch_size` count pairs, two samples each.

    Args:
        *args: Pipeline and reward.
        num_candidates: M, samples drawn per condition; the best and the worst are a pair.
        beta: Strength of the pull towards the reference, for losses averaged over dimensions;
            published are 2,000 for Stable Diffusion 1.5 and 5,000 for XL.
        iterative: Draw each round from the model tuned so far; False draws from the reference.
        guided_loss: Train the prediction that is sampled from, guidance included; False trains the
            conditional prediction alone, as the paper does.
        **base: Arguments of `RewardFineTuner`.
    """

    def __init__(
        self,
        *args: Any,
        num_candidates: int = 4,
        beta: float = 2000.0,
        iterative: bool = True,
        guided_loss: bool = True,
        **base: Any,
    ) -> None:
        super().__init__(*args, **base)
        self.num_candidates, self.beta = num_candidates, beta
        self.iterative, self.guided_loss = iterative, guided_loss

    def check(self) -> None:
        at_least(2, self, "num_candidates")
        positive(self, "beta")

    def collect(self, batch: Batch, condition: Condition) -> Experience:
        """Draw M candidates per condition; keep the best and the worst, where they differ.

        Raises:
            UsageError: All rewards failed.
        """
        candidates = condition.repeat(self.num_candidates)
        stream = (Stream.ROLLOUT, self.num_rounds)
        seeds = self.rollouts.seeds(batch, self.num_candidates, *stream)
        scoring, end = Scoring(self.rollouts), self.sampler.num_steps
        route = self.route() if self.iterative else self.reference_route()
        (x_0,) = self.rollouts.draw(route, candidates, seeds, keep=[end], drawn=scoring.drawn)
        self.num_samples += len(candidates) * (world_size := self.trainer.world_size)
        rewards = scoring.finish(x_0, candidates, seeds, world_size).rewards.cpu()
        groups = rewards.view(-1, self.num_candidates)
        known = rewards[rewards.isfinite()]
        if math.isnan(reward := mean_of_all(known, world_size)) and not self.reward.asks:
            raise all_failed(self.reward.name, len(candidates) * world_size)
        chosen = best_and_worst(groups)
        device = leaves(x_0)[0].device
        best, worst = (rows.to(device) for rows in chosen.unbind(dim=1))
        margins = rewards[chosen[:, 0]] - rewards[chosen[:, 1]]
        counts = torch.bincount(chosen[:, 0] // self.num_candidates, minlength=len(groups)).tolist()
        return Experience(
            states={"preferred": index(x_0, best), "rejected": index(x_0, worst)},
            condition=candidates.index(chosen[:, 0]),
            seeds=[seeds[i] for i in chosen[:, 0].tolist()],
            metrics={
                "reward": reward,
                "failed_rewards": mean_of_all(1 - rewards.isfinite().float(), world_size),
                "reward_margin": mean_of_all(margins, world_size),
                "pairs_per_condition": mean_of_all(torch.tensor(counts).float(), world_size),
            },
            histograms={"reward": known, "reward_margin": margins},
            counts=counts,
        )

    def loss(self, experience: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the preference loss of pairs at random levels, [n]."""
        preferred, rejected = (experience.states[name] for name in ("preferred", "rejected"))
        num = len(experience)
        uniform = rand_like(torch.empty(num, device=leaves(preferred)[0].device), noise)
        t = self.pipeline.process.draw_times(uniform)
        s = torch.zeros_like(t)
        noises = paired(noise, num)
        noised = [
            self.pipeline.process.noised(x_0, s, t, own)
            for x_0, own in zip((preferred, rejected), noises, strict=True)
        ]
        # One call for both of each pair: the network sees 2 n rows.
        x_0, x_t = cat([preferred, rejected]), cat(noised)
        condition = experience.condition.index(torch.arange(num).repeat(2))
        predict = self.pipeline if self.guided_loss else self.pipeline.predict
        with torch.no_grad(), self.reference.active():
            reference = self._losses(predict, x_0, x_t, t, condition)
        losses = self._losses(predict, x_0, x_t, t, condition)
        own, other = (losses - reference).view(2, num)
        return preference_loss(own, other, self.beta)

    def _losses(
        self, predict: Denoiser, x_0: State, x_t: State, t: Tensor, condition: Condition
    ) -> Tensor:
        """Return the denoising losses of pairs at their levels t [n], [2 n]."""
        times = torch.cat([t, t])
        prediction = predict(x_t, times, condition)
        return self.pipeline.process.loss(prediction, x_0, x_t, torch.zeros_like(times), times)


def preference_loss(
    preferred: Tensor, rejected: Tensor, beta: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return -log sigmoid(-beta (d_w - d_l)), [n], and values to log.

    Args:
        preferred: d_w, how much more of a denoising loss the policy has than the reference, [n].
        rejected: d_l, the same of the other sample.
        beta: Strength of the pull towards the reference.

    Returns:
        The losses; "implicit_accuracy" is 1 where the policy prefers as the pair does, 1/2 where it
        has no preference, and "implicit_margin" its preference in log-odds.
    """
    margin = -beta * (preferred - rejected)
    accuracy = 0.5 + 0.5 * margin.detach().sign()
    return -logsigmoid(margin), {
        "implicit_accuracy": accuracy,
        "implicit_margin": margin.detach(),
    }


def best_and_worst(groups: Tensor) -> Tensor:
    """Return the numbers of the best and worst sample of each condition, int64 [P, 2].

    Args:
        groups: Rewards [G, M], NaN where a sample could not be scored. Rows without two different
            rewards have no pair.
    """
    known = groups.isfinite()
    best = groups.where(known, -math.inf).argmax(dim=1)
    worst = groups.where(known, math.inf).argmin(dim=1)
    rows = torch.arange(len(groups))
    differ = (groups[rows, best] > groups[rows, worst]).nonzero().flatten()  # false for NaN
    starts = groups.shape[1] * differ
    return torch.stack([starts + best[differ], starts + worst[differ]], dim=1)
