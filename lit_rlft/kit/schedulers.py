"""What diffusers' schedulers, saved with a model, mean for our sampler: one table.

A scheduler is known by the name of its class and its `config`; nothing of diffusers is imported.
`FAMILIES` says how each class is sampled, `REFUSED` why another is not, `RULES` which values of an
option are not supported. An option counts only in the classes that use it: diffusers keeps unknown
keys of a scheduler_config.json, left over from another class, and ignores them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from lit_rlft.core.checks import BadArgument, UsageError
from lit_rlft.core.process import GaussianProcess, PredictionType
from lit_rlft.kit.saved_grids import CONVERSIONS, Clip, SavedFlow, SavedVP, Threshold

__all__ = [
    "FAMILIES",
    "FLOW_SOLVERS",
    "KEY",
    "PREDICTION_TYPES",
    "REFUSED",
    "RULES",
    "SOLVED_FLOWS",
    "Family",
    "check_options",
    "saved_process",
]

PREDICTION_TYPES: dict[str, PredictionType] = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "sample": "sample",
}
"""Prediction types by diffusers' names."""

Config = Mapping[str, Any]

KEY = "pipeline.init_args.pretrained"
"""The setting that names a scheduler's folder, for messages."""


@dataclass(frozen=True)
class Family:
    """How the schedulers of some classes are sampled.

    Attributes:
        exact: At which eta our steps are the class's own; empty where its solver is another, and
            ours are DDIM steps on its grid.
        predictions: Prediction types that the class itself supports.
        start: Where a sampler starts, for the documentation.
        end: Where it ends, for the documentation.
        grid: "strides": T // N entries down, wherever the next timestep lies; "table": from one
            timestep to the next; "asked": what `set_timesteps` gives; "flow": a rectified flow.
        scaled: Whether it steps variance-exploding states.
        keeps_noise: Whether clipping x_0 leaves the predicted noise as it is.
    """

    exact: str
    predictions: tuple[str, ...]
    start: str
    end: str
    grid: Literal["strides", "table", "asked", "flow"] = "asked"
    scaled: bool = False
    keeps_noise: bool = False


_ALL, _NO_SAMPLE = ("epsilon", "v_prediction", "sample"), ("epsilon", "v_prediction")
_UNIT, _SIGMA = "N(0, I)", "N(0, I); std sigma_T with trailing or linspace spacing"
_ZERO, _LOWEST = "clean data", "table index 0"
_FINAL = "clean data, or table index 0 with `final_sigmas_type` sigma_min"
_ALPHA = "clean data, or table index 0 without `set_alpha_to_one`"

_DDIM = Family("0 and 1", _ALL, _UNIT, _ALPHA, "strides", keeps_noise=True)
_DDPM = Family("1", _ALL, _UNIT, _ZERO, "table")
_MULTISTEP = Family("", _ALL, _UNIT, _FINAL)

FAMILIES: dict[str, Family] = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "EulerDiscreteScheduler": Family("0", _ALL, _SIGMA, _ZERO, scaled=True),
    "EulerAncestralDiscreteScheduler": Family("1", _NO_SAMPLE, _SIGMA, _ZERO, scaled=True),
    "PNDMScheduler": Family("", _NO_SAMPLE, _UNIT, _ALPHA, "strides"),
    "LMSDiscreteScheduler": Family("", _ALL, _SIGMA, _ZERO, scaled=True),
    "HeunDiscreteScheduler": Family("", _NO_SAMPLE, _SIGMA, _ZERO, scaled=True),
    "KDPM2DiscreteScheduler": Family("", _NO_SAMPLE, _SIGMA, _ZERO, scaled=True),
    "KDPM2AncestralDiscreteScheduler": Family("", _NO_SAMPLE, _SIGMA, _ZERO, scaled=True),
    "DPMSolverMultistepScheduler": _MULTISTEP,
    "DPMSolverSinglestepScheduler": _MULTISTEP,
    "UniPCMultistepScheduler": _MULTISTEP,
    "DEISMultistepScheduler": Family("", _ALL, _UNIT, _LOWEST),
    "SASolverScheduler": Family("", _ALL, _UNIT, _LOWEST),
    "FlowMatchEulerDiscreteScheduler": Family("0", ("velocity",), _UNIT, _ZERO, "flow"),
}
"""Classes that can be sampled."""

