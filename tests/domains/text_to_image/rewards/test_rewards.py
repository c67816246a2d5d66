import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import BertConfig, CLIPConfig, CLIPModel, CLIPTokenizer

from domains.text_to_image import EMBEDDED
from domains.text_to_image.networks import clip
from domains.text_to_image.networks.clip import CLIPEncoder, Preprocessing
from domains.text_to_image.rewards import (
    Brightness,
    CLIPScore,
    Colourfulness,
    JPEGCompressibility,
    JPEGIncompressibility,
    ShapesEval,
    SmoothJPEGCompressibility,
    Symmetry,
)
from domains.text_to_image.rewards import shapes as detection
from domains.text_to_image.shapes import world
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from tests.support import altered

ASSETS = EMBEDDED
IMAGE_SIZE = 32
SMOOTH = [Brightness(), Colourfulness(), SmoothJPEGCompressibility(), Symmetry()]


def condition(prompts: Sequence[str]) -> Condition:
    unique = list(dict.fromkeys(prompts))
    rows = torch.tensor([unique.index(prompt) for prompt in prompts])
    return Condition(entries=[{"prompt": prompt} for prompt in unique], tables={}, rows=rows)


def noise(num: int, height: int = 64, width: int = 64) -> Tensor:
    return torch.rand(num, 3, height, width, generator=torch.Generator().manual_seed(0))


def quantized(pictures: Tensor) -> Tensor:
    return (pictures * 255).round() / 255


def images(pictures: Tensor) -> list[Image.Image]:
    arrays = (pictures * 255).round().byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(array) for array in arrays]


