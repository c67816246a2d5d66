r"""The molecule pipeline: noise on positions and types, under the number of atoms as a condition.

A continuous state [B, N, 3 + C] holds positions around their centre and one-hot types, scaled; a
mixed one positions beside masked integer types. Slots beyond a molecule's atoms are 0 (integer
types: K + 1) and the process leaves them alone.

A "gibbs" state is like a mixed one, but positions, as a block, and single types are noised in turn.
The network is told the level of the positions as the time; types show theirs by their masks. Its
process visits slots in their order, of which the network knows nothing: it learns from shuffled
data.

References:
    Equivariant Diffusion for Molecule Generation in 3D (Hoogeboom et al., 2022; EDM),
    https://arxiv.org/abs/2203.17003
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from domains.molecule import EMBEDDED
from domains.molecule.chemistry.batch import keys, sample_facts
from domains.molecule.chemistry.elements import ATOMIC_NUMBERS
from domains.molecule.networks import (
    EGNN,
    Architecture,
    MoleculeNetwork,
    Transformer,
    load_network,
)
from domains.molecule.networks.coupling import CoupledPointClouds
from domains.molecule.networks.edm import ARGS, EDM, load_edm
from domains.molecule.networks.preconditioning import Preconditioning
from domains.molecule.probes import probe_molecules
from domains.molecule.render import draw, figures_of, save_molecule
from domains.molecule.samples import EMPTY, Molecules
from domains.molecule.sources.single import read_molecule
from lit_rlft.core.checks import UsageError, at_least, one_of, require
from lit_rlft.core.figure import Figure
from lit_rlft.core.pipeline import Batch, Condition, Pipeline, check_columns, column
from lit_rlft.core.process import (
    GaussianProcess,
    GibbsProcess,
    MaskedProcess,
    Process,
    ProductProcess,
)
from lit_rlft.core.randomness import Generators, rand_like, randn_like
from lit_rlft.core.schedule import PolynomialVP, RectifiedFlow
from lit_rlft.core.state import State, cat, index
from lit_rlft.core.subspace import PointClouds
from lit_rlft.kit.compiled import SmallCompiled, compile_small
from lit_rlft.kit.network_folder import SaveDtype, check_one_given, load_pretrained, save_network

__all__ = ["EMBEDDED", "MoleculePipeline"]


_NETWORKS: dict[str, type[MoleculeNetwork]] = {"egnn": EGNN, "transformer": Transformer, "edm": EDM}
_SHARPNESS = 12.0  # of types: 1 - 3e-5 for exactly one-hot scores
_TYPE_STD = 0.4  # of a one-hot vector's numbers
# Of data with noise that was brought near them; measured on molecules of 12 atoms.
_POSITION_CORRELATION, _TYPE_CORRELATION = 0.72, 0.25
_MAX_NUMBERS = {"cpu": 2**23}  # of one tensor on pairs of atoms; bounds the denoiser's memory
_MAX_NUMBERS_ELSEWHERE = 2**26
_OFF_CENTRE = 1e-6  # Angstrom


class MoleculePipeline(Pipeline):
    """A flow or diffusion model that generates molecules of given numbers of atoms.

    Args:
        pretrained: A folder that `save` wrote, one of EDM's published models (args.pickle beside
            generative_model_ema.npy), or the name of an embedded model; None draws new weights of
            `architecture`, to pretrain them.
        architecture: Sizes of the new network; of a pretrained one its own.
        type_weight: Weight of the types' loss beside the positions', where they are integers.
        save_dtype: Precision in which the tuned model is written.
        compile: Have torch compile the denoiser's "blocks", each kind once, or the "whole" of it;
            "graphs" also records CUDA graphs, on a GPU alone. None compiles nothing.

    Raises:
        UsageError: `pretrained` is no such folder, or it is given along with an architecture.
    """

    lora_targets = (
        *("source", "target", "radial", "message", "heads", "node_in", "node_out"),  # EGNN
        "gate",  # EDM has it beside those of the EGNN
        *("qkv", "proj", "fc1", "fc2"),  # transformer
    )
    denoiser: MoleculeNetwork

    def __init__(
        self,
        pretrained: str | None = "small",
        *,
        architecture: Architecture | None = None,
        type_weight: float = 1.0,
        save_dtype: SaveDtype = "float32",
        compile: SmallCompiled | None = None,
    ) -> None:
        super().__init__()
        one_of(self, "save_dtype", get_args(SaveDtype), save_dtype)
        one_of(self, "compile", (*get_args(SmallCompiled), None), compile)
        check_one_given(pretrained, architecture)
        at_least(0, self, type_weight=type_weight)
        self.pretrained = pretrained
        if pretrained is None:
            architecture = architecture or Architecture()
            self.denoiser = _NETWORKS[architecture.network](architecture)
        else:
            self.denoiser = _load(pretrained)
        self.architecture = a = self.denoiser.architecture
        self.elements = a.symbols
        self.save_dtype = getattr(torch, save_dtype)
        self.compile_how = compile
        self.compile_denoiser(self.denoiser)
        self._field = _process(a)
        rule = f"1 where types are no integers, got {type_weight}"
        require(a.split or type_weight == 1, self, "type_weight", rule)
        self.process: Process = _joint(a, self._field, type_weight) if a.split else self._field

    def compile_denoiser(self, denoiser: nn.Module) -> None:
        compile_small(denoiser, self.compile_how)

    @property
    def name(self) -> str:
        return "molecule" if self.pretrained is None else Path(self.pretrained).name

    @property
    def device(self) -> torch.device:
        return self.denoiser.like.device

    @property
    def implicit_hydrogens(self) -> bool:
        """Whether atoms are heavy atoms only."""
        return self.architecture.implicit_hydrogens

    def encode(self, batch: Batch) -> Condition:
        """Encode numbers of atoms, each once.

        Raises:
            UsageError: The data have other elements than the model, or too many atoms for it.
        """
        self._check(batch)
        sizes, rows = torch.unique(_num_atoms(batch).cpu(), return_inverse=True)
        entries = [{"num_atoms": size} for size in sizes.tolist()]
        return Condition(entries, {"num_atoms": sizes.to(self.device)}, rows)

    def example(self) -> Condition:
        return self.encode({"num_atoms": torch.tensor([self.architecture.max_atoms])})

    def features(self, condition: Condition) -> Tensor:
        """Return the number of atoms, one-hot, [B, N + 1]."""
        size = self.architecture.max_atoms + 1
        return functional.one_hot(condition.table("num_atoms"), size).float()

    def blank(self, condition: Condition) -> State:
        """Return states with 1 in atoms' slots (integer types: 0) and the empty slots' values."""
        full, like = self._full(condition), self.denoiser.like
        channels = 3 if self.architecture.split else 3 + self.architecture.num_channels
        numbers = full.unsqueeze(-1).expand(-1, -1, channels).to(like.dtype)
        if not self.architecture.split:
            return numbers.contiguous()
        return {"position": numbers.contiguous(), "type": self._empty * (~full).long()}

    def predict(self, x_t: State, t: Tensor, condition: Condition) -> State:
        """Return predictions, computed for molecules of one size at a time.

        On a CPU no time is spent on empty slots; elsewhere the largest molecule decides.
        """
        groups = list(self._groups(condition))
        sizes = condition.table("num_atoms")
        parts = [
            self._predict(index(x_t, rows), t[rows], size, full=None if exact else sizes[rows])
            for rows, size, exact in groups
        ]
        if len(parts) == 1:
            return parts[0]
        order = torch.cat([rows for rows, *_ in groups]).argsort()
        return index(cat(parts), order)

    def decode(self, x_0: State, condition: Condition) -> Molecules:
        """Return molecules; the probabilities of continuous states carry their gradient."""
        full = self._full(condition).to(self._positions(x_0).device)
        positions = self._positions(x_0).float() * self.architecture.position_scale
        if isinstance(x_0, Tensor):
            scores = x_0[..., 3 : 3 + len(self.elements)].float() / self.architecture.type_scale
            types = scores.argmax(dim=-1).where(full, EMPTY)
            soft = (_SHARPNESS * scores).softmax(dim=-1) * full.unsqueeze(-1)
            return Molecules(
                positions, types, soft, self.elements, self.architecture.implicit_hydrogens
            )
        types = x_0["type"].clamp(max=len(self.elements) - 1).where(full, EMPTY)
        return Molecules.of(positions, types, self.elements, self.architecture.implicit_hydrogens)

    @property
    def augments(self) -> bool:
        return self.architecture.network == "transformer" or self.architecture.state == "gibbs"

    def augmented(self, batch: Batch, noise: Generators) -> Batch:
        """Return molecules for the transformer rotated, and those of a "gibbs" state shuffled."""
        if not self.augments:
            return batch
        self._check(batch)
        positions, types = column(batch, "positions"), column(batch, "types")
        if self.architecture.network == "transformer":
            quaternions = randn_like(positions.new_empty(len(positions), 4), noise)
            positions = positions @ _rotations(quaternions).to(positions)
        if self.architecture.state == "gibbs":
            keys = rand_like(positions.new_empty(types.shape), noise)
            order = keys.masked_fill(types == EMPTY, 2).argsort(dim=1)
            types = types.gather(1, order)
            positions = positions.gather(1, order.unsqueeze(-1).expand_as(positions))
        return {**batch, "positions": positions, "types": types}

    def states(self, batch: Batch) -> State:
        """Return x_0 of `batch["positions"]` [B, n, 3] in Angstrom and `batch["types"]` [B, n]."""
        self._check(batch)
        types = self._padded(column(batch, "types"), EMPTY).to(self.device)
        full = types != EMPTY
        positions = self._padded(batch["positions"], 0.0).to(self.denoiser.like)
        positions = _around_centre(positions / self.architecture.position_scale, full)
        if self.architecture.split:
            return {"position": positions, "type": types.where(full, self._empty)}
        scores = self.architecture.type_scale * functional.one_hot(
            types.clamp(min=0), len(self.elements)
        ).to(positions)
        parts = [positions, scores * full.unsqueeze(-1)]
        if self.architecture.charge_scale:
            numbers = positions.new_tensor([ATOMIC_NUMBERS[symbol] for symbol in self.elements])
            charges = self.architecture.charge_scale * numbers[types.clamp(min=0)] * full
            parts.append(charges.unsqueeze(-1))
        return torch.cat(parts, dim=-1)

    def condition_row(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        number, most = entry.get("num_atoms"), self.architecture.max_atoms
        if not isinstance(number, int) or not 1 <= number <= most:
            raise UsageError(f'the condition must be {{"num_atoms": n}}, n from 1 to {most}')
        return {"num_atoms": torch.tensor(number)}

    def read_sample(self, sample: Any, entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Return the molecule of an .sdf or .xyz file, or of symbols and positions."""
        row, most = self.condition_row(entry), self.architecture.max_atoms
        number = int(row["num_atoms"])
        return {**row, **read_molecule(sample, folder, self.elements, most, number)}

    def describe(self, entry: Mapping[str, Any]) -> str:
        """Return the number of atoms."""
        kind = "heavy atoms" if self.architecture.implicit_hydrogens else "atoms"
        return f"{entry['num_atoms']} {kind}"

    def render(self, samples: Any, condition: Condition) -> Tensor:
        return draw(samples)

    def figures(self, samples: Any, condition: Condition) -> list[Figure]:
        """Return each molecule's depiction as SVG, and its atoms and bonds in space."""
        return figures_of(samples)

    def probes(self) -> tuple[Molecules, Condition] | None:
        molecules = probe_molecules(
            self.elements,
            self.architecture.max_atoms,
            implicit_hydrogens=self.implicit_hydrogens,
        )
        if molecules is None:
            return None
        entries = [{"num_atoms": size} for size in molecules.num_atoms.tolist()]
        condition = Condition(entries, {}, torch.arange(len(molecules)))
        return molecules.to(self.device), condition

    def keys(self, samples: Any, condition: Condition) -> list[Hashable]:
        """Return canonical SMILES; molecules that are not valid are one class."""
        return keys(samples)

    def sample_facts(self, samples: Any) -> list[dict[str, Any]]:
        """Return each molecule's SMILES, its number of parts and whether it is stable."""
        return sample_facts(samples)

    def save(self, folder: Path) -> list[Path]:
        """Write architecture and weights, a LoRA merged, as `pretrained` reads them."""
        return save_network(self.denoiser, folder, self.save_dtype)

    def save_samples(
        self, samples: Any, condition: Condition, folder: Path, names: Sequence[str]
    ) -> list[Path]:
        """Write each molecule as SDF, SMILES and PNG."""
        return [
            save_molecule(samples.index(slice(i, i + 1)), folder / name)
            for i, name in enumerate(names)
        ]

    @property
    def _empty(self) -> int:
        """The integer type of an empty slot."""
        return len(self.elements) + 1

    def _predict(self, x_t: State, t: Tensor, size: int, full: Tensor | None) -> State:
        """Return predictions of molecules in the first `size` slots.

        Args:
            x_t: Their states.
            t: Their times.
            size: The most atoms of one.
            full: [B] numbers of atoms; None where all have `size`.
        """
        a = self.architecture
        if isinstance(self.process, GibbsProcess):
            t = self.process.levels(x_t, t)["position"]
        if full is not None:
            full = torch.arange(size, device=full.device) < full.unsqueeze(1)
        x = (x_t if isinstance(x_t, Tensor) else x_t["position"])[:, :size]
        pad = (0, 0, 0, a.max_atoms - size)
        if a.network == "edm":
            outputs = self.denoiser(x[..., :3], x[..., 3:], t, full)
            return functional.pad(torch.cat(outputs, dim=-1).to(x.dtype), pad)
        scale = Preconditioning(self._field, t)
        position = (a.position_std / a.position_scale, _POSITION_CORRELATION * a.coupled)
        types = (_TYPE_STD * a.type_scale, _TYPE_CORRELATION * a.coupled)
        inner = scale.input(x[..., :3], *position) * a.position_std
        scores = None if isinstance(x_t, Tensor) else x_t["type"][:, :size]
        if scores is None:
            scores = scale.input(x[..., 3:], *types)
        moves, scores = self.denoiser(inner, scores, t, full)
        moves = functional.pad(scale.output(x[..., :3], moves, *position), pad)
        if not isinstance(x_t, Tensor):
            return {"position": moves, "type": functional.pad(scores, pad)}
        scores = functional.pad(scale.output(x[..., 3:], scores, *types), pad)
        return torch.cat([moves, scores], dim=-1)

    def _groups(self, condition: Condition) -> Iterator[tuple[Tensor, int, bool]]:
        """Iterate over (rows, largest number of atoms, whether all have that many)."""
        # Known on the CPU: which slots are empty must not wait for the device.
        known = torch.tensor([entry["num_atoms"] for entry in condition.entries])
        sizes = known[condition.rows.cpu()]
        present = sorted(set(sizes.tolist()))
        exact = len(present) == 1 or self.device.type == "cpu"
        most = _MAX_NUMBERS.get(self.device.type, _MAX_NUMBERS_ELSEWHERE) // self.architecture.width
        for size in present if exact else present[-1:]:
            rows = (sizes == size).nonzero()[:, 0] if exact else torch.arange(len(sizes))
            for part in rows.split(max(1, most // size**2)):
                yield part.to(self.device), size, exact

    def _full(self, condition: Condition) -> Tensor:
        """Return which slots hold an atom, bool [B, N]."""
        slots = torch.arange(self.architecture.max_atoms, device=self.device)
        return slots < condition.table("num_atoms").unsqueeze(1)

    def _positions(self, state: State) -> Tensor:
        return state[..., :3] if isinstance(state, Tensor) else state["position"]

    def _padded(self, values: Tensor, fill: float) -> Tensor:
        """Return data with N slots; slots beyond are empty and may be cut off."""
        missing = self.architecture.max_atoms - values.shape[1]
        widths = (0, missing) if values.dim() == 2 else (0, 0, 0, missing)
        return functional.pad(values, widths, value=fill)

    def _check(self, batch: Batch) -> None:
        numbers = batch["most_atoms"] if "most_atoms" in batch else _num_atoms(batch)
        most, limit = int(numbers.max()), self.architecture.max_atoms
        if most > limit:
            key = "data.init_args.source.init_args" if "elements" in batch else "data.init_args"
            raise UsageError(
                f"the data have molecules of {most} atoms, the model {self.name!r} has "
                f"{limit} slots; leave them out ({key}.max_atoms {limit}), or train a model with "
                "more"
            )
        own = tuple(batch["elements"][0]) if "elements" in batch else self.elements
        if own != self.elements:
            raise UsageError(
                f"the data have the elements {list(own)}, the model {self.name!r} has "
                f"{list(self.elements)}; set elements of data.init_args.source to those, or "
                "pretrain a model of the data's: --pipeline.pretrained null "
                f"--pipeline.architecture.elements '[{', '.join(own)}]' "
                f"--pipeline.architecture.implicit_hydrogens {str('H' not in own).lower()}"
            )


def _process(a: Architecture) -> GaussianProcess:
    subspace = (CoupledPointClouds if a.coupled else PointClouds)(num_coordinates=3)
    if a.noise == "flow":
        # Clocks of Gibbs steps are shifted themselves.
        shift = 1.0 if a.state == "gibbs" else a.shift
        flow = RectifiedFlow(shift, a.logit_normal, knots=a.knots)
        return GaussianProcess(flow, "velocity", subspace)
    return GaussianProcess(PolynomialVP(), "epsilon", subspace)


def _joint(a: Architecture, positions: GaussianProcess, type_weight: float) -> Process:
    """Return the process of positions beside integer types."""
    types = MaskedProcess(len(a.symbols), padded=True, power=a.type_power)
    fields, weights = {"position": positions, "type": types}, {"type": type_weight}
    if a.state == "mixed":
        return ProductProcess(fields, weights)
    return GibbsProcess(
        fields,
        {"type": a.max_atoms},
        a.rounds,
        # So types are decided before the positions of their round.
        order=("position", "type"),
        shares={"position": a.position_share, "type": 1 - a.position_share},
        shift=a.shift if a.noise == "flow" else 1.0,
        weights=weights,
    )


def _num_atoms(batch: Batch) -> Tensor:
    if "num_atoms" in batch:
        return batch["num_atoms"]
    check_columns(batch, ["types"], "a molecule model, unless they have num_atoms,")
    return (batch["types"] != EMPTY).sum(dim=1)


def _around_centre(positions: Tensor, full: Tensor) -> Tensor:
    """Return positions whose mean over atoms is 0, and 0 in empty slots.

    An atom exactly in the centre would pass for an empty slot beside integer types: it is moved by
    a millionth of an Angstrom.
    """
    weights = full.unsqueeze(-1).to(positions)
    num = weights.sum(dim=1, keepdim=True).clamp(min=1)
    centred = (positions - (positions * weights).sum(dim=1, keepdim=True) / num) * weights
    hidden = full & ~(centred != 0).any(dim=-1) & (num[:, 0] > 1)
    moves = _OFF_CENTRE * hidden.unsqueeze(-1).to(positions)
    return (centred + moves - moves.sum(dim=1, keepdim=True) / num) * weights


def _rotations(quaternions: Tensor) -> Tensor:
    """Return rotations [B, 3, 3], uniform where the quaternions [B, 4] are normal."""
    q = functional.normalize(quaternions.double(), dim=1)
    w, x, y, z = q.unbind(dim=1)
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        *(2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        *(2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(rows, dim=1).view(-1, 3, 3)


def _load(pretrained: str) -> MoleculeNetwork:
    def read(source: str) -> MoleculeNetwork:
        folder = Path(source)
        return load_edm(folder) if (folder / ARGS).is_file() else load_network(folder, _NETWORKS)

    return load_pretrained(
        pretrained,
        EMBEDDED,
        read,
        kind="a molecule model",
        give="the name of an embedded model or a folder that save wrote",
    )
