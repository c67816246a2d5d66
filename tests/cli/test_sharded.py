"""FSDP2 on two processes: the weights of DDP, checkpoints that one process reads, exact resumes."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

from lit_rlft.cli import main
from lit_rlft.core.selection import Selection
from tests.cli.test_world_size import FAULTY, LOST
from tests.cli.test_world_size import run as command
from tests.sharding_support import FORKED
from tests.support import (
    SCRIPT,
    arguments,
    assert_equal,
    checkpoint,
    report,
    scalars,
    working_directory,
)

TINY = {
    "data.init_args.num_train": 12,
    "data.init_args.num_val": 3,
    "data.init_args.num_test": 3,
    "data.init_args.batch_size": 6,
    "data.init_args.eval_batch_size": 2,
    "model.init_args.sampler.num_steps": 3,
    "model.init_args.minibatch_size": 3,
    "model.init_args.microbatch_size": 2,
    "model.init_args.num_eval_samples": 1,
    "model.init_args.optimizer.init_args.lr": 0.001,
    "trainer.accelerator": "cpu",
    # In single precision, Adam and clipping make more of a difference in the last digit.
    "trainer.precision": "64-true",
    "trainer.limit_val_batches": 0,
    "trainer.enable_progress_bar": False,
    "self_check.reward_probes": False,
}
WHOLE: dict[str, Any] = {"model.init_args.lora": None}
LAGGING: dict[str, Any] = {"model.init_args.decay_rate": 0.4}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "P-GRAFT of a mixture": ("p_graft", WHOLE),
    "P-GRAFT, all weights": ("p_graft", WHOLE),
    "P-GRAFT, LoRA": ("p_graft", {}),
    "P-GRAFT with contrast, all weights": ("p_graft", {**WHOLE, "model.init_args.contrast": 1.0}),
    "P-GRAFT, a process without samples": (
        "p_graft",
        {**WHOLE, "model.init_args.selection": "tests.cli.test_sharded.OnFirstProcess"},
    ),
    "DiffusionNFT, all weights": ("nft", {**WHOLE, **LAGGING}),
    "DiffusionNFT, LoRA": ("nft", LAGGING),
    "DDPO, all weights": ("ddpo", {**WHOLE, "model.init_args.kl_coef": 0.1}),
    "DDPO, LoRA": ("ddpo", {"model.init_args.kl_coef": 0.1}),
    "DRTune, LoRA": ("drtune", {"model.init_args.method.init_args.m": 2}),
    "DRTune, steps recomputed": (
        "drtune",
        {
            "model.init_args.method.init_args.m": 2,
            "model.init_args.gradient_checkpointing": "steps",
        },
    ),
    "Pretrain": ("pretrain", {}),
}
QUICK = "P-GRAFT of a mixture"


class OnFirstProcess(Selection):
    """Accepts all candidates of the first process, and none of the second one's."""

    def __call__(self, rewards: Tensor, *args: Any) -> Tensor:
        first = torch.distributed.get_rank() == 0
        return torch.full_like(rewards, first, dtype=torch.bool)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path) -> Iterator[None]:
    """Run from an empty folder."""
    with working_directory(tmp_path):
        yield


def fit(run: str, name: str, strategy: str, *settings: dict[str, Any], stage: str = "fit") -> None:
    algorithm, own = RUNS[run]
    domain = "gaussian_mixture" if run == QUICK else "layout"
    configs = (f"configs/domains/{domain}.yaml", f"configs/algorithms/{algorithm}.yaml")
    processes = {"trainer.devices": 2, "trainer.strategy": strategy, "name": name}
    main(arguments(stage, configs, TINY, own, processes, *settings))