_REDRAWS = "draws fresh noise at every step, which no eta does"
_OTHER = "is neither a rectified flow nor a discrete VP schedule that is known here"
_FLOW = "steps a flow in another way than FlowMatchEulerDiscreteScheduler"
_BACK = "runs from data to noise"
_TOKENS = "is for tokens, not for continuous states"

REFUSED: dict[str, str] = {
    "LCMScheduler": _REDRAWS,
    "TCDScheduler": _REDRAWS,
    "FlowMatchLCMScheduler": _REDRAWS,
    "UnCLIPScheduler": "spaces and steps in its own way",
    "RePaintScheduler": "needs a picture and a mask",
    "DDIMInverseScheduler": _BACK,
    "DPMSolverMultistepInverseScheduler": _BACK,
    "DPMSolverSDEScheduler": "needs torchsde's noise, which was not tested",
    "CosineDPMSolverMultistepScheduler": _OTHER,
    "CogVideoXDDIMScheduler": "is for videos and shifts its table",
    "CogVideoXDPMScheduler": "is for videos and shifts its table",
    "CMStochasticIterativeScheduler": _OTHER,
    "DDPMWuerstchenScheduler": _OTHER,
    "EDMDPMSolverMultistepScheduler": _OTHER,
    "EDMEulerScheduler": _OTHER,
    "IPNDMScheduler": _OTHER,
    "KarrasVeScheduler": _OTHER,
    "ScoreSdeVeScheduler": _OTHER,
    "ScoreSdeVpScheduler": _OTHER,
    "SCMScheduler": _OTHER,
    "FlowMapEulerDiscreteScheduler": _FLOW,
    "FlowMatchHeunDiscreteScheduler": _FLOW,
    "HeliosDMDScheduler": _FLOW,
    "HeliosScheduler": _FLOW,
    "LTXEulerAncestralRFScheduler": _FLOW,
    "MiniMaxH3Scheduler": _FLOW,
    "PiflowScheduler": _FLOW,
    "RFD4ProteinaScheduler": _FLOW,
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
}
"""Why other classes cannot be sampled; a class in neither table is refused as unknown."""


@dataclass(frozen=True)
class Rule:
    """Which values of an option are not supported.

    Attributes:
        bad: From the config to whether its value is.
        values: These values in words.
        why: What is wrong with them.
        remedy: What to set instead.
        only: Classes that use the option.
    """

    bad: Callable[[Config], bool]
    values: str
    why: str
    remedy: str = "false"
    only: tuple[str, ...] = ()


_MULTI = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)
_FLOWS = ("FlowMatchEulerDiscreteScheduler",)
_DDPMS = ("DDPMScheduler", "DDPMParallelScheduler")
_LEARNED = ("learned", "learned_range")

RULES: dict[str, tuple[Rule, ...]] = {
    "interpolation_type": (
        Rule(
            lambda c: c["interpolation_type"] != "linear",
            "log_linear",
            "it never reaches clean data",
            "'linear'",
            only=("EulerDiscreteScheduler",),
        ),
    ),
    "timestep_type": (
        Rule(
            lambda c: (c["timestep_type"], c["prediction_type"]) == ("continuous", "v_prediction"),
            "continuous, with v_prediction",
            "the network is told log sigma / 4, not a timestep",
            "'discrete'",
            only=("EulerDiscreteScheduler",),
        ),
    ),
    "final_sigmas_type": (
        Rule(
            lambda c: c["final_sigmas_type"] != "zero",
            "sigma_min",
            "its samples keep noise, on the scale of x / alpha",
            "'zero'",
            only=("EulerDiscreteScheduler",),
        ),
    ),
    "use_flow_sigmas": (
        Rule(
            lambda c: bool(c["use_flow_sigmas"]),
            "true",
            "a flow is sampled with FlowMatchEulerDiscreteScheduler",
            only=_MULTI,
        ),
    ),
    "use_dynamic_shifting": (
        Rule(
            lambda c: bool(c["use_dynamic_shifting"]),
            "true",
            "the shift is then passed by the caller",
            "false and shift to a number",
            only=_MULTI + _FLOWS,
        ),
    ),
    "invert_sigmas": (
        Rule(lambda c: bool(c["invert_sigmas"]), "true", "it runs from 0 to 1", only=_FLOWS),
    ),
    "stochastic_sampling": (
        Rule(lambda c: bool(c["stochastic_sampling"]), "true", _REDRAWS, only=_FLOWS),
    ),
    "variance_type": (
        Rule(
            lambda c: c["variance_type"] in (*_LEARNED, "fixed_large_log"),
            "learned, learned_range and fixed_large_log",
            "our noise has a fixed variance",
            "'fixed_small' or 'fixed_large'",
            only=_DDPMS,
        ),
        Rule(
            lambda c: c["variance_type"] in _LEARNED,
            "learned and learned_range",
            "our noise has a fixed variance",
            "null",
            only=_MULTI,
        ),
    ),
}
"""Refused values by option."""


