"""The whole through the command line, on the closed-form domain and on a tiny diffusion model."""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning import LightningModule
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from lit_rlft.callbacks.run_files import RunFiles
from lit_rlft.cli import main
from tests.support import (
    TWO_FORKS,
    TWO_PROCESSES,
    arguments,
    assert_equal,
    checkpoint,
    report,
    script,
    weights,
    working_directory,
    write_picture_domain,
)

GAUSSIAN = ("configs/domains/gaussian_mixture.yaml", "configs/algorithms/graft.yaml")
STEPS, EVAL_SAMPLES, EVAL_ROWS = 3, 2, 4
QUIET = {"trainer.enable_progress_bar": False, "trainer.enable_model_summary": False}
TINY = {
    "data.init_args.num_train": 16,
    "data.init_args.num_val": EVAL_ROWS,
    "data.init_args.num_test": EVAL_ROWS,
    "data.init_args.batch_size": 8,
    "model.init_args.sampler.num_steps": STEPS,
    "model.init_args.num_epochs": 2,
    "model.init_args.num_eval_samples": EVAL_SAMPLES,
    **QUIET,
}


def gaussian(stage: str, name: str, settings: dict[str, Any] | None = None) -> None:
    main(arguments(stage, GAUSSIAN, TINY, {"name": name}, settings or {}))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path) -> Iterator[None]:
    """Run from an empty folder, where `configs/...` only exist in the package."""
    with working_directory(tmp_path):
        yield


@pytest.fixture(scope="module")
def gaussian_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a GRAFT run after all four commands."""
    with working_directory(tmp_path_factory.mktemp("gaussian")):
        gaussian("fit", "run")
        for stage in ("validate", "test", "predict"):
            gaussian(stage, "run", {"ckpt_path": "runs/run/checkpoints/last.ckpt"})
        return Path("runs/run").resolve()


@pytest.fixture(scope="module")
def pictures(
    tiny_stable_diffusion: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Return a function that writes the domain config of a tiny model of non-square pictures."""
    folder = tmp_path_factory.mktemp("domain")
    prompts = [f"a {colour} {shape}" for colour in ("red", "blue") for shape in ("circle", "ring")]
    (folder / "prompts.txt").write_text("\n".join(prompts * 3))

    def write(reward: str = "Symmetry", **model: Any) -> Path:
        pretrained = tiny_stable_diffusion(size=(24, 40), **model)
        path = folder / f"{reward}_{len(list(folder.iterdir()))}.yaml"
        splits = {"num_test_prompts": 1, "num_val_prompts": 1}
        source = folder / "prompts.txt"
        return write_picture_domain(path, pretrained, source, reward, batch_size=4, **splits)

    return write


SMALL = {
    "model.init_args.sampler.num_steps": 2,
    "model.init_args.num_eval_samples": 2,
    "model.init_args.num_candidates": 2,
    "model.init_args.num_epochs": 1,
    **QUIET,
}


def pictured(stage: str, domain: Path, name: str, settings: dict[str, Any] | None = None) -> None:
    configs = (domain, "configs/algorithms/p_graft.yaml")
    cut = {"model.init_args.cut": 0.5}
    main(arguments(stage, configs, SMALL, cut, {"name": name}, settings or {}))


def test_configs_in_any_order_give_the_same_run() -> None:
    files = (*GAUSSIAN, "configs/trainer/cpu.yaml")
    orders = list(itertools.permutations(files))
    runs = {"first": orders[0], "last": orders[-1]}
    for name, order in runs.items():
        main(arguments("fit", order, TINY, {"name": name}))
    assert_equal(weights("first"), weights("last"))


