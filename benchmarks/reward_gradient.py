"""Speed of a reward-gradient update beside TRL's `AlignPropTrainer`; DRTune beside DRaFT-T.

Method of `compare`: both sides load the same folder of weights (random; written if missing) and
take the same update: 4 prompts, T = 10 steps at eta 1, guidance 5 with gradient through both
halves, the last K steps trained, redness as reward, LoRA of rank 4 on the attention layers, AdamW,
clipping at norm 1, fp32, two threads that sleep while they wait. Our side is what `lit-rlft fit`
runs, Lightning's loop included, without a logger; their cut is fixed, so that both do the same
work. TRL always runs trained steps again in the backward pass: `gradient_checkpointing: steps` is
the equal setting, "all kept" is ours without it. Before anything is timed, both take three updates
from the same noise and the same adapter: rewards and gradient norms must agree.
An update is a round of `beside_trl.py`, which says how rounds are measured; seconds are the fastest
and the median over all repeats. Calls of the denoiser are per update, on 2 x 4 rows each: with a
graph / without / run again.

`depth` compares our own methods at T = 25 on the tiny model, in the same way: DRTune with K = 2
against backpropagation through all 25 steps. Their seconds are means over the updates of a turn,
since DRTune's early stop makes updates of different lengths.

TRL's environment is described in `beside_trl.py`.

    python benchmarks/reward_gradient.py compare --trl-python TRL/bin/python --models runs/models
    python benchmarks/reward_gradient.py depth
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from beside_trl import (
    CLOCKS,
    ETA,
    GUIDANCE,
    KINDS,
    PROMPTS,
    RANK,
    WEIGHT_DECAY,
    Meter,
    Turn,
    add_models,
    add_turns,
    lightning_trainer,
    make_model,
    measure,
    model_folder,
    ratio,
    run_command,
    share_adapter,
    side_parser,
    take_turns,
)
from torch import Tensor

LEARNING_RATE = 1e-4
TOLERANCE = 1e-3


def redness(pictures: Tensor) -> Tensor:
    """Return mean red minus the mean of the other channels, [B]."""
    return pictures[:, 0].mean(dim=(1, 2)) - pictures[:, 1:].mean(dim=(1, 2, 3))


def shared_rows(update: int, prompts: Iterable[str]) -> list[torch.Generator]:
    """Return each prompt's generator in an update, where both sides are to draw the same noise."""
    seeds = (1000 * update + PROMPTS.index(prompt) for prompt in prompts)
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def trl_side(options: argparse.Namespace) -> Turn:
    """Run TRL's trainer as it is; a subclass reads the clock."""
    from accelerate import PartialState
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion
    from trl import AlignPropConfig, AlignPropTrainer, DefaultDDPOStableDiffusionPipeline
    from trl.models import modeling_sd_base

    PartialState(cpu=True)  # or loading without a LoRA file fails in a logger
    pipeline = DefaultDDPOStableDiffusionPipeline(str(options.model), use_lora=True)
    meter = Meter(pipeline.unet)
    seen: dict[str, float] = {}
    noise: dict[str, list[torch.Generator]] = {}

    def reward(
        pictures: Tensor, prompts: Sequence[str], metadata: object
    ) -> tuple[Tensor, dict[str, Any]]:
        values = redness(pictures)
        seen["reward"] = float(values.detach().mean())
        return values, {}

    class Timed(AlignPropTrainer):
        def step(self, epoch: int, global_step: int) -> int:
            noise["rows"] = shared_rows(epoch, PROMPTS)
            done = super().step(epoch, global_step)
            meter.end(reward=seen["reward"], norm=seen["norm"])
            return done

    prompts = (PROMPTS[i % len(PROMPTS)] for i in range(options.updates * len(PROMPTS)))
    config = AlignPropConfig(
        num_epochs=options.updates,
        train_batch_size=len(PROMPTS),
        sample_num_steps=options.steps,
        sample_eta=ETA,
        sample_guidance_scale=GUIDANCE,
        train_learning_rate=LEARNING_RATE,
        train_adam_weight_decay=WEIGHT_DECAY,
        truncated_backprop_rand=False,
        truncated_backprop_timestep=options.steps - options.k,
        mixed_precision="no",
        accelerator_kwargs={"cpu": True},
        log_with=None,
        save_freq=10**9,
    )
    trainer = Timed(config, reward, lambda: (next(prompts), {}), pipeline)
    pipeline.set_progress_bar_config(disable=True)
    clip = trainer.accelerator.clip_grad_norm_

    def clip_and_see(parameters: Iterable[Tensor], max_norm: float) -> None:
        seen["norm"] = float(clip(parameters, max_norm))

    trainer.accelerator.clip_grad_norm_ = clip_and_see
    if options.shared_noise:
        share_adapter(pipeline.unet)
        for module in (pipeline_stable_diffusion, modeling_sd_base):
            module.randn_tensor = lambda shape, **_: torch.stack(
                [torch.randn(shape[1:], generator=row) for row in noise["rows"]]
            )
    meter.start()
    trainer.train()
    return meter.report()


