"""What a resumed fit must share with the run before it, and what it says of the rest."""

import json
import math
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.cli import main
from lit_rlft.loop.hooks import Hooks
from lit_rlft.loop.resume import list_of_samples
from tests.support import (
    TINY_MIXTURE,
    arguments,
    assert_equal,
    checkpoint,
    scalars,
    working_directory,
)

DOMAIN = "gaussian_mixture"
LAST = "runs/run/checkpoints/last.ckpt"
GOING_ON = {"trainer.max_epochs": 2, "ckpt_path": LAST}


def fit(settings: dict[str, Any], algorithm: str = "p_graft") -> None:
    main(arguments("fit", (DOMAIN, algorithm), TINY_MIXTURE, settings))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    with working_directory(folder):
        fit({})
    return folder / "runs"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """Work beside a copy of the finished run; return its folder."""
    shutil.copytree(finished, tmp_path / "runs")
    with working_directory(tmp_path):
        yield Path("runs/run")


SCHEDULE = {
    "model.init_args.lr_scheduler": "torch.optim.lr_scheduler.LinearLR",
    "model.init_args.lr_scheduler.total_iters": 10,
}


def test_a_test_by_another_algorithm_has_the_same_adapter(run: Path) -> None:
    """Below another class nothing is compared, but for how strong the adapter is."""
    settings = TINY_MIXTURE | {"ckpt_path": LAST, "model.lora.alpha": 64}
    with pytest.raises(SystemExit, match=r"LoRA of alpha 8, not 64; set .*lora\.alpha to 8"):
        main(arguments("test", (DOMAIN, "graft"), settings))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the lines that are logged about a resumed run."""
    lines: list[str] = []
    monkeypatch.setattr("lit_rlft.loop.resume.rank_zero_info", lines.append)
    return lines


@pytest.mark.parametrize(
    ("settings", "algorithm", "reason"),
    [
        ({}, "graft", "is of a run of PGRAFT, which GRAFT cannot go on with"),
        ({"model.lora.alpha": 16}, "p_graft", r"LoRA of alpha 8, not 16; set .*lora\.alpha to 8"),
        ({"model.lora.rank": 4}, "p_graft", "holds other trained weights"),
        ({"pipeline.residual_width": 8}, "p_graft", "was tuned from other weights"),
        ({"model.optimizer": "torch.optim.SGD"}, "p_graft", "state of AdamW .*SGD cannot go on"),
        (SCHEDULE, "p_graft", "had no learning-rate schedule and this one has one"),
    ],
)
def test_what_would_mix_two_runs_is_refused(
    run: Path, settings: dict[str, Any], algorithm: str, reason: str
) -> None:
    before = (run / "checkpoints/last.ckpt").read_bytes()
    with pytest.raises(SystemExit, match=f"^lit-rlft: error: the checkpoint[^\n]*{reason}"):
        fit(GOING_ON | settings, algorithm)
    assert (run / "checkpoints/last.ckpt").read_bytes() == before


def test_other_settings_are_listed_and_apply(run: Path, said: list[str]) -> None:
    other = {
        "reward": "Quadratic",
        "data.batch_size": 4,
        "model.num_candidates": 8,
        "model.optimizer.lr": 0.01,
        "model.seed": 3,
        "model.num_eval_samples": 1,  # changes no update, and is not listed
    }
    fit(GOING_ON | other)
    (line,) = [one for one in said if "resuming with other settings" in one]
    assert line.partition("settings: ")[2] == (
        "data.batch_size 8 -> 4, model.num_candidates 4 -> 8, model.optimizer.lr 0.0001 -> 0.01, "
        "model.seed 0 -> 3, reward Coordinate -> Quadratic"
    )
    (group,) = checkpoint("run")["optimizer_states"][0]["param_groups"]
    assert group["lr"] == 0.01
    assert checkpoint("run")["lit_rlft"]["settings"]["model.num_candidates"] == 8


def test_settings_of_several_numbers_and_of_torchs_schedules_apply(
    tmp_path: Path, said: list[str]
) -> None:
    schedule = "torch.optim.lr_scheduler.CosineAnnealingLR"
    start = {"model.optimizer": "torch.optim.AdamW", "model.optimizer.lr": 0.01}
    start |= {"model.lr_scheduler": schedule, "model.lr_scheduler.T_max": 10}
    with working_directory(tmp_path):
        fit(start)
        other = {"model.optimizer.betas": [0.5, 0.99], "model.lr_scheduler.T_max": 1000}
        fit(start | GOING_ON | other)
        (line,) = [one for one in said if "resuming with other settings" in one]
        for change in ("betas.0 0.9 -> 0.5", "betas.1 0.999 -> 0.99", "T_max 10 -> 1000"):
            assert change in line
        ended = checkpoint("run")
        (group,) = ended["optimizer_states"][0]["param_groups"]
        assert tuple(group["betas"]) == (0.5, 0.99)
        assert ended["lr_schedulers"][0]["T_max"] == 1000


@pytest.mark.parametrize(
    ("kind", "first", "then", "line", "rate"),
    [
        (
            "OneCycleLR",
            {"max_lr": 1.0, "total_steps": 8},
            {"total_steps": 16, "pct_start": 0.5},
            "pct_start 0.3 -> 0.5, model.lr_scheduler.total_steps 8 -> 16",
            (1 + math.cos(math.pi / 8)) / 2,
        ),
        ("MultiStepLR", {"milestones": [99]}, {"milestones": [8]}, "milestones.0 99 -> 8", 1e-3),
    ],
)
def test_the_rates_are_those_of_the_new_schedule(
    tmp_path: Path,
    said: list[str],
    kind: str,
    first: dict[str, Any],
    then: dict[str, Any],
    line: str,
    rate: float,
) -> None:
    """The first schedule would end with the eighth update, or wait for the ninety-ninth."""
    key = "model.lr_scheduler"
    start = {key: f"torch.optim.lr_scheduler.{kind}", "model.optimizer.lr": 0.01}
    start |= {f"{key}.{name}": value for name, value in first.items()}
    with working_directory(tmp_path):
        fit(start)
        fit(start | {f"{key}.{name}": value for name, value in then.items()} | GOING_ON)
        (told,) = [one for one in said if "other settings" in one]
        assert line in told
        (group,) = checkpoint("run")["optimizer_states"][0]["param_groups"]
        assert checkpoint("run")["lr_schedulers"][0]["last_epoch"] == 8
        assert group["lr"] == pytest.approx(rate, rel=1e-6)


def test_other_data_and_parts_of_rewards_are_listed(tmp_path: Path, said: list[str]) -> None:
    start = {
        "reward": "lit_rlft.core.reward.WeightedSum",
        "reward.rewards": {"a": {"class_path": "Coordinate"}, "b": {"class_path": "Quadratic"}},
    }
    center = {"class_path": "Quadratic", "init_args": {"center": [0.0, 2.0]}}
    other = {
        "data.num_train": 24,
        "data.stds": [0.2, 0.25, 0.2, 0.25, 0.5],
        "reward.limits": {"a": [None, 5.0]},
        "reward.rewards": start["reward.rewards"] | {"b": center},
    }
    with working_directory(tmp_path):
        fit(start)
        fit(start | GOING_ON | other)
    (line,) = [one for one in said if "other settings" in one]
    assert line.partition("settings: ")[2] == (
        "data.num_train 16 -> 24, data.stds.4 0.2 -> 0.5, reward.limits.a.0 not set -> None, "
        "reward.limits.a.1 not set -> 5.0, reward.rewards.b.center.1 0.0 -> 2.0"
    )


def test_a_checkpoint_that_names_attributes_alone_brings_no_news(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions named no argument of which no attribute has the name."""
    with working_directory(tmp_path):
        with monkeypatch.context() as patch:
            patch.setattr("lit_rlft.core.settings._record", lambda *_: {})
            fit({})
        content = checkpoint("run")
        assert "data.num_train" not in content["lit_rlft"]["settings"]
        del content["lit_rlft"]["num_train_rows"]
        torch.save(content, LAST)
        fit(GOING_ON)
        assert said == []
        assert checkpoint("run")["lit_rlft"]["settings"]["data.num_train"] == 16


