"""Definition of ``redundant_merge``: PiToMe's step for a given energy (Tran et al., NeurIPS 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from thresher.kernels.gather_tokens.reference import gather_tokens

EPSILON = 1e-12  # a zero key has similarity 0 to everything
PADDING = 1e4  # beyond every cosine and every energy


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
    batch, tokens, width = x.shape
    check(tokens, keep, protected)
    places = torch.arange(tokens, device=x.device).expand(batch, -1)
    if keep == tokens:
        return x.clone(), size.clone(), places.clone(), places.clone()
    source, target, into = _match(size, metric, score, tokens - keep, protected)

    wide = torch.promote_types(x.dtype, torch.float32)
    s_source, s_target = size.gather(1, source).to(wide), size.gather(1, target).to(wide)
    number = torch.arange(target.shape[1], device=x.device)
    joins = (into[:, None] == number[:, None]).to(wide)
    total = s_target + (joins * s_source[:, None]).sum(-1)
    empty = total == 0
    share = torch.where(empty, 1.0, s_target) / torch.where(empty, 1.0, total)
    shares = joins * (s_source[:, None] / torch.where(empty, 1.0, total)[..., None])
    merged = share[..., None] * gather_tokens(x, target).to(wide)
    merged = merged + shares @ gather_tokens(x, source).to(wide)

    stays = torch.ones_like(places, dtype=torch.bool).scatter(1, source, False)
    kept = torch.where(stays, places, places + tokens).sort(dim=1).values[:, :keep]
    position = stays.long().cumsum(1) - 1
    at = position.gather(1, target)
    y = gather_tokens(x, kept).scatter(1, at[..., None].expand(-1, -1, width), merged.to(x.dtype))
    out_size = size.gather(1, kept).scatter(1, at, total.to(size.dtype))
    return y, out_size, position.scatter(1, source, at.gather(1, into)), kept


def _match(
    size: Tensor, metric: Tensor, score: Tensor, count: int, protected: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of sources and targets ``[B, r]``, and which target each source joins."""
    rank = torch.where(size[:, protected:] == 0, PADDING, score[:, protected:].detach())
    order = protected + rank.argsort(dim=1, descending=True, stable=True)[:, : 2 * count]
    source, target = order[:, ::2], order[:, 1::2]
    mean = metric.to(torch.promote_types(metric.dtype, torch.float32)).mean(1)
    unit = mean / mean.square().sum(-1, keepdim=True).sqrt().clamp(min=EPSILON)
    similarity = gather_tokens(unit, source) @ gather_tokens(unit, target).transpose(1, 2)
    padding = size.gather(1, target) == 0
    similarity = torch.where(padding[:, None] | similarity.isnan(), -PADDING, similarity)
    # The first of equal maxima, which argmax does not promise.
    best = similarity.amax(-1, keepdim=True)
    return source, target, (similarity == best).long().cumsum(-1).eq(0).sum(-1)


def check(tokens: int, keep: int, protected: int) -> None:
    """Refuse counts that cannot be had."""
    behind = tokens - protected
    if behind < 1 or not tokens - behind // 2 <= keep <= tokens:
        raise ValueError(
            f"redundant_merge cannot leave {keep} of {tokens} tokens with {protected} protected:"
            f" from {tokens - max(behind, 0) // 2} to {tokens} are possible, of one more than the prefix"
        )


def fake(
    x: Tensor, size: Tensor, metric: Tensor, score: Tensor, keep: int, protected: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the result; counts may be symbols."""
    batch, tokens, width = x.shape
    if isinstance(tokens, int) and isinstance(keep, int):
        check(tokens, keep, protected)
    slot = x.new_empty(batch, tokens, dtype=torch.int64)
    return (
        x.new_empty(batch, keep, width),
        size.new_empty(batch, keep),
        slot,
        slot.new_empty(batch, keep),
    )
