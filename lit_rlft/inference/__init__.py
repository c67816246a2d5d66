"""Tuned models in other programs: plain diffusers pipelines, and learned priors in files.

Needs torch and safetensors; diffusers is the caller's.
"""

from lit_rlft.inference.noise_generator import NoiseGenerator
from lit_rlft.inference.tuned import load_tuned

__all__ = ["NoiseGenerator", "load_tuned"]
