"""Rewards from published weights against independent computations, on tiny random models."""

import math
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoProcessor, CLIPModel, LlavaForConditionalGeneration

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.text_to_image.networks import texts
from domains.text_to_image.networks.open_clip import BlackBars
from domains.text_to_image.rewards import (
    CLIPScore,
    HPSv2,
    ImageReward,
    LAIONAesthetic,
    PickScore,
    VQAScore,
    image_reward,
)
from domains.text_to_image.rewards import hpsv2 as hpsv2_module
from domains.text_to_image.rewards.aesthetic import _head
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.kit.images import to_image
from lit_rlft.kit.probe_pictures import probe_pictures
from lit_rlft.kit.weightless import without_weights
from tests.conftest import TOKENIZER
from tests.domains.text_to_image.rewards.published import (
    aesthetic_head,
    all_weights,
    llava_folder,
    pil_processor,
    tokens,
)

WEIGHTS = Path(__file__).parents[4] / ".." / "shared/data/weights"
PROMPTS = ["a red ring", "two blue circles", "a red ring"]
NAMES = ("PickScore", "HPSv2", "LAIONAesthetic", "ImageReward", "VQAScore")
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def condition(prompts: list[str]) -> Condition:
    unique = list(dict.fromkeys(prompts))
    rows = torch.tensor([unique.index(prompt) for prompt in prompts])
    return Condition(entries=[{"prompt": prompt} for prompt in unique], tables={}, rows=rows)


