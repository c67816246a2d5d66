"""Speed of a reward-gradient update beside TRL's `AlignPropTrainer`; DRTune beside DRaFT-T.

Method of `compare`: both sides load the same folder of weights (random; `make-model` writes it) and
take the same update: 4 prompts, T = 10 steps at eta 1, guidance 5 with gradient through both
halves, the last K steps trained, redness as reward, LoRA of rank 4 on the attention layers, AdamW,
clipping at norm 1, fp32, two threads that sleep while they wait. Our side is what `lit-rlft fit`
runs, Lightning's loop included, without a logger; their cut is fixed, so that both do the same
work. TRL always runs trained steps again in the backward pass: `gradient_checkpointing: steps` is
the equal setting, "all kept" is ours without it. Before anything is timed, both take three updates
from the same noise and the same adapter: rewards and gradient norms must agree.
Each measurement is a fresh process; the sides take turns, in reverse order in every second repeat.
The first update warms up; an update lasts from the end of the one before to its own end. Seconds
are the fastest and the median over all repeats; the ratio is that of the medians of one turn
(above 1: ours is faster), median over turns with its range, by the wall clock and by processor
time, which depends less on what else the machine does. Memory is the peak of resident memory
from the first update on, and in brackets its growth over what was resident before. Calls of the
denoiser are per update, on 2 x 4 rows each: with a graph / without / run again.

`depth` compares our own methods at T = 25 on the tiny model, in the same way: DRTune with K = 2
against backpropagation through all 25 steps. Their seconds are means over the updates of a turn,
since DRTune's early stop makes updates of different lengths.

TRL 0.23.1 is the last release with this trainer. Its environment, on a CPU (Python 3.11):

    python -m venv TRL
    TRL/bin/pip install torch==2.13.0        # a CPU build
    echo "torch==2.13.0+cpu" > constraint.txt       # so that pip never replaces it
    TRL/bin/pip install -c constraint.txt trl==0.23.1 transformers==4.57.6 diffusers==0.35.2 \
        peft==0.17.1 accelerate==1.11.0 datasets==4.4.1 ftfy==6.3.1

    python benchmarks/reward_gradient.py compare --trl-python TRL/bin/python --models runs/models
    python benchmarks/reward_gradient.py depth
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PROMPTS = ["a red circle", "a blue square", "two green stars", "a cat"]
GUIDANCE, ETA, RANK, LEARNING_RATE, WEIGHT_DECAY = 5.0, 1.0, 4, 1e-4, 1e-4
TOKENIZER = Path(__file__).parents[1] / "domains/text_to_image/assets/shapes/tokenizer"
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"latents": 16, "unet": (32, 64), "heads": 2, "vae": (16, 32), "text": (32, 2)},
    "small": {
        "latents": 32,
        "unet": (64, 128, 256),
        "heads": 4,
        "vae": (32, 64, 64),
        "text": (128, 4),
    },
}
KINDS = ("graph", "plain", "again")
CLOCKS = ("seconds", "processor")
TOLERANCE = 1e-3

Turn = Mapping[str, Any]
"""What one measuring process reports."""


def make_model(size: str, folder: Path) -> None:
    """Write a Stable Diffusion pipeline with random weights that both environments can load."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    spec = SIZES[size]
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, model_max_length=77)
    width, num_layers = spec["text"]
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    levels = len(spec["unet"])
    unet = UNet2DConditionModel(
        sample_size=spec["latents"],
        down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        block_out_channels=spec["unet"],
        attention_head_dim=spec["heads"],
        cross_attention_dim=width,
    )
    levels = len(spec["vae"])
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=spec["vae"],
        norm_num_groups=16,
        latent_channels=4,
        sample_size=spec["latents"] * 2 ** (levels - 1),
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_pretrained(TOKENIZER.parent / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


class Meter:
    """Clock, peak memory and denoiser calls of one side, update by update.

    Args:
        denoiser: Whose calls are counted.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.calls: list[Counter[str]] = []
        self.rewards: list[float] = []
        self.norms: list[float] = []
        self._counts: Counter[str] = Counter()
        denoiser.register_forward_pre_hook(self._count)

    def start(self) -> None:
        """Begin the first update."""
        self.num_rows: set[int] = set()
        self._counts.clear()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        self.resident = _memory("VmRSS")
        self._last = _clocks()

    def end(self, reward: float, norm: float) -> None:
        """End an update, and begin the next."""
        now = _clocks()
        self.seconds.append(now[0] - self._last[0])
        self.processor.append(now[1] - self._last[1])
        self.calls.append(self._counts.copy())
        self.rewards.append(reward)
        self.norms.append(norm)
        self._counts.clear()
        self.peak = _memory("VmHWM")
        self._last = now

    def report(self) -> Turn:
        """Return what was measured; the first update only warms up."""
        steady = self.calls[1:]
        return {
            "seconds": self.seconds[1:],
            "processor": self.processor[1:],
            "calls": {kind: statistics.mean(c[kind] for c in steady) for kind in KINDS},
            "rows": sorted(self.num_rows),
            "peak": self.peak,
            "growth": self.peak - self.resident,
            "rewards": self.rewards,
            "norms": self.norms,
        }

    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Before the call: a recomputation is cut short and never reaches hooks that follow it.
        backward = torch._C._current_graph_task_id() != -1
        kind = "again" if backward else "graph" if torch.is_grad_enabled() else "plain"
        self._counts[kind] += 1
        self.num_rows.add(inputs[0].shape[0])


def _clocks() -> tuple[float, float]:
    """Return wall time and the processor time of all threads."""
    return time.perf_counter(), time.process_time()


def _memory(key: str) -> float:
    """Return an entry of the process's status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def redness(pictures: Tensor) -> Tensor:
    """Return mean red minus the mean of the other channels, [B]."""
    return pictures[:, 0].mean(dim=(1, 2)) - pictures[:, 1:].mean(dim=(1, 2, 3))


def shared_rows(update: int, prompts: Iterable[str]) -> list[torch.Generator]:
    """Return each prompt's generator in an update, where both sides are to draw the same noise."""
    seeds = (1000 * update + PROMPTS.index(prompt) for prompt in prompts)
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@torch.no_grad()
def share_adapter(denoiser: nn.Module) -> None:
    """Start the LoRA from the same weights on both sides."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(denoiser.named_parameters()):
        if "lora_A" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / RANK)


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
            meter.end(seen["reward"], seen["norm"])
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
    from lit_rlft.adapters import LoRA
    from lit_rlft.algorithms.base import Experience
    from lit_rlft.algorithms.drtune import RewardGradient
    from lit_rlft.core.gradient_plan import DRaFT, DRTune
    from lit_rlft.core.pipeline import Condition
    from lit_rlft.core.randomness import Generators
    from lit_rlft.core.reward import Reward
    from lit_rlft.core.sampling import Sampler
    from lit_rlft.data import Rows, collate

    class Redness(Reward):
        differentiable = True

        def forward(self, samples: Any, condition: Condition) -> Tensor:
            return redness(samples)

    class SharedNoise(RewardGradient):
        def setup(self, stage: str) -> None:
            super().setup(stage)
            share_adapter(self.pipeline.denoiser)

        def loss(
            self, experience: Experience, rows: Generators
        ) -> tuple[Tensor, dict[str, Tensor]]:
            prompts = [entry["prompt"] for entry in experience.condition.each()]
            return super().loss(experience, shared_rows(self.num_updates, prompts))

    class Timed(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            meter.start()

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            known = trainer.callback_metrics
            meter.end(float(known["train/reward"]), float(known["train/grad_norm"]))

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
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[Timed()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = Rows(options.updates * len(PROMPTS), lambda i: {"prompt": PROMPTS[i % len(PROMPTS)]})
    trainer.fit(tuner, DataLoader(rows, batch_size=len(PROMPTS), collate_fn=collate))
    return meter.report()


def measure(python: str, options: argparse.Namespace, arguments: Sequence[str]) -> Turn:
    """Run one side in a process of its own, in an empty folder."""
    threads = str(options.threads)
    env = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "passive",
    }
    command = [python, str(Path(__file__).resolve()), "side", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(
    arms: Mapping[str, tuple[str, Sequence[str]]], options: argparse.Namespace
) -> dict[str, list[Turn]]:
    """Measure every arm once per repeat, in reverse order in every second one."""
    turns: dict[str, list[Turn]] = {name: [] for name in arms}
    for repeat in range(options.repeats):
        for name in list(arms)[:: -1 if repeat % 2 else 1]:
            turn = measure(arms[name][0], options, arms[name][1])
            turns[name].append(turn)
            load = os.getloadavg()[0]
            print(f"{repeat} {name}, load {load:.2f}: {json.dumps(turn)}", file=sys.stderr)
    return turns


def ratio(
    mine: Sequence[Turn],
    other: Sequence[Turn],
    clock: str,
    middle: Callable[[Sequence[float]], float] = statistics.median,
) -> str:
    """Return how much faster mine is, turn by turn: the median with the range."""
    pairs = zip(mine, other, strict=True)
    ratios = [middle(theirs[clock]) / middle(turn[clock]) for turn, theirs in pairs]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def described(turns: Sequence[Turn]) -> str:
    """Return the columns that do not depend on the other arms: memory and calls."""
    peak, growth = (statistics.median(turn[key] for turn in turns) for key in ("peak", "growth"))
    calls = " / ".join(f"{turns[0]['calls'][kind]:.3g}" for kind in KINDS)
    return f"{peak:.0f} ({growth:.0f}) | {calls}"


def check_agreement(model: Path, options: argparse.Namespace) -> None:
    """Take three updates on both sides from the same noise; stop where they differ."""
    given = ["--model", str(model), "--updates", "3", "--k", str(options.steps), "--shared-noise"]
    given += ["--steps", str(options.steps)]
    mine = measure(sys.executable, options, ["ours", *given])
    other = measure(options.trl_python, options, ["trl", *given])
    for key in ("rewards", "norms"):
        theirs, ours = (" ".join(f"{v:.6g}" for v in turn[key]) for turn in (other, mine))
        print(f"{model.name}, {key} of three updates: TRL {theirs}, ours {ours}")
        pairs = zip(mine[key], other[key], strict=True)
        if any(abs(a - b) > TOLERANCE * abs(b) for a, b in pairs):
            raise SystemExit("the two sides do not take the same update")


def model_folder(size: str, options: argparse.Namespace) -> Path:
    """Return the model's folder, written by TRL's environment where there is none.

    The newer environment reads what the older one wrote; the other way round fails.
    """
    folder = options.models.resolve() / size
    if not folder.is_dir():
        command = [options.trl_python, __file__, "make-model", size, str(folder)]
        subprocess.run(command, check=True)
    return folder


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
            turns = take_turns(arms, options)
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
        turns = take_turns(arms, options)
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


def side(options: argparse.Namespace) -> None:
    """Measure one side in this process; the last line printed is its report."""
    warnings.filterwarnings("ignore")
    report = {"trl": trl_side, "ours": our_side}[options.side](options)
    print(json.dumps(report))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("make-model", help="write a model with random weights")
    one.add_argument("size", choices=sorted(SIZES))
    one.add_argument("folder", type=Path)
    one = commands.add_parser("side", help="measure one side in this process")
    one.add_argument("side", choices=("ours", "trl"))
    one.add_argument("--model", type=Path, required=True)
    one.add_argument("--k", type=int, default=1, help="trained steps")
    one.add_argument("--m", type=int, default=0, help="of DRTune; 0 is DRaFT")
    one.add_argument("--again", action="store_true", help="gradient_checkpointing: steps")
    one.add_argument("--full", action="store_true", help="train all weights")
    one.add_argument("--shared-noise", action="store_true", help="the same noise on both sides")
    both = [one]
    for name in ("compare", "depth"):
        one = commands.add_parser(name)
        one.add_argument("--repeats", type=int, default=5)
        one.add_argument("--threads", type=int, default=2)
        both.append(one)
        if name == "compare":
            one.add_argument("--trl-python", required=True, help="TRL's environment (see the top)")
            one.add_argument("--models", type=Path, required=True, help="folder of the models")
            one.add_argument("--sizes", nargs="+", choices=sorted(SIZES), default=["tiny", "small"])
            one.add_argument(
                "--trained", type=int, nargs="+", help="K; 1 and all steps if not given"
            )
    for one in both:
        one.add_argument("--updates", type=int, default=4, help="the first one warms up")
        one.add_argument("--steps", type=int, default=10)
    return parser


def main() -> None:
    """Run a sub-command."""
    options = _parser().parse_args()
    if options.command == "make-model":
        make_model(options.size, options.folder)
    else:
        {"side": side, "compare": compare, "depth": depth}[options.command](options)


if __name__ == "__main__":
    main()
