"""Spaces and objectives in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hypothesis import strategies as st

from thresher.passes.tokens.budget import Limits
from thresher.passes.tokens.search.outcome import Counts, Outcome, Quality
from thresher.passes.tokens.search.space import Space


def work(tokens: int, counts: Sequence[int]) -> float:
    """Linear and quadratic work of each layer, relative to all tokens; half of it each."""
    return sum(0.5 * n / tokens + 0.5 * (n / tokens) ** 2 for n in counts) / len(counts)


def toy(tokens: int, sites: int, limits: Limits | None = None) -> Space:
    """A space whose cost is :func:`work`."""
    return Space(tokens, sites, limits or Limits(1), lambda counts: work(tokens, counts))


def outcome(score: float, share: float = 1.0, *, dense: float = 1.0, error: float = 0.0) -> Outcome:
    """An outcome with this quality; nothing was timed."""
    return Outcome(Quality(score, dense, dense - score, error, 100), share)


def spaces() -> st.SearchStrategy[Space]:
    """Any number of tokens and sites, merging or dropping, with and without protected tokens."""
    limits = st.builds(Limits, st.integers(0, 2), st.booleans(), st.integers(0, 1))
    return st.builds(toy, st.integers(6, 300), st.integers(1, 24), limits)


def realisable(space: Space, counts: Counts) -> bool:
    """The rules written out: never more than came, at most every second of the unprotected merged."""
    tokens = space.tokens
    for count in counts:
        free = tokens - space.limits.protected
        if space.limits.halves:
            least = tokens - free // 2
        else:
            least = min(tokens, space.limits.protected + 1 + space.limits.extra)
        if not least <= count <= tokens:
            return False
        tokens = count
    return len(counts) == space.sites


def fixed(values: Mapping[str, float]) -> Callable[..., float]:
    """Stands for an optimiser: a place in [0, 1] of each parameter's range."""

    def suggest(name: str, low: float, high: float, *, log: bool = False) -> float:
        place = values.get(name, 0.5)
        return float(low * (high / low) ** place if log else low + place * (high - low))

    return suggest
