"""LoRA adapters through peft, and the switch between the policy and its reference.

With an adapter the reference is the same network with the adapter disabled, never a second copy;
full fine-tuning keeps a frozen copy of the denoiser. Starting from a saved LoRA changes nothing
about this: the reference is the pretrained model without it.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from lit_rlft.core.checks import BadArgument, UsageError, at_least, one_of, positive
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.randomness import own_rng
from lit_rlft.core.state import State
from lit_rlft.loop.adapter import AdapterSwitch, Merge
from lit_rlft.loop.precision import in_single

__all__ = ["LoRA", "Reference", "adapt", "attach_lora", "completed", "continued"]

_ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
_PEFT_INNER = re.compile(r"\.(base_layer|lora_\w+)(\..*)?$")


_DEFAULT = 8
"""Rank and alpha of a new LoRA."""


LoRADtype = Literal["float32", "bfloat16"]
LoRAInit = Literal["uniform", "gaussian"]


@dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation W + (alpha / rank) B A of the denoiser's layers.

    Attributes:
        rank: Rank of the update; None takes that of `pretrained`, or else 8.
        alpha: Scale; the update is multiplied by alpha / rank. None takes that of `pretrained`, or
            else 8.
        targets: Name endings of the layers to adapt, such as `to_q` or `attn1.to_q`, or whole
            names; each has to fit a layer. None takes those of `pretrained`, or else the pipeline's
            own choice.
        pretrained: A saved LoRA to go on from, such as a run's folder `tuned`; what is given beside
            it has to agree with it. None starts from an update of zero. Either way the reference is
            the model without an adapter.
        dtype: Precision of the adapter and of its optimiser's state: "float32", or "bfloat16" at
            half the memory, where an update below 1/256 of a weight rounds to nothing.
        merge_for_sampling: Whether the update is part of the weights while samples are drawn whose
            log-probabilities nobody needs: in evaluations, `predict`, and rounds of iterative
            P-GRAFT, DiffusionNFT and Diffusion-DPO. It saves the adapter's own kernels. "auto"
            merges where layers compute in single precision; in fewer digits a weight loses small
            updates.
        init: How A is drawn, beside a B of zero: "uniform", as torch draws a layer; or "gaussian"
            with standard deviation 1 / rank, as the authors of Flow-GRPO and DiffusionNFT do. A
            `pretrained` one takes its place.

    References:
        LoRA (Hu et al., 2021), https://arxiv.org/abs/2106.09685
    """

    rank: int | None = None
    alpha: int | None = None
    targets: list[str] | None = None
    pretrained: str | None = None
    dtype: LoRADtype = "float32"
    merge_for_sampling: Merge = "auto"
    init: LoRAInit = "uniform"

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            if getattr(self, name) is None and self.pretrained is None:
                object.__setattr__(self, name, _DEFAULT)
        at_least(1, self, "rank")
        positive(self, "alpha")
        one_of(self, "init", get_args(LoRAInit))
        one_of(self, "dtype", get_args(LoRADtype))
        one_of(self, "merge_for_sampling", (True, False, "auto"))


def attach_lora(pipeline: Pipeline, lora: LoRA) -> None:
    """Freeze the denoiser and add a LoRA whose update starts at zero, or as it was saved.

    Raises:
        UsageError: There are no target names, no layer of the denoiser has one of them, one is of a
            kind without a LoRA, or the saved LoRA does not match the settings.
    """
    lora = completed(lora, pipeline)
    assert lora.rank is not None and lora.alpha is not None
    targets = list(lora.targets or pipeline.lora_targets)
    if not targets:
        raise UsageError(
            f"{type(pipeline).__name__} says in lora_targets of no layer that it gets a LoRA; name "
            "layers there or in model.init_args.lora.targets, or set lora to null for full "
            "fine-tuning"
        )
    if lora.targets:
        _check_targets(pipeline, targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=targets,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
    )
    trained = [p for p in pipeline.denoiser.parameters() if p.requires_grad]
    pipeline.denoiser.requires_grad_(False)
    try:
        _inject(pipeline, config, lora)
    except UsageError:  # as it was, for another try
        _detach(pipeline.denoiser)
        for parameter in trained:
            parameter.requires_grad_(True)
        raise