def drawn(size: int = 64, per_task: int = 6) -> tuple[list[world.Prompt], Tensor]:
    rng = np.random.default_rng(0)
    prompts = []
    for task in world.TASKS:
        known = world.all_prompts(task)
        prompts += [known[i] for i in rng.integers(len(known), size=per_task)]
    arrays = [world.render(world.compose(prompt, rng), size) for prompt in prompts]
    return prompts, torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = ASSETS / "shapes" / "tokenizer"
    for path in tokenizer.iterdir():
        shutil.copy(path, folder)
    words = CLIPTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    tower |= {"num_attention_heads": 2}
    text = tower | {"vocab_size": len(words), "max_position_embeddings": 16}
    text |= {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    vision = tower | {"image_size": IMAGE_SIZE, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    settings = {
        "size": {"shortest_edge": IMAGE_SIZE},
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "image_mean": [0.48, 0.45, 0.4],
        "image_std": [0.27, 0.26, 0.28],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


class TestCheckPictures:
    @pytest.mark.parametrize(
        ("samples", "message"),
        [
            (noise(2).half(), r"float16; convert with samples.float\(\)$"),
            ((noise(2) * 255).byte(), r"uint8; convert with samples.float\(\) / 255$"),
            (noise(2) * 255, r"in \[0, 1\], got values from .* to 25"),
            (noise(2) * 2 - 1, r"in \[0, 1\], got values from -0.99"),
            (noise(2) * torch.nan, "got values from nan"),
            (noise(3), r"\(2, 3, H, W\).*got \(3, 3, 64, 64\)"),
            (noise(2)[:, :1], r"got \(2, 1, 64, 64\)"),
            (noise(2)[0], r"got \(3, 64, 64\)"),
            ({"box": noise(2)}, "got dict; choose"),
        ],
    )
    @pytest.mark.parametrize("reward", [ShapesEval(), JPEGCompressibility(), *SMOOTH])
    def test_wrong_pictures_are_refused(self, reward: Reward, samples: object, message: str):
        with pytest.raises(UsageError, match=message):
            reward(samples, condition(["a circle", "a ring"]))

    def test_rounding_beyond_the_range_is_tolerated(self):
        Symmetry()(torch.full((1, 3, 8, 8), 1 + 1e-5), condition(["a circle"]))

    @pytest.mark.parametrize("reward", [ShapesEval(), JPEGCompressibility(), *SMOOTH])
    def test_rewards_are_float32_in_half_precision_training(self, reward: Reward):
        pictures = noise(2)
        torch.set_default_dtype(torch.bfloat16)
        try:
            values = reward(pictures, condition(["a circle", "a ring"]))
        finally:
            torch.set_default_dtype(torch.float32)
        assert values.dtype == torch.float32
        assert values.equal(reward(pictures, condition(["a circle", "a ring"])))


class TestShapesEval:
    @pytest.mark.parametrize("size", [64, 128])
    def test_true_pictures_score_one(self, size: int):
        prompts, pictures = drawn(size)
        given = condition([prompt.text for prompt in prompts])
        assert ShapesEval()(pictures, given).equal(torch.ones(len(prompts)))
        assert ShapesEval(graded=False)(pictures, given).equal(torch.ones(len(prompts)))

    def test_wrong_captions_score_less(self):
        picture = drawn_scene("a red circle and a blue square").expand(5, -1, -1, -1)
        wrong = [
            "a blue circle and a red square",
            "a red circle and a blue ring",
            "a ring",
            "three circles",
            "a green cross",
        ]
        graded = ShapesEval()(picture, condition(wrong))
        assert (graded < 1).all() and (graded >= 0).all()
        assert graded[1] > graded[4]  # one right figure beats none
        assert ShapesEval(graded=False)(picture, condition(wrong)).equal(torch.zeros(5))

    def test_evaluate_judges_once_and_reports_each_task(self, monkeypatch: pytest.MonkeyPatch):
        prompts, pictures = drawn(per_task=2)
        pictures[0] = 0.5
        calls = []
        judge = detection.judge
        monkeypatch.setattr(detection, "judge", lambda *args: calls.append(args) or judge(*args))
        values = ShapesEval().evaluate(pictures, condition([prompt.text for prompt in prompts]))
        assert len(calls) == len(prompts)
        expected = torch.tensor([0.0] + [1.0] * (len(prompts) - 1))
        assert values["ShapesEval"].equal(expected)
        assert values["ShapesEval/accuracy"].equal(expected)
        assert len(values) == 2 + len(world.TASKS)
        for i, task in enumerate(world.TASKS):
            column = values[f"ShapesEval/accuracy/{task}"]
            own = slice(2 * i, 2 * i + 2)
            assert column[own].equal(expected[own])
            assert column.isnan().sum() == len(prompts) - 2

    def test_ungraded_evaluation_reports_accuracy(self):
        values = ShapesEval(graded=False).evaluate(
            drawn_scene("a red circle"), condition(["a red ring"])
        )
        assert values["ShapesEval"].equal(values["ShapesEval/accuracy"])

    def test_free_text_is_refused(self):
        with pytest.raises(UsageError, match=r"'a dog on a bike'.*use CLIPScore for free text$"):
            ShapesEval()(noise(1), condition(["a dog on a bike"]))

    def test_pictures_must_be_square(self):
        with pytest.raises(UsageError, match="square pictures, got 64 x 96"):
            ShapesEval()(noise(1, 64, 96), condition(["a circle"]))

    def test_data_without_prompts_are_refused(self):
        unlabelled = Condition(entries=[{"digit": 3}], tables={}, rows=torch.tensor([0]))
        with pytest.raises(UsageError, match=r"needs a 'prompt'.*\['digit'\]"):
            ShapesEval()(noise(1), unlabelled)


def drawn_scene(text: str) -> Tensor:
    array = world.render(world.compose(world.parse(text), np.random.default_rng(1)))
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255


class TestPreprocessing:
    @pytest.mark.parametrize("shape", [(48, 48), (80, 57), (20, 32), (32, 32), (256, 200)])
    @pytest.mark.parametrize("resample", [2, 3])
    def test_agrees_with_transformers(self, tiny_clip: Path, shape: tuple[int, int], resample: int):
        config = json.loads((tiny_clip / "preprocessor_config.json").read_text())
        config["resample"] = resample
        pictures = quantized(noise(2, *shape))
        expected = pil_processor()(**config)(images=images(pictures), return_tensors="pt")
        actual = Preprocessing.from_config(config)(pictures)
        # Bytes are rounded once more after each of the two passes of a resizing.
        tolerance = 1.6 / 255 / min(config["image_std"])
        assert actual.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
        assert (actual - expected["pixel_values"]).abs().max() < tolerance
        assert (actual - expected["pixel_values"]).mean().abs() < 0.1 * tolerance

    def test_reads_the_spelling_of_old_files(self):
        old = {"size": 32, "crop_size": 32, "resample": 3, "image_mean": [0.5] * 3}
        new = old | {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        assert Preprocessing.from_config(old) == Preprocessing.from_config(new)
        exact = Preprocessing.from_config(old | {"size": {"height": 40, "width": 50}})
        assert exact.size == (40, 50)

    def test_switched_off_steps_do_nothing(self):
        config = dict.fromkeys(("do_resize", "do_center_crop", "do_normalize"), False)
        pictures = noise(1)
        assert Preprocessing.from_config(config)(pictures).equal(pictures)

    def test_unknown_interpolation_is_refused(self):
        with pytest.raises(UsageError, match="resample 1"):
            Preprocessing.from_config({"resample": 1})


def pil_processor() -> Callable:
    # Without torchvision, newer releases keep the PIL version under a name of its own.
    import transformers

    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


def embeddings(features: object) -> Tensor:
    return torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=-1)


class TestCLIPScore:
    PROMPTS = ("a red circle", "three rings", "a red circle", "a cross above a ring")

    def test_agrees_with_transformers(self, tiny_clip: Path):
        pictures = quantized(noise(4, 50, 40))
        model = CLIPModel.from_pretrained(tiny_clip).eval()
        pixels = pil_processor().from_pretrained(tiny_clip)(
            images=images(pictures), return_tensors="pt"
        )
        tokens = CLIPTokenizer.from_pretrained(tiny_clip)(
            list(self.PROMPTS), padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            image = embeddings(model.get_image_features(**pixels))
            text = embeddings(model.get_text_features(**tokens))
            cosines = model(**pixels, **tokens).logits_per_image / model.logit_scale.exp()
        reward = CLIPScore(str(tiny_clip))
        assert reward.encoder.embed_texts(self.PROMPTS).allclose(text, atol=1e-5)
        assert reward.encoder.embed_pictures(pictures).allclose(image, atol=5e-3)
        actual = reward(pictures, condition(self.PROMPTS))
        assert actual.allclose(cosines.diagonal(), atol=5e-3)

    def test_exact_where_no_resizing_is_needed(self, tiny_clip: Path):
        pictures = quantized(noise(2, IMAGE_SIZE, IMAGE_SIZE))
        model = CLIPModel.from_pretrained(tiny_clip).eval()
        pixels = pil_processor().from_pretrained(tiny_clip)(
            images=images(pictures), return_tensors="pt"
        )
        with torch.no_grad():
            expected = embeddings(model.get_image_features(**pixels))
        assert CLIPEncoder(str(tiny_clip)).embed_pictures(pictures).allclose(expected, atol=1e-5)

    def test_gradient_is_the_finite_difference(self, tiny_clip: Path):
        reward = CLIPScore(str(tiny_clip)).double()
        pictures = 0.25 + noise(2).double() / 2
        pictures.requires_grad_()
        given = condition(self.PROMPTS[:2])
        reward(pictures, given).sum().backward()
        direction = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1)).double()
        with torch.no_grad():
            ahead, behind = (reward(pictures + s * 0.02 * direction / 4, given) for s in (1, -1))
        slope = (pictures.grad * direction / 4).sum()
        assert torch.isclose((ahead - behind).sum().double() / 0.04, slope, rtol=0.02)
        assert all(parameter.grad is None for parameter in reward.parameters())

    def test_each_text_is_encoded_once(self, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch):
        reward = CLIPScore(str(tiny_clip))
        encoded: list[str] = []
        encode = reward.encoder._encode
        monkeypatch.setattr(
            reward.encoder, "_encode", lambda texts: encoded.extend(texts) or encode(texts)
        )
        first = reward(noise(4), condition(self.PROMPTS))
        assert reward(noise(4), condition(self.PROMPTS)).equal(first)
        assert encoded == ["a red circle", "three rings", "a cross above a ring"]
        monkeypatch.setattr(clip, "_MAX_CACHED_TEXTS", 3)
        reward.encoder.embed_texts(["a ring", "three rings"])
        assert set(reward.encoder._texts) == {"a ring", "three rings"}

    def test_texts_first_seen_in_validation_serve_training(self, tiny_clip: Path):
        reward = CLIPScore(str(tiny_clip))
        with torch.inference_mode():
            before = reward(noise(4), condition(self.PROMPTS))
        pictures = noise(4).requires_grad_()
        after = reward(pictures, condition(self.PROMPTS))
        after.sum().backward()
        assert pictures.grad is not None and pictures.grad.abs().sum() > 0
        assert after.allclose(before.clone())

    def test_autocast_and_train_mode_change_nothing(self, tiny_clip: Path):
        reward = CLIPScore(str(tiny_clip))
        expected = reward(noise(4), condition(self.PROMPTS))
        reward.train()
        assert not any(module.training for module in reward.encoder.modules())
        reward.encoder._texts.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert reward(noise(4), condition(self.PROMPTS)).equal(expected)

    def test_half_precision_weights_work(self, tiny_clip: Path):
        reward = CLIPScore(str(tiny_clip)).to(torch.bfloat16)
        values = reward(noise(4), condition(self.PROMPTS))
        exact = CLIPScore(str(tiny_clip))(noise(4), condition(self.PROMPTS))
        assert values.dtype == torch.float32
        assert values.allclose(exact, atol=0.05)

    def test_long_texts_are_cut_off(self, tiny_clip: Path):
        encoder = CLIPEncoder(str(tiny_clip))
        long = " ".join(["red"] * 40)
        assert encoder.embed_texts([long]).allclose(encoder.embed_texts([long + " circle"]))

    def test_weights_are_frozen_float32_whatever_is_stored(self, tiny_clip: Path, tmp_path: Path):
        shutil.copytree(tiny_clip, tmp_path / "half")
        CLIPModel.from_pretrained(tiny_clip).half().save_pretrained(tmp_path / "half")
        encoder = CLIPEncoder(str(tmp_path / "half"))
        assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
        assert not any(parameter.requires_grad for parameter in encoder.parameters())

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("config.json", lambda c: c.update(model_type="bert"), "model_type 'bert', not 'clip'"),
            ("config.json", None, "could not be loaded as a CLIP"),
            ("model.safetensors", None, "could not be loaded as a CLIP"),
            ("vocab.json", None, "could not be loaded as a CLIP"),
            ("config.json", lambda c: c["text_config"].update(num_hidden_layers=3), "weights lack"),
            ("preprocessor_config.json", None, "preprocessor_config.json"),
            ("preprocessor_config.json", lambda c: c.update(crop_size=48), "must agree"),
        ],
    )
    def test_folders_that_are_no_clip_are_refused(
        self, tiny_clip: Path, tmp_path: Path, name: str, change: Callable, message: str
    ):
        folder = altered(tiny_clip, tmp_path / "clip", name, change)
        with pytest.raises(UsageError, match=message) as error:
            CLIPScore(str(folder))
        assert "\n" not in str(error.value)

    def test_folder_without_tokenizer_is_refused(self, tiny_clip: Path, tmp_path: Path):
        folder = altered(tiny_clip, tmp_path / "clip", "vocab.json", None)
        (folder / "merges.txt").unlink()
        with pytest.raises(UsageError, match=r"pretrained: .* could not be loaded as a CLIP"):
            CLIPScore(str(folder))

    def test_another_model_is_refused(self, tmp_path: Path):
        BertConfig(hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
        with pytest.raises(UsageError, match="model_type 'bert', not 'clip'"):
            CLIPScore(str(tmp_path))

    @pytest.mark.skipif(not (ASSETS / "shapes_clip").is_dir(), reason="shapes_clip is not there")
    def test_embedded_model_prefers_true_captions(self):
        prompts, pictures = drawn(per_task=24)
        reward = CLIPScore()
        for task in ("colors", "color_attribution"):
            own = [i for i, prompt in enumerate(prompts) if prompt.task == task]
            texts = [prompts[i].text for i in own]
            swapped = [*texts[5:], *texts[:5]]
            differ = torch.tensor([a != b for a, b in zip(texts, swapped, strict=True)])
            true, false = (reward(pictures[own], condition(each)) for each in (texts, swapped))
            assert (true > false)[differ].float().mean() > 0.85


class TestJPEG:
    @pytest.mark.parametrize("quality", [30, 95])
    def test_is_the_size_of_the_file(self, quality: int):
        _, pictures = drawn(per_task=1)
        pictures = torch.cat([pictures, noise(1)])
        sizes = []
        for image in images(pictures):
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG", quality=quality)
            sizes.append(len(buffer.getvalue()) / 1000)
        given = condition(["a circle"] * len(sizes))
        expected = torch.tensor(sizes)
        assert JPEGIncompressibility(quality)(pictures, given).allclose(expected)
        assert JPEGCompressibility(quality)(pictures, given).allclose(-expected)
        assert expected.argmax() == len(sizes) - 1

    def test_reports_under_its_name(self):
        values = JPEGIncompressibility().evaluate(noise(1), condition(["a circle"]))
        assert list(values) == ["JPEGIncompressibility"]

    @pytest.mark.parametrize("quality", [0, 101])
    def test_quality_out_of_range_is_refused(self, quality: int):
        with pytest.raises(UsageError, match=rf"quality must be in \[1, 100\], got {quality}"):
            JPEGCompressibility(quality)


class TestSymmetry:
    def test_closed_form(self):
        half = noise(1, 8, 4)
        mirrored = torch.cat([half, half.flip(-1)], dim=-1)
        sided = torch.cat([torch.zeros(1, 3, 8, 4), torch.ones(1, 3, 8, 4)], dim=-1)
        slope = torch.linspace(0, 1, 4).expand(1, 3, 8, 4)  # differences 1, 1/3, 1/3, 1
        given = condition(["a circle"])
        assert Symmetry()(mirrored, given).equal(torch.zeros(1))
        assert Symmetry()(sided, given).equal(-torch.ones(1))
        assert Symmetry()(slope, given).allclose(torch.tensor([-2 / 3]))

    def test_gradient_ascent_makes_pictures_symmetric(self):
        pictures = noise(2, 8, 8)
        given = condition(["a circle"] * 2)
        start = Symmetry()(pictures, given)
        for _ in range(50):
            pictures.requires_grad_()
            (grad,) = torch.autograd.grad(Symmetry()(pictures, given).sum(), pictures)
            pictures = (pictures.detach() + 2 * grad).clamp(0, 1)
        assert (Symmetry()(pictures, given) > 0.5 * start).all()


class TestSmoothJPEG:
    @pytest.mark.parametrize("quality", [75, 95])
    def test_is_close_to_the_size_of_the_file(self, quality: int):
        _, pictures = drawn(per_task=2)
        given = condition(["a circle"] * len(pictures))
        expected = JPEGCompressibility(quality)(pictures, given)
        assert SmoothJPEGCompressibility(quality)(pictures, given).allclose(expected, rtol=0.1)

    def test_default_quality_is_that_of_the_exact_reward(self):
        pictures, given = drawn_scene("a red circle"), condition(["a red circle"])
        expected = SmoothJPEGCompressibility(JPEGCompressibility().quality)(pictures, given)
        assert SmoothJPEGCompressibility()(pictures, given).equal(expected)

    @pytest.mark.parametrize("quality", [0, 101])
    def test_quality_out_of_range_is_refused(self, quality: int):
        with pytest.raises(UsageError, match=rf"quality must be in \[1, 100\], got {quality}"):
            SmoothJPEGCompressibility(quality)

    def test_half_precision_module_changes_nothing(self):
        pictures, given = noise(2), condition(["a circle"] * 2)
        reward = SmoothJPEGCompressibility()
        expected = reward(pictures, given)
        assert reward.to(torch.bfloat16)(pictures, given).equal(expected)
        assert reward.state_dict() == {}


class TestBrightness:
    def test_agrees_with_pil(self):
        _, pictures = drawn(per_task=1)
        luma = [np.asarray(image.convert("L"), float).mean() / 255 for image in images(pictures)]
        values = Brightness()(pictures, condition(["a circle"] * len(luma)))
        assert values.allclose(torch.tensor(luma).float(), atol=1 / 255)

    def test_primaries(self):
        pictures = torch.cat([torch.eye(3), torch.zeros(1, 3), torch.ones(1, 3)])
        values = Brightness()(
            pictures[..., None, None].expand(-1, -1, 4, 6), condition(list("abcde"))
        )
        assert values.allclose(torch.tensor([0.299, 0.587, 0.114, 0.0, 1.0]))


class TestColourfulness:
    def test_agrees_with_the_formula_on_bytes(self):
        _, pictures = drawn(per_task=1)
        expected = []
        for image in images(pictures):
            r, g, b = np.asarray(image, float).transpose(2, 0, 1)
            u, v = r - g, (r + g) / 2 - b
            expected.append(np.hypot(u.std(), v.std()) + 0.3 * np.hypot(u.mean(), v.mean()))
        values = Colourfulness()(pictures, condition(["a circle"] * len(expected)))
        assert values.allclose(torch.tensor(expected).float() / 255, atol=2e-4)

    def test_grey_is_zero_and_opposite_colours_most(self):
        grey = noise(1)[:, :1].expand(-1, 3, -1, -1)
        red = torch.zeros(1, 3, 64, 64)
        red[:, 0] = 1
        opposite = torch.cat([red[..., :32], 1 - red[..., :32]], dim=-1)
        values = Colourfulness()(torch.cat([grey, red, opposite]), condition(list("abc")))
        expected = torch.tensor([0, 0.3 * 1.25**0.5, 1.25**0.5])
        assert values.allclose(expected, atol=2e-4)
        assert values[0] < 1e-6


class TestSmoothRewards:
    @pytest.mark.parametrize("reward", SMOOTH)
    def test_gradient_is_that_of_finite_differences(self, reward: Reward):
        given = condition(["a circle", "a ring"])
        pictures = (0.1 + 0.8 * noise(2, 6, 4)).double().requires_grad_()
        torch.autograd.gradcheck(lambda x: reward(x, given), pictures)

    @pytest.mark.parametrize("reward", SMOOTH)
    @pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
    def test_gradient_is_finite_in_flat_pictures(self, reward: Reward, level: float):
        pictures = torch.full((1, 3, 16, 16), level, requires_grad=True)
        reward(pictures, condition(["a circle"])).sum().backward()
        assert pictures.grad is not None and pictures.grad.isfinite().all()

    @pytest.mark.parametrize("reward", SMOOTH)
    def test_autocast_changes_nothing(self, reward: Reward):
        given = condition(["a circle", "a ring"])
        plain, mixed = noise(2).requires_grad_(), noise(2).requires_grad_()
        expected = reward(plain, given)
        expected.sum().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values = reward(mixed, given)
        values.sum().backward()
        assert values.equal(expected)
        assert plain.grad is not None and plain.grad.abs().sum() > 0
        assert mixed.grad is not None and mixed.grad.equal(plain.grad)

    @pytest.mark.parametrize("reward", SMOOTH)
    def test_ascent_raises_the_reward(self, reward: Reward):
        given, pictures = condition(["a circle"] * 2), noise(2, 16, 16)
        start = reward(pictures, given)
        for _ in range(10):
            pictures.requires_grad_()
            (slope,) = torch.autograd.grad(reward(pictures, given).sum(), pictures)
            pictures = (pictures.detach() + 0.02 * slope.sign()).clamp(0, 1)
        assert (reward(pictures, given) > start).all()


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (ShapesEval, False),
        (JPEGCompressibility, False),
        (CLIPScore, True),
        *((type(reward), True) for reward in SMOOTH),
    ],
)
def test_differentiability_is_declared(reward: type[Reward], expected: bool):
    assert reward.differentiable == expected
