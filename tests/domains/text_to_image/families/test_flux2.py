"""What FLUX.2-klein alone has: patches as channels, a shift of its own, three layers of Qwen3."""

import copy
import math
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from safetensors.torch import load_file
from torch import Tensor, nn

from domains.text_to_image.families import FAMILIES, Family
from domains.text_to_image.networks.flux2_names import original_lora, without_original
from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.checks import UsageError
from lit_rlft.core.sampling import Sampler
from lit_rlft.kit.flow_schedulers import empirical_mu
from lit_rlft.kit.weightless import without_weights
from lit_rlft.loop.reference import LoRA, adapt
from tests.domains.text_to_image.families.tiny import klein, tiny

PROMPTS = ["a red ring", "a blue square below"]
SIZE = {"height": 32, "width": 48}
LENGTH = {"max_sequence_length": 64}
SLOW = pytest.mark.slow
_DOUBLE, _SINGLE = r"^transformer_blocks\.(\d+)\.", r"^single_transformer_blocks\.(\d+)\."
ORIGINAL = {
    "^x_embedder": "img_in",
    "^context_embedder": "txt_in",
    "^proj_out": "final_layer.linear",
    "^time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "^time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "^(double_stream_modulation_(img|txt)|single_stream_modulation).linear": r"\1.lin",
    f"{_SINGLE}attn.to_qkv_mlp_proj": r"single_blocks.\1.linear1",
    f"{_SINGLE}attn.to_out": r"single_blocks.\1.linear2",
    f"{_SINGLE}attn.norm_q.weight": r"single_blocks.\1.norm.query_norm.scale",
    f"{_SINGLE}attn.norm_k.weight": r"single_blocks.\1.norm.key_norm.scale",
    f"{_DOUBLE}attn.norm_q.weight": r"double_blocks.\1.img_attn.norm.query_norm.scale",
    f"{_DOUBLE}attn.norm_k.weight": r"double_blocks.\1.img_attn.norm.key_norm.scale",
    f"{_DOUBLE}attn.norm_added_q.weight": r"double_blocks.\1.txt_attn.norm.query_norm.scale",
    f"{_DOUBLE}attn.norm_added_k.weight": r"double_blocks.\1.txt_attn.norm.key_norm.scale",
    f"{_DOUBLE}attn.to_out.0": r"double_blocks.\1.img_attn.proj",
    f"{_DOUBLE}attn.to_add_out": r"double_blocks.\1.txt_attn.proj",
    f"{_DOUBLE}ff.linear_in": r"double_blocks.\1.img_mlp.0",
    f"{_DOUBLE}ff.linear_out": r"double_blocks.\1.img_mlp.2",
    f"{_DOUBLE}ff_context.linear_in": r"double_blocks.\1.txt_mlp.0",
    f"{_DOUBLE}ff_context.linear_out": r"double_blocks.\1.txt_mlp.2",
}
"""Names of diffusers' layers in the original code, but for those of queries, keys and values."""


@pytest.fixture(scope="module")
def parts() -> Any:
    return tiny("klein")


@pytest.fixture(scope="module")
def folder(parts: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "klein"
    parts.save_pretrained(path)
    return path


def family_of(parts: Any, **options: Any) -> Family:
    return FAMILIES["Flux2KleinPipeline"](parts, (32, 48), **{**LENGTH, **options})


@pytest.mark.parametrize(
    ("tokens", "steps"), [(24, 4), (1024, 50), (4096, 4), (4300, 28), (8100, 9)]
)
def test_the_shift_is_that_of_flux_2(tokens: int, steps: int) -> None:
    assert empirical_mu(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps))


def test_the_shift_by_hand() -> None:
    """At 10 and 200 steps it is a line of the tokens, and half-way at 105."""
    few, many = 8.73809524e-05 * 1024 + 1.89833333, 0.00016927 * 1024 + 0.45666666
    assert empirical_mu(1024, 10) == pytest.approx(few)
    assert empirical_mu(1024, 200) == pytest.approx(many)
    assert empirical_mu(1024, 105) == pytest.approx((few + many) / 2)
    assert empirical_mu(5000, 4) == empirical_mu(5000, 50)