def pictures(height: int = 28, width: int = 28) -> Tensor:
    """Return pictures whose values are bytes / 255."""
    drawn = torch.randint(256, (3, 3, height, width), generator=torch.Generator().manual_seed(0))
    return drawn.float() / 255


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the weights of all rewards."""
    return all_weights(tmp_path_factory.mktemp("published"))


def made(name: str, files: Path, **settings: Any) -> Reward:
    """Return a reward whose weights are in a folder as `all_weights` writes it."""
    words = str(TOKENIZER)
    return {
        "PickScore": lambda: PickScore(str(files / "clip"), None, **settings),
        "HPSv2": lambda: HPSv2(str(files), tokenizer=words, **settings),
        "LAIONAesthetic": lambda: LAIONAesthetic(
            str(files / "head.pth"), str(files / "clip"), **settings
        ),
        "ImageReward": lambda: ImageReward(
            str(files / "ImageReward.pt"), tokenizer=words, **settings
        ),
        "VQAScore": lambda: VQAScore(str(files / "llava"), **{"dtype": "float32", **settings}),
    }[name]()


@pytest.fixture
def make(files: Path) -> Callable[..., Reward]:
    return lambda name, **settings: made(name, files, **settings)


def pixels_of(folder: Path, given: Tensor) -> Tensor:
    processor = pil_processor().from_pretrained(folder)
    images = [to_image(picture) for picture in given]
    return processor(images=images, return_tensors="pt")["pixel_values"]


def heads(x: Tensor, num: int) -> Tensor:
    return x.unflatten(-1, (num, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, num: int, mask: Tensor | None = None) -> Tensor:
    scores = heads(q, num) @ heads(k, num).mT / heads(q, num).shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ heads(v, num)).transpose(1, 2).flatten(2)


class Weights:
    """Layers of a state dict, by their names there."""

    def __init__(self, state: Mapping[str, Tensor], eps: float) -> None:
        self.state = {n: v.double() if v.is_floating_point() else v for n, v in state.items()}
        self.eps = eps

    def __getitem__(self, name: str) -> Tensor:
        return self.state[name]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self[f"{name}.weight"].T + self[f"{name}.bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return scaled * self[f"{name}.weight"] + self[f"{name}.bias"]


def open_clip_block(w: Weights, name: str, x: Tensor, num: int, mask: Tensor | None) -> Tensor:
    packed = w[f"{name}.attn.in_proj_weight"], w[f"{name}.attn.in_proj_bias"]
    q, k, v = (w.norm(f"{name}.ln_1", x) @ packed[0].T + packed[1]).chunk(3, -1)
    x = x + w.linear(f"{name}.attn.out_proj", attend(q, k, v, num, mask))
    hidden = F.gelu(w.linear(f"{name}.mlp.c_fc", w.norm(f"{name}.ln_2", x)))
    return x + w.linear(f"{name}.mlp.c_proj", hidden)


def open_clip_score(state: Mapping[str, Tensor], pixels: Tensor, prompts: list[str]) -> Tensor:
    """Return open_clip's cosine of pictures and texts, from its own keys, in float64."""
    w = Weights(state, 1e-5)
    x = F.conv2d(pixels, w["visual.conv1.weight"], stride=7).flatten(2).mT
    first = w["visual.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + w["visual.positional_embedding"]
    x = w.norm("visual.ln_pre", x)
    for i in range(2):
        x = open_clip_block(w, f"visual.transformer.resblocks.{i}", x, 2, None)
    image = w.norm("visual.ln_post", x[:, 0]) @ w["visual.proj"]
    words = tokens()
    ids = [words(prompt)["input_ids"] for prompt in prompts]
    # open_clip pads with 0, to the whole context, and looks at no mask.
    padded = torch.tensor([own + [0] * (16 - len(own)) for own in ids])
    y = w["token_embedding.weight"][padded] + w["positional_embedding"]
    causal = torch.ones(16, 16, dtype=torch.bool).tril()
    for i in range(2):
        y = open_clip_block(w, f"transformer.resblocks.{i}", y, 2, causal)
    last = torch.tensor([len(own) - 1 for own in ids])
    text = w.norm("ln_final", y)[torch.arange(len(ids)), last] @ w["text_projection"]
    return F.cosine_similarity(image, text)


def image_reward_score(state: Mapping[str, Tensor], pixels: Tensor, prompts: list[str]) -> Tensor:
    """Return ImageReward's score, from its own keys, in float64."""
    w, seen, read = Weights(state, 1e-6), "blip.visual_encoder", "blip.text_encoder"
    conv = w[f"{seen}.patch_embed.proj.weight"], w[f"{seen}.patch_embed.proj.bias"]
    x = F.conv2d(pixels, *conv, stride=7).flatten(2).mT
    x = torch.cat([w[f"{seen}.cls_token"].expand(len(x), 1, -1), x], 1) + w[f"{seen}.pos_embed"]
    for name in (f"{seen}.blocks.{i}" for i in range(2)):
        q, k, v = w.linear(f"{name}.attn.qkv", w.norm(f"{name}.norm1", x)).chunk(3, -1)
        x = x + w.linear(f"{name}.attn.proj", attend(q, k, v, 2))
        hidden = F.gelu(w.linear(f"{name}.mlp.fc1", w.norm(f"{name}.norm2", x)))
        x = x + w.linear(f"{name}.mlp.fc2", hidden)
    patches = w.norm(f"{seen}.norm", x)
    w.eps = 1e-12
    given = tokens()(prompts, padding="max_length", max_length=35, return_tensors="pt")
    mask = given["attention_mask"].bool()[:, None, None]
    y = w[f"{read}.embeddings.word_embeddings.weight"][given["input_ids"]]
    y = y + w[f"{read}.embeddings.position_embeddings.weight"][:35]
    y = w.norm(f"{read}.embeddings.LayerNorm", y)
    for layer in (f"{read}.encoder.layer.{i}" for i in range(2)):
        for name, source, seen_by in (
            (f"{layer}.attention", None, mask),
            (f"{layer}.crossattention", patches, None),
        ):
            q = w.linear(f"{name}.self.query", y)
            other = y if source is None else source
            k, v = (w.linear(f"{name}.self.{part}", other) for part in ("key", "value"))
            mixed = w.linear(f"{name}.output.dense", attend(q, k, v, 1, seen_by))
            y = w.norm(f"{name}.output.LayerNorm", mixed + y)
        hidden = F.gelu(w.linear(f"{layer}.intermediate.dense", y))
        y = w.norm(f"{layer}.output.LayerNorm", w.linear(f"{layer}.output.dense", hidden) + y)
    z = y[:, 0]
    for place in (0, 2, 4, 6, 7):
        z = w.linear(f"mlp.layers.{place}", z)
    return (z[:, 0] - 0.16717362830052426) / 1.0333394966054072


def test_pick_score_is_the_logit_of_transformers(files: Path, make: Callable) -> None:
    model = CLIPModel.from_pretrained(files / "clip").eval()
    given = tokens()(PROMPTS, padding=True, return_tensors="pt")
    for size, tolerance in (((28, 28), 1e-4), ((40, 56), 0.4)):
        shown = pictures(*size)
        with torch.no_grad():
            made = model(
                pixel_values=pixels_of(files / "clip", shown),
                input_ids=given["input_ids"],
                attention_mask=given["attention_mask"],
            )
        values = make("PickScore")(shown, condition(PROMPTS))
        assert values.allclose(made.logits_per_image.diagonal(), atol=tolerance)
        assert values.std() > tolerance


def test_aesthetic_score_is_the_plain_chain_of_layers(files: Path, make: Callable) -> None:
    model = CLIPModel.from_pretrained(files / "clip").eval()
    state = torch.load(files / "head.pth", weights_only=True)
    with torch.no_grad():
        pooled = model.vision_model(pixels_of(files / "clip", pictures())).pooler_output
        x = F.normalize(model.visual_projection(pooled), dim=-1)
        for place in (0, 2, 4, 6, 7):
            x = F.linear(x, state[f"layers.{place}.weight"], state[f"layers.{place}.bias"])
    assert make("LAIONAesthetic")(pictures(), condition(PROMPTS)).allclose(x[:, 0], rtol=1e-4)


@pytest.mark.skipif(not WEIGHTS.is_dir(), reason="LAION's heads are not there")
@pytest.mark.parametrize(
    ("file", "norm", "bias", "even", "first"),
    [
        (
            "sac+logos+ava1-l14-linearMSE.pth",
            17.995625,
            5.236646,
            4.883285,
            4.545052,
        ),
        ("laion_aesthetic_vit_l_14_linear.pth", 28.444397, 3.529372, None, None),
    ],
)
def test_laions_own_heads_have_the_known_values(
    file: str, norm: float, bias: float, even: float | None, first: float | None
) -> None:
    head = _head(str(WEIGHTS / file), 768)
    assert head.weight.norm().item() == pytest.approx(norm, abs=2e-5)
    assert head.bias.item() == pytest.approx(bias, abs=2e-6)
    if even is not None:
        probes = torch.stack([torch.full((768,), 768**-0.5), torch.eye(768)[0]])
        assert head(probes)[:, 0].tolist() == pytest.approx([even, first], abs=2e-6)


@pytest.mark.parametrize("size", [(28, 28), (28, 17), (20, 28)])
def test_hpsv2_is_open_clips_forward(files: Path, make: Callable, size: tuple[int, int]) -> None:
    shown = pictures(*size).double()
    down, right = 28 - size[0], 28 - size[1]
    padded = torch.zeros(3, 3, 28, 28, dtype=torch.float64)
    padded[:, :, down // 2 : down // 2 + size[0], right // 2 : right // 2 + size[1]] = shown
    state = torch.load(files / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    expected = open_clip_score(state, (padded - MEAN) / STD, PROMPTS)
    values = make("HPSv2").double()(shown, condition(PROMPTS))
    assert values.dtype == torch.float64
    # The mean and deviation of the test are rounded to float32.
    assert values.allclose(expected, rtol=0, atol=1e-7)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in _EXACT)
    exact = open_clip_score(state, (padded - mean) / std, PROMPTS)
    assert values.allclose(exact, rtol=0, atol=1e-10)
    assert values.std() > 1e-3


_EXACT = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)


def test_black_bars_resize_the_longest_side() -> None:
    made = BlackBars(28)(torch.ones(1, 3, 112, 56))
    black = (-torch.tensor(_EXACT[0]) / torch.tensor(_EXACT[1]))[:, None, None]
    assert made.shape == (1, 3, 28, 28)
    assert made[0, :, :, :7].allclose(black) and made[0, :, :, 21:].allclose(black)
    assert (made[0, :, :, 7:21] > 1.9).all()


def test_antialiasing_is_a_choice(make: Callable) -> None:
    shown, given = pictures(112, 112), condition(PROMPTS)
    smooth, rough = (make("HPSv2", antialias=choice)(shown, given) for choice in (True, False))
    assert not smooth.allclose(rough, atol=1e-4)


def test_image_reward_is_its_own_forward(files: Path, make: Callable) -> None:
    state = torch.load(files / "ImageReward.pt", weights_only=True)
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in _EXACT)
    shown = pictures().double()
    expected = image_reward_score(state, (shown - mean) / std, PROMPTS)
    reward = make("ImageReward").double()
    # Its head is multiplied in float64 and kept in float32.
    assert reward(shown, condition(PROMPTS)).allclose(expected, rtol=0, atol=1e-6)
    assert expected.std() > 1e-3


