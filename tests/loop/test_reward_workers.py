"""Rewards in workers: the same numbers, in less time, and what becomes of workers that are lost."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Quadratic
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.algorithms.graft import PGRAFT
from lit_rlft.algorithms.noise_ppo import NoisePPO
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward, WeightedSum
from lit_rlft.core.sampling import Sampler
from lit_rlft.evaluation.evaluator import Evaluator
from lit_rlft.loop.scoring import Scoring
from lit_rlft.loop.side.rewards import RewardWorkers, SideReward, begin, side_rewards
from lit_rlft.loop.side.worker import SideProcess, SideThread
from tests.loop.side_rewards import Dies, Hangs, Raises, Starts, Sums
from tests.support import assert_equal, trainer_of

THREADS = RewardWorkers(kind="thread")
ALGORITHMS: dict[str, tuple[type[RewardFineTuner], dict[str, Any]]] = {
    "p_graft": (PGRAFT, {}),
    "gdpo": (DDPO, {"sampler": Sampler(3, eta=1.0), "decoupled_rewards": True}),
    "noise_ppo": (NoisePPO, {}),
}


def both(normalize: bool = False) -> WeightedSum:
    parts: dict[str, Reward] = {"a": Sums(), "b": Sums(0.3), "held": Sums(2.0)}
    return WeightedSum(parts, {"b": 0.5}, held_out=["held"], normalize=normalize)


def tuner_of(
    reward: Reward,
    workers: RewardWorkers | None = None,
    cls: type[RewardFineTuner] = PGRAFT,
    **settings: Any,
) -> RewardFineTuner:
    torch.manual_seed(1)
    pipeline = GaussianMixturePipeline(
        schedule="rectified_flow", prediction_type="velocity", residual_width=4
    )
    given = {"sampler": Sampler(3), "sampling_batch_size": 5, "minibatch_size": 8} | settings
    return cls(pipeline, reward, reward_workers=workers, **given)


def fit(tuner: RewardFineTuner, **settings: Any) -> RewardFineTuner:
    data = MixtureData(num_train=8, batch_size=4, num_val=2, num_test=2)
    with tempfile.TemporaryDirectory() as folder:  # for tuned/
        given = {"limit_val_batches": 1, "default_root_dir": folder, **settings}
        trainer_of(**given).fit(tuner, data)
    return tuner


def logged(tuner: RewardFineTuner) -> dict[str, Tensor]:
    """Return what was logged, without times."""
    found = tuner.trainer.logged_metrics
    return {name: value for name, value in found.items() if not name.startswith("time/")}


def points(num: int = 7) -> tuple[Tensor, Condition]:
    generator = torch.Generator().manual_seed(2)
    condition = GaussianMixturePipeline().example().repeat(num)
    return torch.randn(num, 2, generator=generator), condition


Beside = Callable[..., SideReward]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def beside() -> Iterator[Beside]:
    made: list[SideReward] = []

    def side(reward: Reward, **settings: Any) -> SideReward:
        found = RewardWorkers(**settings).beside(reward, rank=0)
        assert isinstance(found, SideReward)
        made.append(found)
        return found

    yield side
    for one in made:
        one.stop()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_is_the_same_to_the_last_bit(name: str) -> None:
    cls, settings = ALGORITHMS[name]
    plain = fit(tuner_of(both(), None, cls, **settings), limit_train_batches=1)
    aside = fit(tuner_of(both(), THREADS, cls, **settings), limit_train_batches=1)
    assert_equal(plain.trainable().state_dict(), aside.trainable().state_dict())
    assert_equal(logged(plain), logged(aside))
    assert len(side_rewards(aside.reward)) == 3
    times = aside.trainer.logged_metrics
    assert times["time/reward_hidden"] >= 0 and times["time/reward_waited"] > 0
    settings_of = [
        {key: value for key, value in own._settings().items() if "reward_workers" not in key}
        for own in (plain, aside)
    ]
    assert settings_of[0] == settings_of[1]


def test_a_process_has_the_same_numbers_and_ends_with_the_run(beside: Beside) -> None:
    samples, condition = points()
    side, plain = beside(Sums()), Sums()
    assert_equal(side(samples, condition), plain(samples, condition))
    assert_equal(side.evaluate(samples, condition), plain.evaluate(samples, condition))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        values = side(samples, condition)
        assert_equal(values, plain(samples, condition))
    assert values.tolist() != plain(samples, condition).tolist()  # half precision arrived there
    side.double()
    assert_equal(side(samples.double(), condition), plain.double()(samples.double(), condition))
    worker = side.worker
    assert isinstance(worker, SideProcess) and alive(worker.pid)
    side.stop()
    assert not alive(worker.pid)


def test_a_process_starts_where_a_notebook_searches_in_a_path(
    beside: Beside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    samples, condition = points()
    assert_equal(beside(Sums())(samples, condition), Sums()(samples, condition))


class Points(Tensor):
    """Samples of a class of one's own."""


