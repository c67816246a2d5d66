"""Large tables of encodings stay in the processor's memory."""

from typing import Any

import pytest
import torch

from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.checks import UsageError


@pytest.mark.parametrize(("rows", "place"), [(4, "meta"), (3, "cpu")])
def test_tables_above_the_limit_stay_with_the_processor(
    rows: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 77 * 4 * 4
    pipeline = TextToImagePipeline(
        "shapes", encode_batch_size=2, max_table_gb=rows * size / 2**30, guidance_scale=2.0
    )
    pipeline.denoiser.to("meta")  # stands for a GPU

    def encode_some(prompts: list[str]) -> dict[str, Any]:
        device = "meta" if place == "meta" else "cpu"
        return {"embedding": torch.ones(len(prompts), 77, 4, device=device)}

    monkeypatch.setattr(pipeline.family, "encode_some", encode_some)
    places: list[Any] = []

    def denoise(_n: Any, x: torch.Tensor, _t: Any, tables: Any, _g: float) -> torch.Tensor:
        places.append(tables)
        return x

    monkeypatch.setattr(pipeline.family, "denoise", denoise)
    condition = pipeline.encode({"prompt": ["a", "b", "c"]})  # and the negative prompt
    assert condition.tables["embedding"].device.type == place
    assert condition.tables["embedding"].shape == (4, 77, 4)
    x = pipeline.blank(condition.index(slice(0, 2)))
    pipeline(x, torch.ones(2), condition.index(slice(0, 2)))
    assert [(t["embedding"].shape, t["embedding"].device.type) for t in places] == [
        ((4, 77, 4), "meta")  # of two samples, with guidance
    ]
    assert pipeline.features(condition).device.type == "meta"


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(UsageError, match="max_table_gb must be at least 0"):
        TextToImagePipeline(max_table_gb=-1)