def test_vqa_score_is_the_softmax_of_the_first_answer(files: Path, make: Callable) -> None:
    processor = AutoProcessor.from_pretrained(files / "llava")
    processor.tokenizer.padding_side = "left"
    model = LlavaForConditionalGeneration.from_pretrained(files / "llava").eval()
    asked = [
        f'USER: <image>\nDoes this figure show "{p}"? Please answer Yes or No. ASSISTANT:'
        for p in PROMPTS
    ]
    read = processor(
        text=asked,
        images=[to_image(picture) for picture in pictures()],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model(**read).logits[:, -1]
    yes, no = (processor.tokenizer.encode(word)[0] for word in ("Yes", "No"))
    given = condition(PROMPTS)
    assert make("VQAScore")(pictures(), given).allclose(logits.softmax(-1)[:, yes], rtol=1e-4)
    log = make("VQAScore", output="log_probability")(pictures(), given)
    assert log.allclose(logits.log_softmax(-1)[:, yes], atol=1e-4)
    other = make("VQAScore", output="yes_or_no")
    expected = logits[:, [yes, no]].softmax(-1)[:, 0]
    assert other(pictures(), given).allclose(expected, rtol=1e-4) and other.name == "YesOrNo"


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_differences(name: str, make: Callable) -> None:
    reward = make(name).double()
    assert reward.differentiable
    shown = (0.3 + 0.4 * pictures(36, 45).double()).requires_grad_()
    given = condition(PROMPTS)
    reward(shown, given).sum().backward()
    direction = torch.randn(shown.shape, generator=torch.Generator().manual_seed(1)).double()
    # Norms of language models compute in float32, whatever the weights are.
    step, tolerance = (1e-3, 1e-2) if name == "VQAScore" else (1e-5, 1e-5)
    with torch.no_grad():
        ahead, behind = (reward(shown + s * step * direction, given).sum() for s in (1, -1))
    slope = (shown.grad * direction).sum()
    assert slope.abs() > 1e-9
    assert torch.isclose((ahead - behind) / (2 * step), slope, rtol=tolerance)
    assert not any(parameter.requires_grad for parameter in reward.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_half_precision_change_little(name: str, make: Callable) -> None:
    shown, given = pictures(30, 40), condition(PROMPTS)
    whole = make(name)(shown, given)
    assert make(name, batch_size=2)(shown, given).allclose(whole, rtol=1e-4, atol=1e-6)
    half = make(name, dtype="bfloat16")
    assert {p.dtype for p in half.parameters() if p.numel() > 100} == {torch.bfloat16}
    values = half(shown, given)
    assert values.dtype == torch.float32
    assert values.allclose(whole, rtol=0.1, atol=0.05)


def test_pick_score_has_its_whole_scale_in_half_precision(files: Path, tmp_path: Path) -> None:
    shutil.copytree(files / "clip", tmp_path / "clip")
    model = CLIPModel.from_pretrained(tmp_path / "clip")
    model.logit_scale.data.fill_(math.log(100))
    model.save_pretrained(tmp_path / "clip")
    shown, texts = pictures(), condition(PROMPTS)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        reward = PickScore(str(tmp_path / "clip"), None, dtype=str(dtype).removeprefix("torch."))
        encoder = reward.encoder
        assert encoder.clip.vision_model.dtype == dtype
        cosines = (encoder.embed_pictures(shown) * encoder.embed_texts(PROMPTS)).sum(dim=1)
        assert (reward(shown, texts) / cosines).mean() == pytest.approx(100, rel=1e-5)


def test_image_rewards_head_stays_in_single_precision(make: Callable) -> None:
    head, half = make("ImageReward").network.head, make("ImageReward", dtype="bfloat16").network
    assert half.vision.dtype == half.text.dtype == torch.bfloat16
    assert torch.equal(half.head.weight, head.weight) and torch.equal(half.head.bias, head.bias)


def _count(rows: list[int], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = kwargs.get("input_ids", kwargs.get("pixel_values", args[0] if args else None))
    rows.append(len(given))


PASSES: dict[str, dict[str, list[int]]] = {
    "PickScore": {"encoder.clip.vision_model": [3, 3], "encoder.clip.text_model": [2]},
    "HPSv2": {"encoder.clip.vision_model": [3, 3], "encoder.clip.text_model": [2]},
    "CLIPScore": {"encoder.clip.vision_model": [3, 3], "encoder.clip.text_model": [2]},
    "LAIONAesthetic": {"encoder.clip.vision_model": [3, 3]},
    # A text is read together with its picture.
    "ImageReward": {"network.vision": [3, 3], "network.text": [3, 3]},
    "VQAScore": {"network.model": [3, 3]},
}
"""Rows of each pass of each network when three pictures of two prompts are scored twice."""


@pytest.mark.parametrize("name", PASSES)
def test_each_picture_takes_one_pass_and_each_text_one(name: str, make: Callable) -> None:
    assert len(set(PROMPTS)) == 2 and len(PROMPTS) == 3
    reward: Reward = CLIPScore() if name == "CLIPScore" else make(name)
    passes: dict[str, list[int]] = {path: [] for path in PASSES[name]}
    for path, rows in passes.items():
        network = reward
        for part in path.split("."):
            network = getattr(network, part)
        network.register_forward_pre_hook(partial(_count, rows), with_kwargs=True)
    for _ in range(2):
        reward(pictures(), condition(PROMPTS))
    assert passes == PASSES[name]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["PickScore", "HPSv2", "LAIONAesthetic", "ImageReward"])
def test_known_pictures_are_told_apart(name: str, dtype: str, make: Callable) -> None:
    reward = make(name, dtype=dtype)
    assert reward.distinguishes
    values = reward(probe_pictures(24, 40), condition([PROMPTS[0]] * 4))
    assert values.isfinite().all() and values.min() < values.max()


def test_published_examples_are_scored_before_a_run(
    make: Callable, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        to_image(pictures(30, 40)[i % 3].roll(i)).save(tmp_path / f"{i + 1}.webp", lossless=True)
    reward, pipeline = make("ImageReward", self_test=str(tmp_path)), GaussianMixturePipeline()
    with pytest.raises(UsageError, match=r"self_test fails: .* where 0.5812, .* are published"):
        reward.check(pipeline)
    loaded = torch.stack([_picture(tmp_path / f"{i + 1}.webp") for i in range(4)])
    scores = make("ImageReward")(loaded, condition([image_reward._PROMPT] * 4))
    monkeypatch.setattr(image_reward, "_EXAMPLES", tuple(scores.tolist()))
    reward.check(pipeline)
    (tmp_path / "4.webp").unlink()
    with pytest.raises(UsageError, match=r"4.webp is no picture"):
        reward.check(pipeline)


def _picture(path: Path) -> Tensor:
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels / 255).permute(2, 0, 1)


@pytest.mark.parametrize("name", ["PickScore", "HPSv2", "ImageReward"])
def test_long_texts_are_cut_counted_and_said_once(
    name: str, make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(texts, "rank_zero_info", said.append)
    reward = make(name)
    reader = reward.reader if name == "ImageReward" else reward.encoder.reader
    long = ["a red ring " * 20, "a blue ring " * 20, "a ring"]
    for _ in range(2):
        cut = reward(pictures(), condition(long))
    assert reader.cut == set(long[:2])
    assert len(said) == 1 and long[0][:20] in said[0] and "cut off" in said[0]
    assert cut[:1].allclose(reward(pictures(), condition([long[0] + " two", *long[1:]]))[:1])


@pytest.mark.parametrize("name", ["HPSv2", "ImageReward"])
def test_published_sizes_are_built_without_weights(
    name: str, make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    with without_weights():
        reward = {"HPSv2": HPSv2, "ImageReward": ImageReward}[name]()
    sizes = sum(parameter.numel() for parameter in reward.parameters())
    assert all(parameter.is_meta for parameter in reward.parameters())
    # HPSv2's are 986 million; ImageReward's ViT-L has 304 and its text encoder 137.
    assert sizes / 1e6 == pytest.approx({"HPSv2": 986, "ImageReward": 441}[name], rel=0.02)


def other_key(state: dict[str, Tensor]) -> None:
    state["visual.extra"] = torch.zeros(1)


def less_key(state: dict[str, Tensor]) -> None:
    del state["visual.transformer.resblocks.1.mlp.c_proj.bias"]


def other_shape(state: dict[str, Tensor]) -> None:
    state["visual.proj"] = torch.zeros(160, 15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_key, r"has an unknown visual\.extra"),
        (less_key, r"lacks visual\.transformer\.resblocks\.1\.mlp\.c_proj\.bias"),
        (other_shape, r"has visual\.proj of shape"),
        (lambda state: state.clear(), r"lacks visual\.conv1\.weight, so it is of another model"),
    ],
)
def test_wrong_keys_are_named(change: Callable, message: str, files: Path, tmp_path: Path) -> None:
    state = torch.load(files / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    change(state)
    torch.save({"state_dict": state}, tmp_path / "hps.pt")
    with pytest.raises(UsageError, match=rf"^pretrained: .*as an HPSv2; give.*{message}"):
        HPSv2(str(tmp_path / "hps.pt"), tokenizer=str(TOKENIZER))


MODELS: dict[str, tuple[str, str, str]] = {
    "PickScore": ("clip", "text_model.final_layer_norm.bias", r"lack text_model\.final_layer"),
    "LAIONAesthetic": ("clip", "visual_projection.weight", r"lack visual_projection\.weight"),
    "VQAScore": ("llava", "multi_modal_projector.linear_1.bias", r"lack .*projector\.linear_1"),
    "ImageReward": ("ImageReward.pt", "mlp.layers.4.bias", r"mlp\.layers\.4\.bias"),
}
"""Of each reward the model, a weight of it, and what is said where it is not there."""


@pytest.mark.parametrize("name", MODELS)
def test_a_missing_weight_is_named_in_every_format(name: str, files: Path, tmp_path: Path) -> None:
    model, key, message = MODELS[name]
    for path in files.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / model).unlink()
    if (files / model).is_dir():
        shutil.copytree(files / model, tmp_path / model)
        weights = load_file(tmp_path / model / "model.safetensors")
        held = [own for own in weights if own.endswith(key)]
        kept = {own: value for own, value in weights.items() if own not in held}
        save_file(kept, tmp_path / model / "model.safetensors", {"format": "pt"})
    else:
        weights = torch.load(files / model, weights_only=True)
        held = [own for own in weights if own == key]
        torch.save({own: weights[own] for own in weights if own not in held}, tmp_path / model)
    assert len(held) == 1
    with pytest.raises(UsageError, match=message):
        made(name, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_that_are_none_are_refused(name: str, make: Callable) -> None:
    reward, given = make(name), condition(PROMPTS)
    with pytest.raises(UsageError, match=r"in \[0, 1\], got values from -1 to 1"):
        reward(2 * pictures().round() - 1, given)
    with pytest.raises(UsageError, match=r"float32 in \[0, 1\], got torch.uint8"):
        reward((255 * pictures()).byte(), given)


def test_a_tokenizer_without_a_token_for_yes_is_refused(tmp_path: Path) -> None:
    mute = llava_folder(tmp_path, answers=("No",))
    with pytest.raises(UsageError, match="no single token for 'Yes', but 3, and the probability"):
        VQAScore(str(mute), dtype="float32")


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exit, ())


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    torch.save({"state_dict": Harmful()}, tmp_path / "hps.pt")
    with pytest.raises(UsageError, match="Python objects, whose code is never run"):
        HPSv2(str(tmp_path / "hps.pt"), tokenizer=str(TOKENIZER))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("HPSv2", {"version": "3"}, "version is '3'; use '2.0' or '2.1'"),
        ("HPSv2", {"batch_size": 0}, "batch_size must be at least 1"),
        ("HPSv2", {"dtype": "int8"}, "dtype is 'int8'; use 'float32', 'float16' or 'bfloat16'"),
        ("VQAScore", {"template": "Is it so?"}, r"template must be a question with \{\}"),
        ("VQAScore", {"output": "logit"}, "output is 'logit'; use 'probability'"),
        ("VQAScore", {"yes": "Certainly"}, "no single token for 'Certainly', but 9"),
    ],
)
def test_wrong_settings_are_refused(
    name: str, settings: dict[str, Any], message: str, make: Callable
) -> None:
    with pytest.raises(UsageError, match=message):
        make(name, **settings)


