"""One, two and three processes: the same samples in the same minibatches, the same weights."""

import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.cli import main
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.hooks import Hooks
from lit_rlft.report.run import read_run
from lit_rlft.runs.shown import read_shown
from lit_rlft.runs.warned import WARNINGS
from tests.cli.test_forward_process import write_votes
from tests.support import (
    ROOT,
    SCRIPT,
    arguments,
    checkpoint,
    report,
    scalars,
    working_directory,
)

GAUSSIAN = "configs/domains/gaussian_mixture.yaml"
# Two rounds of 12 conditions: 25 rows leave one over, for any number of processes.
TINY = {
    "data.init_args.num_train": 25,
    "data.init_args.num_val": 3,
    "data.init_args.num_test": 7,
    "data.init_args.batch_size": 12,
    "data.init_args.eval_batch_size": 2,
    "model.init_args.sampler.num_steps": 3,
    "model.init_args.num_epochs": 2,
    "model.init_args.minibatch_size": 5,
    "model.init_args.microbatch_size": 2,
    "model.init_args.num_eval_samples": 2,
    "model.init_args.optimizer.init_args.lr": 0.01,
    "trainer.accelerator": "cpu",
    # In single precision, Adam and clipping make 3e-4 of a difference in the last digit.
    "trainer.precision": "64-true",
    "trainer.enable_progress_bar": False,
    "trainer.callbacks+": "tests.cli.test_world_size.Record",
}
THRESHOLD = {
    "model.init_args.selection": "lit_rlft.core.selection.Threshold",
    "model.init_args.selection.minimum": 0.5,
}
FLOW = {
    "pipeline.init_args.schedule": "rectified_flow",
    "pipeline.init_args.prediction_type": "velocity",
    "model.init_args.shard_size": 5,
    "model.init_args.width": 8,
    "model.init_args.corrector_steps": 2,
}
RUNNING = {
    "model.init_args.advantage": "lit_rlft.core.advantage.RunningAdvantage",
    "model.init_args.advantage.min_count": 8,
}
QUADRATIC = {"reward": "domains.gaussian_mixture.rewards.Quadratic"}
PAIRS = {
    "data": "PreferencePairs",
    "data.init_args.file": "votes.jsonl",
    "data.init_args.val_file": "held_out.jsonl",
}
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "P-GRAFT": ("p_graft", {}),
    "P-GRAFT, unequal shares": ("p_graft", THRESHOLD),
    "GRAFT with contrast": ("graft", {"model.init_args.contrast": 1.0}),
    "DDPO": ("ddpo", RUNNING),
    "GRPO": ("grpo", {}),
    "MixGRPO": ("mix_grpo", {"model.init_args.sliding": {"size": 2, "interval": 1}}),
    "Flow-GRPO-Fast": (
        "flow_grpo_fast",
        {"model.init_args.sliding.size": 1, "model.init_args.sliding.until": 1.0},
    ),
    "GRPO-Guard": ("grpo_guard", {}),
    "DiffusionNFT": ("nft", {"model.init_args.decay_rate": 0.3}),
    "DPO": ("dpo", {"model.init_args.beta": 10.0}),
    "DPO, relayed": ("dpo", {"model.init_args.beta": 10.0, "model.init_args.start": 0.3}),
    "DPO, offline": ("dpo_offline", {"model.init_args.beta": 10.0, **PAIRS}),
    "RWR": ("rwr", {}),
    "RAFT": ("raft", {}),
    "AdjointMatching": ("adjoint_matching", {**QUADRATIC, "model.init_args.loss_quantile": 0.9}),
    "NoisePPO": ("noise_ppo", RUNNING),
    "DRTune": ("drtune", {**QUADRATIC, "model.init_args.method.init_args.m": 2}),
    "INC": ("inverse_noise_correction", FLOW),
    "Pretrain": ("pretrain", {}),
}
QUICK = "P-GRAFT, unequal shares"


