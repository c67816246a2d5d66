"""Human preference score v3: a vision-language model tuned on which pictures people prefer."""

import ast
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from domains.text_to_image.networks.hps_v3 import REWARD, HPSv3Network, qwen_parts
from domains.text_to_image.networks.state_dicts import read_state_dict, weight_file
from domains.text_to_image.precision import Precision, precision
from domains.text_to_image.rewards.published import reading
from domains.text_to_image.samples import check_pictures, prompts_of
from lit_rlft.core.checks import BadArgument, at_least, loading, require
from lit_rlft.core.pipeline import Condition
from lit_rlft.core.reward import Reward
from lit_rlft.kit.frozen import Frozen
from lit_rlft.kit.weightless import weightless

__all__ = ["HPSv3"]

_FILE = "HPSv3.safetensors"
_PACKAGE, _SOURCE = "hpsv3", "dataset/data_collator_qwen.py"
_CONSTANTS = ("INSTRUCTION", "prompt_with_special_token")
"""The two halves of the text, in this order."""
_HOLE = "{text_prompt}"


class HPSv3(Frozen, Reward):
    """Human preference score v3: how well people like a picture for its prompt.

    mu of N(mu, sigma^2), the first output of a head on a Qwen2-VL-7B that reads the authors'
    instruction with the prompt in it; mostly 0 to 15. A picture is resized to 200,704 pixels,
    bicubic, keeping its shape to within Qwen2-VL's groups of patches. Each pair of picture and
    prompt takes a pass. Differentiable.

    Published: right on 85.4 % of HPDv2's test pairs, 76.9 % of HPDv3's, 66.8 % of ImageReward's and
    72.8 % of Pick-a-Pic's. Means on its benchmark: Kolors 10.55, FLUX.1-dev 10.43, PixArt-Sigma
    9.37. Licence: MIT.

    Args:
        pretrained: State dict: a file, a folder that holds HPSv3.safetensors, or a hub id.
        processor: Folder or hub id of Qwen2-VL, whose configs and tokenizer are read, not its
            weights.
        instruction: File with the text that the model reads, as its authors have it; it holds
            {text_prompt} and <|Reward|> once. None takes it from the source of the package hpsv3:
            `pip install --no-deps hpsv3`. Nothing of that package is imported.
        batch_size: Pictures scored at a time, which bounds the memory.
        dtype: Precision of Qwen2-VL's weights; the head's is float32.

    Raises:
        UsageError: `pretrained` is no such state dict, whose first missing or unknown key is named,
            `processor` is of another model, or there is no instruction.

    References:
        HPSv3: Towards Wide-Spectrum Human Preference Score (Ma et al., 2025),
        https://arxiv.org/abs/2508.03789
    """

    differentiable = distinguishes = True

    def __init__(
        self,
        pretrained: str = "MizzenAI/HPSv3",
        *,
        processor: str = "Qwen/Qwen2-VL-7B-Instruct",
        instruction: str | None = None,
        batch_size: int = 8,
        dtype: Precision = "bfloat16",
    ) -> None:
        super().__init__()
        at_least(1, self, batch_size=batch_size)
        kind = precision(self, dtype)
        text = _installed(self) if instruction is None else _read(instruction)
        for part in (_HOLE, REWARD):
            rule = f"a text with {part} once, as that of the package {_PACKAGE} is"
            require(text.count(part) == 1, self, "instruction", rule)
        self.instruction, self.batch_size = text, batch_size
        self.network = _network(pretrained, processor, kind)

    def forward(self, samples: Any, condition: Condition) -> Tensor:
        """Return the score of each picture, [B]."""
        pictures = check_pictures(samples, condition)
        # A prompt must not hold the token that is scored.
        prompts = [prompt.replace(REWARD, "") for prompt in prompts_of(condition)]
        texts = [self.instruction.replace(_HOLE, prompt) for prompt in prompts]
        starts = range(0, len(texts), self.batch_size)
        parts = [slice(start, start + self.batch_size) for start in starts]
        scores = [self.network(pictures[part], texts[part])[:, 0] for part in parts]
        return torch.cat(scores).to(pictures.device) if scores else pictures.new_empty(0)


def _network(pretrained: str, processor: str, dtype: torch.dtype) -> HPSv3Network:
    give = "the folder or hub id of Qwen2-VL, Qwen/Qwen2-VL-7B-Instruct"
    with reading("processor", processor, "the processor of a Qwen2-VL", give):
        config, reader = qwen_parts(processor)
    if weightless():
        return HPSv3Network(None, config, reader, dtype)
    give = f"the file {_FILE}, a folder that holds it, or the hub id MizzenAI/HPSv3"
    with reading("pretrained", pretrained, "an HPSv3", give):
        state = read_state_dict(weight_file(pretrained, _FILE))
        return HPSv3Network(state, config, reader, dtype)


def _read(instruction: str) -> str:
    """Return the text of a file."""
    with loading(f"instruction: {instruction!r} is no text file; give one, or none"):
        return Path(instruction).expanduser().read_text(encoding="utf-8")


def _installed(owner: HPSv3) -> str:
    """Return the text in the source of the installed package, of which nothing is imported."""
    found = importlib.util.find_spec(_PACKAGE)
    places = [] if found is None else list(found.submodule_search_locations or [])
    sources = [Path(place) / _SOURCE for place in places]
    constants = _constants(sources[0]) if sources and sources[0].is_file() else {}
    if missing := [name for name in _CONSTANTS if name not in constants]:
        state = f"lacks {missing[0]}" if places else "is not installed"
        raise BadArgument(
            owner,
            "instruction",
            f"is not given, and the package {_PACKAGE} {state}; run `pip install --no-deps "
            f"{_PACKAGE}`, or give a file with {' and '.join(_CONSTANTS)} of its {_SOURCE}, one "
            f"after the other, from `pip download --no-deps {_PACKAGE}`",
        )
    return "".join(constants[name] for name in _CONSTANTS)


def _constants(source: Path) -> dict[str, str]:
    """Return the texts that a Python file gives names to, without running it."""
    with loading(f"instruction: {source} could not be read; give a text file"):
        statements = ast.parse(source.read_text(encoding="utf-8")).body
    return {
        target.id: statement.value.value
        for statement in statements
        if isinstance(statement, ast.Assign)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
