"""Makes the tokenizer of the shapes model: CLIP's, with a vocabulary of its own.

    python -m domains.text_to_image.train.make_tokenizer

Byte-pair encoding is trained on every caption of the grammar until each word is one token. Single
characters stay in the vocabulary, so that other text in ASCII still encodes.
"""

from __future__ import annotations

import argparse
import json
import string
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import BpeTrainer

from domains.text_to_image import EMBEDDED
from domains.text_to_image.shapes.world import TASKS, all_prompts

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
# The longest caption has seven words; two more places are for the start and the end.
MAX_LENGTH = 16
CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation


def learn_merges(captions: list[str]) -> list[tuple[str, str]]:
    """The pairs to join, in order, until every word is one token."""
    tokenizer = Tokenizer(BPE(end_of_word_suffix=WORD_END))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    # Training ends by itself, with no pairs left, long before this size.
    trainer = BpeTrainer(vocab_size=10_000, end_of_word_suffix=WORD_END, show_progress=False)
    tokenizer.train_from_iterator(captions, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(left, right) for left, right in merges]


def build_vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Characters, characters that end a word, joined pairs; the special tokens come last."""
    tokens = [*CHARACTERS, *(c + WORD_END for c in CHARACTERS)]
    tokens += [left + right for left, right in merges]
    # CLIP's text encoder of old finds the end of a text as its largest token id.
    tokens += [START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def write_tokenizer(out: Path) -> None:
    """Write the files that `CLIPTokenizer.from_pretrained` reads."""
    captions = [prompt.text for task in TASKS for prompt in all_prompts(task)]
    merges = learn_merges(captions)
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, **special}
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "vocab.json", build_vocabulary(merges))
    _write_json(out / "special_tokens_map.json", special)
    _write_json(out / "tokenizer_config.json", settings)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (out / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the shapes model's tokenizer.")
    parser.add_argument("--out", type=Path, default=EMBEDDED / "shapes" / "tokenizer")
    write_tokenizer(parser.parse_args().out)
