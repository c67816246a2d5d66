"""Compiled denoisers: the same predictions, counted as before, and nothing compiled twice."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch._dynamo.utils import counters

from domains.text_to_image.data import PromptData
from domains.text_to_image.pipeline import TextToImagePipeline
from domains.text_to_image.rewards import Brightness
from lit_rlft.algorithms.graft import PGRAFT
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.core.gradient_plan import DRTune
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.selection import TopK
from lit_rlft.kit.compiled import compile_network
from lit_rlft.loop.reference import LoRA
from tests.domains.text_to_image.families.tiny import tiny
from tests.support import trainer_of

FAMILIES = ("sd", "sdxl", "sd3", "flux_dev", "klein")
HOW = ("blocks", "whole")


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace graphs, and run them as they are: tracing is what these tests are about."""
    made = compile_network

    def traced(network: Any, how: Any) -> None:
        made(network, how, backend="eager")

    monkeypatch.setattr("domains.text_to_image.pipeline.compile_network", traced)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def num_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        tiny(family).save_pretrained(folder)
        made[family] = str(folder)
    return made


def pipeline_of(folder: str, how: str | None, **settings: Any) -> TextToImagePipeline:
    return TextToImagePipeline(folder, height=32, width=32, compile=how, **settings)


def predicted(pipeline: TextToImagePipeline) -> torch.Tensor:
    condition = pipeline.encode({"prompt": ["red", "blue", "green"]})
    torch.manual_seed(0)
    x = torch.randn(pipeline.blank(condition).shape)
    with torch.no_grad():
        return pipeline(x, torch.tensor([0.9, 0.5, 0.1]), condition)


def some(*quick: tuple[str, str], of: tuple[str, ...]) -> list[Any]:
    """Return all pairs of names and ways; those that are not quick are slow tests."""
    pairs = [(name, how) for name in of for how in HOW]
    return [pytest.param(*p, marks=() if p in quick else pytest.mark.slow) for p in pairs]


@pytest.mark.parametrize(("family", "how"), some(("sd3", "blocks"), of=FAMILIES))
def test_predictions_and_names_stay(folders: dict[str, str], family: str, how: str) -> None:
    plain, made = (pipeline_of(folders[family], h) for h in (None, how))
    assert predicted(made).allclose(predicted(plain), atol=1e-5)
    assert num_graphs() > 0
    assert list(made.denoiser.state_dict()) == list(plain.denoiser.state_dict())
    assert type(made.denoiser) is type(plain.denoiser)


def tuner(pipeline: TextToImagePipeline, algorithm: str) -> Any:
    common: dict[str, Any] = {"sampler": Sampler(3), "lora": LoRA(rank=2)}
    if algorithm == "drtune":
        return RewardGradient(pipeline, Brightness(), method=DRTune(k=1, m=1), **common)
    return PGRAFT(
        pipeline, Brightness(), cut=0.34, num_candidates=2, selection=TopK(1), num_eval_samples=1,
        **common,
    )  # fmt: skip


def prompts(folder: Path) -> PromptData:
    """Return a round of two prompts, and a validation of three."""
    for name, count in (("train", 2), ("val", 3)):
        (folder / f"{name}.txt").write_text("\n".join(f"a {name} {i}" for i in range(count)))
    files = {f"{name}_source": str(folder / "val.txt") for name in ("val", "test")}
    return PromptData(str(folder / "train.txt"), batch_size=2, eval_batch_size=3, **files)


@pytest.mark.parametrize(("algorithm", "how"), some(of=("p_graft", "drtune")))
def test_later_rounds_compile_nothing(
    folders: dict[str, str], algorithm: str, how: str, tmp_path: Path
) -> None:
    """The adapter goes on and off, evaluations come between, and batches have two sizes."""
    module = tuner(pipeline_of(folders["sd"], how, checkpoint_denoiser=True), algorithm)
    seen: list[int] = []

    class Rounds(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(num_graphs())

    trainer = trainer_of(
        default_root_dir=tmp_path, callbacks=[Rounds()], max_epochs=4, limit_val_batches=1.0,
        limit_train_batches=1,
    )  # fmt: skip
    trainer.fit(module, prompts(tmp_path))
    assert seen[0] > 0 and len(set(seen[1:])) == 1, seen
    assert module.meter.total("denoiser_calls") > 0 and module.meter.total("flops") > 0


@pytest.mark.slow
def test_a_compiled_run_counts_as_a_plain_one(folders: dict[str, str], tmp_path: Path) -> None:
    spent = {}
    for how in (None, "blocks", "whole"):
        module = tuner(pipeline_of(folders["sd"], how), "p_graft")
        trainer = trainer_of(default_root_dir=tmp_path, limit_train_batches=1)
        trainer.fit(module, prompts(tmp_path))
        spent[how] = json.dumps({n: module.meter.total(n) for n in ("flops", "denoiser_calls")})
    assert len(set(spent.values())) == 1, spent


@pytest.mark.slow
def test_inductor_computes_the_same(folders: dict[str, str], monkeypatch: Any) -> None:
    monkeypatch.setattr("domains.text_to_image.pipeline.compile_network", compile_network)
    plain, made = (pipeline_of(folders["sd"], how) for how in (None, "blocks"))
    assert predicted(made).allclose(predicted(plain), atol=1e-4)
