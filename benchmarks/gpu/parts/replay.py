"""DDPO's update at several microbatches, beside the loop of ddpo-pytorch and TRL."""

from functools import partial
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, Row
from benchmarks.gpu.models import pipeline_of
from benchmarks.gpu.tuning import Arm, arms_on_an_update, checkpointing, fit
from domains.text_to_image.rewards import Brightness
from lit_rlft.algorithms.ddpo import DDPO, Rollout
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.trajectory import law_of
from lit_rlft.loop.reference import LoRA
from lit_rlft.loop.updates import Update

__all__ = ["measure"]


def measure(bench: Bench) -> None:
    """Take one update of Stable Diffusion 1.5 in all ways: LoRA, guidance, bf16 frozen weights.

    TRL's shape is a plain loop on the same modules: a forward and a backward pass for each step of
    each sample, the loss read after each, one optimiser step at the end.
    """
    bench.case({"arm": "round"}, lambda: _round(bench))
    bench.rows = [row for row in bench.rows if row["arm"] != "round" or len(row) > 1]


def _round(bench: Bench) -> Row:
    prompts, candidates, steps = bench.pick((4, 4, 5), (1, 2, 2))
    tuner = DDPO(
        pipeline_of(bench, "sd", guidance_scale=5.0, decode_batch_size=4),
        Brightness(),
        num_candidates=candidates,
        sampler=Sampler(steps, 1.0),
        lora=LoRA(8, 8),
        minibatch_size=prompts * candidates,
        microbatch_size=4,
        sampling_batch_size=16,
    )
    own, plain = tuner._update, partial(_plain_loop, tuner)

    def ours(size: int, on: bool) -> Arm:
        def take(update: Update) -> None:
            tuner.sizes.microbatch.rows = size
            checkpointing(tuner, on)
            own(update)

        return take

    arms: dict[str, Arm] = {}
    keys: dict[str, Row] = {}
    for size in bench.pick((1, 4, 16, 80), (1, 4)):
        for on in (False, True):
            name = f"ours, {size}{', checkpointed' if on else ''}"
            arms[name], keys[name] = ours(size, on), {"microbatch": size, "checkpointed": on}
    for size in bench.pick((1, 16), (1,)):
        name = f"plain loop, {size}"

        def take(update: Update, size: int = size) -> None:
            checkpointing(tuner, False)
            plain(update, size)

        arms[name], keys[name] = take, {"microbatch": size, "checkpointed": False}
    work = {"pairs": prompts * candidates * steps}
    taken: Any = arms_on_an_update(bench, arms, keys, work)
    tuner._update = taken  # type: ignore[method-assign]
    fit(bench, tuner, [], 1, prompts)
    return {}


def _plain_loop(tuner: DDPO, update: Update, batch: int) -> None:
    """Take the update as TRL's trainer does, on the same modules."""
    rollout, process = update.minibatch, tuner.pipeline.process
    assert isinstance(rollout, Rollout)
    optimizer: Any = tuner.optimizers()
    optimizer.zero_grad()
    num_steps = tuner.sampler.num_steps
    starts = range(0, rollout.num_terms, batch)
    for start in starts:
        rows = torch.arange(start, min(start + batch, rollout.num_terms))
        pairs = rollout.terms(rows)
        own: dict[str, Any] = dict(pairs.states)
        of_each = (process.times(num_steps)[:-1].to(own["t"]) == own["t"].unsqueeze(1)).int()
        s = process.ends(num_steps).to(own["t"])[of_each.argmax(dim=1)]
        steps = process.coefficients(own["t"], s, tuner.sampler.eta)
        policy = law_of(tuner.pipeline, process, own["x_t"], own["t"], steps, pairs.condition)
        ratio = torch.exp(policy.log_prob(own["x_s"], "mean") - own["log_prob"])
        clipped = ratio.clamp(1 - tuner.clip_range, 1 + tuner.clip_range)
        advantage = own["advantage"]
        loss = torch.maximum(-advantage * ratio, -advantage * clipped).mean() / len(starts)
        loss.backward()  # type: ignore[no-untyped-call]
        loss.item()  # for the log, as TRL does
    trained = [p for p in tuner.pipeline.denoiser.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
