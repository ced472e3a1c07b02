"""Definition of ``redundant_merge``: PiToMe's step for a given energy (Tran et al., NeurIPS 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.kernels.matching import PADDING, best_target, check_half, fake_merge, merged_into


def redundant_merge(
    x: Tensor, size: Tensor, metric: Tensor, score: Tensor, keep: int, protected: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge r = N - K tokens into r others: the 2 r of highest score pair up, the rest is left alone.

    In order of falling score these are a source, a target, a source and so on; every source joins
    its most similar target, and the group becomes its size-weighted mean.  Similarity is the cosine
    of the metric's mean over the heads, in float32 or wider.  Ties go to the lower index among scores
    and to the target of higher score among similarities.  Padding has the highest score of all.

    Args:
        x: ``[B, N, C]`` tokens.
        size: ``[B, N]`` float32; 0 is padding, which never outweighs a real token.
        metric: ``[B, H, N, d]``.
        score: ``[B, N]`` float32; the larger, the more redundant; the prefix's entries are not read.
        keep: number K of tokens that leave.
        protected: length of the prefix that passes unchanged.

    Returns:
        Tokens ``[B, K, C]`` in index order, their sizes ``[B, K]``; ``slot [B, N]`` int64, where each
        incoming token lives now; ``kept [B, K]`` int64, the incoming position of each outgoing token.

    Raises:
        ValueError: ``keep`` cannot be reached.
    """
    tokens = x.shape[1]
    check_half("redundant_merge", tokens, keep, protected)
    source, target = _turns(size, score, tokens - keep, protected)
    if keep == tokens:
        places = torch.arange(tokens, device=x.device).expand(len(x), -1)
        return x.clone(), size.clone(), places.clone(), places.clone()
    _, into = best_target(size, metric, source, target)
    return merged_into(x, size, source, target, into)


def _turns(size: Tensor, score: Tensor, count: int, protected: int) -> tuple[Tensor, Tensor]:
    """Positions of sources and targets ``[B, r]``, in turns by falling score."""
    rank = torch.where(size[:, protected:] == 0, PADDING, score[:, protected:].detach())
    order = protected + rank.argsort(dim=1, descending=True, stable=True)[:, : 2 * count]
    return order[:, ::2], order[:, 1::2]


def fake(
    x: Tensor, size: Tensor, metric: Tensor, score: Tensor, keep: int, protected: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the result; counts may be symbols."""
    if isinstance(x.shape[1], int) and isinstance(keep, int):
        check_half("redundant_merge", x.shape[1], keep, protected)
    return fake_merge(x, size, keep)
