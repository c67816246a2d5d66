r"""Inverse noise correction on a model whose velocity is wrong: data in, the data's law out.

The biased model is an exact one plus a field, so that its sampler T is invertible but takes N(0, I)
elsewhere. Laws are compared by the maximum mean discrepancy with a Gaussian kernel; its level under
equal laws comes from permutations of the pooled samples.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from domains.gaussian_mixture.data import MixtureData
from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate
from domains.layout.data import LayoutData
from domains.layout.networks.transformer import Architecture
from domains.layout.pipeline import LayoutPipeline
from domains.layout.rewards import Overlap
from domains.layout.sources import Grammar
from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import Symmetry
from lit_rlft.algorithms.inverse_noise_correction import InverseNoiseCorrection
from lit_rlft.algorithms.inverse_noise_correction.fingerprint import alike
from lit_rlft.algorithms.inverse_noise_correction.inversion import Inversion
from lit_rlft.algorithms.inverse_noise_correction.noise_store import InvertedNoise
from lit_rlft.core.checks import UsageError
from lit_rlft.core.fixed_point import FixedPoint
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.randomness import generators
from lit_rlft.core.reward import Reward
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.state import State, flatten, tensor_of
from lit_rlft.kit.data import Rows, collate
from lit_rlft.loop.reference import LoRA
from tests.support import trainer_of

STEPS = 8


MIXTURE: dict[str, Any] = {
    "weights": [0.5, 0.3, 0.2],
    "means": [[-1.0, 0.0], [0.8, 0.9], [0.6, -1.0]],
    "stds": [0.4, 0.4, 0.4],
}


class Biased(GaussianMixturePipeline):
    """The exact flow plus a field that turns and shifts, most of all where there is most noise."""

    def __init__(self) -> None:
        flow: dict[str, Any] = {"schedule": "rectified_flow", "prediction_type": "velocity"}
        super().__init__(**MIXTURE, **flow, residual_width=0)

    def predict(self, x_t: State, t: Tensor, condition: Condition) -> Tensor:
        x = tensor_of(x_t)
        turned = torch.stack([-x[:, 1], x[:, 0]], dim=1)
        bias = 0.8 * turned + torch.tensor([1.5, -1.0])
        return super().predict(x, t, condition) + t.square().unsqueeze(1).to(x) * bias


def tuner_of(pipeline: Pipeline, reward: Reward | None = None, **settings: Any) -> Any:
    settings = {"sampler": Sampler(STEPS), "width": 16, "shard_size": 8, **settings}
    return InverseNoiseCorrection(pipeline, reward or Coordinate(), **settings)


def fit(tuner: Any, data: Any, folder: Path, num_epochs: int = 1, **trainer: Any) -> Trainer:
    runner = trainer_of(max_epochs=num_epochs, default_root_dir=folder, **trainer)
    runner.fit(tuner, data)
    return runner


def points(num: int = 20, **settings: Any) -> MixtureData:
    return MixtureData(**MIXTURE, num_train=num, batch_size=4, **settings)


def points_rows() -> Any:
    data = points()
    data.setup("fit")
    return data.rows("train")


def store_of(folder: Path, num: int = 20, shard_size: int = 8) -> InvertedNoise:
    return InvertedNoise(folder / "inverted_noise", num, shard_size)


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
    return tuner.sampler.sample(tuner.reference_policy, process, x_1, condition)


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


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_missing_is_shared_out_evenly(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four shards the first process's two are finished: each makes one of the others."""
    fit(tuner_of(Biased(), shard_size=5), points(), tmp_path)
    before, store = stamps(tmp_path), store_of(tmp_path, shard_size=5)
    for shard in (1, 3):
        (store.folder / f"0000{shard}.json").unlink()

    def lacking(value: Any, world_size: int) -> list[Any]:
        return [value] if value == "" or world_size == 1 else [[], [1, 3]]

    monkeypatch.setattr("lit_rlft.algorithms.inverse_noise_correction.inversion.gather", lacking)
    monkeypatch.setattr("lit_rlft.distributed.gather", lacking)
    tuner = tuner_of(Biased(), shard_size=5)
    tuner.setup("fit")
    tuner.trainer = SimpleNamespace(
        world_size=2,
        global_rank=rank,
        default_root_dir=tmp_path,
        loggers=[],
        callbacks=[],
        progress_bar_callback=None,
    )
    with torch.no_grad():
        Inversion(tuner, points_rows(), collate).run()
    after = stamps(tmp_path)
    made = {name[:5] for name in after if after[name] != before[name]} - {"noise"}
    assert made == {f"0000{1 + 2 * rank}"}


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


