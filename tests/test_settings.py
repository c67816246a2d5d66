"""No class takes NaN, infinity, or a negative number or 0 where it means nothing.

Every numeric argument of every class that a command line can name is given each of them: it is
refused in a sentence that names the argument, or stands in a list below with the reason.
"""

import importlib
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from domains.gaussian_mixture.pipeline import GaussianMixturePipeline
from domains.gaussian_mixture.rewards import Coordinate, Quadratic
from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.cli.index import Entry, index
from lit_rlft.core.checks import BadArgument, UsageError
from lit_rlft.core.gradient_plan import DRaFT
from lit_rlft.core.prior import LowRank
from lit_rlft.core.process import MaskedProcess
from lit_rlft.core.reward import Metric
from lit_rlft.core.sampling import Sampler
from lit_rlft.core.schedule import CosineVP
from lit_rlft.core.selection import TopK
from lit_rlft.core.settings import Recorded, settings
from lit_rlft.core.settings import arguments as recorded

BAD = (math.nan, math.inf, -math.inf, -1, 0)

INTERNAL = {
    "Flux", "Flux2Klein", "Sana", "StableDiffusion", "StableDiffusion3", "StableDiffusionXL",
    "ZImage",
    "SavedFlow", "SolvedFlow",
    "Batches", "BadArgument", "Bars", "Chunk", "Categorical", "Command",
    "FixedBatches",
    "Gaussian", "GaussianMixtureDenoiser", "Generated", "GradientPlan", "Images",
    "PointCloudGaussian", "PointClouds", "RealFeatures", "Residual", "Rollout",
    "Rollouts", "Route", "Rows", "SizeBatches", "TimedBlock", "Update", "Preprocessing",
    "CoupledPointClouds", "FlowMLP", "DiscreteVP", "NoisePolicy", "Report", "Stopped",
    "Lane", "SideProcess", "SideTimes", "CLIPT5Config", "StepNoise", "Evaluator",
    "Extremes", "Matches", "Points", "Refused", "Seeded", "VoteServer",
}  # fmt: skip
"""Made by other classes, from settings that those have checked, or from files."""

LIGHTNINGS = {"LastCheckpoint"}
"""Lightning's own arguments, which it checks itself."""

NEEDED: Mapping[str, Mapping[str, Any]] = {
    "lit_rlft.Unique": {"inner": TopK()},
    "lit_rlft.Product": {"rewards": {"a": Coordinate()}},
    "lit_rlft.WeightedSum": {"rewards": {"a": Coordinate()}},
    "lit_rlft.core.process.GaussianProcess": {"schedule": CosineVP(0.01)},
    "lit_rlft.core.process.GibbsProcess": {
        "fields": {"a": MaskedProcess(3)}, "elements": {"a": 4}, "rounds": 2,
    },
    "lit_rlft.core.process.MaskedProcess": {"num_classes": 3},
    "lit_rlft.core.process.UniformProcess": {"num_classes": 3},
    "lit_rlft.core.process.ProductProcess": {"fields": {"a": MaskedProcess(3)}},
    "lit_rlft.kit.saved_grids.Threshold": {"ratio": 0.995, "limit": 1.0},
    "lit_rlft.optimizers.MuonAdamW": {"params": [torch.zeros(2, 2, requires_grad=True)]},
    "lit_rlft.callbacks.budget.Budget": {"denoiser_calls": 1, "reward_calls": 1},
    "domains.image.networks.features.FeatureArchitecture": {
        "size": 8, "channels": 1, "classes": ["a"],
    },
    "domains.image.metrics.FrechetDistance": {"statistics": "a.npz", "features": "digits_features"},
    "domains.image.sources.ImageFolder": {"path": "folder"},
    "domains.image.sources.Arrays": {"path": "folder"},
    "domains.layout.rewards.ClassCounts": {"counts": {"text": 1}},
    "domains.molecule.rewards.LogP": {"target": 1.0},
    "domains.molecule.rewards.TPSA": {"target": 1.0},
    "domains.molecule.rewards.RingCount": {"target": 1.0},
    "domains.molecule.rewards.AtomCount": {"symbol": "C", "target": 1.0},
    "domains.molecule.rewards.Substructures": {"present": ["C"]},
    "domains.molecule.sources.QM9": {"path": "file"},
    "domains.molecule.sources.MoleculeFile": {"path": "file.sdf"},
    "domains.molecule.sources.SmilesFile": {"path": "file.smi"},
    "domains.molecule.rewards.FunctionReward": {"function": len},
    "domains.molecule.top_molecules.TopMolecules": {"reward": Coordinate()},
    "domains.text_to_image.rewards.FunctionReward": {"function": len},
    "domains.text_to_image.rewards.OCRAccuracy": {"engine": len},
    "domains.text_to_image.metrics.LPIPSDiversity": {"network": "file", "heads": "file"},
    "domains.text_to_image.set_metrics.CMMD": {"folder": "folder", "pretrained": "shapes_clip"},
    "domains.text_to_image.set_metrics.Copies": {"folder": "folder", "pretrained": "shapes_clip"},
    "domains.text_to_image.set_metrics.Duplicates": {"pretrained": "shapes_clip"},
    "domains.text_to_image.data.PromptData": {"source": "file.txt"},
    "domains.text_to_image.benchmarks.DrawBenchPrompts": {"source": "file.csv"},
    "domains.text_to_image.benchmarks.GenEval2Prompts": {"source": "file.jsonl"},
    "domains.text_to_image.benchmarks.GenEvalPrompts": {"source": "file.jsonl"},
    "domains.text_to_image.benchmarks.HPDv2Prompts": {"source": "folder"},
    "domains.text_to_image.benchmarks.PartiPrompts": {"source": "file.tsv"},
    "domains.text_to_image.benchmarks.T2ICompBenchPrompts": {"source": "folder"},
    "lit_rlft.kit.preference_pairs.PreferencePairs": {"file": "votes.jsonl"},
    "lit_rlft.kit.http_reward.HTTPReward": {"url": "http://localhost:8000"},
}  # fmt: skip