def _inject(pipeline: Pipeline, config: LoraConfig, lora: LoRA) -> None:
    try:
        inject_adapter_in_model(config, pipeline.denoiser)
    except ValueError as error:
        raise _no_layer(pipeline, str(config.target_modules)) from error
    for parameter in pipeline.denoiser.parameters():
        if parameter.requires_grad:  # a frozen network in half precision learns in single
            own = torch.promote_types(parameter.dtype, torch.float32)
            parameter.data = parameter.data.to(torch.bfloat16 if lora.dtype == "bfloat16" else own)
    if lora.pretrained is not None:
        _load(pipeline, lora, lora.pretrained)


def _detach(network: nn.Module) -> None:
    """Put the layers back that a LoRA was laid around."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, layer.get_base_layer())
    vars(network).pop("peft_config", None)


def _check_targets(pipeline: Pipeline, targets: list[str]) -> None:
    """Raise UsageError where a target fits no layer, which peft overlooks, or one without a LoRA.

    It comes before the layers are replaced: peft stops in the midst of them.
    """
    layers = dict(pipeline.denoiser.named_modules())
    for target in targets:
        fitting = [name for name in layers if _fits(name, target)]
        if not fitting:
            raise _no_layer(pipeline, repr(target))
        for name in fitting:
            if not isinstance(layers[name], _ADAPTABLE):
                raise UsageError(
                    f"model.init_args.lora.targets: {target!r} is the {type(layers[name]).__name__}"
                    f" {name}, which takes no LoRA; name linear layers or convolutions, such as "
                    f"{list(pipeline.lora_targets)}"
                )


def _fits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _no_layer(pipeline: Pipeline, targets: str) -> UsageError:
    return UsageError(
        f"no layer of the denoiser {type(pipeline.denoiser).__name__} is named {targets}; "
        "set model.init_args.lora.targets to layer names, or lora to null for full fine-tuning"
    )


def completed(lora: LoRA, pipeline: Pipeline) -> LoRA:
    """Return a LoRA's settings; what is not given comes from the file that it goes on from.

    Raises:
        UsageError: The file cannot be read, or has several ranks, or layers that the model has not.
    """
    path = lora.pretrained
    if path is None or None not in (lora.rank, lora.alpha, lora.targets):
        return lora
    weights, alpha = _read(pipeline, lora, path)
    rank = _rank_of(path, weights)
    return replace(
        lora,
        rank=rank if lora.rank is None else lora.rank,
        alpha=_whole_alpha(path, alpha, rank) if lora.alpha is None else lora.alpha,
        targets=_targets_of(pipeline, path, weights) if lora.targets is None else lora.targets,
    )


def continued(lora: LoRA, recorded: Mapping[str, Any]) -> LoRA:
    """Return a LoRA's settings where a checkpoint with its weights is loaded afterwards.

    The file that the run once started from is then not read; what is not given is recorded.

    Args:
        lora: The settings.
        recorded: Those of the checkpoint's run by key, such as "model.lora.rank".
    """
    rank, alpha = (recorded.get(f"model.lora.{name}") for name in ("rank", "alpha"))
    if lora.pretrained is None or rank is None or alpha is None:
        return lora
    key = "model.lora.targets"
    targets = [recorded[f"{key}.{i}"] for i in range(recorded.get(f"{key}.length") or 0)]
    return replace(
        lora,
        rank=rank if lora.rank is None else lora.rank,
        alpha=alpha if lora.alpha is None else lora.alpha,
        targets=(targets or None) if lora.targets is None else lora.targets,
        pretrained=None,
    )


def _read(pipeline: Pipeline, lora: LoRA, path: str) -> tuple[dict[str, Tensor], float | None]:
    try:
        return pipeline.read_lora(Path(path))
    except NotImplementedError as error:
        problem = f"must be null: {error}; continue a run with --ckpt_path"
        raise BadArgument(lora, "pretrained", problem) from error


def _rank_of(path: str, weights: Mapping[str, Tensor]) -> int:
    ranks = sorted({value.shape[0] for name, value in weights.items() if ".lora_A." in name})
    if len(ranks) != 1:
        raise UsageError(
            f"model.init_args.lora.pretrained: {path} has layers of the ranks "
            f"{', '.join(map(str, ranks))}; only LoRAs of one rank can be trained further"
        )
    return ranks[0]


def _whole_alpha(path: str, alpha: float | None, rank: int) -> int:
    """Return a file's alpha; without one it means a scale of 1, as in diffusers."""
    alpha = rank if alpha is None else alpha
    if alpha != int(alpha):
        raise UsageError(
            f"model.init_args.lora.pretrained: {path} has alpha {alpha:g}, which is no whole number"
        )
    return int(alpha)


