"""A LoRA merged for sampling: the same predictions, fewer kernels, and weights that come back."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.algorithms.graft import PGRAFT
from lit_rlft.callbacks.ema import EMA
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.sampling import Sampler
from lit_rlft.cost.counters import Cost, count_flops
from lit_rlft.kit.compiled import compile_network
from lit_rlft.loop.adapter import AdapterSwitch, Merge
from lit_rlft.loop.reference import LoRA, Reference, adapt
from tests.support import assert_equal, trainer_of

RANK, ALPHA = 2, 6


class Network(nn.Module):
    """Layers of each kind that a LoRA adapts."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.point = nn.Conv2d(4, 4, 1)
        self.linear = nn.Linear(4, 4)
        self.other = nn.Linear(4, 4)
        if tied:
            self.other.weight = self.linear.weight

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        hidden = self.point(self.conv(x).relu()).mean(dim=(2, 3)) + self.table(rows)
        return self.other(self.linear(hidden).tanh())


TARGETS = ["table", "conv", "point", "linear"]


class Made:
    """A network with a LoRA whose update is not zero, its reference, and a call."""

    def __init__(self, merge: Merge = "auto", dtype: torch.dtype = torch.float32, **kind: Any):
        torch.manual_seed(0)
        self.pipeline = GaussianMixturePipeline()
        self.pipeline.denoiser = self.network = Network(**kind).to(dtype)
        self.before = copy.deepcopy(self.network)
        self.x, self.rows = torch.randn(2, 3, 4, 4).to(dtype), torch.tensor([1, 4])
        lora = LoRA(RANK, ALPHA, TARGETS, merge_for_sampling=merge)
        self.reference: Reference = adapt(self.pipeline, lora, 0)
        self.adapter: AdapterSwitch = self.reference.adapter
        for name, parameter in self.network.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)

    def __call__(self) -> Tensor:
        return self.network.eval()(self.x, self.rows)

    def weights(self) -> dict[str, Tensor]:
        """Return the pretrained weights as they lie in the network now, under their own names."""
        own = self.network.state_dict()
        return {n.replace(".base_layer", ""): v for n, v in own.items() if "lora_" not in n}

    def by_hand(self) -> Tensor:
        """Return the prediction of W + (alpha / rank) B A, in double precision."""
        plain, own = copy.deepcopy(self.before).double(), self.network.state_dict()
        for name in TARGETS:
            kind = "embedding_" if name == "table" else ""
            a, b = (
                next(
                    v.double() for n, v in own.items() if n.startswith(f"{name}.lora_{kind}{part}")
                )
                for part in "AB"
            )
            update = (b.flatten(1) @ a.flatten(1)) * ALPHA / RANK
            weight = getattr(plain, name).weight
            update = update.T if name == "table" else update.view(weight.shape)
            weight.data += update
        return plain(self.x.double(), self.rows)


@contextmanager
def operations() -> Iterator[list[str]]:
    """Record the operations of a block."""

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kw or {}))

    names: list[str] = []
    with Recorded():
        yield names


@pytest.mark.parametrize(("init", "std"), [("uniform", 1 / 48**0.5), ("gaussian", 1 / 32)])
def test_the_half_that_is_not_zero_is_drawn_as_asked(init: Any, std: float) -> None:
    """Of 16 inputs and rank 32: uniform within 1 / 4, or normal."""
    pipeline = GaussianMixturePipeline()
    pipeline.denoiser = nn.Sequential(nn.Linear(16, 8), nn.Conv2d(16, 8, 1))
    adapt(pipeline, LoRA(32, targets=["0", "1"], init=init), seed=0)
    for layer in pipeline.denoiser:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert not b.any() and float(a.std()) == pytest.approx(std, rel=0.1)
        assert (float(a.abs().max()) <= 0.25) and (init == "uniform") == (float(a.max()) > 0.2)


