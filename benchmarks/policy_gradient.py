"""Speed of a DDPO epoch beside TRL's `DDPOTrainer`: sampling, training, memory, denoiser calls.

Method: both sides load the same folder of weights (random; written if missing) and do the same
work: an epoch draws N pictures for 4 prompts with T = 10 steps at eta 1 and guidance 5, scores them
by the size of their JPEG files, and takes one update on all N x T pairs of a step and a sample,
with gradient through both halves of the guidance. LoRA of rank 4 on the attention layers, AdamW,
clipping at norm 1, clip range 1e-4 on mean log-probabilities, advantages within the epoch, fp32,
two threads. N is 16 in two batches on the tiny model and 4 in one batch on the small one. Our side
is what `lit-rlft fit` runs, Lightning's loop included, without a logger; `beside_trl.py` says how
epochs are measured.

TRL trains `train_batch_size` pairs of one place in the trajectory at a time and accumulates; ours
trains `microbatch_size` pairs at a time, which may belong to several steps. Two comparisons:

* TRL's train batch = its sample batch, its best: ours at the same shape, pair for pair.
* TRL's train batch = 1, its default: ours in several shapes, whose memory is given beside.

Before anything is timed, both take two epochs of two passes each (four updates, every second one
with most ratios beyond the clip range) from the same noise and the same adapter. Everything up to
the first update must agree: rewards, advantages, loss and gradient norm. What follows is printed
alone: Adam's first step divides each gradient by its own size, which lifts rounding to the size of
a step wherever a gradient is almost zero, and JPEG files then differ by a byte here and there.

Columns: pairs trained per second and pictures drawn per second (medians over all turns, each over
the time of its own phase; scoring is in neither), their ratios, seconds and processor seconds per
epoch with ratios; peak resident memory and in brackets its growth, MiB; denoiser calls per epoch
with a graph / without and in brackets their rows, two per pair; the largest |ratio - 1| before the
first update.

TRL's environment is described in `beside_trl.py`.

    python benchmarks/policy_gradient.py compare --trl-python TRL/bin/python --models runs/models
"""

import argparse
import io
import logging
import statistics
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from beside_trl import (
    CLOCKS,
    ETA,
    GUIDANCE,
    PROMPTS,
    RANK,
    WEIGHT_DECAY,
    Meter,
    Turn,
    add_models,
    add_turns,
    lightning_trainer,
    measure,
    model_folder,
    ratio,
    run_command,
    share_adapter,
    side_parser,
    take_turns,
)
from torch import Tensor

LEARNING_RATE, CLIP_RANGE, ADVANTAGE_CLIP = 3e-4, 1e-4, 5.0
SHAPES = {"tiny": (8, 2), "small": (4, 1)}
"""Pictures per sampling batch and batches per epoch."""
MICROBATCHES = {"tiny": (1, 2, 4, 8, 16), "small": (1, 2, 4)}
"""Pairs that ours trains at a time beside TRL's train batch of 1."""
CLOCKED = ("train", "sample", *CLOCKS)
TOLERANCE = 1e-3


def jpeg_size(pictures: Tensor) -> Tensor:
    """Return minus the size of each picture as a JPEG file in kB, [B]."""
    from PIL import Image

    arrays = pictures.detach().mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    sizes = []
    for array in arrays:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "JPEG", quality=95, subsampling="4:2:0")
        sizes.append(-len(buffer.getvalue()) / 1000)
    return torch.tensor(sizes)


