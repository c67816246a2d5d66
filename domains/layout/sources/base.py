"""Where layouts come from: the page grammar, PubLayNet, RICO, and files of one's own."""

import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from domains.layout.page.classes import class_list
from domains.layout.sources import grammar
from domains.layout.sources.formats import read_arrays, read_coco, read_json, read_rico
from domains.layout.sources.packed import Packed, Page, pack
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.bad_entries import BadEntry
from lit_rlft.kit.cache import cached_folder, open_arrays, save_arrays, user_cache

__all__ = ["Grammar", "JSONLayouts", "PubLayNet", "RicoArrays", "RicoJSON", "Source"]

_VERSION = 1  # of the cached arrays


class Source(ABC):
    """A collection of layouts.

    Attributes:
        classes: Names of the labels.
        max_elements: Most elements that a layout has; those with more are left out.
    """

    def __init__(self, classes: str | Sequence[str], max_elements: int) -> None:
        if max_elements < 1:
            raise UsageError(f"max_elements must be at least 1, got {max_elements}")
        self.classes = class_list(classes)
        self.max_elements = max_elements

    @abstractmethod
    def load(self) -> Packed:
        """Return the layouts.

        Raises:
            UsageError: There are none, or one is bad where none may be.
        """


class Grammar(Source):
    """Pages of the page grammar; page i is a function of `seed` and i.

    Args:
        num_pages: Number of pages.
        max_elements: Elements of a page at most.
        seed: Seed of the pages.
        jitter: Standard deviation of the noise on each edge, in fractions of the page.
    """

    def __init__(
        self,
        num_pages: int = 8192,
        max_elements: int = 12,
        seed: int = 0,
        jitter: float = 0.0008,
    ) -> None:
        super().__init__(grammar.CLASSES, max_elements)
        if num_pages < 1:
            raise UsageError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages, self.seed, self.jitter = num_pages, seed, jitter

    def load(self) -> Packed:
        packed, _ = pack(
            (self._page(i) for i in range(self.num_pages)),
            self.classes,
            self.max_elements,
            source="the page grammar",
            strict=True,
        )
        return packed

    def _page(self, number: int) -> Page:
        rng = random.Random(f"{self.seed},{number}")
        elements = grammar.draw_page(rng, max_elements=self.max_elements, jitter=self.jitter)
        return Page(f"page {number}", 1.0, 1.0, elements)


class _File(Source):
    """Layouts of a file, kept as memory-mapped arrays once they were read.

    Args:
        path: The file or folder.
        max_elements: Layouts with more elements are left out; the literature takes 9, 20 or 25.
        classes: A known list or the names of the labels that are used; None takes `usual_classes`.
        strict: Stop at the first layout that cannot be used instead of leaving it out.
        cache_dir: Folder of the arrays; None takes `lit-rlft` in the user's cache folder.
    """

    usual_classes: str = ""

    def __init__(
        self,
        path: str,
        max_elements: int = 20,
        classes: str | Sequence[str] | None = None,
        *,
        strict: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(classes or self.usual_classes, max_elements)
        self.path, self.strict = Path(path), strict
        self.cache_dir = user_cache("layout", cache_dir)

    @abstractmethod
    def _entries(self) -> Iterable[Page | BadEntry]:
        """Iterate over what is in the file."""

    def load(self) -> Packed:
        folder = cached_folder(self.cache_dir / self._key(), self._fill)
        return Packed(*open_arrays(folder, ("boxes", "labels", "canvases")))

    def _fill(self, folder: Path) -> None:
        """Read the file into a folder of arrays."""
        packed, report = pack(
            self._entries(),
            self.classes,
            self.max_elements,
            source=str(self.path),
            strict=self.strict,
        )
        save_arrays(folder, self.cache_dir / self._key(), vars(packed), report)

    def _key(self) -> str:
        """Name the arrays by all that they depend on: the file's age and size too."""
        if not self.path.exists():
            raise UsageError(f"there is no {self.path}; give the file or folder of the data set")
        files = sorted(self.path.glob("*.json")) if self.path.is_dir() else [self.path]
        stats = [(file.stat().st_mtime_ns, file.stat().st_size) for file in files]
        settings = [type(self).__name__, str(self.path.resolve()), self.classes, self.max_elements]
        text = json.dumps([_VERSION, *settings, self.strict, stats])
        return f"{self.path.stem}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


class PubLayNet(_File):
    """A COCO file: PubLayNet's train.json or val.json, or another with its own classes.

    References:
        PubLayNet: largest dataset ever for document layout analysis (Zhong et al., 2019),
        https://arxiv.org/abs/1908.07836
    """

    usual_classes = "publaynet"

    def _entries(self) -> Iterable[Page | BadEntry]:
        return read_coco(self.path)


class RicoJSON(_File):
    """RICO's semantic annotations as distributed: a folder of view hierarchies.

    References:
        Learning Design Semantics for Mobile Apps (Liu et al., 2018),
        https://doi.org/10.1145/3242587.3242650
    """

    usual_classes = "rico"

    def _entries(self) -> Iterable[Page | BadEntry]:
        return read_rico(self.path)


class RicoArrays(_File):
    """RICO as an .npz file of arrays (`domains.layout.sources.formats.read_arrays` says which).

    Label 0 is an empty slot; the classes are those of the labels 1, 2, ...
    """

    usual_classes = "rico"

    def _entries(self) -> Iterable[Page | BadEntry]:
        return read_arrays(self.path, self.classes)


class JSONLayouts(_File):
    """This project's own format: a .jsonl file, or a folder that `predict` wrote.

    Args:
        path: The file or folder.
        classes: A known list or the names of the labels.
        max_elements: Layouts with more elements are left out.
        **file: `strict` and `cache_dir` of a file.
    """

    def __init__(
        self,
        path: str,
        classes: str | Sequence[str] = "publaynet",
        max_elements: int = 12,
        **file: Any,
    ) -> None:
        super().__init__(path, max_elements, classes, **file)

    def _entries(self) -> Iterable[Page | BadEntry]:
        return read_json(self.path)
