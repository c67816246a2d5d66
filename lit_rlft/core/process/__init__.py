"""Noising processes: the mathematics of x_t, with no network in sight."""

from lit_rlft.core.process.angular import AngularFlow
from lit_rlft.core.process.base import Process
from lit_rlft.core.process.categorical import MaskedProcess
from lit_rlft.core.process.gaussian import GaussianProcess, PredictionType
from lit_rlft.core.process.gibbs import GibbsProcess
from lit_rlft.core.process.noise import CPS, FLOW_STEPS, FlowSDE, Noise, Within, of_step
from lit_rlft.core.process.product import ProductProcess
from lit_rlft.core.process.uniform import UniformProcess

__all__ = [
    "CPS",
    "FLOW_STEPS",
    "AngularFlow",
    "FlowSDE",
    "GaussianProcess",
    "GibbsProcess",
    "MaskedProcess",
    "Noise",
    "PredictionType",
    "Process",
    "ProductProcess",
    "UniformProcess",
    "Within",
    "of_step",
]