@torch.no_grad()
def test_predictions_stay_and_weights_come_back() -> None:
    made = Made()
    apart, places = made(), [p.data_ptr() for p in made.network.parameters()]
    assert_equal(made.weights(), made.before.state_dict())
    with operations() as plain, made.reference.active():
        pretrained = made()
    with operations() as many:
        made()
    with made.adapter.merged(made):
        assert made.adapter.is_merged
        with operations() as few:
            merged = made()
        with made.reference.active():
            with operations() as off:
                reference = made()
            assert_equal(reference, pretrained)
            assert_equal(made.weights(), made.before.state_dict())
        assert_equal(made(), merged)
        with made.adapter.merged(made):  # once is enough
            assert_equal(made(), merged)
        assert [p.data_ptr() for p in made.network.parameters()] == places
    for found in (merged, apart):
        torch.testing.assert_close(found.double(), made.by_hand(), rtol=1e-5, atol=1e-6)
    assert few == off == plain and len(many) >= len(few) + 3 * len(TARGETS)
    assert (apart - pretrained).abs().max() > 0.05
    assert_equal(made(), apart)
    with pytest.raises(RuntimeError, match="midst"), made.adapter.merged(made):
        raise RuntimeError("in the midst")
    assert_equal(made.weights(), made.before.state_dict())
    assert_equal(made(), apart)


@pytest.mark.parametrize("merge", ["auto", True, False])
@torch.no_grad()
def test_auto_merges_where_no_digit_is_lost(merge: Merge) -> None:
    def merges(made: Made) -> bool:
        with made.adapter.merged(made):
            return made.adapter.is_merged

    asked = merge is True
    assert merges(Made(merge)) == bool(merge)
    assert merges(Made(merge, torch.bfloat16)) == asked
    made = Made(merge)
    with torch.autocast("cpu", torch.bfloat16):
        assert merges(made) == asked
        with made.adapter.merged(made), torch.autocast("cpu", enabled=False):
            # The update was not rounded, wherever it was merged.
            torch.testing.assert_close(made().double(), made.by_hand(), rtol=1e-5, atol=1e-6)
    with torch.enable_grad():
        assert not merges(made)
    with made.reference.active():
        assert not merges(made)
    torch.set_float32_matmul_precision("high")
    try:
        assert merges(Made(merge)) == asked
    finally:
        torch.set_float32_matmul_precision("highest")


@torch.no_grad()
def test_what_would_predict_something_else_stays_apart() -> None:
    good, wrong = Made(), Made(tied=True)  # merging changes a layer that has no LoRA
    with good.adapter.merged(good):
        assert good.adapter.is_merged
    apart = wrong()
    warned = pytest.warns(UserWarning, match=r"not merged .* differ by \d.*; set model\S+ to f")
    with warned, wrong.adapter.merged(wrong):
        assert not wrong.adapter.is_merged
        assert_equal(wrong(), apart)
    with wrong.adapter.merged(wrong):
        assert_equal(wrong(), apart)


@torch.no_grad()
def test_weights_that_are_shared_out_are_not_merged() -> None:
    class Sharded(nn.Parameter):
        pass

    for merge in ("auto", True):
        made = Made(merge)
        layer: Any = made.network.linear
        layer.base_layer.weight = Sharded(layer.base_layer.weight.detach(), requires_grad=False)
        if merge == "auto":
            with made.adapter.merged(made):
                assert not made.adapter.is_merged
            continue
        refused = pytest.raises(UsageError, match="must be auto or false where processes share out")
        with refused, made.adapter.merged(made):
            pass


@torch.no_grad()
def test_merging_compiles_nothing_and_is_counted_as_it_is() -> None:
    made, cost = Made(), Cost()
    count_flops(made.network, lambda: cost)
    torch._dynamo.reset()
    compile_network(made.network, "whole", backend="eager")
    with made.reference.active():
        pretrained = made()
    counted, graphs = cost.flops, int(counters["stats"]["unique_graphs"])
    with made.adapter.merged(made):
        cost.flops = 0
        merged = made()
        assert (merged - pretrained).abs().max() > 0.05 and cost.flops == counted
        with made.reference.active():
            assert_equal(made(), pretrained)
    assert graphs > 0 and int(counters["stats"]["unique_graphs"]) == graphs
    torch._dynamo.reset()