class Record(Hooks):
    """Writes the seeds of what is collected, and of each update, into a file per process."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RewardFineTuner)
        if trainer.world_size == 1:
            torch.save(pl_module.trainable().state_dict(), "start.pt")
        elif isinstance(trainer.strategy.model, DistributedDataParallel):
            file = Path(f"all_reduces_{trainer.world_size}_{trainer.global_rank}")
            trainer.strategy.model.register_comm_hook(file, noted)

    def on_experience(self, module: LightningModule, experience: Experience) -> None:
        self._write(module, "collected", experience)

    def on_losses(
        self,
        module: LightningModule,
        part: Experience,
        losses: Tensor,
        values: Mapping[str, Tensor],
    ) -> None:
        assert isinstance(module, RewardFineTuner)
        self._write(module, f"update {module.num_updates}", part)

    def _write(self, module: LightningModule, what: str, part: Experience) -> None:
        assert isinstance(module, RewardFineTuner)
        line = json.dumps([f"round {module.num_rounds}, {what}", list(part.seeds)])
        with Path(f"seeds_{module.trainer.world_size}_{module.global_rank}").open("a") as file:
            file.write(f"{line}\n")


def noted(file: Path, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Add up gradients as DDP does, and make a file longer by one."""
    with file.open("a") as open_file:
        open_file.write(".")
    return allreduce_hook(None, bucket)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path) -> Iterator[None]:
    """Run from an empty folder."""
    with working_directory(tmp_path):
        write_votes(Path("votes.jsonl"), 25)
        write_votes(Path("held_out.jsonl"), 3)
        yield


def recorded(world_size: int) -> dict[str, list[int]]:
    """Return the seeds of all processes by round and update, sorted."""
    seeds: dict[str, list[int]] = defaultdict(list)
    for rank in range(world_size):
        for line in Path(f"seeds_{world_size}_{rank}").read_text().splitlines():
            key, own = json.loads(line)
            seeds[key] += own
    return {key: sorted(own) for key, own in seeds.items()}


def words(stage: str, algorithm: str, world_size: int, *settings: dict[str, Any]) -> list[str]:
    name, own = ALGORITHMS[algorithm]
    configs = (GAUSSIAN, f"configs/algorithms/{name}.yaml")
    given = "data" in own and own["data"] == "PreferencePairs"
    tiny = {k: v for k, v in TINY.items() if not (given and k.startswith("data.init_args.num_"))}
    processes = {"trainer.devices": world_size, "name": str(world_size)}
    # Forks need no second import of everything.
    strategy = {"trainer.strategy": "ddp_fork"} if world_size > 1 else {}
    return arguments(stage, configs, tiny, own, processes, strategy, *settings)


def assert_trained_alike(world_size: int) -> None:
    """Compare a run with that of one process: samples, weights, statistics, costs, logs."""
    assert recorded(world_size) == recorded(1)
    one, own = (checkpoint(name) for name in ("1", str(world_size)))
    assert one["state_dict"].keys() == own["state_dict"].keys()
    start = torch.load("start.pt", weights_only=True)
    trained = {name: one["state_dict"][key] for name in start for key in one["state_dict"]
               if key.endswith(name)}  # fmt: skip
    moved = max(float((value - start[name]).abs().max()) for name, value in trained.items())
    pairs = zip(one["state_dict"].values(), own["state_dict"].values(), strict=True)
    apart = max(float((a - b).abs().max()) for a, b in pairs)
    print(
        f"{world_size} processes: weights moved by {moved:.2g}, differ by {apart / moved:.1e} of it"
    )
    assert moved > 1e-3 and apart < 1e-9 * moved
    for rank in range(world_size):  # one each update, however many microbatches it has
        all_reduces = Path(f"all_reduces_{world_size}_{rank}").stat().st_size
        assert all_reduces == one["lit_rlft"]["num_updates"]
    for key in ("num_updates", "num_samples", "num_rounds"):
        assert own["lit_rlft"][key] == one["lit_rlft"][key]
    costs = [{**held["lit_rlft"]["cost"], "seconds": 0} for held in (one, own)]
    assert costs[1] == costs[0]
    (books,) = (name for name in one["callbacks"] if name.startswith("CostMeter"))
    one_page, own_page = (counts_by_phase(held["callbacks"][books]) for held in (one, own))
    assert_reports_alike(own_page, one_page)
    if "advantage" in one["lit_rlft"]:
        remembered = (held["lit_rlft"]["advantage"] for held in (own, one))
        torch.testing.assert_close(*remembered, rtol=1e-4, atol=1e-5)
    logged = [
        {tag: values for tag, values in scalars(name).items() if not tag.startswith("time/")}
        for name in ("1", str(world_size))
    ]
    assert logged[1].keys() == logged[0].keys()
    for tag, values in logged[0].items():
        assert logged[1][tag] == pytest.approx(values, rel=1e-3, abs=1e-4, nan_ok=True), tag


