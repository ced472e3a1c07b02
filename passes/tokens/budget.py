"""How many tokens stay at each site: one typed form for every schedule.

A :class:`Count` says what becomes of N incoming tokens; a schedule is one Count (or None: no
reduction) per site.  Counts are resolved to integers where the input size is fixed and emitted as
shape arithmetic where it is not.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import fx

from thresher.compiler.errors import UsageError, VerdictError
from thresher.compiler.surgery import Rewriter

BISECTIONS = 40
_FORM = re.compile(r"(?:-(?P<remove>\d+)|=(?P<exact>\d+)(?:>(?P<merged>\d+))?|(?P<share>[^~]+))"
                   r"(?:~(?P<multiple>[1-9]\d*))?")  # fmt: skip

Size = fx.Node | int
"""A token count: a number, or the node that computes it."""


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

    ``remove``: ``N - value``; ``share``: ``P + ceil(value (N - P))``; ``exact``: ``value``, of
    ``pruned`` tokens that a method which prunes before it merges leaves first, if that is given.
    The result is rounded up to a ``multiple``, prefix included, but never above N.

    Printed as ``-13``, ``0.7``, ``=150`` and ``=180>170`` (180 after pruning, 170 after merging),
    with ``~8`` behind for a multiple of 8; :func:`parse` reads them back.
    """

    kind: str
    value: int | Fraction
    pruned: int | None = None
    multiple: int = 1

    def __str__(self) -> str:
        rounding = f"~{self.multiple}" if self.multiple > 1 else ""
        if self.kind == "remove":
            return f"-{self.value}{rounding}"
        if self.kind == "share":
            return f"{float(self.value)}{rounding}"
        before = "" if self.pruned is None else f"{self.pruned}>"
        return f"={before}{self.value}{rounding}"

    def rounded(self, multiple: int) -> Count:
        """The same, rounded up to a multiple."""
        return replace(self, multiple=multiple)

    def of(self, tokens: int, limits: Limits) -> int:
        """Tokens that stay, never fewer than the method can leave nor more than came."""
        return int(self._left(tokens, limits, lambda function, *args: function(*args)))

    def emit(self, rewriter: Rewriter, tokens: Size, limits: Limits) -> Size:
        """The same, as shape arithmetic where the token count is symbolic."""
        if isinstance(tokens, int):
            return self.of(tokens, limits)
        if self.kind == "exact":
            raise UsageError("exact token counts need a fixed input length: give r or keep instead")
        left: Size = self._left(tokens, limits, rewriter.emit)
        return left

    def _left(self, tokens: Size, limits: Limits, do: Callable[..., Any]) -> Any:
        """``do(f, a, b)`` computes or emits ``f(a, b)``; bounds that hold anyway are left out."""
        wanted = self._wanted(tokens, limits, do)
        half = limits.halves and self.kind == "share" and self.value < Fraction(1, 2)
        if self.kind != "share" or half:
            wanted = do(torch.sym_max, wanted, _least(tokens, limits, do))
        if self.multiple > 1:
            up = do(operator.add, wanted, self.multiple - 1)
            wanted = do(operator.mul, do(operator.floordiv, up, self.multiple), self.multiple)
        elif not limits.extra and (self.kind, limits.halves) in _WITHIN:
            return wanted
        return do(torch.sym_min, wanted, tokens)

    def _wanted(self, tokens: Size, limits: Limits, do: Callable[..., Any]) -> Any:
        if self.kind == "remove":
            return do(operator.sub, tokens, int(self.value))
        if self.kind == "exact":
            return min(count for count in (int(self.value), self.pruned) if count is not None)
        behind = do(operator.sub, tokens, limits.protected)
        rest = do(operator.mul, behind, self.value.numerator)
        up = do(operator.add, rest, self.value.denominator - 1)
        share = do(operator.floordiv, up, self.value.denominator)
        return do(operator.add, share, limits.protected + limits.extra)


_WITHIN = {("share", True), ("share", False), ("remove", True)}  # at most N without being told


def _least(tokens: Size, limits: Limits, do: Callable[..., Any]) -> Any:
    if not limits.halves:
        return limits.protected + 1 + limits.extra
    half = do(operator.floordiv, do(operator.sub, tokens, limits.protected), 2)
    return do(operator.sub, tokens, half)


def parse(text: str) -> Count:
    """Read the printed form of a Count.

    Raises:
        UsageError: the text is none of ``-13``, ``0.7``, ``=150``, ``=180>170``, with or without
            ``~8`` behind.
    """
    found = _FORM.fullmatch(text)
    try:
        if found is None:
            raise ValueError(text)
        count = _unrounded(**found.groupdict())
    except ValueError as error:
        raise UsageError(
            f"{text!r} is not a token count: write -13 (remove), 0.7 (share), =150 (keep) or =180>170"
            " (prune to 180, merge to 170), with ~8 behind to round up to a multiple of 8"
        ) from error
    return replace(count, multiple=int(found["multiple"] or 1))


def _unrounded(
    remove: str | None, exact: str | None, merged: str | None, share: str | None, **_: str | None
) -> Count:
    if remove is not None:
        return Count("remove", int(remove))
    if exact is None:
        value = float(share or "")
        if not 0 < value <= 1:
            raise ValueError(value)
        return Count("share", _fraction(value))
    if merged is None:
        return Count("exact", int(exact))
    return Count("exact", int(merged), pruned=int(exact))


def share(value: float) -> Count:
    """Keep this share of the unprotected tokens, rounded up."""
    return Count("share", _fraction(value))


def _fraction(value: float) -> Fraction:
    return Fraction(value).limit_denominator(1000)


Schedule = tuple[Count | None, ...]


def rounded(schedule: Schedule, multiple: int) -> Schedule:
    """The schedule with every count rounded up to a multiple."""
    return tuple(count and count.rounded(multiple) for count in schedule)


def linear(r: int, inflect: float, sites: int) -> list[int]:
    """Tokens to remove at each site.

    ToMe's schedule (Bolya et al., 2023): a straight line from ``floor(r (1 - inflect))`` to ``2 r`` less
    that, truncated per site; inflect 0 is constant, -1 decreasing, +1 increasing.
    """
    first = int(r * (1 - inflect))
    step = (2 * (r - first)) / (sites - 1) if sites > 1 else 0.0
    return [int(first + step * i) for i in range(sites)]


def spread(r: float, inflect: float, sites: int) -> list[int]:
    """Whole numbers of mean ``r``, as near as can be to a straight line of the slope of :func:`linear`."""
    step = 2 * inflect * r / (sites - 1) if sites > 1 else 0.0
    first = r - step * (sites - 1) / 2
    gone = [int(k * first + step * k * (k - 1) / 2) for k in range(sites + 1)]
    return [end - start for start, end in pairwise(accumulate(gone, max))]


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


def at(layers: Sequence[int], counts: Sequence[Count | None], sites: int) -> Schedule:
    """Place counts at the given sites."""
    placed = dict(zip(layers, counts, strict=True))
    return tuple(placed.get(i) for i in range(sites))
