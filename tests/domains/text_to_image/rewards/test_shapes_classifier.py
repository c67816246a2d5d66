import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch import Tensor

from domains.text_to_image import EMBEDDED as ASSETS
from domains.text_to_image.rewards.shapes import ShapesClassifier
from domains.text_to_image.shapes import world
from domains.text_to_image.shapes.classifier import Classifier, encode
from domains.text_to_image.shapes.detector import judge
from domains.text_to_image.train import classifier as train_classifier
from domains.text_to_image.train.autoencoder import reconstruct
from domains.text_to_image.train.common import pixels_of
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from tests.support import altered, assert_close_in_rounding

EMBEDDED = ASSETS / "shapes_classifier"


def condition(prompts: Sequence[str]) -> Condition:
    unique = list(dict.fromkeys(prompts))
    rows = torch.tensor([unique.index(prompt) for prompt in prompts])
    return Condition(entries=[{"prompt": prompt} for prompt in unique], tables={}, rows=rows)


def noise(num: int, height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(num, 3, height, width, generator=torch.Generator().manual_seed(0))


def words(prompt: world.Prompt) -> list[str]:
    return ["a" if word == "an" else word for word in prompt.text.split()]


def false_captions(prompt: world.Prompt) -> list[world.Prompt]:
    """Captions with one other word, or the same words in an order that means something else."""
    own, found = words(prompt), []
    for other in world.all_prompts(prompt.task):
        theirs = words(other)
        one_other = len(theirs) == len(own) and sum(map(str.__ne__, own, theirs)) == 1
        if set(other.include) != set(prompt.include) and (
            one_other or sorted(theirs) == sorted(own)
        ):
            found.append(other)
    return found


def held_out(task: str, num: int, size: int = 64) -> tuple[list[str], list[str], Tensor]:
    """True captions, false captions and pictures of held-out prompts."""
    rng = np.random.default_rng(5)
    known = [prompt for prompt in world.split_prompts("test") if prompt.task == task]
    asked = [known[i] for i in rng.integers(len(known), size=num)]
    false = [(near := false_captions(p))[rng.integers(len(near))].text for p in asked]
    arrays = [world.render(world.compose(prompt, rng), size) for prompt in asked]
    return [prompt.text for prompt in asked], false, pixels_of(arrays)


def balanced_accuracy(pictures: Tensor, true: list[str], false: list[str]) -> float:
    reward = ShapesClassifier(output="probability")
    yes, no = (reward(pictures, condition(texts)) > 0.5 for texts in (true, false))
    return (yes.float().mean() + (~no).float().mean()).item() / 2


class TestAnswers:
    @pytest.mark.parametrize("task", world.TASKS)
    def test_held_out_prompts(self, task: str):
        true, false, pictures = held_out(task, 100)
        assert balanced_accuracy(pictures, true, false) >= 0.9

    def test_pictures_softened_by_the_autoencoder(self):
        autoencoder = AutoencoderKL.from_pretrained(ASSETS / "shapes" / "vae").float().eval()
        rows = [held_out(task, 20) for task in world.TASKS]
        true, false = ([text for row in rows for text in row[i]] for i in (0, 1))
        soft, _ = reconstruct(autoencoder, torch.cat([pictures for *_, pictures in rows]))
        assert balanced_accuracy(soft, true, false) >= 0.9

    def test_larger_pictures_are_pooled(self):
        true, false, pictures = held_out("color_attribution", 40, size=128)
        assert balanced_accuracy(pictures, true, false) >= 0.9

    def test_more_than_the_prompt_says_is_wrong(self):
        rng = np.random.default_rng(0)
        known = world.all_prompts("color_attribution")
        asked = [known[i] for i in rng.integers(len(known), size=40)]
        pictures = pixels_of([world.render(world.compose(prompt, rng)) for prompt in asked])
        alone = condition([prompt.text.partition(" and ")[0] for prompt in asked])
        both = condition([prompt.text for prompt in asked])
        reward = ShapesClassifier(output="logit")
        assert (reward(pictures, alone) < reward(pictures, both)).float().mean() >= 0.95

    def test_outputs_are_functions_of_one_logit(self):
        true, false, pictures = held_out("counting", 10)
        given = condition([*true[:5], *false[5:]])
        logit, probability, log_probability = (
            ShapesClassifier(output=output)(pictures, given)
            for output in ("logit", "probability", "log_probability")
        )
        assert probability.allclose(1 / (1 + (-logit).exp()))
        assert log_probability.allclose(probability.log(), atol=1e-5)
        assert (log_probability <= 0).all() and log_probability.isfinite().all()

    @pytest.mark.parametrize("output", ["log_probability", "probability", "logit"])
    def test_evaluate_adds_the_probability(self, output: str):
        true, _, pictures = held_out("colors", 4)
        values = ShapesClassifier(output=output).evaluate(pictures, condition(true))
        assert list(values) == ["ShapesClassifier", "ShapesClassifier/probability"]
        expected = ShapesClassifier(output="probability")(pictures, condition(true))
        assert values["ShapesClassifier/probability"].allclose(expected)


class TestGradients:
    def test_equals_finite_differences(self):
        true, false, pictures = held_out("position", 4)
        reward = ShapesClassifier(output="logit").double()
        given, pictures = condition([*true[:2], *false[2:]]), pictures.double() * 0.9 + 0.05
        direction = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0)).double()
        pictures.requires_grad_()
        (grad,) = torch.autograd.grad(reward(pictures, given).sum(), pictures)
        assert grad.isfinite().all()
        with torch.no_grad():
            ahead, behind = (reward(pictures + h * direction, given) for h in (1e-3, -1e-3))
        expected = (ahead - behind).double() / 2e-3
        assert (grad * direction).flatten(1).sum(1).allclose(expected, rtol=0.02, atol=0.05)

    @pytest.mark.parametrize(("share", "least"), [(0.0, 0.7), (0.25, 0.85)])
    @pytest.mark.parametrize("attribute", ["shape", "color"])
    def test_points_from_wrong_pictures_to_right_ones(
        self, attribute: str, share: float, least: float
    ):
        rng = np.random.default_rng(1)
        known = world.all_prompts("colors")
        prompts = [known[i] for i in rng.integers(len(known), size=120)]
        values = {"shape": world.SHAPES, "color": tuple(world.COLORS)}[attribute]
        wrong, right = [], []
        for prompt in prompts:
            scene = world.compose(prompt, rng)
            (figure,) = scene.figures
            own = getattr(figure, attribute)
            other = str(rng.choice([value for value in values if value != own]))
            changed = dataclasses.replace(figure, **{attribute: other})
            right.append(world.render(scene))
            wrong.append(world.render(dataclasses.replace(scene, figures=(changed,))))
        way = pixels_of(right) - pixels_of(wrong)
        pictures = (pixels_of(wrong) + share * way).requires_grad_()
        given = condition([prompt.text for prompt in prompts])
        (grad,) = torch.autograd.grad(ShapesClassifier()(pictures, given).sum(), pictures)
        assert ((grad * way).flatten(1).sum(1) > 0).float().mean() >= least

    @pytest.mark.parametrize("picture", [torch.zeros, torch.ones])
    def test_is_finite_on_empty_pictures(self, picture: Callable[..., Tensor]):
        pictures = picture(len(world.TASKS), 3, 64, 64).requires_grad_()
        given = condition([world.all_prompts(task)[0].text for task in world.TASKS])
        reward = ShapesClassifier()(pictures, given)
        (grad,) = torch.autograd.grad(reward.sum(), pictures)
        assert grad.isfinite().all() and (reward < 0).all()

    def test_flows_after_inference_mode_saw_the_prompt_first(self):
        reward, given = ShapesClassifier(), condition(["four diamonds"])
        with torch.inference_mode():
            reward(noise(1), given)
        pictures = noise(1).requires_grad_()
        reward(pictures, given).sum().backward()
        assert pictures.grad is not None


