"""A reward's mean per group of prompts, and how often the tuned model beats the reference."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from domains.text_to_image.benchmarks.group_means import GroupMeans, places_by_group, slug
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward, rewards_of
from lit_rlft.kit.ratios import error_of_mean

__all__ = ["RewardByGroup"]


class RewardByGroup(GroupMeans):
    """A reward's mean per group of prompts, and the tuned model's win rate over the reference.

    Reported as `<reward>/<group>`, of all groups `<reward>/groups`, the mean of their means; the
    win rate as `win_rate/<reward>` over all pictures and `win_rate/<reward>/<group>`. Both models
    start from the same noise: the win rate is the share of pairs of pictures in which the tuned
    model's scores higher, ties counting half, with the standard error of a mean over pairs. Pairs
    of which one failed (NaN) do not count.

    HPDv2's protocol is HPSv2 2.1 by `style`; PartiPrompts' and DrawBench's win rates are by
    `category`, where people's votes are replaced by the reward.

    Args:
        reward: Any reward of pictures.
        column: What tells a prompt's group: category, challenge, style or a column of your own.

    Raises:
        UsageError: While measuring, the data lack the column.
    """

    def __init__(self, reward: Reward, column: str = "category") -> None:
        super().__init__()
        self.reward, self.column = reward, column

    @property
    def name(self) -> str:
        return f"{self.reward.name}/groups"

    def scores(self, samples: Any, condition: Condition) -> Tensor:
        """Return the reward of each sample, [B], NaN where it failed."""
        return rewards_of(self.reward, samples, condition, may_fail=True)

    def groups(self, condition: Condition) -> list[str]:
        """Return the group of each sample."""
        return [slug(str(self._group(entry))) for entry in condition.each()]

    def _group(self, entry: Mapping[str, Any]) -> Any:
        if entry.get(self.column) is None:
            raise UsageError(
                f"RewardByGroup needs the {self.column!r} of each prompt, but the data have "
                f"{sorted(entry)}; set column to one of these, or data to the benchmark's"
            )
        return entry[self.column]

    def _named(self, values: Mapping[str, float], whole: float) -> dict[str, float]:
        own = {f"{self.reward.name}/{group}": value for group, value in values.items()}
        return {self.name: whole} | own

    def beside(
        self,
        features: Mapping[str, Tensor],
        reference: Mapping[str, Tensor],
        *,
        rows: Tensor | None = None,
    ) -> dict[str, tuple[float, float]]:
        """Return the win rate over all pairs and per group, each with its standard error."""
        tuned, other = features["score"], reference["score"]
        wins = (tuned > other).double() + 0.5 * (tuned == other).double()
        known, key = ~(tuned.isnan() | other.isnan()), f"win_rate/{self.reward.name}"
        groups = places_by_group(features["group"])
        parts = {key: known} | {f"{key}/{group}": known & own for group, own in groups.items()}
        return {
            name: (
                float(wins[own].mean()),
                error_of_mean(wins[own], groups=None if rows is None else rows[own]),
            )
            for name, own in parts.items()
            if own.any()
        }
