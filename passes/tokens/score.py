"""What a token is worth: scorers yield ``[B, N]`` float32, larger is kept.

A new one is a class with a ``name``, what it ``needs``, and ``emit``; most are one call of
:meth:`SiteView.inline` with a plain torch function.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import fx

from thresher.compiler.analysis.sites import Sites
from thresher.passes.tokens.sizes import MASKED
from thresher.passes.tokens.view import SiteView


class Scorer(ABC):
    """Scores the tokens of one site."""

    name: ClassVar[str]

    def objection(self, sites: Sites) -> str | None:
        """Why this scorer cannot work on a model, in words, or None."""
        return None

    @abstractmethod
    def emit(self, site: SiteView) -> fx.Node:
        """Append the score ``[B, N]`` (float32) to the graph and return its node."""


class ClassAttention(Scorer):
    """Attention that the class token pays to each token, averaged over heads.

    EViT (Liang et al., 2022), section 3.1.  Only the class row is computed: H N d multiplications.
    """

    name = "class-attention"

    def objection(self, sites: Sites) -> str | None:
        if sites.class_token is None:
            return (
                "the model reads no class token out, so there is no class row to score by:"
                " use tome (merges by similarity), topk-norm or random"
            )
        return None

    def emit(self, site: SiteView) -> fx.Node:
        assert site.class_token is not None
        return site.emit(
            torch.ops.thresher.class_attention.default,
            site.q,
            site.k,
            site.mask,
            site.scale,
            site.class_token,
        )


class ReceivedAttention(Scorer):
    """Attention that each token receives: the mean over heads and over the queries that are no padding.

    DiffRate's score where there is no class token (Chen et al., 2023; the published CAFormer
    patch).  The whole attention map is computed once more: H N^2 d multiplications.
    """

    name = "received-attention"

    def emit(self, site: SiteView) -> fx.Node:
        def received(attention: torch.Tensor, *size: torch.Tensor) -> torch.Tensor:
            mean = attention.mean(1)
            if not size:
                return mean.mean(1)
            real = (size[0] > 0).to(mean.dtype)
            total = real.sum(1, keepdim=True).clamp(min=1.0)
            return (real[:, None] @ mean).squeeze(1) / total

        given = [] if site.size is None else [site.size]
        return site.inline(received, attention_map(site), *given)


def attention_map(site: SiteView) -> fx.Node:
    """``[B, H, N, N]`` float32 or wider: the block's attention once more, rows are queries.

    H N^2 d multiplications; fused attention does not give its map away.
    """
    scale = site.scale

    def attend(q: torch.Tensor, k: torch.Tensor, *mask: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        logits = (q.to(wide) * scale) @ k.to(wide).transpose(-1, -2)
        for bias in mask:
            if bias.dtype == torch.bool:
                bias = torch.where(bias, 0.0, MASKED)
            logits = logits + bias.to(wide)
        return logits.softmax(-1)

    return site.inline(attend, site.q, site.k, *([] if site.mask is None else [site.mask]))


class Energy(Scorer):
    """How much a token is like all the others: PiToMe's energy, high where tokens are redundant.

    ``E_i = mean_j f(cos(k_i, k_j))`` with ``f(x) = x`` from the margin on and ``exp(x - margin) - 1``
    below, over the tokens behind the prefix that are no padding; keys are means over heads.  The margin
    falls linearly to nothing behind the last block.  Tran et al., "Accelerating Transformers with
    Spectrum-Preserving Token Merging", NeurIPS 2024, section 3.2.  N^2 d multiplications.
    """

    name = "energy"

    def __init__(self, margin: float, layers: int) -> None:
        self.margin, self.layers = margin, layers

    def emit(self, site: SiteView) -> fx.Node:
        assert site.size is not None
        margin = self.margin * (1 - site.layer / self.layers)
        return site.emit(
            torch.ops.thresher.token_energy.default, site.k, site.size, margin, site.protected
        )


class Norm(Scorer):
    """Euclidean norm of the token: a baseline that a method must beat."""

    name = "norm"

    def emit(self, site: SiteView) -> fx.Node:
        return site.inline(lambda x: x.float().square().sum(-1).sqrt(), site.x)


class Random(Scorer):
    """A fixed pseudo-random order per layer, the same for every input: the control.

    ``((7919 i + seed) 104729) mod 65521`` for the token at position i, the same on every back end.
    """

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def emit(self, site: SiteView) -> fx.Node:
        seed = layer_seed(self.seed, site.layer)
        return site.inline(
            lambda x: random_score(x.shape[1], seed, x.device).expand(x.shape[0], -1), site.x
        )


def layer_seed(seed: int, layer: int) -> int:
    """Seed of one layer."""
    return seed + 1_000_003 * layer


def random_score(tokens: int, seed: int, device: torch.device | None = None) -> torch.Tensor:
    """``[1, N]`` float32 scores in [0, 65521)."""
    position = torch.arange(tokens, dtype=torch.int64, device=device).unsqueeze(0)
    first = (position * 7919 + seed % 65521) % 65521
    # 104729 = 2 * 19604 (mod 65521): in two steps nothing leaves int32, in which OpenVINO counts.
    return (first * 19604 % 65521 * 2 % 65521).float()
