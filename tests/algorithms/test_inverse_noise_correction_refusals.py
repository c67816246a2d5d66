"""Correctors, settings and data that do not fit the base are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from domains.layout.networks.transformer import Architecture
from domains.layout.pipeline import LayoutPipeline
from domains.layout.rewards import Overlap
from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import Symmetry
from lit_rlft.algorithms.inverse_noise_correction.fingerprint import alike
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Pipeline
from lit_rlft.core.sampling import Sampler
from lit_rlft.kit.data import collate
from lit_rlft.loop.reference import LoRA
from tests.algorithms.inverse_noise_correction_support import (
    Biased,
    MoreBiased,
    fit,
    layouts,
    points,
    tuner_of,
)
from tests.support import trainer_of


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
        with pytest.raises(UsageError, match=r"holds a corrector for another base.*forc"):
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
