"""DTEM: ToMe with a small embedding of its own to compare tokens by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from thresher.compiler.analysis.attention import Attention
from thresher.compiler.analysis.sites import Site, Sites
from thresher.passes.learning.loss import Outputs
from thresher.passes.tokens.learning.masked import MaskedForward
from thresher.passes.tokens.modules.job import Job
from thresher.passes.tokens.modules.method import LearnedReduction, ModuleOptions
from thresher.passes.tokens.modules.module import Module, Place, Shapes, normal
from thresher.passes.tokens.modules.student import Inputs, Student
from thresher.passes.tokens.reduce import Weights
from thresher.passes.tokens.step import Merge, Step
from thresher.passes.tokens.view import SiteView

WIDE = 1024  # channels from which the embedding is as wide as two heads
BEYOND = 2.0  # every cosine
CANDIDATES, SHARPNESS, PICKING = 3, 0.1, 0.1  # targets of a token in training; two temperatures


class Embedding(Module):
    """A linear of what the block's attention reads: ``[B, N, C] -> [B, 1, N, d]``, d a head's channels.

    Lee and Hong, "Learning to Merge Tokens via Decoupled Embedding for Efficient Vision
    Transformers", NeurIPS 2024, section 3.2.  It begins as the mean of the keys, which ToMe compares by.
    """

    def shapes(self, place: Place) -> Shapes:
        depth = place.width // place.heads * (1 if place.width < WIDE else 2)
        return {"weight": (depth, place.width), "bias": (depth,)}

    def watched(self, site: Site) -> tuple[fx.Node, ...]:
        return _source(site.attention), site.attention.k

    def initial(
        self, place: Place, seen: Sequence[Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        read, keys = (value.float() for value in seen)
        depth, width = self.shapes(place)["weight"]
        rows = read.flatten(0, 1)
        known = torch.cat([rows, torch.ones(len(rows), 1)], dim=1).double()
        mean = keys.mean(1).flatten(0, 1).double()
        # Ridge: fewer rows than channels, or channels that say the same, are no trouble.
        gram = known.T @ known
        ridge = 1e-6 * gram.diagonal().mean() * torch.eye(width + 1, dtype=torch.float64)
        found = torch.linalg.solve(gram + ridge, known.T @ mean).float().T
        rest = normal(generator, depth - len(found), width) * found[:, :-1].std()
        return {
            "weight": torch.cat([found[:, :-1], rest]),
            "bias": torch.cat([found[:, -1], torch.zeros(len(rest))]),
        }

    def published(self, place: Place) -> Mapping[str, str]:
        layer = f"blocks.{place.layer}.attn.qkv.metric_layer"
        return {name: f"{layer}.{name}" for name in ("weight", "bias")}

    def objection(self, sites: Sites) -> str | None:
        lacking = next((s for s in sites.sites if s.attention.source is None), None)
        if lacking is None:
            return None
        return (
            f"the keys of block {lacking.layer} come from no linear over the tokens, so there is nothing"
            " for the embedding to read: use tome"
        )

    def emit(self, site: SiteView) -> fx.Node:
        assert site.source is not None
        return site.inline(
            lambda x, w, b: embedded(x, w, b)[:, None], site.source, *site.weights.values()
        )


def embedded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``[B, N, C] -> [B, N, d]``."""
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def soft_groups(score: Tensor, count: int, sharpness: float, picking: float) -> Tensor:
    """``[B, S, T]`` which part of each source joins each target: ``count`` sources in all, softly.

    ``count`` times one pair is picked by a softmax over all pairs of a source and one of its best targets,
    and its source is taken out by as much as it was picked.  No source joins by more than the whole.

    Args:
        score: ``[B, S, T]`` cosines.
        count: sources that are to join.
        sharpness, picking: temperatures, of the cosines and of the picks; with the latter near 0 the pairs are
            those of ToMe.
    """
    best, at = score.topk(min(CANDIDATES, score.shape[2]), dim=-1)
    logits, joined = best / sharpness, torch.zeros_like(best)
    for _ in range(count):
        picked = (logits.flatten(1) / picking).softmax(-1).view_as(logits)
        joined = joined + picked
        left = 1 - picked.sum(-1, keepdim=True)
        logits = logits + left.clamp(min=torch.finfo(left.dtype).eps).log()
    whole = joined.sum(-1, keepdim=True).detach().clamp(min=1.0)
    return torch.zeros_like(score).scatter(-1, at, joined / whole)


