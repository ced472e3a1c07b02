"""How many tokens stay at each site: one typed form for every schedule.

A :class:`Count` says what becomes of N incoming tokens; a schedule is one Count (or None: no
reduction) per site.  Counts are resolved to integers where the input size is fixed and emitted as
shape arithmetic where it is not.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import fx

from thresher.compiler.errors import UsageError, VerdictError
from thresher.compiler.surgery import Rewriter

BISECTIONS = 40


@dataclass(frozen=True)
class Limits:
    """What one application of a method can leave.

    ``protected`` prefix tokens always stay; a method that ``halves`` removes at most every second of
    the others; ``extra`` tokens are added by fusing.
    """

    protected: int
    halves: bool = False
    extra: int = 0

    def least(self, tokens: int) -> int:
        """Fewest tokens that can be left of ``tokens``."""
        if self.halves:
            return tokens - (tokens - self.protected) // 2
        return min(tokens, self.protected + 1 + self.extra)


@dataclass(frozen=True)
class Count:
    """What stays of N tokens of which P are protected.

    ``remove``: ``N - value``; ``share``: ``P + ceil(value (N - P))``; ``exact``: ``value``.  Printed
    as ``-13``, ``0.7`` and ``=150``; :func:`parse` reads them back.
    """

    kind: str
    value: int | Fraction

    def __str__(self) -> str:
        if self.kind == "remove":
            return f"-{self.value}"
        return f"={self.value}" if self.kind == "exact" else str(float(self.value))

    def of(self, tokens: int, limits: Limits) -> int:
        """Tokens that stay, never fewer than the method can leave nor more than came."""
        if self.kind == "remove":
            wanted = tokens - int(self.value)
        elif self.kind == "share":
            rest = (tokens - limits.protected) * self.value.numerator
            wanted = limits.protected + limits.extra - (-rest // self.value.denominator)
        else:
            wanted = int(self.value)
        return min(tokens, max(wanted, limits.least(tokens)))

    def emit(self, rewriter: Rewriter, tokens: fx.Node, limits: Limits) -> fx.Node:
        """The same as shape arithmetic on a symbolic token count."""
        emit = rewriter.emit
        if self.kind == "share":
            rest = emit(
                operator.mul, emit(operator.sub, tokens, limits.protected), self.value.numerator
            )
            up = emit(
                operator.floordiv,
                emit(operator.add, rest, self.value.denominator - 1),
                self.value.denominator,
            )
            wanted = emit(operator.add, up, limits.protected + limits.extra)
            return emit(torch.sym_min, wanted, tokens) if limits.extra else wanted
        if self.kind == "exact":
            raise UsageError("exact token counts need a fixed input length: give r or keep instead")
        wanted = emit(operator.sub, tokens, int(self.value))
        if limits.halves:
            half = emit(operator.floordiv, emit(operator.sub, tokens, limits.protected), 2)
            return emit(torch.sym_max, wanted, emit(operator.sub, tokens, half))
        return emit(
            torch.sym_min, emit(torch.sym_max, wanted, limits.protected + 1 + limits.extra), tokens
        )


def parse(text: str) -> Count:
    """Read the printed form of a Count.

    Raises:
        UsageError: the text is none of ``-13``, ``0.7``, ``=150``.
    """
    try:
        if text.startswith("-"):
            return Count("remove", int(text[1:]))
        return Count("exact", int(text[1:])) if text.startswith("=") else share(float(text))
    except ValueError as error:
        raise UsageError(
            f"{text!r} is not a token count: write -13 (remove), 0.7 (share) or =150 (keep)"
        ) from error


def share(value: float) -> Count:
    """Keep this share of the unprotected tokens, rounded up."""
    return Count("share", Fraction(value).limit_denominator(1000))


Schedule = tuple[Count | None, ...]


def linear(r: int, inflect: float, sites: int) -> list[int]:
    """Tokens to remove at each site.

    ToMe's schedule (Bolya et al., 2023): a straight line from ``floor(r (1 - inflect))`` to ``2 r`` less
    that, truncated per site; inflect 0 is constant, -1 decreasing, +1 increasing.
    """
    first = int(r * (1 - inflect))
    step = (2 * (r - first)) / (sites - 1) if sites > 1 else 0.0
    return [int(first + step * i) for i in range(sites)]


def spread(r: float, sites: int) -> list[int]:
    """Whole numbers that average to a fractional ``r``, as evenly as can be."""
    return [int(r * (i + 1)) - int(r * i) for i in range(sites)]


def resolve(schedule: Schedule, tokens: int, limits: Limits) -> list[int]:
    """Token counts after each site for ``tokens`` incoming ones."""
    counts = []
    for count in schedule:
        if count is not None:
            tokens = count.of(tokens, limits)
        counts.append(tokens)
    return counts


def share_out(
    target: float,
    candidates: Callable[[float], Schedule],
    macs: Callable[[Schedule], float],
    gentlest: float,
    harshest: float,
) -> Schedule:
    """The gentlest schedule of a one-parameter family whose MACs are at most ``target`` of the dense ones.

    ``candidates(t)`` must cost less and less from ``gentlest`` to ``harshest``; ``macs`` is relative.

    Raises:
        VerdictError: even the harshest schedule costs more.
    """
    least = macs(candidates(harshest))
    if least > target:
        raise VerdictError(
            f"the budget flops={target:g} cannot be met: the least this method reaches at these sites is {least:.3f};"
            " allow more sites (layers=...) or ask for less"
        )
    good, bad = harshest, gentlest
    for _ in range(BISECTIONS):
        middle = (good + bad) / 2
        if macs(candidates(middle)) <= target:
            good = middle
        else:
            bad = middle
    return candidates(good)


def spaced(sites: int) -> tuple[int, ...]:
    """Sites at a quarter, half and three quarters of the depth: blocks 3, 6, 9 of 12 (EViT)."""
    return tuple(sorted({sites // 4, sites // 2, 3 * sites // 4}))


def at(layers: Sequence[int], counts: Sequence[Count], sites: int) -> Schedule:
    """Place counts at the given sites."""
    placed = dict(zip(layers, counts, strict=True))
    return tuple(placed.get(i) for i in range(sites))
