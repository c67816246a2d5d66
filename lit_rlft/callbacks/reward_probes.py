"""Whether rewards tell a domain's known samples apart, before anything is drawn."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Pipeline
from lit_rlft.core.reward import Reward

__all__ = ["check_on_probes"]


def check_on_probes(
    reward: Reward, pipeline: Pipeline, precision: AbstractContextManager[Any]
) -> None:
    """Let those rewards score the domain's probes that never give much different samples the same.

    Others are left alone: a detector may well find nothing in all of them. Where a reward cannot
    score probes at all, the run's own samples will show why.

    Args:
        reward: The run's reward, with its parts.
        pipeline: Knows the probes, if its domain has any.
        precision: That of the run.

    Raises:
        UsageError: Such a reward returned NaN, an infinity, or one number for all probes.
    """
    sharp = [part for part in reward.modules() if isinstance(part, Reward) and part.distinguishes]
    if not sharp or (probes := pipeline.probes()) is None:
        return
    samples, condition = probes
    with precision, torch.no_grad():
        for part in sharp:
            try:
                values = part(samples, condition)
            except Exception:  # of any kind: samples of the run decide
                continue
            if isinstance(values, Tensor) and values.shape == (len(condition),):
                _judge(part, values.double().cpu())


def _judge(part: Reward, values: Tensor) -> None:
    wrong = int((~values.isfinite()).sum())
    if not wrong and values.min() < values.max():
        return
    found = f"no finite number for {wrong}" if wrong else f"{float(values[0]):.6g} for each"
    raise UsageError(
        f"{part.name} returned {found} of {len(values)} known samples that have nothing in common: "
        "its weights, their precision or its settings are at fault; check its pretrained, its "
        "dtype and its scale in reward.init_args, or set self_check.reward_probes to false"
    )