ZERO, ANY = (0,), (-1, 0)
ALLOWED: Mapping[str, tuple[Sequence[float], set[str]]] = {
    "0 switches it off": (
        ZERO,
        {
            "*.num_workers", "HTTPReward.retries", "RewardWorkers.restarts", "*.best_of",
            "NoisePPO.attention_heads",
            "MMD.num_draws", "SetDistances.num_draws", "FrechetDistance.num_draws",
            "Duplicates.num_draws",
            "MaxIoU.num_draws",
            "DiffusionNFT.decay_after", "DiffusionNFT.kl_coef",
            "DiffusionNFT.max_decay", "DiffusionNFT.decay_rate", "DiffusionNFT.cut",
            "DiffusionDPO.cut", "*.start", "Dial.lora_scale", "Dial.cut",
            "HumanPreference.undo_seconds",
            "DDPO.kl_coef", "RewardGradient.kl_coef",
            "NoisePPO.beta", "PGRAFT.contrast", "PGRAFT.cut", "GRAFT.contrast", "EMA.decay",
            "InverseNoiseCorrection.data_noise", "Pretrain.condition_dropout",
            "GaussianMixturePipeline.residual_width", "EncoderArchitecture.num_octaves",
            "MuonAdamW.momentum", "MuonAdamW.weight_decay", "MuonAdamW.lr", "MuonAdamW.betas",
            "ProductProcess.weights", "GibbsProcess.weights",
            "Grammar.jitter", "TextToImagePipeline.guidance_scale",
            "TextToImagePipeline.max_table_gb",
            "Architecture.charge_scale", "Architecture.norm_constant",
        },
    ),
    "0 is the first": (ZERO, {"*.seed", "Coordinate.axis", "ComponentIndicator.components"}),
    "at least one row is held out of any data": (ZERO, {"*.val_fraction", "*.test_fraction"}),
    "0 is the end of its range": (
        ZERO,
        {
            "Brightness.target", "ClassCounts.counts", "Count.target", "Coverage.target",
            "GrammarRules.distance", "GrammarRules.flush", "GrammarRules.common",
            "SelfCheck.ratio_tolerance", "CosineVP.min_alpha", "FixedPoint.tolerance",
            "FixedPoint.memory", "AtomCounts.counts", "GaussianProcess.wide_above",
            "Threshold.ratio",
        },
    ),
    "a reward, or a place, may be any number": (
        ANY,
        {
            "*.means", "Quadratic.center", "*.invalid", "LogP.target", "TPSA.target",
            "RingCount.target", "AtomCount.target", "XTB.target", "Classical.r_max",
            "RewardGradient.reward_ceiling", "Threshold.minimum", "Architecture.logit_normal",
            "Copies.threshold", "Duplicates.threshold",
        },
    ),
    "a negative weight is a cost": (ANY, {"WeightedSum.weights"}),
}  # fmt: skip
"""What is taken beside proper values, by reason: "<class>.<argument>", "*" for every class."""

FIXED = {
    "GRAFT.cut", "Enumerated.max_atoms",
    "PromptData.num_train", "PromptData.num_val", "PromptData.num_test",
    "VLMJudge.scale", "GenEvalHF.threshold", "GenEvalHF.counting_threshold",
    "GenEvalHF.max_overlap", "GenEvalHF.position_threshold", "T2ICompBench.detector_threshold",
}  # fmt: skip
"""Arguments of a base class that the class sets itself; and those where 0 waits for weights."""


