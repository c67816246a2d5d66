"""Noise schedules that were saved with a model, as diffusers' schedulers describe them."""

from typing import Any

from lit_rlft.core.checks import UsageError
from lit_rlft.core.process import GaussianProcess, PredictionType
from lit_rlft.core.schedule import DiscreteVP

__all__ = ["PREDICTION_TYPES", "vp_process"]

PREDICTION_TYPES: dict[str, PredictionType] = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "sample": "sample",
}
"""Prediction types by diffusers' names."""


def vp_process(scheduler: Any, refusal: str) -> GaussianProcess:
    """Return the process of a scheduler with a table of betas.

    Args:
        scheduler: One of diffusers' schedulers; its `config` and `betas` are read.
        refusal: The message for a scheduler without such a table.

    Raises:
        UsageError: The scheduler has no betas, or a prediction type that is unknown here.
    """
    config = scheduler.config
    prediction_type = config.get("prediction_type", "epsilon")
    betas = getattr(scheduler, "betas", None)  # schedulers of flow models have none
    if prediction_type not in PREDICTION_TYPES or betas is None:
        raise UsageError(
            f"{type(scheduler).__name__} with prediction_type {prediction_type!r} {refusal}"
        )
    schedule = DiscreteVP(
        betas,
        spacing=config.get("timestep_spacing", "leading"),
        steps_offset=config.get("steps_offset", 0),
        ends_at_zero=config.get("set_alpha_to_one", True),
    )
    return GaussianProcess(schedule, PREDICTION_TYPES[prediction_type])