def test_grids_have_the_shift_of_their_steps_and_training_times_their_own(parts: Any) -> None:
    process = family_of(parts).process
    tokens = (32 // 4) * (48 // 4)
    for steps in (4, 1, 50):
        shift = math.exp(compute_empirical_mu(tokens, steps))
        even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        expected = shift * even / (1 + (shift - 1) * even)
        torch.testing.assert_close(process.times(steps), expected)
        # sigmoid(0) before the shift, which is linear in the tokens: 0.5 at 256, 1.15 at 4096.
        own = math.exp(0.5 + 0.65 * (tokens - 256) / (4096 - 256))
        middle = process.draw_times(torch.tensor([0.5], dtype=torch.float64))
        assert float(middle) == pytest.approx(own / (1 + own))


@pytest.mark.parametrize(
    ("guidance", "steps"),
    [(3.5, 4), pytest.param(1.0, 4, marks=SLOW), pytest.param(3.5, 1, marks=SLOW)],
)
def test_pictures_are_those_of_diffusers(
    folder: Path, parts: Any, guidance: float, steps: int
) -> None:
    pipeline = TextToImagePipeline(str(folder), guidance_scale=guidance, **LENGTH, **SIZE)
    condition = pipeline.encode({"prompt": list(PROMPTS)})
    z = torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = Sampler(num_steps=steps).sample(pipeline, pipeline.process, z, condition)
        pictures = pipeline.decode(x, condition)
    given: dict[str, Any] = {"guidance_scale": guidance, "num_inference_steps": steps}
    expected = parts(
        prompt=list(PROMPTS), latents=z.clone(), output_type="pt", **given, **LENGTH, **SIZE
    ).images
    assert float(expected.std()) > 0.02
    torch.testing.assert_close(pictures, expected, atol=1e-4, rtol=0)


def test_latents_of_pictures_are_those_of_diffusers(folder: Path, parts: Any) -> None:
    pipeline = TextToImagePipeline(str(folder), **LENGTH, **SIZE)
    image = torch.randint(256, (2, 3, 32, 48), dtype=torch.uint8)
    states = pipeline.states({"image": image})
    with torch.no_grad():
        expected = parts._encode_vae_image(image / 127.5 - 1, generator=None)
    assert abs(float(expected.std()) - 1) > 0.02  # the statistics are others than 0 and 1
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-5)
    family = pipeline.family
    torch.testing.assert_close(family.from_vae(family.to_vae(states)), states)


def test_a_row_is_what_diffusers_encodes_whatever_its_batch(parts: Any) -> None:
    family = family_of(parts)
    prompts = ["", *PROMPTS, "word " * 20]
    rows = family.encode(prompts)["embedding"]
    assert tuple(rows.shape[1:]) == family.encoded_shapes()["embedding"] == (64, 48)
    for prompt, row in zip(prompts, rows, strict=True):
        expected, _ = parts.encode_prompt(prompt, **LENGTH)
        torch.testing.assert_close(row, expected[0], atol=1e-6, rtol=1e-5)
    with torch.no_grad():  # layers 9, 18 and 27 of Qwen3, side by side
        ids = parts.tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPTS[0]}],
            add_generation_prompt=True,
            enable_thinking=False,
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        layers = parts.text_encoder.model(ids, output_hidden_states=True).hidden_states
    own = torch.cat([layers[i][0] for i in (9, 18, 27)], dim=-1)
    torch.testing.assert_close(rows[1][: len(own)], own, atol=1e-5, rtol=1e-4)


def test_all_of_attention_has_a_lora_and_goes_to_diffusers(folder: Path, tmp_path: Path) -> None:
    """Single blocks have one layer for queries, keys, values and MLP, and one behind them."""
    pipeline = TextToImagePipeline(str(folder), guidance_scale=1.0, **LENGTH, **SIZE)
    layers = [n for n, own in pipeline.denoiser.named_modules() if isinstance(own, nn.Linear)]
    adapt(pipeline, LoRA(rank=2, alpha=2), seed=0)
    named = dict(pipeline.denoiser.named_parameters())
    tuned = {name.partition(".lora_A")[0] for name in named if ".lora_A" in name}
    assert tuned == {name for name in layers if ".attn." in name} and len(tuned) == 8 + 2 * 2
    for name, parameter in named.items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    condition = pipeline.encode({"prompt": PROMPTS[:1]})
    x, t = torch.randn(1, 16, 8, 12), torch.tensor([0.5])
    with torch.no_grad():
        expected = pipeline(x, t, condition)
    pipeline.save(tmp_path)
    plain = TextToImagePipeline(str(folder), guidance_scale=1.0, **LENGTH, **SIZE)
    with torch.no_grad():
        assert (plain(x, t, condition) - expected).abs().max() > 0.01
        plain.diffusers.load_lora_weights(tmp_path)  # the other program's reader
        torch.testing.assert_close(plain(x, t, condition), expected, atol=1e-5, rtol=1e-4)