def test_the_same_settings_are_no_news(
    run: Path, capfd: pytest.CaptureFixture[str], said: list[str]
) -> None:
    fit(GOING_ON)
    text = "".join([*capfd.readouterr(), *said])
    assert "settings" not in text and "nothing left" not in text


def test_a_scheduled_rate_keeps_its_place(run: Path) -> None:
    start = SCHEDULE | {"model.init_args.lr_scheduler.start_factor": 0.5}
    fit(start | {"name": "slow"})
    (before,) = checkpoint("slow")["optimizer_states"][0]["param_groups"]
    twice = {"name": "slow", "model.optimizer.lr": 0.0002, "trainer.max_epochs": 2}
    last = {"ckpt_path": "runs/slow/checkpoints/last.ckpt", "trainer.limit_train_batches": 0}
    fit(start | twice | last | {"trainer.limit_train_batches": 1.0})
    (after,) = checkpoint("slow")["optimizer_states"][0]["param_groups"]
    assert (before["initial_lr"], after["initial_lr"]) == (1e-4, 2e-4)
    updates = [4, 8]
    rates = [base * (0.5 + 0.05 * n) for base, n in zip((1e-4, 2e-4), updates, strict=True)]
    assert [before["lr"], after["lr"]] == pytest.approx(rates)