def our_side(options: argparse.Namespace) -> Turn:
    """Run `RewardGradient` under Lightning's Trainer, as `lit-rlft fit` does."""
    from lightning import Callback, LightningModule, Trainer
    from torch.utils.data import DataLoader

    from domains.text_to_image.pipeline import TextToImagePipeline
    from lit_rlft.algorithms.reward_gradient import RewardGradient
    from lit_rlft.core.gradient_plan import DRaFT, DRTune
    from lit_rlft.core.pipeline import Condition
    from lit_rlft.core.randomness import Generators
    from lit_rlft.core.reward import Reward
    from lit_rlft.core.sampling import Sampler
    from lit_rlft.kit.data import Rows, collate
    from lit_rlft.loop.experience import Experience
    from lit_rlft.loop.reference import LoRA

    class Redness(Reward):
        differentiable = True

        def forward(self, samples: Any, condition: Condition) -> Tensor:
            return redness(samples)

    class SharedNoise(RewardGradient):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            share_adapter(self.pipeline.denoiser)

        def loss(
            self, experience: Experience, noise: Generators
        ) -> tuple[Tensor, dict[str, Tensor]]:
            prompts = [entry["prompt"] for entry in experience.condition.each()]
            return super().loss(experience, shared_rows(self.num_updates, prompts))

    class Timed(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            meter.start()

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            known = trainer.callback_metrics
            reward, norm = (float(known[f"train/{name}"]) for name in ("reward", "grad_norm"))
            meter.end(reward=reward, norm=norm)

    pipeline = TextToImagePipeline(
        str(options.model), guidance_scale=GUIDANCE, checkpoint_decoder=False
    )
    meter = Meter(pipeline.denoiser)
    tuner = (SharedNoise if options.shared_noise else RewardGradient)(
        pipeline,
        Redness(),
        method=DRTune(options.k, options.m) if options.m else DRaFT(options.k),
        gradient_checkpointing="steps" if options.again else None,
        sampler=Sampler(options.steps, ETA),
        lora=None if options.full else LoRA(RANK, RANK),
        optimizer=partial(torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        minibatch_size=len(PROMPTS),
    )
    rows = Rows(options.updates * len(PROMPTS), lambda i: {"prompt": PROMPTS[i % len(PROMPTS)]})
    loader = DataLoader(rows, batch_size=len(PROMPTS), collate_fn=collate)
    lightning_trainer(Timed()).fit(tuner, loader)
    return meter.report()


def described(turns: Sequence[Turn]) -> str:
    """Return the columns that do not depend on the other arms: memory and calls."""
    peak, growth = (statistics.median(turn[key] for turn in turns) for key in ("peak", "growth"))
    calls = " / ".join(f"{turns[0]['calls'][kind]:.3g}" for kind in KINDS)
    return f"{peak:.0f} ({growth:.0f}) | {calls}"


def check_agreement(model: Path, options: argparse.Namespace) -> None:
    """Take three updates on both sides from the same noise; stop where they differ."""
    given = ["--model", str(model), "--updates", "3", "--k", str(options.steps), "--shared-noise"]
    given += ["--steps", str(options.steps)]
    mine = measure(__file__, sys.executable, options, ["ours", *given])
    other = measure(__file__, options.trl_python, options, ["trl", *given])
    for key in ("reward", "norm"):
        theirs, ours = (" ".join(f"{v:.6g}" for v in turn[key]) for turn in (other, mine))
        print(f"{model.name}, {key} in three updates: TRL {theirs}, ours {ours}")
        pairs = zip(mine[key], other[key], strict=True)
        if any(abs(a - b) > TOLERANCE * abs(b) for a, b in pairs):
            raise SystemExit("the two sides do not take the same update")


def compare(options: argparse.Namespace) -> None:
    """Compare both sides for one trained step and for all of them; print the table."""
    rows = []
    for size in options.sizes:
        model = model_folder(size, options)
        check_agreement(model, options)
        for k in options.trained or (1, options.steps):
            given = ["--model", str(model), "--steps", str(options.steps), "--k", str(k)]
            given += ["--updates", str(options.updates)]
            arms = {
                "TRL": (options.trl_python, ["trl", *given]),
                "ours, equal": (sys.executable, ["ours", *given, "--again"]),
                "ours, all kept": (sys.executable, ["ours", *given]),
            }
            turns = take_turns(__file__, arms, options)
            for name in arms:
                every = [s for turn in turns[name] for s in turn["seconds"]]
                middle = statistics.median(every)
                ratios = (ratio(turns[name], turns["TRL"], clock) for clock in CLOCKS)
                rows.append(
                    f"| {size} | {k} | {name} | {min(every):.3f} / {middle:.3f} | "
                    f"{1 / middle:.3f} | {' | '.join(ratios)} | {described(turns[name])} |"
                )
    print(
        "| model | K | side | s per update | updates per s | ratio | processor | peak MiB | calls |"
    )
    print("|---|---|---|---|---|---|---|---|---|", *rows, sep="\n")


def depth(options: argparse.Namespace) -> None:
    """Compare DRTune with backpropagation through all steps; print the table."""
    with tempfile.TemporaryDirectory() as folder:
        make_model("tiny", Path(folder))
        rows = _depth_rows(Path(folder), options)
    print(
        "| trained | method | s per update | updates per s | ratio to run again | processor | "
        "ratio to kept | processor | peak MiB | calls |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|", *rows, sep="\n")


def _depth_rows(model: Path, options: argparse.Namespace) -> list[str]:
    rows = []
    for weights, flags in (("LoRA", []), ("all", ["--full"])):
        given = ["ours", "--model", str(model), "--steps", "25", *flags]
        given += ["--updates", str(options.updates)]
        settings = {
            "DRTune K=2, m=11": ["--k", "2", "--m", "11"],
            "DRTune K=2, m=1": ["--k", "2", "--m", "1"],
            # Their updates are all alike: few will do.
            "DRaFT-25, steps run again": ["--k", "25", "--again", "--updates", "3"],
            "DRaFT-25, all kept": ["--k", "25", "--updates", "3"],
        }
        arms = {name: (sys.executable, [*given, *setting]) for name, setting in settings.items()}
        turns = take_turns(__file__, arms, options)
        for name in arms:
            seconds = statistics.median(statistics.mean(turn["seconds"]) for turn in turns[name])
            ratios = (
                ratio(turns[name], turns[other], clock, statistics.mean)
                for other in list(arms)[2:]
                for clock in CLOCKS
            )
            rows.append(
                f"| {weights} | {name} | {seconds:.3f} | {1 / seconds:.3f} | "
                f"{' | '.join(ratios)} | {described(turns[name])} |"
            )
    return rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = side_parser(commands)
    one.add_argument("--k", type=int, default=1, help="trained steps")
    one.add_argument("--m", type=int, default=0, help="of DRTune; 0 is DRaFT")
    one.add_argument("--again", action="store_true", help="gradient_checkpointing: steps")
    one.add_argument("--full", action="store_true", help="train all weights")
    both = [one]
    for name in ("compare", "depth"):
        one = commands.add_parser(name)
        add_turns(one)
        both.append(one)
        if name == "compare":
            add_models(one)
            one.add_argument(
                "--trained", type=int, nargs="+", help="K; 1 and all steps if not given"
            )
    for one in both:
        one.add_argument("--updates", type=int, default=4, help="the first one warms up")
        one.add_argument("--steps", type=int, default=10)
    return parser


def main() -> None:
    """Run a sub-command."""
    commands = {"compare": compare, "depth": depth}
    run_command(_parser(), {"trl": trl_side, "ours": our_side}, commands)


if __name__ == "__main__":
    main()
