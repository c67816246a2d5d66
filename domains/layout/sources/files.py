"""Layouts of files: PubLayNet, RICO, and this project's own format."""

from collections.abc import Iterable, Sequence
from typing import Any

from domains.layout.sources.base import LayoutFile
from domains.layout.sources.formats import read_arrays, read_coco, read_json, read_rico
from domains.layout.sources.packed import Page
from lit_rlft.kit.bad_entries import BadEntry

__all__ = ["JSONLayouts", "PubLayNet", "RicoArrays", "RicoJSON"]


class PubLayNet(LayoutFile):
    """A COCO file: PubLayNet's train.json or val.json, or another with its own classes.

    References:
        PubLayNet: largest dataset ever for document layout analysis (Zhong et al., 2019),
        https://arxiv.org/abs/1908.07836
    """

    usual_classes = "publaynet"

    def entries(self) -> Iterable[Page | BadEntry]:
        return read_coco(self.path)


class RicoJSON(LayoutFile):
    """RICO's semantic annotations as distributed: a folder of view hierarchies.

    References:
        Learning Design Semantics for Mobile Apps (Liu et al., 2018),
        https://doi.org/10.1145/3242587.3242650
    """

    usual_classes = "rico"

    def entries(self) -> Iterable[Page | BadEntry]:
        return read_rico(self.path)


class RicoArrays(LayoutFile):
    """RICO as an .npz file of arrays (`domains.layout.sources.formats.read_arrays` says which).

    Label 0 is an empty slot; the classes are those of the labels 1, 2, ...
    """

    usual_classes = "rico"

    def entries(self) -> Iterable[Page | BadEntry]:
        return read_arrays(self.path, self.classes)


class JSONLayouts(LayoutFile):
    """This project's own format: a .jsonl file, or a folder that `predict` wrote.

    Args:
        path: The file or folder.
        classes: A known list or the names of the labels.
        max_elements: Layouts with more elements are left out.
        **file: `strict`, `leave_out` and `cache_dir` of a file.
    """

    def __init__(
        self,
        path: str,
        classes: str | Sequence[str] = "publaynet",
        max_elements: int = 12,
        **file: Any,
    ) -> None:
        super().__init__(path, max_elements, classes, **file)

    def entries(self) -> Iterable[Page | BadEntry]:
        return read_json(self.path)
