"""G-Search: layer by layer, the fewest tokens that cost no quality (arXiv 2412.00556, CVPR 2025)."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from thresher.passes.tokens.search.outcome import Counts, Known, Outcome
from thresher.passes.tokens.search.space import Space
from thresher.passes.tokens.search.strategy import Strategy, Suggest


class GSearch(Strategy):
    """For l = 1..L the least r_l <= r_(l-1) whose quality does not drop, the earlier ones fixed.

    Later sites remove nothing while a site is searched.  Bisection finds the least count where
    quality falls with the count; where it does not, a count below which the next one drops.

    Args:
        space: what the method can realise.
        keeps: whether an outcome counts as "no drop".
    """

    name: ClassVar[str] = "g-search"
    summary: ClassVar[str] = "layer by layer, the fewest tokens that cost no quality"

    def __init__(self, space: Space, keeps: Callable[[Outcome], bool]) -> None:
        super().__init__(space)
        self.keeps = keeps

    def propose(self, suggest: Suggest, known: Known) -> Counts | None:
        return self._search(known)[0]

    def unfinished(self, known: Known) -> bool:
        return self._search(known)[0] is not None

    def chosen(self, known: Known) -> Counts:
        """The vector that the choices made so far amount to."""
        return self._search(known)[1]

    @property
    def most(self) -> int:
        """A bisection at each site, of at most the whole range."""
        widest = self.space.tokens - self.space.harshest[0]
        return self.space.sites * widest.bit_length()

    def _search(self, known: Known) -> tuple[Counts | None, Counts]:
        """The next vector that is not known, and the best one so far."""
        best, tokens = self.space.dense, self.space.tokens
        for site in range(self.space.sites):
            low, high = self.space.limits.least(tokens), tokens
            while low < high:
                middle = (low + high) // 2
                vector = best[:site] + (middle,) * (self.space.sites - site)
                if vector not in known:
                    return vector, best
                if self.keeps(known[vector]):
                    best, high = vector, middle
                else:
                    low = middle + 1
            tokens = high
        return None, best
