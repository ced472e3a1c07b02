"""Zero-TPrune: PageRank on the attention graph, after tokens that repeat more important ones are gone."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor, fx

from thresher.compiler.analysis.sites import Sites
from thresher.passes.tokens.budget import Size
from thresher.passes.tokens.methods import TokenReduction
from thresher.passes.tokens.options import TokenOptions
from thresher.passes.tokens.score import Scorer, attention_map
from thresher.passes.tokens.sizes import initial_sizes
from thresher.passes.tokens.step import LOWEST, Keep, Step
from thresher.passes.tokens.view import SiteView

PADDING = 2.0  # beyond every cosine


@dataclass(frozen=True)
class PageRank(Scorer):
    """Importance by votes on the attention graph, lowest where a more important token is alike.

    Three stages (Zero-TPrune, Wang et al., CVPR 2024): one vote ranks the tokens; of the less important
    half those whose key is most like one of the other half go; the votes of those that stay are the
    score.  H N^2 d multiplications for the map, H N^2 for each vote, N^2 d / 2 for the cosines.

    Attributes:
        votes: on what is left of the graph, in the first quarter, the middle and the last quarter of
            the ``layers`` blocks.
        variance: heads whose scores, of mean one, have another variance than between these are left out.
        similar: tokens that go for being alike, at most half of those behind the prefix.
        favoured: the class token, whose first vote weighs sqrt(N) times that of others, or None.
    """

    name = "page-rank"
    votes: tuple[int, int, int]
    layers: int
    variance: tuple[float, float]
    similar: int
    favoured: int | None

    def emit(self, site: SiteView) -> fx.Node:
        graph = attention_map(site)
        size = initial_sizes(site.rewriter, site.x) if site.size is None else site.size
        real = site.inline(lambda size, graph: (size > 0).to(graph.dtype), size, graph)
        alive = self._distinct(site, graph, real) if self.similar else real
        quarter = self.layers // 4
        votes = self.votes[(site.layer >= quarter) + (site.layer >= self.layers - quarter)]

        def last(graph: Tensor, alive: Tensor) -> Tensor:
            score = importance(graph, alive, votes, self.variance, self.favoured)
            return torch.where(alive > 0, score, torch.full_like(score, LOWEST)).float()

        return site.inline(last, graph, alive)

    def _distinct(self, site: SiteView, graph: fx.Node, real: fx.Node) -> fx.Node:
        """``[B, N]``: one where a token stays in the graph, zero where it is padding or like another."""
        tokens = site.rewriter.size(site.x, 1)
        half = site.count(operator.floordiv, site.count(operator.sub, tokens, site.protected), 2)
        all_that_go = site.count(operator.sub, tokens, site.keep)
        gone = site.count(torch.sym_min, self.similar, site.count(torch.sym_min, all_that_go, half))

        def first(graph: Tensor, real: Tensor) -> Tensor:
            score = importance(graph, real, 1, self.variance, self.favoured)
            return torch.where(real > 0, score, torch.full_like(score, LOWEST)).float()

        def unit(k: Tensor) -> Tensor:
            mean = k.to(torch.promote_types(k.dtype, torch.float32)).mean(1)
            return mean / mean.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)

        def repeats(
            keys: Tensor, upper: Tensor, place: Tensor, kept: Tensor, real: Tensor
        ) -> Tensor:
            """Falls with the cosine to the upper half, for the lower half; padding goes first."""
            compared = real.gather(1, kept)[:, site.protected :] > 0
            cosine = keys @ upper[:, site.protected :].transpose(1, 2)
            nearest = torch.where(compared[:, None], cosine, -PADDING).amax(-1)
            nearest = torch.where(real > 0, nearest, PADDING)
            return torch.where(place < 0, -nearest, 2 * PADDING).float()

        def stays(place: Tensor, real: Tensor) -> Tensor:
            return (place >= 0).to(real.dtype) * real

        def best(rank: fx.Node, leaving: Size) -> list[fx.Node]:
            """Keys, places and positions of the best-ranked tokens."""
            kept = site.count(operator.sub, tokens, leaving)
            select = torch.ops.thresher.keep_tokens.default
            return site.rewriter.outputs(site.emit(select, keys, rank, kept, site.protected, False))

        keys = site.inline(unit, site.k)
        upper, place, kept = best(site.inline(first, graph, real), half)
        _, place, _ = best(site.inline(repeats, keys, upper, place, kept, real), gone)
        return site.inline(stays, place, real)


def importance(
    graph: Tensor,
    alive: Tensor,
    votes: int,
    variance: tuple[float, float],
    favoured: int | None,
) -> Tensor:
    """Weighted PageRank of every head, joined over the heads: ``sqrt(mean_h s_h^2)``.

    A vote is split among the living tokens in proportion to the attention paid to them.

    Args:
        graph: ``[B, H, N, N]`` attention, rows vote for columns.
        alive: ``[B, N]``, one for the nodes of the graph and zero for the others.
        votes: how often all vote, at least 1.
        variance: of a head's scores, scaled to a mean of one, that keeps the head; all are kept where
            none has it.
        favoured: a token that starts with sqrt(n) times the weight of others, n the number alive.

    Returns:
        ``[B, N]``, zero where nothing is alive.
    """
    nodes = alive[:, None, None]
    number = nodes.sum(-1, keepdim=True).clamp(min=1.0)
    tiny = torch.finfo(graph.dtype).tiny
    spread = (graph @ nodes.transpose(-1, -2)).transpose(-1, -2).clamp(min=tiny)
    score = nodes
    if favoured is not None:
        first = torch.arange(alive.shape[1], device=alive.device) == favoured
        score = torch.where(first, number.sqrt(), torch.ones_like(number)) * nodes
    for _ in range(votes):
        score = nodes * ((score / spread) @ graph)
    score = score * number / score.sum(-1, keepdim=True).clamp(min=tiny)
    spreads = ((score - 1).square() * nodes).sum(-1, keepdim=True) / number
    fits = (spreads >= variance[0]) & (spreads <= variance[1])
    heads = (fits | (fits.sum(1, keepdim=True) == 0)).to(score.dtype)
    joined: Tensor = (score.square() * heads).sum((1, 2)) / heads.sum((1, 2))
    return joined.sqrt()


class ZeroTPruneOptions(TokenOptions):
    """Options of Zero-TPrune."""

    votes: Annotated[
        tuple[int, int, int],
        Field(description="votes in the first quarter of the blocks, in the middle and in the last"
            " quarter"),
    ] = (30, 5, 1)  # fmt: skip
    similar: Annotated[
        int,
        Field(ge=0, description="tokens that go at each site for being like a more important one, at"
            " most all that go"),
    ] = 10  # fmt: skip
    variance: Annotated[
        tuple[float, float],
        Field(description="heads whose scores, of mean 1, have another variance than between these"
            " are left out"),
    ] = (0.01, 0.7)  # fmt: skip
    favour_class: Annotated[
        bool,
        Field(description="start the class token with sqrt(N) times the weight of others"),
    ] = True  # fmt: skip

    @model_validator(mode="after")
    def _sensible(self) -> ZeroTPruneOptions:
        if min(self.votes) < 1:
            raise ValueError("votes are at least 1")
        if not 0 <= self.variance[0] <= self.variance[1]:
            raise ValueError("variance is two numbers from 0 on, the lower first")
        return self


class ZeroTPrune(TokenReduction[ZeroTPruneOptions]):
    """Drop tokens that repeat more important ones, then those that get the fewest votes.

    Wang et al., "Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in
    Pre-Trained Transformers", CVPR 2024.  Training-free, and needs no class token.
    """

    name = "zero-tprune"
    summary = "drop tokens that repeat others, then those that get the fewest votes (Zero-TPrune)"
    Options = ZeroTPruneOptions

    def step(self, sites: Sites) -> Step:
        options = self.options
        favoured = sites.class_token if options.favour_class else None
        return Keep(
            PageRank(options.votes, sites.blocks, options.variance, options.similar, favoured)
        )
