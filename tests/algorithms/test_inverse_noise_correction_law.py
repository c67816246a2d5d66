r"""Inverse noise correction on a model whose velocity is wrong: data in, the data's law out.

The biased model is an exact one plus a field, so that its sampler T is invertible but takes N(0, I)
elsewhere. Laws are compared by the maximum mean discrepancy with a Gaussian kernel; its level under
equal laws comes from permutations of the pooled samples.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from domains.gaussian_mixture.data import MixtureData
from domains.layout.networks.transformer import Architecture
from domains.layout.pipeline import LayoutPipeline
from domains.layout.rewards import Overlap
from domains.molecule.pipeline import MoleculePipeline
from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import Symmetry
from lit_rlft.algorithms.inverse_noise_correction.inversion import noise_power
from lit_rlft.core.fixed_point import FixedPoint
from lit_rlft.core.randomness import generators, randn_like
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import flatten, tensor_of
from lit_rlft.kit.data import collate
from tests.algorithms.inverse_noise_correction_support import (
    MIXTURE,
    STEPS,
    Biased,
    fit,
    layouts,
    points,
    store_of,
    tuner_of,
)
from tests.support import assert_close_in_rounding


def batch_of(data: Any) -> dict[str, Any]:
    """Return all training rows in order."""
    rows = data.rows("train")
    return collate([rows[i] for i in range(len(rows))])


@torch.no_grad()
def discrepancy(first: Tensor, second: Tensor, num_permutations: int = 200) -> tuple[float, float]:
    """Squared MMD, and the largest of those of random splits of the pooled samples."""
    pooled = torch.cat([first, second])
    signs = torch.cat([torch.ones(len(first)), -torch.ones(len(second))])
    kernel = torch.exp(-torch.cdist(pooled, pooled).square() / (2 * 0.5**2))
    generator = torch.Generator().manual_seed(0)
    shuffled = [
        signs[torch.randperm(len(signs), generator=generator)] for _ in range(num_permutations)
    ]
    splits = torch.stack([signs, *shuffled], dim=1)
    values = (splits * (kernel @ splits)).sum(dim=0) / len(first) ** 2
    return float(values[0]), float(values[1:].max())


@torch.no_grad()
def draw(tuner: Any, num: int, *, corrected: bool) -> Tensor:
    condition = tuner.pipeline.encode({"index": torch.arange(num)})
    prior = tuner.prior if corrected else tuner.reference_prior
    x_1 = prior(condition).sample(generators(range(num)))
    process = tuner.pipeline.process
    return tuner.sampler.sample(tuner.reference, process, x_1, condition)


def test_the_corrector_recovers_the_datas_law_that_a_biased_model_misses(tmp_path: Path) -> None:
    tuner = tuner_of(
        Biased(),
        sampler=Sampler(12),
        width=64,
        corrector_steps=32,
        shard_size=4096,
        sampling_batch_size=4096,
        minibatch_size=256,
        num_epochs=4,
        optimizer=lambda p: torch.optim.Adam(p, lr=1e-3),
        lr_scheduler=lambda o: OneCycleLR(o, 4e-3, total_steps=640),
    )
    data = MixtureData(**MIXTURE, num_train=4096, batch_size=4096)
    fit(tuner, data, tmp_path, num_epochs=10)
    real = data.mixture.sample(1000, torch.Generator().manual_seed(99)).float()
    again = data.mixture.sample(1000, torch.Generator().manual_seed(98)).float()
    same, level = discrepancy(real, again)
    assert same < level
    base, _ = discrepancy(draw(tuner, 1000, corrected=False), real)
    corrected, level = discrepancy(draw(tuner, 1000, corrected=True), real)
    assert base > 10 * level
    assert corrected < level
    # Before another number of base steps it is not the corrector of that map: worse by far.
    tuner.sampler = Sampler(4)
    mismatched, level = discrepancy(draw(tuner, 1000, corrected=True), real)
    assert mismatched > 4 * level


def test_inverted_noise_leads_to_the_data(tmp_path: Path) -> None:
    """T(x_1) is x_0, row by row, also at twice the number of shards' rows."""
    tuner, data = tuner_of(Biased()), points()
    fit(tuner, data, tmp_path)
    batch, store = batch_of(data), store_of(tmp_path)
    x_1, condition = store.read(torch.arange(20)), tuner.pipeline.encode(batch)
    with torch.no_grad():
        x_0 = tuner.sampler.sample(tuner.pipeline, tuner.pipeline.process, x_1, condition)
    torch.testing.assert_close(x_0, batch["x_0"], rtol=0, atol=1e-4)
    assert store.num_shards == 3 and all(map(store.finished, range(3)))
    notes = list(store.all_notes())
    assert [note["num_rows"] for note in notes] == [8, 8, 4]
    assert all(note["residual"] <= 1e-5 and not note["unconverged"] for note in notes)
    assert all(1 < note["iterations"] < 50 for note in notes)