def _targets_of(pipeline: Pipeline, path: str, weights: Mapping[str, Tensor]) -> list[str]:
    """Return targets that fit the layers of a file and no others."""
    names, wanted = _layers(pipeline), _adapted(weights)
    _check_layers(pipeline, path, wanted)
    for targets in (list(pipeline.lora_targets), sorted({_ending(name) for name in wanted})):
        if {name for name in names if any(_fits(name, target) for target in targets)} == wanted:
            return targets
    return sorted(wanted)


def _layers(pipeline: Pipeline) -> set[str]:
    """Return the names of a denoiser's layers, without those that peft puts into them."""
    return {_PEFT_INNER.sub("", name) for name, _ in pipeline.denoiser.named_modules()}


def _check_layers(pipeline: Pipeline, path: str, wanted: set[str]) -> None:
    """Raise UsageError where a LoRA adapts layers that a model does not have."""
    if absent := sorted(wanted - _layers(pipeline)):
        own = type(pipeline.denoiser).__name__
        raise UsageError(
            f"model.init_args.lora.pretrained: {path} is for another model: this {own} has no "
            f"layer {absent[0]}; give a LoRA of {pipeline.name!r}, or set it to null"
        )


def _adapted(weights: Mapping[str, Tensor]) -> set[str]:
    return {name.partition(".lora_")[0] for name in weights}


def _load(pipeline: Pipeline, lora: LoRA, path: str) -> None:
    """Load a saved LoRA into the one just attached; the two must match in every respect."""
    weights, alpha = _read(pipeline, lora, path)
    own = get_peft_model_state_dict(pipeline.denoiser)
    if odd := sorted(own.keys() ^ weights.keys()):
        raise _other_layers(pipeline, path, odd[0].partition(".lora_")[0], weights)
    rank = _rank_of(path, weights)
    if rank != lora.rank:
        raise _misfit(path, f"has rank {rank}, not {lora.rank}", "rank")
    whole = _whole_alpha(path, alpha, rank)
    if whole != lora.alpha:
        raise _misfit(path, f"has alpha {whole}, not {lora.alpha}", "alpha")
    if any(weights[name].shape != value.shape for name, value in own.items()):
        raise UsageError(
            f"model.init_args.lora.pretrained: {path} has layers of other sizes than this model; "
            "set pipeline.init_args to what it was tuned from"
        )
    set_peft_model_state_dict(pipeline.denoiser, weights)


def _other_layers(
    pipeline: Pipeline, path: str, layer: str, weights: Mapping[str, Tensor]
) -> UsageError:
    """Return the error of a LoRA of other layers, with the targets to set where there are any."""
    key = "model.init_args.lora"
    names, wanted = _layers(pipeline), _adapted(weights)
    _check_layers(pipeline, path, wanted)
    targets = sorted({_ending(name) for name in wanted})
    fitting = {name for name in names if any(_fits(name, target) for target in targets)}
    if fitting == wanted:
        what = f"adapts other layers than targets, such as {layer}"
        return UsageError(f"{key}.pretrained: {path} {what}; set {key}.targets to {targets}")
    return _misfit(path, f"adapts other layers than this model, such as {layer}", "targets")


