"""Measurements of whole sets of pictures in CLIP's features: CMMD, duplicates, copies.

FID, KID, precision and recall are `domains.image.metrics.SetDistances`, which takes these pictures.

References:
    Rethinking FID: Towards a Better Evaluation Metric for Image Generation (Jayasumana et al.,
    2024; CMMD), https://arxiv.org/abs/2401.09603
    Diffusion Art or Digital Forgery? (Somepalli et al., 2023; copies of training pictures),
    https://arxiv.org/abs/2212.03860
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm.auto import tqdm

from domains.text_to_image.networks.clip import CLIPEncoder
from domains.text_to_image.samples import check_pictures, prompts_of
from lit_rlft.core.checks import at_least, within
from lit_rlft.core.guard import LARGE_RISE, Guard
from lit_rlft.core.pipeline import Condition, Pipeline
from lit_rlft.core.reward import LeftOut, Metric, SetMetric
from lit_rlft.kit.bad_entries import Report, usable
from lit_rlft.kit.distinct import text_number
from lit_rlft.kit.leave_out import mmd_left_out
from lit_rlft.kit.picture_folder import Reading, picture_files
from lit_rlft.kit.set_metrics import SourceDistances
from lit_rlft.kit.statistics import gaussian, mmd, similarity

__all__ = ["CMMD", "Copies", "Duplicates"]

_PAPERS_CLIP = "openai/clip-vit-large-patch14-336"
_BANDWIDTH, _SCALE = 10.0, 1000.0
_CHUNK = 64  # files in flight
_ROWS = 1024  # of a matrix of pairs at a time


class CMMD(SourceDistances["_Known"]):
    """Distance of all pictures of an evaluation from a folder's: 0 for equal distributions.

    1,000 times the squared maximum mean discrepancy of CLIP's unit vectors under a Gaussian kernel
    of bandwidth 10, as the paper has it. Unbiased: its mean does not depend on the number of
    pictures n; the paper's program has a bias that falls as 1 / n. Standard errors have a closed
    form.

    Args:
        folder: The real pictures, nested or not.
        pretrained: The CLIP; unless given that of the paper. Numbers of another one do not compare.
        max_pictures: Compare with so many of them, drawn at random once; None takes all.

    Raises:
        UsageError: `pretrained` is no CLIP; or, before the run, the folder has no pictures.
    """

    def __init__(
        self, folder: str, pretrained: str = _PAPERS_CLIP, max_pictures: int | None = 10_000
    ) -> None:
        super().__init__()
        at_least(2, self, max_pictures=max_pictures)
        self.known_pictures = _Folder(Path(folder), max_pictures)
        self.encoder = CLIPEncoder(pretrained)

    def check(self, pipeline: Pipeline) -> None:
        self.known_pictures.paths()

    @torch.no_grad()
    def features(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return CLIP's unit vectors, {"embeddings": [B, D]}."""
        return {"embeddings": self.encoder.embed_pictures(check_pictures(samples, condition))}

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return {"cmmd"}, NaN for fewer than two pictures."""
        own, known = features["embeddings"], self.real
        distance = mmd(known.embeddings, own, gaussian(_BANDWIDTH), known.similarity)
        return {"cmmd": _SCALE * distance}

    def left_out(self, features: Mapping[str, Tensor], pairs: Tensor) -> dict[str, LeftOut]:
        """Return {"cmmd"}."""
        own, known, kernel = features["embeddings"], self.real, gaussian(_BANDWIDTH)
        left = mmd_left_out(known.embeddings, own, kernel, known.similarity, pairs)
        return {"cmmd": LeftOut(_SCALE * left.each, _SCALE * left.both)}

    def guards(self) -> dict[str, Guard]:
        """Return {"cmmd"}, of which a rise by a fifth is a sign."""
        return {"cmmd": LARGE_RISE}

    def read(self) -> "_Known":
        embeddings = self.known_pictures.embedded(self.encoder)
        return _Known(embeddings, similarity(embeddings, gaussian(_BANDWIDTH)))


@dataclass(frozen=True)
class _Known:
    """Unit vectors of the real pictures, [n, D], and their mean kernel."""

    embeddings: Tensor
    similarity: float


class Copies(Metric):
    """How near each picture comes to the nearest one of a folder, such as the training data.

    "nearest": the largest cosine of CLIP's picture embeddings; "copied": whether it is above the
    threshold. CLIP tells what a picture shows better than whether it is the same one: look at the
    pictures before you call them copies.

    Args:
        folder: The known pictures, nested or not.
        pretrained: The CLIP: a folder, a hub id or "shapes_clip".
        threshold: Cosine from which a picture counts as a copy.
        max_pictures: Look at so many of the known ones, drawn at random once; None takes all.

    Raises:
        BadArgument: `threshold` is no cosine.
        UsageError: `pretrained` is no CLIP; or, before the run, the folder has no pictures.
    """

    def __init__(
        self,
        folder: str,
        pretrained: str = _PAPERS_CLIP,
        threshold: float = 0.95,
        max_pictures: int | None = None,
    ) -> None:
        super().__init__()
        at_least(1, self, max_pictures=max_pictures)
        within(-1, 1, self, threshold=threshold)
        self.known_pictures, self.threshold = _Folder(Path(folder), max_pictures), threshold
        self.encoder = CLIPEncoder(pretrained)
        self._known: Tensor | None = None

    def check(self, pipeline: Pipeline) -> None:
        self.known_pictures.paths()

    @torch.no_grad()
    def evaluate(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return {"nearest", "copied"}, [B] each."""
        own = self.encoder.embed_pictures(check_pictures(samples, condition))
        if self._known is None:
            self._known = self.known_pictures.embedded(self.encoder)
        nearest = (own @ self._known.to(own).T).amax(dim=1)
        return {"nearest": nearest, "copied": (nearest >= self.threshold).to(nearest.dtype)}

    def guards(self) -> dict[str, Guard]:
        """Return {"copied"}: any rise beyond chance is a sign."""
        return {"copied": Guard("higher")}