def _set(option: str, config: Config) -> bool:
    return bool(config[option])


FLOW_SOLVERS = (
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
)
"""Solvers that end flows at clean data, where they were saved with `use_flow_sigmas`."""

SOLVED_FLOWS: dict[str, tuple[Rule, ...]] = {
    "prediction_type": (
        Rule(
            lambda c: c["prediction_type"] != "flow_prediction",
            "all but flow_prediction",
            "the network of a flow predicts its velocity",
            "'flow_prediction'",
            only=FLOW_SOLVERS,
        ),
    ),
    "final_sigmas_type": (
        Rule(
            lambda c: c["final_sigmas_type"] != "zero",
            "sigma_min",
            "its samples keep noise",
            "'zero'",
            only=FLOW_SOLVERS,
        ),
    ),
    **{
        option: (Rule(partial(_set, option), "true", why, remedy, only=FLOW_SOLVERS),)
        for option, why, remedy in (
            ("thresholding", "latents are not bounded", "false"),
            ("shift_terminal", "its grid ends elsewhere", "null"),
            ("use_karras_sigmas", "its noise levels are then those of a table", "false"),
            ("use_exponential_sigmas", "its noise levels are then those of a table", "false"),
            ("use_beta_sigmas", "its noise levels are then those of a table", "false"),
            ("use_lu_lambdas", "its noise levels are then those of a table", "false"),
        )
    },
    "use_dynamic_shifting": RULES["use_dynamic_shifting"],
}
"""The same for solvers of flows, which have options of their own."""


def saved_process(scheduler: Any, *, flows: bool = False) -> GaussianProcess:
    """Return the process of a scheduler, sampled as diffusers samples it.

    Where its own steps are others than ours, one line says which stand in for them.

    Args:
        scheduler: One of diffusers' schedulers, as a pipeline of diffusers holds it.
        flows: Whether the network may be a rectified flow.

    Raises:
        UsageError: The class, or a value of one of its options, is not supported.
    """
    name, config = type(scheduler).__name__, scheduler.config
    family = _family(name, flows)
    check_options(name, config)
    if said := _stands_in(name, family):
        rank_zero_info(said)
    if family.grid == "flow":
        return GaussianProcess(SavedFlow(scheduler), "velocity")
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in family.predictions:
        raise UsageError(
            f"{KEY}: a {name} with prediction_type {prediction_type!r} is not supported; set it to "
            f"one of {sorted(family.predictions)} in scheduler_config.json, whichever the network "
            "was trained for"
        )
    schedule = SavedVP(
        scheduler,
        asked=family.grid == "asked",
        scaled=family.scaled,
        converted=_converted(name, config),
        strides=family.grid == "strides",
        ends_at_zero=family.grid != "strides" or config["set_alpha_to_one"],
    )
    _check_ends(name, config, schedule)
    wide = name in _DDPMS and config["variance_type"] == "fixed_large"
    return GaussianProcess(
        schedule,
        PREDICTION_TYPES[prediction_type],
        bound=_bound(name, config),
        keeps_noise=family.keeps_noise,
        wide_above=1.5 / schedule.num_levels if wide else None,  # none at table index 0
    )


def _stands_in(name: str, family: Family) -> str | None:
    """Return what stands in for a class's own steps, in words; None where ours are its own."""
    if not family.exact:
        return (
            f"the model's {name} is a solver of its own: DDIM steps on its timesteps and noise "
            "levels stand in for it"
        )
    if family.exact == "1":
        return (
            f"the model's {name} takes ancestral steps, which are ours at sampler.eta 1; below, "
            "DDIM steps on its timesteps stand in for it"
        )
    return None