def test_an_older_checkpoint_resumes_and_that_is_said(run: Path, said: list[str]) -> None:
    content = checkpoint("run")
    for name in ("settings", "algorithm"):  # new in 0.2.0
        del content["lit_rlft"][name]
    torch.save(content, LAST)
    fit(GOING_ON)
    assert any("an older version, which does not name its settings" in one for one in said)
    assert checkpoint("run")["lit_rlft"]["num_rounds"] == 4


@pytest.mark.parametrize(
    ("limit", "named"),
    [
        ({"trainer.max_epochs": 1}, "--trainer.max_epochs above 1"),
        ({"trainer.max_epochs": 0}, "--trainer.max_epochs above 1"),
        ({"trainer.max_epochs": -1, "trainer.max_steps": 2}, "--trainer.max_steps above "),
        ({"trainer.max_epochs": 9, "trainer.max_time": "00:00:00:00"}, "--trainer.max_time"),
        (
            {
                "trainer.max_epochs": 9,
                "trainer.callbacks+": "lit_rlft.callbacks.budget.Budget",
                "trainer.callbacks.reward_calls": 64,
            },
            "the limit of the callback",
        ),
    ],
)
def test_a_finished_run_says_so(
    run: Path, capsys: pytest.CaptureFixture[str], limit: dict[str, Any], named: str
) -> None:
    fit({"ckpt_path": LAST} | limit)
    said = capsys.readouterr().out
    pattern = rf"nothing left to train: {LAST} is the end of its run \(round 2\); raise .*{named}"
    assert re.search(pattern, said), said
    assert checkpoint("run")["lit_rlft"]["num_rounds"] == 2


BUDGET = {"trainer.callbacks+": "lit_rlft.callbacks.budget.Budget"}
LONG = {"data.num_train": 32, "trainer.max_epochs": 2}
"""Two epochs of four rounds, each of two updates and 32 reward calls."""


