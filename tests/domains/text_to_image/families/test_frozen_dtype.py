"""Frozen weights in the precision that a run computes in, beside states and LoRA in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from domains.text_to_image.data import PromptData
from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import Brightness
from lit_rlft.algorithms.ddpo import DDPO
from lit_rlft.algorithms.graft import GRAFT
from lit_rlft.callbacks.facts import facts
from lit_rlft.callbacks.self_check import SelfCheck
from lit_rlft.core.checks import UsageError
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.selection import TopK
from lit_rlft.core.state import tensor_of
from lit_rlft.loop.precision import frozen_dtype
from lit_rlft.loop.reference import LoRA, adapt
from tests.domains.text_to_image.families.tiny import tiny
from tests.support import trainer_of

SIZE = {"height": 32, "width": 32}
BF16 = torch.bfloat16
GPU = torch.device("cuda")  # a name alone: nothing is put there


def slow(*names: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, str] = {}

    def folder(family: str) -> str:
        if family not in made:
            made[family] = str(tmp_path_factory.mktemp(family))
            tiny(family).save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decide as on a GPU under bf16-mixed."""
    monkeypatch.setattr("lit_rlft.loop.precision.frozen_dtype", lambda *_: BF16)


def networks(pipeline: TextToImagePipeline) -> dict[str, nn.Module]:
    return {name: getattr(pipeline.diffusers, name) for name in pipeline.family.weighed()}


@torch.no_grad()
def made(pipeline: TextToImagePipeline) -> list[Tensor]:
    """Return encodings, a prediction and a picture."""
    condition = pipeline.encode({"prompt": ["a red ring"]})
    x = torch.randn(pipeline.blank(condition).shape, generator=torch.Generator().manual_seed(3))
    prediction = pipeline(x, torch.tensor([0.7]), condition)
    return [*condition.tables.values(), prediction, pipeline.decode(x, condition)]


def test_what_suits_a_run() -> None:
    suited = {(d, p): frozen_dtype(torch.device(d), p) for d in ("cpu", "cuda", "mps")
              for p in ("32-true", "bf16-mixed", "16-mixed")}  # fmt: skip
    assert {case for case, dtype in suited.items() if dtype == BF16} == {("cuda", "bf16-mixed")}
    assert set(suited.values()) == {BF16, torch.float32}


@pytest.mark.parametrize(
    "family", ["sd3", *slow("sd", "sdxl", "flux_dev", "klein", "zimage", "sana")]
)
def test_a_cast_at_the_start_of_a_run_is_what_loading_in_it_gives(
    family: str, folders: Any
) -> None:
    size = {"height": 64, "width": 64} if family == "sana" else SIZE
    cast = TextToImagePipeline(folders(family), **size)
    cast.denoiser.requires_grad_(False)
    cast.settle(GPU, BF16)
    read = TextToImagePipeline(folders(family), frozen_dtype="bfloat16", **size)
    for name, network in networks(cast).items():
        ours, theirs = network.state_dict(), networks(read)[name].state_dict()
        assert ours.keys() == theirs.keys()
        odd = {key for key in ours if ours[key].dtype != theirs[key].dtype}
        assert not odd, (name, odd)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert all(torch.equal(a, b) for a, b in zip(made(cast), made(read), strict=True))


def test_a_cpu_stays_in_float32_and_settings_win(folders: Any) -> None:
    pipeline = TextToImagePipeline(folders("sd"))
    pipeline.denoiser.requires_grad_(False)
    for frozen, scratch, dtype in (
        ("auto", False, torch.float32),
        ("auto", True, BF16),
        ("float32", False, BF16),
    ):
        pipeline.frozen_dtype, pipeline.from_scratch = frozen, scratch
        pipeline.settle(GPU, dtype)
        own = [p.dtype for network in networks(pipeline).values() for p in network.parameters()]
        assert set(own) == {torch.float32}


def ddpo(folder: str, **settings: Any) -> DDPO:
    pipeline = TextToImagePipeline(folder, guidance_scale=2.0, **SIZE)
    return DDPO(
        pipeline, Brightness(), num_candidates=2, sampler=Sampler(3, 1.0), minibatch_size=4,
        num_eval_samples=1, **{"lora": LoRA(rank=2), "microbatch_size": 5, **settings},
    )  # fmt: skip


