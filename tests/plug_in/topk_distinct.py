"""A scorer of somebody else: the tokens with the most unusual keys stay."""

from __future__ import annotations

import torch
from torch import fx

from thresher.passes.tokens.methods import ScoreReduction
from thresher.passes.tokens.options import TokenOptions
from thresher.passes.tokens.score import Scorer
from thresher.passes.tokens.view import SiteView


class Distinct(Scorer):
    """Squared distance of a token's key, averaged over heads, to the mean key."""

    name = "distinct"

    def emit(self, site: SiteView) -> fx.Node:
        def distance(k: torch.Tensor) -> torch.Tensor:
            keys = k.float().mean(dim=1)
            return (keys - keys.mean(dim=1, keepdim=True)).square().sum(-1)

        return site.inline(distance, site.k)


class TopkDistinct(ScoreReduction[TokenOptions]):
    name = "topk-distinct"
    summary = "keep the tokens with the most unusual keys"

    def scorer(self) -> Scorer:
        return Distinct()
