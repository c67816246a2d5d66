"""`lit-rlft plan`: its figures against a real fit's, its advice, and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

import lit_rlft.cli.plan as command
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.cli import main
from lit_rlft.cost.plan import GB, Part, Plan, first_change, report
from tests.cost.measured import peak_of
from tests.domains.text_to_image.families.real_sizes import clip_l, klein, sana, sdxl, z_image

LIMITS = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=0"]
BUDGET = ["--trainer.callbacks+=Budget"]
CASES = {
    "p_graft": ["--data.batch_size=8", "--model.minibatch_size=8", "--model.microbatch_size=4"],
    "drtune": [
        "--reward=CLIPScore",
        "--data.batch_size=8",
        "--model.minibatch_size=4",
        "--model.microbatch_size=2",
        "--model.method.m=1",
    ],
    "ddpo": ["--data.batch_size=4", "--model.minibatch_size=8", "--model.microbatch_size=4"],
    "grpo_guard": ["--data.batch_size=4", "--model.minibatch_size=8", "--model.microbatch_size=4"],
}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Return a list that plans made by the command are put into."""
    plans: list[Plan] = []

    def kept(plan: Plan, *card: Any) -> str:
        plans.append(plan)
        return report(plan, *card)

    monkeypatch.setattr(command, "report", kept)
    return plans


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", sorted(CASES))
def test_the_plan_is_what_a_round_of_the_fit_takes(
    algorithm: str, planned: list[Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = "--model.sampler.num_steps=3"
    # Not "auto", which a plan weighs at its least.
    words = ["--config=shapes", f"--config={algorithm}", steps, "--pipeline.decode_batch_size=8"]
    words += [*CASES[algorithm], *LIMITS]
    main(["plan", *words])
    assert not list(tmp_path.iterdir())  # it leaves nothing behind
    measured: list[tuple[int, int, int]] = []
    step = RewardFineTuner.training_step

    def watched(self: RewardFineTuner, *args: Any) -> None:
        kinds = [ProfilerActivity.CPU]
        with profile(activities=kinds, profile_memory=True, acc_events=True) as profiler:
            step(self, *args)
        calls = self.meter.current
        measured.append((peak_of(profiler), calls.denoiser_calls, calls.reward_calls))

    monkeypatch.setattr(RewardFineTuner, "training_step", watched)
    main(["fit", *words, "--trainer.accelerator=cpu", "--name=run"])
    ((plan,), ((peak, denoiser_calls, reward_calls),)) = planned, measured
    # A fit's weights are there before the round.
    assert plan.peak - plan.weights == pytest.approx(peak, rel=0.15)
    assert plan.reward_calls == reward_calls
    # Of accepted pairs some have no advantage; the numbers that stand for rewards have all.
    assert plan.denoiser_calls == pytest.approx(denoiser_calls, rel=0.15)


@pytest.mark.slow
def test_stable_diffusion_xl_of_its_real_size_from_configs_alone(
    planned: list[Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    sdxl(Path("sdxl"))
    clip_l(Path("clip"))
    Path("prompts.txt").write_text("".join(f"a red ring, number {i}\n" for i in range(20)))
    words = ["--pipeline.pretrained=sdxl", "--reward.pretrained=clip"]
    main(["plan", "--config=sdxl", "--config=p_graft", *words, "--memory=12GB"])
    (plan,) = planned
    unet = [part for part in plan.parts if part.name == "denoiser" and not part.trained]
    assert [(round(part.numbers / 1e6, 1), part.dtype) for part in unet] == [(2567.5, "bfloat16")]
    text = capsys.readouterr().out
    assert "does not fit" in text and "change first: --model.sampling_batch_size " in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "write", "million"),
    [
        ("flux2_klein", klein, {"denoiser": 3875.5, "encoder": 4022.5}),
        ("zimage", z_image, {"denoiser": 6154.9, "encoder": 4022.5}),
        ("sana", sana, {"denoiser": 1604.5, "encoder": 2614.3, "vae": 312.3}),
    ],
)
def test_transformers_of_their_real_size_from_configs_alone(
    config: str,
    write: Callable[[Path], Path],
    million: dict[str, float],
    planned: list[Plan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("model"))
    clip_l(Path("clip"))
    Path("prompts.txt").write_text("".join(f"a red ring, number {i}\n" for i in range(20)))
    words = ["--pipeline.pretrained=model", "--reward.pretrained=clip"]
    main(["plan", f"--config={config}", "--config=drtune", *words, "--model.microbatch_size=1"])
    (plan,) = planned
    numbers = {part.name: round(part.numbers / 1e6, 1) for part in plan.parts if not part.trained}
    assert {name: numbers[name] for name in million} == million


METHODS = {
    # T = 8: the number of steps to expect.
    "DRTune": (["--model.method.k=2", "--model.method.m=4"], 8 - 1.5),
    "ReFL": (["--model.method.m=5"], 8 - 2.0),
    "AlignProp": (["--model.method.min_steps=2"], 8.0),
    "DRaFT": (["--model.method.k=3"], 8.0),
}


@pytest.mark.parametrize("method", METHODS)
def test_calls_are_those_to_expect_of_what_is_drawn(
    method: str, planned: list[Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings, steps = METHODS[method]
    words = ["--config=gaussian_mixture", "--config=drtune", "--reward=Quadratic"]
    words += [f"--model.method={method}", *settings, "--model.sampler.num_steps=8"]
    main(["plan", *words, "--data.batch_size=12", "--data.num_train=36", *LIMITS])
    (plan,) = planned
    assert plan.denoiser_calls == plan.reward_calls * steps > 0


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for words, sentence in (
        (["--config=sd15", "--config=p_graft"], r"hf download \S+/\S+ --include"),
        (["--config=shapes", "--config=p_graft", "--memory=much"], "--memory is 'much', but must"),
        (["--config=shapes", "--config=p_graft", "--share=0"], "numbers above 0, got '0'"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            main(["plan", *words])


def made(phases: dict[str, float], **settings: Any) -> Plan:
    parts = [Part("denoiser", "float32", False, 10, 4 * GB), Part("lora", "float32", True, 1, GB)]
    sizes = {name: int(size * GB) for name, size in phases.items()}
    known = {"model.microbatch_size": 1, "model.lora": {}, **settings}
    known = {name.replace("__", "."): value for name, value in known.items()}
    return Plan(parts, 2 * GB, GB, sizes, 10, 100, 5, 36 * 10**14, known)


def test_numbers() -> None:
    plan = made({"sampling": 9, "update": 18})
    assert (plan.weights, plan.standing, plan.activations) == (5 * GB, 7 * GB, 10 * GB)
    assert (plan.peak, plan.peak_phase) == (18 * GB, "update")
    assert plan.hours(1e13, 0.5) == pytest.approx(2.0)
    text = report(plan, 24 * GB, 1e13, 0.5)
    assert "fits: 18.00 GB in update of 24 GB" in text and "2.0 hours at 50% of 10 TFLOP/s" in text


@pytest.mark.parametrize(
    ("phases", "settings", "option"),
    [
        # 7 GB stand, and 1 GB of gradients: 4 of 12 GB are for activations, now 16.
        ({"update": 24}, {"model.microbatch_size": 8}, "--model.microbatch_size 2"),
        ({"update": 24}, {"pipeline__checkpoint_denoiser": False},
         "--pipeline.checkpoint_denoiser true"),
        ({"update": 24}, {"model__gradient_checkpointing": None, "model.method": {}},
         "--model.gradient_checkpointing steps"),
        ({"update": 24}, {"model__gradient_checkpointing": None},
         "--model.gradient_checkpointing blocks"),
        ({"update": 24}, {"model.microbatch_size": "auto"}, None),
        ({"update": 9, "decode": 17}, {"pipeline__decode_batch_size": "auto"}, None),
        ({"update": 24}, {"pipeline__checkpoint_denoiser": True}, None),
        ({"update": 9, "sampling": 17}, {"model__sampling_batch_size": 10},
         "--model.sampling_batch_size 5"),
        ({"update": 9, "decode": 17}, {"pipeline__decode_batch_size": 4},
         "--pipeline.decode_batch_size 2"),
        ({"update": 9, "decode": 17}, {"pipeline__tile_decoder": False},
         "--pipeline.tile_decoder true"),
        ({"update": 24}, {"pipeline__frozen_dtype": "float32"}, "--pipeline.frozen_dtype bfloat16"),
        ({"update": 24}, {"pipeline__guidance_gradient": "both", "model.method": {}},
         "--pipeline.guidance_gradient conditional"),
        ({"update": 24}, {"pipeline__guidance_gradient": "both"}, None),
    ],
)  # fmt: skip
def test_what_to_change_first(
    phases: dict[str, float], settings: dict[str, Any], option: str | None
) -> None:
    assert first_change(made(phases, **settings), 12 * GB) == option


def test_weights_that_do_not_fit_ask_for_a_lora_or_for_half_precision() -> None:
    phases = {"update": 24.0}
    assert first_change(made(phases, model__lora=None), 6 * GB) == "--model.lora.rank 8"
    assert first_change(made(phases, pipeline__frozen_dtype="float32"), 6 * GB) == (
        "--pipeline.frozen_dtype bfloat16"
    )


@pytest.mark.parametrize(
    ("limits", "rounds"),
    [
        (["--trainer.max_epochs=3"], 48),  # of 16 batches
        (["--trainer.max_steps=40", "--trainer.max_epochs=-1"], 40 // 8),  # 64 rows, 2 passes
        (["--trainer.max_steps=41", "--trainer.max_epochs=3"], 6),
        (["--trainer.max_epochs=3", *BUDGET, "--trainer.callbacks.reward_calls=1000"], 4),
        (["--trainer.max_epochs=-1", *BUDGET, "--trainer.callbacks.denoiser_calls=1"], 1),
    ],
)
def test_a_fit_ends_with_the_first_of_its_limits(
    limits: list[str], rounds: int, planned: list[Plan]
) -> None:
    words = ["--config=gaussian_mixture", "--config=graft", "--data.num_train=1024"]
    sizes = ["--data.batch_size=64", "--model.num_candidates=4", "--model.minibatch_size=16"]
    main(["plan", *words, *sizes, "--model.num_epochs=2", "--model.selection=TopK", *limits])
    assert planned[0].rounds == rounds