def rows_of(tuner: Any) -> list[int]:
    """Return a list that grows by the number of rows of every call of the base."""
    seen: list[int] = []
    tuner.pipeline.denoiser.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    return seen


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "inverted_noise").iterdir()}


def test_an_interrupted_inversion_continues_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(Exception):
        pass

    calls = 0
    invert = Inversion.invert

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Stop
        return invert(*args)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Inversion, "invert", interrupted)
        fit(tuner_of(Biased()), points(), tmp_path)
    store = store_of(tmp_path)
    assert [store.finished(shard) for shard in range(3)] == [True, True, False]
    before, again = stamps(tmp_path), tuner_of(Biased())
    seen = rows_of(again)
    fit(again, points(), tmp_path)
    after = stamps(tmp_path)
    assert all(after[name] == before[name] for name in before)
    assert store.finished(2)
    # Four rows, fewer and fewer, and the four samples by which the noise is recognised.
    assert max(seen) == 4
    whole = tmp_path / "whole"
    fit(tuner_of(Biased()), points(), whole)
    every = torch.arange(20)
    assert torch.equal(store.read(every), store_of(whole).read(every))  # type: ignore[arg-type]


def test_a_corrupt_shard_is_made_anew_and_the_others_are_left(tmp_path: Path) -> None:
    fit(tuner_of(Biased()), points(), tmp_path)
    store, every = store_of(tmp_path), torch.arange(20)
    good, before = store.read(every), stamps(tmp_path)
    path = store.folder / "00001.x_1.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)
    fit(tuner_of(Biased()), points(), tmp_path)
    after = stamps(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {
        "00001.json",
        "00001.x_1.npy",
    }
    assert torch.equal(store_of(tmp_path).read(every), good)  # type: ignore[arg-type]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is full")
def test_a_full_disk_leaves_a_state_to_go_on_from(tmp_path: Path) -> None:
    folder = tmp_path / "inverted_noise"
    folder.mkdir()
    (folder / "00001.x_1.npy.partial").symlink_to("/dev/full")
    with pytest.raises(UsageError, match="disk is full after 1 of 3 shards"):
        fit(tuner_of(Biased()), points(), tmp_path)
    before = stamps(tmp_path)
    fit(tuner_of(Biased()), points(), tmp_path)
    assert stamps(tmp_path)["00000.x_1.npy"] == before["00000.x_1.npy"]
    assert all(map(store_of(tmp_path).finished, range(3)))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"sampler": Sampler(STEPS + 1)}, "num_steps"),
        ({"data_noise": 1e-3}, "data_noise"),
        ({"shard_size": 7}, "shard_size"),
    ],
)
def test_noise_of_other_settings_is_not_mixed_in(
    tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    fit(tuner_of(Biased()), points(), tmp_path)
    with pytest.raises(UsageError, match=rf"other {what}.*delete the folder"):
        fit(tuner_of(Biased(), **change), points(), tmp_path)


def test_noise_of_other_data_or_another_sampler_is_not_mixed_in(tmp_path: Path) -> None:
    fit(tuner_of(Biased()), points(), tmp_path)
    with pytest.raises(UsageError, match="other data"):
        fit(tuner_of(Biased()), points(seed=1), tmp_path)
    with pytest.raises(UsageError, match="other sampler"):
        fit(tuner_of(MoreBiased()), points(), tmp_path)


class Altered(MixtureData):
    """Points some of which are others, by what `change` does to all of them [n, 2]."""

    def __init__(self, change: Callable[[Tensor], Tensor], num: int = 20) -> None:
        super().__init__(**MIXTURE, num_train=num, batch_size=4)
        self.change = change

    def rows(self, split: Any) -> Any:
        rows = super().rows(split)
        x_0 = self.change(torch.stack([rows[i]["x_0"] for i in range(len(rows))]))
        return Rows(len(rows), lambda i: {**rows[i], "x_0": x_0[i]})


def later(x_0: Tensor) -> Tensor:
    return torch.cat([x_0[:-1], x_0[-1:] + 0.1])


@pytest.mark.parametrize(
    "change",
    [later, lambda x: x.flip(1), lambda x: x[[*range(10), 11, 10, *range(12, 20)]], lambda x: -x],
    ids=["a later row", "flipped", "two swapped", "negative"],
)
def test_changed_data_are_not_taken_for_those_that_were_inverted(
    tmp_path: Path, change: Callable[[Tensor], Tensor]
) -> None:
    fit(tuner_of(Biased()), Altered(lambda x: x), tmp_path)
    fit(tuner_of(Biased()), Altered(lambda x: x + 1e-4), tmp_path)  # another machine's rounding
    with pytest.raises(UsageError, match=r"other data.*delete the folder"):
        fit(tuner_of(Biased()), Altered(change), tmp_path)


def test_of_many_rows_those_in_between_are_not_looked_at(tmp_path: Path) -> None:
    """Of 200 rows 64, from the first to the last; of 200 shards one row each."""

    def between(x_0: Tensor) -> Tensor:
        return torch.cat([x_0[:1], x_0[1:2] + 1, x_0[2:]])

    few = {"shard_size": 50, "noise_folder": str(tmp_path / "few")}
    fit(tuner_of(Biased(), **few), Altered(lambda x: x, 200), tmp_path)
    fit(tuner_of(Biased(), **few), Altered(between, 200), tmp_path)
    with pytest.raises(UsageError, match="other data"):
        fit(tuner_of(Biased(), **few), Altered(later, 200), tmp_path)
    many = {"shard_size": 1, "noise_folder": str(tmp_path / "many")}
    fit(tuner_of(Biased(), **many), Altered(lambda x: x, 90), tmp_path)
    with pytest.raises(UsageError, match="other data"):
        fit(tuner_of(Biased(), **many), Altered(between, 90), tmp_path)


def test_data_that_are_random_are_not_compared(tmp_path: Path) -> None:
    class Random(MixtureData):
        def rows(self, split: Any) -> Any:
            rows = super().rows(split)
            return Rows(len(rows), lambda i: {**rows[i], "x_0": torch.randn(2)})

    for _ in range(2):
        fit(tuner_of(Biased()), Random(**MIXTURE, num_train=20, batch_size=4), tmp_path)
    identity = json.loads((tmp_path / "inverted_noise/noise.json").read_text())
    assert identity["data"] is None and identity["num_steps"] == STEPS


def test_noise_can_be_shared_between_runs(tmp_path: Path) -> None:
    shared = {"noise_folder": str(tmp_path / "noise")}
    fit(tuner_of(Biased(), **shared), points(), tmp_path / "first")
    other = tuner_of(Biased(), **shared, width=8)
    seen = rows_of(other)
    fit(other, points(), tmp_path / "second")
    assert sum(seen) == 4 * STEPS  # the samples by which the noise is recognised
    assert not (tmp_path / "second/inverted_noise").exists()


def test_a_corrector_of_another_step_count_is_refused_unless_forced(tmp_path: Path) -> None:
    tuner = tuner_of(Biased())
    fit(tuner, points(num_test=8), tmp_path).save_checkpoint(tmp_path / "held.ckpt")

    def test(**settings: Any) -> list[Any]:
        runner = trainer_of(default_root_dir=tmp_path)
        other = tuner_of(Biased(), num_eval_samples=1, **settings)
        runner.test(other, points(num_test=8), ckpt_path=str(tmp_path / "held.ckpt"), verbose=False)
        return [other]

    test()
    test(corrector_steps=3)
    with pytest.raises(
        UsageError, match=r"corrector for 8 base steps, not 5; set model.*force_num"
    ):
        test(sampler=Sampler(5))
    (forced,) = test(sampler=Sampler(5), force_num_steps=True)
    weight = forced.corrector.denoiser.last.weight
    assert torch.equal(weight, tuner.corrector.denoiser.last.weight)
    with pytest.raises(UsageError, match="corrector for 8 base steps"):
        trainer_of(default_root_dir=tmp_path / "other").fit(
            tuner_of(Biased(), sampler=Sampler(5), force_num_steps=True),
            points(),
            ckpt_path=str(tmp_path / "held.ckpt"),
        )


class MoreBiased(Biased):
    """The same weights, another sampler."""

    def predict(self, x_t: State, t: Tensor, condition: Condition) -> Tensor:
        return super().predict(x_t, t, condition) + 0.1


def test_a_corrector_of_another_base_is_refused_unless_forced(tmp_path: Path) -> None:
    held = {"ckpt_path": str(tmp_path / "held.ckpt")}
    fit(tuner_of(Biased()), points(), tmp_path).save_checkpoint(held["ckpt_path"])
    numbers = torch.load(held["ckpt_path"], weights_only=True)["lit_rlft"]["base_probe"]
    assert len(numbers) == 8

    def run(stage: str, pipeline: Pipeline, **settings: Any) -> None:
        data = points(num_test=2, num_val=2)
        runner = trainer_of(default_root_dir=tmp_path, limit_val_batches=1)
        getattr(runner, stage)(tuner_of(pipeline, **settings), data, **held)

    for stage in ("validate", "test", "predict"):
        run(stage, Biased())
        with pytest.raises(UsageError, match=r"ckpt_path holds a corrector for another base.*forc"):
            run(stage, MoreBiased())
        run(stage, MoreBiased(), force_num_steps=True)
    with pytest.raises(UsageError, match="another base"):
        run("fit", MoreBiased(), force_num_steps=True)
    slightly = torch.load(held["ckpt_path"], weights_only=True)
    slightly["lit_rlft"]["base_probe"] = [number + 1e-3 for number in numbers]
    torch.save(slightly, held["ckpt_path"])
    run("test", Biased())


def test_an_exported_corrector_knows_its_base(tmp_path: Path) -> None:
    """It may start the training of a corrector for another base, but not sample for one."""

    def small(pretrained: str | None) -> LayoutPipeline:
        architecture = None if pretrained else Architecture(width=8, depth=1, num_heads=2)
        return LayoutPipeline(pretrained, architecture=architecture)

    def tuner(num_steps: int, pretrained: str | None = None, **settings: Any) -> Any:
        settings = {"sampler": Sampler(num_steps), "corrector_steps": 2, **settings}
        return tuner_of(
            LayoutPipeline("grammar"), Overlap(), corrector=small(pretrained), **settings
        )

    def test(tuner: Any) -> None:
        trainer_of(default_root_dir=tmp_path).test(tuner, layouts(num_test=2), verbose=False)

    fit(tuner(4), layouts(), tmp_path / "first")
    folder = tmp_path / "first/tuned"
    card = folder / "corrector.json"
    held = json.loads(card.read_text())
    assert held["base_steps"] == 4 and len(held["base_probe"]) == 8
    test(tuner(4, str(folder)))
    with pytest.raises(UsageError, match=r"pretrained holds a corrector for 4 base steps, not 3"):
        test(tuner(3, str(folder)))
    test(tuner(3, str(folder), force_num_steps=True))
    trained = tuner(3, str(folder))
    fit(trained, layouts(), tmp_path / "second")
    test(trained)
    assert json.loads((tmp_path / "second/tuned/corrector.json").read_text())["base_steps"] == 3
    card.write_text(json.dumps({**held, "base_probe": [0.0] * 8}))
    with pytest.raises(UsageError, match=r"pretrained holds a corrector for another base"):
        test(tuner(4, str(folder)))
    card.write_text("{}")
    with pytest.raises(UsageError, match=r"corrector\.json cannot be read; delete it"):
        test(tuner(4, str(folder)))


def test_guidance_is_part_of_the_base(tiny_stable_diffusion: Callable[..., Path]) -> None:
    folder = str(tiny_stable_diffusion())

    def numbers(guidance_scale: float) -> list[float]:
        pipeline = TextToImagePipeline(folder, guidance_scale=guidance_scale)
        tuner = tuner_of(pipeline, Symmetry(), sampler=Sampler(4))
        tuner.setup("test")
        return tuner.base_probe()

    assert alike(numbers(2.0), numbers(2.0)) and not alike(numbers(2.0), numbers(4.0))


def test_iterations_that_do_not_contract_are_warned_of(tmp_path: Path) -> None:
    tuner = tuner_of(Biased(), sampler=Sampler(1), solver=FixedPoint(1e-5, 3, memory=0))
    with pytest.warns(UserWarning, match=r"does not converge.*raise model.*num_steps.*data_noise"):
        fit(tuner, points(), tmp_path)
    notes = list(store_of(tmp_path).all_notes())
    assert sum(note["unconverged"] for note in notes) > 10


LOOSE, PLAIN = FixedPoint(1e-2, 3, memory=0), FixedPoint(1e-9, 3, memory=0)


def test_noise_that_another_solver_made_too_roughly_is_made_anew(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def residuals(solver: FixedPoint) -> list[float]:
        fit(tuner_of(Biased(), solver=solver), points(), tmp_path)
        notes = list(store_of(tmp_path).all_notes())
        assert all(note["solver"] == asdict(solver) for note in notes)
        return [note["residual"] for note in notes]

    def warned() -> bool:
        seen = [str(w.message) for w in recwarn if "does not converge" in str(w.message)]
        recwarn.clear()
        return bool(seen)

    assert min(residuals(PLAIN)) > 1e-5 and warned()
    before = stamps(tmp_path)
    assert min(residuals(PLAIN)) > 1e-5 and warned()
    assert stamps(tmp_path) == before  # as good as this solver makes it
    assert max(residuals(FixedPoint())) <= 1e-5 and not warned()


def test_noise_that_another_solver_made_well_enough_is_used(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """What had not converged for the one has for the other: there is nothing to warn of."""
    fit(tuner_of(Biased(), sampler=Sampler(30), solver=PLAIN), points(), tmp_path)
    notes, before = list(store_of(tmp_path).all_notes()), stamps(tmp_path)
    assert all(note["unconverged"] for note in notes)
    recwarn.clear()
    fit(tuner_of(Biased(), sampler=Sampler(30), solver=LOOSE), points(), tmp_path)
    assert stamps(tmp_path) == before
    assert list(store_of(tmp_path).all_notes()) == notes
    assert notes[0]["solver"] == asdict(PLAIN)
    assert not any("converge" in str(w.message) for w in recwarn)


def layouts(**settings: Any) -> LayoutData:
    return LayoutData(Grammar(num_pages=40), num_train=8, batch_size=4, **settings)


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
        x_0 = tuner.sampler.sample(tuner.reference_policy, pipeline.process, x_1, condition)
        torch.testing.assert_close(x_0, pipeline.states(batch), rtol=0, atol=5e-3)
    # Prompts reach the corrector.
    torch.nn.init.normal_(tuner.corrector.denoiser.last.weight)
    with torch.no_grad():
        drawn = flatten(tuner.prior(condition).sample(generators([1, 1, 1, 1])))
    assert torch.equal(drawn[0], drawn[3]) and not torch.equal(drawn[0], drawn[1])


def test_correctors_that_do_not_fit_are_refused() -> None:
    wide = LayoutPipeline(None, architecture=Architecture(num_slots=3, width=8, num_heads=1))
    with pytest.raises(UsageError, match=r"corrector makes states \[\(3, 10\)\].*\[\(12, 10\)\]"):
        tuner_of(LayoutPipeline("grammar"), corrector=wide).setup("fit")


def test_settings_that_cannot_work_are_refused() -> None:
    for settings, what in [
        ({"sampler": Sampler(4, eta=1.0)}, r"sampler\.eta must be 0"),
        ({"lora": LoRA()}, "lora must be null"),
        ({"corrector_steps": 0}, "corrector_steps"),
        ({"data_noise": -1.0}, "data_noise"),
        ({"shard_size": 0}, "shard_size"),
    ]:
        with pytest.raises(UsageError, match=what):
            tuner_of(Biased(), **settings).setup("fit")
    mixed = LayoutPipeline(None, architecture=Architecture(state="mixed"))
    with pytest.raises(UsageError, match=r"the ProductProcess of LayoutPipeline is not invertible"):
        tuner_of(mixed).setup("fit")


def test_data_without_row_numbers_are_refused(tmp_path: Path) -> None:
    rows = [{"index": 5 + i, "name": "mixture", "x_0": torch.zeros(2)} for i in range(4)]
    loader = DataLoader(rows, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="column 'index' is the row's number"):
        fit(tuner_of(Biased()), loader, tmp_path)
