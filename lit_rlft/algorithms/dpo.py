r"""Diffusion-DPO: fine-tuning on pairs of a preferred and a rejected sample.

Each pair has one condition, and is noised alike to one random level. With the model's own denoising
loss :math:`\ell`, averaged over dimensions, and its change from the frozen reference,

.. math::
    d(x) = \ell(f, x) - \ell(f_{ref}, x), \qquad
    loss = -\log \sigma\big(-\beta\, (d(x^w) - d(x^l))\big) .

It bounds the likelihood of the preferences under the model in which the reward is the log-ratio of
policy and reference. The pairs come from candidates of the round, by any reward: the best of M is
preferred to the worst. Or they come from a file of what people preferred.

References:
    Diffusion Model Alignment Using Direct Preference Optimization (Wallace et al., 2023),
    https://arxiv.org/abs/2311.12908
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.core.checks import UsageError, at_least, positive
from lit_rlft.core.pipeline import PAIR, Batch, Condition
from lit_rlft.core.randomness import Generators, generators, paired
from lit_rlft.core.sampling import Denoiser
from lit_rlft.core.state import State, cat, index, leaves, repeat
from lit_rlft.core.streams import Stream
from lit_rlft.distributed import gather, mean_of_all
from lit_rlft.loop.candidates import draw_candidates
from lit_rlft.loop.differentiable import check_guidance
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.pairs import PairStates
from lit_rlft.loop.relay import Relay
from lit_rlft.loop.route import Route

__all__ = ["DiffusionDPO", "best_and_worst", "preference_loss"]

_NUM_LEVELS = 4
"""Noise levels at which a held-out pair is looked at."""


class DiffusionDPO(RewardFineTuner):
    """Diffusion-DPO on pairs drawn in the run, or on those of a file: for any process.

    The loss of masked and mixed states is the model's own too, a bound on the likelihood like the
    Gaussian one. `minibatch_size` and `microbatch_size` count pairs, two samples each.

    Args:
        *args: Pipeline and reward.
        num_candidates: M, samples drawn per condition; the best and the worst are a pair.
        beta: Strength of the pull towards the reference, for losses averaged over dimensions. The
            paper names 2,000 for Stable Diffusion 1.5 and 5,000 for XL; the authors' code halves
            its `beta_dpo` before use, so that 5,000 there is 2,500 here.
        iterative: Draw each round from the model tuned so far; False draws from the reference.
        offline: Take the pairs from the data, `PreferencePairs`, and draw none. The reward, and how
            often the policy prefers as the pairs that are held out, are measured in validations.
        guided_loss: Train the prediction that is sampled from, guidance included; False trains the
            conditional prediction alone, as the paper does.
        start: Share of the sampler's steps that the reference runs first, in [0, 1). The levels
            above are not trained.
        cut: Share of the steps that it runs last, in [0, 1), likewise.
        **base: Arguments of `RewardFineTuner`.
    """

    def __init__(
        self,
        *args: Any,
        num_candidates: int = 4,
        beta: float = 2000.0,
        iterative: bool = True,
        offline: bool = False,
        guided_loss: bool = True,
        start: float = 0.0,
        cut: float = 0.0,
        **base: Any,
    ) -> None:
        super().__init__(*args, **base)
        self.start, self.cut = start, cut
        self.num_candidates, self.beta = num_candidates, beta
        self.iterative, self.offline, self.guided_loss = iterative, offline, guided_loss

    @property
    def relay(self) -> Relay:
        """Who runs which of the sampler's steps, as `start` and `cut` have it."""
        return Relay(self.start, self.cut)

    def check(self) -> None:
        at_least(2, self, "num_candidates")
        self.relay.check(self, self.sampler.num_steps)
        if self.guided_loss:
            check_guidance(self.pipeline, self.algorithm)
        positive(self, "beta")
        if self.offline:
            self.pipeline.check_states()

    def build(self) -> None:
        """Make room for the states of pairs, by split."""
        states = partial(PairStates, self.pipeline, self.seed)
        self._pairs = {"train": states(), "val": states()}

    def route(self) -> Route:
        return self.relay.of(super().route(), self.reference)

    def collect(self, batch: Batch, condition: Condition) -> Experience:
        """Draw M candidates per condition; keep the best and the worst, where they differ.

        Offline take the pairs of the batch.

        Raises:
            UsageError: All rewards failed; or, offline, the data have no pairs.
        """
        if self.offline:
            self.num_samples += 2 * len(condition) * self.trainer.world_size
            return self._given(batch, condition, "train", Stream.DATA, self.num_rounds)
        route = self.route() if self.iterative else self.reference_route()
        drawn = draw_candidates(
            self.rollouts,
            route,
            batch,
            condition,
            self.num_candidates,
            round_index=self.num_rounds,
            keep=[self.sampler.num_steps],
            world_size=(world_size := self.trainer.world_size),
        )
        self.num_samples += len(drawn.seeds) * world_size
        (x_0,), candidates, seeds = drawn.states, drawn.condition, drawn.seeds
        rewards = drawn.rewards.cpu()
        groups = rewards.view(-1, self.num_candidates)
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
                "reward": drawn.reward,
                "failed_rewards": drawn.failed_rewards,
                "reward_margin": mean_of_all(margins, world_size),
                "pairs_per_condition": mean_of_all(torch.tensor(counts).float(), world_size),
            },
            histograms={"reward": drawn.known.cpu(), "reward_margin": margins},
            counts=counts,
        )

    def _given(
        self, batch: Batch, condition: Condition, split: str, *stream: int, num: int = 1
    ) -> Experience:
        """Return the pairs of a batch, each `num` times, with other noise."""
        if PAIR not in batch:
            raise UsageError(
                "model.init_args.offline is true, but the data have no pairs; give "
                "--data PreferencePairs --data.file <preference file>, or set it to false"
            )
        chosen, rejected = self._pairs[split].of(batch["index"].tolist(), batch[PAIR])
        states = {"preferred": repeat(chosen, num), "rejected": repeat(rejected, num)}
        seeds = self.rollouts.seeds(batch, num, *stream)
        return Experience(states, condition.repeat(num), seeds)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._held: dict[str, list[Tensor]] = {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure samples; offline also how often the policy prefers as the pairs do."""
        super().validation_step(batch, batch_idx)
        if not self.offline or PAIR not in batch:
            return
        condition = self.pipeline.encode(batch)
        pairs = self._given(batch, condition, "val", Stream.DATA, num=_NUM_LEVELS)
        with self.meter.unbilled():
            _, values = self.loss(pairs, generators(pairs.seeds))
        for name, value in values.items():
            self._held.setdefault(name, []).append(value.cpu())

    def on_validation_epoch_end(self) -> None:
        """Log the means, over the held-out pairs of all processes."""
        super().on_validation_epoch_end()
        every = gather(
            {name: torch.cat(own) for name, own in self._held.items()}, self.trainer.world_size
        )
        for name in dict.fromkeys(name for part in every for name in part):
            mean = torch.cat([part[name] for part in every if name in part]).mean()
            self.log(f"val/{name}", mean, sync_dist=True)

    def loss(self, experience: Experience, noise: Generators) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the preference loss of pairs at random levels, [n]."""
        preferred, rejected = (experience.states[name] for name in ("preferred", "rejected"))
        num = len(experience)
        process, num_steps = self.pipeline.process, self.sampler.num_steps
        t = self.relay.random_times(process, num_steps, preferred, noise)
        s = torch.zeros_like(t)
        noises = paired(noise, num)
        noised = [
            process.noised(x_0, s, t, own)
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