def trl_side(options: argparse.Namespace) -> Turn:
    """Run TRL's trainer as it is; a subclass reads the clock."""
    from accelerate import PartialState
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    from trl.models import modeling_sd_base

    PartialState(cpu=True)  # or loading without a LoRA file fails in a logger
    logging.disable(logging.WARNING)
    pipeline = DefaultDDPOStableDiffusionPipeline(str(options.model), use_lora=True)
    meter = Meter(pipeline.unet)
    images = options.sample_batch * options.batches
    noise: deque[torch.Generator] = deque(maxlen=options.sample_batch)
    seen: dict[str, list[float]] = {name: [] for name in ("reward", "advantage", "loss", "norm")}
    deviations = [0.0]

    def prompts() -> Iterator[str]:
        for i in range(options.epochs * images):
            noise.append(torch.Generator().manual_seed(i))
            yield PROMPTS[i % len(PROMPTS)]

    def reward(pictures: Tensor, prompts: Sequence[str], metadata: object) -> tuple[Tensor, object]:
        values = jpeg_size(pictures)
        seen["reward"] += values.tolist()
        return values, {}

    class Timed(DDPOTrainer):
        def _generate_samples(self, *args: Any, **kwargs: Any) -> Any:
            with meter.phase("sample"):
                return super()._generate_samples(*args, **kwargs)

        def _train_batched_samples(self, *args: Any) -> Any:
            if not seen["advantage"]:
                each = torch.cat([samples["advantages"] for samples in args[-1]])
                seen["advantage"] += each.sort().values.tolist()
            with meter.phase("train"):
                return super()._train_batched_samples(*args)

        def loss(self, advantages: Tensor, clip_range: float, ratio: Tensor) -> Tensor:
            if not self.optimizer.optimizer.state:  # AdamW has none before its first step
                deviations.append(float((ratio.detach() - 1).abs().max()))
            return super().loss(advantages, clip_range, ratio)

        def step(self, epoch: int, global_step: int) -> int:
            done = super().step(epoch, global_step)
            shown = seen if options.shared_noise else {}
            meter.end(**{name: values.copy() for name, values in shown.items()})
            for values in seen.values():
                values.clear()
            return done

    config = DDPOConfig(
        num_epochs=options.epochs,
        sample_num_steps=options.steps,
        sample_eta=ETA,
        sample_guidance_scale=GUIDANCE,
        sample_batch_size=options.sample_batch,
        sample_num_batches_per_epoch=options.batches,
        train_batch_size=options.train_batch,
        train_gradient_accumulation_steps=images // options.train_batch,
        train_num_inner_epochs=options.passes,
        train_learning_rate=LEARNING_RATE,
        train_adam_weight_decay=WEIGHT_DECAY,
        train_clip_range=CLIP_RANGE,
        train_adv_clip_max=ADVANTAGE_CLIP,
        mixed_precision="no",
        accelerator_kwargs={"cpu": True},
        log_with=None,
        save_freq=10**9,
    )
    source = prompts()
    trainer = Timed(config, reward, lambda: (next(source), {}), pipeline)
    pipeline.set_progress_bar_config(disable=True)
    clip, log = trainer.accelerator.clip_grad_norm_, trainer.accelerator.log

    def clip_and_see(parameters: Any, max_norm: float) -> None:
        seen["norm"].append(float(clip(parameters, max_norm)))

    def log_and_see(values: dict[str, Any], step: int) -> None:
        if "loss" in values:
            seen["loss"].append(float(values["loss"]))
        log(values, step=step)

    trainer.accelerator.clip_grad_norm_, trainer.accelerator.log = clip_and_see, log_and_see
    if options.shared_noise:
        share_adapter(pipeline.unet)
        for module in (pipeline_stable_diffusion, modeling_sd_base):
            module.randn_tensor = lambda shape, **_: torch.stack(
                [torch.randn(shape[1:], generator=row) for row in noise]
            )
    meter.start()
    trainer.train()
    return {**meter.report(), "deviation": max(deviations)}


