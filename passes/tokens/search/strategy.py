"""What a strategy is: a pure function from what is known to the next vector worth a look."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

from thresher.passes.tokens.search.outcome import Counts, Known
from thresher.passes.tokens.search.space import Space

BELOW, ABOVE = 0.5, 1.15  # realised over ideal speed-up, at worst and at best


class Suggest(Protocol):
    """A source of parameters: a Bayesian optimiser, or a random one."""

    def __call__(self, name: str, low: float, high: float, /, *, log: bool = False) -> float: ...


class Strategy(ABC):
    """Proposes vectors of kept counts; keeps no state, so any process can take a search over."""

    name: ClassVar[str]
    summary: ClassVar[str]

    def __init__(self, space: Space) -> None:
        self.space = space

    @abstractmethod
    def propose(self, suggest: Suggest, known: Known) -> Counts | None:
        """The next vector, or None when the search is over."""

    @property
    def most(self) -> int | None:
        """Most vectors that the strategy asks for; None: it never ends by itself."""
        return None

    def unfinished(self, known: Known) -> bool:
        """Whether a strategy that ends by itself has more to ask."""
        return False


@dataclass(frozen=True)
class Budget:
    """Shares of the dense multiply-accumulates to spend; a fixed one has ``low == high``."""

    low: float
    high: float

    def pick(self, suggest: Suggest) -> float:
        """The share of one proposal."""
        return self.low if self.low == self.high else suggest("share", self.low, self.high)

    @classmethod
    def of(cls, space: Space, flops: float | None, speedup: float | None) -> Budget:
        """From a demand on multiply-accumulates, or on measured speed.

        A measured speed-up lies between half of the ideal one and a little above it, where caches
        help; within that the share is searched too.

        Raises:
            VerdictError: the demanded share is below what the method reaches.
        """
        least = space.share(space.harshest)
        if flops is not None:
            space.demand(flops, least)
            return cls(flops, flops)
        assert speedup is not None
        high = max(least, min(1.0, ABOVE / speedup))
        return cls(min(high, max(least, BELOW / speedup)), high)
