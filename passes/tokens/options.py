"""Options that every token-reduction method shares, and how they become a schedule."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from thresher.compiler.analysis.axes import hint_of
from thresher.compiler.analysis.cost import CostModel
from thresher.compiler.analysis.sites import Sites
from thresher.compiler.contract import Options
from thresher.compiler.errors import UsageError
from thresher.passes.tokens import budget
from thresher.passes.tokens.budget import Count, Limits, Schedule

DEFAULT_FLOPS = 0.65
BUDGETS = ("r", "keep", "counts", "flops")


class TokenOptions(Options):
    """How many tokens stay: at most one of ``r``, ``keep``, ``counts`` and ``flops``."""

    r: Annotated[int | None, Field(ge=0, description="tokens to remove at each site")] = None
    inflect: Annotated[
        float,
        Field(ge=-1, le=1, description="with r: -1 removes more early, +1 more late, 0 evenly"),
    ] = 0.0
    keep: Annotated[
        float | None, Field(gt=0, le=1, description="share of the tokens to keep at each site")
    ] = None
    counts: Annotated[
        tuple[int, ...] | None, Field(description="tokens after each block, prefix tokens included")
    ] = None
    flops: Annotated[
        float | None,
        Field(gt=0, le=1, description="share of the dense multiply-accumulates to spend"),
    ] = None
    layers: Annotated[
        tuple[int, ...] | None,
        Field(description="blocks to reduce at, from 0; by default all with r or counts, with keep"
            " a quarter, half and three quarters of the depth"),
    ] = None  # fmt: skip
    restore: Annotated[
        bool,
        Field(
            description="put every token back in place for outputs that had them; false returns fewer tokens"
        ),
    ] = True

    @model_validator(mode="after")
    def _one_budget(self) -> TokenOptions:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one budget only, not {' and '.join(given)}")
        return self


def schedule(
    options: TokenOptions, sites: Sites, limits: Limits, cost: CostModel, *, by_share: bool
) -> Schedule:
    """The schedule that the options ask for on a model.

    ``by_share``: the method's usual form is a share at three sites rather than a number at all.

    Raises:
        UsageError: a count or layer does not fit the model.
        VerdictError: the FLOPs budget cannot be met.
    """
    tokens, total = hint_of(sites.tokens), len(sites.sites)
    fixed = isinstance(sites.tokens, int)
    by_share = by_share or not fixed
    if options.counts is not None:
        return _explicit(options.counts, tokens, total, limits, fixed)
    if options.keep is not None:
        return _shares(options.keep, _layers(options, total, spaced=True), total, limits)
    if options.r is not None:
        removed = budget.linear(options.r, options.inflect, total)
        return _removals(removed, _layers(options, total, spaced=False), tokens, total, limits)
    layers = _layers(options, total, spaced=by_share)
    least = 0.5 if limits.halves else 0.0

    def relative(candidate: Schedule) -> float:
        return cost.macs(budget.resolve(candidate, tokens, limits)) / cost.dense

    target = options.flops or DEFAULT_FLOPS
    if by_share:
        return budget.share_out(
            target, lambda s: _shares(s, layers, total, limits), relative, 1.0, least + 1e-3
        )
    most = (tokens - limits.protected) / 2 if limits.halves else tokens - limits.protected

    def evenly(r: float) -> Schedule:
        counts = [Count("remove", n) if n else None for n in budget.spread(r, len(layers))]
        placed = dict(zip(layers, counts, strict=True))
        return tuple(placed.get(i) for i in range(total))

    return budget.share_out(target, evenly, relative, 0.0, most)


def _layers(options: TokenOptions, total: int, *, spaced: bool) -> tuple[int, ...]:
    if options.layers is None:
        return budget.spaced(total) if spaced else tuple(range(total))
    wrong = [layer for layer in options.layers if not 0 <= layer < total]
    if wrong:
        raise UsageError(
            f"layers={wrong[0]} does not exist: the model has {total} sites, 0 to {total - 1}"
        )
    return tuple(sorted(set(options.layers)))


def _shares(value: float, layers: tuple[int, ...], total: int, limits: Limits) -> Schedule:
    if limits.halves and value < 0.5:
        raise UsageError(
            f"keep={value:g} is too little: merging in pairs leaves at least half of the tokens at a site"
        )
    return (
        budget.at(layers, [budget.share(value)] * len(layers), total)
        if value < 1
        else (None,) * total
    )


def _removals(
    removed: list[int], layers: tuple[int, ...], tokens: int, total: int, limits: Limits
) -> Schedule:
    most = tokens - limits.least(tokens)
    first = next((removed[layer] for layer in layers if removed[layer]), 0)
    if first > most:
        raise UsageError(
            f"r={first} removes more than the {most} of {tokens} tokens that one site can lose"
            f" ({limits.protected} are protected): give r={most} or less"
        )
    return tuple(
        Count("remove", removed[i]) if i in layers and removed[i] else None for i in range(total)
    )


def _explicit(
    counts: tuple[int, ...], tokens: int, total: int, limits: Limits, fixed: bool
) -> Schedule:
    if not fixed:
        raise UsageError(
            "counts need a fixed input length and this model's is dynamic: give keep or r instead"
        )
    if len(counts) != total:
        raise UsageError(
            f"counts has {len(counts)} entries and the model has {total} sites: give one per site"
        )
    schedule: list[Count | None] = []
    for layer, count in enumerate(counts):
        least = limits.least(tokens)
        if count < least:
            raise UsageError(
                f"counts[{layer}]={count} is too little: of {tokens} tokens this method leaves at least {least} there"
            )
        schedule.append(Count("exact", count) if count < tokens else None)
        tokens = min(tokens, count)
    return tuple(schedule)
