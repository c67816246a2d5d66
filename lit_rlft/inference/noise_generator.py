"""Learned priors in files, and the initial noise that they give.

    generator = NoiseGenerator.load("runs/<name>/tuned/noise_generator.safetensors")
    embeds, _ = pipe.encode_prompt([prompt], device, 1, do_classifier_free_guidance=False)
    latents = generator(embeds, generator=torch.Generator().manual_seed(0))
    picture = pipe(prompt, latents=latents, num_inference_steps=generator.notes["num_steps"], ...)

Needs torch and safetensors alone.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import pooled
from lit_rlft.core.prior import FullResolution, LowRank, LowResolution, NoisePolicy
from lit_rlft.core.settings import arguments

__all__ = ["NoiseGenerator"]

_KEY = "lit_rlft.inference"
_MAPS = {cls.__name__: cls for cls in (FullResolution, LowResolution, LowRank)}


class NoiseGenerator(nn.Module):
    """Draws initial noise z = mu(c) + sigma(c) e from a learned prior.

    Args:
        policy: The prior.
        notes: What a user should know, written into the file: values that JSON can hold.
    """

    def __init__(self, policy: NoisePolicy, notes: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.policy, self.notes = policy, dict(notes or {})

    @torch.no_grad()
    def forward(
        self,
        encoding: Tensor,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Draw noise for conditions, on their device and in their dtype, [B, *shape].

        The same generators give diffusers without `latents` the same e.

        Args:
            encoding: [B, L, F] prompt embeddings (without negative prompts), or [B, F] features
                unless the prior has attention.
            generator: One for all, one per sample, or None for torch's global one.

        Raises:
            UsageError: The encoding is not of the model that the prior was trained for, or has no
                tokens for attention to read.
        """
        if encoding.shape[-1] != self.policy.num_features:
            raise UsageError(
                f"the encoding has {encoding.shape[-1]} features, but this noise generator was "
                f"trained with {self.policy.num_features}; encode the prompts with "
                f"{self.notes.get('pipeline', 'the model it was trained with')}"
            )
        if self.policy.heads and encoding.dim() != 3:
            raise UsageError(
                "this noise generator reads a text's tokens; give it prompt embeddings [B, L, F], "
                f"not averages of shape {list(encoding.shape)}"
            )
        prior = self.policy(encoding if self.policy.heads else pooled(encoding))
        noise = _randn((len(encoding), *self.policy.shape), encoding, generator)
        return (prior.loc + prior.std * noise.to(prior.loc)).to(encoding)

    def save(self, path: Path) -> Path:
        """Write weights, architecture and notes as one safetensors file."""
        policy, maps = self.policy, self.policy.maps
        own = {name: getattr(maps, name) for name in arguments(type(maps))}
        architecture = {
            "num_features": policy.num_features,
            "shape": policy.shape,
            "width": policy.width,
            "conditional": policy.conditional,
            "heads": policy.heads,
            "maps": {"name": type(maps).__name__, **own},
        }
        weights = {name: value.detach().cpu() for name, value in policy.state_dict().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"architecture": architecture, "notes": self.notes})
        save_file(weights, path, {_KEY: text})
        return path

    @classmethod
    def load(cls, path: str | Path) -> "NoiseGenerator":
        """Read what `save` wrote.

        Raises:
            UsageError: There is no such file, or it is no noise generator.
        """
        if not Path(path).is_file():
            raise UsageError(f"there is no file {path}")
        try:
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {})[_KEY]
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError) as error:
            raise UsageError(f"{path} is no noise generator written by lit-rlft") from error
        written = json.loads(text)
        architecture = written["architecture"]
        maps = dict(architecture.pop("maps"))
        kind = maps.pop("name")
        if kind not in _MAPS:
            raise UsageError(f"{path} has maps of a kind of your own, {kind}; known: {[*_MAPS]}")
        policy = NoisePolicy(maps=_MAPS[kind](**maps), **architecture)
        policy.load_state_dict(weights)
        return cls(policy.requires_grad_(False).eval(), written["notes"])


def _randn(
    shape: Sequence[int],
    like: Tensor,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Tensor:
    if generator is None:
        return torch.randn(shape, dtype=like.dtype, device=like.device)
    if isinstance(generator, torch.Generator):
        noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=generator.device)
        return noise.to(like.device)
    if len(generator) != shape[0]:
        raise UsageError(f"{len(generator)} generators were given for {shape[0]} conditions")
    return torch.cat([_randn((1, *shape[1:]), like, each) for each in generator])
