"""The file of a noise generator: it comes back as it was and serves plain diffusers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file

from lit_rlft.core.checks import UsageError
from lit_rlft.core.prior import FullResolution, LowResolution, Maps, NoisePolicy
from lit_rlft.core.randomness import generators, seed_from
from lit_rlft.core.state import tensor_of
from lit_rlft.inference import NoiseGenerator
from tests.algorithms.noise_ppo_support import Tiny, disturb, each_maps, painted


@each_maps
@pytest.mark.parametrize(("conditional", "heads"), [(True, 0), (False, 0), (True, 2)])
def test_a_noise_generator_comes_back_from_its_file(
    tmp_path: Path, maps: Maps, conditional: bool, heads: int
) -> None:
    policy = NoisePolicy(6, (3, 4, 5), maps, width=8, conditional=conditional, heads=heads)
    disturb(policy)
    path = NoiseGenerator(policy, {"pipeline": "tiny", "num_steps": 3}).save(
        tmp_path / "a/b.safetensors"
    )
    loaded = NoiseGenerator.load(path)
    assert loaded.notes == {"pipeline": "tiny", "num_steps": 3}
    encoding, seeds = torch.randn(2, 7, 6), [1, 2]
    law = policy(encoding if heads else encoding.mean(dim=1))
    expected = law.sample(generators(seeds))
    torch.testing.assert_close(loaded(encoding, generators(seeds)), tensor_of(expected))
    assert torch.equal(
        loaded(encoding, torch.Generator().manual_seed(0)),
        loaded(encoding, torch.Generator().manual_seed(0)),
    )
    assert loaded(encoding.half()).dtype == torch.float16
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_file_from_before_attention_is_read(tmp_path: Path) -> None:
    policy = NoisePolicy(6, (2,), FullResolution(), width=8)
    disturb(policy)
    path = NoiseGenerator(policy).save(tmp_path / "new.safetensors")
    with safe_open(path, "pt") as file:
        text = json.loads(file.metadata()["lit_rlft.inference"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del text["architecture"]["heads"]
    old = tmp_path / "old.safetensors"
    save_file(weights, old, {"lit_rlft.inference": json.dumps(text)})
    encoding = torch.randn(2, 6)
    assert torch.equal(NoiseGenerator.load(old).policy(encoding).loc, policy(encoding).loc)


def test_files_and_encodings_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        NoiseGenerator.load(tmp_path / "nowhere.safetensors")
    (tmp_path / "text.safetensors").write_text("nothing")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("text", "other"):
        with pytest.raises(UsageError, match="is no noise generator written by lit-rlft"):
            NoiseGenerator.load(tmp_path / f"{name}.safetensors")
    own = NoiseGenerator(NoisePolicy(6, (2,), type("Own", (FullResolution,), {})()))
    with pytest.raises(UsageError, match="maps of a kind of your own, Own"):
        NoiseGenerator.load(own.save(tmp_path / "own.safetensors"))
    generator = NoiseGenerator(NoisePolicy(6, (2,), FullResolution()), {"pipeline": "tiny"})
    with pytest.raises(UsageError, match=r"has 5 features.*trained with 6.*with tiny"):
        generator(torch.zeros(1, 3, 5))
    reader = NoiseGenerator(NoisePolicy(6, (2,), FullResolution(), heads=2))
    with pytest.raises(UsageError, match=r"prompt embeddings \[B, L, F\].*shape \[1, 6\]"):
        reader(torch.zeros(1, 6))
    with pytest.raises(UsageError, match="2 generators were given for 3 conditions"):
        generator(torch.zeros(3, 6), generators([1, 2]))


@pytest.mark.parametrize("kind", [{}, {"prediction_type": "v_prediction", "size": (16, 32)}])
def test_plain_diffusers_paints_our_pictures(
    tiny_stable_diffusion: Tiny, tmp_path: Path, kind: dict[str, Any]
) -> None:
    """`pipe(prompt, latents=generator(embeds, generator=...))`, same seeds, eta 0, same steps."""
    folder = tiny_stable_diffusion(**kind)
    tuner = painted(folder, tmp_path)
    disturb(tuner.trainable(), 0.05)
    (path,) = tuner.export(tmp_path / "tuned")
    prompts, seeds, steps = ["a red ring", "two stars"], [3, 4], tuner.sampler.num_steps
    condition = tuner.pipeline.encode({"prompt": prompts})
    route, seeds_of = tuner.route(), [seed_from(seed) for seed in seeds]
    with torch.no_grad():
        (x_0,) = tuner.rollouts.draw(route, condition, seeds_of, keep=[steps])
        ours = tuner.pipeline.decode(x_0, condition)

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    assert isinstance(pipe.scheduler, DDIMScheduler)
    pipe.set_progress_bar_config(disable=True)
    generator = NoiseGenerator.load(path)
    assert generator.notes == {"pipeline": "tiny", "num_steps": steps}
    embeds, _ = pipe.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=False)
    common = {"num_inference_steps": steps, "guidance_scale": 2.0, "output_type": "pt"}
    latents = generator(embeds, generator=generators(seeds_of))
    theirs = pipe(prompts, latents=latents, **common).images
    assert (ours - theirs).abs().max() < 1e-3
    plain = pipe(prompts, generator=generators(seeds_of), **common).images
    assert (plain - theirs).abs().max() > 1e-3
    # Before training, latents are those that diffusers draws, one generator or several.
    start = NoisePolicy(embeds.shape[-1], latents.shape[1:], LowResolution(2))
    for generator_of in (lambda: generators(seeds_of), lambda: torch.Generator().manual_seed(5)):
        latents = NoiseGenerator(start)(embeds, generator=generator_of())
        theirs = pipe(prompts, latents=latents, **common).images
        assert torch.equal(theirs, pipe(prompts, generator=generator_of(), **common).images)


def test_the_loader_needs_neither_lightning_nor_diffusers() -> None:
    code = (
        "import sys, lit_rlft.inference\n"
        "print(sorted({'lightning', 'peft', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
