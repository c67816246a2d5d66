"""The layout pipeline: a flow over slots that obeys its conditions exactly.

Given values enter the network's input, and replace its prediction: for given numbers the
prediction points from x_t at them, and a given class has all of the probability. Every sampler
therefore arrives at the given values up to rounding, and `decode` returns them to the last bit.
Such entries have no loss (at s = 0), no gradient and no divergence from the reference.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from domains.layout import EMBEDDED
from domains.layout.conditions import as_given, condition_row
from domains.layout.networks.transformer import Architecture, LayoutTransformer, load_network
from domains.layout.probes import probe_pages
from domains.layout.render import draw, each, save_layout, to_svg
from domains.layout.samples import EMPTY, Layouts
from domains.layout.sources.single import read_layout
from lit_rlft.core.checks import UsageError, at_least, one_of, require
from lit_rlft.core.figure import Figure
from lit_rlft.core.pipeline import Batch, Condition, Pipeline, check_columns, column
from lit_rlft.core.process import (
    GaussianProcess,
    GibbsProcess,
    MaskedProcess,
    Process,
    ProductProcess,
    UniformProcess,
)
from lit_rlft.core.schedule import RectifiedFlow
from lit_rlft.core.state import State, expand_as, fields_of, tensor_of
from lit_rlft.kit.compiled import SmallCompiled, compile_small
from lit_rlft.kit.network_folder import SaveDtype, check_one_given, load_pretrained, save_network

__all__ = ["EMBEDDED", "LayoutPipeline"]


_SHARPNESS = 8.0  # of presence: 1 - 1e-7 at the scores of a full slot
_SMALLEST_T = 1e-6


class LayoutPipeline(Pipeline):
    """A transformer flow that generates layouts, given nothing, classes, sizes or elements.

    Box values in [0, 1] are states in [-1, 1]; a class is 1 among the scores of its slot and -1
    elsewhere. Empty slots have a class of their own, and boxes 0, the mean of the noise.

    Args:
        pretrained: A folder that `save` wrote or the name of an embedded model ("grammar",
            "grammar_mixed", "grammar_gibbs"); None draws new weights of `architecture`, to pretrain
            them.
        architecture: Sizes of the new network; of a pretrained one its own.
        category_weight: Weight of the classes' loss beside the boxes', where they are integers.
        save_dtype: Precision in which the tuned model is written.
        compile: Have torch compile the denoiser's "blocks", each kind once, or the "whole" of it;
            "graphs" also records CUDA graphs, on a GPU alone. None compiles nothing.

    Raises:
        UsageError: `pretrained` is no such folder, or it is given along with an architecture.
    """

    lora_targets = ("qkv", "proj", "fc1", "fc2")
    denoiser: LayoutTransformer

    def __init__(
        self,
        pretrained: str | None = "grammar",
        *,
        architecture: Architecture | None = None,
        category_weight: float = 1.0,
        save_dtype: SaveDtype = "float32",
        compile: SmallCompiled | None = None,
    ) -> None:
        super().__init__()
        one_of(self, "save_dtype", get_args(SaveDtype), save_dtype)
        one_of(self, "compile", (*get_args(SmallCompiled), None), compile)
        check_one_given(pretrained, architecture)
        at_least(0, self, category_weight=category_weight)
        self.pretrained = pretrained
        if pretrained is None:
            self.denoiser = LayoutTransformer(architecture or Architecture())
        else:
            self.denoiser = _load(pretrained)
        self.architecture = a = self.denoiser.architecture
        self.classes = a.class_names
        self.save_dtype = getattr(torch, save_dtype)
        self.compile_how = compile
        self.compile_denoiser(self.denoiser)
        rule = f"1 where classes are no integers, got {category_weight}"
        require(a.split or category_weight == 1, self, "category_weight", rule)
        self.process: Process = _process(a, category_weight)

    def compile_denoiser(self, denoiser: nn.Module) -> None:
        compile_small(denoiser, self.compile_how)

    @property
    def name(self) -> str:
        return "layout" if self.pretrained is None else Path(self.pretrained).name

    @property
    def device(self) -> torch.device:
        return self.denoiser.slots.device

    @property
    def _empty(self) -> int:
        """The class that stands for an empty slot."""
        return len(self.classes)

    def encode(self, batch: Batch) -> Condition:
        """Encode what is given of each layout, each unique condition once.

        Raises:
            UsageError: The data have other classes than the model, or another number of slots.
        """
        columns = ["boxes", "labels", "known_boxes", "known_labels", "task", "classes"]
        check_columns(batch, columns, "a layout model")
        self._check(batch)
        known_boxes, known_labels = batch["known_boxes"], batch["known_labels"]
        boxes = batch["boxes"].where(known_boxes, 0)
        labels = batch["labels"].where(known_labels, EMPTY)
        parts = (boxes, labels, known_boxes, known_labels)
        numbers = torch.cat([part.double().flatten(1) for part in parts], dim=1)
        _, rows = torch.unique(numbers, dim=0, return_inverse=True)
        # The first layout of each condition, in the batch's order.
        order = torch.arange(len(rows), device=rows.device)
        firsts = order.new_full((int(rows.max()) + 1,), len(rows))
        firsts.scatter_reduce_(0, rows, order, "amin")
        names = ("boxes", "labels", "known_boxes", "known_labels")
        tables = {
            name: part[firsts].to(self.device) for name, part in zip(names, parts, strict=True)
        }
        tasks = [batch["task"][i] for i in firsts.tolist()]
        entries = [
            self._entry(task, *(part[i] for part in parts))
            for task, i in zip(tasks, firsts.tolist(), strict=True)
        ]
        return Condition(entries=entries, tables=tables, rows=rows)

    def example(self) -> Condition:
        num_slots = self.architecture.num_slots
        nothing = torch.zeros(1, num_slots, dtype=torch.bool)
        return self.encode(
            {
                "boxes": torch.zeros(1, num_slots, 4),
                "labels": torch.full((1, num_slots), EMPTY),
                "known_boxes": nothing.unsqueeze(-1).expand(-1, -1, 4),
                "known_labels": nothing,
                "task": ["unconditional"],
                "classes": [self.classes],
            }
        )

    def features(self, condition: Condition) -> Tensor:
        """Return shares of slots by given class, means of given box values, [B, 1 + C + 1 + 8]."""
        known_boxes = condition.table("known_boxes").float()
        shares = self._one_hot(condition).mean(dim=1)
        boxes = (condition.table("boxes") * known_boxes).mean(dim=1)
        return torch.cat(
            [torch.ones_like(shares[:, :1]), shares, boxes, known_boxes.mean(dim=1)], dim=1
        )

    def blank(self, condition: Condition) -> State:
        shape, own = (len(condition), self.architecture.num_slots), self.denoiser.slots
        like: dict[str, Any] = {"dtype": own.dtype, "device": own.device}
        if not self.architecture.split:
            return torch.empty(*shape, 4 + len(self.classes) + 1, **like)
        category = torch.empty(shape, dtype=torch.int64, device=own.device)
        return {"box": torch.empty(*shape, 4, **like), "category": category}

    def predict(self, x_t: State, t: Tensor, condition: Condition) -> State:
        known = condition.table("known_boxes"), condition.table("known_labels")
        flags = torch.stack([known[0][..., :2].all(-1), known[0][..., 2:].all(-1), known[1]], -1)
        values = _to_state(condition.table("boxes"))
        if isinstance(x_t, Tensor):
            scores = 2 * self._one_hot(condition) - 1
            values = torch.cat([values, scores], dim=-1).to(x_t.dtype)
            fixed = tensor_of(self.given(condition))
            v = self.denoiser(values.where(fixed, x_t), t, flags)
            return _towards(values, x_t, t).where(fixed, v)
        x = fields_of(x_t)
        values, labels = values.to(x["box"].dtype), self._labels(condition)
        filled = {
            "box": values.where(known[0], x["box"]),
            "category": labels.where(known[1], x["category"]),
        }
        levels: Tensor | None = None
        level = t
        if isinstance(self.process, GibbsProcess):
            own = self.process.levels(x, t)
            levels, level = torch.stack([own["box"], own["category"]], dim=-1), own["box"]
        prediction = fields_of(self.denoiser(filled, t, flags, levels))
        certain = self._one_hot(condition).to(prediction["category"].dtype).log()
        return {
            "box": _towards(values, x["box"], level).where(known[0], prediction["box"]),
            "category": certain.where(known[1].unsqueeze(-1), prediction["category"]),
        }

    def given(self, condition: Condition) -> State:
        boxes, labels = condition.table("known_boxes"), condition.table("known_labels")
        if self.architecture.split:
            return {"box": boxes, "category": labels}
        scores = labels.unsqueeze(-1).expand(-1, -1, len(self.classes) + 1)
        return torch.cat([boxes, scores], dim=-1)

    def decode(self, x_0: State, condition: Condition) -> Layouts:
        """Return layouts; what the condition gives is returned exactly."""
        if isinstance(x_0, Tensor):
            box, scores = x_0[..., :4], x_0[..., 4:]
            labels = scores.argmax(dim=-1)
            margin = scores[..., : self._empty].amax(dim=-1) - scores[..., self._empty]
            presence = torch.sigmoid(_SHARPNESS * margin.float())
        else:
            box, labels = x_0["box"], x_0["category"]
            presence = (labels < self._empty).float()
        known = condition.table("known_labels")
        labels = condition.table("labels").where(known, labels.where(labels < self._empty, EMPTY))
        presence = (labels != EMPTY).to(presence).where(known, presence)
        given, boxes = condition.table("boxes"), (box.float() + 1) / 2
        boxes = torch.cat([boxes[..., :2], boxes[..., 2:].clamp(min=0)], dim=-1)
        boxes = given.where(condition.table("known_boxes"), boxes)
        return Layouts(boxes, labels, presence, self.classes)

    def states(self, batch: Batch) -> State:
        """Return x_0 of `batch["boxes"]` [B, N, 4] and `batch["labels"]` [B, N]."""
        self._check(batch)
        labels = batch["labels"].to(self.device)
        full = (labels != EMPTY).unsqueeze(-1)
        own = self.denoiser.slots
        boxes = column(batch, "boxes").to(own.device, own.dtype)
        boxes = _to_state(boxes).where(full, 0)
        category = labels.where(labels != EMPTY, self._empty)
        if self.architecture.split:
            return {"box": boxes, "category": category}
        scores = 2 * functional.one_hot(category, self._empty + 1) - 1
        return torch.cat([boxes, scores.to(boxes)], dim=-1)

    def condition_row(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        return condition_row(entry, self.classes, self.architecture.num_slots)

    def read_sample(self, sample: Any, entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """Return a layout; what its condition gives must be its first elements, in order."""
        row = self.condition_row(entry)
        own = read_layout(sample, folder, self.classes, self.architecture.num_slots)
        return as_given(own, row)

    def probes(self) -> tuple[Layouts, Condition] | None:
        pages = probe_pages(self.classes, self.architecture.num_slots)
        if pages is None:
            return None
        rows = torch.zeros(len(pages), dtype=torch.int64)
        entries = [{"task": "unconditional", "given": []}]
        return pages.to(self.device), Condition(entries, {}, rows)

    def render(self, samples: Any, condition: Condition) -> Tensor:
        return draw(samples, self.architecture.canvas)

    def figures(self, samples: Any, condition: Condition) -> list[Figure]:
        """Return each layout as SVG."""
        canvas = self.architecture.canvas
        return [Figure(to_svg(page, samples.classes, canvas)) for page in each(samples)]

    def describe(self, entry: Mapping[str, Any]) -> str:
        """Return the task, and the number of given elements."""
        count = len(entry["given"])
        return f"{entry['task']}, {count} given" if count else entry["task"]

    def save(self, folder: Path) -> list[Path]:
        """Write architecture and weights, a LoRA merged, as `pretrained` reads them."""
        return save_network(self.denoiser, folder, self.save_dtype)

    def save_samples(
        self, samples: Any, condition: Condition, folder: Path, names: Sequence[str]
    ) -> list[Path]:
        """Write each layout as JSON, which `JSONLayouts` reads, as SVG and as PNG."""
        return [
            save_layout(samples.index(slice(i, i + 1)), self.architecture.canvas, folder / name)
            for i, name in enumerate(names)
        ]

    def _check(self, batch: Batch) -> None:
        num_slots, own = batch["labels"].shape[1], tuple(batch["classes"][0])
        if own != self.classes:
            raise UsageError(
                f"the data have the classes {list(own)}, the model {self.name!r} has "
                f"{list(self.classes)}; use data of the model's classes, or pretrain a model of "
                "these: --pipeline.pretrained null --pipeline.architecture.classes "
                f"'[{', '.join(own)}]' --pipeline.architecture.num_slots {num_slots}"
            )
        if num_slots != self.architecture.num_slots:
            raise UsageError(
                f"the data have {num_slots} slots, the model {self.name!r} has "
                f"{self.architecture.num_slots}; set max_elements of data.init_args.source to that"
            )

    def _entry(
        self, task: str, boxes: Tensor, labels: Tensor, known_boxes: Tensor, known: Tensor
    ) -> dict[str, Any]:
        """Return a condition as a record: per given element its class and box, None if free."""
        given = []
        for i in (known & (labels != EMPTY)).nonzero().flatten().tolist():
            values = zip(boxes[i].tolist(), known_boxes[i].tolist(), strict=True)
            box = [round(value, 4) if fixed else None for value, fixed in values]
            given.append({"label": self.classes[labels[i]], "centre_and_size": box})
        return {"task": task, "given": given}

    def _labels(self, condition: Condition) -> Tensor:
        """Return the given classes as the network counts them, [B, N]; anything where free."""
        labels = condition.table("labels")
        return labels.where(labels != EMPTY, self._empty)

    def _one_hot(self, condition: Condition) -> Tensor:
        """Return the given classes, [B, N, C + 1]; zeros where free."""
        one_hot = functional.one_hot(self._labels(condition), self._empty + 1).float()
        return one_hot * condition.table("known_labels").unsqueeze(-1)


def _process(a: Architecture, category_weight: float) -> Process:
    boxes, num_classes = GaussianProcess(RectifiedFlow(), "velocity"), len(a.class_names) + 1
    weights = {"category": category_weight}
    if a.state == "continuous":
        return boxes
    if a.state == "mixed":
        return ProductProcess({"box": boxes, "category": MaskedProcess(num_classes)}, weights)
    masked = a.class_noise == "mask"
    return GibbsProcess(
        {
            "box": boxes,
            "category": MaskedProcess(num_classes) if masked else UniformProcess(num_classes),
        },
        dict.fromkeys(("box", "category"), a.num_slots),
        a.rounds,
        # So classes are decided before the boxes of their round.
        order=("box", "category"),
        shares={"box": a.box_share, "category": 1 - a.box_share},
        shift=a.shift,
        weights=weights,
    )


def _to_state(boxes: Tensor) -> Tensor:
    return 2 * boxes - 1


def _towards(values: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return the velocity eps - x_0 of a flow at x_t whose x_0 is `values`; t [B] or [B, N]."""
    return (x_t - values) / expand_as(t.clamp(min=_SMALLEST_T), x_t)


def _load(pretrained: str) -> LayoutTransformer:
    return load_pretrained(
        pretrained,
        EMBEDDED,
        lambda source: load_network(Path(source)),
        kind="a layout model",
        give="'grammar', 'grammar_mixed', 'grammar_gibbs' or a folder that save wrote",
    )
