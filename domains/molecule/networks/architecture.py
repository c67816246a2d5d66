"""Sizes of the domain's networks, and the form of their molecules."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from domains.molecule.chemistry.elements import EXPLICIT, HEAVY, check_elements
from lit_rlft.core.checks import UsageError, at_least, finite, one_of, positive, require

__all__ = ["Architecture"]


StateKind = Literal["continuous", "mixed", "gibbs"]
Network = Literal["egnn", "transformer", "edm"]
Noise = Literal["flow", "polynomial"]


@dataclass(frozen=True)
class Architecture:
    """Sizes of the network and the form of its molecules, as config.json holds them.

    Attributes:
        state: "continuous", positions and scores of the types in one tensor [B, N, 3 + K];
            "mixed", positions [B, N, 3] beside integer types [B, N]; or "gibbs", the same with
            positions and single types noised in turn (`GibbsProcess`).
        network: "egnn", "transformer" (trained on random rotations) or "edm" (EDM's EGNN).
        noise: "flow" (rectified flow, the network predicts velocities) or "polynomial" (EDM's
            variance-preserving schedule, the network predicts noise).
        implicit_hydrogens: Whether atoms are heavy atoms only, hydrogens filled in by valence.
        elements: Symbols of the types; unless given H, C, N, O, F, without H where it is implicit.
        max_atoms: N, the most atoms that a molecule has.
        width: W.
        depth: Number of layers.
        num_heads: Attention heads of the transformer; divides `width`.
        position_scale: Angstrom per unit of the state.
        position_std: Spread of the data's coordinates in Angstrom, by which inputs and outputs are
            scaled to unit size; it is not a limit.
        type_scale: Height of the one-hot types in the state: the lower, the later types are decided
            (EDM: 1 / 4).
        charge_scale: Height of the atomic number per unit in a channel of its own, as EDM has it
            (1 / 10); 0 has none.
        type_power: How late integer types are decided (`MaskedProcess`).
        rounds: How often each element of a "gibbs" state is visited.
        position_share: The part of a "gibbs" round that positions take, in (0, 1); types have the
            rest.
        logit_normal: Mean and standard deviation of the logits of a flow's training times, before
            the shift; None has uniform times.
        shift: Time shift of the flow, of training times and of the sampler's grid: below 1 more of
            both lie near the data, where bond lengths are decided.
        knots: Points (share of the steps done, time) that the sampler's times run through, in place
            of `shift`, as `RectifiedFlow` has them. Found by measuring samples of a trained model.
        coupled: Whether a flow is trained on noise that was reordered and rotated to be near the
            data (see `coupling`): better with few deterministic steps, but worse with samplers that
            add noise (eta above 0), which assume that noise and data are independent.
        num_sublayers: EDM's "inv_sublayers", updates of features per layer.
        tanh: EDM's bound on moves of positions.
        attention: EDM's gate on messages.
        norm_constant: EDM's length added to distances.
        normalization_factor: EDM's divisor of sums over atoms.
        sin_embedding: EDM's sines of distances instead of squares.
    """

    state: StateKind = "continuous"
    network: Network = "egnn"
    noise: Noise = "flow"
    implicit_hydrogens: bool = False
    elements: Sequence[str] | None = None
    max_atoms: int = 20
    width: int = 64
    depth: int = 4
    num_heads: int = 4
    position_scale: float = 1.0
    position_std: float = 1.4
    type_scale: float = 0.5
    charge_scale: float = 0.0
    type_power: float = 3.0
    logit_normal: tuple[float, float] | None = None
    shift: float = 1.0
    knots: Sequence[tuple[float, float]] | None = None
    coupled: bool = False
    num_sublayers: int = 1
    tanh: bool = True
    attention: bool = True
    norm_constant: float = 1.0
    normalization_factor: float = 1.0
    sin_embedding: bool = False
    rounds: int = 4
    position_share: float = 0.5

    def __post_init__(self) -> None:
        at_least(1, self, "max_atoms", "width", "depth", "num_heads", "num_sublayers", "rounds")
        positive(self, "position_scale", "position_std", "type_scale", "type_power", "shift")
        positive(self, "normalization_factor", "position_share")
        require(
            self.position_share < 1, self, "position_share", f"below 1, got {self.position_share}"
        )
        at_least(0, self, "charge_scale", "norm_constant")
        finite(self, "logit_normal")
        one_of(self, "state", get_args(StateKind))
        one_of(self, "network", get_args(Network))
        one_of(self, "noise", get_args(Noise))
        if self.network == "transformer" and self.width % (2 * self.num_heads):
            raise UsageError(
                f"architecture.width ({self.width}) must be even and a multiple of num_heads "
                f"({self.num_heads})"
            )
        if self.coupled and self.noise != "flow":
            raise UsageError("architecture.coupled is for flows; set noise to flow, or it to false")
        if self.knots is not None and (self.noise != "flow" or self.state == "gibbs"):
            raise UsageError(
                "architecture.knots are the times of a flow's sampler; set noise to flow and state "
                "to continuous or mixed, or leave them out"
            )
        if self.network == "edm" and self.split:
            raise UsageError("architecture.network edm has continuous states; set state to that")
        if self.implicit_hydrogens == ("H" in check_elements(self.symbols)):
            raise UsageError(
                f"architecture.elements is {list(self.symbols)}, but implicit_hydrogens "
                f"{str(self.implicit_hydrogens).lower()}: hydrogens are either atoms of the model "
                "or implied; change one of the two"
            )

    @property
    def split(self) -> bool:
        """Whether types are integers beside the positions."""
        return self.state != "continuous"

    @property
    def symbols(self) -> tuple[str, ...]:
        """The elements of the types."""
        if self.elements is not None:
            return tuple(self.elements)
        return HEAVY if self.implicit_hydrogens else EXPLICIT

    @property
    def num_channels(self) -> int:
        """C, the numbers of an atom in a continuous state beside its position."""
        return len(self.symbols) + (self.charge_scale > 0)