class TestPrecision:
    def test_is_float32_under_autocast(self):
        true, _, pictures = held_out("two_objects", 8)
        reward = ShapesClassifier()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values = reward(pictures, condition(true))
        assert values.dtype == torch.float32
        assert values.equal(reward(pictures, condition(true)))

    def test_is_float32_whatever_the_default_dtype(self):
        pictures, given = noise(2), condition(["a circle", "two rings"])
        expected = ShapesClassifier()(pictures, given)
        torch.set_default_dtype(torch.bfloat16)
        try:
            values = ShapesClassifier()(pictures, given)
        finally:
            torch.set_default_dtype(torch.float32)
        assert values.dtype == torch.float32
        assert_close_in_rounding(values, expected)

    def test_a_sample_does_not_depend_on_its_batch(self):
        true, _, pictures = held_out("position", 6)
        reward = ShapesClassifier(output="logit")
        together = reward(pictures, condition(true))
        alone = [reward(x[None], condition([t])) for x, t in zip(pictures, true, strict=True)]
        assert torch.cat(alone).allclose(together, atol=1e-3)

    def test_is_frozen_and_stays_in_evaluation_mode(self):
        reward = ShapesClassifier().train()
        assert not any(module.training for module in reward.modules())
        assert not any(weight.requires_grad for weight in reward.parameters())
        assert reward.differentiable