def _ending(name: str) -> str:
    """Return a layer's own name, with that of its list where it is a number, such as to_out.0."""
    parts = name.split(".")
    own = next(i for i in range(1, len(parts) + 1) if i == len(parts) or not parts[-i].isdigit())
    return ".".join(parts[-own:])


def _misfit(path: str, what: str, setting: str) -> UsageError:
    key = "model.init_args.lora"
    return UsageError(f"{key}.pretrained: {path} {what}; set {key}.{setting} to the file's")


class Reference(nn.Module):
    """The frozen pretrained model: a pipeline with its adapter switched off, or a frozen copy.

    Args:
        pipeline: The pipeline that is tuned.
        adapted: Whether its denoiser carries an adapter; otherwise a frozen copy is made, unless
            the denoiser is frozen itself and so its own reference.
        merge: Whether the adapter is merged while samples are drawn.

    Attributes:
        adapter: Switches the adapter, if there is one.
    """

    def __init__(self, pipeline: Pipeline, *, adapted: bool, merge: Merge = False) -> None:
        super().__init__()
        layers = pipeline.denoiser.modules() if adapted else ()
        # In tuples, so that they are not registered as modules of this one.
        self._pipeline = (pipeline,)
        found = [layer for layer in layers if isinstance(layer, BaseTunerLayer)]
        self.adapter = AdapterSwitch(found, merge)
        moves = not adapted and any(p.requires_grad for p in pipeline.denoiser.parameters())
        self.frozen = copy.deepcopy(pipeline.denoiser).requires_grad_(False) if moves else None
        if self.frozen is not None:
            pipeline.compile_denoiser(self.frozen)

    def forward(self, x_t: State, t: Tensor, condition: Condition) -> State:
        """Return the prediction of the frozen pretrained model."""
        (pipeline,) = self._pipeline
        with self.active():
            return pipeline(x_t, t, condition)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the block the pipeline's denoiser is the reference."""
        (pipeline,) = self._pipeline
        if self.frozen is not None:
            tuned, pipeline.denoiser = pipeline.denoiser, self.frozen
            try:
                yield
            finally:
                pipeline.denoiser = tuned
            return
        with self.adapter.off():
            yield


def _check_unadapted(pipeline: Pipeline, lora: LoRA | None) -> None:
    """Raise UsageError where training would overwrite the LoRA of another tuner.

    What is trained beside a frozen denoiser, such as a prior, may find one there.
    """
    denoiser = pipeline.denoiser
    trained = lora is not None or any(p.requires_grad for p in denoiser.parameters())
    if trained and any(isinstance(layer, BaseTunerLayer) for layer in denoiser.modules()):
        raise UsageError(
            "this pipeline has the LoRA of another tuner, which a second one would overwrite; make "
            "a new pipeline, or fit that tuner again (lora.pretrained goes on from its saved LoRA)"
        )


def adapt(pipeline: Pipeline, lora: LoRA | None, seed: int, *, anew: bool = False) -> Reference:
    """Attach an adapter to a pipeline, or leave all of its denoiser to tune; return its reference.

    Args:
        pipeline: The pipeline.
        lora: The adapter; None for none.
        seed: Seed of the adapter's initial weights.
        anew: Whether the same tuner did so before and was then refused.

    Raises:
        UsageError: The adapter does not fit (`attach_lora`), or another tuner's is there.
    """
    if not anew:
        _check_unadapted(pipeline, lora)
    if lora is not None:
        with own_rng(seed):
            attach_lora(pipeline, lora)
    else:
        in_single(pipeline.denoiser)
    merge = lora is not None and lora.merge_for_sampling
    return Reference(pipeline, adapted=lora is not None, merge=merge)
