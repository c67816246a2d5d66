"""A domain's interface: the pipeline of encoder, denoiser, process and decoder."""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_rlft.core.batch_size import BatchSize
from lit_rlft.core.checks import UsageError
from lit_rlft.core.condition import Condition
from lit_rlft.core.contract import check_answers
from lit_rlft.core.figure import Figure
from lit_rlft.core.process import Process
from lit_rlft.core.randomness import Generators
from lit_rlft.core.settings import Recorded
from lit_rlft.core.state import State, described

__all__ = [
    "PAIR",
    "Batch",
    "Condition",
    "Pipeline",
    "check_columns",
    "column",
    "pooled",
    "tokens_of",
]

PAIR = "pair"
"""Column of samples that are compared, a `kit.preferences.Pair` a row; no part of a condition."""

Batch = Mapping[str, Any]
"""What a DataModule yields: columns of equal length; `index` [B] numbers the data set's rows."""


def column(batch: Batch, name: str) -> Any:
    """Return a column of data samples.

    Raises:
        UsageError: The batch has conditions alone.
    """
    if name not in batch:
        raise UsageError(
            f"the data have no {name!r}, only {sorted(batch)}: conditions to generate under, not "
            "samples to learn from; give --data a DataModule of samples, as the domain's "
            "configs/experiments/*_pretrain.yaml has it"
        )
    return batch[name]


def check_columns(batch: Batch, names: Sequence[str], pipeline: str) -> None:
    """Raise UsageError for conditions that lack columns a pipeline encodes."""
    if absent := [name for name in names if name not in batch]:
        raise UsageError(
            f"the rows of the data have no {' and no '.join(map(repr, absent))}, only "
            f"{sorted(batch)}: {pipeline} draws for conditions that have; see --data"
        )


