"""DRTune's update with 1, 2 and 4 trained steps."""

from typing import Any

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.models import pipeline_of
from benchmarks.gpu.tuning import Arm, arms_on_an_update, checkpointing, fit
from domains.text_to_image.rewards import Brightness
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.core.gradient_plan import DRTune
from lit_rlft.core.sampling import Sampler
from lit_rlft.loop.reference import LoRA
from lit_rlft.loop.updates import Update

__all__ = ["measure"]


def measure(bench: Bench) -> None:
    """Take an update of Stable Diffusion 1.5 through its VAE, with and without checkpointing."""
    bench.case({"arm": "round"}, lambda: _round(bench))
    bench.rows = [row for row in bench.rows if row["arm"] != "round" or len(row) > 1]


def _round(bench: Bench) -> Row:
    prompts, steps = bench.pick((4, 20), (1, 4))
    tuner = RewardGradient(
        pipeline_of(bench, "sd", guidance_scale=5.0, decode_batch_size=1),
        Brightness(),
        method=DRTune(1, 1),
        sampler=Sampler(steps),
        lora=LoRA(8, 8),
        minibatch_size=prompts,
    )
    own = tuner._update
    arms: dict[str, Arm] = {}
    keys: dict[str, Row] = {}
    for k in (1, 2, 4):
        for on in (False, True):

            def take(update: Update, k: int = k, on: bool = on) -> None:
                tuner.method = DRTune(k, 1)
                checkpointing(tuner, on)
                own(update)

            name = f"K = {k}{', checkpointed' if on else ''}"
            arms[name], keys[name] = take, {"k": k, "checkpointed": on}
    work = {"pictures": prompts, "steps": steps}
    taken: Any = arms_on_an_update(bench, arms, keys, work)
    tuner._update = taken  # type: ignore[method-assign]
    fit(bench, tuner, [], 1, prompts)
    return {}