def our_side(options: argparse.Namespace) -> Turn:
    """Run `DDPO` under Lightning's Trainer, as `lit-rlft fit` does."""
    from lightning import Callback, LightningModule, Trainer
    from torch.utils.data import DataLoader

    from domains.text_to_image.pipeline import TextToImagePipeline
    from lit_rlft.algorithms.ddpo import DDPO, Rollout
    from lit_rlft.core.advantage import BatchAdvantage
    from lit_rlft.core.pipeline import Batch, Condition
    from lit_rlft.core.reward import Reward
    from lit_rlft.core.sampling import Sampler
    from lit_rlft.kit.data import Rows, collate
    from lit_rlft.loop.reference import LoRA
    from lit_rlft.loop.updates import Update

    images = options.sample_batch * options.batches
    seen: dict[str, Any] = {}

    class TimedPipeline(TextToImagePipeline):
        def encode(self, batch: Batch) -> Condition:
            with meter.phase("sample"):
                return super().encode(batch)

    class JPEG(Reward):
        def forward(self, samples: Any, condition: Condition) -> Tensor:
            with meter.phase("score"):
                values = jpeg_size(samples)
            seen["reward"] += values.tolist()
            return values

    class Timed(DDPO):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            if options.shared_noise:
                share_adapter(self.pipeline.denoiser)
                self.rollouts.seeds = self.their_seeds  # type: ignore[method-assign]

        def their_seeds(self, batch: Batch, num: int, *stream: int) -> list[int]:
            # TRL's order: all prompts once, then all of them again.
            first = self.num_rounds * images
            rows = (batch["index"] % len(PROMPTS)).tolist()
            return [first + i * len(PROMPTS) + row for row in rows for i in range(num)]

        def collect(self, batch: Batch, condition: Condition) -> Rollout:
            with meter.phase("sample"):
                rollout = super().collect(batch, condition)
            order = sorted(range(images), key=lambda i: rollout.seeds[i])
            seen["reward"] = [seen["reward"][i] for i in order]
            seen["advantage"] = rollout.advantages.sort().values.tolist()
            return rollout

    class Rounds(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.update(reward=[], loss=[], norm=[])
            meter.start()

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            meter.end(**(seen if options.shared_noise else {}))
            seen.update(reward=[], loss=[], norm=[])

    pipeline = TimedPipeline(str(options.model), guidance_scale=GUIDANCE)
    meter = Meter(pipeline.denoiser)
    tuner = Timed(
        pipeline,
        JPEG(),
        num_candidates=images // len(PROMPTS),
        advantage=BatchAdvantage(),
        advantage_clip=ADVANTAGE_CLIP,
        clip_range=CLIP_RANGE,
        log_prob_reduction="mean",
        sampler=Sampler(options.steps, ETA),
        lora=LoRA(RANK, RANK),
        optimizer=partial(torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        num_epochs=options.passes,
        minibatch_size=images,
        microbatch_size=options.train_batch,
        sampling_batch_size=options.sample_batch,
    )
    take, deviations = tuner._update, []

    def timed_take(update: Update, *_: object) -> dict[str, float]:
        with meter.phase("train"):
            outcome = take(update)
        seen["loss"].append(outcome["loss"])
        seen["norm"].append(outcome["grad_norm"])
        deviations.append(outcome["ratio_deviation_max"])
        return outcome

    tuner._update = timed_take  # type: ignore[method-assign]
    rows = Rows(options.epochs * len(PROMPTS), lambda i: {"prompt": PROMPTS[i % len(PROMPTS)]})
    loader = DataLoader(rows, batch_size=len(PROMPTS), collate_fn=collate)
    lightning_trainer(Rounds()).fit(tuner, loader)
    return {**meter.report(), "deviation": deviations[0]}


def arguments(
    size: str, model: Path, train_batch: int, options: argparse.Namespace, **changes: int
) -> list[str]:
    """Return the arguments of one side; `train_batch` is ours' number of pairs at a time."""
    sample_batch, batches = SHAPES[size]
    settings: dict[str, Any] = {
        "model": model,
        "sample-batch": sample_batch,
        "batches": batches,
        "train-batch": train_batch,
        "steps": options.steps,
        "epochs": options.epochs,
        **changes,
    }
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


def check_agreement(size: str, model: Path, options: argparse.Namespace) -> None:
    """Take four updates on both sides from the same noise; stop where the first one differs."""
    given = arguments(size, model, SHAPES[size][0], options, epochs=2, passes=2)
    mine, other = (
        measure(__file__, python, options, [side, *given, "--shared-noise"])
        for side, python in (("ours", sys.executable), ("trl", options.trl_python))
    )
    allowed = TOLERANCE
    for key in ("reward", "advantage", "loss", "norm"):
        both = [[value for epoch in turn[key] for value in epoch] for turn in (other, mine)]
        # Losses and norms come once per update, the others once per sample of an epoch.
        early = 1 if key in ("loss", "norm") else len(mine[key][0])
        # The first loss is minus the mean advantage, 0 but for the rounding of its terms of size 1.
        scale = 1.0 if key == "loss" else max(map(abs, both[0]))
        gaps = [abs(a - b) / scale for a, b in zip(*both, strict=True)]
        shown = "; ".join(" ".join(f"{value:.6g}" for value in values[:8]) for values in both)
        print(
            f"{size}, {key}: largest difference {max(gaps[:early]):.1e} up to the first update and "
            f"{max(gaps):.1e} after it, of {scale:.4g}; TRL, ours: {shown}"
        )
        if max(gaps[:early]) > allowed:
            raise SystemExit(f"the two sides do not take the same update: {key}")
        if key == "reward":  # a byte of a JPEG file moves advantages by its share of the std
            std = statistics.stdev(both[0][:early])
            allowed += 2 * max(gaps[:early]) * scale / std
    print(f"{size}, |ratio - 1|: TRL {other['deviation']:.1e}, ours {mine['deviation']:.1e}")


def row(turns: Sequence[Turn], trl: Sequence[Turn], images: int, num_steps: int) -> str:
    """Return the columns of one side."""
    middle = {
        clock: statistics.median(s for turn in turns for s in turn[clock]) for clock in CLOCKED
    }
    rates = {"train": images * num_steps / middle["train"], "sample": images / middle["sample"]}
    timed = (
        f"{rates.get(clock, middle[clock]):.3f} | {ratio(turns, trl, clock)}" for clock in CLOCKED
    )
    peak, growth = (statistics.median(turn[key] for turn in turns) for key in ("peak", "growth"))
    calls, rows = (
        " / ".join(f"{turns[0][key][kind]:.3g}" for kind in ("graph", "plain"))
        for key in ("calls", "rows")
    )
    deviation = max(turn["deviation"] for turn in turns)
    return f"{' | '.join(timed)} | {peak:.0f} ({growth:.0f}) | {calls} ({rows}) | {deviation:.1e} |"


def compare(options: argparse.Namespace) -> None:
    """Compare both sides at TRL's best and at its default train batch; print the table."""
    table = []
    for size in options.sizes:
        model, (sample_batch, batches) = model_folder(size, options), SHAPES[size]
        check_agreement(size, model, options)
        for train_batch in options.train_batches or (sample_batch, 1):
            given = arguments(size, model, train_batch, options)
            arms = {"TRL": (options.trl_python, ["trl", *given])}
            default = MICROBATCHES[size] if train_batch == 1 else (train_batch,)
            for pairs in options.microbatches or default:
                given = arguments(size, model, pairs, options)
                arms[f"ours, {pairs} at a time"] = (sys.executable, ["ours", *given])
            turns = take_turns(__file__, arms, options)
            table += [
                f"| {size} | {train_batch} | {name} | "
                + row(turns[name], turns["TRL"], sample_batch * batches, options.steps)
                for name in arms
            ]
    print(
        "| model | TRL's batch | side | pairs per s | ratio | pictures per s | ratio | s per epoch "
        "| ratio | processor s | ratio | peak MiB | calls (rows) | ratio - 1 |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|", *table, sep="\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    side = side_parser(commands)
    side.add_argument("--sample-batch", type=int, default=8)
    side.add_argument("--batches", type=int, default=2)
    side.add_argument("--train-batch", type=int, default=8, help="pairs trained at a time")
    side.add_argument("--passes", type=int, default=1, help="over the samples of an epoch")
    both = commands.add_parser("compare")
    add_turns(both)
    add_models(both)
    both.add_argument("--train-batches", type=int, nargs="+", help="TRL's; best and 1 by default")
    both.add_argument("--microbatches", type=int, nargs="+", help="ours, in every comparison")
    for one in (side, both):
        one.add_argument("--epochs", type=int, default=4, help="the first one warms up")
        one.add_argument("--steps", type=int, default=10)
    return parser


def main() -> None:
    """Run a sub-command."""
    run_command(_parser(), {"trl": trl_side, "ours": our_side}, {"compare": compare})


if __name__ == "__main__":
    main()
