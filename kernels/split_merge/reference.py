"""Definition of ``split_merge``: bipartite matching between a lower and an upper half by a score.

With the size as the score this is ATM's size-distinctive matching (Lee and Choi, ECAI 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.kernels.matching import PADDING, best_target, check_half, fake_merge, merged_into

LOWEST = -1e30  # below every score


def split_merge(
    x: Tensor, size: Tensor, metric: Tensor, score: Tensor, keep: int, protected: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge the N - K sources that are most like a target into it.

    Of M tokens behind the prefix the ``M // 2`` of lowest score are the sources, the others the
    targets.  A group becomes its size-weighted mean.  Similarity is the cosine of the metric's mean over
    the heads, in float32 or wider.  Ties go to the lower index among scores, and to the lower score
    among similarities.  Padding has the lowest score of all, merges first and is never chosen.

    Args:
        x: ``[B, N, C]`` tokens.
        size: ``[B, N]`` float32; 0 is padding, which never outweighs a real token.
        metric: ``[B, H, N, d]``.
        score: ``[B, N]`` float32; the prefix's entries are not read.
        keep: number K of tokens that leave.
        protected: length of the prefix that passes unchanged.

    Returns:
        Tokens ``[B, K, C]`` in index order, their sizes ``[B, K]``; ``slot [B, N]`` int64, where each
        incoming token lives now; ``kept [B, K]`` int64, the incoming position of each outgoing token.

    Raises:
        ValueError: ``keep`` cannot be reached.
    """
    tokens = x.shape[1]
    check_half("split_merge", tokens, keep, protected)
    source, target = halves(size, score, protected)
    best, nearest = best_target(size, metric, source, target)
    rank = torch.where(size.gather(1, source) == 0, PADDING, best).detach()
    merging = rank.argsort(dim=1, descending=True, stable=True)[:, : tokens - keep]
    return merged_into(x, size, source.gather(1, merging), target, nearest.gather(1, merging))


def halves(size: Tensor, score: Tensor, protected: int) -> tuple[Tensor, Tensor]:
    """Positions of sources ``[B, M // 2]`` and targets, by rising score."""
    rank = torch.where(size[:, protected:] == 0, LOWEST, score[:, protected:].detach())
    order = protected + rank.argsort(dim=1, stable=True)
    half = order.shape[1] // 2
    return order[:, :half], order[:, half:]


def fake(
    x: Tensor, size: Tensor, metric: Tensor, score: Tensor, keep: int, protected: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the result; counts may be symbols."""
    if isinstance(x.shape[1], int) and isinstance(keep, int):
        check_half("split_merge", x.shape[1], keep, protected)
    return fake_merge(x, size, keep)