def cases() -> Iterator[tuple[Entry, type, str, Any]]:
    for entry in index():
        if entry.name in INTERNAL | LIGHTNINGS:
            continue
        cls = getattr(importlib.import_module(entry.module), entry.name)
        for name, (kind, default) in arguments(cls).items():
            if numeric(kind) and f"{entry.name}.{name}" not in FIXED:
                yield entry, cls, name, (kind, default)


def arguments(cls: type) -> dict[str, tuple[Any, Any]]:
    """Return type and default of all arguments, those that are handed on to a base included."""
    found: dict[str, tuple[Any, Any]] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base in (object, torch.nn.Module):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        hints = typing.get_type_hints(base.__init__)
        for p in parameters:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name in hints:
                found.setdefault(p.name, (hints[p.name], p.default))
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return found


def numeric(kind: Any) -> bool:
    if kind in (int, float):
        return True
    if typing.get_origin(kind) is typing.Literal:
        return False
    return any(map(numeric, typing.get_args(kind))) and typing.get_origin(kind) is not Callable


def formed(kind: Any, default: Any, value: float) -> Any:
    """Return the number in the form that the argument takes: alone, or first in a list or dict."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        known = [part for part in typing.get_args(kind) if numeric(part)]
        return formed(known[0], default, value)
    origin = typing.get_origin(kind)
    if origin is dict or origin is Mapping:
        key = typing.get_args(kind)[0]
        return {"a" if key is str else 1: value}
    if origin is not None and issubclass(origin, Sequence):
        value = float(value) if typing.get_args(kind)[0] is float else value
        if default is None or default is inspect.Parameter.empty or not len(default):
            return [value, value]
        first = [value, *default[0][1:]] if isinstance(default[0], Sequence) else value
        return [first, *default[1:]]
    return float(value) if kind is float else value


def make(cls: type, path: str, settings: Mapping[str, Any]) -> None:
    if not issubclass(cls, RewardFineTuner):
        cls(**{**NEEDED.get(path, {}), **settings})
        return
    own: dict[str, Any] = {"sampler": Sampler(4, eta=float(cls.__name__ == "DDPO"))}
    if cls.__name__ in ("NoisePPO", "InverseNoiseCorrection", "Pretrain"):
        own["lora"] = None
    if cls.__name__ == "RewardGradient":
        own["method"] = DRaFT()
    if cls.__name__ == "NoisePPO":
        own["maps"] = LowRank()
    cls(GaussianMixturePipeline(), Quadratic(), **{**own, **settings}).setup("fit")


CASES = list(cases())


def shown(cls: type) -> bool:
    """Return whether a class is a setting of a run, and needs no weights of the hub."""
    of_the_hub = issubclass(cls, Metric) and cls.__module__.startswith("domains.text_to_image")
    return issubclass(cls, Recorded) and not of_the_hub and cls.__name__ != "XTB"


def allowed(name: str, argument: str) -> list[float]:
    keys = {f"{name}.{argument}", f"*.{argument}"}
    return [value for values, known in ALLOWED.values() if keys & known for value in values]


@pytest.mark.parametrize("path", sorted({entry.path for entry, *_ in CASES}))
def test_numbers_that_mean_nothing_are_refused(path: str) -> None:
    if path.endswith(".XTB"):
        pytest.importorskip("tblite")
    for entry, cls, name, (kind, default) in CASES:
        if entry.path != path:
            continue
        taken = []
        for value in BAD:
            try:
                make(cls, path, {name: formed(kind, default, value)})
            except UsageError as error:
                named = error.argument if isinstance(error, BadArgument) else str(error)
                assert re.search(rf"\b{name}\b", named), (name, value, error)
            else:
                taken.append(value)
        assert taken == allowed(entry.name, name), name


@pytest.mark.parametrize("path", sorted({entry.path for entry, cls, *_ in CASES if shown(cls)}))
def test_every_argument_is_a_setting_of_the_run(path: str) -> None:
    """A resumed run lists what differs: nothing may be kept under another name alone."""
    module, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    named = settings(cls(**NEEDED.get(path, {})), "x")
    for argument in recorded(cls).keys() - {"cache"}:  # which classes give their base themselves
        key = f"x.{argument}"
        assert any(one == key or one.startswith(f"{key}.") for one in named), argument


def test_no_class_is_left_out() -> None:
    names = {entry.name for entry in index()}
    assert names >= INTERNAL | LIGHTNINGS
    assert len({entry.path for entry, *_ in CASES}) > 60
