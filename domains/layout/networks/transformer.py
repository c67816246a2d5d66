r"""The denoiser of layouts: a transformer over slots, modulated by the time (adaLN-zero).

Each slot is a token: its noisy box and class, flags for what is given, and a learned embedding of
the slot's place. The blocks are `lit_rlft.kit.time_layers.TimedBlock`.

B: batch, N: slots, C: classes, D: width.

References:
    LayoutFlow (Guerreiro et al., 2024), https://arxiv.org/abs/2403.18187
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from domains.layout.page.classes import class_list
from lit_rlft.core.block_checkpointing import BlockCheckpointing
from lit_rlft.core.checks import UsageError, at_least, one_of, positive, require
from lit_rlft.core.state import State
from lit_rlft.kit.network_folder import load_weights, read_settings
from lit_rlft.kit.time_layers import NUM_FREQUENCIES, TimedBlock, frequencies, normed, zero

__all__ = ["Architecture", "LayoutTransformer", "load_network"]

NUM_FLAGS = 3  # place given, size given, class given


StateKind = Literal["continuous", "mixed", "gibbs"]
ClassNoise = Literal["mask", "uniform"]


@dataclass(frozen=True)
class Architecture:
    """Sizes of the network and the form of its layouts, as config.json holds them.

    Attributes:
        state: "continuous", boxes and scores of the classes in one tensor [B, N, 4 + C + 1];
            "mixed", boxes [B, N, 4] beside integer classes [B, N]; or "gibbs", the same with one
            element noised after the other (`GibbsProcess`).
        classes: A known class list, or names.
        num_slots: N, the most elements that a layout has.
        width: D.
        depth: Number of blocks.
        num_heads: Attention heads; divides `width`.
        mlp_ratio: Hidden units of a block's MLP, in widths.
        canvas: Width and height of the page in the units of exported files.
        rounds: How often each element of a "gibbs" state is visited.
        box_share: The part of a "gibbs" round that boxes take, in (0, 1); classes have the rest.
        shift: Shift of the levels of a "gibbs" state: below 1 more of its rounds lie near the data.
        class_noise: Whether noise hides the classes of a "gibbs" state by a "mask" or replaces
            them by "uniform" ones.
    """

    state: StateKind = "continuous"
    classes: str | Sequence[str] = "publaynet"
    num_slots: int = 12
    width: int = 64
    depth: int = 4
    num_heads: int = 4
    mlp_ratio: float = 4.0
    canvas: tuple[int, int] = (612, 792)
    rounds: int = 4
    box_share: float = 0.5
    shift: float = 1.0
    class_noise: ClassNoise = "mask"

    def __post_init__(self) -> None:
        one_of(self, "state", get_args(StateKind))
        one_of(self, "class_noise", get_args(ClassNoise))
        at_least(1, self, "num_slots", "width", "depth", "num_heads", "rounds")
        positive(self, "mlp_ratio", "canvas", "box_share", "shift")
        require(self.box_share < 1, self, "box_share", f"below 1, got {self.box_share}")
        if self.width % self.num_heads or self.width % 2:
            raise UsageError(
                f"architecture.width ({self.width}) must be even and a multiple of num_heads "
                f"({self.num_heads})"
            )

    @property
    def split(self) -> bool:
        """Whether classes are integers beside the boxes."""
        return self.state != "continuous"

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the labels."""
        return class_list(self.classes)


class LayoutTransformer(nn.Module, BlockCheckpointing):
    """Predicts the velocity of boxes, and the velocity of class scores or the classes' logits.

    The class after the last stands for an empty slot, in states with integer classes the one after
    it for a masked class.

    Args:
        architecture: Sizes of the layers.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = a = architecture
        num_classes = len(a.class_names) + 1
        self.box_in = nn.Linear(4, a.width)
        if a.split:
            self.class_in: nn.Module = nn.Embedding(num_classes + 1, a.width)
        else:
            self.class_in = nn.Linear(num_classes, a.width, bias=False)
        if a.state == "gibbs":
            self.levels_in = nn.Linear(4 * NUM_FREQUENCIES, a.width, bias=False)
        self.flags_in = nn.Linear(NUM_FLAGS, a.width, bias=False)
        self.slots = nn.Parameter(0.02 * torch.randn(a.num_slots, a.width))
        self.time_in = nn.Sequential(
            nn.Linear(2 * NUM_FREQUENCIES, a.width), nn.SiLU(), nn.Linear(a.width, a.width)
        )
        self.blocks = nn.ModuleList(
            TimedBlock(a.width, a.num_heads, round(a.mlp_ratio * a.width)) for _ in range(a.depth)
        )
        self.modulate = zero(nn.Linear(a.width, 2 * a.width))
        self.out = zero(nn.Linear(a.width, 4 + num_classes))

    def forward(self, x_t: State, t: Tensor, flags: Tensor, levels: Tensor | None = None) -> State:
        """Return the prediction, structured like a state except for logits [B, N, C + 1].

        Args:
            x_t: [B, N, 4 + C + 1], or "box" [B, N, 4] and "category" int64 [B, N] in [0, C + 1].
            t: [B] in [0, 1].
            flags: [B, N, 3], 1 where the place, the size, the class of an element is given.
            levels: [B, N, 2], noise levels of boxes and classes, of a "gibbs" state alone.
        """
        box, category = _parts(x_t)
        dtype = self.slots.dtype
        hidden = self.box_in(box.to(dtype)) + self.flags_in(flags.to(dtype)) + self.slots
        hidden = hidden + self.class_in(category.to(dtype) if category.dim() == 3 else category)
        if levels is not None:
            waves = frequencies(levels.flatten()).reshape(*levels.shape[:2], -1)
            hidden = hidden + self.levels_in(waves.to(dtype))
        time = functional.silu(self.time_in(frequencies(t).to(dtype)))
        for block in self.blocks:
            hidden = self.run(block, hidden, time)
        scale, shift = self.modulate(time).unsqueeze(1).chunk(2, dim=-1)
        prediction = self.out(normed(hidden) * (1 + scale) + shift)
        if isinstance(x_t, Tensor):
            return prediction
        return {"box": prediction[..., :4], "category": prediction[..., 4:]}


def load_network(folder: Path) -> LayoutTransformer:
    """Return the network that `save_network` wrote, in single precision."""
    settings = read_settings(folder)
    settings["canvas"] = tuple(settings["canvas"])
    with torch.device("meta"):
        network = LayoutTransformer(Architecture(**settings))
    return load_weights(network, folder)


def _parts(state: State) -> tuple[Tensor, Tensor]:
    if isinstance(state, Tensor):
        return state[..., :4], state[..., 4:]
    return state["box"], state["category"]
