"""Operations by hand, books by phase, and what a sample costs."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixtureDenoiser, GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.algorithms.inverse_noise_correction import InverseNoiseCorrection
from lit_rlft.callbacks.cost_meter import CostMeter
from lit_rlft.core.corrector import _MLP
from lit_rlft.core.sampling import Sampler
from lit_rlft.cost.counters import Cost, count_calls, count_flops, flop_counter
from lit_rlft.loop.reference import LoRA
from tests.support import trainer_of
from tests.test_distributed import processes

COUNTS = ("samples", "denoiser_calls", "prior_calls", "reward_calls", "flops")

# The mixture's residual network: 2 + 4 inputs, 64, 64, 2; its mixture: responsibilities of five
# components times their means [5, 2], twice. (Products of a matrix and a vector do not count.)
MIXTURE = 2 * (6 * 64 + 64 * 64 + 64 * 2) + 2 * (5 * 2 * 2)


def counted(network: nn.Module, *inputs: Any) -> int:
    cost = Cost()
    count_flops(network, lambda: cost)
    network(*inputs)
    return cost.flops


def test_a_linear_layer_costs_two_per_weight_and_row() -> None:
    layer = nn.Linear(5, 7)
    assert counted(layer, torch.randn(3, 5)) == 3 * 2 * 5 * 7
    assert counted(nn.Linear(5, 7, bias=False), torch.randn(2, 3, 5)) == 2 * 3 * 2 * 5 * 7


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_costs_two_per_weight_and_output_pixel(stride: int) -> None:
    layer = nn.Conv2d(3, 8, 3, stride=stride, padding=1)
    pixels = (6 // stride) * (10 // stride)
    assert counted(layer, torch.randn(2, 3, 6, 10)) == 2 * pixels * 2 * 3 * 8 * 9


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_attention_costs_its_two_products() -> None:
    """Also on a CPU, where torch's own counter leaves them out."""
    batch, heads, tokens, width = 2, 4, 12, 16
    x = torch.randn(batch, heads, tokens, width)
    assert counted(Attention(), x) == batch * heads * 2 * (2 * tokens * tokens * width)


def test_operations_are_measured_once_per_shape_whatever_the_number_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured = []

    def recorded() -> Any:
        measured.append(None)
        return flop_counter()

    monkeypatch.setattr("lit_rlft.cost.counters.flop_counter", recorded)
    cost, network = Cost(), nn.Linear(4, 4)
    count_flops(network, lambda: cost)
    for shape in ((0, 4), (2, 4), (3, 4), (2, 5, 4), (2, 4), (1, 5, 4)):
        network(torch.randn(shape))
    assert cost.flops == (2 + 3 + 10 + 2 + 5) * 2 * 4 * 4
    assert len(measured) == 2


def test_an_adapter_counts_where_it_is_switched_on() -> None:
    network = nn.Sequential(nn.Linear(6, 10))
    network = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), network)
    layer = next(m for m in network.modules() if isinstance(m, BaseTunerLayer))
    cost = Cost()
    count_flops(network, lambda: cost)
    plain, update = 2 * 6 * 10, 2 * 2 * (6 + 10)
    for disabled, expected in [(False, plain + update), (True, plain), (False, plain + update)]:
        layer._disable_adapters = disabled
        before = cost.flops
        network(torch.randn(3, 6))
        assert cost.flops - before == 3 * expected


def test_gradients_pass_and_a_failed_call_counts_nothing_later() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.failing = nn.Linear(3, 3), True

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            if self.failing:
                raise ValueError
            return x

    network, cost = Fails(), Cost()
    count_flops(network, lambda: cost)
    x = torch.randn(2, 3)
    with pytest.raises(ValueError):
        network(x)
    network.failing = False
    spent = cost.flops
    expected = torch.autograd.grad(network.layer(x).sum(), network.layer.weight)[0]
    loss = network(x).sum()
    assert torch.equal(torch.autograd.grad(loss, network.layer.weight)[0], expected)
    assert cost.flops - spent == 2 * 2 * 3 * 3
    torch.ones(4, 4) @ torch.ones(4, 4)
    assert cost.flops - spent == 2 * 2 * 3 * 3


