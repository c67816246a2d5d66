"""What the model card of a tuned text-to-image model says of its use."""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from domains.text_to_image import EMBEDDED
from domains.text_to_image.networks.web_lora import WEB_LORA
from lit_rlft.kit.network_folder import source_of

__all__ = ["Beside", "hub_header", "strength", "usage", "vae_subfolder"]

_LORA, _NOISE = "pytorch_lora_weights.safetensors", "noise_generator.safetensors"
_CORRECTOR = "corrector.json"
_LINE = 90
_FLUX = "black-forest-labs/FLUX.1-dev"


@dataclass(frozen=True)
class Beside:
    """What a run loads beside a model's own files, or in their place.

    Attributes:
        config: What completes a single file: folder or hub id.
        variant: Which files of weights, such as "fp16"; None for plain ones.
        vae: Folder, hub id or file of another VAE; None for the model's own.
        vae_kind: Its class in diffusers.
        vae_subfolder: Where in `vae` its config.json is; None for `vae` itself.
        textual_inversions: Files with further tokens.
        dtype: Precision of the denoiser and the text encoders, such as "float32". Untold, text
            encoders have that of their files and denoisers float32. None leaves it so.
        vae_dtype: The same of the VAE.
    """

    config: str | None = None
    variant: str | None = None
    vae: str | None = None
    vae_kind: str = "AutoencoderKL"
    vae_subfolder: str | None = None
    textual_inversions: Sequence[str] = ()
    dtype: str | None = None
    vae_dtype: str | None = None


def hub_header(base: str, files: Sequence[str]) -> dict[str, Any]:
    """Return the header that the hub reads.

    Args:
        base: What was tuned: a hub id, or a folder, file or embedded model.
        files: Names of the tuned model's files.
    """
    if _CORRECTOR in files:  # it draws noise
        return {}
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
    beside: Beside,
    files: Sequence[str],
    facts: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> str:
    """Return how to draw pictures, in Python; nothing where lit-rlft alone does.

    Args:
        kind: The pipeline's class in diffusers.
        base: What was tuned.
        beside: What was loaded beside it.
        files: Names of the tuned model's files.
        facts: `num_steps`, `tuned_steps`, `eta` and `scheduler` of the run.
        settings: Further arguments of the pipeline's call.
    """
    if _CORRECTOR in files:
        return ""
    call = _call(kind, {"num_inference_steps": facts["num_steps"], **settings, **_eta(kind, facts)})
    swapped, sentence = _swapped(facts)
    partly = 0 < facts["tuned_steps"] < facts["num_steps"]
    if _LORA not in files and _NOISE not in files and not partly:
        load = _line(f"pipe = {kind}.from_pretrained", ['"tuned"', *_typed(beside.dtype)]) + swapped
        start = _imports({kind}, load)
        return f'```python\n{start}\n# "tuned" is this folder\n{load}{call}```{sentence}'
    imports, load = _loaded(kind, base, beside)
    ours = (
        f"```python\n{imports}from lit_rlft.inference import load_tuned\n\n{load}"
        f'pipe = load_tuned(pipe, "tuned")  # this folder\n{call}```'
    )
    if swapped:
        sentence += " `load_tuned` sets it by itself."
    ours += sentence
    if _LORA not in files:
        alone = "\n\n`load_tuned` keeps both denoisers; this folder alone draws all steps."
        return ours + (alone if partly else "")
    imports, load = _loaded(kind, base, beside, swapped)
    plain = f'```python\n{imports}\n{load}pipe.load_lora_weights("tuned")\n{call}```'
    if not partly:
        return f"{ours}\n\nIn plain diffusers:\n\n{plain}"
    return (
        f"{ours}\n\n`load_tuned` switches the LoRA off for the other steps. Plain diffusers and "
        f"web interfaces leave it on:\n\n{plain}"
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


def vae_subfolder(given: str) -> str | None:
    """Return where in a folder or hub id, which was loaded, a VAE is; None for itself."""
    if Path(given).is_file():
        return None
    if Path(given).exists():
        return None if (Path(given) / "config.json").is_file() else "vae"
    # The hub's files that were loaded are in the cache.
    return None if isinstance(try_to_load_from_cache(given, "config.json"), str) else "vae"


def _call(kind: str, settings: Mapping[str, Any]) -> str:
    """Return the line that draws a picture, or several lines where it is long."""
    _, first, *_ = inspect.signature(getattr(diffusers, kind).__call__).parameters
    prompt = '"a red ring"' if first == "prompt" else 'prompt="a red ring"'
    told = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v!r}" for k, v in settings.items()]
    return _line("picture = pipe", [prompt, *told], ".images[0]")


def _line(start: str, arguments: Sequence[str], end: str = "") -> str:
    """Return a call as one line, or as several where it is long."""
    line = f"{start}({', '.join(arguments)}){end}\n"
    if len(line) <= _LINE:
        return line
    return "\n    ".join([f"{start}(", *(f"{each}," for each in arguments)]) + f"\n){end}\n"


def _eta(kind: str, facts: Mapping[str, Any]) -> dict[str, float]:
    """Return eta where a pipeline hands it to the scheduler and it does something there."""
    eta, told = facts.get("eta", 0.0), facts.get("scheduler") or {}
    taken = str(told.get("class")).startswith("DDIM")
    call = inspect.signature(getattr(diffusers, kind).__call__).parameters
    return {"eta": eta} if eta and taken and "eta" in call else {}