def test_data_are_blurred_by_noise_of_the_given_size(tmp_path: Path) -> None:
    tuner, data = tuner_of(Biased(), data_noise=0.05, shard_size=400), points(400)
    fit(tuner, data, tmp_path, limit_train_batches=1)
    batch = batch_of(data)
    x_1 = store_of(tmp_path, 400, 400).read(torch.arange(400))
    condition = tuner.pipeline.encode(batch)
    with torch.no_grad():
        x_0 = tuner.sampler.sample(tuner.pipeline, tuner.pipeline.process, x_1, condition)
    difference = (x_0 - batch["x_0"]).double()
    # The standard deviation of 800 normal numbers is known to 1 / sqrt(1600) = 2.5 %.
    assert float(difference.std()) == pytest.approx(0.05, rel=0.1)
    assert float(difference.mean().abs()) < 4 * 0.05 / 800**0.5


def test_loss_is_flow_matching_from_noise_to_inverted_noise(tmp_path: Path) -> None:
    tuner, data = tuner_of(Biased()), points()
    fit(tuner, data, tmp_path)
    torch.nn.init.normal_(tuner.corrector.denoiser.last.weight)
    batch = {"index": torch.tensor([13, 2, 19]), "name": ["mixture"] * 3}
    condition = tuner.pipeline.encode(batch)
    experience = tuner.collect(batch, condition)
    tuner.num_rounds += 1
    assert set(tuner.collect(batch, condition).seeds).isdisjoint(experience.seeds)
    x_1 = store_of(tmp_path).read(batch["index"])
    assert torch.equal(experience.states["x_1"], x_1)
    assert experience.metrics["noise_power"] == pytest.approx(float((x_1**2).mean()), rel=1e-5)
    losses, _ = tuner.loss(experience, generators([4, 5, 6]))
    for i, seed in enumerate([4, 5, 6]):
        (row,) = generators([seed])
        t = 1 - torch.rand((), generator=row).double().reshape(1)
        z = torch.randn(2, generator=row)
        cos, sin = torch.cos(torch.pi / 2 * t), torch.sin(torch.pi / 2 * t)
        x_t = (cos * x_1[i] + sin * z).float().unsqueeze(0)
        velocity = tuner.corrector.predict(x_t, t, condition.index(slice(i, i + 1)))
        expected = (velocity[0] - (cos * z - sin * x_1[i])).square().mean().float()
        torch.testing.assert_close(losses[i], expected)


def test_only_the_corrector_is_trained_and_saved(tmp_path: Path) -> None:
    tuner, data = tuner_of(Biased()), points()
    before = copy.deepcopy(tuner.pipeline.state_dict())
    trainer = fit(tuner, data, tmp_path)
    after = tuner.pipeline.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert bool(tuner.corrector.denoiser.last.weight.any())
    trainer.save_checkpoint(tmp_path / "held.ckpt")
    held = torch.load(tmp_path / "held.ckpt", weights_only=True)
    assert all(name.startswith("corrector.denoiser.") for name in held["state_dict"])
    assert held["lit_rlft"]["base_steps"] == STEPS


def test_both_arms_start_from_the_same_noise_and_agree_before_training() -> None:
    tuner = tuner_of(Biased())
    tuner.setup("test")
    same = draw(tuner, 5, corrected=True), draw(tuner, 5, corrected=False)
    torch.testing.assert_close(*same, rtol=0, atol=0)


