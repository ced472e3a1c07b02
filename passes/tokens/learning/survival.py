"""The learnable kept count of DiffRate (Chen et al., ICCV 2023, section 3.2).

For every site and each of its two operations, pruning and merging, a distribution over candidate
counts is learned.  Its mean is the kept count; the probability that the i-th best token survives is
the chance that the count is at least i, and carries the gradient through the hard mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

PRUNE, MERGE = 0, 1
STEEPEST = 1000.0  # tilt from one count to none
BISECTIONS = 50


def candidates(patches: int, granularity: int) -> Tensor:
    """``[M]`` float32 kept counts of unprotected tokens: all, all less g, all less 2 g, ... above 0."""
    return torch.arange(patches, 0, -granularity, dtype=torch.float32)


def flattest(mean: Tensor, choices: Tensor) -> Tensor:
    """Logits ``[..., M]`` of the distribution with these means ``[...]`` that has the most entropy.

    That is ``softmax(b c)`` over the counts c, with b found by bisection.  Means are met as far as
    they lie within the candidates.
    """
    counts = choices.double() / choices.max()
    wanted = (mean / choices.max())[..., None]
    low, high = torch.full_like(wanted, -STEEPEST), torch.full_like(wanted, STEEPEST)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        above = ((middle * counts).softmax(-1) * counts).sum(-1, keepdim=True) > wanted
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low * counts).to(choices.dtype)


def kept(logits: Tensor, choices: Tensor) -> Tensor:
    """Expected counts, rounded up, straight through: ``[..., M] -> [...]``."""
    mean = (logits.softmax(-1) * choices).sum(-1)
    return mean + (mean.ceil() - mean).detach()


def survival(logits: Tensor, choices: Tensor, patches: int) -> Tensor:
    """``[..., M] -> [..., patches]``: the probability that the i-th ranked token stays, i from 1."""
    rank = torch.arange(1, patches + 1, dtype=choices.dtype)
    return logits.softmax(-1) @ (choices[:, None] >= rank).to(logits.dtype)


def mask(probability: Tensor, count: Tensor) -> Tensor:
    """Exactly 1 for the first ``count`` ranks and 0 behind, with the gradient of the probability."""
    rank = torch.arange(1, probability.shape[-1] + 1, dtype=count.dtype)
    hard = (rank <= count.detach()[..., None]).to(probability.dtype)
    return hard + (probability - probability.detach())


def smallest(before: Tensor, pruned: Tensor, merged: Tensor) -> Tensor:
    """Tokens behind a site: the least of the three, its gradient to both learned counts.

    A plain minimum would leave the larger of the two counts of a site without any gradient.
    """
    least = torch.minimum(before, torch.minimum(pruned, merged)).detach()
    return least + (pruned - pruned.detach()) + (merged - merged.detach())