@pytest.mark.parametrize(
    "run", [pytest.param(run, marks=[] if run == QUICK else pytest.mark.slow) for run in RUNS]
)
def test_fsdp2_trains_like_ddp(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights up to rounding, the same costs and logs; the files of one process."""
    fit(run, "ddp", "ddp_fork")
    with monkeypatch.context() as patch:
        reduced = counted(patch)
        fit(run, "fsdp2", FORKED)
    ddp, fsdp2 = checkpoint("ddp"), checkpoint("fsdp2")
    assert ddp["state_dict"].keys() == fsdp2["state_dict"].keys()
    for name, value in ddp["state_dict"].items():
        torch.testing.assert_close(fsdp2["state_dict"][name], value, rtol=1e-9, atol=1e-12)
    assert bool(lagging(ddp)) == (RUNS[run][0] == "nft")
    torch.testing.assert_close(lagging(fsdp2), lagging(ddp), rtol=1e-9, atol=1e-12)
    states = [held["optimizer_states"][0]["state"] for held in (fsdp2, ddp)]
    torch.testing.assert_close(*states, rtol=1e-7, atol=1e-12)
    costs = [{**held["lit_rlft"]["cost"], "seconds": 0} for held in (fsdp2, ddp)]
    assert costs[0] == costs[1]
    # Of each block and of the rest, once an update however many microbatches it has.
    adapted = RUNS[run][0] != "pretrain" and "model.init_args.lora" not in RUNS[run][1]
    groups = 1 if run == QUICK else 4 if adapted else 5  # four blocks, and the rest without a LoRA
    sizes = [path.stat().st_size for path in reduced.iterdir()]
    assert sizes == [groups * fsdp2["lit_rlft"]["num_updates"]] * 2
    logged = [
        {tag: values for tag, values in scalars(name).items() if not tag.startswith("time/")}
        for name in ("fsdp2", "ddp")
    ]
    assert logged[0].keys() == logged[1].keys()
    for tag, values in logged[1].items():
        assert logged[0][tag] == pytest.approx(values, rel=1e-5, abs=1e-9, nan_ok=True), tag
    assert files("ddp") == files("fsdp2")


def lagging(held: dict[str, Any]) -> dict[str, Tensor]:
    """Return a checkpoint's second policy, which DiffusionNFT alone has."""
    return held["lit_rlft"].get("old_policy", {})


def counted(patch: pytest.MonkeyPatch) -> Path:
    """Count the times that processes add up gradients; return a folder of files as long."""
    folder, add_up = Path("reduced").absolute(), DefaultReduceScatter.__call__
    folder.mkdir()

    def noted(*args: Any, **kwargs: Any) -> Any:
        with (folder / str(os.getpid())).open("a") as file:
            file.write(".")
        return add_up(*args, **kwargs)

    patch.setattr(DefaultReduceScatter, "__call__", noted)
    return folder


def files(name: str) -> dict[str, int]:
    """Return the tuned model's files by name, and the sizes of those that hold weights."""
    found = Path(f"runs/{name}/tuned").iterdir()
    return {
        path.name: path.stat().st_size if path.suffix == ".safetensors" else 0 for path in found
    }


@pytest.mark.slow
@pytest.mark.parametrize("run", ["P-GRAFT, all weights", "DDPO, LoRA", "DiffusionNFT, LoRA"])
def test_a_resumed_run_is_the_one_that_never_stopped(run: str) -> None:
    """Bit by bit, with the average of its weights; then one process tests it."""
    more = {"trainer.callbacks+": "EMA", "trainer.precision": "32-true"}
    more |= {"trainer.limit_val_batches": 1.0}
    fit(run, "whole", FORKED, more, {"trainer.max_epochs": 2})
    fit(run, "parts", FORKED, more)
    last = {"ckpt_path": "runs/parts/checkpoints/last.ckpt"}
    fit(run, "parts", FORKED, more, last, {"trainer.max_epochs": 2})
    whole, parts = checkpoint("whole"), checkpoint("parts")
    assert whole["epoch"] == parts["epoch"] and whole["global_step"] == parts["global_step"]
    for key in ("state_dict", "optimizer_states"):
        assert_equal(parts[key], whole[key])
    assert_equal(lagging(parts), lagging(whole))
    averages = [next(v for k, v in c["callbacks"].items() if "EMA" in k) for c in (whole, parts)]
    assert_equal(averages[1]["average"], averages[0]["average"])
    fit(run, "parts", "ddp_fork", more, last, {"trainer.max_epochs": 3})  # goes on without parts
    assert checkpoint("parts")["lit_rlft"]["num_rounds"] == 6
    results = []
    for strategy in ("auto", FORKED):
        on = {"trainer.devices": 1 if strategy == "auto" else 2, "trainer.strategy": strategy}
        fit(run, "parts", FORKED, {"trainer.precision": "32-true"}, last, on, stage="test")
        tuned = report("runs/parts")["tuned"]
        del tuned["diversity"]  # among the samples of a batch, which are others on two processes
        results.append({name: moments["mean"] for name, moments in tuned.items()})
    assert results[1] == pytest.approx(results[0], rel=1e-4, abs=1e-5, nan_ok=True)


@pytest.mark.slow
def test_fsdp2_computes_in_half_precision_like_ddp() -> None:
    half = {"trainer.precision": "bf16-mixed"}
    fit("DDPO, LoRA", "ddp", "ddp_fork", half)
    fit("DDPO, LoRA", "fsdp2", FORKED, half)
    for name, value in checkpoint("ddp")["state_dict"].items():
        torch.testing.assert_close(checkpoint("fsdp2")["state_dict"][name], value)


@pytest.mark.slow
@pytest.mark.parametrize("code", [LOST, "samples.register_hook(lost)"], ids=["loss", "backward"])
def test_a_process_that_fails_in_an_update_ends_the_others(code: str) -> None:
    Path("faulty.py").write_text(FAULTY.replace("FAULT", code))
    configs = ("configs/domains/gaussian_mixture.yaml", "configs/algorithms/drtune.yaml")
    own = {"reward": "faulty.Faulty", "model.init_args.method.init_args.m": 2}
    processes = {"trainer.devices": 2, "trainer.strategy": "fsdp2", "name": "run"}
    done = command([str(SCRIPT), *arguments("fit", configs, TINY, own, processes)])
    assert done.returncode != 0 and "RuntimeError: lost" in done.stderr
    assert "lit-rlft: error: another process failed and has ended" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "settings", "sentence"),
    [
        ("noise_ppo", {}, "NoisePPO trains a network beside it; set trainer.strategy to ddp"),
        (
            "p_graft",
            {"model.init_args.optimizer": "torch.optim.Adafactor"},
            "Adafactor has not been tested with trainer.strategy fsdp2",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(
    algorithm: str, settings: dict[str, Any], sentence: str
) -> None:
    configs = ("configs/domains/gaussian_mixture.yaml", f"configs/algorithms/{algorithm}.yaml")
    processes = {"trainer.devices": 1, "trainer.strategy": "fsdp2", "name": "run"}
    done = command([str(SCRIPT), *arguments("fit", configs, TINY, settings, processes)])
    assert done.returncode == 1 and sentence in done.stderr
    assert not list(Path().rglob("*.ckpt"))
