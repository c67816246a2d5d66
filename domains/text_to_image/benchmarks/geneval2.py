"""GenEval 2: how sure a vision-language model is of what prompts ask for, also by skill."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from domains.text_to_image.benchmarks.group_means import WIDTH, encoded, places_by_group, slug
from domains.text_to_image.benchmarks.preference import RewardByGroup
from domains.text_to_image.rewards.soft_tifa import QUESTIONS, SoftTIFA, question_problem
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.kit.ratios import Ratio, error_of_ratio, ratio

__all__ = ["SKILLS", "GenEval2", "skill_problem"]

SKILLS = "skills"
"""The column that names the skill of each question of a prompt."""
_MOST = 32
"""Questions that a prompt may have."""


class GenEval2(RewardByGroup):
    """GenEval 2's numbers of a model, from one look at each picture.

    Beside those of `RewardByGroup` per `atom_count`, where scores are geometric means over a
    prompt's questions and win rates compare the models' scores:

    - `<reward>/<skill>`: the mean probability of the right answers to all questions of a skill
      (count, attribute, object, position, ...);
    - `<reward>/questions`: the mean over prompts of the arithmetic mean over a prompt's questions
      (the benchmark's Soft-TIFA AM).

    Args:
        reward: What asks the questions.

    Raises:
        UsageError: While measuring, a prompt has no `atom_count`, or not a skill for each of at
            most 32 questions.

    References:
        GenEval 2: Addressing Benchmark Drift in Text-to-Image Evaluation (Kamath et al., 2025),
        https://arxiv.org/abs/2512.16853
    """

    reward: SoftTIFA

    def __init__(self, reward: SoftTIFA) -> None:
        super().__init__(reward, "atom_count")

    @torch.no_grad()
    def features(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return scores, groups, and of each question the probability and the skill.

        They are float64 [B], uint8 [B, 64], float64 [B, 32], NaN beyond a prompt's questions, and
        uint8 [B, 32, 64].
        """
        skills = [_skills(entry) for entry in condition.each()]
        logs = self.reward.log_probabilities(samples, condition)
        right = torch.full((len(logs), _MOST), math.nan, dtype=torch.float64)
        for row, own in zip(right, logs, strict=True):
            row[: len(own)] = own.double().exp()
        names = [name for own in skills for name in [*own, *[""] * (_MOST - len(own))]]
        return {
            "score": self.reward.averaged(logs).double().cpu(),
            "group": encoded(self.groups(condition)),
            "right": right,
            "skill": encoded(names).view(len(skills), _MOST, WIDTH),
        }

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the means of groups, of skills and over questions."""
        own = {name: ratio(*pair) for name, pair in self._over_questions(features).items()}
        return super().compare(features) | own

    def errors(
        self,
        features: Mapping[str, Tensor],
        other: Mapping[str, Tensor] | None = None,
        *,
        rows: Tensor | None = None,
    ) -> dict[str, float]:
        """Return the standard error of each number, or of its difference from another model's."""
        others = {} if other is None else self._over_questions(other)
        own = {
            name: error_of_ratio(pair, others.get(name), groups=rows)
            for name, pair in self._over_questions(features).items()
        }
        return super().errors(features, other, rows=rows) | own

    def _over_questions(self, features: Mapping[str, Tensor]) -> dict[str, Ratio]:
        """Return by name what each sample adds to a ratio's parts and to its wholes, [n] each."""
        right = features["right"]
        known, name = ~right.isnan(), self.reward.name
        means = right.nansum(dim=1) / known.sum(dim=1)
        found = {f"{name}/questions": (means, torch.ones_like(means))}
        for skill, places in places_by_group(features["skill"].flatten(0, 1)).items():
            own = places.view_as(right) & known
            parts = right.where(own, 0.0).sum(dim=1)
            found[f"{name}/{skill}"] = (parts, own.sum(dim=1).double())
        return found


def _skills(entry: Mapping[str, Any]) -> list[str]:
    """Return the skill of each question of a prompt, as a part of a number's name."""
    if problem := skill_problem(entry):
        raise UsageError(
            f"GenEval2: the prompt {entry.get('prompt', '')!r} {problem}; set data to "
            "GenEval2Prompts, or metrics to RewardByGroup with the reward SoftTIFA"
        )
    return [slug(skill) for skill in entry[SKILLS]]


def skill_problem(entry: Mapping[str, Any]) -> str:
    """Return what is wrong with the questions of a record or their skills, "" where nothing is."""
    if problem := question_problem(entry):
        return problem
    asked, skills = entry[QUESTIONS], entry.get(SKILLS)
    if len(asked) > _MOST:
        return f"has {len(asked)} questions, more than {_MOST}"
    if not isinstance(skills, list | tuple) or len(skills) != len(asked):
        return f"has not one skill for each of its {len(asked)} questions under {SKILLS!r}"
    if not all(isinstance(skill, str) and slug(skill) for skill in skills):
        return f"has something other than names of skills under {SKILLS!r}"
    return ""
