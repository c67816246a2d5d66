"""Text encoders that stay in the processor's memory between encodings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from domains.text_to_image.pipeline import TextToImagePipeline
from tests.domains.text_to_image.families.tiny import tiny


@pytest.mark.parametrize("name", ["sdxl"])
def test_idle_encoders_are_beside_the_denoiser_for_encodings_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(name).save_pretrained(tmp_path / "model")
    kept = TextToImagePipeline(str(tmp_path / "model"))
    idle = TextToImagePipeline(str(tmp_path / "model"), text_encoders="cpu")
    encoders = idle.family.idle_encoders
    assert encoders is not None
    own = {id(parameter) for parameter in encoders.parameters()}
    assert own.isdisjoint(map(id, idle.parameters()))
    assert len(list(kept.parameters())) == len(list(idle.parameters())) + len(own)
    moves: list[Any] = []
    plain, encode = nn.Module.to, idle.family.encode_some

    def to(device: Any) -> nn.Module:
        moves.append(str(device))
        return encoders if str(device) == "meta" else plain(encoders, device)

    def encode_some(prompts: list[str]) -> dict[str, Any]:
        moves.append("encode")
        return encode(prompts)

    monkeypatch.setattr(encoders, "to", to)
    monkeypatch.setattr(idle.family, "encode_some", encode_some)
    batch = {"prompt": ["a ring", "a square"]}
    tables, expected = idle.encode(batch).tables, kept.encode(batch).tables
    assert moves == ["cpu", "encode", "cpu"]
    assert all(torch.equal(tables[key], expected[key]) for key in expected)
    (folder,) = idle.save(tmp_path / "tuned")
    assert (folder / "text_encoder_2" / "model.safetensors").is_file()
    moves.clear()
    monkeypatch.setattr(idle.family, "encode_some", lambda _: dict(tables))
    idle.denoiser.to("meta")
    idle.encode(batch)
    assert moves == ["meta", "cpu"]
