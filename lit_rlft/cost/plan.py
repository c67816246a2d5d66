"""What a fit will take: parameters, memory by part, calls, operations; and what to change first."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_rlft.core.batch_size import AUTO

__all__ = ["GB", "Part", "Plan", "first_change", "report"]

GB = 2**30
"""Bytes of the GB on a card's label."""
_USABLE = 0.9
"""Share of a card's memory to plan with: CUDA itself and gaps between tensors take the rest."""
_COUNT, _STEP = 1e6, 1024


@dataclass(frozen=True)
class Part:
    """Weights of one network in one precision.

    Attributes:
        name: Of the network.
        dtype: Precision of its numbers.
        trained: Whether they are trained.
        numbers: How many there are.
        size: Their bytes.
    """

    name: str
    dtype: str
    trained: bool
    numbers: int
    size: int


@dataclass(frozen=True)
class Plan:
    """What a fit will take on one device.

    Attributes:
        parts: Weights and buffers.
        optimizer: Bytes of the optimiser's state.
        gradients: Bytes of the gradients.
        phases: Most bytes that live at once, by phase, weights included.
        rounds: Rounds of the fit.
        denoiser_calls: Rows that the denoiser is evaluated on in a round.
        reward_calls: Samples that are scored in a round.
        flops: Floating-point operations of a round, backward passes included.
        settings: Settings that have to do with memory, as they are, by key; those that the classes
            at hand have.
    """

    parts: Sequence[Part]
    optimizer: int
    gradients: int
    phases: Mapping[str, int]
    rounds: int
    denoiser_calls: int
    reward_calls: int
    flops: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def automatic(self) -> list[str]:
        """The batch sizes that are "auto", which were weighed at 1."""
        return [key for key, value in self.settings.items() if value == AUTO]

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return sum(part.size for part in self.parts)

    @property
    def standing(self) -> int:
        """Bytes that live all the time once training has begun."""
        return self.weights + self.optimizer

    @property
    def activations(self) -> int:
        """Bytes that an update keeps at its peak beside weights, optimiser and gradients."""
        return max(self.phases["update"] - self.standing - self.gradients, 0)

    @property
    def peak(self) -> int:
        """Most bytes that live at once."""
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        """The phase of that peak."""
        return max(self.phases, key=lambda name: self.phases[name])

    def numbers(self, *, trained: bool) -> int:
        """Return how many parameters are trained, or frozen."""
        return sum(part.numbers for part in self.parts if part.trained == trained)

    def hours(self, flops: float, share: float) -> float:
        """Return the hours of the fit.

        Args:
            flops: The card's peak, operations per second.
            share: What share of it the fit reaches.
        """
        return self.rounds * self.flops / (flops * share) / 3600


def report(plan: Plan, memory: int, flops: float, share: float) -> str:
    """Return a plan as text.

    Args:
        plan: The plan.
        memory: Bytes of the card.
        flops: The card's peak, operations per second.
        share: What share of it the fit reaches.
    """
    trained, frozen = (plan.numbers(trained=which) / _COUNT for which in (True, False))
    rows = [
        f"parameters: {trained:,.4g} M trained, {frozen:,.1f} M frozen",
        "",
        "memory (a GB is 2^30 bytes)",
        *_memory(plan),
        "",
        _verdict(plan, memory),
        *_automatic(plan, memory),
        "",
        f"calls of the fit, without validation ({plan.rounds:,} rounds)",
        f"  denoiser  {plan.rounds * plan.denoiser_calls:>14,} rows",
        f"  reward    {plan.rounds * plan.reward_calls:>14,} samples",
        f"operations: {plan.rounds * plan.flops:.3g} FLOP, {_hours(plan.hours(flops, share))} at "
        f"{share:.0%} of {flops / 1e12:g} TFLOP/s (--share, --flops)",
    ]
    return "\n".join(rows)


def _memory(plan: Plan) -> Iterator[str]:
    for part in plan.parts:
        kind = "trained" if part.trained else "frozen"
        what = f"{part.name}, {part.numbers / _COUNT:,.1f} M {kind}, {part.dtype}"
        yield _row(what, part.size)
    yield _row("optimiser", plan.optimizer)
    yield _row("gradients", plan.gradients)
    yield _row(f"activations of an update ({_bounds(plan.settings)})", plan.activations)
    yield "peaks, weights and optimiser included"
    for name, size in plan.phases.items():
        yield _row(name, size)