@pytest.mark.parametrize("module", ["__main__", "tests.loop.nowhere"])
def test_samples_of_a_class_that_a_process_lacks_are_refused(
    module: str, beside: Beside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the main script, or of a notebook; and one that is not to be found here either."""
    monkeypatch.setattr(Points, "__module__", module)
    monkeypatch.setattr(sys.modules["__main__"], "Points", Points, raising=False)
    samples, condition = points()
    refused = r"^samples and conditions cannot be sent .*(Points|nowhere).*\.kind to thread"
    with pytest.raises(UsageError, match=refused):
        beside(Sums())(samples.as_subclass(Points), condition)


class Meets(Reward):
    """Answers once somebody else is there too."""

    def __init__(self, barrier: threading.Barrier) -> None:
        super().__init__()
        self.barrier = barrier

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        self.barrier.wait(20)
        return samples[:, 0]


def test_the_next_chunk_is_drawn_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = threading.Barrier(2)
    tuner, decode = tuner_of(Meets(barrier), THREADS), GaussianMixturePipeline.decode
    chunks: list[int] = []

    def met(pipeline: Any, x_0: Tensor, condition: Condition) -> Tensor:
        if chunks:  # the reward of the chunk before waits for this one to be drawn
            barrier.wait(20)
        chunks.append(len(x_0))
        return decode(pipeline, x_0, condition)

    monkeypatch.setattr(GaussianMixturePipeline, "decode", met)
    release = threading.Timer(0, lambda: None)

    def last(self: Any, *args: Any) -> Any:
        nonlocal release
        release = threading.Timer(0.2, barrier.wait, [20])
        release.start()
        return finish(self, *args)

    finish = Scoring.finish
    monkeypatch.setattr(Scoring, "finish", last)
    fit(tuner, limit_train_batches=1, limit_val_batches=0)
    release.join()
    assert chunks == [5, 5, 5, 1]
    assert tuner.trainer.logged_metrics["train/failed_rewards"] == 0
    assert tuner.trainer.logged_metrics["time/reward_waited"] > 0.1


@pytest.mark.parametrize("normalize", [False, True])
def test_a_test_is_the_same_to_the_last_bit(
    normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several batches, with the baselines; and it scores while further samples are drawn."""
    waiting: list[int] = []
    take = Evaluator._take

    def taken(evaluator: Any, drawn: Any) -> None:
        waiting.append(len(evaluator._waiting))
        take(evaluator, drawn)

    monkeypatch.setattr(Evaluator, "_take", taken)
    found = {}
    for workers in (None, RewardWorkers(kind="thread", ahead=1)):
        tuner = tuner_of(both(normalize), workers, best_of=2, num_eval_samples=3)
        data = MixtureData(num_train=8, batch_size=4, num_test=6, eval_batch_size=2)
        trainer_of().fit(tuner, data)
        waiting.clear()
        trainer_of().test(tuner, data, verbose=False)
        arms = tuner.evaluator.measurements.arms
        found[workers] = {a: {**m.columns(), "rows": m.all_rows()} for a, m in arms.items()}
        # The newest six samples wait, and none beside them: more than a chunk of five would.
        assert waiting == ([0] * 12 if workers is None else [1] * 11 + [0])
    assert found[None].keys() == {"tuned", "reference", "best_of_2_samples", "best_of_2_noise"}
    assert_equal(*found.values())


def test_an_evaluation_is_scored_while_the_reference_is_drawn() -> None:
    drawn = threading.Event()

    class Waits(Reward):
        def forward(self, samples: Any, condition: Condition) -> Tensor:
            assert drawn.wait(20)
            return samples[:, 0]

    tuner = tuner_of(Waits(), THREADS)
    reference_route = tuner.reference_route

    def route() -> Any:
        found = reference_route()
        walk = found.walk

        class Told(type(found)):  # type: ignore[misc]
            def walk(self, *args: Any) -> Iterator[Any]:
                yield from walk(*args)
                drawn.set()

        return Told(found.process, found.prior, found.legs, found.eta)

    tuner.reference_route = route  # type: ignore[method-assign]
    data = MixtureData(num_train=8, batch_size=4, num_val=2, num_test=2)
    trainer_of(limit_val_batches=1).validate(tuner, data, verbose=False)
    assert drawn.is_set() and tuner.trainer.logged_metrics["val/Waits"].isfinite()


def test_parts_are_scored_side_by_side() -> None:
    barrier = threading.Barrier(2)
    reward = THREADS.beside(WeightedSum({"a": Meets(barrier), "b": Meets(barrier)}), rank=0)
    samples, condition = points()
    begin(reward, "forward", samples, condition)
    assert_equal(reward(samples, condition), 2 * samples[:, 0])
    for side in side_rewards(reward):
        side.stop()


def test_sampling_waits_where_rewards_are_too_far_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[int] = []
    take = Scoring._take
    monkeypatch.setattr(
        Scoring, "_take", lambda self: waiting.append(len(self._waiting)) or take(self)
    )
    fit(tuner_of(Sums(), RewardWorkers(kind="thread", ahead=2)), limit_train_batches=1)
    assert waiting == [3, 3, 2, 1]


def test_what_hangs_is_left_out_and_the_run_goes_on(tmp_path: Path) -> None:
    reward = Hangs([2], str(tmp_path / "calls"))
    workers = RewardWorkers(kind="thread", timeout=0.2)
    with pytest.warns(UserWarning, match=r"Hangs gave no answer within 0.2 s; 5 samples are left"):
        tuner = fit(tuner_of(reward, workers), limit_train_batches=1, limit_val_batches=0)
    assert tuner.trainer.logged_metrics["train/failed_rewards"] == pytest.approx(5 / 16)


def test_an_error_of_a_reward_is_the_runs_and_leaves_nothing_behind(tmp_path: Path) -> None:
    tuner = tuner_of(Raises([2], str(tmp_path / "calls")), THREADS)
    with pytest.warns(UserWarning, match="fail"), pytest.raises(UsageError, match="other samples"):
        fit(tuner)
    assert [side.worker for side in side_rewards(tuner.reward)] == [None]
    fit(tuner, limit_train_batches=1)  # and another run can start


@pytest.mark.slow  # a process is started again four times
def test_a_process_that_dies_is_started_again(tmp_path: Path, beside: Beside) -> None:
    samples, condition = points()
    side = beside(Dies([1, 3, 4, 6, 7], str(tmp_path / "calls")), restarts=4)
    with pytest.warns(UserWarning, match=r"Dies ended with status 3; 7 samples are scored once"):
        assert_equal(side(samples, condition), Sums()(samples, condition))
    with pytest.warns(UserWarning, match=r"7 samples are left out, .* \(3 of 4 times\)"):
        assert side(samples, condition).isnan().all()
    assert side.num_restarts == 3
    assert_equal(side(samples, condition), Sums()(samples, condition))
    with (
        pytest.warns(UserWarning, match="scored once more"),
        pytest.raises(UsageError, match="started again 4 times already; fix the reward"),
    ):
        side(samples, condition)


@pytest.mark.slow
def test_a_process_that_hangs_is_ended(tmp_path: Path, beside: Beside) -> None:
    samples, condition = points()
    side = beside(Hangs([1], str(tmp_path / "calls")), timeout=120)
    side.start()
    while side.worker is None:
        time.sleep(0.1)
    first = side.worker
    first.ask, ask = lambda call, timeout: ask(call, 0.5), first.ask  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"no answer within 0.5 s; 7 samples are left out"):
        found = side.evaluate(samples, condition)
    assert found.keys() == {"Hangs"} and found["Hangs"].isnan().all()
    assert isinstance(first, SideProcess)
    assert not alive(first.pid)
    assert_equal(side(samples, condition), Sums()(samples, condition))