def test_layouts_are_corrected_by_a_smaller_transformer(tmp_path: Path) -> None:
    """Under conditions, whose values stay to the last bit, and with noise on the rest."""
    small = LayoutPipeline(None, architecture=Architecture(width=16, depth=1, num_heads=2))
    base = LayoutPipeline("grammar")
    tasks = {"category_size": 0.5, "completion": 0.5}
    tuner = tuner_of(base, Overlap(), corrector=small, data_noise=1e-3, corrector_steps=2)
    data = layouts(tasks=tasks)
    fit(tuner, data, tmp_path, num_epochs=2)
    store, batch = store_of(tmp_path, 8), batch_of(data)
    condition, x_0 = base.encode(batch), base.states(batch)
    x_1, given = store.read(torch.arange(8)), tensor_of(base.given(condition))
    assert given.any() and torch.equal(x_1[given], x_0[given])  # type: ignore[index]
    assert not torch.equal(tensor_of(x_1)[~given], tensor_of(x_0)[~given])
    held = {name for name, p in tuner.named_parameters() if p.requires_grad}
    assert held and all(name.startswith("corrector.denoiser.") for name in held)
    assert (tmp_path / "tuned/model.safetensors").is_file()
    assert LayoutPipeline(str(tmp_path / "tuned")).architecture.width == 16


def test_pictures_are_corrected_under_their_prompts(
    tiny_stable_diffusion: Callable[..., Path], tmp_path: Path
) -> None:
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()), guidance_scale=2.0)
    torch.manual_seed(0)
    prompts = ["a ring", "a red cross", "two circles", "a ring"]
    rows = [
        {"index": i, "prompt": prompt, "image": torch.randint(0, 256, (3, 16, 16)).byte()}
        for i, prompt in enumerate(prompts)
    ]
    loader = DataLoader(rows, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    tuner = tuner_of(pipeline, Symmetry(), sampler=Sampler(6), solver=FixedPoint(1e-6))
    fit(tuner, loader, tmp_path)
    batch = collate(rows)
    condition, x_1 = pipeline.encode(batch), store_of(tmp_path, 4).read(torch.arange(4))
    with torch.no_grad():
        x_0 = tuner.sampler.sample(tuner.reference, pipeline.process, x_1, condition)
        torch.testing.assert_close(x_0, pipeline.states(batch), rtol=0, atol=5e-3)
    # Prompts reach the corrector.
    torch.nn.init.normal_(tuner.corrector.denoiser.last.weight)
    with torch.no_grad():
        drawn = flatten(tuner.prior(condition).sample(generators([1, 1, 1, 1])))
    assert_close_in_rounding(drawn[0], drawn[3])
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-2)


def test_the_corrector_starts_from_noise_of_its_own() -> None:
    """Also where the base's sampler starts from noise of another size, as some schedulers have."""
    pipeline = Biased()
    pipeline.process.schedule.start_scale = 0.5
    tuner = tuner_of(pipeline)
    tuner.setup("fit")
    condition = pipeline.encode({"index": torch.arange(4)})
    start = torch.randn_like(tensor_of(pipeline.blank(condition)))
    drawn = tuner.prior(condition).sample(generators(range(4)))
    fresh = randn_like(start, generators(range(4)))
    torch.testing.assert_close(drawn, fresh)  # a new corrector hands it on unchanged


def test_the_power_of_noise_is_that_of_a_free_number() -> None:
    """Empty slots and the centre that a cloud of points has not are no numbers of it."""
    pipeline = MoleculePipeline("small")
    condition = pipeline.encode({"num_atoms": torch.tensor([5] * 512)})
    blank = pipeline.blank(condition)
    x_1 = pipeline.process.prior(blank).sample(generators(range(512)))
    assert noise_power(pipeline.process, x_1) == pytest.approx(1, abs=0.03)
    padded = pipeline.encode({"num_atoms": torch.tensor([5] * 511 + [20])})
    x_1 = pipeline.process.prior(pipeline.blank(padded)).sample(generators(range(512)))
    assert tensor_of(x_1).shape[1] == 20
    assert noise_power(pipeline.process, x_1) == pytest.approx(1, abs=0.03)
