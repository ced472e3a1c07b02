"""The vectors of kept counts that a method can realise on a model, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from thresher.compiler.analysis.axes import hint_of
from thresher.compiler.analysis.cost import cost_model
from thresher.compiler.analysis.finder import find_sites
from thresher.compiler.errors import RefusedError, VerdictError
from thresher.compiler.program import Program
from thresher.passes.tokens.budget import BISECTIONS, Count, Limits, resolve
from thresher.passes.tokens.methods import TokenReduction
from thresher.passes.tokens.search.outcome import Counts

Family = Callable[[float], Counts]


@dataclass(frozen=True)
class Space:
    """Non-increasing counts behind the ``sites`` sites of a model of ``tokens`` tokens.

    ``share`` gives the multiply-accumulates of a vector, relative to the dense model's.  A
    ``dynamic`` model has ``tokens`` as traced; its vectors become shares of what comes.
    """

    tokens: int
    sites: int
    limits: Limits
    share: Callable[[Sequence[int]], float]
    dynamic: bool = False

    @property
    def dense(self) -> Counts:
        """The vector that removes nothing."""
        return (self.tokens,) * self.sites

    @property
    def harshest(self) -> Counts:
        """The least that the method can leave everywhere."""
        return self.clamp([0] * self.sites)

    def clamp(self, wanted: Sequence[int]) -> Counts:
        """What the method leaves when so many tokens are asked for behind each site."""
        schedule = tuple(Count("exact", n) for n in wanted)
        return tuple(resolve(schedule, self.tokens, self.limits))

    def kept(self, rates: Sequence[float]) -> Counts:
        """Counts of keep rates in [0, 1], each a share of the unprotected input tokens."""
        fixed = self.limits.protected + self.limits.extra
        return self.clamp([fixed + int(rate * (self.tokens - fixed)) for rate in rates])

    def option(self, counts: Counts) -> str:
        """The method's option that asks for a vector, as ``option=value``.

        Shares are rounded down to thousandths: ``ceil`` then gives back the counts exactly for up to
        a thousand tokens.
        """
        if not self.dynamic:
            return f"counts={list(counts)}"
        prefix, fixed = self.limits.protected, self.limits.protected + self.limits.extra
        shares = []
        for before, after in pairwise((self.tokens, *counts)):
            part = 1000 * (after - fixed) // max(1, before - prefix)
            shares.append(1.0 if after == before else max(1, part) / 1000)
        return f"keep={shares}"

    def gentlest(self, family: Family, budget: float, gentle: float, harsh: float) -> float:
        """The parameter nearest to ``gentle`` whose member of a family costs at most ``budget``.

        The cost of ``family(t)`` must never rise from ``gentle`` to ``harsh``.

        Raises:
            VerdictError: even ``harsh`` costs more.
        """
        if self.share(family(gentle)) <= budget:
            return gentle
        self.demand(budget, self.share(family(harsh)))
        for _ in range(BISECTIONS):
            middle = (gentle + harsh) / 2
            if self.share(family(middle)) <= budget:
                harsh = middle
            else:
                gentle = middle
        return harsh

    @staticmethod
    def demand(budget: float, least: float) -> None:
        """Raise VerdictError unless ``least`` is within the budget."""
        if least > budget:
            raise VerdictError(
                f"the budget flops={budget:g} cannot be met: the least this method reaches at these"
                f" sites is {least:.3f}; ask for less"
            )


def space_of(program: Program, method: TokenReduction[Any]) -> Space:
    """The vectors of a method on a dense model.

    Raises:
        RefusedError: the method applies nowhere.
    """
    sites = find_sites(program)
    if not sites.sites:
        why = (
            "; ".join(f"{r.node}: {r.reason}" for r in sites.refusals[:1]) or "it has no attention"
        )
        raise RefusedError(f"{method.name} applies nowhere in this model ({why})")
    step = method.step(sites)
    objection = step.objection(sites)
    if objection:
        raise RefusedError(f"{method.name} cannot work on this model: {objection}")
    cost = cost_model(program.graph, sites)
    return Space(
        tokens=hint_of(sites.tokens),
        sites=len(sites.sites),
        limits=step.limits(sites.protected),
        share=lambda counts: cost.macs(counts) / cost.dense,
        dynamic=not isinstance(sites.tokens, int),
    )