@pytest.mark.slow
def test_what_a_process_has_started_ends_with_it(beside: Beside) -> None:
    side = beside(Starts())
    number = int(side(*points())[0])
    assert alive(number)
    side.stop()
    assert _until(lambda: not alive(number), 10)


@pytest.mark.slow
def test_errors_and_warnings_of_a_process_arrive(tmp_path: Path, beside: Beside) -> None:
    side = beside(Raises([1], str(tmp_path / "calls")))
    with pytest.raises(UsageError, match="give this reward other samples"):
        side(*points())
    assert_equal(side(*points()), Sums()(*points()))


def test_a_reward_that_only_waits_has_a_thread_in_either_case(beside: Beside) -> None:
    reward = Sums()
    reward.waits = True
    side = beside(reward)
    assert_equal(side(*points()), Sums()(*points()))
    assert isinstance(side.worker, SideThread)


REFUSED: dict[str, tuple[Callable[[], RewardFineTuner], str]] = {
    "gradients": (
        lambda: tuner_of(Quadratic(), THREADS, RewardGradient),
        "reward_workers must be null for DRTune.*p_graft.yaml or ddpo.yaml",
    ),
    "part": (
        lambda: tuner_of(both(), RewardWorkers(parts=["c"])),
        r"parts names \['c'\], but the reward has \['a', 'b', 'held'\]",
    ),
    "no parts": (
        lambda: tuner_of(Sums(), RewardWorkers(parts=["a"])),
        r"parts names \['a'\], but the reward has Sums alone",
    ),
    "closure": (
        lambda: tuner_of(Held(lambda: None), RewardWorkers()),
        "Held cannot be sent to a side process .* set model.init_args.reward_workers.kind to thr",
    ),
    "normalised gradients": (
        lambda: tuner_of(WeightedSum({"a": Quadratic()}, normalize=True), None, RewardGradient),
        "normalize takes all those of a round; set it to false and give reward.init_args.ranges",
    ),
}


