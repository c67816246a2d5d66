"""A reward that is on the device only while it scores."""

from typing import Any

import torch
from torch import Tensor

from lit_rlft.core.answers import tensors
from lit_rlft.core.checks import BadArgument
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.reward import Combination, Metric, Reward, values_of
from lit_rlft.kit.idle import at_work, put_away

__all__ = ["Offloaded"]


class Offloaded(Reward):
    """A reward whose networks wait in the processor's memory until they score.

    They come to the samples' device for each call and leave it after: memory for sampling and
    training, at the price of their way. Where gradients flow they stay until a call without
    gradients, since the backward pass goes through them. Of a `WeightedSum` wrap the parts.

    Args:
        reward: The reward; it keeps its name.

    Raises:
        BadArgument: `reward` is a combination of several.
    """

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        if isinstance(reward, Combination):
            problem = "must be a single reward; wrap the parts of a combination"
            raise BadArgument(self, "reward", problem)
        self.reward = reward
        put_away(self, "reward")
        self.differentiable, self.distinguishes = reward.differentiable, reward.distinguishes
        self.waits = reward.waits

    @property
    def name(self) -> str:
        return self.reward.name

    def check(self, pipeline: Pipeline) -> None:
        for part in self.reward.modules():
            if isinstance(part, Metric):
                part.requires_grad_(False).check(pipeline)

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the reward of each sample, [B]."""
        given = list(tensors(samples))
        graph = torch.is_grad_enabled() and any(one.requires_grad for one in given)
        device = next((one.device for one in given), torch.device("cpu"))
        with at_work(self.reward, device, stays=graph):
            rewards: Tensor = self.reward(samples, condition)
        return rewards

    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return what the reward measures."""
        device = next((one.device for one in tensors(samples)), torch.device("cpu"))
        with at_work(self.reward, device):
            return values_of(self.reward, samples, condition)