@pytest.mark.parametrize(
    "algorithm",
    # The others' rounds are split by the same code; in the default suite one of them is real.
    [pytest.param(name, marks=[] if name == QUICK else pytest.mark.slow) for name in ALGORITHMS],
)
def test_two_and_three_processes_train_and_test_like_one(algorithm: str) -> None:
    for world_size in (1, 3) if algorithm == QUICK else (1, 2, 3):
        main(words("fit", algorithm, world_size))
        if world_size > 1:
            assert_trained_alike(world_size)
    if algorithm != QUICK:
        return
    last = {"ckpt_path": "runs/1/checkpoints/last.ckpt"}
    for world_size in (1, 3):
        main(words("test", algorithm, world_size, last))
    one, three = (without_times(report(f"runs/{name}")) for name in (1, 3))
    assert_reports_alike(three, one)
    tables = [kept_samples(f"runs/{name}") for name in (1, 3)]
    assert_reports_alike(tables[1], tables[0])
    drawn = [np.asarray(Image.open(f"runs/{name}/comparison.png"), float) for name in (1, 3)]
    assert drawn[0].shape == drawn[1].shape and abs(drawn[0] - drawn[1]).mean() < 0.1
    validations = [*Path("runs/1/report").glob("0*.json.gz")]
    assert validations
    for path in validations:
        first, third = (read_shown(Path(f"runs/{name}/report", path.name)) for name in (1, 3))
        assert_reports_alike(*(shown_samples(held) for held in (third, first)))


def shown_samples(record: dict[str, Any]) -> list[Any]:
    """Return which samples of a validation a run keeps, and their values."""
    keys = ("row", "sample", "label")
    return [[*(one[k] for k in keys), one["tuned"]["values"]] for one in record["entries"]]


class Spare(Callback):
    """Gives the denoiser a parameter that no loss reaches, as many a network has one."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, RewardFineTuner)
        spare = nn.Parameter(torch.ones(3))
        pl_module.pipeline.denoiser.register_parameter("spare", spare)


@pytest.mark.parametrize("microbatch_size", [2, pytest.param("auto", marks=pytest.mark.slow)])
def test_a_parameter_that_no_loss_reaches_stays_as_it_is(
    microbatch_size: int | str,
) -> None:
    """Also in updates of which a process has no sample."""
    settings = {
        "model.init_args.lora": None,
        "model.init_args.microbatch_size": microbatch_size,
        "model.init_args.minibatch_size": 3,
        "model.init_args.optimizer.init_args.weight_decay": 0.1,
        "trainer.callbacks+": "tests.cli.test_world_size.Spare",
        "trainer.limit_val_batches": 0,
    }
    states = []
    for world_size in (1, 2):
        main(words("fit", QUICK, world_size, settings))
        states.append(checkpoint(str(world_size))["state_dict"])
    one, two = states
    (name,) = (key for key in one if key.endswith("spare"))
    assert torch.equal(one[name], torch.ones(3).double()) and torch.equal(one[name], two[name])
    torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_rows_that_fill_up_a_microbatch_are_on_nobodys_bill() -> None:
    """In half precision; two processes fill up more of them than one."""
    half = {"trainer.precision": "bf16-mixed", "model.init_args.microbatch_size": 16}
    half |= {"model.init_args.kl_coef": 0.1}
    costs = []
    for world_size in (1, 2):
        main(words("fit", "DDPO", world_size, half))
        costs.append({**checkpoint(str(world_size))["lit_rlft"]["cost"], "seconds": 0})
    assert costs[1] == costs[0]


def kept_samples(folder: str) -> list[Any]:
    """Return what a test writes of each sample, and the samples that it keeps."""
    run = read_run(Path(folder))
    keys, columns = run.table()
    kept = [
        [one["kind"], one["row"], one["sample"], one["tuned"]["values"]] for one in run.extremes
    ]
    return [keys, kept, columns]


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    known = ("_calls", "flops", "calls_per_sample", "flops_per_sample")
    cost = {k: v for k, v in report["cost"].items() if k.endswith(known)}
    cost["phases"] = counts_by_phase(report["cost"]["phases"])
    return {**report, "checkpoint": None, "cost": cost}  # named from another folder


def counts_by_phase(books: dict[str, Any]) -> dict[str, Any]:
    """Return books without seconds."""
    return {
        stage: {phase: {**spent, "seconds": 0} for phase, spent in page.items()}
        for stage, page in books.items()
    }


def assert_reports_alike(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_reports_alike(found[name], expected[name])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for own, other in zip(found, expected, strict=True):
            assert_reports_alike(own, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5, nan_ok=True)
    else:
        assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["P-GRAFT, unequal shares", "DDPO"])
def test_two_processes_under_torchrun(algorithm: str) -> None:
    main(words("fit", algorithm, 1))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc_per_node=2", "-m", "lit_rlft.cli"]
    done = run([*launcher, *words("fit", algorithm, 2, {"trainer.strategy": "ddp"})])
    assert done.returncode == 0, done.stdout + done.stderr
    assert_trained_alike(2)


def run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join((str(Path.cwd()), str(ROOT)))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


class LostOnTheSecond(Reward):
    """Scores none of the second process's samples."""

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        lost = torch.full((len(samples),), torch.distributed.get_rank() == 1)
        return samples[:, 0].masked_fill(lost, torch.nan)


