"""`lit-rlft plan`: rehearses a round of a fit without weights, and says what it will take."""

import re
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from jsonargparse import Namespace
from lightning import LightningDataModule, Trainer
from torch import Tensor, nn

from lit_rlft.algorithms.base import RewardFineTuner
from lit_rlft.algorithms.reward_gradient import RewardGradient
from lit_rlft.callbacks import budget
from lit_rlft.cli.app import Command, own_callbacks, run
from lit_rlft.core.batch_size import AUTO
from lit_rlft.core.checks import UsageError
from lit_rlft.core.pipeline import Pipeline
from lit_rlft.core.reward import Metric, Reward
from lit_rlft.cost.counters import count_calls
from lit_rlft.cost.meter import Meter
from lit_rlft.cost.plan import GB, Part, Plan, report
from lit_rlft.cost.rehearsal import Ledger, backward, rehearsal, remembered
from lit_rlft.kit.weightless import without_weights
from lit_rlft.loop.experience import Experience
from lit_rlft.loop.precision import frozen_dtype
from lit_rlft.loop.updates import Passes, Update, accumulate, layout
from lit_rlft.loop.updates import plan as planned

__all__ = ["plan_words", "rehearse"]

_FLOPS, _SHARE, _MEMORY = 165e12, 0.3, 24 * GB
"""A card of 24 GB: an RTX 4090's peak in half precision, without sparsity."""
_LOW = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_MEASURED = 2
"""Microbatches of an update that are run: the second one meets the gradients of the first."""
_KEYS = {
    "pipeline": (
        "frozen_dtype",
        "checkpoint_denoiser",
        "guidance_gradient",
        "decode_batch_size",
        "tile_decoder",
    ),
    "model": ("gradient_checkpointing", "lora", "method", "sampling_batch_size"),
}