def prompts(folder: Path) -> PromptData:
    (folder / "prompts.txt").write_text("\n".join(f"a ring {i}" for i in range(8)))
    return PromptData(str(folder / "prompts.txt"), batch_size=2, eval_batch_size=2)


@pytest.mark.parametrize("precision", ["bf16-mixed", *slow("32-true")])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_first_ratios_are_one_and_what_learns_is_in_float32(
    precision: Any, folders: Any, tmp_path: Path
) -> None:
    module, seen = ddpo(folders("sd")), []

    class Watch(SelfCheck):
        def on_losses(self, module: Any, part: Any, losses: Tensor, values: Any) -> None:
            super().on_losses(module, part, losses, values)
            states = {tensor_of(part.states[name]).dtype for name in ("x_t", "x_s")}
            assert states == {torch.float32}
            if "first_ratio_deviation_max" in values:
                seen.append(float(values["first_ratio_deviation_max"].max()))

    trainer = trainer_of(
        default_root_dir=tmp_path, callbacks=[Watch()], precision=precision, limit_train_batches=1
    )
    trainer.fit(module, prompts(tmp_path))
    # The last microbatch of 24 pairs is filled up, as rounding depends on a batch's size.
    assert len(seen) >= 2 and max(seen) <= 1e-4
    own = dict(module.trainable().named_parameters())
    trained = {name for name, p in own.items() if p.requires_grad}
    assert trained and {own[name].dtype for name in trained} == {torch.float32}
    assert {p.dtype for name, p in own.items() if name not in trained} == {BF16}
    moments = [v for s in trainer.optimizers[0].state.values() for v in s.values() if v.dim()]
    assert moments and {value.dtype for value in moments} == {torch.float32}
    assert "; frozen weights in bfloat16;" in facts(trainer, module, 2)
    module.reward.add_module("network", nn.Linear(1, 1, dtype=torch.float16))
    assert "; frozen weights in bfloat16; reward in float16; " in facts(trainer, module, 2)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_weights_that_are_trained_and_their_reference_stay_in_float32(
    folders: Any, tmp_path: Path
) -> None:
    common = {"num_candidates": 2, "selection": TopK(1), "sampler": Sampler(2)}
    # Exported with the rest: nothing is rounded.
    whole = GRAFT(TextToImagePipeline(folders("sd"), **SIZE), Brightness(), lora=None, **common)
    whole.trainer = trainer_of()
    whole.setup("fit")
    every = [*whole.pipeline.parameters(), *whole.reference.parameters()]
    assert {p.dtype for p in every} == {torch.float32}
    # Loaded in bfloat16: what is trained is in float32 from there, and so is its reference.
    given = TextToImagePipeline(folders("sd"), frozen_dtype="bfloat16", **SIZE)
    loaded = {name: p.clone() for name, p in given.denoiser.named_parameters()}
    tuner = GRAFT(given, Brightness(), lora=None, **common)
    tuner.trainer = trainer_of()
    with pytest.warns(UserWarning, match="frozen_dtype to auto to start from its weights as they"):
        tuner.setup("fit")
    for network in (given.denoiser, tuner.reference.frozen):
        assert isinstance(network, nn.Module)
        for name, p in network.named_parameters():
            assert p.dtype == torch.float32 and torch.equal(p, loaded[name].float())
    assert {p.dtype for p in given.vae.parameters()} == {BF16}


def test_a_lora_in_bfloat16_is_asked_for(folders: Any) -> None:
    pipeline = TextToImagePipeline(folders("sd"), **SIZE)
    adapt(pipeline, LoRA(rank=2, dtype="bfloat16"), seed=0)
    assert {p.dtype for p in pipeline.denoiser.parameters() if p.requires_grad} == {BF16}
    with pytest.raises(UsageError, match=r"LoRA: dtype is .*; use 'float32' or 'bfloat16'"):
        LoRA(dtype="float16")  # type: ignore[arg-type]


