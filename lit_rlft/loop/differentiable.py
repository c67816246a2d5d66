"""What a reward and a process need for an algorithm that follows the reward's gradient."""

from lit_rlft.core.checks import UsageError, require
from lit_rlft.core.pipeline import Pipeline
from lit_rlft.core.reward import Combination, Reward, WeightedSum

__all__ = ["NoGradient", "check_differentiable", "check_guidance"]


class NoGradient(UsageError):
    """A reward whose gradient an algorithm would follow has none.

    The command line names those of the domain that have one.

    Args:
        problem: What is wrong, without the remedy.
    """

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(
            f"{problem}; choose a reward with differentiable = True, or an algorithm that needs "
            "none (configs/algorithms/p_graft.yaml)"
        )


def check_differentiable(
    owner: object, name: str, pipeline: Pipeline, reward: Reward, workers: object
) -> None:
    """Check that a reward's gradient reaches the states that the sampler walks through.

    Args:
        owner: The algorithm, whose settings errors name.
        name: What it is called.
        pipeline: Has the process.
        reward: What to follow.
        workers: The algorithm's `reward_workers`.

    Raises:
        UsageError: The process or the reward has no gradient, workers would cut it off, or a
            reward of a few samples is not what it is among all of a round.
    """
    process = pipeline.process
    if not process.differentiable:
        raise UsageError(
            f"{name} differentiates through the sampler, but the "
            f"{type(process).__name__} of {type(pipeline).__name__} has discrete "
            "transitions; use configs/algorithms/p_graft.yaml or graft.yaml"
        )
    if not reward.differentiable:
        raise NoGradient(
            f"{name} needs a differentiable reward, but {_opaque(reward)} has no gradient"
        )
    rule = f"null for {name}, which follows gradients through the reward; for a reward"
    require(
        workers is None,
        owner,
        "reward_workers",
        f"{rule} in workers use configs/algorithms/p_graft.yaml or ddpo.yaml",
    )
    if isinstance(reward, WeightedSum) and reward.moments:
        raise UsageError(
            f"{name} scores a few samples at a time, but reward.init_args.normalize "
            "takes all those of a round; set it to false and give reward.init_args.ranges"
        )


def check_guidance(pipeline: Pipeline, name: str) -> None:
    """Check that the gradient of a guided prediction is all of it.

    Args:
        pipeline: Makes the prediction.
        name: The algorithm.

    Raises:
        BadArgument: The unconditional half is computed without a graph.
    """
    require(
        getattr(pipeline, "guidance_gradient", "both") == "both",
        pipeline,
        "guidance_gradient",
        f'both for {name}, whose gradient is that of both predictions; "conditional" is for '
        "configs/algorithms/drtune.yaml and its kin",
    )


def _opaque(reward: Reward) -> str:
    """Name the part of a reward that has no gradient."""
    if isinstance(reward, Combination):
        named = [_opaque(part) for part in reward.counted.values() if not part.differentiable]
        return f"{reward.name}'s {' and '.join(named)}"
    return reward.name
