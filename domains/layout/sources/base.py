"""The interface of sources of layouts."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

from domains.layout.page.classes import class_list
from domains.layout.sources.packed import LeaveOut, Packed, Page, pack
from lit_rlft.core.checks import UsageError, at_least, one_of
from lit_rlft.kit import sources
from lit_rlft.kit.bad_entries import BadEntry, Report
from lit_rlft.kit.files import listed, stamps

__all__ = ["LayoutFile", "Source"]

_VERSION = 2  # of the cached arrays


class Source(sources.Source[Packed]):
    """A collection of layouts.

    Attributes:
        classes: Names of the labels.
        max_elements: Most elements that a layout has; those with more are left out.
    """

    noun = "layouts"

    def __init__(self, classes: str | Sequence[str], max_elements: int) -> None:
        at_least(1, self, max_elements=max_elements)
        self.classes = class_list(classes)
        self.max_elements = max_elements

    def kind(self) -> str:
        return f"{self.max_elements} slots and the classes {list(self.classes)}"


class LayoutFile(Source, sources.CachedSource[Packed]):
    """Layouts of a file, kept as memory-mapped arrays once they were read.

    Args:
        path: The file or folder.
        max_elements: Layouts with more elements are left out; the literature takes 9, 20 or 25.
        classes: A known list or the names of the labels that are used; None takes `usual_classes`.
        strict: Stop at the first element or layout that cannot be used instead of leaving it out.
        leave_out: What an element costs that lies outside the canvas, has no size or a class that
            is not in the list: "elements" leaves it out, as the code of LayoutGAN++ and LayoutDM
            does; "layouts" leaves out its layout.
        cache_dir: Folder of the arrays; None takes `lit-rlft` in the user's cache folder.
    """

    packed = Packed
    names = ("boxes", "labels", "canvases")
    usual_classes: str = ""

    def __init__(
        self,
        path: str,
        max_elements: int = 20,
        classes: str | Sequence[str] | None = None,
        *,
        strict: bool = False,
        leave_out: LeaveOut = "elements",
        cache_dir: str | None = None,
    ) -> None:
        one_of(self, "leave_out", get_args(LeaveOut), leave_out)
        Source.__init__(self, classes or self.usual_classes, max_elements)
        sources.CachedSource.__init__(self, "layout", cache_dir)
        self.path, self.strict, self.leave_out = Path(path), strict, leave_out

    @abstractmethod
    def entries(self) -> Iterable[Page | BadEntry]:
        """Iterate over what is in the file."""

    @property
    def label(self) -> str:
        return str(self.path)

    def pack(self) -> tuple[Packed, Report]:
        return pack(
            self.entries(),
            self.classes,
            self.max_elements,
            source=self.label,
            strict=self.strict,
            leave_out=self.leave_out,
        )

    def identity(self) -> list[Any]:
        if not self.path.exists():
            raise UsageError(f"there is no {self.path}; give the file or folder of the data set")
        files = listed(self.path, "*.json") if self.path.is_dir() else [self.path]
        settings = [type(self).__name__, str(self.path.resolve()), self.classes, self.max_elements]
        return [_VERSION, *settings, self.strict, self.leave_out, stamps(files)]