def test_a_distilled_model_has_no_guidance(parts: Any) -> None:
    distilled = tiny("klein_distilled")
    family = family_of(distilled)
    assert family.guidance_scale == 1 and family.cfg_scale(4.0) == 1
    assert family_of(parts).guidance_scale == family_of(parts).cfg_scale(4.0) == 4
    with pytest.warns(UserWarning, match=r"guidance_scale 4 changes no picture: .*klein-base-4B"):
        family.check_guidance(4.0, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        family.check_guidance(1.0, None)
        family_of(parts).check_guidance(4.0, "")


def test_a_negative_prompt_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"^pipeline\.init_args\.negative_prompt does not apply"):
        TextToImagePipeline(str(folder), negative_prompt="dull", **SIZE)


def test_an_empty_negative_prompt_is_diffusers_own(parts: Any) -> None:
    """Its call has no argument for one, which a model card would give it."""
    family = family_of(parts)
    assert family.call(4.0, "") == family.call(4.0, None)
    assert "negative_prompt" not in family.call(4.0, None)


def test_another_vae_takes_the_place_of_the_models_own(folder: Path, tmp_path: Path) -> None:
    """As FLUX.2's small decoder; one of another class would read other latents."""
    other = tiny("klein", seed=5).vae
    other.save_pretrained(tmp_path / "vae")
    pipeline = TextToImagePipeline(str(folder), vae=str(tmp_path / "vae"), **SIZE)
    assert torch.equal(pipeline.vae.bn.running_mean, other.bn.running_mean)
    file = str(tmp_path / "vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(UsageError, match=r"\.vae: diffusers reads no single file .* give a folder"):
        TextToImagePipeline(str(folder), vae=file, **SIZE)
    tiny("flux_dev").vae.save_pretrained(tmp_path / "kl")
    said = r"^pipeline\.init_args\.vae: .* is of class AutoencoderKL, not an AutoencoderKLFlux2"
    with pytest.raises(UsageError, match=said):
        TextToImagePipeline(str(folder), vae=str(tmp_path / "kl"), **SIZE)


def test_without_weights_there_are_shapes(folder: Path, tmp_path: Path) -> None:
    for pattern in ("*/config.json", "*_config.json", "model_index.json"):
        for path in folder.rglob(pattern):
            target = tmp_path / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    with without_weights():
        pipeline = TextToImagePipeline(str(tmp_path), **SIZE)
        condition = pipeline.encode({"prompt": PROMPTS})
        x: Tensor = pipeline.blank(condition).to("meta")
        prediction = pipeline(x, torch.full((len(x),), 0.5, device="meta"), condition)
    assert prediction.is_meta and prediction.shape == x.shape == (2, 16, 8, 12)


def changed(change: str) -> Any:
    """Return a model that is not supported."""
    parts: Any = klein()
    if change == "chat":
        parts.tokenizer.chat_template = None
    elif change == "width":
        parts.transformer.register_to_config(joint_attention_dim=16)
    elif change == "layers":
        parts.text_encoder.config.num_hidden_layers = 24
    elif change == "guidance":
        parts.transformer.register_to_config(guidance_embeds=True)
    elif change == "vae":
        parts.vae = tiny("flux_dev").vae
    elif change == "channels":
        parts.transformer.register_to_config(in_channels=64)
    return parts


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("chat", "no chat template"),
        ("width", "text features of 16 numbers, its text encoder makes 48"),
        ("layers", "text encoder has 24 layers, and the features are those of layer 27 too"),
        ("guidance", "given the guidance scale, as FLUX.2-dev's is"),
        ("vae", "VAE is a AutoencoderKL, not an AutoencoderKLFlux2"),
        ("channels", "reads 16 channels and its VAE has 4"),
    ],
)
def test_models_that_do_not_fit_are_refused(change: str, said: str) -> None:
    with pytest.raises(UsageError, match=rf"^pipeline\.init_args\.pretrained: .*{said}"):
        family_of(changed(change))