def test_counting_leaves_training_alone() -> None:
    """Gradients under autocast, which keeps casts of weights; dropout's noise; modes of layers."""
    network = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4))
    network[2].eval()
    torch.manual_seed(1)
    x = torch.randn(3, 4)
    torch.manual_seed(2)
    expected = network(x)
    cost = Cost()
    count_flops(network, lambda: cost)
    torch.manual_seed(2)
    torch.testing.assert_close(network(x), expected, rtol=0, atol=0)
    assert [part.training for part in network] == [True, True, False]
    with torch.autocast("cpu", torch.bfloat16):
        network(torch.randn(2, 4)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
    assert cost.flops == (3 + 2) * 2 * 2 * 4 * 4 and cost.counting_seconds > 0


class OfLists(nn.Linear):
    """A layer on rows of several lengths, which it fills up to the longest."""

    def forward(self, rows: Any) -> Tensor:
        return super().forward(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))


def test_rows_in_a_list_count_as_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def recorded() -> Any:
        measured.append(None)
        return flop_counter()

    monkeypatch.setattr("lit_rlft.cost.counters.flop_counter", recorded)
    cost, network = Cost(), OfLists(4, 4)
    count_calls(network, lambda: cost)
    count_flops(network, lambda: cost)
    for lengths in ((3, 5), (5, 1, 2), (5, 5), (2,)):
        network([torch.randn(length, 4) for length in lengths])
    assert cost.denoiser_calls == 2 + 3 + 2 + 1
    assert cost.flops == (7 * 5 + 2) * 2 * 4 * 4
    assert len(measured) == 2


def test_calls_and_operations_go_to_the_counters_of_the_moment() -> None:
    first, second, network = Cost(), Cost(), nn.Linear(2, 2)
    now = first
    count_calls(network, lambda: now)
    count_calls(network, lambda: now, "prior_calls")
    count_flops(network, lambda: now)
    network(torch.randn(3, 2))
    now = second
    network(torch.randn(5, 2))
    assert (first.denoiser_calls, second.denoiser_calls) == (3, 5)
    assert (first.prior_calls, second.prior_calls) == (3, 5)
    assert (first.flops, second.flops) == (3 * 8, 5 * 8)


def run(tuner: RewardFineTuner, folder: Path) -> CostMeter:
    """Train one round of four rows and test eight samples; return the books."""
    meter = CostMeter()
    quiet = {"limit_val_batches": 1, "num_sanity_val_steps": 0}
    trainer = trainer_of(default_root_dir=folder, callbacks=[meter], **quiet)
    data = MixtureData(num_train=4, num_val=2, num_test=4, batch_size=4)
    trainer.fit(tuner, data)
    trainer.test(tuner, data, verbose=False)
    return meter


