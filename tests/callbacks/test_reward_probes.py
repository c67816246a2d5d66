"""Rewards that are broken are refused before anything is drawn; rewards with few values are not."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.text_to_image.data import PromptData
from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.callbacks.reward_probes import check_on_probes
from lit_rlft.callbacks.self_check import SelfCheck
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward, WeightedSum
from lit_rlft.core.sampling import Sampler
from lit_rlft.loop.side.rewards import RewardWorkers
from tests.support import trainer_of


class Answers(Reward):
    """Gives pictures what a function of their mean is; it never gives two the same, if `sharp`."""

    def __init__(self, function: Callable[[Tensor], Tensor], *, sharp: bool = True) -> None:
        super().__init__()
        self.function, self.distinguishes = function, sharp
        self.scored = 0

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        self.scored += len(samples)
        return self.function(samples.mean(dim=(1, 2, 3)))


def constant(means: Tensor) -> Tensor:
    return 0 * means + 0.25


def missing(means: Tensor) -> Tensor:
    return means.where(means > means.min(), torch.nan)


def fails(means: Tensor) -> Tensor:
    if len(means) == 4:  # as many as there are probes
        raise RuntimeError("a face was expected")
    return means


@pytest.fixture(scope="module")
def pipeline(tiny_stable_diffusion: Any) -> TextToImagePipeline:
    return TextToImagePipeline(str(tiny_stable_diffusion()), guidance_scale=1.0)


Run = Callable[..., GRAFT]


@pytest.fixture
def run(pipeline: TextToImagePipeline, tmp_path: Path) -> Run:
    (tmp_path / "prompts.txt").write_text("a ring\na disc\na square\n")

    def ran(reward: Reward, stage: str, workers: RewardWorkers | None = None, **own: Any) -> GRAFT:
        given = {"sampler": Sampler(1), "num_candidates": 2, "num_eval_samples": 1}
        tuner = GRAFT(pipeline, reward, lora=None, reward_workers=workers, **given)
        data = PromptData(str(tmp_path / "prompts.txt"), batch_size=1, eval_batch_size=1)
        settings = {"default_root_dir": tmp_path, "limit_train_batches": 1}  # tuned/ goes there
        trainer = trainer_of(callbacks=[SelfCheck(**own)], **settings)
        getattr(trainer, stage)(tuner, data)
        return tuner

    return ran


def test_probes_have_nothing_in_common(pipeline: TextToImagePipeline) -> None:
    pictures, condition = pipeline.probes()
    assert pictures.shape == (4, 3, 16, 16) and len(condition) == 4
    assert pictures.min() >= 0 and pictures.max() <= 1
    distances = torch.pdist(pictures.flatten(start_dim=1)) / pictures[0].numel() ** 0.5
    assert distances.min() > 0.2  # root mean square per pixel


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (constant, r"Answers returned 0.25 for each of 4 known samples .*reward_probes to false"),
        (missing, "Answers returned no finite number for 1 of 4 known samples"),
        (lambda means: means / 0, "no finite number for 4 of 4"),
    ],
)
def test_a_broken_reward_is_refused(
    function: Any, sentence: str, pipeline: TextToImagePipeline
) -> None:
    reward = WeightedSum({"whole": Answers(torch.sin), "broken": Answers(function)})
    with pytest.raises(UsageError, match=sentence):
        check_on_probes(reward, pipeline, nullcontext())


@pytest.mark.parametrize(
    "reward",
    [
        Answers(torch.sin),
        Answers(constant, sharp=False),  # a detector that finds nothing yet
        Answers(missing, sharp=False),
        Answers(fails),
    ],
)
def test_there_is_no_false_alarm(reward: Answers, pipeline: TextToImagePipeline) -> None:
    check_on_probes(reward, pipeline, nullcontext())
    assert reward.scored == 4 * reward.distinguishes


def test_a_domain_without_probes_is_judged_by_its_samples() -> None:
    reward = Answers(constant)
    check_on_probes(reward, GaussianMixturePipeline(), nullcontext())
    assert reward.scored == 0


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_nothing_is_drawn_with_a_broken_reward(stage: str, run: Run) -> None:
    reward = Answers(constant)
    with pytest.raises(UsageError, match=r"Answers returned 0.25 for each"):
        run(reward, stage)
    assert reward.scored == 4


def test_a_reward_in_a_worker_is_probed_too(run: Run) -> None:
    with pytest.raises(UsageError, match=r"Answers returned 0.25 for each"):
        run(Answers(constant), "fit", RewardWorkers(kind="thread"))


@pytest.mark.filterwarnings("ignore:all .* rewards of a batch", "ignore:the loss does not reach")
def test_probes_can_be_switched_off(run: Run) -> None:
    assert run(Answers(constant), "fit", reward_probes=False).num_rounds == 1
