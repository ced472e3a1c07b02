"""Selection and combination: what one reduction step does with N tokens to leave fewer.

A step emits one ``thresher`` node.  ``Merge`` matches tokens in pairs and averages them, ``Keep``
ranks them by a score and drops the rest or fuses it into one token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from thresher.compiler.analysis.sites import Sites
from thresher.passes.tokens.budget import Limits
from thresher.passes.tokens.score import Scorer
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
    """One way to reduce the tokens of a site."""

    combine: ClassVar[str]
    merges: ClassVar[bool]

    def objection(self, sites: Sites) -> str | None:
        """Why this step cannot work on a model, or None."""
        return None

    @abstractmethod
    def limits(self, protected: int) -> Limits:
        """What one application can leave."""

    @abstractmethod
    def emit(self, site: SiteView, keep: fx.Node | int) -> StepResult:
        """Append the step that leaves ``keep`` tokens."""


@dataclass(frozen=True)
class Merge(Step):
    """Bipartite soft matching by key similarity, size-weighted mean (ToMe, Bolya et al., 2023, section 3).

    ``by_index``: kept sources stay in index order (models with a class token) or in order of
    descending similarity (models without), as the reference does; later matchings depend on it.
    """

    by_index: bool
    combine: ClassVar[str] = "merge"
    merges: ClassVar[bool] = True

    def limits(self, protected: int) -> Limits:
        return Limits(protected, halves=True)

    def emit(self, site: SiteView, keep: fx.Node | int) -> StepResult:
        assert site.size is not None
        node = site.emit(
            torch.ops.thresher.bipartite_merge.default,
            site.x, site.size, site.k, keep, site.protected, self.by_index,
        )  # fmt: skip
        x, size, slot, kept = site.rewriter.outputs(node)
        return StepResult(node, x, size, slot, kept, 2, 3)


@dataclass(frozen=True)
class Keep(Step):
    """The best-scored tokens stay, in their order; the rest is dropped or fused into one more token.

    Fusing weighs by the score, so it takes scores that are never negative.
    """

    scorer: Scorer
    fuse: bool = False
    combine: ClassVar[str] = "drop"
    merges: ClassVar[bool] = False

    def objection(self, sites: Sites) -> str | None:
        return self.scorer.objection(sites)

    def limits(self, protected: int) -> Limits:
        return Limits(protected, extra=int(self.fuse))

    def emit(self, site: SiteView, keep: fx.Node | int) -> StepResult:
        score = self.scorer.emit(site)
        if site.size is not None:  # padding goes first, and weighs nothing where the rest is fused
            last = NEARLY_ZERO if self.fuse else LOWEST
            score = site.inline(
                lambda s, n: torch.where(n > 0, s, torch.full_like(s, last)), score, site.size
            )
        node = site.emit(
            torch.ops.thresher.keep_tokens.default, site.x, score, keep, site.protected, self.fuse
        )
        x, slot, kept = site.rewriter.outputs(node)
        size = None
        if site.size is not None:
            size = site.emit(torch.ops.thresher.gather_tokens.default, site.size, kept)
        return StepResult(node, x, size, slot, kept, 1, 2)