def end(name: str) -> dict[str, Any]:
    """Return the numbers that a run ends with, but for times and what validations have seen."""
    content = checkpoint(name)
    del content["lit_rlft"]["cost"]["seconds"]
    for text in ("settings", "algorithm", "pipeline", "pretrained"):
        del content["lit_rlft"][text]
    kept = {k: content[k] for k in ("state_dict", "optimizer_states", "lit_rlft", "loops")}
    del kept["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]  # one more validation
    return kept


@pytest.mark.parametrize(
    ("limit", "more", "rounds"),
    [
        (BUDGET | {"trainer.callbacks.reward_calls": 80}, {}, 3),
        (BUDGET | {"trainer.callbacks.reward_calls": 130}, {"trainer.limit_val_batches": 0}, 5),
        (BUDGET | {"trainer.callbacks.reward_calls": 64}, {"trainer.val_check_interval": 2}, 2),
        (BUDGET | {"trainer.callbacks.reward_calls": 128}, {}, 4),
        ({"trainer.max_steps": 5}, {}, 3),
        ({"trainer.max_steps": 12}, {"trainer.val_check_interval": 2}, 6),
    ],
)
def test_a_run_that_a_limit_ends_in_an_epoch_goes_on_in_it(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    limit: dict[str, Any],
    more: dict[str, Any],
    rounds: int,
) -> None:
    """Lightning alone would count the epoch as a whole one, and go on in the next."""
    with working_directory(tmp_path):
        fit(LONG | more | {"name": "whole"})
        fit(LONG | more | limit)
        assert checkpoint("run")["lit_rlft"]["num_rounds"] == rounds
        capsys.readouterr()
        fit(LONG | more | {"ckpt_path": LAST})
        said = capsys.readouterr().out
        assert f"{8 - rounds} of 8 rounds to come" in said
        assert_equal(end("run"), end("whole"))
        ends = [
            {k: v for k, v in scalars(n).items() if k[:6] == "train/"} for n in ("run", "whole")
        ]
        assert_equal(*ends)


def test_the_best_of_a_run_that_a_limit_ended_goes_on_in_its_epoch(tmp_path: Path) -> None:
    """It was saved by the validation that a stop brings."""
    with working_directory(tmp_path):
        fit(LONG | {"name": "whole"})
        fit(LONG | BUDGET | {"trainer.callbacks.reward_calls": 80})
        (best,) = Path("runs/run/checkpoints").glob("epoch*.ckpt")
        fit(LONG | {"ckpt_path": str(best)})
        assert_equal(end("run"), end("whole"))


def test_in_the_middle_of_an_epoch_batches_keep_their_size(tmp_path: Path) -> None:
    """That place is a number of batches: of another size they would be other rows."""
    smaller = LONG | {"ckpt_path": LAST, "data.batch_size": 4}
    middle = r"middle of an epoch, after 3 batches of 8 rows, and .*batch_size is 4; set it to 8 "
    with working_directory(tmp_path):
        fit(LONG | BUDGET | {"trainer.callbacks.reward_calls": 80})
        with pytest.raises(SystemExit, match=middle):
            fit(smaller)
        fit(LONG | {"ckpt_path": LAST, "trainer.max_epochs": 1})
        fit(smaller)
        assert checkpoint("run")["lit_rlft"]["num_rounds"] == 4 + 8


def test_in_the_middle_of_an_epoch_data_keep_their_number_of_rows(tmp_path: Path) -> None:
    """The order of more rows is another one, and so are the batches that are still to come."""
    more = LONG | {"ckpt_path": LAST, "data.num_train": 48}
    middle = (
        r"middle of an epoch, after 3 batches of data of 32 rows, and the training data have 48 "
        r"now; give them 32 rows until"
    )
    with working_directory(tmp_path):
        fit(LONG | BUDGET | {"trainer.callbacks.reward_calls": 80})
        with pytest.raises(SystemExit, match=middle):
            fit(more)
        fit(LONG | {"ckpt_path": LAST, "trainer.max_epochs": 1})
        fit(more)
        assert checkpoint("run")["lit_rlft"]["num_rounds"] == 4 + 6


class FailsInRound(Hooks):
    """Stops a run where a round has drawn and scored everything, and not yet trained."""

    def on_phase_end(self, module: LightningModule, name: str, num_samples: int) -> None:
        assert isinstance(module, RewardFineTuner)
        if name == "collect" and module.num_rounds == 2:
            raise RuntimeError("a fault of its own")


@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        (
            "p_graft",
            {
                "reward": "lit_rlft.core.reward.WeightedSum",
                "reward.rewards": {"a": {"class_path": "Coordinate"}},
                "reward.normalize": True,
            },
        ),
        ("nft", {}),
        ("ddpo", {"model.advantage": "lit_rlft.core.advantage.RunningAdvantage"}),
    ],
)
def test_a_round_that_fails_is_counted_and_learnt_from_once(
    tmp_path: Path, algorithm: str, more: dict[str, Any]
) -> None:
    failing = {"trainer.callbacks+": "tests.cli.test_resume.FailsInRound"}
    long = LONG | {"trainer.max_epochs": 1} | more
    with working_directory(tmp_path):
        fit(long | {"name": "whole"}, algorithm)
        with pytest.raises(SystemExit, match="a fault of its own"):
            fit(long | failing, algorithm)
        assert checkpoint("run")["lit_rlft"]["num_rounds"] == 2
        fit(long | {"ckpt_path": LAST}, algorithm)
        assert_equal(end("run"), end("whole"))


def test_the_last_checkpoint_is_no_link(tmp_path: Path) -> None:
    """Lightning's would be one to an older file, where nothing newer was asked for."""
    refused = pytest.raises(SystemExit, match=r"error: checkpoint\.save_last must be true or false")
    with working_directory(tmp_path), refused:
        fit({"checkpoint.save_last": "link"})


