"""The interface of sources of molecules."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from domains.molecule.chemistry.elements import check_elements
from domains.molecule.sources.formats import Entry
from domains.molecule.sources.packed import Packed, pack
from lit_rlft.core.checks import UsageError, at_least
from lit_rlft.kit import sources
from lit_rlft.kit.bad_entries import Report
from lit_rlft.kit.files import listed, stamps

__all__ = ["MoleculePath", "Source"]


class Source(sources.CachedSource[Packed]):
    """A collection of molecules, kept as memory-mapped arrays.

    Attributes:
        version: Of the cached arrays. A class whose reader takes other molecules than before has a
            new one; the caches of all others, and the molecules that ship, stay in use.
        elements: Symbols of the types.
        max_atoms: Most atoms that a molecule has; those with more are left out.
    """

    version: ClassVar[int] = 1
    noun = "molecules"
    packed = Packed
    names = ("positions", "types", "numbers")

    def __init__(
        self,
        elements: Sequence[str],
        max_atoms: int,
        *,
        strict: bool = False,
        only_stable: bool = False,
        cache_dir: str | None = None,
    ) -> None:
        """Keep the settings.

        Args:
            elements: Symbols of the types; without "H" only heavy atoms are kept.
            max_atoms: Molecules with more atoms are left out.
            strict: Stop at the first molecule that cannot be used instead of leaving it out.
            only_stable: Leave out molecules that are not stable by the bond tables.
            cache_dir: Folder of the arrays; None takes `lit-rlft` in the user's cache folder.
        """
        super().__init__("molecule", cache_dir)
        at_least(1, self, max_atoms=max_atoms)
        self.elements, self.max_atoms = check_elements(elements), max_atoms
        self.strict, self.only_stable = strict, only_stable

    @property
    def implicit_hydrogens(self) -> bool:
        """Whether only heavy atoms are kept."""
        return "H" not in self.elements

    def kind(self) -> str:
        return f"at most {self.max_atoms} atoms of {list(self.elements)}"

    @abstractmethod
    def entries(self) -> Iterable[Entry]:
        """Iterate over the molecules, or what is wrong with them."""

    @abstractmethod
    def settings(self) -> list[Any]:
        """Return all that the molecules depend on besides elements, max_atoms and filters."""

    def pack(self) -> tuple[Packed, Report]:
        return pack(
            self.entries(),
            self.elements,
            self.max_atoms,
            source=self.label,
            strict=self.strict,
            only_stable=self.only_stable,
        )

    def identity(self) -> list[Any]:
        own = [type(self).__name__, self.elements, self.max_atoms, self.strict, self.only_stable]
        return [self.version, *own, *self.settings()]


class MoleculePath(Source):
    """Molecules of a file or folder; see `Source` for the settings."""

    def __init__(self, path: str, elements: Sequence[str], max_atoms: int, **source: Any) -> None:
        super().__init__(elements, max_atoms, **source)
        self.path = Path(path)

    @property
    def label(self) -> str:
        return str(self.path)

    def settings(self) -> list[Any]:
        if not self.path.exists():
            raise UsageError(f"there is no {self.path}; give the file or folder of the data set")
        files = listed(self.path, "*.xyz") if self.path.is_dir() else [self.path]
        return [str(self.path.resolve()), stamps(files)]
