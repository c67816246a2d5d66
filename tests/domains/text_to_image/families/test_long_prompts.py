"""A prompt that is cut at a tokenizer's limit is warned of once, with the words that are lost."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from domains.text_to_image.families import FAMILIES, Family
from domains.text_to_image.networks.texts import Reader
from domains.text_to_image.pipeline import TextToImagePipeline
from tests.domains.text_to_image.families.tiny import tiny

shared = cache(tiny)


def family_of(name: str, without: tuple[str, ...] = (), **options: Any) -> Family:
    parts = tiny(name) if without else shared(name)
    for part in without:
        setattr(parts, part, None)
    return FAMILIES[type(parts).__name__](parts, (32, 32), **options)


def told(family: Family, prompts: list[str], numbers: list[int] | None = None) -> list[str]:
    """Return the warnings of prompts that are cut."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        family.tell_cuts(prompts, numbers)
    return [str(one.message) for one in caught if "cut off" in str(one.message)]


def words(family: Family, end: str = "ring") -> tuple[str, str]:
    """Return a prompt that just fits in the tokenizer that counts, and one with `end` too much."""
    reader = family.readers()[0]
    kept = reader.length - reader.tokenizer.num_special_tokens_to_add()
    text = ""
    while len(reader.tokenizer(f"{text} red".strip(), add_special_tokens=False).input_ids) <= kept:
        text = f"{text} red".strip()
    while len(reader.tokenizer(f"{text} a", add_special_tokens=False).input_ids) <= kept:
        text += " a"
    return text, f"{text} {end}"


@pytest.mark.parametrize(
    ("name", "options", "encoder", "remedy"),
    [
        ("sd", {}, "CLIP", "shorten it."),
        ("sdxl", {}, "CLIP", "shorten it."),
        ("sd3", {"max_sequence_length": 24}, "T5", "raise pipeline.init_args.max_sequence_length"),
        ("flux_dev", {"max_sequence_length": 24}, "T5", "max_sequence_length"),
        ("flux_schnell", {}, "T5", "max_sequence_length"),
        ("klein", {"max_sequence_length": 96}, "Qwen3", "max_sequence_length"),
        ("zimage", {"max_sequence_length": 96}, "Qwen3", "max_sequence_length"),
        ("sana", {"max_sequence_length": 24}, "Gemma2", "max_sequence_length"),
    ],
)
def test_each_family_says_what_is_lost(
    name: str, options: dict[str, Any], encoder: str, remedy: str
) -> None:
    family = family_of(name, **options)
    fits, long = words(family)
    assert told(family, [fits, "a ring"]) == []
    (message,) = told(family, ["a ring", long, fits, long + " below"], [4, 7, 8, 9])
    assert message.startswith("prompt 7 (and 1 more of these 4) is longer than the ")
    reader = family.readers()[0]
    assert f"{reader.length} tokens that {encoder} reads: 'ring' is cut off" in message
    assert remedy in message
    assert told(family, [long]) == []


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_the_words_that_are_lost_change_nothing(name: str) -> None:
    family = family_of(name)
    fits, long = words(family)
    encoded = family.encode([fits, long])
    assert all(torch.equal(table[0], table[1]) for table in encoded.values())


@pytest.mark.parametrize("name", ["klein", "zimage"])
def test_a_chat_is_cut_where_the_prompt_was_said_to_be(name: str) -> None:
    family = family_of(name, max_sequence_length=96)
    _, long = words(family)
    other, far = f"{long[:-1]}x", f"x{long}"
    (table,) = family.encode([long, long + " below", other, far]).values()
    assert torch.equal(table[0], table[1]) and torch.equal(table[0], table[2])
    assert not torch.equal(table[0], table[3])


def test_the_tokenizer_that_reads_least_counts() -> None:
    family = family_of("sdxl")
    first, second = family.readers()
    assert first.length == second.length == 16
    family.tell_cuts.readers = [first, replace(second, length=12)]
    (message,) = told(family, ["a red ring " * 4])
    assert "12 tokens" in message


def test_clip_counts_where_there_is_no_t5() -> None:
    family = family_of("sd3", ("text_encoder_3",))
    (message,) = told(family, [words(family)[1]])
    assert "CLIP" in message


def test_clips_own_limit_is_no_loss_beside_t5() -> None:
    for name in ("sd3", "flux_dev"):
        assert told(family_of(name), ["a red ring " * 7]) == []


def test_a_pipeline_says_the_number_in_the_data_once(
    tiny_stable_diffusion: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = TextToImagePipeline(str(tiny_stable_diffusion()))
    long = "red ring " * 60
    batch = {"prompt": ["a ring", long], "index": torch.tensor([5, 11])}
    with pytest.warns(UserWarning, match=r"^prompt 11 is longer") as caught:
        pipeline.encode(batch)
        pipeline.encode(batch)
    assert len([one for one in caught if "cut off" in str(one.message)]) == 1
    assert not caplog.records


def test_letters_of_several_tokens_are_counted_by_their_tokens() -> None:
    prompt = "红色的圆环在蓝色方块的左边背景是雪山与日落水彩画风格高清很美丽"
    tokenizer = shared("sd").tokenizer
    assert len(prompt) == 31
    assert len(tokenizer(prompt, add_special_tokens=False).input_ids) > 75
    (end,) = Reader(tokenizer, 77, "CLIP").lost([prompt])
    assert end and prompt.endswith(end) and len(end) < 31