class Pipeline(Recorded, nn.Module, ABC):
    """A pretrained generative model: prior, transitions and decoder of one domain.

    Attributes:
        denoiser: The network that algorithms train.
        encoder: The network that encodes conditions, frozen unless pretraining; None without one.
        process: The noising process it was trained for.
        pretrained: Where the denoiser's weights are from, a folder or a name; None where it is new.
        lora_targets: Names of the denoiser's layers that get a LoRA unless a config says otherwise.
    """

    denoiser: nn.Module
    process: Process
    pretrained: str | None = None
    lora_targets: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.encoder: nn.Module | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_answers(cls, Pipeline)

    @property
    @abstractmethod
    def name(self) -> str:
        """A short name for reports, e.g. the model's folder."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where states live."""

    @abstractmethod
    def encode(self, batch: Batch) -> Condition:
        """Encode the conditions of a batch, each unique one once."""

    @abstractmethod
    def blank(self, condition: Condition) -> State:
        """Return an empty state: the shape, dtype and device of x_t for these samples."""

    @abstractmethod
    def predict(self, x_t: State, t: Tensor, condition: Condition) -> State:
        """Return the denoiser's own prediction, from which the native training loss is computed."""

    @abstractmethod
    def decode(self, x_0: State, condition: Condition) -> Any:
        """Return samples a person can look at (images: [B, 3, H, W] in [0, 1])."""

    @abstractmethod
    def render(self, samples: Any, condition: Condition) -> Tensor:
        """Return pictures of samples, [B, 3, H, W] in [0, 1]."""

    def figures(self, samples: Any, condition: Condition) -> list[Figure] | None:
        """Return a drawing of each sample for reports, or None where its picture is what it is.

        The default returns None.
        """
        return None

    def forward(self, x_t: State, t: Tensor, condition: Condition) -> State:
        """Return the prediction that is sampled from: `predict`, or a guided version of it."""
        return self.predict(x_t, t, condition)

    def settle(self, device: torch.device, dtype: torch.dtype) -> None:
        """Take on what a run decides: called once networks are adapted, before they move.

        The default does nothing.

        Args:
            device: Where the networks will run.
            dtype: Precision of frozen weights, where the settings leave it to the run.

        Raises:
            UsageError: A setting cannot work on that device.
        """

    def compile_denoiser(self, denoiser: nn.Module) -> None:
        """Compile the denoiser, or a copy of it, where the settings say so; nothing by default."""

    def batch_sizes(self) -> Mapping[str, BatchSize]:
        """Return the batch sizes of its own networks by key; a run keeps those that change."""
        return {}

    def example(self) -> Condition:
        """Return the condition of any one sample; it shows the shapes of states and features.

        The default fits domains whose batches need nothing but an index.
        """
        return self.encode({"index": torch.zeros(1, dtype=torch.int64)})

    def features(self, condition: Condition) -> Tensor:
        """Return a fixed-size encoding of each sample's condition, [B, F], for added networks.

        The default averages the condition's tables (`pooled`) and joins them; it is constant
        where there are none.
        """
        tables = [pooled(condition.tables[name]) for name in sorted(condition.tables)]
        if not tables:
            return torch.ones(len(condition), 1, device=self.device)
        table = torch.cat(tables, dim=1)
        return table[condition.rows_on(table.device)].to(self.device)

    def tokens(self, condition: Condition) -> Tensor:
        """Return an encoding of each sample's condition in parts, [B, L, F], averaging `features`.

        The default has one part, the features.
        """
        return self.features(condition).unsqueeze(1)

    def given(self, condition: Condition) -> State | None:
        """Return which entries of a state the condition fixes, bool [B, ...]; None where none are.

        Such an entry ends the sampler at its given value from any start.
        """
        return None

    def check_states(self) -> None:
        """Check, before training starts, that `states` can encode data.

        Raises:
            UsageError: It cannot.
        """
        if type(self).states is Pipeline.states:
            raise UsageError(
                f"{type(self).__name__} does not encode data samples; Pretrain cannot train it"
            )

    @property
    def augments(self) -> bool:
        """Whether `augmented` changes anything."""
        return False

    def augmented(self, batch: Batch, noise: Generators) -> Batch:
        """Return a batch whose data samples were moved at random, as rotations move molecules.

        Training on data calls it before `states`, which draws nothing. The default returns the
        batch.

        Args:
            batch: Data samples with their conditions.
            noise: One generator per row.
        """
        return batch

    def states(self, batch: Batch) -> State:
        """Return x_0 for the data in a batch.

        Raises:
            NotImplementedError: The domain's pipeline does not encode data.
            UsageError: The batch has conditions alone (`column`).
        """
        raise NotImplementedError(f"{type(self).__name__} does not encode data samples")

    def condition_row(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the columns that `encode` needs of a condition, given its record.

        Args:
            entry: As `Condition.entries` has it. The default takes its values as the columns.

        Raises:
            UsageError: The record lacks something.
        """
        return entry

    def read_sample(self, sample: Any, entry: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
        """Return the columns that `states` needs of one sample: what `save_samples` wrote.

        Args:
            sample: Its file, relative to `folder`, or itself as JSON has it.
            entry: The record of its condition.
            folder: Where files are looked for.

        Raises:
            UsageError: The sample cannot be read, or does not fit its condition or the model.
            NotImplementedError: The domain has no reader of samples.
        """
        raise NotImplementedError(f"{type(self).__name__} has no reader of samples")

    def describe(self, entry: Mapping[str, Any]) -> str:
        """Return the label of a sample's picture, given its condition's record."""
        return " ".join(map(str, entry.values()))

    def index_samples(self, samples: Any, rows: Tensor) -> Any:
        """Select decoded samples, a tensor or `Samples`.

        Raises:
            UsageError: They are neither.
        """
        known = hasattr(samples, "device") and callable(getattr(samples, "index", None))
        if not known and not isinstance(samples, Tensor):
            raise UsageError(
                f"{type(self).__name__}.decode returned {described(samples)}, among which nothing "
                "is selected; return a tensor or a lit_rlft.core.samples.Samples, or define "
                "index_samples(samples, rows)"
            )
        rows = rows.to(samples.device)
        return samples[rows] if isinstance(samples, Tensor) else samples.index(rows)

    def probes(self) -> tuple[Any, Condition] | None:
        """Return some decoded samples that have nothing in common; None where a domain has none.

        They show, before a run, whether a reward tells samples apart. Their conditions are records
        alone, without encodings, and never those of a run.
        """
        return None

    def keys(self, samples: Any, condition: Condition) -> list[Hashable] | None:
        """Return each sample's equivalence class for de-duplication, or None where none exists."""
        return None

    def sample_facts(self, samples: Any) -> Sequence[Mapping[str, Any]] | None:
        """Return what samples.jsonl says of each decoded sample, or None for nothing.

        Values are such as JSON can hold: a molecule's SMILES, whether it is stable.
        """
        return None

    def save(self, folder: Path) -> list[Path]:
        """Write the tuned model in the format of the domain's own tools; return what was written.

        The default writes nothing.
        """
        return []

    def hub_header(self, files: Sequence[str]) -> Mapping[str, Any]:
        """Return what the hub reads at the head of a tuned model's card; nothing by default.

        Args:
            files: Names of the files that were written.
        """
        return {}

    def tuned_facts(self, steps: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what a tuned model's lit_rlft.json says of it beside the run; nothing by default.

        Values are such as JSON can hold.

        Args:
            steps: `num_steps`, `eta` and `transition` of the sampler, as the model is measured.
        """
        return {}

    def usage(self, files: Sequence[str], facts: Mapping[str, Any]) -> str:
        """Return how to draw samples with a tuned model's files, in Markdown, for its card.

        Args:
            files: Their names.
            facts: `num_steps`, `eta` and `transition` of the sampler; `tuned_steps`, how many steps
                the tuned model runs, and `skipped_steps`, those before; what `tuned_facts` says.
        """
        return ""

    def read_lora(self, path: Path) -> tuple[dict[str, Tensor], float | None]:
        """Read a LoRA that `save` wrote: its weights by peft's names, and its alpha if known.

        Raises:
            UsageError: The file cannot be read.
            NotImplementedError: The domain has no format for a LoRA.
        """
        raise NotImplementedError(f"{type(self).__name__} has no file format for a LoRA")

    def save_samples(
        self, samples: Any, condition: Condition, folder: Path, names: Sequence[str]
    ) -> list[Path]:
        """Write each sample to `folder/<name>.<suffix>` in the domain's own format.

        Raises:
            NotImplementedError: The domain has no file format.
        """
        raise NotImplementedError(f"{type(self).__name__} has no file format for samples")


def pooled(encoding: Tensor) -> Tensor:
    """Average an encoding [B, ..., F] to [B, F]; numbers [B] become [B, 1]."""
    if encoding.dim() < 3:
        return encoding.float().unsqueeze(-1).flatten(1)
    return encoding.float().flatten(1, -2).mean(dim=1)


def tokens_of(encodings: Sequence[Tensor]) -> Tensor:
    """Join encodings [B, L, F] of the same tokens, and [B, F] of whole texts, to [B, L, sum of F].

    What encodes a whole text stands beside each token, so that their average is that of `pooled`.
    """
    length = max((e.shape[1] for e in encodings if e.dim() > 2), default=1)
    parts = [e.float() if e.dim() > 2 else pooled(e).unsqueeze(1) for e in encodings]
    return torch.cat([part.expand(-1, length, -1) for part in parts], dim=2)
