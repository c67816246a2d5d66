"""VQAScore of CLIP-FlanT5 against a forward pass by hand, from the original keys."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer

from domains.text_to_image.networks.clip_flan_t5 import on_square
from domains.text_to_image.rewards import VQAScore
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.images import to_image
from lit_rlft.kit.weightless import without_weights
from tests.domains.text_to_image.rewards.published import (
    clip_flan_t5_folder,
    clip_folder,
    in_two_files,
    pil_processor,
)
from tests.domains.text_to_image.rewards.test_published import (
    PROMPTS,
    Weights,
    attend,
    condition,
    heads,
    pictures,
)

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
SEEN = "vision_tower.vision_tower.vision_model"
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("clip_flan_t5")
    return folder, clip_flan_t5_folder(folder)


def score(folder: Path, **settings: Any) -> VQAScore:
    return VQAScore(str(folder), **{"dtype": "float32", **settings})


class T5(Weights):
    """T5's layers by their names in a checkpoint."""

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self[f"{name}.weight"]

    def attention(self, name: str, x: Tensor, other: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            given @ self[f"{name}.{part}.weight"].T
            for part, given in (("q", x), ("k", other), ("v", other))
        )
        weights = (heads(q, 3) @ heads(k, 3).mT + bias).softmax(-1)
        mixed = (weights @ heads(v, 3)).transpose(1, 2).flatten(2)
        return mixed @ self[f"{name}.o.weight"].T

    def gated(self, name: str, x: Tensor) -> Tensor:
        wide = F.gelu(x @ self[f"{name}.wi_0.weight"].T, approximate="tanh")
        return (wide * (x @ self[f"{name}.wi_1.weight"].T)) @ self[f"{name}.wo.weight"].T

    def places(self, name: str, length: int, causal: bool) -> Tensor:
        """Return the bias of each pair of places, [heads, length, length]."""
        table = self[f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        buckets = torch.tensor([bucket(d, causal) for d in range(1 - length, length)])
        distances = torch.arange(length) - torch.arange(length)[:, None]
        bias = table[buckets[distances + length - 1]].permute(2, 0, 1)
        seen = torch.ones(length, length, dtype=torch.bool).tril() if causal else True
        return bias.masked_fill(~torch.as_tensor(seen), -torch.inf)

    def encode(self, x: Tensor) -> Tensor:
        bias = self.places("encoder", x.shape[1], False)
        for layer in (f"encoder.block.{i}.layer" for i in range(2)):
            y = self.norm(f"{layer}.0.layer_norm", x)
            x = x + self.attention(f"{layer}.0.SelfAttention", y, y, bias)
            y = self.norm(f"{layer}.1.layer_norm", x)
            x = x + self.gated(f"{layer}.1.DenseReluDense", y)
        return self.norm("encoder.final_layer_norm", x)

    def decode(self, ids: list[int], states: Tensor) -> Tensor:
        x = self["shared.weight"][ids][None]
        bias, none = self.places("decoder", len(ids), True), torch.zeros(1, dtype=torch.float64)
        for layer in (f"decoder.block.{i}.layer" for i in range(2)):
            y = self.norm(f"{layer}.0.layer_norm", x)
            x = x + self.attention(f"{layer}.0.SelfAttention", y, y, bias)
            y = self.norm(f"{layer}.1.layer_norm", x)
            x = x + self.attention(f"{layer}.1.EncDecAttention", y, states, none)
            y = self.norm(f"{layer}.2.layer_norm", x)
            x = x + self.gated(f"{layer}.2.DenseReluDense", y)
        return self.norm("decoder.final_layer_norm", x) @ self["lm_head.weight"].T


def bucket(distance: int, causal: bool) -> int:
    """Return the bucket of a key's distance from its query, as T5's paper has it."""
    half = 32 if causal else 16
    first = 16 if distance > 0 and not causal else 0
    far = max(-distance, 0) if causal else abs(distance)
    if far < half // 2:
        return first + far
    log = math.log(far / (half // 2)) / math.log(128 / (half // 2)) * (half - half // 2)
    return first + min(half // 2 + int(log), half - 1)


def patches(state: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
    """Return what stands for one picture [1, 3, 28, 28] in the question, [1, 16, 24]."""
    w = Weights(state, 1e-5)
    x = F.conv2d(pixels, w[f"{SEEN}.embeddings.patch_embedding.weight"], stride=7).flatten(2).mT
    x = torch.cat([w[f"{SEEN}.embeddings.class_embedding"].expand(1, 1, -1), x], 1)
    x = x + w[f"{SEEN}.embeddings.position_embedding.weight"]
    x = w.norm(f"{SEEN}.pre_layrnorm", x)
    layer = f"{SEEN}.encoder.layers.0"  # of two: the last but one state
    y = w.norm(f"{layer}.layer_norm1", x)
    q, k, v = (w.linear(f"{layer}.self_attn.{part}_proj", y) for part in "qkv")
    x = x + w.linear(f"{layer}.self_attn.out_proj", attend(q, k, v, 2))
    hidden = F.gelu(w.linear(f"{layer}.mlp.fc1", w.norm(f"{layer}.layer_norm2", x)))
    x = x + w.linear(f"{layer}.mlp.fc2", hidden)
    return w.linear("mm_projector.2", F.gelu(w.linear("mm_projector.0", x[:, 1:])))


def by_hand(folder: Path, state: Mapping[str, Tensor], pixels: Tensor, prompt: str) -> list[float]:
    """Return the mean log-probabilities of "Yes" and "No" for one picture, in float64."""
    words, w = AutoTokenizer.from_pretrained(folder), T5(state, 1e-6)
    before, after = (
        w["shared.weight"][words(text)["input_ids"]][None]
        for text in (
            f"{SYSTEM} USER: ",
            f'\nDoes this figure show "{prompt}"? Please answer yes or no. ASSISTANT: ',
        )
    )
    states = w.encode(torch.cat([before, patches(state, pixels), after], 1))
    found = []
    for answer in ("Yes", "No"):
        ids = words(answer)["input_ids"]
        assert ids[-1] == 1 and len(ids) == {"Yes": 2, "No": 3}[answer]
        logits = w.decode([0, *ids[:-1]], states)[0]
        found.append(-float(F.cross_entropy(logits, torch.tensor(ids))))
    return found


@pytest.mark.parametrize(
    "size", [(28, 28), (28, 17), pytest.param((20, 28), marks=pytest.mark.slow)]
)
def test_score_is_the_forward_by_hand(
    made: tuple[Path, dict[str, Tensor]], size: tuple[int, int]
) -> None:
    shown, given = pictures(*size).double(), condition(PROMPTS)
    down, right = 28 - size[0], 28 - size[1]
    colour = torch.tensor([122, 116, 104]).double()[:, None, None] / 255
    padded = colour.expand(3, 3, 28, 28).clone()
    padded[:, :, down // 2 : down // 2 + size[0], right // 2 : right // 2 + size[1]] = shown
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
    pixels = ((padded - mean) / std).split(1)
    found = [by_hand(*made, *each) for each in zip(pixels, PROMPTS, strict=True)]
    yes, no = torch.tensor(found, dtype=torch.float64).T
    assert (yes - yes[0]).abs().max() > 1e-3
    reward = score(made[0]).double()
    for output, expected in (
        ("probability", yes.exp()),
        ("log_probability", yes),
        ("yes_or_no", yes.exp() / (yes.exp() + no.exp())),
    ):
        reward.output = output
        # Norms and softmaxes of T5 compute in float32 for weights of any type.
        assert reward(shown, given).allclose(expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [(40, 56), pytest.param((64, 30), marks=pytest.mark.slow)])
def test_pixels_are_those_of_the_processor(
    made: tuple[Path, dict[str, Tensor]], size: tuple[int, int]
) -> None:
    network, shown = score(made[0]).network, pictures(*size)
    processor = pil_processor().from_pretrained(made[0] / "openai/tiny")
    squares = []
    for picture in map(to_image, shown):
        side = max(picture.size)
        square = Image.new("RGB", (side, side), tuple(int(x * 255) for x in processor.image_mean))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        squares.append(square)
    read = processor(images=squares, return_tensors="pt")["pixel_values"]
    own = network.preprocess(on_square(shown, network.preprocess.mean))
    error = (own - read).abs() * min(STD) * 255
    assert error.max() < 2.6 and error.mean() < 0.5


def test_gradients_are_finite_differences(made: tuple[Path, dict[str, Tensor]]) -> None:
    reward = score(made[0], output="log_probability").double()
    assert reward.differentiable and not any(p.requires_grad for p in reward.parameters())
    shown = (0.3 + 0.4 * pictures(36, 45).double()).requires_grad_()
    given = condition(PROMPTS)
    reward(shown, given).sum().backward()
    direction = torch.randn(shown.shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        ahead, behind = (reward(shown + s * 1e-3 * direction, given).sum() for s in (1, -1))
    slope = (shown.grad * direction).sum()
    assert slope.abs() > 1e-9
    assert torch.isclose((ahead - behind) / 2e-3, slope, rtol=1e-2)


def test_chunks_precision_and_passes(made: tuple[Path, dict[str, Tensor]]) -> None:
    shown, given = pictures(30, 40), condition(PROMPTS)
    reward = score(made[0], output="yes_or_no")
    passes: dict[str, int] = {"vision": 0, "language.encoder": 0}
    for name in passes:

        def count(*_: Any, name: str = name) -> None:
            passes[name] += 1

        reward.network.get_submodule(name).register_forward_pre_hook(count)
    whole = reward(shown, given)
    assert passes == {"vision": 1, "language.encoder": 1}
    reward.batch_size = 2
    assert reward(shown, given).allclose(whole, rtol=1e-4)
    assert passes == {"vision": 3, "language.encoder": 3}
    half = score(made[0], output="yes_or_no", dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    values = half(shown, given)
    assert values.dtype == torch.float32 and values.allclose(whole, rtol=0.2)


def test_the_place_of_a_picture_cannot_be_written(made: tuple[Path, dict[str, Tensor]]) -> None:
    reward, shown = score(made[0]), pictures()[:1]
    forged = reward(shown, condition(["<image>a ring"]))
    assert forged.equal(reward(shown, condition(["a ring"])))


def test_clip_is_what_the_checkpoint_names(
    made: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder = shutil.copytree(made[0], tmp_path / "copy")
    other = clip_folder(tmp_path / "clip")  # the same weights
    in_two_files(folder, {n: v for n, v in made[1].items() if not n.startswith("vision_tower")})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mm_vision_tower": str(other)}))
    shown, given = pictures(), condition(PROMPTS)
    assert score(folder)(shown, given).equal(score(made[0])(shown, given))


def test_plan_builds_it_without_weights(
    made: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder = shutil.copytree(made[0], tmp_path / "copy")
    for path in folder.glob("*.bin"):
        path.unlink()
    with without_weights():
        reward = score(folder)
    assert all(parameter.is_meta for parameter in reward.parameters())
    # Of the tower's two layers one is needed.
    assert len(list(reward.network.vision.parameters())) == 3 + 2 + 16 + 2
    with pytest.raises(UsageError, match=r"00001-of-00002\.bin, which its .*index\.json names"):
        score(folder)


def without(name: str) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda state: state.pop(name)


WO = "decoder.block.1.layer.2.DenseReluDense.wo.weight"


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (without(WO), {}, rf"lacks {WO}"),
        (without("lm_head.weight"), {}, r"lacks lm_head\.weight, so it is of another model"),
        (without("mm_projector.2.bias"), {}, r"lacks mm_projector\.2\.bias"),
        (without(f"{SEEN}.pre_layrnorm.bias"), {}, rf"lacks {SEEN}\.pre_layrnorm\.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), {}, "has an unknown extra"),
        (lambda s: s.update({WO: torch.zeros(3)}), {}, rf"has {WO} of shape \(3,\) instead of"),
        (lambda s: None, {"mm_projector_type": "linear"}, "mm_projector_type 'linear'"),
        (lambda s: None, {"mm_vision_tower": None}, "mm_vision_tower None, which has to name"),
        (lambda s: None, {"model_type": "t5"}, "as a vision-language model; give"),
    ],
)
def test_what_is_no_such_model_is_refused(
    made: tuple[Path, dict[str, Tensor]],
    change: Callable[[dict[str, Tensor]], Any],
    settings: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    folder, state = shutil.copytree(made[0], tmp_path / "copy"), dict(made[1])
    change(state)
    in_two_files(folder, state)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(UsageError, match=rf"^pretrained: .*{message}"):
        score(folder)