class TestRefusals:
    def test_prompts_outside_the_grammar(self):
        with pytest.raises(UsageError, match="cannot read the prompt 'a red dog'") as error:
            ShapesClassifier()(noise(1), condition(["a red dog"]))
        assert "\n" not in str(error.value)

    def test_pictures_that_are_not_square(self):
        with pytest.raises(UsageError, match="square pictures, got 64 x 96"):
            ShapesClassifier()(noise(1, 64, 96), condition(["a circle"]))

    def test_pictures_out_of_range(self):
        with pytest.raises(UsageError, match=r"in \[0, 1\]"):
            ShapesClassifier()(noise(1) * 2 - 1, condition(["a circle"]))

    def test_unknown_output(self):
        with pytest.raises(UsageError, match="output is 'score'; use 'log_probability'"):
            ShapesClassifier(output="score")

    def test_unknown_name(self):
        with pytest.raises(UsageError, match="'nowhere' could not be loaded"):
            ShapesClassifier("nowhere")

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("config.json", None, "could not be loaded"),
            ("model.safetensors", None, "could not be loaded"),
            ("config.json", lambda c: c.update(heads=3), "could not be loaded.*heads"),
            ("config.json", lambda c: c.update(hidden=7), "could not be loaded"),
        ],
    )
    def test_folders_that_hold_no_classifier(
        self, tmp_path: Path, name: str, change: Callable[[dict], None] | None, message: str
    ):
        folder = altered(EMBEDDED, tmp_path / "classifier", name, change)
        with pytest.raises(UsageError, match=message) as error:
            ShapesClassifier(str(folder))
        assert "\n" not in str(error.value)


class TestNetwork:
    def test_codes_differ_where_meanings_do(self):
        prompts = [prompt for task in world.TASKS for prompt in world.all_prompts(task)]
        codes = [tuple(encode(prompt).tolist()) for prompt in prompts]
        assert len(set(codes)) == len({prompt.include for prompt in prompts})

    def test_storage_keeps_the_answers(self, tmp_path: Path):
        torch.manual_seed(0)
        classifier = Classifier().eval()
        classifier.save(tmp_path)
        codes = torch.stack([encode(world.parse(text)) for text in ("a ring", "two circles")])
        stored = Classifier.load(tmp_path)
        assert stored(noise(2), codes).allclose(classifier(noise(2), codes), atol=1e-2)

    def test_embedded_files_are_small(self):
        assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) <= 200_000
        state = load_file(EMBEDDED / "model.safetensors")
        assert {value.dtype for value in state.values()} == {torch.float16}


class TestTraining:
    def test_the_detector_agrees_with_the_answers(self):
        # It has no say in training, so that it may check what is taught.
        rng = np.random.default_rng(0)
        prompts = train_classifier.pick(world.split_prompts("train"), 200, rng)
        for draw, shown in (
            (train_classifier.showing_scene, True),
            (train_classifier.missing_scene, False),
        ):
            verdicts = [judge(world.render(draw(p, rng)), p).correct for p in prompts]
            assert np.mean([verdict == shown for verdict in verdicts]) >= 0.97

    def test_pictures_in_between_convince_the_detector_the_more_the_truer_they_are(self):
        rng = np.random.default_rng(0)
        prompts = train_classifier.pick(world.split_prompts("train"), 300, rng)
        pairs = [(p, *train_classifier.between(p, rng)) for p in prompts]
        answers = np.array([answer for *_, answer in pairs])
        correct = np.array([judge(picture, prompt).correct for prompt, picture, _ in pairs])
        assert ((answers >= 0) & (answers <= 1)).all()
        assert correct[answers > 0.8].mean() > 0.7 > 0.2 > correct[answers < 0.2].mean()

    @pytest.mark.parametrize("kind", train_classifier.NEAR_MISSES)
    def test_near_misses_are_not_what_was_asked(self, kind: str):
        rng = np.random.default_rng(0)
        prompts = world.split_prompts("train")
        misses = [(p, train_classifier.near_miss(p, kind, rng)) for p in prompts[::5]]
        misses = [(prompt, miss) for prompt, miss in misses if miss is not None]
        assert misses
        for prompt, miss in misses:
            assert sorted(map(str, miss.include)) != sorted(map(str, prompt.include))

    def test_writes_what_the_reward_loads(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(train_classifier, "accuracy", lambda *args, **options: 0.0)
        train_classifier.train(tmp_path, num_steps=2, batch_size=8, seed=0)
        values = ShapesClassifier(str(tmp_path))(noise(1), condition(["a circle"]))
        assert values.shape == (1,) and values.isfinite().all()
