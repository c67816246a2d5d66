"""Rewards that are broken are refused before anything is drawn; rewards with few values are not."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.image.pipeline import ImagePipeline
from domains.image.rewards import Brightness, ClassProbability
from domains.layout.networks.transformer import Architecture as PageArchitecture
from domains.layout.pipeline import LayoutPipeline
from domains.layout.rewards import Alignment, Coverage, Critic, Overlap
from domains.molecule.networks import Architecture as MoleculeArchitecture
from domains.molecule.pipeline import MoleculePipeline
from domains.molecule.rewards import QED, SyntheticAccessibility, ValidConnected
from domains.text_to_image.data import PromptData
from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.callbacks.reward_probes import check_on_probes
from lit_rlft.callbacks.self_check import SelfCheck
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition, Pipeline
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


def spoiled(reward: Reward, value: float) -> Reward:
    """Return a reward all of whose weights are one number."""
    for parameter in reward.parameters():
        nn.init.constant_(parameter, value)
    return reward


DOMAINS: dict[str, tuple[Callable[[], Pipeline], Sequence[Callable[[], Reward]]]] = {
    "molecule": (MoleculePipeline, (QED, SyntheticAccessibility)),
    "molecule_heavy": (lambda: MoleculePipeline("heavy"), (QED, SyntheticAccessibility)),
    "layout": (LayoutPipeline, (Alignment, Overlap, Critic, lambda: Critic(output="logit"))),
    "digits": (ImagePipeline, (Brightness, lambda: Brightness(0.5), ClassProbability)),
    "shapes_unconditional": (
        lambda: ImagePipeline("shapes"),
        (Brightness, lambda: ClassProbability("ring", "shapes_classifier")),
    ),
}
"""Pipelines, and their rewards that tell samples apart."""
SATURATED: dict[str, tuple[Callable[[], Pipeline], Callable[[], Reward], str]] = {
    "a score beyond its scale": (
        MoleculePipeline,
        lambda: QED(scale=0.3),
        "QED returned 1 for each of 4 known samples .* its scale in reward.init_args",
    ),
    "a critic of ones": (
        LayoutPipeline,
        lambda: spoiled(Critic(), 0.0),
        "Critic returned -0.693147 for each of 4",
    ),
    "a classifier that overflows": (
        ImagePipeline,
        lambda: spoiled(ClassProbability(), 1e30),
        "ClassProbability returned no finite number for 4 of 4",
    ),
}
QUIET: dict[str, tuple[Callable[[], Pipeline], Callable[[], Reward]]] = {
    "few values": (MoleculePipeline, ValidConnected),
    "a narrow target": (LayoutPipeline, lambda: Coverage(0.9, width=1e-3)),
    "a class in every picture": (
        lambda: ImagePipeline("shapes"),
        lambda: ClassProbability("ring", "shapes_classifier", "probability"),
    ),
}
"""Rewards that are the same for all probes, and for good reasons."""


@pytest.mark.parametrize("name", DOMAINS)
def test_every_domain_knows_samples_that_its_rewards_tell_apart(name: str) -> None:
    make, rewards = DOMAINS[name]
    probed = make()
    samples, condition = probed.probes() or ((), probed.example())
    for reward in rewards:
        values = reward()(samples, condition)
        assert len(values) == len(condition) == 4
        assert len(values.unique()) > 1 and values.isfinite().all()
        check_on_probes(reward(), probed, nullcontext())


@pytest.mark.parametrize("name", SATURATED)
def test_broken_rewards_of_other_domains_are_refused(name: str) -> None:
    probed, reward, sentence = SATURATED[name]
    with pytest.raises(UsageError, match=sentence):
        check_on_probes(reward(), probed(), nullcontext())


@pytest.mark.parametrize("name", QUIET)
def test_rewards_with_few_values_are_left_alone_in_other_domains(name: str) -> None:
    probed, reward = (make() for make in QUIET[name])
    samples, condition = probed.probes() or ((), probed.example())
    assert len(reward(samples, condition).unique()) == 1
    check_on_probes(reward, probed, nullcontext())


@pytest.mark.parametrize("heavy", [False, True])
def test_probes_are_the_molecules_that_they_are_meant_to_be(heavy: bool) -> None:
    architecture = MoleculeArchitecture(implicit_hydrogens=heavy, max_atoms=3 + 2 * (not heavy))
    if heavy:
        architecture = replace(architecture, elements=("C", "N", "O", "F"))
    probed = MoleculePipeline(None, architecture=architecture)
    found = probed.probes()
    assert found is not None
    expected = ["C", "CO", "CC#N", "N"] if heavy else ["C", "FC(F)F", "N", "O"]
    assert probed.keys(*found) == expected
    size = {"num_atoms": int(found[0].num_atoms[0])}
    assert found[1].each()[0] == size == {"num_atoms": 1 if heavy else 5}


def test_models_that_know_too_little_have_no_probes() -> None:
    hydrogen = MoleculeArchitecture(elements=("H",), max_atoms=4)
    assert MoleculePipeline(None, architecture=hydrogen).probes() is None
    single = PageArchitecture(num_slots=1)
    assert LayoutPipeline(None, architecture=single).probes() is None


def test_probes_of_a_grey_model_are_grey() -> None:
    found = ImagePipeline().probes()
    assert found is not None
    pictures, _ = found
    assert pictures[:, :1].expand(-1, 3, -1, -1).equal(pictures)


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_nothing_is_drawn_with_a_broken_reward(stage: str, run: Run) -> None:
    reward = Answers(constant)
    with pytest.raises(UsageError, match=r"Answers returned 0.25 for each"):
        run(reward, stage)
    assert reward.scored == 4


def test_a_reward_in_a_worker_is_probed_too(run: Run) -> None:
    with pytest.raises(UsageError, match=r"Answers returned 0.25 for each"):
        run(Answers(constant), "fit", RewardWorkers(kind="thread"))


@pytest.mark.filterwarnings("ignore:all .* rewards of round", "ignore:the loss does not reach")
def test_probes_can_be_switched_off(run: Run) -> None:
    assert run(Answers(constant), "fit", reward_probes=False).num_rounds == 1
