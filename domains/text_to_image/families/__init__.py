"""The families of text-to-image models, by their pipelines in diffusers."""

from domains.text_to_image.families.base import Family
from domains.text_to_image.families.sana import Sana
from domains.text_to_image.families.transformers import Flux, StableDiffusion3
from domains.text_to_image.families.unet import StableDiffusion, StableDiffusionXL
from domains.text_to_image.families.z_image import ZImage

__all__ = ["FAMILIES", "Family"]

FAMILIES: dict[str, type[Family]] = {
    family.pipeline_class: family
    for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, ZImage, Sana)
}
