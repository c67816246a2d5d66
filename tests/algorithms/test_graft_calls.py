"""Who is called, when and for how many rows: the cut, the reference, encoders, guidance."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.algorithms.graft import GRAFT, PGRAFT
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.kit.data import collate
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.reference import LoRA
from tests.algorithms.graft_support import drawn, fit, tuner_of
from tests.support import trainer_of

APART = LoRA(rank=2, merge_for_sampling=False)
"""Merged, the adapter is switched off for the tuned model too, and compared once."""


def calls_of(tuner: PGRAFT) -> list[tuple[str, float, int, bool]]:
    """Record (who, t, rows, with gradients) of every call of the denoiser or its frozen copy."""
    calls: list[tuple[str, float, int, bool]] = []
    setup = tuner.setup

    def recorded(stage: str) -> None:
        setup(stage)
        assert tuner.reference is not None
        modules = {"policy": tuner.pipeline.denoiser, "frozen": tuner.reference.frozen}
        for who, module in modules.items():
            if module is not None:
                module.register_forward_hook(_hook(who, calls, tuner))

    tuner.setup = recorded  # type: ignore[method-assign]
    return calls


def _hook(who: str, calls: list[Any], tuner: PGRAFT) -> Any:
    def record(module: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        for t, num in Counter(inputs[1].tolist()).items():
            disabled = tuner.lora is not None and module.residual.fc1.disable_adapters
            calls.append(("frozen" if disabled else who, t, num, torch.is_grad_enabled()))

    return record


@pytest.mark.parametrize("lora", [None, APART])
@pytest.mark.parametrize(("cut", "cut_step"), [(0.25, 6), (0.5, 4), (0.0, 8), (0.8, 2)])
def test_reference_runs_the_last_steps(
    folder: Path, lora: LoRA | None, cut: float, cut_step: int
) -> None:
    tuner = tuner_of(cut=cut, lora=lora, width=8 if lora else 0)
    calls = calls_of(tuner)
    fit(tuner, default_root_dir=folder)
    assert tuner.cut_step == cut_step
    calls.clear()
    drawn(tuner, 5)
    times = tuner.pipeline.process.times(8).tolist()
    who = ["policy"] * cut_step + ["frozen"] * (8 - cut_step)
    assert calls == [(name, t, 5, False) for name, t in zip(who, times[:-1], strict=True)]
    assert tuner.tau == (times[cut_step] if cut else 0.0)
    assert all(t > tuner.tau for name, t, *_ in calls if name == "policy")


@pytest.mark.parametrize("train_from", ["intermediate", "clean"])
@pytest.mark.parametrize("cut", [0.0, 0.25, 0.5])
def test_only_levels_above_the_cut_are_trained(folder: Path, train_from: Any, cut: float) -> None:
    tuner = tuner_of(cut=cut, train_from=train_from, num_epochs=20)
    calls = calls_of(tuner)
    fit(tuner, 32, default_root_dir=folder)
    trained = np.array([t for _, t, num, grad in calls if grad for _ in range(num)])
    assert len(trained) == 32 * 20 and {who for who, *_, grad in calls if grad} == {"policy"}
    assert trained.min() > cut and trained.max() <= 1
    # Uniform above the cut: Kolmogorov-Smirnov at 99.9 %.
    assert stats.kstest(trained, "uniform", (cut, 1 - cut)).pvalue > 1e-3


@pytest.mark.parametrize("iterative", [False, True])
def test_rejected_samples_cost_nothing_after_selection(folder: Path, iterative: bool) -> None:
    tuner = tuner_of(cut=0.25, num_epochs=3, iterative=iterative, lora=APART, width=8)
    calls = calls_of(tuner)
    run = fit(tuner, 8, 2, default_root_dir=folder)
    accepted = sum(map(len, run.experiences))
    assert accepted == 2 * 8
    assert sum(num for *_, num, grad in calls if grad) == accepted * 3
    rollouts = 2 * 8 * 4
    assert sum(num for *_, num, grad in calls if not grad) == rollouts * 8
    assert tuner.meter.training.denoiser_calls == rollouts * 8 + accepted * 3
    assert tuner.meter.training.reward_calls == tuner.num_samples == rollouts
    own = Counter(who for who, *_, grad in calls if not grad)
    assert own == ({"policy": 2 * 6, "frozen": 2 * 2} if iterative else {"frozen": 2 * 8})


class Brightness(Reward):
    """Mean of the pixels."""

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        return samples.mean(dim=(1, 2, 3))


@pytest.mark.parametrize("guided_loss", [False, True])
def test_prompts_are_encoded_once_per_round(
    tiny_stable_diffusion: Any, folder: Path, guided_loss: bool
) -> None:
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()), guidance_scale=3.0)
    rows: list[int] = []
    pipeline.encoder.register_forward_hook(lambda module, args, out: rows.append(len(out[0])))
    unet: list[tuple[int, bool]] = []
    pipeline.denoiser.register_forward_hook(
        lambda module, args, out: unet.append((len(args[0]), torch.is_grad_enabled()))
    )
    tuner = PGRAFT(
        pipeline,
        Brightness(),
        cut=0.5,
        num_candidates=3,
        sampler=Sampler(4),
        lora=LoRA(rank=2),
        num_epochs=2,
        sampling_batch_size=5,
        guided_loss=guided_loss,
    )
    prompts = ["a ring", "a red cross", "a ring", "a ring"]
    records = [{"index": i, "prompt": prompt} for i, prompt in enumerate(prompts)]
    loader = torch.utils.data.DataLoader(records, batch_size=4, collate_fn=collate)
    trainer_of(max_epochs=2, default_root_dir=folder).fit(tuner, loader)
    assert rows == [3, 3]  # two prompts and the negative one, in each of two rounds
    # Rounds, epochs or steps, accepted samples or candidates; two halves where guided.
    assert sum(num for num, grad in unet if grad) == 2 * 2 * 4 * (1 + guided_loss)
    assert sum(num for num, grad in unet if not grad) == 2 * 4 * 12 * 2
    assert tuner.meter.training.denoiser_calls == sum(num for num, _ in unet)
    assert tuner.num_updates == 4


def test_guided_loss_trains_what_is_sampled_from(tiny_stable_diffusion: Any) -> None:
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()), guidance_scale=3.0)
    condition = pipeline.encode({"index": torch.arange(2), "prompt": ["a ring", "a cross"]})
    states = {"x_s": torch.randn(2, 4, 2, 2), "weight": torch.ones(2)}
    experience = Experience(states, condition, [0, 1])
    losses = {}
    for guided in (False, True):
        tuner = PGRAFT(pipeline, Brightness(), guided_loss=guided)
        rows = [torch.Generator().manual_seed(i) for i in range(2)]
        losses[guided] = tuner.loss(experience, rows)[0]
    pipeline.guidance_scale = 1.0
    rows = [torch.Generator().manual_seed(i) for i in range(2)]
    plain = PGRAFT(pipeline, Brightness(), guided_loss=True).loss(experience, rows)[0]
    torch.testing.assert_close(plain, losses[False])
    assert not torch.allclose(losses[True], losses[False])


def test_rollouts_see_the_denoiser_in_evaluation_mode(folder: Path) -> None:
    """A denoiser with dropout must not sample with it."""
    tuner = tuner_of(GRAFT, lora=LoRA(rank=2), width=8)
    modes: set[tuple[bool, bool]] = set()
    tuner.pipeline.denoiser.register_forward_hook(
        lambda module, args, out: modes.add((torch.is_grad_enabled(), module.training))
    )
    fit(tuner, num_rounds=2, default_root_dir=folder)
    assert modes == {(False, False), (True, True)}