def plan_words(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: After the name of the command, as `fit` takes them, with files for configs and full
            paths for classes; and --memory, --flops, --share.

    Raises:
        SystemExit: Something is wrong that the user can change; the message is one sentence.
    """
    own = ArgumentParser("lit-rlft plan", add_help=False, allow_abbrev=False)
    for name in ("--memory", "--flops", "--share"):
        own.add_argument(name)  # texts: argparse has sentences of its own for what it converts
    card, rest = own.parse_known_args(words)
    memory = _memory() if card.memory is None else _bytes(card.memory)
    flops = _positive(card.flops or str(_FLOPS))
    share = _positive(card.share or str(_SHARE))

    class PlanCommand(Command):
        """The command fit, up to the point where it would begin."""

        called = "plan [--memory 24GB] [--flops 165e12] [--share 0.3]"
        about = "Say what a fit would take: memory by part, calls, hours; no weights are loaded."

        def before_instantiate_classes(self) -> None:
            """Make no folder."""

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            return _trainer(self.config_init[str(self.subcommand)].trainer)

        def _run_subcommand(self, subcommand: str) -> None:
            settings = self.config[subcommand]
            made = rehearse(self.model, self.datamodule, self.trainer, settings)
            print(report(made, memory, flops, share))

    with without_weights():
        run(["fit", *rest], PlanCommand)


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(G|GB|GiB)", text)
    if found is None:
        raise UsageError(f"--memory is {text!r}, but must be such as 24GB")
    return int(float(found.group(1)) * GB)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UsageError(f"--flops and --share must be numbers above 0, got {text!r}")
    return value


def _memory() -> int:
    """Return the bytes of the GPU that is there, or of a card of 24 GB."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return _MEMORY


def _trainer(given: Namespace) -> Trainer:
    """Return a trainer that is never run; it knows what the algorithms ask theirs."""
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    kept = {name: given[name] for name in ("max_epochs", "max_steps", "limit_train_batches")}
    ends = [one for one in own_callbacks(given) if isinstance(one, budget.Budget)]
    return Trainer(accelerator="cpu", devices=1, callbacks=[*ends], **quiet, **kept)


def rehearse(
    tuner: RewardFineTuner, data: LightningDataModule, trainer: Trainer, settings: Namespace
) -> Plan:
    """Run one round on the meta device and return what the fit will take on one device.

    Args:
        tuner: As it was made, not set up.
        data: Its first batch is taken.
        trainer: Says how long the fit is.
        settings: Of the command.

    Raises:
        UsageError: The settings cannot work together.
    """
    if type(tuner).on_train_start is not RewardFineTuner.on_train_start:
        raise UsageError(
            f"plan cannot rehearse {tuner.algorithm}, which prepares its data when a fit starts; "
            "run one round of the fit instead: --trainer.max_epochs 1 "
            "--trainer.limit_train_batches 1"
        )
    for size in tuner.sizes.automatic.values():
        size.go_on(1)  # as far as it comes down
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    batch = next(iter(loader))
    tuner.trainer = trainer
    tuner.meter = _Calls()
    with rehearsal(_LOW.get(str(settings.trainer["precision"]))) as ledger:
        tuner.setup("fit")
        tuner.pipeline.settle(_card_of(settings), _frozen(settings))
        tuner.to("meta")
        ledger.hold([*tuner.parameters(), *tuner.buffers()])
        _watch(tuner, ledger)
        return _Round(tuner, ledger).run(_moved(batch), trainer, len(loader), settings)


def _card_of(settings: Namespace) -> torch.device:
    """Return where a fit runs: on a card, unless its config says CPU."""
    return torch.device("cpu" if settings.trainer["accelerator"] == "cpu" else "cuda")


def _frozen(settings: Namespace) -> torch.dtype:
    """Return the precision of frozen weights where the pipeline leaves it to the run."""
    return frozen_dtype(_card_of(settings), settings.trainer["precision"])


def _moved(batch: Any) -> Any:
    """Return a batch with its tensors on the device."""
    return {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in batch.items()}


def _rounds(trainer: Trainer, batches: int, of_round: Mapping[str, int]) -> int:
    """Return the number of rounds of a fit, which ends with the first of its limits.

    Args:
        trainer: Has the limits. Without any it is one epoch.
        batches: Of an epoch.
        of_round: Updates, denoiser_calls and reward_calls of a round.
    """
    limit, epochs = trainer.limit_train_batches, trainer.max_epochs
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * (limit or 1.0))
    known = [*budget.limits(trainer)]
    if trainer.max_steps > 0:
        known.append(("updates", trainer.max_steps))
    ends = [-(-most // of_round[name]) for name, most in known if of_round[name]]
    if epochs is not None and epochs > 0:
        ends.append(batches * epochs)
    return min(ends, default=batches)


class _Calls(Meter):
    """Counts calls alone: operations are counted by the ledger."""

    def watch(self, pipeline: Pipeline, trained: nn.Module, reference: nn.Module) -> None:
        for network in (pipeline.denoiser, *reference.children()):
            count_calls(network, lambda: self.current)


def _watch(tuner: RewardFineTuner, ledger: Ledger) -> None:
    """Name the phases, and run repeated calls of networks once."""
    pipeline, reward = tuner.pipeline, tuner.reward
    _phase(pipeline, "decode", "decode", ledger)
    if not reward.differentiable and not any(True for _ in reward.parameters()):
        reward.forward = _made_up  # type: ignore[method-assign]
        pipeline.keys = lambda samples, condition: None  # type: ignore[method-assign]
    _phase(reward, "forward", "reward", ledger)
    for network in _networks(tuner):
        remembered(network, ledger, lambda network=network: _state(network))  # type: ignore[misc]


def _phase(owner: nn.Module, method: str, name: str, ledger: Ledger) -> None:
    run_it = getattr(owner, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        with ledger.phase(name):
            return run_it(*args, **kwargs)

    setattr(owner, method, timed)


def _made_up(samples: Any, condition: Any) -> Tensor:
    """Return values of a reward that takes no memory of the device."""
    return torch.linspace(0, 1, len(condition)).to("meta")


def _networks(tuner: RewardFineTuner) -> Iterator[nn.Module]:
    """Iterate over the networks whose calls are worth remembering."""
    owners = [tuner.pipeline, tuner.reference, tuner.reward]
    seen: set[int] = set()
    while owners:
        for network in owners.pop().children():
            if id(network) in seen:
                continue
            seen.add(id(network))
            if isinstance(network, Metric | Reward | nn.ModuleList | nn.ModuleDict):
                owners.append(network)
                continue
            yield network
            if network is not tuner.pipeline.denoiser:
                yield from (own for own in network.children() if id(own) not in seen)
                seen.update(id(own) for own in network.children())


def _state(network: nn.Module) -> tuple[bool, bool]:
    """Return what the cost of a call depends on beside its arguments."""
    adapted = (getattr(layer, "_disable_adapters", None) for layer in network.modules())
    return network.training, next((off for off in adapted if off is not None), False)


class _Round:
    """One round of a fit on the meta device.

    Args:
        tuner: Set up and on the device.
        ledger: Weighs it.
    """

    def __init__(self, tuner: RewardFineTuner, ledger: Ledger) -> None:
        self.tuner, self.ledger = tuner, ledger
        self.parts_run = self.terms_run = 0
        named = tuner.trainable().named_parameters()
        self.trained = [p for _, p in named if p.requires_grad]

    def run(self, batch: Any, trainer: Trainer, batches: int, settings: Namespace) -> Plan:
        """Return what it takes.

        Args:
            batch: On the device.
            trainer: Says how long the fit is.
            batches: Of an epoch.
            settings: Of the command.
        """
        tuner, ledger = self.tuner, self.ledger
        weights = list(_parts(tuner, {id(p) for p in self.trained}))
        updates = self._collect(batch)
        before = self._spent()
        with ledger.phase("update", whole=True):
            tuner.train()
            passes = Passes(backward, self.trained, tuner.sizes.microbatch.rows)
            for _ in _draws(tuner):
                self.parts_run = 0
                accumulate(updates[0], self._loss, passes)
        update = [now - then for now, then in zip(self._spent(), before, strict=True)]
        gradients = sum(_size(p.grad) for p in self.trained if p.grad is not None)
        optimizer = self._step()
        terms = sum(one.minibatch.num_terms for one in updates)
        scale = terms / max(self.terms_run, 1)
        totals = [int(b + scale * u) for b, u in zip(before, update, strict=True)]
        phases = {n: size + optimizer for n, size in ledger.peaks.items() if n != "other"}
        phases["optimiser step"] = ledger.peaks["optimiser step"]
        of_round = {"updates": len(updates), "denoiser_calls": totals[0], "reward_calls": totals[1]}
        size = tuner.sizes.microbatch
        most = updates[0].minibatch.num_terms
        micro = AUTO if size.automatic else min(most, size.rows or most)
        return Plan(
            parts=weights,
            optimizer=optimizer,
            gradients=gradients,
            phases=phases,
            rounds=_rounds(trainer, batches, of_round),
            denoiser_calls=totals[0],
            reward_calls=totals[1],
            flops=totals[2],
            settings=_settings(settings) | {"model.microbatch_size": micro},
        )

    def _collect(self, batch: Any) -> list[Update]:
        tuner = self.tuner
        tuner.eval()
        with self.ledger.phase("sampling"), torch.no_grad():
            condition = tuner.pipeline.encode(batch)
            experience = tuner.collect(batch, condition)
        layouts = [layout(experience, len(condition))]
        sizes = (tuner.num_epochs, tuner.minibatch_size, tuner.seed, 0)
        return planned(experience, layouts, 0, *sizes)

    def _loss(self, part: Experience, noise: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the losses of the first microbatches, and of further ones zeros."""
        if self.parts_run < _MEASURED:
            self.parts_run += 1
            self.terms_run += len(part)
            return self.tuner.loss(part, noise)
        least = min(self.trained, key=lambda parameter: parameter.numel())
        return (least.sum() * 0).expand(len(part)), {}

    def _step(self) -> int:
        """Take an optimiser's step; return the bytes of the optimiser's state."""
        optimizer = self.tuner.make_optimizer(self.trained)
        with self.ledger.phase("optimiser step", whole=True):
            if self.tuner.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.trained, self.tuner.max_grad_norm)
            optimizer.step()
        values = [v for state in optimizer.state.values() for v in state.values()]
        return sum(_size(v) for v in values if isinstance(v, Tensor) and v.is_meta)

    def _spent(self) -> tuple[int, int, int]:
        counts = self.tuner.meter.current
        return counts.denoiser_calls, counts.reward_calls, self.ledger.flops


def _draws(tuner: RewardFineTuner) -> Iterator[None]:
    """Iterate over updates whose mean is to be expected of those that are drawn by chance."""
    if not isinstance(tuner, RewardGradient):
        yield
        return
    for plan in tuner.method.extremes(tuner.sampler.num_steps):
        tuner.draw_plan = partial(copy, plan)  # type: ignore[method-assign]
        yield


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _parts(tuner: RewardFineTuner, trained: set[int]) -> Iterator[Part]:
    """Iterate over the weights by network, precision and whether they are trained."""
    own = [(name, child) for name, child in tuner.named_children() if name != "pipeline"]
    seen: set[int] = set()
    for name, network in [*tuner.pipeline.named_children(), *own]:
        groups: dict[tuple[str, bool], list[Tensor]] = defaultdict(list)
        for tensor in (*network.parameters(), *network.buffers()):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                dtype = str(tensor.dtype).removeprefix("torch.")
                groups[dtype, id(tensor) in trained].append(tensor)
        for (dtype, is_trained), tensors in groups.items():
            numbers = sum(t.numel() for t in tensors if isinstance(t, nn.Parameter))
            if numbers:
                size = sum(map(_size, tensors))
                yield Part(name.replace("_", " "), dtype, is_trained, numbers, size)


def _settings(config: Namespace) -> dict[str, Any]:
    """Return the settings that have to do with memory, those that there are."""
    found = {"trainer.precision": str(config.trainer["precision"])}
    for group, names in _KEYS.items():
        given = config[group].init_args
        found |= {f"{group}.{name}": given[name] for name in names if name in given}
    if found.get(key := "pipeline.frozen_dtype") == "auto":
        found[key] = str(_frozen(config)).removeprefix("torch.")
    return found