class Grouping(MaskedForward):
    """The training of the publication: tokens join softly and stay in their places, with what is left of them.

    What a token counts in attention and in means is a real number.  As many take part in the next
    matching, and in the order, as there will be: all targets, and of the sources those of which most is
    left.  Gradients reach an embedding through what joins, not through what it reads.
    """

    def __init__(self, job: Job, sharpness: float = SHARPNESS, picking: float = PICKING) -> None:
        super().__init__(job.program, job.plan.sites)
        self.places = {place.layer: place for place in job.places}
        self.temperatures = sharpness, picking
        sites = [site for site in job.plan.sites.sites if site.layer in self.places]
        self._layers = {_source(site.attention): site.layer for site in sites}
        self._weights: Weights = {}
        self._unit = torch.empty(0)
        self._order = torch.empty(0, dtype=torch.int64)

    def trained(
        self, inputs: Inputs, weights: Weights, generator: torch.Generator
    ) -> tuple[Outputs, Tensor]:
        self._weights = weights
        return self.outputs(inputs, self.places), torch.zeros(())

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._layers:
            metric = embedded(value.detach(), *self._weights[self._layers[n]].values()).float()
            self._unit = F.normalize(metric, dim=-1, eps=1e-12)
        return value

    def reduce(self, x: Tensor, policy: Place) -> Tensor:
        weight = torch.ones(x.shape[:2]) if self._alive is None else self._alive
        prefix, goes = policy.protected, policy.came - policy.kept
        if policy.number == 0:
            self._order = torch.arange(prefix, x.shape[1]).expand(len(x), -1)
        first = prefix % 2  # sources stand at even positions
        source, target = self._order[:, first::2], self._order[:, 1 - first :: 2]
        own, before = weight.gather(1, source), weight.gather(1, target)
        joins = soft_groups(self._likeness(source, target, own, before), goes, *self.temperatures)

        coming = own[..., None] * joins
        after = before + coming.sum(1)
        was = _rows(x, target)
        mean = before[..., None] * was + coming.transpose(1, 2) @ _rows(x, source)
        mean = torch.where(after[..., None] > 0, mean / after.clamp(min=1e-12)[..., None], was)
        part = (1 - joins.sum(-1)).clamp(min=0.0)
        left = own * part

        rest = torch.where(own > 0, left, part - 1).detach()
        most = rest.argsort(dim=1, descending=True, stable=True)
        stays = most[:, : source.shape[1] - goes].sort(dim=1).values
        self._order = torch.cat([source.gather(1, stays), target], dim=1)
        self._alive = weight.scatter(1, source, left).scatter(1, target, after)
        return x.scatter(1, target[..., None].expand_as(mean), mean.to(x.dtype))

    def _likeness(self, source: Tensor, target: Tensor, own: Tensor, before: Tensor) -> Tensor:
        """``[B, S, T]`` cosines; nothing joins padding, which goes first, by index."""
        score = _rows(self._unit, source) @ _rows(self._unit, target).transpose(1, 2)
        score = torch.where(before[:, None] > 0, score, -BEYOND)
        rank = BEYOND + torch.linspace(1, 0, source.shape[1])
        return torch.where(own[..., None] > 0, score, rank[:, None])

    def _visible(self, attention: Attention, weights: Tensor) -> Tensor:
        assert self._alive is not None
        return self._keys(attention, self._alive)


def _source(attention: Attention) -> fx.Node:
    found = attention.source
    assert found is not None
    return found


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


class Dtem(LearnedReduction[ModuleOptions]):
    """Merge the most similar tokens, compared by an embedding that is trained for it.

    Lee and Hong, "Learning to Merge Tokens via Decoupled Embedding for Efficient Vision
    Transformers", NeurIPS 2024, in its modular form: only the embeddings are trained.  The step is
    that of ``tome``, and so are the sizes in attention.
    """

    name = "dtem"
    summary = "merge the tokens that are most similar by a trained embedding, at every block (DTEM)"
    Options = ModuleOptions
    by_share = False
    module = Embedding()

    def step(self, sites: Sites) -> Step:
        return Merge(by_index=True, metric=self.module)

    def student(self, job: Job) -> Student:
        return Grouping(job)
