"""The families of text-to-image models, by their pipelines in diffusers."""

from typing import Any

from diffusers import DiffusionPipeline

from domains.text_to_image.families.base import Family
from domains.text_to_image.families.flux2 import Flux2Klein
from domains.text_to_image.families.sana import Sana
from domains.text_to_image.families.transformers import Flux, StableDiffusion3
from domains.text_to_image.families.unet import StableDiffusion, StableDiffusionXL
from domains.text_to_image.families.z_image import ZImage

__all__ = ["FAMILIES", "Family", "family_of"]

FAMILIES: dict[str, type[Family]] = {
    family.pipeline_class: family
    for family in (
        StableDiffusion,
        StableDiffusionXL,
        StableDiffusion3,
        Flux,
        Flux2Klein,
        ZImage,
        Sana,
    )
}


def family_of(
    parts: DiffusionPipeline, pixels: tuple[int | None, int | None], **options: Any
) -> Family:
    """Return a loaded pipeline's family; arguments are those of `Family`."""
    return FAMILIES[type(parts).__name__](parts, pixels, **options)
