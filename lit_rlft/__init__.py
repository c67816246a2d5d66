"""lit-rlft: fine-tune pretrained diffusion and flow models with rewards."""

from lit_rlft.moved import register

__version__ = "0.1.0"

register({})