@pytest.mark.parametrize("merge", [True, False])
def test_books_of_graft_are_those_by_hand(tmp_path: Path, merge: bool) -> None:
    lora = LoRA(2, 2, merge_for_sampling=merge)
    settings: dict[str, Any] = {"num_candidates": 3, "num_eval_samples": 2, "lora": lora}
    started = time.monotonic()
    meter = run(
        GRAFT(GaussianMixturePipeline(), Coordinate(), sampler=Sampler(5), **settings), tmp_path
    )
    whole = time.monotonic() - started
    report = meter.report()
    update = 2 * 2 * (6 + 64 + 64 + 64 + 64 + 2)  # LoRA of rank 2 on the three layers
    books = report["phases"]
    collect, learn = books["train"]["collect"], books["train"]["update"]
    assert collect["denoiser_calls"] == 4 * 3 * 5 and collect["reward_calls"] == 12
    assert collect["flops"] == 4 * 3 * 5 * MIXTURE
    assert collect["samples"] == 4 * 3 and learn["samples"] == 0
    assert learn["denoiser_calls"] == 4 and learn["flops"] == 4 * (MIXTURE + update)
    assert set(books["validate"]) == {"sample_tuned", "sample_reference", "measure"}
    assert books["test"]["sample_tuned"]["samples"] == 8
    assert report["denoiser_calls_per_sample"] == {"tuned": 5, "reference": 5}
    tuned = MIXTURE if merge else MIXTURE + update
    assert report["flops_per_sample"] == {"tuned": 5 * tuned, "reference": 5 * MIXTURE}
    seconds = [spent["seconds"] for page in books.values() for spent in page.values()]
    assert all(second > 0 for second in seconds) and sum(seconds) < whole


def test_a_corrector_costs_beside_its_base(tmp_path: Path) -> None:
    pipeline = GaussianMixturePipeline(schedule="rectified_flow", prediction_type="velocity")
    settings: dict[str, Any] = {"width": 16, "depth": 2, "corrector_steps": 3}
    tuner = InverseNoiseCorrection(pipeline, Coordinate(), sampler=Sampler(5), **settings)
    report = run(tuner, tmp_path).report()
    corrector = 2 * ((2 + 1 + 16) * 16 + 16 * 16 + 16 * 2)
    assert report["flops_per_sample"] == {
        "reference": 5 * MIXTURE,
        "tuned": 5 * MIXTURE + 3 * corrector,
    }
    assert report["denoiser_calls_per_sample"] == {"tuned": 5, "reference": 5}
    assert report["prior_calls_per_sample"] == {"tuned": 3, "reference": 0}
    invert, learn = (report["phases"]["train"][name] for name in ("invert", "update"))
    assert invert["flops"] == invert["denoiser_calls"] * MIXTURE > 0
    assert learn["flops"] == 4 * corrector and learn["denoiser_calls"] == 0
    assert learn["prior_calls"] == 4 and invert["prior_calls"] == 0