def _family(name: str, flows: bool) -> Family:
    family = FAMILIES.get(name)
    if family is not None and (flows or family.grid != "flow"):
        return family
    reason = REFUSED.get(name, "is not known here" if family is None else "is for flows")
    known = [n for n, f in FAMILIES.items() if f.exact and (flows or f.grid != "flow")]
    ours = [n for n in known if "Parallel" not in n]
    raise UsageError(
        f"{KEY}: the model's {name} {reason}; save the folder with a scheduler that fits the "
        f"network, one of {', '.join(ours)}"
    )


def check_options(
    name: str,
    config: Config,
    table: Mapping[str, tuple[Rule, ...]] = RULES,
    supplied: tuple[str, ...] = (),
) -> None:
    """Check that the options of a scheduler are supported.

    Args:
        name: Its class.
        config: Its config.
        table: Refused values by option.
        supplied: Options that the caller sees to.

    Raises:
        UsageError: One is not; it names the remedy.
    """
    for option, rules in table.items():
        for rule in rules:
            used = name in rule.only and option in config and option not in supplied
            if used and rule.bad(config):
                raise UsageError(
                    f"{KEY}: a {name} with {option} is not supported ({config[option]!r}: "
                    f"{rule.why}); set it to {rule.remedy} in scheduler_config.json"
                )


def _converted(name: str, config: Config) -> bool:
    uses = FAMILIES[name].grid == "asked" and name != "EulerAncestralDiscreteScheduler"
    return uses and any(config.get(option) for option in CONVERSIONS)


def _check_ends(name: str, config: Config, schedule: SavedVP) -> None:
    """Refuse levels that the table does not have, and noise predicted from noise alone."""
    sigmas = (1 / schedule.alpha_bar[1:] - 1).sqrt()
    lowest, largest = float(sigmas[0]), float(sigmas[-1])
    if _converted(name, config) and name in _WITH_SIGMA_ENDS:
        low, high = config["sigma_min"], config["sigma_max"]
        for option, value, bad in (
            ("sigma_min", low, low is not None and low < lowest * (1 - 1e-6)),
            ("sigma_max", high, high is not None and high > largest * (1 + 1e-6)),
        ):
            if bad:
                raise UsageError(
                    f"{KEY}: a {name} with {option} is not supported ({value!r}: its table has "
                    f"{lowest:.4g} to {largest:.4g}); set it to null in scheduler_config.json"
                )
    if config.get("prediction_type") == "epsilon" and schedule.alpha_bar[-1] == 0:
        raise UsageError(
            f"{KEY}: a {name} with rescale_betas_zero_snr starts at pure noise, where prediction "
            "type 'epsilon' says nothing about x_0; set rescale_betas_zero_snr to false in "
            "scheduler_config.json"
        )


_WITH_SIGMA_ENDS = ("EulerDiscreteScheduler", "UniPCMultistepScheduler")
_WITH_CLIP = ("DDIMScheduler", "DDIMParallelScheduler", *_DDPMS, "HeunDiscreteScheduler")
_WITH_THRESHOLD = ("DDIMScheduler", "DDIMParallelScheduler", *_DDPMS, *_MULTI)


_BOUNDS = {
    "Clip": {"limit": "clip_sample_range"},
    "Threshold": {"ratio": "dynamic_thresholding_ratio", "limit": "sample_max_value"},
}
"""Which options our own arguments are."""


def _bound(name: str, config: Config) -> Clip | Threshold | None:
    """Return what the scheduler does to its estimates of x_0."""
    kind: type[Clip | Threshold]
    if name in _WITH_THRESHOLD and config.get("thresholding"):
        kind = Threshold
    elif name in _WITH_CLIP and config.get("clip_sample"):
        kind = Clip
    else:
        return None
    options = _BOUNDS[kind.__name__]
    try:
        return kind(**{argument: config[option] for argument, option in options.items()})
    except BadArgument as error:
        raise UsageError(
            f"{KEY}: {options[error.argument]} of the model's {name} {error.problem}; fix it in "
            "scheduler_config.json"
        ) from error
