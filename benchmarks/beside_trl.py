"""What comparisons with TRL share: its environment, models with random weights, fresh processes.

TRL 0.23.1 is the last release with its diffusion trainers. Its environment, on a CPU (Python 3.11):

    python -m venv TRL
    TRL/bin/pip install torch==2.13.0        # a CPU build
    echo "torch==2.13.0+cpu" > constraint.txt       # so that pip never replaces it
    TRL/bin/pip install -c constraint.txt trl==0.23.1 transformers==4.57.6 diffusers==0.35.2 \
        peft==0.17.1 accelerate==1.11.0 datasets==4.4.1 ftfy==6.3.1

Both environments import this file, so it needs nothing but torch. Models are written where a
comparison finds none; by hand, in TRL's environment: `beside_trl.py tiny FOLDER`.

The protocol: each measurement is a fresh process in an empty folder, with threads that sleep
while they wait; the sides take turns, in reverse order in every second repeat. The first round (an
update or an epoch) only warms up; a round lasts from the end of the one before to its own end. The
ratio is that of the medians of one turn (above 1: ours is faster), given as the median over turns
with its range, by the wall clock and by processor time, which depends less on what else the
machine does. Memory is the peak of resident memory from the first round on, and its growth over
what was resident before.
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
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

PROMPTS = ["a red circle", "a blue square", "two green stars", "a cat"]
GUIDANCE, ETA, RANK, WEIGHT_DECAY = 5.0, 1.0, 4, 1e-4
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


def model_folder(size: str, options: argparse.Namespace) -> Path:
    """Return the model's folder, written by TRL's environment where there is none.

    The newer environment reads what the older one wrote; the other way round fails.
    """
    folder = options.models.resolve() / size
    if not folder.is_dir():
        subprocess.run([options.trl_python, __file__, size, str(folder)], check=True)
    return folder


@torch.no_grad()
def share_adapter(denoiser: nn.Module) -> None:
    """Start the LoRA from the same weights on both sides."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(denoiser.named_parameters()):
        if "lora_A" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / RANK)


class Meter:
    """Clock, peak memory and denoiser calls of one side, round by round.

    Args:
        denoiser: Whose calls are counted.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)
        self.values: dict[str, list[Any]] = defaultdict(list)
        self.calls: list[Counter[str]] = []
        self.rows: list[Counter[str]] = []
        self._now_calls: Counter[str] = Counter()
        self._now_rows: Counter[str] = Counter()
        self._phases: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        denoiser.register_forward_pre_hook(self._count)

    def start(self) -> None:
        """Begin the first round."""
        self._clear()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        self.resident = _memory("VmRSS")
        self._last = _clocks()

    def end(self, **values: Any) -> None:
        """End a round, and begin the next; `values` are reported as lists, one entry per round."""
        now = _clocks()
        for name, after, before in zip(CLOCKS, now, self._last, strict=True):
            self.times[name].append(after - before)
        for name, seconds in self._phases.items():
            self.times[name].append(seconds)
        for name, value in values.items():
            self.values[name].append(value)
        self.calls.append(self._now_calls.copy())
        self.rows.append(self._now_rows.copy())
        self.peak = _memory("VmHWM")
        self._clear()
        self._last = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Clock the block's wall time under a name, which an outer block's excludes."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def report(self) -> dict[str, Any]:
        """Return what was measured; the first round only warms up, but its values are reported."""
        return {
            **{name: seconds[1:] for name, seconds in self.times.items()},
            **self.values,
            "calls": _means(self.calls[1:]),
            "rows": _means(self.rows[1:]),
            "peak": self.peak,
            "growth": self.peak - self.resident,
        }

    def _switch(self) -> None:
        """Give the time since the last switch to the innermost open block."""
        now = time.perf_counter()
        if self._open:
            self._phases[self._open[-1]] += now - self._since
        self._since = now

    def _clear(self) -> None:
        for counts in (self._now_calls, self._now_rows, self._phases):
            counts.clear()

    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Before the call: a recomputation is cut short and never reaches hooks that follow it.
        backward = torch._C._current_graph_task_id() != -1
        kind = "again" if backward else "graph" if torch.is_grad_enabled() else "plain"
        self._now_calls[kind] += 1
        self._now_rows[kind] += inputs[0].shape[0]


def _means(counts: Sequence[Counter[str]]) -> dict[str, float]:
    return {kind: statistics.mean(one[kind] for one in counts) for kind in KINDS}


def _clocks() -> tuple[float, float]:
    """Return wall time and the processor time of all threads."""
    return time.perf_counter(), time.process_time()


def _memory(key: str) -> float:
    """Return an entry of the process's status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def lightning_trainer(*callbacks: Any) -> Any:
    """Return the Trainer of one epoch that `lit-rlft fit` builds, without logger and files."""
    from lightning import Trainer

    from lit_rlft.callbacks.self_check import SelfCheck

    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[*callbacks, SelfCheck()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def measure(script: str, python: str, options: argparse.Namespace, arguments: Sequence[str]) -> Any:
    """Run `script side ...` in a process of its own, in an empty folder; return its Turn."""
    threads = str(options.threads)
    env = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "passive",
    }
    command = [python, str(Path(script).resolve()), "side", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_command(
    parser: argparse.ArgumentParser,
    sides: Mapping[str, Callable[[argparse.Namespace], Turn]],
    commands: Mapping[str, Callable[[argparse.Namespace], None]],
) -> None:
    """Run what the command line asks for.

    Args:
        parser: Of the command line.
        sides: What `side` measures in this process; the last line printed is its report.
        commands: The other sub-commands.
    """
    options = parser.parse_args()
    if options.command != "side":
        commands[options.command](options)
        return
    warnings.filterwarnings("ignore")
    print(json.dumps(sides[options.side](options)))


def take_turns(
    script: str, arms: Mapping[str, tuple[str, Sequence[str]]], options: argparse.Namespace
) -> dict[str, list[Turn]]:
    """Measure every arm once per repeat, in reverse order in every second one.

    Args:
        script: Whose `side` command measures.
        arms: The Python and the arguments of each arm.
        options: `repeats` and `threads`.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in arms}
    for repeat in range(options.repeats):
        for name in list(arms)[:: -1 if repeat % 2 else 1]:
            turn = measure(script, arms[name][0], options, arms[name][1])
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


def side_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the sub-command that `measure` runs; return it for options of its own."""
    parser = commands.add_parser("side", help="measure one side in this process")
    parser.add_argument("side", choices=("ours", "trl"))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shared-noise", action="store_true", help="the same noise on both sides")
    return parser


def add_turns(parser: argparse.ArgumentParser) -> None:
    """Add the options of `take_turns`."""
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)


def add_models(parser: argparse.ArgumentParser) -> None:
    """Add the options of `model_folder`."""
    parser.add_argument("--trl-python", required=True, help="of TRL's environment (beside_trl.py)")
    parser.add_argument("--models", type=Path, required=True, help="folder of the models")
    parser.add_argument("--sizes", nargs="+", choices=sorted(SIZES), default=["tiny", "small"])


if __name__ == "__main__":
    make_model(sys.argv[1], Path(sys.argv[2]))