class Watched(GaussianMixturePipeline):
    """The mixture; it writes down which calls find the adapter merged."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        super().__init__(schedule="rectified_flow", prediction_type="velocity", residual_width=8)
        self.tuner: tuple[RewardFineTuner, ...] = ()  # not a module of this one
        self.merged: dict[str, list[bool]] = {"train": [], "val": []}

    def predict(self, x_t: Any, t: Tensor, condition: Condition) -> Any:
        (tuner,) = self.tuner
        adapter = tuner.reference.adapter
        if not adapter._off and (trainer := tuner._trainer) is not None:
            self.merged["train" if trainer.training else "val"].append(adapter.is_merged)
        return super().predict(x_t, t, condition)


def fit(cls: type[RewardFineTuner], merge: Merge, *callbacks: Any, **settings: Any) -> Any:
    pipeline, lora = Watched(), LoRA(2, merge_for_sampling=merge)
    given = {"sampler": Sampler(4), "minibatch_size": 8, "lora": lora, "num_eval_samples": 2}
    tuner = cls(pipeline, Coordinate(), **{**given, **settings})
    pipeline.tuner = (tuner,)
    data = MixtureData(num_train=16, batch_size=8, num_val=4, num_test=4)
    trainer = trainer_of(max_epochs=2, limit_val_batches=1, callbacks=list(callbacks))
    trainer.fit(tuner, data)
    return tuner


@pytest.mark.parametrize(
    ("cls", "settings", "train"),
    [
        (PGRAFT, {"iterative": True, "cut": 0.5}, True),
        (PGRAFT, {}, False),  # rounds are drawn from the reference
        (DDPO, {"sampler": Sampler(4, eta=1.0)}, False),
    ],
)
def test_rounds_that_need_log_probabilities_are_drawn_apart(
    cls: type[RewardFineTuner], settings: dict[str, Any], train: bool
) -> None:
    tuner = fit(cls, "auto", **settings)
    merged = tuner.pipeline.merged
    assert (True in merged["train"]) == train
    assert True in merged["val"] and merged["val"].count(False) <= 1  # parity is checked
    base = {n: p for n, p in tuner.pipeline.denoiser.named_parameters() if "lora_" not in n}
    before = {n: p for n, p in Watched().denoiser.named_parameters()}
    assert {n.replace(".base_layer", "") for n in base} == before.keys()
    for name, value in base.items():
        assert_equal(value, before[name.replace(".base_layer", "")])
    again, apart = fit(cls, "auto", **settings), fit(cls, False, **settings)
    assert_equal(again.trainable().state_dict(), tuner.trainable().state_dict())
    for name, value in apart.trainer.logged_metrics.items():
        if name.startswith(("val", "train")):
            assert_equal(again.trainer.logged_metrics[name], tuner.trainer.logged_metrics[name])
            torch.testing.assert_close(
                again.trainer.logged_metrics[name], value, rtol=1e-3, atol=1e-4
            )


def test_an_average_is_merged_where_it_is_evaluated() -> None:
    settings = {"optimizer": lambda weights: torch.optim.SGD(weights, lr=5.0)}
    found = {
        (merge, averaged): float(
            fit(PGRAFT, merge, *([EMA(0.5)] if averaged else []), **settings)
            .trainer.logged_metrics["val/kl"]
        )
        for merge in ("auto", False)
        for averaged in (True, False)
    }  # fmt: skip
    for averaged in (True, False):
        assert found["auto", averaged] == pytest.approx(found[False, averaged], rel=1e-3)
    assert found["auto", True] != pytest.approx(found["auto", False], rel=0.05)


def test_a_pipeline_that_names_no_layers_is_told_where_to() -> None:
    pipeline = GaussianMixturePipeline(residual_width=8)
    pipeline.lora_targets = ()
    with pytest.raises(UsageError, match=r"says in lora_targets of no layer .* lora to null"):
        adapt(pipeline, LoRA(2, 2), 0)