def _bounds(settings: Mapping[str, Any]) -> str:
    """Return what bounds the activations, in words."""
    micro = settings["model.microbatch_size"]
    on = [
        name
        for name, off in (
            ("pipeline.checkpoint_denoiser", False),
            ("model.gradient_checkpointing", None),
        )
        if settings.get(name, off) != off
    ]
    return f"microbatch {micro}, " + ("checkpointed" if on else "nothing checkpointed")


def _row(what: str, size: int) -> str:
    return f"  {what:<60}{_amount(size):>11}"


def _amount(size: float) -> str:
    """Return bytes in the largest unit that leaves something before the point."""
    for unit in ("B", "KB", "MB"):
        if size < _STEP:
            return f"{size:.3g} {unit}"
        size /= _STEP
    return f"{size:,.2f} GB"


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours * 60 >= 1 else "less than a minute"


def _verdict(plan: Plan, memory: int) -> str:
    """Return whether a plan fits into a memory, and what to change first where it does not."""
    peak, card = f"{_amount(plan.peak)} in {plan.peak_phase}", f"{memory / GB:g} GB"
    if plan.peak <= _USABLE * memory:
        return f"fits: {peak} of {card} (--memory), of which 10 % are left to CUDA"
    change = first_change(plan, int(_USABLE * memory))
    first = f"change first: {change}" if change else "no switch is left: take a larger card"
    return f"does not fit: {peak} of {card} (--memory), of which 10 % are left to CUDA\n{first}"


def _automatic(plan: Plan, memory: int) -> Iterator[str]:
    """Say what automatic batch sizes were weighed at, and about what a microbatch comes to."""
    if not plan.automatic:
        return
    yield f"weighed at 1, as far as auto comes down: {', '.join(plan.automatic)}"
    room = int(_USABLE * memory) - plan.standing - plan.gradients
    if "model.microbatch_size" in plan.automatic and room > plan.activations > 0:
        yield f"room for a microbatch of about {room // plan.activations:,}"


def first_change(plan: Plan, memory: int) -> str | None:
    """Return the option to change first where a plan does not fit; None where none is left.

    Args:
        plan: The plan.
        memory: Bytes that may be taken.
    """
    if plan.standing + plan.gradients > memory:
        return _for_weights(plan)
    if plan.peak_phase in ("update", "optimiser step"):
        return _for_update(plan, memory) or _for_weights(plan)
    room = memory - plan.standing
    if plan.peak_phase == "decode":
        taken = plan.phases["decode"] - plan.standing
        return (
            _fewer(plan, "pipeline.decode_batch_size", taken, room)
            or _switch(plan, "pipeline.tile_decoder", False, "true")
            or _fewer(plan, "model.sampling_batch_size", taken, room)
        )
    taken = plan.phases[plan.peak_phase] - plan.standing
    return _fewer(plan, "model.sampling_batch_size", taken, room) or _for_weights(plan)


def _for_weights(plan: Plan) -> str | None:
    return (
        _switch(plan, "pipeline.frozen_dtype", "float32", "bfloat16")
        if plan.settings.get("model.lora") is not None
        else _switch(plan, "model.lora", None, "8", ".rank")
    )


def _for_update(plan: Plan, memory: int) -> str | None:
    room = memory - plan.standing - plan.gradients
    walks = "model.method" in plan.settings  # back through the sampler
    recomputed = "steps" if walks else "blocks"
    return (
        _fewer(plan, "model.microbatch_size", plan.activations, room)
        or _switch(plan, "pipeline.checkpoint_denoiser", False, "true")
        or _switch(plan, "model.gradient_checkpointing", None, recomputed)
        or (_switch(plan, "pipeline.guidance_gradient", "both", "conditional") if walks else None)
        or _switch(plan, "trainer.precision", "32-true", "bf16-mixed")
    )


def _fewer(plan: Plan, key: str, taken: int, room: int) -> str | None:
    """Return the option with the number that fits, memory being about linear in it."""
    now = plan.settings.get(key)
    if now is None or now == AUTO or now <= 1:
        return None
    return f"--{key} {min(max(int(now * room / max(taken, 1)), 1), now - 1)}"


def _switch(plan: Plan, key: str, off: Any, on: str, below: str = "") -> str | None:
    there = key in plan.settings and plan.settings[key] == off
    return f"--{key}{below} {on}" if there else None
