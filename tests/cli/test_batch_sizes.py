"""Batch sizes that are `auto`, through the command line, on networks that claim to lack memory."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from domains.gaussian_mixture.closed_form.denoiser import GaussianMixtureDenoiser
from lit_rlft.cli import main
from tests.support import (
    TINY_MIXTURE,
    TWO_FORKS,
    arguments,
    assert_equal,
    checkpoint,
    report,
    scalars,
    slow,
    working_directory,
    write_picture_domain,
)

MIXTURE = "configs/domains/gaussian_mixture.yaml"
MICRO, SAMPLES = "model.init_args.microbatch_size", "model.init_args.sampling_batch_size"
AUTO = {MICRO: "auto", SAMPLES: "auto"}
SMALL = {
    **TINY_MIXTURE,
    "model.init_args.minibatch_size": 16,
    "trainer.max_epochs": 2,
}
QUADRATIC = "domains.gaussian_mixture.rewards.Quadratic"
Card = Callable[..., None]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path) -> Iterator[None]:
    with working_directory(tmp_path):
        yield


def out_of_memory(rows: int) -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {rows}.00 GiB")


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """Return a function that gives the mixture's denoiser room for so many rows.

    Without a graph the call fails, with one the backward pass; each process has its own numbers.
    """
    forward = GaussianMixtureDenoiser.forward

    def of(plain: list[int], graph: list[int]) -> None:
        def bounded(self: GaussianMixtureDenoiser, x_t: Tensor, t: Tensor) -> Tensor:
            rows, prediction = len(x_t), forward(self, x_t, t)
            if rows > plain[rank()] and not prediction.requires_grad:
                raise out_of_memory(rows)

            def hook(grad: Tensor) -> None:
                if rows > graph[rank()]:
                    raise out_of_memory(rows)

            if prediction.requires_grad:
                prediction.register_hook(hook)  # type: ignore[no-untyped-call]
            return prediction

        monkeypatch.setattr(GaussianMixtureDenoiser, "forward", bounded)

    return of


def run(stage: str, algorithm: str, name: str, settings: dict[str, Any]) -> None:
    configs = (MIXTURE, f"configs/algorithms/{algorithm}.yaml")
    main(arguments(stage, configs, SMALL, {"name": name}, settings))


def assert_same_run(name: str, other: str) -> None:
    """Compare weights, optimisers, costs and logs bit by bit."""
    first, second = checkpoint(name), checkpoint(other)
    for key in ("state_dict", "optimizer_states"):
        assert_equal(first[key], second[key])
    costs = [{**c["lit_rlft"]["cost"], "seconds": 0} for c in (first, second)]
    assert costs[0] == costs[1]
    logged = [scalars(one) for one in (name, other)]
    tags = [tag for tag in logged[1] if tag.startswith(("train/", "val"))]
    assert tags and all(logged[0][tag] == logged[1][tag] for tag in tags)


def noted(name: str = "run") -> dict[str, int]:
    return json.loads(Path(f"runs/{name}/batch_sizes.json").read_text())


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("graft", {"model.init_args.num_epochs": 2}),
        slow("ddpo", {}),
        slow("noise_ppo", {}),
        slow("drtune", {"reward": QUADRATIC, "model.init_args.method.init_args.m": 2}),
    ],
)
def test_a_run_is_that_of_the_sizes_it_comes_to(
    algorithm: str, settings: dict[str, Any], card: Card
) -> None:
    """With its costs and logs: of attempts that failed nothing is left."""
    card([5], [3])
    run("fit", algorithm, "run", {**settings, **AUTO})
    # The noise policy has a graph, and it is not the denoiser that gives it one.
    micro = None if algorithm == "noise_ppo" else 2
    samples = 64 if algorithm == "drtune" else 4  # it draws within its loss
    assert noted() == {"model.microbatch_size": micro, "model.sampling_batch_size": samples}
    assert checkpoint()["lit_rlft"]["batch_sizes"] == noted()
    run("fit", algorithm, "fixed", {**settings, MICRO: micro, SAMPLES: samples})
    assert_same_run("run", "fixed")
    assert not Path("runs/fixed/batch_sizes.json").exists()


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_sizes(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    """Also where more memory is at hand by then; a number that is given takes their place."""
    card([5], [3])
    run("fit", "graft", "run", {**AUTO, "trainer.max_epochs": 1})
    run("fit", "graft", "whole", AUTO)
    card([999], [999])
    caplog.clear()
    last = {"ckpt_path": "runs/run/checkpoints/last.ckpt"}
    run("fit", "graft", "run", {**AUTO, **last})
    assert "other settings" not in caplog.text
    assert noted() == {"model.microbatch_size": 2, "model.sampling_batch_size": 4}
    assert_same_run("run", "whole")
    run("test", "graft", "run", {**last, **AUTO})
    run("test", "graft", "run", {**last, MICRO: 2, SAMPLES: 4})
    assert report()["gain"]["Coordinate"]["mean"] != 0
    given = {"trainer.max_epochs": 3, MICRO: 8, SAMPLES: 16}
    run("fit", "graft", "run", {**last, **given})
    assert checkpoint()["lit_rlft"]["batch_sizes"] == {}


@pytest.mark.slow
def test_two_processes_agree_on_the_smallest(card: Card) -> None:
    card([9, 5], [3, 9])
    run("fit", "ddpo", "run", {**AUTO, **TWO_FORKS})
    assert noted() == {"model.microbatch_size": 2, "model.sampling_batch_size": 4}
    run("fit", "ddpo", "fixed", {MICRO: 2, SAMPLES: 4, **TWO_FORKS})
    assert_same_run("run", "fixed")


@pytest.mark.slow
def test_no_room_for_one_row(card: Card) -> None:
    """A sentence, on one process and on two."""
    card([9, 9], [9, 0])
    with pytest.raises(SystemExit, match=r"(?s)out of memory.*microbatch_size"):
        run("fit", "graft", "run", {**AUTO, **TWO_FORKS})
    card([9], [0])
    with pytest.raises(SystemExit, match=r"out of memory \(for 1.00 GiB\); lower the sizes"):
        run("fit", "graft", "one", AUTO)
    card([9], [3])
    with pytest.raises(SystemExit, match=r"out of memory"):
        run("fit", "graft", "given", {MICRO: 8})


@pytest.mark.slow
def test_half_precision_replays_in_the_size_of_the_updates(card: Card) -> None:
    """DDPO takes its old log-probabilities again before the first update: ratios start at 1."""
    card([999], [3])
    half = {"trainer.precision": "bf16-mixed", "model.init_args.state_dtype": "bfloat16"}
    run("fit", "ddpo", "run", {**AUTO, **half})
    assert noted()["model.microbatch_size"] == 2
    run("fit", "ddpo", "fixed", {**half, MICRO: 2, SAMPLES: 64})
    assert_same_run("run", "fixed")
    assert max(scalars()["train/first_ratio_deviation_max"]) < 1e-4


@pytest.fixture
def pictures(tiny_stable_diffusion: Callable[..., Path]) -> Path:
    words = ("red", "blue", "grey", "green", "white")
    Path("prompts.txt").write_text("\n".join(f"a {word} ring" for word in words))
    sizes = {"batch_size": 3, "num_val_prompts": 1, "num_test_prompts": 1}
    folder = tiny_stable_diffusion()
    return write_picture_domain(Path("domain.yaml"), folder, "prompts.txt", **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["p_graft", "drtune"])
def test_pictures_are_decoded_as_many_at_a_time_as_fit(
    algorithm: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default; with reward gradients it is the backward pass that runs out of memory."""
    decode, sizes = AutoencoderKL.decode, []

    def bounded(self: AutoencoderKL, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        backward = torch._C._current_graph_task_id() != -1
        if len(z) > (1 if backward else 2):
            raise out_of_memory(len(z))
        sizes.append(len(z))
        return decode(self, z, *args, **kwargs)

    monkeypatch.setattr(AutoencoderKL, "decode", bounded)
    settings = {
        "model.init_args.sampler.num_steps": 2,
        "model.init_args.num_eval_samples": 1,
        "trainer.enable_progress_bar": False,
        "trainer.limit_val_batches": 0,
    }
    if algorithm == "p_graft":
        settings |= {"model.init_args.num_candidates": 2, "model.init_args.cut": 0.5}
    else:
        settings |= {"model.init_args.method.init_args.m": 1}
    configs = (pictures, f"configs/algorithms/{algorithm}.yaml")
    main(arguments("fit", configs, settings, {"name": "run"}))
    key = "pipeline.decode_batch_size"
    graph = 1 if algorithm == "drtune" else 32
    assert noted() == {key: 32 if graph == 1 else 2, f"{key} with gradients": graph}
    assert max(sizes) <= 2
    fixed = {"pipeline.init_args.decode_batch_size": 1 if graph == 1 else 2, "name": "fixed"}
    main(arguments("fit", configs, settings, fixed))
    assert_same_run("run", "fixed")


@pytest.mark.slow
def test_plain_defaults_on_a_processor_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        run("fit", "graft", "run", AUTO)
    assert (
        "batch sizes (auto): model.microbatch_size all, model.sampling_batch_size 64; only GPUs "
        "tell what fits, so these are plain defaults"
    ) in caplog.text


@pytest.mark.slow
def test_other_words_are_refused() -> None:
    with pytest.raises(SystemExit, match=r"model.init_args.microbatch_size"):
        run("fit", "graft", "run", {MICRO: "many"})
    with pytest.raises(SystemExit, match=r"microbatch_size must be at least 1, got 0"):
        run("fit", "graft", "run", {MICRO: 0})