def test_sizes_that_do_not_fit_are_refused(parts: Any) -> None:
    with pytest.raises(UsageError, match=r"init_args\.width is 34, .* multiple of 4"):
        FAMILIES["Flux2KleinPipeline"](parts, (32, 34))
    assert FAMILIES["Flux2KleinPipeline"](parts).pixels == (256, 256)  # 1024 with the real VAE


def original(network: Any) -> dict[str, Tensor]:
    """Return a transformer's weights by the names of the original code."""
    found: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        for own, other in ORIGINAL.items():
            name = re.sub(own, other, name)
        found[name] = value.clone()
    for i, block in enumerate(network.transformer_blocks):
        for own, parts in (
            ("img", (block.attn.to_q, block.attn.to_k, block.attn.to_v)),
            ("txt", (block.attn.add_q_proj, block.attn.add_k_proj, block.attn.add_v_proj)),
        ):
            found[f"double_blocks.{i}.{own}_attn.qkv.weight"] = torch.cat([p.weight for p in parts])
    return {name: value for name, value in found.items() if "transformer_blocks" not in name}


def test_a_web_lora_is_added_to_the_original_weights(
    folder: Path, tmp_path: Path, parts: Any
) -> None:
    """As ComfyUI adds it: to each weight that its name, with underscores, is of."""
    pipeline = TextToImagePipeline(str(folder), web_lora=True, **LENGTH, **SIZE)
    linear = [n for n, own in pipeline.denoiser.named_modules() if isinstance(own, nn.Linear)]
    known = [name for name in linear if not without_original([name])]
    adapt(pipeline, LoRA(rank=2, alpha=3, targets=known), seed=0)
    for name, parameter in pipeline.denoiser.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    pipeline.save(tmp_path)
    lora, weights = load_file(tmp_path / "web_lora.safetensors"), original(parts.transformer)
    layers = {f"lora_unet_{n.removesuffix('.weight').replace('.', '_')}": n for n in weights}
    changed = {name.partition(".lora_")[0] for name in lora}
    assert changed <= set(layers) and len(changed) == 3 + (2 + 6) + 2 * 2
    for layer in changed:
        down, up = (lora[f"{layer}.lora_{half}.weight"] for half in ("down", "up"))
        weights[layers[layer]] += up @ down
    plain = copy.deepcopy(parts.transformer)
    plain.load_state_dict(convert_flux2_transformer_checkpoint_to_diffusers(weights))
    condition, x = pipeline.encode({"prompt": PROMPTS[:1]}), torch.randn(1, 16, 8, 12)
    with torch.no_grad():
        tables = {name: condition.table(name) for name in condition.tables}
        given = (x, torch.tensor([0.5]), tables, 1.0)
        expected = pipeline.family.denoise(pipeline.denoiser, *given)
        torch.testing.assert_close(
            pipeline.family.denoise(plain, *given), expected, atol=1e-5, rtol=1e-4
        )
        before = pipeline.family.denoise(parts.transformer, *given)
    assert (before - expected).abs().max() > 0.01


def test_a_third_without_a_lora_has_zeros() -> None:
    layer = "transformer_blocks.4.attn.add_k_proj"
    down, up = torch.randn(2, 3), torch.randn(5, 2)
    lora = original_lora({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up})
    own = "lora_unet_double_blocks_4_txt_attn_qkv.lora_{}.weight"
    found = lora[own.format("up")] @ lora[own.format("down")]
    assert len(lora) == 2 and lora[own.format("down")].shape == (6, 3)
    torch.testing.assert_close(found[5:10], up @ down)
    assert not found[:5].any() and not found[10:].any()


def test_layers_without_a_name_there_are_told_before_the_run(folder: Path) -> None:
    pipeline = TextToImagePipeline(str(folder), web_lora=True, **LENGTH, **SIZE)
    adapt(pipeline, LoRA(rank=2, alpha=2, targets=["attn.to_q", "norm_out.linear"]), seed=0)
    with pytest.raises(UsageError, match=r"web_lora: .* the layers norm_out\.linear in web_lora"):
        pipeline.settle(torch.device("cpu"), torch.float32)
