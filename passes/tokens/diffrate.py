"""DiffRate: one ranking, its tail pruned, what stands just above merged."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from thresher.compiler.analysis.sites import Sites
from thresher.passes.tokens.budget import Count
from thresher.passes.tokens.methods import TokenReduction
from thresher.passes.tokens.options import TokenOptions
from thresher.passes.tokens.score import ClassAttention, ReceivedAttention
from thresher.passes.tokens.step import PruneMerge, Step


class DiffRateOptions(TokenOptions):
    """Options of DiffRate."""

    prune: Annotated[
        tuple[int, ...] | None,
        Field(
            description="with counts: tokens after pruning in each block, before the rest merges;"
            " by default half of the tokens that go are pruned"
        ),
    ] = None

    @model_validator(mode="after")
    def _prune_goes_with_counts(self) -> DiffRateOptions:
        if self.prune is not None and len(self.prune) != len(self.counts or ()):
            raise ValueError("prune has one entry for each of counts")
        return self

    def explicit(self) -> tuple[Count, ...] | None:
        if self.counts is None or self.prune is None:
            return super().explicit()
        pairs = zip(self.prune, self.counts, strict=True)
        return tuple(Count("exact", count, pruned=pruned) for pruned, count in pairs)


class DiffRate(TokenReduction[DiffRateOptions]):
    """Prune the tokens that the class token attends to least, merge the next ones into the rest.

    Chen et al., "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", ICCV
    2023: the inference step, with the counts that the options give.  Models without a class token
    are ranked by the attention that each token receives, and only merge, as the published
    CAFormer patch does.  Half pruned and half merged, without ``prune``, is thresher's own default.
    """

    name = "diffrate"
    summary = "prune the least attended tokens and merge the next ones, at every block (DiffRate)"
    Options = DiffRateOptions
    by_share = False

    def step(self, sites: Sites) -> Step:
        if sites.class_token is None:
            return PruneMerge(ReceivedAttention(), prunes=False)
        return PruneMerge(ClassAttention())