def _swapped(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Return the line that sets the scheduler whose steps the run took, and a sentence on it."""
    told = facts.get("scheduler")
    if told is None:
        return "", ""
    own, name = told["model"], told["class"]
    if name is None:
        return "", (
            f"\n\nNo scheduler of diffusers takes the run's steps (eta {facts['eta']:g}, "
            f"transition {facts['transition']}): with {own} the pictures are drawn in another way "
            "than those that were tuned and measured."
        )
    if name == own and not told["options"]:
        return "", ""
    given = [f"{key}={value!r}" for key, value in told["options"].items()]
    line = _line(f"pipe.scheduler = {name}.from_config", ["pipe.scheduler.config", *given])
    nearly = "" if told["exact"] else "nearly "
    other = "its own solver" if name == own else own
    return line, (
        f"\n\nThe model was tuned and measured with {nearly}the steps of the {name} in this code, "
        f"not with those of {other}."
    )


def _loaded(kind: str, base: str, beside: Beside, further: str = "") -> tuple[str, str]:
    """Return imports, and the lines that load what was tuned, with further lines after them."""
    classes, name, other = {kind}, _name(base), _name(beside.config)
    alone, load, given = name.endswith(".safetensors"), "", [_quoted(base)]
    method, whole = "from_pretrained", f'"{other}"' if other else ""
    if alone and kind == "FluxPipeline":  # its file is of the transformer alone
        part, whole = "FluxTransformer2DModel", whole or f'"{_FLUX}"'
        classes.add(part)
        configured = [f'config="{other}"', 'subfolder="transformer"'] if other else []
        given += [*configured, *_typed(beside.dtype)]
        load += _line(f"transformer = {part}.from_single_file", given)
        given = [whole, "transformer=transformer"]
    elif alone:
        method, given = "from_single_file", given + ([f'config="{other}"'] if other else [])
    elif beside.variant is not None:
        given.append(f'variant="{beside.variant}"')
    if beside.vae is not None:
        classes.add(beside.vae_kind)
        load += _vae(beside, whole if alone else given[0])
        given.append("vae=vae")
    load += _line(f"pipe = {kind}.{method}", [*given, *_typed(beside.dtype)])
    tokens = "".join(_token(kind, path) for path in beside.textual_inversions)
    load += tokens + further
    return _imports(classes, load), load


def _imports(classes: set[str], code: str) -> str:
    """Return the imports of a card's code: classes of diffusers, and what else it uses."""
    classes = classes | set(re.findall(r"= (\w+)\.from_config", code))
    lines = ["import torch"] if "torch." in code else []
    lines.append(f"from diffusers import {', '.join(sorted(classes))}")
    lines += ["from domains.text_to_image import EMBEDDED"] if "EMBEDDED" in code else []
    lines += ["from safetensors.torch import load_file"] if "load_file(" in code else []
    return "\n".join(lines) + "\n"


def _typed(dtype: str | None) -> list[str]:
    return [] if dtype is None else [f"torch_dtype=torch.{dtype}"]


def _vae(beside: Beside, whole: str) -> str:
    """Return the line that loads a VAE; a file needs the config of a model's own.

    Args:
        beside: It is named there.
        whole: Code that names the model; empty where nothing is known but its file.
    """
    given = [f'"{_name(beside.vae)}"']
    if given[0].endswith('.safetensors"'):
        given += [f"config={whole}", 'subfolder="vae"'] if whole else []
        return _line(f"vae = {beside.vae_kind}.from_single_file", given + _typed(beside.vae_dtype))
    given += [f'subfolder="{beside.vae_subfolder}"'] if beside.vae_subfolder else []
    return _line(f"vae = {beside.vae_kind}.from_pretrained", given + _typed(beside.vae_dtype))


def _token(kind: str, path: str) -> str:
    """Return the lines that add the token of a textual inversion."""
    name, stem, keys = Path(path).name, Path(path).stem, _keys(path)
    start = "pipe.load_textual_inversion"
    if kind == "StableDiffusionXLPipeline":
        lines = f'vectors = load_file("{name}")\n'
        for key, end in (("clip_l", ""), ("clip_g", "_2")):
            parts = [f"{part}=pipe.{part}{end}" for part in ("text_encoder", "tokenizer")]
            lines += _line(start, [f'vectors["{key}"]', f'token="{stem}"', *parts])
        return lines
    if keys == ["emb_params"]:
        return _line(start, [f'"{name}"', f'token="{stem}"'])
    if len(keys) == 1 and keys != ["clip_l"]:  # the file names the token
        return _line(start, [f'"{name}"'])
    key = "emb_params" if "emb_params" in keys else "clip_l"
    return _line(start, [f'load_file("{name}")["{key}"]', f'token="{stem}"'])


def _keys(path: str) -> list[str]:
    """Return the names in a file of safetensors; of one that has gone, those of most."""
    try:
        with safe_open(path, "pt") as file:
            return sorted(file.keys())
    except (OSError, SafetensorError):
        return ["emb_params"]


def _name(given: str | None) -> str:
    """Return how a card names a folder, a file or a hub id: without paths of this machine."""
    if given is None:
        return ""
    return Path(given).name if _local(given) else given


def _quoted(base: str) -> str:
    """Return the code of a model's name; that of an embedded one is the folder it comes in."""
    embedded = source_of(base, EMBEDDED) != base
    return f'str(EMBEDDED / "{base}")' if embedded else f'"{_name(base)}"'


def _local(base: str) -> bool:
    """Return whether a model is of this machine alone, or comes with the library."""
    return Path(base).exists() or Path(base).is_absolute() or (EMBEDDED / base).exists()
