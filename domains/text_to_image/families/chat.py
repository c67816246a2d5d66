"""Prompts in the chat template of a language model, as Qwen3 is given them."""

from collections.abc import Iterator
from typing import Any

from domains.text_to_image.networks.texts import Reader
from domains.text_to_image.networks.weightless import NoTokenizer
from lit_rlft.kit.weightless import weightless

__all__ = ["chat_problems", "chat_reader"]

_PROMPT = "the prompt"


def chat_problems(tokenizer: Any) -> Iterator[str]:
    """Iterate over what a tokenizer lacks to write prompts as a chat."""
    if isinstance(tokenizer, NoTokenizer) or weightless():
        return
    if getattr(tokenizer, "chat_template", None) is None:
        yield (
            "its tokenizer has no chat template; copy chat_template.jinja, or the template in "
            "tokenizer_config.json, from the model's own folder"
        )


def chat_reader(tokenizer: Any, length: int) -> list[Reader]:
    """Return Qwen3's reader of a prompt: what is left beside the chat's beginning.

    Args:
        tokenizer: Qwen3's; without a template, which a model without weights may lack, there is no
            reader.
        length: Tokens of the whole chat at most.
    """
    if tokenizer.chat_template is None:
        return []
    said = [{"role": "user", "content": _PROMPT}]
    chat = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    begun = len(tokenizer(chat.partition(_PROMPT)[0], add_special_tokens=False).input_ids)
    remedy = "raise pipeline.init_args.max_sequence_length, or shorten it"
    return [Reader(tokenizer, length - begun, "Qwen3", remedy)]
