"""Selection and combination: what one reduction step does with N tokens to leave fewer.

A step emits one ``thresher`` node that moves tokens.  ``Merge`` matches tokens in pairs and averages
them, ``MergeRedundant`` does so with the highest-scored ones only.  ``Keep`` ranks tokens by a score
and drops the rest or fuses it into one token, ``Diverse`` keeps tokens that lie far apart.
``PruneMerge`` drops the lowest-ranked and merges the next ones into those that stay.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import fx

from thresher.compiler.analysis.sites import Sites
from thresher.passes.tokens.budget import Limits, Size
from thresher.passes.tokens.combine import mlerp
from thresher.passes.tokens.score import Scorer
from thresher.passes.tokens.sizes import initial_sizes
from thresher.passes.tokens.view import SiteView

LOWEST, NEARLY_ZERO = -1e30, -1e-30


@dataclass(frozen=True)
class StepResult:
    """New stream ``[B, K, C]``, sizes ``[B, K]`` or None, and the two token maps (see LedgerEntry)."""

    node: fx.Node
    x: fx.Node
    size: fx.Node | None
    slot: fx.Node
    kept: fx.Node
    slot_output: int
    kept_output: int


class Step(ABC):
    """One way to reduce the tokens of a site.

    ``merges``: tokens come to stand for several, so sizes are tracked.  ``drops``: tokens vanish, so
    that restoring them takes what they last were.  ``empties``: places may be left empty, with a size
    of 0, which nothing attends to.  ``between``: tokens leave behind a block and not behind its attention.
    """

    @property
    def merges(self) -> bool:
        return False

    @property
    def drops(self) -> bool:
        return False

    @property
    def empties(self) -> bool:
        return False

    @property
    def between(self) -> bool:
        return False

    @property
    def combine(self) -> str:
        """``"drop"``, ``"merge"`` or ``"drop and merge"``: what becomes of tokens that do not stay."""
        return " and ".join(["drop"] * self.drops + ["merge"] * self.merges)

    def objection(self, sites: Sites) -> str | None:
        """Why this step cannot work on a model, or None."""
        return None

    @abstractmethod
    def limits(self, protected: int) -> Limits:
        """What one application can leave."""

    @abstractmethod
    def emit(self, site: SiteView, keep: Size, pruned: int | None) -> StepResult:
        """Append the step that leaves ``keep`` tokens.

        ``pruned`` is for steps that prune before they merge: the tokens left in between, or None
        where the schedule does not say.
        """


class Metric(Protocol):
    """What tokens are compared by."""

    def objection(self, sites: Sites) -> str | None:
        """Why it cannot be had in a model, in words, or None."""

    def emit(self, site: SiteView) -> fx.Node:
        """Append the metric ``[B, H, N, d]`` to the graph and return its node."""


@dataclass(frozen=True)
class Merge(Step):
    """Bipartite soft matching by key similarity, size-weighted mean (ToMe, Bolya et al., 2023, section 3).

    ``by_index``: kept sources stay in index order (models with a class token) or in order of
    descending similarity (models without), as the reference does; later matchings depend on it.
    ``preserves_norm``: means keep the length of the longest token in them (:func:`mlerp`).
    ``metric``: what tokens are compared by instead of their keys.
    """

    by_index: bool
    preserves_norm: bool = False
    metric: Metric | None = None

    @property
    def merges(self) -> bool:
        return True

    def objection(self, sites: Sites) -> str | None:
        return None if self.metric is None else self.metric.objection(sites)

    def limits(self, protected: int) -> Limits:
        return Limits(protected, halves=True)

    def emit(self, site: SiteView, keep: Size, pruned: int | None) -> StepResult:
        assert site.size is not None
        metric = site.k if self.metric is None else self.metric.emit(site)
        node = site.emit(
            torch.ops.thresher.bipartite_merge.default,
            site.x, site.size, metric, keep, site.protected, self.by_index,
        )  # fmt: skip
        x, size, slot, kept = site.rewriter.outputs(node)
        if self.preserves_norm:
            x = site.inline(mlerp, site.x, site.size, x, size, slot, kept)
        return StepResult(node, x, size, slot, kept, 2, 3)


@dataclass(frozen=True)
class Keep(Step):
    """The best-scored tokens stay, in their order; the rest is dropped or fused into one more token.

    Fusing weighs by the score, so it takes scores that are never negative.  Under a ``threshold`` the
    count is a cap: the place of a token that scores less is left empty.  ``between``: see :class:`Step`.
    """

    scorer: Scorer
    fuse: bool = False
    threshold: float | None = None
    between: bool = False

    @property
    def drops(self) -> bool:
        return True

    @property
    def empties(self) -> bool:
        return self.threshold is not None

    def objection(self, sites: Sites) -> str | None:
        return self.scorer.objection(sites)

    def limits(self, protected: int) -> Limits:
        return Limits(protected, extra=int(self.fuse))

    def emit(self, site: SiteView, keep: Size, pruned: int | None) -> StepResult:
        score = self.scorer.emit(site)
        if site.size is not None:  # padding goes first, and weighs nothing where the rest is fused
            last = NEARLY_ZERO if self.fuse else LOWEST
            score = site.inline(
                lambda s, n: torch.where(n > 0, s, torch.full_like(s, last)), score, site.size
            )
        node = site.emit(
            torch.ops.thresher.keep_tokens.default, site.x, score, keep, site.protected, self.fuse
        )
        result = _selected(site, node)
        return result if self.threshold is None else self._emptied(site, score, result)

    def _emptied(self, site: SiteView, score: fx.Node, result: StepResult) -> StepResult:
        """The sizes again, 0 where a token behind the prefix misses the threshold."""
        threshold, protected = self.threshold, site.protected
        assert threshold is not None
        assert result.size is not None

        def emptied(score: torch.Tensor, size: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
            stays = (score.gather(1, kept) >= threshold) | (kept < protected)
            return torch.where(stays, size, torch.zeros_like(size))

        return replace(result, size=site.inline(emptied, score, result.size, result.kept))


@dataclass(frozen=True)
class Diverse(Step):
    """Greedy max-min: each token that stays is the one farthest from those picked before.

    Distance is one minus the cosine of the tokens themselves, and the first pick is the token whose
    nearest other one is farthest.  DivPrune (Alvar et al., CVPR 2025), section 3.
    """

    @property
    def drops(self) -> bool:
        return True

    def limits(self, protected: int) -> Limits:
        return Limits(protected)

    def emit(self, site: SiteView, keep: Size, pruned: int | None) -> StepResult:
        size = initial_sizes(site.rewriter, site.x) if site.size is None else site.size
        node = site.emit(
            torch.ops.thresher.select_diverse.default, site.x, size, keep, site.protected
        )
        return _selected(site, node)


@dataclass(frozen=True)
class MergeRedundant(Step):
    """The tokens of highest score merge among themselves, the others stay as they are.

    PiToMe (Tran et al., NeurIPS 2024), section 3.2, with its energy as the score.
    """

    scorer: Scorer

    @property
    def merges(self) -> bool:
        return True

    def objection(self, sites: Sites) -> str | None:
        return self.scorer.objection(sites)

    def limits(self, protected: int) -> Limits:
        return Limits(protected, halves=True)

    def emit(self, site: SiteView, keep: Size, pruned: int | None) -> StepResult:
        assert site.size is not None
        node = site.emit(
            torch.ops.thresher.redundant_merge.default, site.x, site.size, site.k,
            self.scorer.emit(site), keep, site.protected,
        )  # fmt: skip
        x, size, slot, kept = site.rewriter.outputs(node)
        return StepResult(node, x, size, slot, kept, 2, 3)


@dataclass(frozen=True)
class PruneMerge(Step):
    """The lowest-ranked tokens go, the next ones join the most similar of those that stay.

    DiffRate (Chen et al., ICCV 2023), section 3.  Where the schedule does not say how many are
    pruned, half of the tokens that go are pruned, rounded down, and the other half is merged:
    thresher's own default, since the published counts are learned.  Without ``prunes`` all of them
    are merged.
    """

    scorer: Scorer
    prunes: bool = True

    @property
    def merges(self) -> bool:
        return True

    @property
    def drops(self) -> bool:
        return self.prunes

    def objection(self, sites: Sites) -> str | None:
        return self.scorer.objection(sites)

    def limits(self, protected: int) -> Limits:
        return Limits(protected)

    def emit(self, site: SiteView, keep: Size, pruned: int | None) -> StepResult:
        assert site.size is not None
        node = site.emit(
            torch.ops.thresher.prune_merge.default, site.x, site.size, self.scorer.emit(site),
            self._pruned(site, keep, pruned), keep, site.protected,
        )  # fmt: skip
        x, size, slot, kept = site.rewriter.outputs(node)
        return StepResult(node, x, size, slot, kept, 2, 3)

    def _pruned(self, site: SiteView, keep: Size, pruned: int | None) -> Size:
        """Tokens that pruning leaves, between those that stay and those that come."""
        tokens = site.rewriter.size(site.x, 1)
        if not self.prunes:
            return tokens
        if isinstance(tokens, int) and isinstance(keep, int):
            halfway = tokens - (tokens - keep) // 2
            return halfway if pruned is None else min(max(pruned, keep), tokens)
        half = site.count(operator.floordiv, site.count(operator.sub, tokens, keep), 2)
        return site.count(operator.sub, tokens, half)


def _selected(site: SiteView, node: fx.Node) -> StepResult:
    """Of an operator that yields tokens, ``slot`` and ``kept``."""
    x, slot, kept = site.rewriter.outputs(node)
    size = None
    if site.size is not None:
        size = site.emit(torch.ops.thresher.gather_tokens.default, site.size, kept)
    return StepResult(node, x, size, slot, kept, 1, 2)