class Held(Sums):
    """Holds something that cannot be pickled."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_drawn(case: str) -> None:
    make, sentence = REFUSED[case]
    with pytest.raises(UsageError, match=sentence):
        fit(make())


@pytest.mark.parametrize(
    "settings", [{"ahead": 0}, {"timeout": 0}, {"restarts": -1}, {"devices": ["nowhere"]}]
)
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(settings))} must be"):
        RewardWorkers(**settings)


def test_devices_are_shared_out_over_processes_and_parts() -> None:
    workers = RewardWorkers(kind="thread", devices=["cpu", "cpu:0", "meta"])
    reward = workers.beside(both(), rank=1)
    assert [side.device for side in side_rewards(reward)] == ["cpu", "cpu:0", "meta"]
    chosen = RewardWorkers(kind="thread", parts=["b"], devices=["cpu", "meta"]).beside(both(), 3)
    (side,) = side_rewards(chosen)
    assert side.device == "meta" and side.inner.scale == 0.3
    for one in (*side_rewards(reward), side):
        one.stop()


@pytest.mark.slow  # a command of its own, killed in three ways
@pytest.mark.parametrize("sent", ["SIGKILL", "SIGTERM", "two SIGINT"])
def test_no_process_outlives_its_run(sent: str, tmp_path: Path) -> None:
    words = [
        "--config=gaussian_mixture", "--config=p_graft", "--data.num_train=64",
        "--data.batch_size=4", "--model.sampler.num_steps=3", "--trainer.accelerator=cpu",
        "--model.reward_workers.kind=process", "--reward=tests.loop.side_rewards.Sleeps",
        "--reward.seconds=0.5", "--model.sampling_batch_size=4", f"--root={tmp_path}",
    ]  # fmt: skip
    run = subprocess.Popen(
        [sys.executable, "-m", "lit_rlft", "fit", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        side = next(pid for pid in _until(lambda: _children(run.pid), 120) if alive(pid))
        _until(lambda: len(_children(run.pid)) == 1 and any(tmp_path.iterdir()), 120)
        time.sleep(3)
        number = getattr(signal, sent.split()[-1])
        for _ in range(2 if sent.startswith("two") else 1):
            run.send_signal(number)
            time.sleep(0.5)
        assert run.wait(120) != 0
    finally:
        run.kill()
    assert _until(lambda: not alive(side), 20)


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task").glob("*/children")
                for child in child.read_text().split()]  # fmt: skip
    except OSError:
        return []


def _until(found: Callable[[], Any], seconds: float) -> Any:
    """Wait until something is so, and return it."""
    end = time.monotonic() + seconds
    while not (value := found()) and time.monotonic() < end:
        time.sleep(0.1)
    return value
