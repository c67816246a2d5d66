"""lit-rlft: fine-tune pretrained diffusion and flow models with rewards.

What a script needs is imported from here, and loaded when it is first asked for:

    from lit_rlft import PGRAFT, LoRA, Sampler
"""

from importlib import import_module

from lit_rlft.moved import register

__version__ = "0.2.0"

_PLACES = {
    "AdjointMatching": "algorithms.adjoint_matching",
    "DDPO": "algorithms.ddpo",
    "DiffusionDPO": "algorithms.dpo",
    "DiffusionNFT": "algorithms.nft",
    "GRAFT": "algorithms.graft",
    "PGRAFT": "algorithms.graft",
    "InverseNoiseCorrection": "algorithms.inverse_noise_correction",
    "NoisePPO": "algorithms.noise_ppo",
    "Pretrain": "algorithms.pretrain",
    "RewardGradient": "algorithms.reward_gradient",
    "RewardFineTuner": "algorithms.base",
    "AlignProp": "core.gradient_plan",
    "DRaFT": "core.gradient_plan",
    "DRaFTLV": "core.gradient_plan",
    "DRTune": "core.gradient_plan",
    "ReFL": "core.gradient_plan",
    "BatchAdvantage": "core.advantage",
    "GroupAdvantage": "core.advantage",
    "LeaveOneOutAdvantage": "core.advantage",
    "RunningAdvantage": "core.advantage",
    "BestOfM": "core.selection",
    "Classical": "core.selection",
    "Preference": "core.selection",
    "RandomK": "core.selection",
    "Threshold": "core.selection",
    "TopK": "core.selection",
    "Unique": "core.selection",
    "Metric": "core.reward",
    "Metrics": "core.reward",
    "Product": "core.reward",
    "Reward": "core.reward",
    "SetMetric": "core.reward",
    "WeightedSum": "core.reward",
    "Condition": "core.pipeline",
    "Pipeline": "core.pipeline",
    "Sampler": "core.sampling",
    "SlidingWindow": "core.window",
    "UsageError": "core.checks",
    "LoRA": "loop.reference",
    "RewardWorkers": "loop.side.rewards",
    "SplitData": "kit.data",
    "CostMeter": "callbacks.cost_meter",
    "EMA": "callbacks.ema",
    "LastCheckpoint": "callbacks.last_checkpoint",
    "RunFiles": "callbacks.run_files",
    "SamplePanel": "callbacks.sample_panel",
    "SelfCheck": "callbacks.self_check",
    "NoiseGenerator": "inference",
}
"""Module of each public name within this package; `__init__.pyi` tells type checkers the same."""

__all__ = [*_PLACES]

register({}, {"lit_rlft.observer": {"Observer": "Hooks"}})


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