def test_the_old_name_says_the_new_one(folders: Any) -> None:
    with pytest.warns(FutureWarning, match=r"^pipeline\.dtype is called frozen_dtype now: write"):
        pipeline = TextToImagePipeline(folders("sd"), dtype="bfloat16")
    assert {p.dtype for p in pipeline.denoiser.parameters()} == {BF16}
    with pytest.raises(UsageError, match="dtype must be null beside frozen_dtype float32, which"):
        TextToImagePipeline(folders("sd"), dtype="bfloat16", frozen_dtype="float32")


def tuned(folder: str, frozen: Any) -> TextToImagePipeline:
    """Return a pipeline with a LoRA that changes something."""
    pipeline = TextToImagePipeline(folder, frozen_dtype=frozen, guidance_scale=2.0, **SIZE)
    adapt(pipeline, LoRA(rank=2), seed=0)
    generator = torch.Generator().manual_seed(1)
    for p in pipeline.denoiser.parameters():
        if p.requires_grad:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return pipeline


def gradient(pipeline: TextToImagePipeline, autocast: bool) -> Tensor:
    """Return the gradient of a loss of two guided predictions in all of a LoRA's weights."""
    generator = torch.Generator().manual_seed(2)
    condition = pipeline.encode({"prompt": ["a red ring", "a blue ring"]})
    x = torch.randn(pipeline.blank(condition).shape, generator=generator)
    with torch.autocast("cpu", BF16, enabled=autocast):
        prediction = pipeline(x, torch.tensor([0.8, 0.3]), condition)
    assert prediction.dtype == torch.float32
    loss = (prediction * torch.randn(x.shape, generator=generator)).sum()
    trained = [p for p in pipeline.denoiser.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained)
    assert all(g.dtype == torch.float32 for g in found)
    return torch.cat([g.flatten() for g in found])


@pytest.mark.parametrize("family", ["sd", *slow("sdxl", "sd3", "flux_dev")])
def test_gradients_are_those_of_float32_within_bfloat16s_rounding(
    family: str, folders: Any
) -> None:
    single, low = (tuned(folders(family), dtype) for dtype in ("float32", "bfloat16"))
    exact, mixed = (gradient(single, autocast) for autocast in (False, True))
    ours, plain = (gradient(low, autocast) for autocast in (True, False))
    errors = [float((g - exact).norm() / exact.norm()) for g in (mixed, ours, plain)]
    # 8 bits a number, some fifty products in a row: autocast alone is off by a few per cent.
    assert max(errors) < 0.05 and errors[1] < 1.5 * errors[0], errors


def kept_bytes(pipeline: TextToImagePipeline, rows: int, calls: int) -> int:
    """Return the bytes kept for the backward pass of some calls, without the weights themselves."""
    weights = {p.untyped_storage().data_ptr() for p in pipeline.denoiser.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(saved: Tensor) -> Tensor:
        if (place := saved.untyped_storage().data_ptr()) not in weights:
            kept[place] = saved
        return saved

    condition = pipeline.encode({"prompt": ["a red ring"] * rows})
    x = torch.zeros(pipeline.blank(condition).shape)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved)
    with torch.autocast("cpu", BF16), hooks:
        graphs = [pipeline.predict(x, torch.full((rows,), 0.5), condition) for _ in range(calls)]
    assert len(graphs) == calls
    return sum(saved.untyped_storage().nbytes() for saved in kept.values())


def test_bfloat16_weights_are_not_copied_into_the_graph(folders: Any) -> None:
    """Bytes of a call are a + b rows; what does not depend on the rows are copies of weights."""
    fixed, pipeline = {}, None
    for frozen in ("float32", "bfloat16"):
        pipeline = tuned(folders("sd"), frozen)
        one, two = (kept_bytes(pipeline, rows, calls=2) for rows in (1, 2))
        fixed[frozen] = (2 * one - two) / 2
    assert pipeline is not None
    frozen_weights = [p for p in pipeline.denoiser.parameters() if not p.requires_grad]
    copy = 2 * sum(p.numel() for p in frozen_weights if p.dim() > 1)
    assert fixed["float32"] > 0.8 * copy, (fixed, copy)
    assert fixed["bfloat16"] < 0.02 * copy, (fixed, copy)
