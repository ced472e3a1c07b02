"""Which of the evaluated vectors are worth keeping, and which one answers the demands."""

from __future__ import annotations

from dataclasses import dataclass

from thresher.passes.tokens.search.outcome import Counts, Known, Outcome, Quality


@dataclass(frozen=True)
class Demands:
    """What was asked for; None is no demand.  ``drop`` and ``tolerance`` are shares, not points.

    ``tolerance``: the drop that counts as none, by default one standard error.
    """

    flops: float | None = None
    speedup: float | None = None
    drop: float | None = None
    tolerance: float | None = None

    @property
    def on_cost(self) -> bool:
        """Whether a cost is demanded."""
        return self.flops is not None or self.speedup is not None

    def spends(self, outcome: Outcome) -> bool:
        """Whether the demand on cost is met."""
        return self.excess(outcome) <= 0

    def excess(self, outcome: Outcome) -> float:
        """By how much the demand on cost is missed; at most 0 is met."""
        if self.flops is not None:
            return outcome.share - self.flops
        if self.speedup is not None:
            assert outcome.timing is not None
            return self.speedup / outcome.timing.speedup - 1
        return 0.0

    def keeps(self, quality: Quality) -> bool:
        """Whether the demand on quality is met."""
        return self.drop is None or quality.drop <= self.drop

    def harmless(self, quality: Quality) -> bool:
        """Whether the quality does not drop at all, up to the tolerance."""
        allowed = quality.standard_error if self.tolerance is None else self.tolerance
        return quality.drop <= allowed and self.keeps(quality)

    @property
    def lossless(self) -> bool:
        """Whether nothing is demanded, so that the answer must cost no quality."""
        return not self.on_cost and self.drop is None


def front(known: Known, kind: str) -> list[Counts]:
    """Vectors that no other one beats in quality at less or equal cost, from cheap to dear."""
    ordered = sorted(known, key=lambda c: (known[c].cost(kind), -known[c].quality.score))
    found: list[Counts] = []
    for counts in ordered:
        if not found or known[counts].quality.score > known[found[-1]].quality.score:
            found.append(counts)
    return found


def best(known: Known, demands: Demands, kind: str) -> Counts:
    """The vector that answers the demands, or comes nearest to doing so.

    With a demand on cost the best quality within it; otherwise the cheapest that keeps the quality.
    """

    def cost(counts: Counts) -> float:
        return known[counts].cost(kind)

    def score(counts: Counts) -> tuple[float, float]:
        return known[counts].quality.score, -cost(counts)

    def good(counts: Counts) -> bool:
        judge = demands.harmless if demands.lossless else demands.keeps
        return judge(known[counts].quality)

    if demands.on_cost:
        affordable = [counts for counts in known if demands.spends(known[counts])]
        return max(affordable, key=score) if affordable else min(known, key=cost)
    return min(filter(good, known), key=cost, default=max(known, key=score))
