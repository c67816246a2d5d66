"""Qwen2-VL's input against its own image processor and its own model, one picture at a time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

from domains.text_to_image.networks.picture_patches import PatchReader
from domains.text_to_image.networks.vision_language import VisionLanguage
from domains.text_to_image.rewards import VQAScore
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.images import to_image
from tests.domains.text_to_image.rewards.published import qwen_folder
from tests.domains.text_to_image.test_set_metrics import prompts

QUESTIONS = ["Is it red?", "What is it, and how many are there?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen_folder(tmp_path_factory.mktemp("qwen"))


def pictures(height: int, width: int) -> Tensor:
    drawn = torch.rand(2, 3, height // 4, width // 4, generator=torch.Generator().manual_seed(0))
    large = drawn.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return (large * 255).round() / 255


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("size", [(40, 56), (64, 48), (8, 12), (200, 120)])
def test_patches_are_those_of_the_models_processor(
    folder: Path, size: tuple[int, int], resample: int, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    settings = tmp_path / "preprocessor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"resample": resample}))
    folder = tmp_path
    reader, given = PatchReader(str(folder)), pictures(*size)
    theirs = AutoImageProcessor.from_pretrained(folder)
    read = theirs(images=[to_image(picture) for picture in given], return_tensors="pt")
    assert read["image_grid_thw"].tolist() == [reader.grid(given).tolist()] * 2
    # Bytes are rounded in between: in units of one byte after normalising.
    error = (reader.patches(given) - read["pixel_values"]).abs() * min(theirs.image_std) * 255
    assert error.max() < 2.5 and error.mean() < 0.5


def test_patches_without_resizing_are_exact(folder: Path) -> None:
    given = pictures(32, 40)
    read = AutoImageProcessor.from_pretrained(folder)(
        images=[to_image(picture) for picture in given], return_tensors="pt"
    )
    assert PatchReader(str(folder)).patches(given).allclose(read["pixel_values"], atol=1e-6)


def test_answers_are_the_models_of_each_picture_alone(folder: Path) -> None:
    given = pictures(32, 40)
    found = VisionLanguage(str(folder), torch.float32).answers(given, QUESTIONS)
    words, theirs = (
        AutoTokenizer.from_pretrained(folder),
        AutoImageProcessor.from_pretrained(folder),
    )
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
    for picture, question, own in zip(given, QUESTIONS, found, strict=True):
        read = theirs(images=[to_image(picture)], return_tensors="pt")
        places = "<|image_pad|>" * (4 * 5)
        text = (
            f"<|im_start|>user\n<|vision_start|>{places}<|vision_end|>{question}<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        ids = words(text, return_tensors="pt")["input_ids"]
        types = (ids == words.convert_tokens_to_ids("<|image_pad|>")).long()
        with torch.no_grad():
            try:
                logits = model(input_ids=ids, mm_token_type_ids=types, **read).logits
            except TypeError:  # earlier releases
                logits = model(input_ids=ids, **read).logits
        assert own.allclose(logits[0, -1].log_softmax(-1), atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_gradients_reach_the_pictures(folder: Path) -> None:
    reward = VQAScore(str(folder), "log_probability", dtype="float32").double()
    assert reward.differentiable
    given = pictures(40, 56).double().mul(0.5).add(0.2).requires_grad_()
    condition = prompts("red", "blue")
    reward(given, condition).sum().backward()
    direction = torch.randn(given.shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        ahead, behind = (reward(given + s * 1e-3 * direction, condition).sum() for s in (1, -1))
    slope = (given.grad * direction).sum()
    assert slope.abs() > 1e-9
    # Norms of language models compute in float32, whatever the weights are.
    assert torch.isclose((ahead - behind) / 2e-3, slope, rtol=1e-2)


def test_the_place_of_a_picture_cannot_be_written(folder: Path) -> None:
    reader, given = PatchReader(str(folder)), pictures(32, 40)
    plain, forged = (
        reader(given[:1], [question])["input_ids"] for question in ("red", "<|image_pad|>red")
    )
    assert plain.equal(forged)


def test_answers_in_words(folder: Path) -> None:
    network = VisionLanguage(str(folder), torch.float32)
    answers = network.says(pictures(32, 40), QUESTIONS, max_tokens=5)
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
    alone = [network.says(pictures(32, 40)[[i]], [QUESTIONS[i]], 5)[0] for i in range(2)]
    assert answers == alone


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("preprocessor_config.json", {"do_rescale": False}, "settings that are not known"),
        ("tokenizer_config.json", None, "chat template"),
    ],
)
def test_what_is_read_in_another_way_is_refused(
    folder: Path, name: str, change: dict[str, int] | None, message: str, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    settings = json.loads((copy / name).read_text())
    if change is None:
        (copy / "chat_template.jinja").unlink(missing_ok=True)
        settings.pop("chat_template", None)
    (copy / name).write_text(json.dumps(settings | (change or {})))
    with pytest.raises(UsageError, match=message):
        VQAScore(str(copy), dtype="float32")
