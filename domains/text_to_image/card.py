"""What the model card of a tuned text-to-image model says of its use."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from domains.text_to_image import EMBEDDED
from domains.text_to_image.networks.web_lora import WEB_LORA

__all__ = ["hub_header", "strength", "usage"]

_LORA, _NOISE = "pytorch_lora_weights.safetensors", "noise_generator.safetensors"
_LINE = 90
_FLUX = "black-forest-labs/FLUX.1-dev"


def hub_header(base: str, files: Sequence[str]) -> dict[str, Any]:
    """Return the header that the hub reads.

    Args:
        base: What was tuned: a hub id, or a folder, file or embedded model.
        files: Names of the tuned model's files.
    """
    tags = ["text-to-image", "lit-rlft", "reinforcement-learning"]
    header: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if _LORA in files:
        tags = ["lora", *tags]
    if not _local(base):
        header["base_model"] = base
        header["base_model_relation"] = "adapter" if _LORA in files else "finetune"
    return {**header, "tags": tags}


def usage(
    kind: str,
    base: str,
    config: str | None,
    files: Sequence[str],
    facts: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> str:
    """Return how to draw pictures, in Python.

    Args:
        kind: The pipeline's class in diffusers.
        base: What was tuned.
        config: What completes it where it is a single file.
        files: Names of the tuned model's files.
        facts: `num_steps` and `tuned_steps` of the run.
        settings: Further arguments of the pipeline's call.
    """
    start = f"from diffusers import {kind}\n"
    call = _call({"num_inference_steps": facts["num_steps"], **settings})
    if _LORA not in files and _NOISE not in files:
        return f'```python\n{start}\npipe = {kind}.from_pretrained("tuned")  # here\n{call}```'
    load = f"pipe = {_loaded(kind, base, config)}"
    ours = (
        f"```python\n{start}from lit_rlft.inference import load_tuned\n\n{load}\n"
        f'pipe = load_tuned(pipe, "tuned")  # this folder\n{call}```'
    )
    if _LORA not in files:
        return ours
    plain = f'```python\n{load}\npipe.load_lora_weights("tuned")\n{call}```'
    if facts["tuned_steps"] == facts["num_steps"]:
        return f"{ours}\n\nIn plain diffusers:\n\n{plain}"
    skipped, number = facts.get("skipped_steps", 0), facts["tuned_steps"]
    which = f"steps {skipped + 1} to {skipped + number}" if skipped else f"the first {number}"
    return (
        f"{ours}\n\nThe LoRA is for {which} of {facts['num_steps']} "
        "steps; `load_tuned` switches it off for the others. Plain diffusers leaves it on:\n\n"
        f"{plain}"
    )


def strength(rank: int, alpha: float, files: Sequence[str]) -> str:
    """Return a sentence on a LoRA whose alpha is not its rank; empty where it is.

    Args:
        rank: Of the LoRA.
        alpha: Of the LoRA.
        files: Names of the tuned model's files.
    """
    if rank == alpha:
        return ""
    remedy = f"give `{WEB_LORA}` to" if WEB_LORA in files else f"take strength {alpha / rank:g} in"
    return (
        f"\n\nThe LoRA has rank {rank} and alpha {alpha:g}, which its metadata say; {remedy} "
        "programs that do not read them, such as web interfaces."
    )


def _call(settings: Mapping[str, Any]) -> str:
    """Return the line that draws a picture, or several lines where it is long."""
    told = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v!r}" for k, v in settings.items()]
    line = f'picture = pipe("a red ring", {", ".join(told)}).images[0]\n'
    if len(line) <= _LINE:
        return line
    return "\n    ".join(["picture = pipe(", *(f"{each}," for each in ['"a red ring"', *told])]) + (
        "\n).images[0]\n"
    )


def _loaded(kind: str, base: str, config: str | None) -> str:
    """Return the expression that loads what was tuned."""
    name = Path(base).name if _local(base) else base
    if not name.endswith(".safetensors"):
        return f'{kind}.from_pretrained("{name}")'
    other = "" if config is None else Path(config).name if _local(config) else config
    if kind == "FluxPipeline":  # its file is of the transformer alone
        part = f'FluxTransformer2DModel.from_single_file("{name}")'
        return f'{kind}.from_pretrained("{other or _FLUX}", transformer={part})'
    return f'{kind}.from_single_file("{name}"' + (f', config="{other}")' if other else ")")


def _local(base: str) -> bool:
    """Return whether a model is of this machine alone, or comes with the library."""
    return Path(base).exists() or Path(base).is_absolute() or (EMBEDDED / base).exists()
