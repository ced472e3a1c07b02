"""Whole-number counts that spend exactly what was asked, near those that were learned."""

from __future__ import annotations

from dataclasses import replace

from thresher.compiler.errors import VerdictError
from thresher.passes.tokens.learning.job import Job, Learned

BISECTIONS = 40
STEEPEST = 64.0  # no learned schedule is so gentle that more is needed


def fitted(learned: Learned, job: Job) -> Learned:
    """The learned counts, with what goes at every site scaled so that the cost is what was asked.

    A common factor on the tokens removed at each site, found by bisection: never above the target,
    and as near to it as whole tokens allow.

    Raises:
        VerdictError: not even one token at every site that learns is cheap enough.
    """
    least = job.sites.protected + 1

    def scaled(factor: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
        prune, counts = [], []
        before = now = job.tokens  # learned and scaled tokens in front of a site
        for after_prune, after_merge in zip(learned.prune, learned.counts, strict=True):
            pruned = _less(now, factor * (before - after_prune), least)
            merged = _less(now, factor * (before - after_merge), least)
            prune.append(pruned)
            counts.append(merged)
            before, now = after_merge, merged
        return tuple(prune), tuple(counts)

    low, high = 0.0, STEEPEST
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if job.cost.share(scaled(middle)[1]) <= job.target:
            high = middle
        else:
            low = middle
    prune, counts = scaled(high)
    share = float(job.cost.share(counts))
    if share > job.target:
        raise VerdictError(
            f"the budget flops={job.target:g} cannot be met at the sites that learn:"
            f" the least is {share:.3f}; ask for less"
        )
    return replace(learned, prune=prune, counts=counts, share=share)


def even(job: Job) -> Learned:
    """As many tokens removed at every site that learns, half of them by pruning, at the target's cost.

    Raises:
        VerdictError: as :func:`fitted`.
    """
    step = max(2, job.patches // (2 * len(job.layers)))
    prune, counts, now = [], [], job.tokens
    for index in range(len(job.sites.sites)):
        removed = step if index in job.layers else 0
        prune.append(now - (removed // 2 if job.prunes else 0))
        now -= removed
        counts.append(now)
    return fitted(Learned(tuple(prune), tuple(counts), 0.0, "", 0, []), job)


def _less(tokens: int, removed: float, least: int) -> int:
    return min(tokens, max(least, round(tokens - removed)))
