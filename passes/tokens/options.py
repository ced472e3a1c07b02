"""Options that every token-reduction method shares, and how they become a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, TypeAlias

from pydantic import Field, model_validator

from thresher.compiler.analysis.axes import hint_of
from thresher.compiler.analysis.cost import CostModel
from thresher.compiler.analysis.sites import Sites
from thresher.compiler.contract import Options
from thresher.compiler.errors import UsageError
from thresher.passes.options import Flops
from thresher.passes.tokens import budget
from thresher.passes.tokens.budget import Count, Limits, Schedule

Share = Annotated[float, Field(gt=0, le=1)]
DEFAULT_FLOPS = 0.65
BUDGETS = ("r", "keep", "counts", "flops")


Multiple: TypeAlias = Annotated[
    int,
    Field(
        ge=1,
        description="round token counts up to a multiple, prefix tokens included; 8 pays on GPUs",
    ),
]


class TokenOptions(Options):
    """How many tokens stay: at most one of ``r``, ``keep``, ``counts`` and ``flops``."""

    r: Annotated[int | None, Field(ge=0, description="tokens to remove at each site")] = None
    inflect: Annotated[
        float,
        Field(
            ge=-1,
            le=1,
            description="with r or flops: -1 removes more early, +1 more late, 0 evenly",
        ),
    ] = 0.0
    keep: Annotated[
        Share | tuple[Share, ...] | None,
        Field(description="share of the tokens to keep at each site; a list has one per block"),
    ] = None
    counts: Annotated[
        tuple[int, ...] | None, Field(description="tokens after each block, prefix tokens included")
    ] = None
    flops: Flops = None
    layers: Annotated[
        tuple[int, ...] | None,
        Field(description="blocks to reduce at, from 0; by default all with r or counts, with keep"
            " a quarter, half and three quarters of the depth"),
    ] = None  # fmt: skip
    multiple: Multiple = 1
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

    def explicit(self) -> tuple[Count, ...] | None:
        """The counts that were given one by one."""
        if self.counts is None:
            return None
        return tuple(Count("exact", count) for count in self.counts)


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
    by_share = by_share or not isinstance(sites.tokens, int)

    def rounded(candidate: Schedule) -> Schedule:
        return budget.rounded(candidate, options.multiple)

    explicit = options.explicit()
    if explicit is not None:
        return _explicit(explicit, sites, limits, options.multiple)
    if isinstance(options.keep, tuple):
        return rounded(_shares(options.keep, _one_each(options, total), total, limits))
    if options.keep is not None:
        layers = _layers(options, total, spaced=True)
        return rounded(_shares([options.keep] * len(layers), layers, total, limits))
    if options.r is not None:
        removed = budget.linear(options.r, options.inflect, total)
        layers = _layers(options, total, spaced=False)
        return rounded(_removals(removed, layers, tokens, total, limits))
    layers = _layers(options, total, spaced=by_share)
    least = 0.5 if limits.halves else 0.0

    def relative(candidate: Schedule) -> float:
        return cost.macs(budget.resolve(candidate, tokens, limits)) / cost.dense

    target = options.flops or DEFAULT_FLOPS
    if by_share:
        if options.inflect:
            raise UsageError(
                "inflect shapes numbers of tokens, and here shares are kept at some sites: leave it out"
            )
        return budget.share_out(
            target,
            lambda s: rounded(_shares([s] * len(layers), layers, total, limits)),
            relative,
            1.0,
            least + 1e-3,
        )
    most = (tokens - limits.protected) / 2 if limits.halves else tokens - limits.protected

    def sloped(r: float) -> Schedule:
        counts = [
            Count("remove", n) if n else None
            for n in budget.spread(r, options.inflect, len(layers))
        ]
        placed = dict(zip(layers, counts, strict=True))
        return rounded(tuple(placed.get(i) for i in range(total)))

    return budget.share_out(target, sloped, relative, 0.0, most)


def _layers(options: TokenOptions, total: int, *, spaced: bool) -> tuple[int, ...]:
    if options.layers is None:
        return budget.spaced(total) if spaced else tuple(range(total))
    wrong = [layer for layer in options.layers if not 0 <= layer < total]
    if wrong:
        raise UsageError(
            f"layers={wrong[0]} does not exist: the model has {total} sites, 0 to {total - 1}"
        )
    return tuple(sorted(set(options.layers)))


def _one_each(options: TokenOptions, total: int) -> tuple[int, ...]:
    """All blocks, for a list of shares."""
    assert isinstance(options.keep, tuple)
    if options.layers is not None:
        raise UsageError("keep has one share per block and layers chooses blocks: give one of them")
    _demand_one_each("keep", options.keep, total)
    return tuple(range(total))


def _demand_one_each(name: str, given: Sequence[object], total: int) -> None:
    if len(given) != total:
        raise UsageError(
            f"{name} has {len(given)} entries and the model has {total} sites: give one per site"
        )


def _shares(
    values: Sequence[float], layers: tuple[int, ...], total: int, limits: Limits
) -> Schedule:
    if limits.halves and min(values, default=1.0) < 0.5:
        raise UsageError(
            f"keep={min(values):g} is too little: merging in pairs leaves at least half of the tokens"
            " at a site"
        )
    return budget.at(layers, [budget.share(s) if s < 1 else None for s in values], total)


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


def _explicit(counts: tuple[Count, ...], sites: Sites, limits: Limits, multiple: int) -> Schedule:
    """Sites where nothing changes are left out: published lists are not always monotone."""
    tokens = sites.tokens
    if not isinstance(tokens, int):
        raise UsageError(
            "counts need a fixed input length and this model's is dynamic: give keep or r instead"
        )
    _demand_one_each("counts", counts, len(sites.sites))
    schedule: list[Count | None] = []
    for layer, given in enumerate(counts):
        least = limits.least(tokens)
        if int(given.value) < least or (given.pruned is not None and given.pruned < least):
            raise UsageError(
                f"counts[{layer}]{given} is too little: of {tokens} tokens this method leaves at"
                f" least {least} there"
            )
        count = given.rounded(multiple)
        left = count.of(tokens, limits)
        schedule.append(count if left < tokens else None)
        tokens = left
    return tuple(schedule)