def test_missing_and_foreign_files_are_refused(files: Path, tmp_path: Path) -> None:
    words, clip = str(TOKENIZER), str(files / "clip")
    with pytest.raises(UsageError, match=r"pretrained: .*an HPSv2; give the file HPS_v2\.1"):
        HPSv2(str(tmp_path / "none.pt"), tokenizer=words)
    with pytest.raises(UsageError, match=r"tokenizer: .*a tokenizer of CLIP; give"):
        HPSv2(str(files), tokenizer=str(tmp_path))
    with pytest.raises(UsageError, match=r"pretrained: .*an ImageReward; give.*lacks blip"):
        ImageReward(str(files / "head.pth"), tokenizer=words)
    with pytest.raises(UsageError, match=r"pretrained: .*as a CLIP"):
        PickScore(str(files / "llava"), None)
    with pytest.raises(UsageError, match=r"LAIONAesthetic: clip .*as a CLIP"):
        LAIONAesthetic(str(files / "head.pth"), str(files / "llava"))
    with pytest.raises(UsageError, match=r"head: .*no weight of a linear layer"):
        LAIONAesthetic(str(files / "HPS_v2.1_compressed.pt"), clip)
    aesthetic_head(tmp_path / "wide.pth", width=20)
    with pytest.raises(UsageError, match=r"head: .*takes embeddings of 20 .* have 16"):
        LAIONAesthetic(str(tmp_path / "wide.pth"), clip)
    with pytest.raises(UsageError, match=r"pretrained: .*a vision-language model; give"):
        VQAScore(clip)


def test_version_picks_the_file(files: Path) -> None:
    assert hpsv2_module._FILES["2.0"] == "HPS_v2_compressed.pt"
    with pytest.raises(UsageError, match=r"HPS_v2_compressed\.pt"):
        HPSv2(str(files), "2.0", tokenizer=str(TOKENIZER))


def test_a_model_whose_size_of_pictures_varies_sees_bytes(files: Path, make: Callable) -> None:
    reward = make("VQAScore")
    expected = reward(pictures(), condition(PROMPTS))
    reward.network.reader.twin = None  # as where the processor has no differentiable twin
    assert reward(pictures(), condition(PROMPTS)).allclose(expected, rtol=1e-3)
