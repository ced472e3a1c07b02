"""ATS: tokens sampled by inverse transform from the attention that the class token pays to values."""

from __future__ import annotations

import operator
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, fx

from thresher.compiler.analysis.sites import Sites
from thresher.passes.tokens.methods import TokenReduction
from thresher.passes.tokens.options import TokenOptions
from thresher.passes.tokens.score import ClassAttention
from thresher.passes.tokens.step import Keep, Step
from thresher.passes.tokens.view import SiteView

SAMPLED = 1.0  # what a sampled token scores at least, and no other does


class Sampling(ClassAttention):
    """Significance, and one more for tokens that are sampled: in [0, 1) without, in [1, 2] with.

    The significance of a token behind the prefix is ``a_j |v_j|``, scaled to a sum of one: a is the
    class token's attention, averaged over heads, and ``|v|`` the length of the values of all heads
    together.  One sample is drawn for each token that is to stay.  ATS (Fayyaz et al., ECCV 2022),
    sections 3.1 and 3.2.
    """

    name = "sampling"

    def emit(self, site: SiteView) -> fx.Node:
        points = site.count(operator.sub, site.keep, site.protected)
        given = [] if isinstance(points, int) else [points]

        def sampling(attention: Tensor, v: Tensor, *symbol: int) -> Tensor:
            wide = v.to(attention.dtype)
            worth = attention * wide.square().sum((1, 3)).sqrt()
            behind = torch.arange(worth.shape[1], device=worth.device) >= site.protected
            worth = torch.where(behind, worth, torch.zeros_like(worth))
            share = worth / worth.sum(1, keepdim=True).clamp(min=torch.finfo(worth.dtype).tiny)
            return share + SAMPLED * sampled(share, *(symbol or (points,))).to(share.dtype)

        return site.inline(sampling, super().emit(site), site.v, *given)


def sampled(share: Tensor, points: int) -> Tensor:
    """Which tokens inverse transform sampling takes at the quantiles ``(2 k - 1) / (2 K)``.

    Each quantile takes the token whose cumulative share, in index order, is nearest to it; the lower
    index among equals.  Tokens that are taken twice count once, and those without a share never.

    Args:
        share: ``[B, N]``, never negative, each row summing to one.
        points: number K of quantiles, at least 1.

    Returns:
        ``[B, N]`` bool, at most K of a row true.
    """
    at = (2 * torch.arange(points, device=share.device) + 1).to(share.dtype) / (2 * points)
    distance = (share.cumsum(1)[:, None] - at[:, None]).abs()
    distance = torch.where(share[:, None] > 0, distance, torch.full_like(distance, 2.0))
    nearest = distance.argmin(-1, keepdim=True)
    return (nearest == torch.arange(share.shape[1], device=share.device)).any(1) & (share > 0)


class AtsOptions(TokenOptions):
    """Options of ATS."""

    capped: Annotated[
        bool,
        Field(description="keep no more than the tokens that are sampled and leave the other places"
            " empty, as published; by default the most significant others fill them"),
    ] = False  # fmt: skip


class Ats(TokenReduction[AtsOptions]):
    """Sample tokens by the class token's attention to their values.

    Fayyaz et al., "Adaptive Token Sampling for Efficient Vision Transformers", ECCV 2022.
    Training-free.  Samples that fall on one token leave fewer tokens than were asked for, a number that
    differs from image to image; here a count is a count, so that all images of a batch have one.
    """

    name = "ats"
    summary = "sample tokens by the class token's attention to their values (ATS)"
    Options = AtsOptions

    def step(self, sites: Sites) -> Step:
        return Keep(Sampling(), threshold=SAMPLED if self.options.capped else None)