@pytest.mark.filterwarnings("default::UserWarning")
def test_rewards_that_fail_on_another_process_are_said() -> None:
    """However many they are, the test goes on, as it does on one process."""
    settings = {
        "reward": "tests.cli.test_world_size.LostOnTheSecond",
        "data.init_args.num_test": 40,
        "data.init_args.eval_batch_size": 10,
        "self_check.reward_probes": False,
        "ckpt_path": "none",
    }
    main(words("test", QUICK, 2, settings))
    assert math.isfinite(report("runs/2")["tuned"]["LostOnTheSecond"]["mean"])
    # 20 rows of 40, two samples of each, of two models.
    warned = Path("runs/2", WARNINGS).read_text()
    assert "LostOnTheSecond failed for 80 of 160 samples of an evaluation" in warned


FAULTY = """
import torch
from lit_rlft.core.reward import Reward
from lit_rlft.loop.hooks import Hooks

def lost(*args, **kwargs):
    raise RuntimeError("lost")

class Between(Hooks):
    \"\"\"Fails on the second process, between two updates.\"\"\"

    def on_gradients(self, module, norm):
        if torch.distributed.get_rank() == 1:
            lost()

class Late(Hooks):
    \"\"\"Fails on the second process when the others have most of its gradients.\"\"\"

    def setup(self, trainer, module, stage):
        trainer.strategy._ddp_kwargs["bucket_cap_mb"] = 1e-4

    def on_train_start(self, trainer, module):
        if trainer.global_rank == 1:
            first, *_ = module._trained().values()
            first.register_hook(lost)

class Faulty(Reward):
    \"\"\"Fails on the second process, in its second call.\"\"\"

    differentiable = True
    calls = 0

    def forward(self, samples, condition):
        self.calls += 1
        if self.calls == 2 and torch.distributed.get_rank() == 1:
            FAULT
        return samples[:, 0]
"""
LOST = "raise RuntimeError('lost')"
SAID = "another process failed (RuntimeError: lost)"
FAULTS: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    "an error while collecting": ("fit", "P-GRAFT", {}, LOST, SAID),
    "an error while updating": ("fit", "DRTune", {}, LOST, SAID),
    "an error in a backward pass": ("fit", "DRTune", {}, "samples.register_hook(lost)", SAID),
    "an error late in a backward pass": (
        *("fit", "P-GRAFT", {"trainer.callbacks+": "faulty.Late"}, "pass"),
        "another process failed and has ended; its own message says why",
    ),
    "an error between two updates": (
        *("fit", "P-GRAFT", {"trainer.callbacks+": "faulty.Between"}, "pass", SAID),
    ),
    "an error while testing": ("test", "P-GRAFT", {}, LOST, SAID),
    "gradients that are not finite": (
        *("fit", "DRTune", {}, "return samples[:, 0] + (0 * samples[:, 0]).sqrt()"),
        "gradients of update",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_process_that_fails_stops_the_others_with_its_sentence(fault: str) -> None:
    stage, algorithm, more, code, sentence = FAULTS[fault]
    Path("faulty.py").write_text(FAULTY.replace("FAULT", code))
    settings = {"reward": "faulty.Faulty", "trainer.strategy": "ddp"}
    own = {"ckpt_path": "none"} if stage == "test" else {}
    done = run([str(SCRIPT), *words(stage, algorithm, 2, settings, own, more)])
    assert done.returncode != 0
    # On the first process, which has no fault of its own.
    assert "lit-rlft: error: " in done.stderr and sentence in done.stderr
    if "another process" in sentence:
        assert f"lit-rlft: error: {sentence}" in done.stderr
        assert "RuntimeError: lost" in done.stderr.replace(sentence, "")
        assert "Traceback" not in done.stderr
