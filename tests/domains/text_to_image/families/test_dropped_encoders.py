"""Text encoders that are read from disk for prompts that are new, and for nothing else."""

from pathlib import Path
from typing import Any

import pytest
import torch

from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.checks import BadArgument, UsageError
from lit_rlft.kit.weightless import without_weights
from tests.domains.text_to_image.families.tiny import tiny

NAMES = [
    "sdxl",
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("sd", "sd3", "klein", "zimage", "sana")),
]


@pytest.fixture(name="read")
def _read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text encoders that were read, by name."""
    from domains.text_to_image import loading

    found: list[str] = []
    plain = loading.read_network

    def read_network(source: str, name: str, *args: Any) -> torch.nn.Module:
        found.append(name)
        return plain(source, name, *args)

    monkeypatch.setattr(loading, "read_network", read_network)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_encoders_are_read_for_new_prompts_alone(
    name: str, tmp_path: Path, read: list[str]
) -> None:
    folder, cache = str(tmp_path / "model"), str(tmp_path / "cache")
    tiny(name).save_pretrained(folder)
    plain = TextToImagePipeline(folder)
    made = TextToImagePipeline(folder, text_encoders="drop", embedding_cache=cache)
    encoders = [n for n in made.family.encoder_names if getattr(made.diffusers, n) is not None]
    assert read == [] and encoders
    assert all(p.is_meta for n in encoders for p in getattr(made.diffusers, n).parameters())
    assert not any(p.is_meta for p in made.parameters())
    batch = {"prompt": ["a ring", "a square"]}
    tables, expected = made.encode(batch).tables, plain.encode(batch).tables
    assert all(torch.equal(tables[key], expected[key]) for key in expected)
    assert read == encoders
    assert all(p.is_meta for n in encoders for p in getattr(made.diffusers, n).parameters())
    made.encode(batch)
    again = TextToImagePipeline(folder, text_encoders="drop", embedding_cache=cache)
    assert torch.equal(again.encode(batch).tables[key := next(iter(expected))], expected[key])
    assert read == encoders  # not once more
    again.encode({"prompt": ["a ring", "a cross"]})
    assert read == encoders * 2


@pytest.mark.parametrize("name", ["klein", "zimage"])
def test_a_missing_chat_template_is_said_before_the_run(
    name: str, tmp_path: Path, read: list[str]
) -> None:
    parts = tiny(name)
    parts.tokenizer.chat_template = None
    parts.save_pretrained(tmp_path / "model")
    settings: dict[str, Any] = {"text_encoders": "drop", "embedding_cache": str(tmp_path / "c")}
    with pytest.raises(UsageError, match=r"no chat template; copy chat_template\.jinja"):
        TextToImagePipeline(str(tmp_path / "model"), **settings)
    assert read == []


def test_a_whole_model_is_written_with_its_encoders(tmp_path: Path, read: list[str]) -> None:
    folder, cache = tmp_path / "model", str(tmp_path / "cache")
    tiny("sd").save_pretrained(folder)
    made = TextToImagePipeline(str(folder), text_encoders="drop", embedding_cache=cache)
    made.save(tmp_path / "tuned")
    written = TextToImagePipeline(str(tmp_path / "tuned"))
    plain = TextToImagePipeline(str(folder))
    batch = {"prompt": ["a ring"]}
    assert torch.equal(
        written.encode(batch).tables["embedding"], plain.encode(batch).tables["embedding"]
    )
    assert read == ["text_encoder"]


def test_plan_builds_it(tmp_path: Path, read: list[str]) -> None:
    tiny("sd").save_pretrained(tmp_path / "model")
    with without_weights():
        TextToImagePipeline(
            str(tmp_path / "model"), text_encoders="drop", embedding_cache=str(tmp_path / "cache")
        )
    assert read == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "without pipeline.embedding_cache"),
        ({"textual_inversions": ["x.safetensors"], "embedding_cache": "c"}, "inversions"),
        ({"from_scratch": True, "embedding_cache": "c"}, "from_scratch"),
    ],
)
def test_what_cannot_be_read_again_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadArgument, match=rf"text_encoders.*{message}"):
        TextToImagePipeline("shapes", text_encoders="drop", **settings)
