"""Encodings on disk: a later run never runs the encoders, and bad files are never trusted."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from domains.text_to_image.embeddings import EmbeddingCache, identity
from domains.text_to_image.pipeline import TextToImagePipeline
from lit_rlft.core.checks import UsageError
from tests.domains.text_to_image.families.tiny import tiny

PROMPTS = ["a ring", "a square", "a ring", ""]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that gives a tiny model's folder."""

    @cache
    def saved(name: str) -> str:
        folder = tmp_path_factory.mktemp(name)
        tiny(name).save_pretrained(folder)
        return str(folder)

    return saved


def loaded(folder: str, cached: Path | None, **settings: Any) -> TextToImagePipeline:
    size = None if cached is None else str(cached)
    return TextToImagePipeline(folder, height=32, width=32, embedding_cache=size, **settings)


def runs(pipeline: TextToImagePipeline) -> list[list[str]]:
    """Return a list that gets the prompts of every run of the encoders."""
    calls: list[list[str]] = []
    plain = pipeline.family.encode_some

    def counted(prompts: list[str]) -> dict[str, Tensor]:
        calls.append(prompts)
        return plain(prompts)

    pipeline.family.encode_some = counted  # type: ignore[method-assign]
    return calls


def tables(pipeline: TextToImagePipeline, prompts: list[str] = PROMPTS) -> dict[str, Tensor]:
    return dict(pipeline.encode({"prompt": prompts}).tables)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux_dev"])
def test_a_second_run_never_runs_the_encoders(name: str, folders: Any, tmp_path: Path) -> None:
    first = loaded(folders(name), tmp_path / "cache")
    calls, expected = runs(first), tables(first)
    assert calls == [["a ring", "a square", ""]]
    store, first.family.cache = first.family.cache, None
    plain, first.family.cache = tables(first), store
    for key, table in plain.items():
        torch.testing.assert_close(expected[key], table, atol=1e-5, rtol=1e-5)
    second = loaded(folders(name), tmp_path / "cache")
    calls = runs(second)
    assert equal(tables(second), expected)
    assert calls == []
    tables(second, ["a ring", "a star"])
    assert calls == [["a star"]]


def test_encodings_under_autocast_are_kept_apart(folders: Any, tmp_path: Path) -> None:
    store = tmp_path / "cache"
    with torch.autocast("cpu", torch.bfloat16):
        half = tables(loaded(folders("sd"), store))
    whole = loaded(folders("sd"), store)
    calls, expected = runs(whole), tables(loaded(folders("sd"), None))
    first = tables(whole)
    for key, table in expected.items():  # of other batches: on some processors rounded otherwise
        torch.testing.assert_close(first[key], table, atol=1e-5, rtol=1e-5)
        assert (half[key] - table).abs().max() > 1e-3
    assert len(calls) == 1
    again = loaded(folders("sd"), store)
    calls = runs(again)
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(tables(again), half)
    assert equal(tables(again), first) and not calls


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def pipeline(folders: Any, tmp_path_factory: pytest.TempPathFactory) -> TextToImagePipeline:
    return loaded(folders("sd"), tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "text", "foreign"])
def test_damaged_and_foreign_files_are_encoded_again(
    harm: str, pipeline: TextToImagePipeline
) -> None:
    store = pipeline.family.cache
    assert store is not None
    expected, calls = tables(pipeline), runs(pipeline)
    path = store.path("a ring")
    if harm == "flip":
        _flip(path)
    elif harm == "foreign":
        path.write_bytes(store.path("a square").read_bytes())
    else:
        content = path.read_bytes()
        path.write_bytes({"cut": content[:-7], "empty": b"", "text": b"a ring"}[harm])
    again = tables(pipeline)
    assert calls == [["a ring"]]
    for key in expected:
        torch.testing.assert_close(again[key], expected[key], atol=1e-5, rtol=1e-5)
    tables(pipeline)
    assert len(calls) == 1
    assert {file.suffix for file in store.folder.rglob("*") if file.is_file()} == {".safetensors"}


def test_encodings_are_of_one_model_and_its_settings(folders: Any, tmp_path: Path) -> None:
    def path(**settings: Any) -> Path:
        store = loaded(folders("sd3"), tmp_path, **settings).family.cache
        assert store is not None
        return store.path("a ring")

    one = path(negative_prompt="dull")
    other = path(max_sequence_length=24, frozen_dtype="bfloat16")
    parts = ["text_encoder_3"]
    before = identity(folders("sd3"), parts)
    assert identity(folders("sd3"), parts) == before
    Path(folders("sd3"), "text_encoder_3/model.safetensors").touch()
    assert identity(folders("sd3"), parts) != before
    assert len({one, other, path()}) == 3
    shapes = [{"a": (n,)} for n in (1, 1, 2)]
    kept = [EmbeddingCache(tmp_path, {}, shape).path("a") for shape in shapes]
    assert kept[0] == kept[1] != kept[2]


def test_the_commit_of_the_hub_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    where = "domains.text_to_image.embeddings.try_to_load_from_cache"
    monkeypatch.setattr(where, lambda *_: "/hub/models--a--b/snapshots/0f3c/model_index.json")
    assert identity("a/b", ["text_encoder"]) == ["a/b", "0f3c"]
    monkeypatch.setattr(where, lambda *_: None)
    with pytest.raises(UsageError, match=r"embedding_cache: the hub's commit of 'a/b'"):
        identity("a/b", ["text_encoder"])


def test_bad_settings_have_their_sentences(
    folders: Any, tmp_path: Path, pipeline: TextToImagePipeline
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"embedding_cache: .*file is a file; give a folder"):
        loaded(folders("sd"), tmp_path / "file")
    with pytest.raises(UsageError, match=r"embedding_cache must be null with from_scratch"):
        loaded(folders("sd"), tmp_path, from_scratch=True)
    assert pipeline.encoder is not None
    pipeline.encoder.requires_grad_(True)
    with pytest.raises(UsageError, match=r"embedding_cache .*train_encoder to false"):
        tables(pipeline)
    pipeline.encoder.requires_grad_(False)


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("domains.text_to_image.embeddings.os.replace", full)
    with pytest.raises(UsageError, match=r"embedding_cache: .* cannot be written \(No space"):
        EmbeddingCache(tmp_path, {}, {"a": (1,)}).write("a", {"a": torch.zeros(1)})
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