def test_print_config_and_the_saved_config_give_the_run_again(
    capsys: pytest.CaptureFixture[str], gaussian_run: Path
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*arguments("fit", GAUSSIAN, TINY), "--print_config"])
    assert exit_.value.code == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    first = torch.load(gaussian_run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for config in ("printed.yaml", gaussian_run / "config.yaml"):
        name = Path(config).stem
        main(["fit", "--config", str(config), "--name", name])
        assert_equal(weights(name), first)


def test_the_command_line_wins_over_files_and_later_files_over_earlier() -> None:
    Path("own.yaml").write_text("model: {init_args: {sampler: {num_steps: 7, eta: 0.5}, seed: 3}}")
    configs, folder = (*GAUSSIAN, "own.yaml"), Path("runs/own")
    main(arguments("validate", configs, TINY, {"name": "own"}))
    model = yaml.safe_load((folder / "config_validate.yaml").read_text())["model"]
    expected = {"num_steps": STEPS, "eta": 0.5, "transition": "eta"}
    assert model["init_args"]["sampler"] == expected
    assert model["init_args"]["seed"] == 3
    assert model["init_args"]["num_candidates"] == 4


def test_a_file_here_wins_over_the_packaged_one_of_the_same_name() -> None:
    Path("configs/trainer").mkdir(parents=True)
    Path("configs/trainer/cpu.yaml").write_text("trainer: {max_epochs: 5}")
    with pytest.raises(SystemExit, match=r"there is no file nowhere\.ckpt"):
        gaussian("test", "run", {"config": "configs/trainer/cpu.yaml", "ckpt_path": "nowhere.ckpt"})
    gaussian("validate", "run", {"config": "configs/trainer/cpu.yaml"})
    config = yaml.safe_load(Path("runs/run/config_validate.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 5


def test_the_command_line_wins_over_the_checkpoint(gaussian_run: Path) -> None:
    num_steps = 5
    path = str(gaussian_run / "checkpoints/last.ckpt")
    gaussian("test", "run", {"ckpt_path": path, "model.init_args.sampler.num_steps": num_steps})
    cost = report(Path("runs/run"))["cost"]
    assert cost["test_denoiser_calls"] == 2 * EVAL_ROWS * EVAL_SAMPLES * num_steps


def test_a_run_writes_what_it_promises(gaussian_run: Path) -> None:
    assert yaml.safe_load((gaussian_run / "config.yaml").read_text())["name"] == "run"
    for stage in ("validate", "test", "predict"):
        assert (gaussian_run / f"config_{stage}.yaml").is_file()
    assert (gaussian_run / "checkpoints/last.ckpt").is_file()
    assert (gaussian_run / "tuned/mixture.json").is_file()
    panels = list((gaussian_run / "panels").iterdir())
    assert [panel.name for panel in panels] == ["000004.png"]
    for picture in (*panels, gaussian_run / "comparison.png"):
        assert Image.open(picture).size > (64, 64)
    assert not list(gaussian_run.glob("*.partial"))


def test_metrics_json_has_the_promised_fields(gaussian_run: Path) -> None:
    metrics = report(gaussian_run)
    assert metrics["algorithm"] == "GRAFT"
    assert metrics["domain"] == "gaussian_mixture"
    assert metrics["num_samples"] == EVAL_ROWS * EVAL_SAMPLES
    assert metrics["seed"] == 0
    for arm in ("reference", "tuned", "gain"):
        assert set(metrics[arm]) == {"Coordinate", "mmd", "kl"}
        assert set(metrics[arm]["mmd"]) == {"mean", "sem"}
        assert set(metrics[arm]["Coordinate"]) == {"mean", "sem"}
        assert all(math.isfinite(value) for value in metrics[arm]["Coordinate"].values())
    means = {arm: metrics[arm]["Coordinate"]["mean"] for arm in ("reference", "tuned", "gain")}
    assert means["gain"] == pytest.approx(means["tuned"] - means["reference"], abs=1e-6)
    assert means["gain"] != 0

    cost, candidates, accepted = metrics["cost"], 16 * 4, 16
    assert cost["denoiser_calls"] == candidates * STEPS + 2 * accepted  # two epochs
    assert cost["reward_calls"] == candidates
    # The mixture and its residual network; candidates come from it without an adapter.
    plain = 2 * (6 * 64 + 64 * 64 + 64 * 2) + 2 * (5 * 2 * 2)
    adapted = cost["flops_per_denoiser_call"]
    assert adapted > plain
    assert cost["flops"] == candidates * STEPS * plain + 2 * accepted * adapted
    assert cost["seconds"] > 0
    assert cost["peak_memory_bytes"] > 1e6


def test_predict_writes_samples_and_a_line_for_each(gaussian_run: Path) -> None:
    lines = (gaussian_run / "samples.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == EVAL_ROWS * EVAL_SAMPLES
    assert len({record["seed"] for record in records}) == len(records)
    for record in records:
        assert record["name"] == "mixture"
        point = json.loads((gaussian_run / "samples" / record["file"]).read_text())
        assert record["rewards"]["Coordinate"] == pytest.approx(point[0], abs=1e-6)
    tuned = report(gaussian_run)["tuned"]["Coordinate"]["mean"]
    mean = sum(record["rewards"]["Coordinate"] for record in records) / len(records)
    assert mean == pytest.approx(tuned, abs=1e-6)


def test_predictions_of_all_processes_are_joined(tmp_path: Path) -> None:
    for rank, names in enumerate((["a", "c"], ["b"])):
        text = "".join(json.dumps({"file": name}) + "\n" for name in names)
        (tmp_path / f"samples_{rank}.jsonl").write_text(text)
    strategy = SimpleNamespace(barrier=lambda: None)
    settings = {"loggers": [], "default_root_dir": tmp_path, "strategy": strategy}
    trainer: Any = SimpleNamespace(world_size=2, is_global_zero=True, **settings)
    RunFiles().on_predict_end(trainer, LightningModule())
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["file"] for line in lines] == ["a", "b", "c"]


def test_runs_without_a_name_are_numbered() -> None:
    for _ in range(2):
        main(arguments("validate", GAUSSIAN, TINY))
    assert sorted(path.name for path in Path("runs").iterdir()) == ["graft", "graft-2"]


def test_tensorboard_shows_the_promised_tags(gaussian_run: Path) -> None:
    events = EventAccumulator(str(gaussian_run), {"histograms": 0}).Reload()
    found = events.Tags()
    scalars = {
        "train/reward",
        "train/accepted_reward",
        "train/acceptance_rate",
        "train/loss",
        "train/reward_by_samples",
        "train/reward_by_reward_calls",
        "train/learning_rate",
        "train/grad_norm",
        "cost/samples",
        "cost/reward_calls",
        "cost/denoiser_calls",
        "val/Coordinate",
        "val_reference/Coordinate",
        "val_gain/Coordinate",
        "test/Coordinate",
    }
    assert scalars <= set(found["scalars"])
    assert {"histograms/reward", "histograms/accepted_reward"} <= set(found["histograms"])
    assert "val/before_after" in found["images"]
    assert "config/fit/text_summary" in found["tensors"]
    assert len(events.Scalars("train/reward")) == 2
    assert [event.step for event in events.Scalars("train/reward_by_samples")] == [32, 64]
    rewards = [event.value for event in events.Scalars("train/reward")]
    assert rewards == [event.value for event in events.Scalars("train/reward_by_reward_calls")]
    # What its page shows: of a tag with values of two kinds, those of the first kind alone.
    multiplexer = EventMultiplexer().AddRun(str(gaussian_run), "run").Reload()
    provider = MultiplexerDataProvider(multiplexer, str(gaussian_run))
    shown = provider.list_scalars(RequestContext(), experiment_id="", plugin_name="scalars")
    assert scalars <= set(shown["run"])


def test_a_diffusion_model_goes_through_all_commands(pictures: Callable[..., Path]) -> None:
    domain, folder = pictures(prediction_type="v_prediction", factor=4), Path("runs/run")
    pictured("fit", domain, "run")
    for stage in ("validate", "test", "predict"):
        pictured(stage, domain, "run", {"ckpt_path": str(folder / "checkpoints/last.ckpt")})
    metrics = report(folder)
    assert metrics["algorithm"] == "PGRAFT" and metrics["domain"] == "tiny"
    assert metrics["gain"]["Symmetry"]["mean"] != 0
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(records) == 2
    for record in records:
        assert record["prompt"].startswith("a ")
        assert Image.open(folder / "samples" / record["file"]).size == (40, 24)
    assert (folder / "comparison.png").is_file()
    suffixes = sorted(path.suffix for path in (folder / "tuned").iterdir())
    assert suffixes == [".json", ".md", ".safetensors"]


def test_mixed_precision_trains_the_adapter(pictures: Callable[..., Path]) -> None:
    half = {"trainer.precision": "bf16-mixed"}
    gaussian("fit", "half", half)
    pictured("fit", pictures("JPEGCompressibility"), "pictures", half)
    for name in ("half", "pictures"):
        trained = weights(name)
        assert all(value.isfinite().all() for value in trained.values())
        assert all(value.dtype == torch.float32 for value in trained.values())
        assert any(value.any() for key, value in trained.items() if "lora_B" in key)


def test_full_fine_tuning_leaves_the_reference_alone(gaussian_run: Path) -> None:
    full = {"model.init_args.lora": None}
    gaussian("fit", "full", full)
    assert not any("lora" in key for key in weights("full"))
    gaussian("test", "full", {**full, "ckpt_path": "runs/full/checkpoints/last.ckpt"})
    metrics, adapted = report(Path("runs/full")), report(gaussian_run)
    assert metrics["reference"] == adapted["reference"]
    assert metrics["tuned"] != metrics["reference"]
    gaussian("test", "untuned", full)
    untuned = report(Path("runs/untuned"))
    assert untuned["tuned"] == untuned["reference"] == metrics["reference"]


def test_pretraining_runs_on_data() -> None:
    configs = (GAUSSIAN[0], "configs/algorithms/pretrain.yaml")
    main(arguments("fit", configs, TINY, {"name": "run"}))
    assert all(value.isfinite().all() for value in weights("run").values())
    assert checkpoint("run")["lit_rlft"]["num_rounds"] == 2


# Four rounds of two updates per pass over the data.
RESUMABLE = {
    "data.init_args.num_train": 32,
    "model.init_args.num_epochs": 1,
    "model.init_args.minibatch_size": 4,
    "model.init_args.lr_scheduler": "torch.optim.lr_scheduler.LinearLR",
    "model.init_args.lr_scheduler.total_iters": 10,
    "trainer.callbacks+": "lit_rlft.callbacks.ema.EMA",
    "trainer.callbacks.decay": 0.5,
    "trainer.max_epochs": -1,
    "trainer.max_steps": 12,
    "checkpoint.every_n_train_steps": 2,
    "checkpoint.save_top_k": -1,
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoints of a run of six rounds, one after every round."""
    with working_directory(tmp_path_factory.mktemp("uninterrupted")):
        gaussian("fit", "run", RESUMABLE)
        return Path("runs/run/checkpoints").resolve()


def assert_same_end(uninterrupted: Path, name: str) -> None:
    expected = torch.load(uninterrupted / "last.ckpt", weights_only=True)
    resumed = checkpoint(name)
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(resumed[key], expected[key])
    averages = [
        next(state for owner, state in found["callbacks"].items() if owner.startswith("EMA"))
        for found in (resumed, expected)
    ]
    assert_equal(*averages)
    counters = [dict(found["lit_rlft"]) for found in (resumed, expected)]
    for counted in counters:
        del counted["cost"]["seconds"]
    assert counters[0] == counters[1]


@pytest.mark.parametrize(
    "killed_after",
    # At the end of an epoch and in the middle of the next one.
    [pytest.param("epoch=0-step=4", marks=pytest.mark.slow), "epoch=0-step=8", "epoch=1-step=10"],
)
def test_a_killed_run_resumes_bit_by_bit(uninterrupted: Path, killed_after: str) -> None:
    path = str(uninterrupted / f"{killed_after}.ckpt")
    gaussian("fit", "run", {**RESUMABLE, "ckpt_path": path})
    assert_same_end(uninterrupted, "run")


@pytest.mark.parametrize("num_updates", [6, pytest.param(8, marks=pytest.mark.slow)])
def test_a_finished_run_is_prolonged_bit_by_bit(uninterrupted: Path, num_updates: int) -> None:
    gaussian("fit", "run", {**RESUMABLE, "trainer.max_steps": num_updates})
    last = "runs/run/checkpoints/last.ckpt"
    assert checkpoint("run")["lit_rlft"]["num_updates"] == num_updates
    gaussian("fit", "run", {**RESUMABLE, "ckpt_path": last})
    assert_same_end(uninterrupted, "run")


def test_epochs_are_prolonged_bit_by_bit() -> None:
    gaussian("fit", "whole", {"trainer.max_epochs": 2})
    gaussian("fit", "run", {"trainer.max_epochs": 1})
    last = "runs/run/checkpoints/last.ckpt"
    gaussian("fit", "run", {"trainer.max_epochs": 2, "ckpt_path": last})
    assert_equal(weights("run"), weights("whole"))


def test_only_the_samples_that_are_shown_are_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    render, rendered = GaussianMixturePipeline.render, []

    def counted(self: GaussianMixturePipeline, samples: Any, condition: Any) -> torch.Tensor:
        rendered.append(len(samples))
        return render(self, samples, condition)

    monkeypatch.setattr(GaussianMixturePipeline, "render", counted)
    # Batches of 4 samples: tuned and reference, two batches each.
    shown = {"sample_panel.num_samples": 5, "run_files.num_conditions": 2}
    gaussian("validate", "run", {**shown, "data.init_args.eval_batch_size": 2})
    assert rendered == [4, 4, 1, 1]
    assert len(list(Path("runs/run/panels").iterdir())) == 1


def test_rounds_after_the_last_validation_are_kept_and_prolonged_bit_by_bit() -> None:
    often = {"data.init_args.num_train": 32, "trainer.val_check_interval": 3}
    gaussian("fit", "whole", {**often, "trainer.max_epochs": 2})
    gaussian("fit", "run", {**often, "trainer.max_epochs": 1})
    assert checkpoint("run")["lit_rlft"]["num_rounds"] == 4
    last = "runs/run/checkpoints/last.ckpt"
    gaussian("fit", "run", {**often, "trainer.max_epochs": 2, "ckpt_path": last})
    assert checkpoint("run")["lit_rlft"]["num_rounds"] == 8
    assert_equal(weights("run"), weights("whole"))


@pytest.mark.slow
def test_two_processes_train_and_test_like_one() -> None:
    # Three minibatches a pass: of 8 accepted samples.
    alone = {"model.init_args.minibatch_size": 3, "trainer.max_epochs": 2}
    shared = {**alone, **TWO_PROCESSES}
    monitor = {"checkpoint.monitor": "val/Coordinate", "checkpoint.save_top_k": -1}
    gaussian("fit", "one", alone)
    script(*arguments("fit", GAUSSIAN, TINY, {"name": "two"}, shared, monitor))
    one, two = weights("one"), weights("two")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-6, atol=1e-7)
    trained = {"ckpt_path": "runs/two/checkpoints/last.ckpt"}
    gaussian("test", "one", trained)
    script(*arguments("test", GAUSSIAN, TINY, {"name": "two"}, TWO_PROCESSES, trained))
    first, second = (report(Path(f"runs/{name}")) for name in ("one", "two"))
    assert second["num_samples"] == first["num_samples"]
    for arm in ("reference", "tuned", "gain"):
        for key in ("mean", "sem"):
            expected = first[arm]["Coordinate"][key]
            assert second[arm]["Coordinate"][key] == pytest.approx(expected, abs=1e-6)
        # Of all points together, whichever process drew them.
        assert second[arm]["mmd"]["mean"] == pytest.approx(first[arm]["mmd"]["mean"], abs=1e-6)
    assert len(list(Path("runs").rglob("metrics.json"))) == 2
    assert sorted(path.name for path in Path("runs").iterdir()) == ["one", "two"]


UNEVEN = '''
import torch
from lit_rlft.core.reward import Reward

class Uneven(Reward):
    """The second process scores nothing above 0 in its first round, later half of its samples."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, samples, condition):
        self.calls += 1
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if rank and self.calls == 1:
            return torch.zeros(len(samples))
        return (samples[:, 0] > 0).float()
'''


@pytest.mark.slow
def test_processes_that_accept_unequal_numbers_do_not_hang() -> None:
    Path("uneven.py").write_text(UNEVEN)
    threshold = {
        "name": "run",
        "reward": "uneven.Uneven",
        "model.init_args.selection": "lit_rlft.core.selection.Threshold",
        "model.init_args.selection.minimum": 0.5,
        "model.init_args.minibatch_size": 3,
        "trainer.max_epochs": 2,
    }
    script(*arguments("fit", GAUSSIAN, TINY, threshold, TWO_PROCESSES))
    assert checkpoint("run")["lit_rlft"]["num_rounds"] == 4
    assert all(value.isfinite().all() for value in weights("run").values())
    events = EventAccumulator("runs/run").Reload()
    for tag in ("train/loss", "train/accepted_reward", "train/grad_norm"):
        values = [event.value for event in events.Scalars(tag)]
        assert len(values) == 4 and all(map(math.isfinite, values))


def test_a_budget_ends_the_fit_with_the_round_that_spends_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # 8 conditions, 4 candidates, 3 steps: 96 denoiser calls of sampling and 2 x 8 of training.
    budget = {"trainer.callbacks+": "lit_rlft.callbacks.budget.Budget", "trainer.max_epochs": 9}
    lines = {"trainer.enable_progress_bar": None}  # instead of bars, which a log has not
    gaussian("fit", "run", budget | {"trainer.callbacks.denoiser_calls": 113} | lines)
    spent = checkpoint("run")["lit_rlft"]
    assert spent["num_rounds"] == 2 and spent["cost"]["denoiser_calls"] == 224
    facts, *rounds = capsys.readouterr().out.splitlines()
    assert facts.endswith("cpu 32-true; up to 18 rounds; until 113 denoiser calls")
    rounds = [line.split(":")[0] for line in rounds if line.startswith("round ")]
    assert rounds == ["round 1", "round 2"]


def test_a_long_fit_prints_lines_at_even_distances_and_one_at_its_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_rlft.callbacks.facts._MAX_LINES", 3)
    length = {"trainer.max_epochs": 7, "trainer.limit_train_batches": 1}
    gaussian("fit", "run", length | {"trainer.enable_progress_bar": None})
    rounds = [line for line in capsys.readouterr().out.splitlines() if line.startswith("round ")]
    assert [line.split(":")[0] for line in rounds] == [f"round {i} of 7" for i in (3, 5, 7)]


METHODS = ("drtune", "draft", "draft_lv", "align_prop", "refl")
each_method = pytest.mark.parametrize("method", METHODS)
QUADRATIC = {
    "reward": "domains.gaussian_mixture.rewards.Quadratic",
    "model.init_args.sampler.num_steps": 4,
    "model.init_args.minibatch_size": 8,
}
SHORT = {"drtune": {"model.init_args.method.init_args.m": 2}}
SHORT["refl"] = SHORT["drtune"]


def gradients(stage: str, method: str, name: str, settings: dict[str, Any] | None = None) -> None:
    main(by_gradient(stage, method, name, settings or {}))


def by_gradient(stage: str, method: str, name: str, settings: dict[str, Any]) -> list[str]:
    configs = (GAUSSIAN[0], f"configs/algorithms/{method}.yaml")
    short = SHORT.get(method, {})
    return arguments(stage, configs, TINY, QUADRATIC, short, {"name": name}, settings)


@pytest.mark.parametrize(
    "method",
    [
        # All methods draw from one stream, which starts anew with every update.
        pytest.param(m, marks=[] if m in ("drtune", "refl") else pytest.mark.slow)
        for m in METHODS
    ],
)
def test_reward_gradients_resume_bit_by_bit(method: str) -> None:
    gradients("fit", method, "whole", {"trainer.max_epochs": 2})
    gradients("fit", method, "run", {"trainer.max_epochs": 1})
    last = "runs/run/checkpoints/last.ckpt"
    gradients("fit", method, "run", {"trainer.max_epochs": 2, "ckpt_path": last})
    assert_equal(weights("run"), weights("whole"))


@each_method
def test_reward_gradients_run_in_bf16(method: str) -> None:
    half = {"trainer.precision": "bf16-mixed"}
    gradients("fit", method, "run", half)
    trained = weights("run")
    assert all(value.isfinite().all() for value in trained.values())
    assert any(value.any() for key, value in trained.items() if "lora_B" in key)
    gradients("test", method, "run", {**half, "ckpt_path": "runs/run/checkpoints/last.ckpt"})
    written = report(Path("runs/run"))
    assert written["algorithm"].lower() == method.replace("_", "")
    assert written["gain"]["Quadratic"]["mean"] != 0


@pytest.mark.parametrize(
    "method",
    [pytest.param(method, marks=pytest.mark.slow) for method in METHODS],
)
def test_reward_gradients_of_two_processes_are_those_of_one(method: str) -> None:
    several = {"model.init_args.minibatch_size": 3, "trainer.limit_val_batches": 0}
    gradients("fit", method, "one", several)
    gradients("fit", method, "two", {**several, **TWO_FORKS})
    one, two = weights("one"), weights("two")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-7)


def test_the_pull_on_each_step_reaches_tensorboard() -> None:
    every = {"model.init_args.log_depth": True, "trainer.log_every_n_steps": 1}
    gradients("fit", "align_prop", "run", every)
    events = EventAccumulator("runs/run")
    events.Reload()
    names = [tag for tag in events.Tags()["scalars"] if "grad_norm_at_step/" in tag]
    assert "train/grad_norm_at_step/001" in names
    assert all(event.value > 0 for event in events.Scalars("train/grad_norm_at_step/001"))