def test_a_finished_run_in_a_new_folder_brings_its_checkpoint(run: Path) -> None:
    """What is tested there is the model that is exported there."""
    average = {"trainer.callbacks+": "lit_rlft.callbacks.ema.EMA"}
    fit(average | {"name": "other"})
    fit(average | {"name": "new", "ckpt_path": "runs/other/checkpoints/last.ckpt"})
    assert_equal(end("new"), end("other"))
    assert (Path("runs/new/tuned")).is_dir()
    before = Path(LAST).read_bytes()
    fit({"ckpt_path": "runs/other/checkpoints/last.ckpt"})  # a checkpoint is never replaced by it
    assert Path(LAST).read_bytes() == before


@pytest.mark.parametrize("name", ["max_epochs", "limit_train_batches"])
def test_a_fit_that_is_asked_for_nothing_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with working_directory(tmp_path):
        fit({f"trainer.{name}": 0})
    assert f"nothing was trained: trainer.{name} is 0; raise it" in capsys.readouterr().out


def test_a_measurement_that_is_asked_for_nothing_is_refused(tmp_path: Path) -> None:
    limits = {"validate": "limit_val_batches", "test": "limit_test_batches"}
    limits |= {"predict": "limit_predict_batches"}
    with working_directory(tmp_path):
        for stage, limit in limits.items():
            nothing = rf"trainer\.{limit} is 0, so {stage} would do nothing; raise it"
            with pytest.raises(SystemExit, match=nothing):
                main(arguments(stage, (DOMAIN, "graft"), TINY_MIXTURE | {f"trainer.{limit}": 0}))


def test_last_starts_anew_where_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with working_directory(tmp_path):
        fit({"ckpt_path": "last"})
        said = capsys.readouterr().out
        assert "checkpoint: none yet in runs/run/checkpoints; the fit starts anew" in said
        assert checkpoint("run")["lit_rlft"]["num_rounds"] == 2


def test_weights_alone_are_tested_but_not_resumed(tmp_path: Path) -> None:
    with working_directory(tmp_path):
        fit({"checkpoint.save_weights_only": True})
        main(arguments("test", (DOMAIN, "p_graft"), TINY_MIXTURE))
        with pytest.raises(SystemExit, match=r"holds weights alone .*save_weights_only false"):
            fit(GOING_ON)


def test_weights_alone_are_the_average_of_a_run_that_has_one(tmp_path: Path) -> None:
    average = {"trainer.callbacks+": "EMA", "trainer.callbacks.decay": 0.5}
    average |= {"model.optimizer.lr": 0.01}
    with working_directory(tmp_path):
        fit(average | {"name": "whole"})
        fit(average | {"checkpoint.save_weights_only": True})
        whole, alone = checkpoint("whole"), checkpoint("run")
        (kept,) = [own for name, own in whole["callbacks"].items() if name.startswith("EMA")]
        assert_equal([*alone["state_dict"].values()], kept["average"])
        pairs = zip(whole["state_dict"].values(), kept["average"], strict=True)
        assert any((raw != average).any() for raw, average in pairs)
        metrics = []
        for name in ("whole", "run"):
            main(arguments("test", (DOMAIN, "p_graft"), TINY_MIXTURE, {"name": name}))
            metrics.append(json.loads(Path(f"runs/{name}/metrics.json").read_text())["tuned"])
        assert_equal(*metrics)


def test_a_test_with_other_settings_says_so_and_leaves_the_card(run: Path, said: list[str]) -> None:
    """The card holds the settings of the fit."""
    card = run / "tuned/README.md"
    before = card.read_text()
    other = {"model.cut": 0.75, "data.seed": 1, "data.eval_batch_size": 3, "model.num_epochs": 7}
    main(arguments("test", (DOMAIN, "p_graft"), TINY_MIXTURE, other))
    assert said == [
        "drawing with other settings than the fit had: data.seed 0 -> 1, model.cut 0.25 -> 0.75"
    ]
    assert card.read_text() == before
    main(arguments("test", (DOMAIN, "p_graft"), TINY_MIXTURE))
    assert len(said) == 1 and card.read_text() != before


