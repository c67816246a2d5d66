"""The dial of a tuned model: its ends are the reference and the tuned model, bit by bit."""

import csv

import pytest
import torch

from lit_rlft.algorithms.graft import GRAFT, PGRAFT
from lit_rlft.core.checks import UsageError
from lit_rlft.core.randomness import generators
from lit_rlft.core.state import tensor_of
from lit_rlft.evaluation.dial import Dial, dial_csv, dial_rows, dial_settings
from tests.loop.test_relay import tuner_of


@pytest.mark.parametrize("merge", [True, False])
def test_the_ends_of_the_dial(merge: bool) -> None:
    dial = Dial(lora_scale=[0.0, 1.0, 0.5, 0.5], cut=[0.0, 0.4], start=[0.0])
    tuner = tuner_of(GRAFT, dial=dial)
    tuner.reference.adapter._merge = merge
    condition = tuner.pipeline.encode({"index": torch.arange(6)})

    def drawn(route):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            (x,) = tuner.rollouts.draw(route, condition, range(6), keep=[5])
        return tensor_of(x)

    found = {}
    for setting in dial_settings(dial, tuner.route(), tuner.reference):
        with setting.active():
            found[setting.arm] = drawn(setting.route)
    tuned, reference = drawn(tuner.route()), drawn(tuner.reference_route())
    names = ["lora_scale=0", "lora_scale=1", "lora_scale=0.5", "cut=0", "cut=0.4", "start=0"]
    assert list(found) == names
    for name in ("lora_scale=1", "cut=0", "start=0"):
        assert torch.equal(found[name], tuned), name
    assert torch.equal(found["lora_scale=0"], reference)
    torch.testing.assert_close(found["cut=0.4"], _cut_by_hand(tuner, condition))
    for name in ("lora_scale=0.5", "cut=0.4"):
        assert not torch.equal(found[name], tuned) and not torch.equal(found[name], reference)


def _cut_by_hand(tuner, condition):  # type: ignore[no-untyped-def]
    """Walk three steps with the tuned model and the last two with the reference."""
    process, times = tuner.pipeline.process, tuner.pipeline.process.times(5)
    with torch.no_grad(), tuner.reference.adapter.merged(lambda: torch.zeros(1)):
        x = tuner.prior(condition).sample(generators(range(6)))
        for i in range(5):
            t, s = (level.expand(6) for level in times[i : i + 2])
            predict = tuner.pipeline if i < 3 else tuner.reference
            x = process.transition(predict(x, t, condition), x, t, s, eta=0.0).mean
    return x


def test_settings_have_divergences_of_their_own() -> None:
    dial = Dial(lora_scale=[0.0, 0.5, 1.0])
    tuner = tuner_of(GRAFT, dial=dial, num_eval_samples=1)
    routes = tuner.route(), tuner.reference_route()
    settings = dial_settings(dial, routes[0], tuner.reference)
    tuner.evaluator.start()
    with torch.no_grad():
        tuner.evaluator.run({"index": torch.arange(64)}, 0, *routes, settings=settings)
    kl = {arm: values["kl"]["mean"] for arm, values in tuner.evaluator.summary().items()}
    assert kl["lora_scale=0"] == 0 < kl["lora_scale=0.5"] < kl["tuned"]
    assert kl["lora_scale=1"] == pytest.approx(kl["tuned"], rel=1e-4)


def test_a_relayed_models_own_other_end_stays() -> None:
    tuner = tuner_of(PGRAFT, start=0.4, cut=0.2)
    settings = list(dial_settings(Dial(cut=[0.4], start=[0.0]), tuner.route(), tuner.reference))
    steps = [setting.route.tuned_steps.int().tolist() for setting in settings]
    assert steps == [[0, 0, 1, 0, 0], [1, 1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("dial", "message"),
    [
        ({"lora_scale": [-1.0]}, "lora_scale must be at least 0"),
        ({"cut": [0.5, 1.0]}, r"cut must be in \[0, 1\)"),
        ({"start": [0.95]}, "start must be smaller"),
    ],
)
def test_impossible_values_are_refused(dial: dict[str, list[float]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tuner_of(GRAFT, dial=Dial(**dial))


def test_the_table_has_a_line_for_each_setting() -> None:
    nan, fid = float("nan"), 'fid, "new"'
    summary = {
        "tuned": {"r": {"mean": 1.0, "sem": 0.1}, fid: {"mean": 2.0, "sem": nan}},
        "reference": {"r": {"mean": 0.0, "sem": 0.1}, fid: {"mean": 1.0, "sem": nan}},
        "cut=0.5": {"r": {"mean": 0.5, "sem": 0.1}},
    }
    rows = dial_rows(summary)
    assert rows == [{"setting": "cut", "value": 0.5, "metrics": summary["cut=0.5"]}]
    text = dial_csv(rows, {arm: summary[arm] for arm in ("reference", "tuned")})
    lines = list(csv.DictReader(text.splitlines()))
    assert [line["setting"] for line in lines] == ["reference", "tuned", "cut"]
    assert lines[2] == {
        "setting": "cut", "value": "0.5", "r": "0.5", "r sem": "0.1", fid: "", f"{fid} sem": ""
    }  # fmt: skip
