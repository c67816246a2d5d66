"""Inverse noise correction: the algorithm, the inversion of the data, and the noise it stores."""

from lit_rlft.algorithms.inverse_noise_correction.algorithm import InverseNoiseCorrection

__all__ = ["InverseNoiseCorrection"]
