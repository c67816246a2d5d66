"""HPSv3 against Qwen2-VL's own class, one picture at a time, and a head by hand."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLForConditionalGeneration

from domains.text_to_image.networks import hps_v3
from domains.text_to_image.networks.hps_v3 import qwen_parts
from domains.text_to_image.rewards import HPSv3
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.images import to_image
from lit_rlft.kit.probe_pictures import probe_pictures
from lit_rlft.kit.weightless import without_weights
from tests.domains.text_to_image.rewards.published import hps_v3_file, qwen_folder
from tests.domains.text_to_image.rewards.test_published import PROMPTS, condition, pictures

PIXELS = 16 * 64
"""Of the tiny model: 4 x 4 groups of patches."""
TEXT = "Rate it. Prompt - {text_prompt}\nOverall: <|Reward|>\n\nEND\n"
Made = tuple[Path, dict[str, Tensor]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("hps_v3")
    qwen = qwen_folder(folder / "qwen")
    (folder / "instruction.txt").write_text(TEXT)
    return folder, hps_v3_file(folder / "HPSv3.safetensors", qwen)


@pytest.fixture(autouse=True)
def few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hps_v3, "_PIXELS", PIXELS)


def score(folder: Path, **settings: Any) -> HPSv3:
    given = {"processor": str(folder / "qwen"), "dtype": "float32"}
    given["instruction"] = str(folder / "instruction.txt")
    return HPSv3(str(folder), **{**given, **settings})


def full_model(folder: Path, state: Mapping[str, Tensor]) -> Any:
    """Return a Qwen2-VL of transformers with one token more, as HPSv3's authors make it."""
    model: Any = Qwen2VLForConditionalGeneration.from_pretrained(folder / "qwen").eval()
    rows = len(state["model.embed_tokens.weight"])
    model.resize_token_embeddings(rows)
    model.get_input_embeddings().weight.data = state["model.embed_tokens.weight"]
    return model


def by_hand(folder: Path, state: Mapping[str, Tensor], prompt: str, pixels: Any) -> list[Tensor]:
    """Return mu of one picture with positions in a row, and with Qwen2-VL's own."""
    words, model = AutoTokenizer.from_pretrained(folder / "qwen"), full_model(folder, state)
    words.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    asked = TEXT.format(text_prompt=prompt)
    text = (
        f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * 16}<|vision_end|>{asked}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = words(text, return_tensors="pt")["input_ids"]
    place = words.convert_tokens_to_ids("<|image_pad|>")
    found = model.model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"])
    seen = torch.cat(list(getattr(found, "pooler_output", found)))
    embeddings = model.get_input_embeddings()(ids)
    embeddings[ids == place] = seen
    grid = torch.arange(ids.shape[1]).expand(3, 1, -1)
    own = grid.clone()
    first = int((ids == place).int().argmax())
    rows, columns = torch.arange(4)[:, None].expand(4, 4), torch.arange(4).expand(4, 4)
    own[:, 0, first : first + 16] = first + torch.stack([0 * rows, rows, columns]).reshape(3, 16)
    own[:, 0, first + 16 :] -= 12
    scores = []
    for positions in (grid, own):
        states = model.model.language_model(
            inputs_embeds=embeddings, position_ids=positions
        ).last_hidden_state
        x = states[0, int((ids == words.convert_tokens_to_ids("<|Reward|>")).int().argmax())]
        for layer in (0, 3, 5):
            x = (
                state[f"rm_head.{layer}.weight"] @ x.relu()
                if layer
                else state["rm_head.0.weight"] @ x
            )
            x = x + state[f"rm_head.{layer}.bias"]
        scores.append(x[0])
    return scores


@pytest.mark.parametrize("earlier", [True, False])
@torch.no_grad()
def test_score_is_that_of_qwen_and_the_head(made: Made, earlier: bool, tmp_path: Path) -> None:
    folder, state = made
    file = tmp_path / "other.safetensors"
    hps_v3_file(file, folder / "qwen", earlier)
    shown = pictures(32, 32)
    processor = AutoImageProcessor.from_pretrained(folder / "qwen")
    expected, other = torch.stack(
        [
            torch.stack(by_hand(folder, state, prompt, processor(picture, return_tensors="pt")))
            for picture, prompt in zip(map(to_image, shown), PROMPTS, strict=True)
        ]
    ).T
    values = HPSv3(
        str(file),
        processor=str(folder / "qwen"),
        instruction=str(folder / "instruction.txt"),
        dtype="float32",
    )(shown, condition(PROMPTS))
    assert values.allclose(expected, rtol=1e-4, atol=1e-5)
    assert (values - values[0]).abs().max() > 1e-3
    # The authors' code numbers the picture's tokens in a row, as Qwen2-VL's own does not.
    assert (values - other).abs().min() > 1e-4


@pytest.mark.parametrize(
    ("size", "grid"),
    [((512, 512), (1, 32, 32)), ((1024, 768), (1, 36, 26)), ((100, 100), (1, 32, 32))],
)
def test_pictures_have_the_published_size(
    made: Made,
    size: tuple[int, int],
    grid: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    qwen = shutil.copytree(made[0] / "qwen", tmp_path / "qwen")
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14}
    (qwen / "preprocessor_config.json").write_text(json.dumps(settings))
    _, reader = qwen_parts(str(qwen))
    assert tuple(reader.grid(torch.zeros(1, 3, *size)).tolist()) == grid


