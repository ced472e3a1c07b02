"""P-Sigmoid: the keep rate is a falling sigmoid of depth (arXiv 2412.00556, CVPR 2025)."""

from __future__ import annotations

import math
from typing import ClassVar

from thresher.passes.tokens.search.outcome import Counts, Known
from thresher.passes.tokens.search.space import Space
from thresher.passes.tokens.search.strategy import Budget, Strategy, Suggest

STEEPEST = 5.0  # a: at the next layer the sigmoid has then fallen from 0.5 to below 0.01
FLATTEST = 0.05
SATURATED = 40.0  # a (l - b) beyond which a sigmoid is 0 or 1 to double precision


class PSigmoid(Strategy):
    """``r(l) = lo + (hi - lo) sigma(-a (l - b))`` over the layers l = 0..L-1.

    ``a``, ``lo`` and ``hi`` are free; ``b`` is solved so that the budget is met, never exceeded.  The
    paper does not print its parameters; these are ours.  With c the constant rate that meets the
    budget, ``lo <= c <= hi`` makes every choice of the three feasible.
    """

    name: ClassVar[str] = "p-sigmoid"
    summary: ClassVar[str] = "keep rates that fall as a sigmoid of depth, under a budget"

    def __init__(self, space: Space, budget: Budget) -> None:
        super().__init__(space)
        self.budget = budget

    def propose(self, suggest: Suggest, known: Known) -> Counts:
        budget = self.budget.pick(suggest)
        level = self.space.gentlest(lambda c: self.space.kept([c] * self.space.sites), budget, 1, 0)
        slope = suggest("slope", FLATTEST, STEEPEST, log=True)
        low = suggest("low", 0.0, 1.0) * level  # relative, so that the ranges never change
        high = level + suggest("high", 0.0, 1.0) * (1 - level)
        return self.solve(budget, slope, low, high)

    def solve(self, budget: float, slope: float, low: float, high: float) -> Counts:
        """The vector of one sigmoid whose middle b meets the budget.

        Raises:
            VerdictError: ``low`` at every layer still costs more.
        """

        def family(middle: float) -> Counts:
            depths = range(self.space.sites)
            return self.space.kept(
                [low + (high - low) * sigma(-slope * (depth - middle)) for depth in depths]
            )

        reach = SATURATED / slope
        return family(self.space.gentlest(family, budget, self.space.sites + reach, -reach))


def sigma(x: float) -> float:
    """The logistic function, without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else 1 - 1 / (1 + math.exp(x))
