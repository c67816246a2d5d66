"""Layouts that are drawn: pages of the page grammar."""

import random

from domains.layout.sources.base import Source
from domains.layout.sources.grammar import CLASSES, draw_page
from domains.layout.sources.packed import Packed, Page, pack
from lit_rlft.core.checks import at_least

__all__ = ["Grammar"]


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
        super().__init__(CLASSES, max_elements)
        at_least(1, self, num_pages=num_pages)
        at_least(0, self, seed=seed, jitter=jitter)
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
        elements = draw_page(rng, max_elements=self.max_elements, jitter=self.jitter)
        return Page(f"page {number}", 1.0, 1.0, elements)