def test_counting_is_not_part_of_the_seconds_of_either_arm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which a row takes the base 1, the corrector 0.25, and counting 1000 a shape."""
    clock = [0.0]

    def takes(network: type[nn.Module], seconds: float) -> None:
        forward = network.forward

        def slow(self: Any, x_t: Tensor, *args: Any) -> Tensor:
            clock[0] += seconds * len(x_t)
            return forward(self, x_t, *args)

        monkeypatch.setattr(network, "forward", slow)

    def counter() -> Any:
        clock[0] += 1000
        return flop_counter()

    takes(GaussianMixtureDenoiser, 1.0)
    takes(_MLP, 0.25)
    monkeypatch.setattr("lit_rlft.cost.counters.flop_counter", counter)
    monkeypatch.setattr("lit_rlft.cost.counters.now", lambda: clock[0])
    monkeypatch.setattr("lit_rlft.callbacks.cost_meter.now", lambda: clock[0])
    pipeline = GaussianMixturePipeline(schedule="rectified_flow", prediction_type="velocity")
    settings: dict[str, Any] = {"corrector_steps": 3, "sampling_batch_size": 5}
    tuner = InverseNoiseCorrection(pipeline, Coordinate(), sampler=Sampler(6), **settings)
    report = run(tuner, tmp_path).report()
    assert report["seconds_per_sample"] == {"tuned": 6 + 3 * 0.25, "reference": 6}


def test_the_log_of_a_round_by_a_clock_on_which_a_row_takes_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    logged: dict[str, float] = {}
    forward = GaussianMixtureDenoiser.forward

    def slow(self: Any, x_t: Tensor, *args: Any) -> Tensor:
        clock[0] += len(x_t)
        return forward(self, x_t, *args)

    def counter() -> Any:
        clock[0] += 1000
        return flop_counter()

    monkeypatch.setattr(GaussianMixtureDenoiser, "forward", slow)
    monkeypatch.setattr("lit_rlft.cost.counters.flop_counter", counter)
    monkeypatch.setattr("lit_rlft.cost.counters.now", lambda: clock[0])
    monkeypatch.setattr("lit_rlft.callbacks.cost_meter.now", lambda: clock[0])
    monkeypatch.setattr("lit_rlft.callbacks.cost_meter.peak_of", lambda device: 1000.0)
    settings: dict[str, Any] = {"num_candidates": 3, "num_eval_samples": 1, "lora": LoRA(2, 2)}
    tuner = GRAFT(GaussianMixturePipeline(), Coordinate(), sampler=Sampler(5), **settings)
    monkeypatch.setattr(tuner, "log", lambda name, value, **_: logged.setdefault(name, value))
    run(tuner, tmp_path)
    found = {name: logged[name] for name in sorted(logged) if name.startswith("time/")}
    assert found.pop("time/elapsed") > 0  # by the real clock
    # 4 conditions x 3 candidates x 5 steps without gradient, and 4 accepted samples with one.
    adapter, mixture = 2 * (6 + 64 + 64 + 64 + 64 + 2), 5 * (1 + 2 + 1)
    numbers = (6 + 1) * 64 + (64 + 1) * 64 + (64 + 1) * 2 + mixture + adapter
    flops = 60 * MIXTURE + 4 * (MIXTURE + 2 * adapter) * (2 + adapter / numbers)
    assert found == {
        "time/collect": 60.0,
        "time/collect_ms_per_sample": 5000.0,
        "time/denoiser_rows_per_second": 1.0,
        "time/mfu": pytest.approx(flops / 64 / 1000, rel=1e-6),
        "time/samples_per_second": 12 / 64,
        "time/update": 4.0,
        "time/update_ms_per_sample": pytest.approx(4000 / 12),
    }


def test_books_go_on_after_a_checkpoint(tmp_path: Path) -> None:
    meter = run(
        GRAFT(GaussianMixturePipeline(), Coordinate(), sampler=Sampler(2), num_candidates=2),
        tmp_path,
    )
    restored = CostMeter()
    restored.load_state_dict(meter.state_dict())
    assert restored.report() == meter.report()
    tuner: Any = GRAFT(GaussianMixturePipeline(), Coordinate())
    restored.on_test_start(tuner, tuner)
    assert set(restored.report()["phases"]) == {"train", "validate"}
    assert restored.report()["flops_per_sample"] == {}


def test_books_are_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of a checkpoint, which each process reads; seconds are those of the first."""

    def work(rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
        trainer: Any = SimpleNamespace(is_global_zero=rank == 0, world_size=2)
        meter = CostMeter()
        meter.setup(trainer, trainer, "test")
        held = {"seconds": 5.0, **dict.fromkeys(COUNTS, 100.0)}
        meter.load_state_dict({"train": {"collect": held}})
        own = {"seconds": 2.0 + rank, **dict.fromkeys(COUNTS, 4.0 + rank)}
        meter.books["test"] = {"sample_tuned": own}
        if rank:  # a phase that the first process did not have
            meter.books["test"]["measure"] = own
        return meter.report(), meter.state_dict()

    (report, state), _ = processes(monkeypatch, 2, work)
    expected = {
        "train": {"collect": {"seconds": 5.0, **dict.fromkeys(COUNTS, 100)}},
        "test": {
            "sample_tuned": {"seconds": 2.0, **dict.fromkeys(COUNTS, 9)},
            "measure": {"seconds": 0.0, **dict.fromkeys(COUNTS, 5)},
        },
    }
    assert report["phases"] == expected and state == expected
    assert report["denoiser_calls_per_sample"] == {"tuned": 1.0}
    assert report["seconds_per_sample"] == {"tuned": 2.0 / 4}
