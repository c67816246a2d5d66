"""A reward that is on the device only while it scores."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lit_rlft.core.answers import device_of, tensors
from lit_rlft.core.checks import BadArgument
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.reward import Combination, Reward, check_parts, values_of
from lit_rlft.kit.idle import at_work, put_away

__all__ = ["Offloaded"]


class Offloaded(Reward):
    """A reward whose networks wait in the processor's memory until they score.

    They come to the samples' device for each call and leave it after, which frees memory for
    sampling and training and costs the transfers. Where gradients flow they stay until a call
    without gradients, since the backward pass goes through them. Of a `WeightedSum` wrap the parts.
    Numbers are those of the reward alone, in every precision and in workers too.

    Args:
        reward: The reward; it keeps its name.

    Raises:
        BadArgument: `reward` is a combination of several, or a person.
    """

    follows: Tensor

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        if isinstance(reward, Combination):
            problem = "must be a single reward; wrap the parts of a combination"
            raise BadArgument(self, "reward", problem)
        if reward.asks:
            raise BadArgument(self, "reward", "must be a network; a person takes no memory")
        self.reward = reward.eval()  # a module that is put away hears nothing of modes
        put_away(self, "reward")
        # Nor of types: trainers change that of floating-point buffers with that of weights.
        self.register_buffer("follows", torch.zeros((), dtype=torch.float32), persistent=False)
        self.differentiable, self.distinguishes = reward.differentiable, reward.distinguishes
        self.waits = reward.waits

    @property
    def name(self) -> str:
        return self.reward.name

    def check(self, pipeline: Pipeline) -> None:
        check_parts(self.reward, pipeline)

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the reward of each sample, [B]."""
        graph = torch.is_grad_enabled() and any(one.requires_grad for one in tensors(samples))
        with self._working(samples, stays=graph):
            rewards: Tensor = self.reward(samples, condition)
        return rewards

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return what the reward measures."""
        with self._working(samples):
            return values_of(self.reward, samples, condition)

    def _working(self, samples: Any, *, stays: bool = False) -> AbstractContextManager[None]:
        """Return the time in which the reward is where the samples are."""
        if self.follows.dtype != torch.float32:
            self.reward.to(self.follows.dtype)
        device = device_of(samples, torch.device("cpu"))
        return at_work(self.reward, device, stays=stays)
