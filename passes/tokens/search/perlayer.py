"""Free search: how much leaves at each layer is a parameter of its own."""

from __future__ import annotations

from itertools import accumulate
from typing import ClassVar

from thresher.passes.tokens.search.outcome import Counts, Known
from thresher.passes.tokens.search.space import Space
from thresher.passes.tokens.search.strategy import Budget, Strategy, Suggest

LEAST = 0.01  # of the largest weight: with a little removed everywhere, every budget can be met


class PerLayer(Strategy):
    """Layer l removes ``t w(l)`` of the tokens; the weights w are free, t is solved for the budget.

    Any non-increasing vector has such weights up to rounding, and every proposal meets the budget.
    """

    name: ClassVar[str] = "per-layer"
    summary: ClassVar[str] = "free counts at every layer, under a budget"

    def __init__(self, space: Space, budget: Budget) -> None:
        super().__init__(space)
        self.budget = budget

    def propose(self, suggest: Suggest, known: Known) -> Counts:
        weights = [suggest(f"weight {layer}", LEAST, 1.0) for layer in range(self.space.sites)]
        return self.solve(self.budget.pick(suggest), weights)

    def solve(self, budget: float, weights: list[float]) -> Counts:
        """The vector of these positive weights that meets the budget.

        Raises:
            VerdictError: the budget is below what the method reaches.
        """
        removed = list(accumulate(weights))

        def family(scale: float) -> Counts:
            return self.space.kept([max(0.0, 1 - scale * part) for part in removed])

        return family(self.space.gentlest(family, budget, 0.0, 1 / weights[0]))