def test_what_changes_time_and_memory_alone_is_no_other_sample(said: list[str]) -> None:
    before = {"pipeline.compile": "whole", "reward.batch_size": 32, "reward.a.num_workers": 1}
    now = {"pipeline.compile": None, "reward.batch_size": 8, "reward.a.num_workers": 0}
    assert list_of_samples(before, now) == "" and not said
    assert list_of_samples({"reward.k": 1}, {"reward.k": 2}) == "reward.k 1 -> 2"


def test_updates_alone_end_a_fit_that_they_are_given_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in Lightning they lift the limit of epochs, which is one by default."""
    updates = {key: TINY_MIXTURE[key] for key in TINY_MIXTURE if key != "trainer.max_epochs"}
    words = arguments("fit", (DOMAIN, "p_graft"), updates, {"trainer.limit_train_batches": 1})
    with working_directory(tmp_path):
        main([*words, "--trainer.max_steps=9"])
        whole = checkpoint("run")["lit_rlft"]
        assert "until the round of update 9" in capsys.readouterr().out
        each = whole["num_updates"] // whole["num_rounds"]
        assert whole["num_updates"] - each < 9 <= whole["num_updates"]
        main([*words, "--trainer.max_steps=9", "--trainer.max_epochs=1", "--name=both"])
        assert "until the round of update 9 or for 1 round" in capsys.readouterr().out
        assert checkpoint("both")["lit_rlft"]["num_rounds"] == 1
        main([*words, "--name=none"])
        assert checkpoint("none")["lit_rlft"]["num_rounds"] == 1


def test_fewer_rows_than_a_batch_are_one_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with working_directory(tmp_path):
        fit({"data.num_train": 4, "data.batch_size": 32})
        assert "1 round; 16 reward calls to come" in capsys.readouterr().out
        assert checkpoint("run")["lit_rlft"]["cost"]["reward_calls"] == 16


def test_a_seed_that_moves_nothing_is_told(tmp_path: Path) -> None:
    with working_directory(tmp_path):
        with pytest.warns(UserWarning, match=r"seed_everything 7 .*--model\.seed 7 --data\.seed 7"):
            fit({"seed_everything": 7})
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "seed_everything")
            fit({"seed_everything": 7, "model.seed": 1, "name": "other"})


def test_a_run_that_ends_with_weights_alone_does_not_say_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = {"trainer.callbacks+": "tests.cli.test_resume.FailsInRound"}
    with working_directory(tmp_path):
        with pytest.raises(SystemExit, match="a fault of its own"):
            fit(LONG | failing | {"checkpoint.save_weights_only": True})
        assert "to go on" not in (said := capsys.readouterr().out)
        assert re.search(r"last\.ckpt holds weights alone, from which test and predict work", said)


@pytest.mark.parametrize(
    ("monitor", "more", "reason"),
    [
        ("test/Coordinate", {}, "a test is no part of a fit"),
        ("val/Coordinate", {"trainer.limit_val_batches": 0}, "this fit has no validation"),
        ("train/rewards", {}, "there are .*train/reward"),
        ("val/Cordinate", {}, "there are val/Coordinate, "),
        ("Coordinate", {}, "there are val/Coordinate, "),
    ],
)
def test_what_is_never_logged_is_not_monitored(
    tmp_path: Path, monitor: str, more: dict[str, Any], reason: str
) -> None:
    with working_directory(tmp_path):
        with pytest.raises(SystemExit, match=f"monitor {monitor} is never logged: {reason}"):
            fit({"checkpoint.monitor": monitor} | more)
        # Names are known after the first round or validation, before which all rounds are saved.
        assert Path(LAST).exists() == (reason[:9] == "there are")
        if Path(LAST).exists():
            rounds = 1 if monitor == "train/rewards" else 2
            assert checkpoint("run")["lit_rlft"]["num_rounds"] == rounds


def test_a_checkpoint_cannot_have_files_deleted(run: Path) -> None:
    content, victim = checkpoint("run"), Path("victim").resolve()
    (victim / "inner").mkdir(parents=True)
    for name, state in content["callbacks"].items():
        if name.startswith("LastCheckpoint"):
            del state["dirpath"]  # then Lightning takes its own
            # Not of the protocol "file", and so removed with all that is in it.
            state["best_model_path"] = state["last_model_path"] = f"local://{victim}"
    torch.save(content, LAST)
    fit(GOING_ON)
    assert (victim / "inner").is_dir()