def test_gradients_are_finite_differences(made: Made) -> None:
    reward = score(made[0]).double()
    assert reward.differentiable and not any(p.requires_grad for p in reward.parameters())
    shown = (0.3 + 0.4 * pictures(36, 45).double()).requires_grad_()
    given = condition(PROMPTS)
    reward(shown, given).sum().backward()
    direction = torch.randn(shown.shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        ahead, behind = (reward(shown + s * 1e-3 * direction, given).sum() for s in (1, -1))
    slope = (shown.grad * direction).sum()
    assert slope.abs() > 1e-9
    # Norms of language models compute in float32 for weights of any type.
    assert torch.isclose((ahead - behind) / 2e-3, slope, rtol=1e-2)


def test_chunks_and_precision(made: Made) -> None:
    shown, given = pictures(30, 40), condition(PROMPTS)
    reward = score(made[0])
    whole = reward(shown, given)
    reward.batch_size = 2
    assert reward(shown, given).allclose(whole, rtol=1e-4, atol=1e-5)
    half = score(made[0], dtype="bfloat16")
    assert {p.dtype for p in half.network.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.network.head.parameters()} == {torch.float32}
    values = half(shown, given)
    assert values.dtype == torch.float32 and values.allclose(whole, rtol=0.1, atol=0.05)
    probes = half(probe_pictures(24, 40), condition([PROMPTS[0]] * 4))
    assert half.distinguishes and probes.min() < probes.max()


def test_a_prompt_cannot_hold_the_scored_token(made: Made) -> None:
    reward, shown = score(made[0]), pictures()[:1]
    forged = reward(shown, condition(["a <|Reward|>ring"]))
    assert forged.equal(reward(shown, condition(["a ring"])))


def test_plan_builds_it_without_weights(made: Made, tmp_path: Path) -> None:
    qwen = shutil.copytree(made[0] / "qwen", tmp_path / "qwen")
    (qwen / "model.safetensors").unlink()
    with without_weights():
        reward = score(made[0], processor=str(qwen))
    assert all(parameter.is_meta for parameter in reward.parameters())
    shapes = [tuple(p.shape) for p in reward.network.head.parameters()]
    assert shapes[::2] == [(1024, 32), (16, 1024), (2, 16)]


def package(folder: Path, source: str | None) -> None:
    """Write a package that cannot be imported."""
    (folder / "hpsv3/dataset").mkdir(parents=True)
    (folder / "hpsv3/__init__.py").write_text("raise RuntimeError('imported')\n")
    if source is not None:
        (folder / "hpsv3/dataset/data_collator_qwen.py").write_text(source)


def test_the_instruction_is_read_from_the_package(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, end = TEXT.split("\n", 1)
    start += "\n"
    package(
        tmp_path,
        f"import heavy\nINSTRUCTION = {start!r}\nprompt_with_special_token = {end!r}\nother = 1\n",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert score(made[0], instruction=None).instruction == TEXT


@pytest.mark.parametrize(
    ("source", "said"),
    [(None, "lacks INSTRUCTION"), ("INSTRUCTION = ''", "lacks prompt_with_special_token")],
)
def test_another_package_is_told(
    made: Made, source: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(tmp_path, source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match=f"package hpsv3 {said}; run `pip install --no-deps"):
        score(made[0], instruction=None)


def test_an_absent_package_is_told(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"instruction is not given, .* hpsv3 is not installed; "):
        score(made[0], instruction=None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Rate <|Reward|>", r"text with \{text_prompt\} once"),
        ("Rate {text_prompt}", r"text with <\|Reward\|> once"),
        (None, r"none\.txt' is no text file; give one"),
    ],
)
def test_a_wrong_instruction_is_refused(
    made: Made, text: str | None, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "none.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=rf"instruction.*{said}"):
        score(made[0], instruction=str(path))


def without(name: str) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model.layers.1.mlp.up_proj.weight"), r"lacks model\.layers\.1\.mlp\.up_proj"),
        (without("visual.merger.mlp.0.bias"), r"lacks visual\.merger\.mlp\.0\.bias"),
        (without("rm_head.3.weight"), r"lacks rm_head\.3\.weight, so it is of another model"),
        (without("rm_head.5.bias"), r"lacks rm_head\.5\.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "has an unknown extra"),
        (
            lambda s: s.update({"model.embed_tokens.weight": torch.zeros(3, 32)}),
            r"has model\.embed_tokens\.weight of shape \(3, 32\) instead of \(\d+, 32\)",
        ),
    ],
)
def test_wrong_keys_are_named(
    made: Made, change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path
) -> None:
    state = dict(made[1])
    change(state)
    save_file(state, tmp_path / "HPSv3.safetensors")
    with pytest.raises(UsageError, match=rf"^pretrained: .*as an HPSv3; give.*{message}"):
        HPSv3(
            str(tmp_path),
            processor=str(made[0] / "qwen"),
            instruction=str(made[0] / "instruction.txt"),
        )


def test_foreign_processors_are_refused(made: Made, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(UsageError, match=r"^processor: .*model_type 'llava', not 'qwen2_vl'"):
        score(made[0], processor=str(tmp_path))