class Duplicates(SetMetric):
    """Share of pictures that look like one of another prompt: "duplicates", in [0, 1].

    Two are alike where the cosine of CLIP's picture embeddings is above the threshold. A model that
    answers every prompt with its reward's favourite picture has 1. The number grows with the number
    of pictures: compare equally many.

    Args:
        pretrained: The CLIP: a folder, a hub id or "shapes_clip".
        threshold: Cosine from which two pictures are alike.
        num_draws: Groups of pictures left out in turn for the standard errors of a test.

    Raises:
        BadArgument: `threshold` is no cosine.
        UsageError: `pretrained` is no CLIP.
    """

    def __init__(
        self, pretrained: str = _PAPERS_CLIP, threshold: float = 0.95, num_draws: int = 20
    ) -> None:
        super().__init__()
        at_least(0, self, num_draws=num_draws)
        within(-1, 1, self, threshold=threshold)
        self.threshold, self.num_draws = threshold, num_draws
        self.encoder = CLIPEncoder(pretrained)

    @torch.no_grad()
    def features(self, samples: Any, condition: Condition) -> dict[str, Tensor]:
        """Return CLIP's unit vectors [B, D], and a number per prompt, int64 [B]."""
        embeddings = self.encoder.embed_pictures(check_pictures(samples, condition))
        numbers = [text_number(prompt) for prompt in prompts_of(condition)]
        return {"embeddings": embeddings, "prompt": torch.tensor(numbers)}

    def compare(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return {"duplicates"}, NaN where there is one prompt alone."""
        embeddings, prompt = features["embeddings"], features["prompt"]
        if len(prompt.unique()) < 2:  # type: ignore[no-untyped-call]
            return {"duplicates": float("nan")}
        alike = 0
        for start in range(0, len(prompt), _ROWS):
            rows = slice(start, start + _ROWS)
            cosine = embeddings[rows] @ embeddings.T
            other = prompt[rows].unsqueeze(1) != prompt
            alike += int(((cosine >= self.threshold) & other).any(dim=1).sum())
        return {"duplicates": alike / len(prompt)}

    def guards(self) -> dict[str, Guard]:
        """Return {"duplicates"}: any rise beyond chance is a sign."""
        return {"duplicates": Guard("higher")}


@dataclass(frozen=True)
class _Folder:
    """A folder's pictures, of which so many at most are drawn at random."""

    folder: Path
    max_pictures: int | None

    def paths(self) -> list[Path]:
        """Return the files; UsageError where there are none."""
        paths = picture_files(self.folder)
        order = np.random.default_rng(0).permutation(len(paths))[: self.max_pictures]
        return [paths[i] for i in sorted(order)]

    def embedded(self, encoder: CLIPEncoder) -> Tensor:
        """Return CLIP's unit vectors of the pictures, cut to squares, [n, D], on the CPU."""
        side = encoder.clip.config.vision_config.image_size
        reading, paths = Reading(side, side, resample="bicubic"), self.paths()
        report, parts = Report(str(self.folder), "pictures"), []
        bar = tqdm(total=len(paths), desc=f"Reading {self.folder.name}", leave=False, delay=2)
        with ThreadPoolExecutor(4) as pool, bar, torch.no_grad():
            for start in range(0, len(paths), _CHUNK):
                chunk = paths[start : start + _CHUNK]
                read = usable(pool.map(reading.read, chunk), lambda _: None, report)
                pixels = [torch.from_numpy(one) for one, _ in read]
                if pixels:
                    parts.append(encoder.embed_pictures(torch.stack(pixels).float() / 255).cpu())
                bar.update(len(chunk))
        report.check()
        rank_zero_info(str(report))
        return torch.cat(parts)
